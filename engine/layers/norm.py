"""RMSNorm, with the residual stream's addition folded in. Knows its weight; the arithmetic is the kernels'."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.layers.placement import Placement, Read
from kernels import Kernels


@dataclass(slots=True)
class RMSNorm:
    """Zhang & Sennrich 2019, arXiv 1910.07467. The weight is rounded to the model's dtype, held in the activations'."""

    name: str
    size: int
    eps: float
    kernels: Kernels
    weight: Tensor = field(init=False)

    def __call__(self, x: Tensor) -> Tensor:
        """Over the last dimension, whatever comes before it."""
        return self.kernels.rms_norm(x, self.weight, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(norm(r), r) with r = x + residual, which may be written over `residual_TD`."""
        return self.kernels.add_rms_norm(x_TD, residual_TD, self.weight, self.eps)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {f"{self.name}.weight": (self.size,)}

    def load(self, read: Read, place: Placement) -> None:
        weight = torch.empty(self.size, dtype=place.vectors, device=place.device)
        read(f"{self.name}.weight", weight)
        self.weight = weight.to(place.activations)
