"""Replayed decode steps give the bits of steps that run as they are, whatever a family does in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.device import CpuDevice
from engine.llm import LLM, Completion
from engine.messages import SamplingParams
from kernels.cpu import recording, threads
from kernels.cpu.recording import Memory, Recording, Unrecordable
from kernels.linear import linear, pack
from tests.engine.families import make_family
from tests.engine.test_mixtures import random_model
from tests.engine.tiny import ARCHITECTURES, make_checkpoint

PARAMS = [SamplingParams(max_tokens=n, temperature=t, seed=n, ignore_eos=True, logprobs=3)
          for n, t in ((12, 0.0), (7, 1.0), (3, 0.7), (9, 0.0), (1, 1.0))]  # fmt: skip
PROMPTS = [[(7 * i + 3 * j) % 250 for j in range(n)] for i, n in enumerate((40, 3, 17, 64, 5))]


def answers(folder: Path, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], **options: Any) -> list[Completion]:
    """A batch that grows and shrinks: prompts of different lengths, answers too."""
    monkeypatch.setattr(CpuDevice, "graph_sizes", sizes)
    monkeypatch.setattr("kernels.linear.choose_form", lambda *_: ("numba", "whatever a busy machine measures"))
    return LLM(folder, max_context=128, max_batch_tokens=32, max_sequences=16, **options).generate(PROMPTS, PARAMS)


def folder_of(family: str, tmp_path: Path) -> Path:
    if family in ARCHITECTURES:
        return make_checkpoint(tmp_path / "m", family, 3, dtype=torch.bfloat16, max_position_embeddings=512)
    if family.islower():
        random_model(family, 0).save_pretrained(tmp_path / "m")
    else:
        (tmp_path / "m").mkdir()
        make_family(tmp_path / "m", family, 0)
    return tmp_path / "m"


FAMILIES = (*ARCHITECTURES, "mixtral", "gpt_oss", "deepseek_v3", "Gemma2ForCausalLM", "GPT2LMHeadModel",
            "Phi3ForCausalLM", "Cohere2ForCausalLM", "GraniteForCausalLM")  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replayed_step_gives_the_bits_of_one_that_runs_as_it_is(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of(family, tmp_path)
    replayed = answers(folder, monkeypatch, tuple(range(1, 17)))
    assert replayed == answers(folder, monkeypatch, ())
    assert replayed == answers(folder, monkeypatch, (4, 16)), "padded to the next size"


def test_the_plain_definitions_run_as_they_are(tmp_path: Path) -> None:
    llm = LLM(folder_of("LlamaForCausalLM", tmp_path), max_context=128, kernels="torch", dtype="float32")
    llm.generate(PROMPTS, PARAMS)
    assert not llm.engine.runner.graphs.graphs  # type: ignore[attr-defined]


def test_each_size_is_captured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    class Counted(Recording):
        def __init__(self, work: Any, memory: Memory) -> None:
            captured.append(1)
            super().__init__(work, memory)

    monkeypatch.setattr(recording, "Recording", Counted)
    llm = LLM(folder_of("LlamaForCausalLM", tmp_path), max_context=128, max_sequences=16)
    llm.generate(PROMPTS, PARAMS)
    first = len(captured)
    llm.generate(PROMPTS, PARAMS)
    assert len(captured) == first <= 6


def product(x: torch.Tensor, packed: Any) -> torch.Tensor:
    x = x * 0.5 + 1
    for _ in range(20):
        x = linear(x, packed).contiguous()
    return x


def test_a_replay_follows_its_inputs_through_kernels_and_torch() -> None:
    threads.set_threads(2)
    packed, x = pack(torch.randn(64, 64) / 8, "numba"), torch.randn(3, 64)
    recorded = Recording(lambda: product(x, packed), Memory())
    assert torch.equal(recorded.replay(), product(x, packed))
    for _ in range(3):
        x.copy_(torch.randn(3, 64))
        assert torch.equal(recorded.replay(), product(x, packed))


def test_recordings_share_their_memory() -> None:
    threads.set_threads(2)
    packed, memory = pack(torch.randn(64, 64) / 8, "numba"), Memory()
    x = torch.randn(8, 64)
    before = Recording(lambda: product(x, packed), memory)
    before.replay()
    more = [Recording(lambda: product(x, packed), memory) for _ in range(5)]
    own = 2 * x.nbytes  # what torch's own operations are given and give is kept by each
    assert memory.nbytes <= len([before, *more]) * own + 3 * x.nbytes
    assert torch.equal(before.replay(), product(x, packed))


def test_work_that_reads_a_value_is_refused() -> None:
    x = torch.randn(4)
    with pytest.raises(Unrecordable, match="reads a value"):
        Recording(lambda: x * 2 if x.sum() > 0 else x, Memory())
    assert torch.equal(Recording(lambda: x + 1, Memory()).replay(), x + 1), "the next recording is not disturbed"
