"""What a weighted layer needs to be filled: where it goes, in which form, and a way to read the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Read = Callable[[str, Tensor], None]
"""read(name, out): the checkpoint's tensor, cast into `out`, which has its shape."""


@dataclass(frozen=True)
class Placement:
    """Where weights go and in which form."""

    device: torch.device
    dtype: torch.dtype  # of weights
    linear_form: str  # kernels/linear.py's name for how linear weights are laid out

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
