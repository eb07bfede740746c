"""A linear layer: which checkpoint projections it stacks, and how it multiplies.

Knows the packed form that kernels/linear.py made of the weight; does not know what the layer is for.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.layers.placement import Placement, Read
from kernels.linear import PackedLinear, linear, pack


@dataclass(slots=True)
class Linear:
    """y[T, N] = x[T, K] W^T + b. `parts` are the checkpoint's projections, stacked along N in this order."""

    parts: dict[str, int]  # checkpoint name -> its output features
    in_features: int
    has_bias: bool
    weight: PackedLinear = field(init=False)
    bias: Tensor | None = None

    def __call__(self, x_TK: Tensor) -> Tensor:
        return linear(x_TK, self.weight, self.bias)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors that this layer is made of."""
        weights: dict[str, tuple[int, ...]] = {f"{p}.weight": (n, self.in_features) for p, n in self.parts.items()}
        return weights | {f"{p}.bias": (n,) for p, n in self.parts.items() if self.has_bias}

    def load(self, read: Read, place: Placement) -> None:
        """Each part goes straight to its rows of the one weight, cast on the way; then the weight is packed."""
        sizes = list(self.parts.values())
        weight = torch.empty(sum(sizes), self.in_features, dtype=place.dtype, device=place.device)
        for part, rows in zip(self.parts, weight.split(sizes), strict=True):
            read(f"{part}.weight", rows)
        self.weight = pack(weight, place.linear_form)
        if self.has_bias:
            bias = torch.empty(sum(sizes), dtype=place.dtype, device=place.device)
            for part, rows in zip(self.parts, bias.split(sizes), strict=True):
                read(f"{part}.bias", rows)
            self.bias = bias.to(place.activations)
