"""Token embeddings, and the output head where it shares their weight."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.layers.placement import Placement, Read
from kernels.linear import PackedLinear, linear, pack, rows


@dataclass(slots=True)
class Embedding:
    """One row per token id. Tied to the head, both read the one packed weight; else only rows are ever looked up."""

    name: str
    vocab_size: int
    size: int
    tied: bool
    weight: PackedLinear = field(init=False)
    activations: torch.dtype = field(init=False)

    def __call__(self, token_ids_T: Tensor) -> Tensor:
        """[T, D] in the activations' dtype."""
        return rows(self.weight, token_ids_T).to(self.activations)

    def project(self, x_LD: Tensor) -> Tensor:
        """The tied head: logits [L, V]."""
        return linear(x_LD, self.weight, None)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.weight": (self.vocab_size, self.size)}

    def load(self, read: Read, place: Placement) -> None:
        weight = torch.empty(self.vocab_size, self.size, dtype=place.dtype, device=place.device)
        read(f"{self.name}.weight", weight)
        self.weight = pack(weight, place.linear_form if self.tied else "torch")
        self.activations = place.activations
