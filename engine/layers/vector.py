"""A vector of weights that no other layer holds, such as attention's sinks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.layers.placement import Placement, Read


@dataclass(slots=True)
class Vector:
    """Rounded to the model's dtype, held in the activations'."""

    name: str
    size: int
    value: Tensor = field(init=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {self.name: (self.size,)}

    def load(self, read: Read, place: Placement) -> None:
        stored = torch.empty(self.size, dtype=place.vectors, device=place.device)
        read(self.name, stored)
        self.value = stored.to(place.activations)
