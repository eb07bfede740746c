"""Attention over a compressed cache: one latent vector and one rotated key per token, shared by all heads.

DeepSeek-V2, arXiv 2405.04434, section 2.1. Each head's own projections of keys and values are folded into its query and
its result, so that nothing is ever expanded: not in the cache, not in a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.batch import Batch, LayerCache
from engine.layers.placement import Placement, Read
from engine.layers.rope import RotaryTable
from engine.quantization import Scheme, Stored
from kernels import Kernels
from kernels.experts import PackedExperts, form_of
from kernels.per_head import per_head
from kernels.quantized import dequantize

# T tokens, H heads, R features of the latent, P rotated features, N other features of a key, V of a value


@dataclass(slots=True)
class LatentAttention:
    """Causal attention of a step's tokens over everything their sequences have in the cache."""

    kernels: Kernels
    rope: RotaryTable
    scale: float  # of q k^T
    rank: int  # R

    def __call__(self, q_THF: Tensor, k_T1F: Tensor, batch: Batch, cache: LayerCache) -> Tensor:
        """[T, H, R] from F = P + R features, the rotated ones first. q is rotated in place; k goes to the cache."""
        (latents,), rope = cache, self.rope
        self.kernels.rope_kv(
            q_THF, k_T1F, None, rope.cos_sin, batch.positions, batch.slot_mapping, latents, None,
            interleaved=rope.rope is not None and rope.rope.interleaved,
        )  # fmt: skip
        return self.kernels.latent_attention(
            q_THF, latents, batch.query_start, batch.seq_lens, batch.block_tables, max_query_len=batch.max_query_len,
            max_seq_len=batch.max_seq_len, scale=self.scale, rank=self.rank,
        )  # fmt: skip


@dataclass(slots=True)
class HeadProjections:
    """What expands a latent to a head's key [N] and value [V], applied to the other side of each product instead."""

    name: str
    heads: int
    key_size: int  # N
    value_size: int  # V
    rank: int  # R
    kernels: Kernels
    scheme: Scheme | None = None  # where it is stored quantised; it is kept in the model's dtype
    keys: PackedExperts = field(init=False)  # H times [R, N]
    values: PackedExperts = field(init=False)  # H times [V, R]

    def absorb(self, q_THN: Tensor) -> Tensor:
        """[T, H, R]: what a latent must be multiplied by to give q k."""
        return per_head(q_THN, self.keys)

    def expand(self, o_THR: Tensor) -> Tensor:
        """[T, H, V] from the attended latents."""
        return per_head(o_THR, self.values)

    @property
    def matrix(self) -> tuple[int, int]:
        """(outputs, inputs) in the checkpoint."""
        return self.heads * (self.key_size + self.value_size), self.rank

    def find_schemes(self, scheme_of: Callable[[str], Scheme | None]) -> Stored:
        """The tensors that stand for a quantised weight. A scheme for a plain one is --quantize's, of no use here."""
        scheme = scheme_of(self.name)
        found = {} if scheme is None else scheme.stored(self.name, *self.matrix)
        if found.keys() <= {f"{self.name}.weight"}:
            return {}
        self.scheme = scheme
        return found

    @property
    def expanded(self) -> int:
        """Weights that are stored quantised and kept as plain numbers."""
        return math.prod(self.matrix) if self.scheme else 0

    def shapes(self) -> dict[str, tuple[int, ...]]:
        if self.scheme is None:
            return {f"{self.name}.weight": self.matrix}
        return {name: shape for name, (shape, _) in self.scheme.stored(self.name, *self.matrix).items()}

    def load(self, read: Read, place: Placement) -> None:
        sizes = (self.key_size, self.value_size)
        weight = torch.empty(self.matrix, dtype=place.dtype, device=place.device)
        if self.scheme is None:
            read(f"{self.name}.weight", weight)
        else:
            weight.copy_(dequantize(self.scheme.read(self.name, *self.matrix, read.stored)))
        form, where = form_of(self.kernels.name), (place.dtype, place.device)
        self.keys = PackedExperts.empty(form, self.heads, self.rank, self.key_size, *where)
        self.values = PackedExperts.empty(form, self.heads, self.value_size, self.rank, *where)
        for head, rows in enumerate(weight.split(sum(sizes))):
            key, value = rows.split(sizes)
            self.keys.put(head, key.T)
            self.values.put(head, value)
