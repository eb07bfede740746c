"""The real worker and engine, with a model that can be made to fail by what it is fed. Run with `--fd N`.

A sequence whose prompt holds NAN has hidden states of NaN from then on, as a broken kernel or an overflow gives; one
that holds RAISE makes the model raise, as a bug would.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine import worker
from engine.batch import Batch, LayerCache
from engine.engine import Engine
from engine.load import load_engine
from engine.messages import EngineOptions, Ready
from engine.runner import ModelRunner

NAN, RAISE = 250, 251


def make_faulty(runner: ModelRunner) -> None:
    """Wrap the model's forward; a sequence is known again in later steps by its first block."""
    forward, poisoned = runner.model.forward, set()

    def faulty(batch: Batch, caches: list[LayerCache]) -> Tensor:
        hidden = forward(batch, caches)
        assert not (batch.token_ids == RAISE).any(), "ordered by the prompt"
        starts = batch.query_start.tolist()
        for table, start, end in zip(batch.block_tables.tolist(), starts, starts[1:], strict=False):
            if batch.positions[start] == 0:
                poisoned.discard(table[0])
            if (batch.token_ids[start:end] == NAN).any():
                poisoned.add(table[0])
            if table[0] in poisoned:
                hidden[start:end] = torch.nan
        return hidden

    runner.model.forward = faulty  # type: ignore[method-assign]


def load(options: EngineOptions, progress: worker.Report) -> tuple[Engine, Ready]:
    engine, ready = load_engine(options, progress)
    assert isinstance(engine.runner, ModelRunner)
    make_faulty(engine.runner)
    return engine, ready


if __name__ == "__main__":
    worker.main(load)
