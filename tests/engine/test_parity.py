"""The whole engine against transformers: greedy continuations and logprobs, however the work was cut up."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.messages import Submit
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from tests.engine.crowd import Answer, make_engine, make_runner, run, submit
from tests.engine.tiny import ARCHITECTURES, make_checkpoint

LENGTH, NEW = 70, 24


class Case:
    """One random checkpoint, here and in transformers."""

    def __init__(self, folder: Path, architecture: str, kernels: str, seed: int) -> None:
        make_checkpoint(folder, architecture, seed, max_position_embeddings=512)
        self.runner: ModelRunner = make_runner(folder, kernels, num_blocks=48)
        self.reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.rng = random.Random(seed)

    def prompt(self, length: int = LENGTH) -> list[int]:
        return [self.rng.randrange(self.runner.vocab_size) for _ in range(length)]

    def check(self, asked: Submit, answer: Answer) -> None:
        """Each drawn token is transformers' likeliest given those before; all logprobs are its logprobs."""
        assert answer.finish == "length"
        assert len(answer.tokens) == len(answer.logprobs) == asked.params.max_tokens
        ids = torch.tensor([asked.prompt + answer.tokens])
        with torch.no_grad():
            expected = self.reference(ids).logits[0].double().log_softmax(-1)
        start = len(asked.prompt) - 1
        assert answer.tokens == expected[start:-1].argmax(-1).tolist()
        entries = [*(answer.prompt_logprobs or [None])[1:], *answer.logprobs]
        first = start - (len(entries) - len(answer.tokens))
        for row, entry in zip(expected[first:-1], entries, strict=True):
            assert entry is not None
            assert entry.logprob == pytest.approx(row[entry.token].item(), abs=1e-4)
            likeliest = row.topk(len(entry.top)).values.tolist()
            assert [value for _, value in entry.top] == pytest.approx(likeliest, abs=1e-4)


@pytest.fixture(params=[(name, kernels) for name in ARCHITECTURES for kernels in ("auto", "torch")], ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    seed = random.randrange(2**31)
    print(f"seed {seed}")
    return Case(tmp_path / "model", *request.param, seed)


def test_the_engine_continues_as_transformers_does_however_the_steps_are_cut(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One prefill; chunks of 7; a cached prefix; preempted and recomputed; beside others."""
    asked = submit(0, case.prompt(), max_tokens=NEW, logprobs=4, prompt_logprobs=3)
    alone = run(make_engine(case.runner), [asked])[0]
    assert alone.prompt_logprobs is not None
    assert len(alone.prompt_logprobs) == LENGTH
    case.check(asked, alone)

    chunked = run(make_engine(case.runner, max_batch_tokens=7, max_sequences=7), [asked])[0]
    case.check(asked, chunked)

    engine = make_engine(case.runner)
    prefix = asked.prompt[:50]
    run(engine, [submit(1, prefix, max_tokens=1)])
    cached = submit(2, asked.prompt, max_tokens=NEW, logprobs=4)
    answer = run(engine, [cached])[2]
    assert answer.cached == 48
    case.check(cached, answer)

    monkeypatch.setattr(Scheduler, "_growth", lambda self, seq: 0.0)  # admit as if nobody would grow, so as to preempt
    crowd = [submit(i, case.prompt(60), max_tokens=NEW, logprobs=2, prompt_logprobs=0) for i in range(5)]
    small = make_engine(case.runner, num_blocks=16, max_batch_tokens=200)
    answers = run(small, crowd)
    assert small.scheduler.preemptions > 0
    for each in crowd:
        case.check(each, answers[each.id])
