"""The Triton kernels where they are used: whole models give the definitions' logits through the real layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.batch import Batch
from engine.checkpoint import load_model, open_checkpoint
from kernels import choose, definitions
from tests.engine.tiny import make_checkpoint

# Each step: for each of three sequences its new tokens and, with those, all its tokens so far.
STEPS = (((40, 40), (7, 7), (1, 1)), ((9, 49), (1, 8), (20, 21)), ((1, 50), (1, 9), (1, 22)))
BLOCKS = 4  # of each sequence


def batch_of(lengths: tuple[tuple[int, int], ...], token_ids: torch.Tensor, device: torch.device) -> Batch:
    """A step of the sequences, in blocks that lie in reverse order."""
    tables = torch.arange(3 * BLOCKS).flip(0).view(3, BLOCKS)
    positions = [torch.arange(total - count, total) for count, total in lengths]
    slots = [tables[s, at // 16] * 16 + at % 16 for s, at in enumerate(positions)]
    starts = torch.tensor([0, *(count for count, _ in lengths)]).cumsum(0)
    return Batch(
        token_ids=torch.cat([token_ids[s, at] for s, at in enumerate(positions)]).to(device),
        positions=torch.cat(positions).to(device),
        slot_mapping=torch.cat(slots).to(device),
        query_start=starts.int().to(device),
        seq_lens=torch.tensor([total for _, total in lengths], dtype=torch.int32, device=device),
        block_tables=tables.int().to(device),
        logits_rows=(starts[1:] - 1).to(device),
        max_query_len=max(count for count, _ in lengths),
        max_seq_len=max(total for _, total in lengths),
    )


@pytest.mark.parametrize(
    ("architecture", "config"),
    [("LlamaForCausalLM", {}), ("MistralForCausalLM", {"sliding_window": 11}), ("Qwen3ForCausalLM", {})],
)
def test_models_give_the_definitions_logits(
    architecture: str, config: dict[str, int], tmp_path: Path, generator: torch.Generator, device: torch.device
) -> None:
    checkpoint = open_checkpoint(make_checkpoint(tmp_path, architecture, seed=3, num_hidden_layers=2, **config))
    token_ids = torch.randint(0, 256, (3, 64), generator=generator)
    logits = []
    for kernels in (definitions(), choose("cuda", "triton")):
        model = load_model(checkpoint, device, torch.float32, kernels, "torch")
        shape = (2, 3 * BLOCKS, model.config.num_kv_heads, 16, model.config.head_dim)
        caches = [tuple(torch.full(shape, torch.nan, device=device)) for _ in range(2)]
        steps = []
        for lengths in STEPS:
            batch = batch_of(lengths, token_ids, device)
            with torch.inference_mode():
                hidden = model.forward(batch, caches)
                steps.append(model.logits(hidden[batch.logits_rows]))
        logits.append(torch.cat(steps))
    assert logits[0].std() > 0.1, "flat logits would hide a fault"
    torch.testing.assert_close(logits[1], logits[0], atol=1e-4, rtol=1e-4)
