"""A real tiny model under the real scheduler, for tests that compare a crowd with its members' solo runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.block_pool import BlockPool
from engine.checkpoint import load_model, open_checkpoint
from engine.device import CpuDevice
from engine.engine import Engine
from engine.messages import BLOCK_SIZE, Delta, SamplingParams, Submit, TokenLogprob
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from kernels import choose

MAX_CONTEXT = 512


@dataclass
class Answer:
    """All that was said about one sequence."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    finish: str | None = None
    error: str | None = None
    stop_token: int | None = None
    cached: int = 0

    def add(self, delta: Delta) -> None:
        assert self.finish is None, "a delta after the end"
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs or []
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.cached = delta.cached or self.cached
        self.finish, self.error, self.stop_token = delta.finish, delta.error, delta.stop_token


def make_runner(folder: Path, kernels: str, *, max_batch_tokens: int = 512, num_blocks: int = 64) -> ModelRunner:
    """A runner whose cache holds NaN until it is written: what a step must not read, it must not read."""
    table = choose("cpu", kernels)
    form = "torch" if kernels == "torch" else "numba"
    model = load_model(open_checkpoint(folder), torch.device("cpu"), torch.float32, table, form)
    shapes = [(num_blocks, heads, BLOCK_SIZE, features) for heads, features in model.config.cache_heads]
    caches = [tuple(torch.full(shape, torch.nan) for shape in shapes) for _ in range(model.config.num_layers)]
    limits: dict[str, Any] = {"max_batch_tokens": max_batch_tokens, "max_sequences": 64, "max_context": MAX_CONTEXT}
    return ModelRunner(model, caches, table, CpuDevice(), **limits)


def make_engine(
    runner: ModelRunner, *, num_blocks: int = 64, max_batch_tokens: int = 512, max_sequences: int = 64
) -> Engine:
    """A fresh engine over a runner that may have served others before."""
    assert not runner.rows, "a row was not released"
    scheduler = Scheduler(
        BlockPool(num_blocks),
        max_batch_tokens=max_batch_tokens,
        max_sequences=max_sequences,
        max_context=MAX_CONTEXT,
        vocab_size=runner.vocab_size,
    )
    return Engine(scheduler, runner)


def submit(id: int, prompt: list[int], **params: Any) -> Submit:
    return Submit(id=id, prompt=prompt, params=SamplingParams(**{"max_tokens": 12, "temperature": 0.0, **params}))


def run(engine: Engine, submits: Iterable[Submit]) -> dict[int, Answer]:
    """Everything at once, to the end."""
    for each in submits:
        engine.add(each)
    answers: dict[int, Answer] = defaultdict(Answer)
    while engine.has_work():
        for delta in engine.step().deltas:
            answers[delta.id].add(delta)
        engine.scheduler.check()
    return answers
