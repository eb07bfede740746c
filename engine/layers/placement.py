"""What a weighted layer needs to be filled: where it goes, in which form, and a way to read the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Read:
    """The checkpoint's tensors by name."""

    copy: Callable[[str, Tensor], None]  # cast into a tensor that has its shape
    stored: Callable[[str], Tensor]  # as it is stored

    def __call__(self, name: str, out: Tensor) -> None:
        self.copy(name, out)


@dataclass(frozen=True)
class Placement:
    """Where weights go and in which form."""

    device: torch.device
    dtype: torch.dtype  # of weights
    linear_form: str  # kernels/linear.py's name for how linear weights are laid out
    packs_quantized: bool = False  # quantised weights stay so; else they become `dtype`

    @property
    def quantized_form(self) -> str:
        """kernels/quantized.py's name for how quantised weights that stay so are laid out."""
        return "numba" if self.device.type == "cpu" else "triton"

    @property
    def vectors(self) -> torch.dtype:
        """Norms' weights and biases are rounded to the model's dtype; beside quantised matrices they stay exact."""
        return self.activations if self.packs_quantized else self.dtype

    @property
    def activations(self) -> torch.dtype:
        """On a CPU activations are float32 whatever the weights are: 16 bits save reading there, not arithmetic."""
        return torch.float32 if self.device.type == "cpu" else self.dtype


class Layer(Protocol):
    """Anything with weights: Linear, RMSNorm, Embedding."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The checkpoint's tensors that it is made of."""

    def load(self, read: Read, place: Placement) -> None:
        """Fill it; called once, after all shapes have been found right."""
