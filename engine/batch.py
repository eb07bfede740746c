"""The step's flat arrays, passed explicitly to `model(batch, caches)`.

T tokens in the step, S sequences in the step, B columns of the block table, L rows whose logits are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class Batch:
    """One step's input. Tokens of one sequence are contiguous and in order; sequences follow each other."""

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slot_mapping: Tensor  # int64 [T]: block * BLOCK_SIZE + offset where the token's K and V go; -1 writes nothing
    query_start: Tensor  # int32 [S + 1]: prefix sums of tokens per sequence
    seq_lens: Tensor  # int32 [S]: tokens in the cache after this step
    block_tables: Tensor  # int32 [S, B]
    logits_rows: Tensor  # int64 [L]: rows of [T] whose logits are wanted
    max_query_len: int
    max_seq_len: int


LayerCache = tuple[Tensor, ...]
"""What one layer keeps (`ModelConfig.cache_heads`): K and V, each [num_blocks, kv_heads, BLOCK_SIZE, head_dim]."""
