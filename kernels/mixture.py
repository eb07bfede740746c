"""What a mixture of experts is, in numbers: how it chooses and how an expert's gate works. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Routing:
    """How a model chooses; the same for all of its layers."""

    top_k: int
    scoring: str = "softmax"  # over all experts, or "sigmoid" of each
    normalise: bool = False  # the chosen weights are divided by their sum: softmax over the chosen logits alone
    scale: float = 1.0  # of the weights, at last
    groups: int = 1  # experts are chosen from the best `kept_groups` of so many equal groups of neighbours
    kept_groups: int = 1
    group_best: int = 1  # so many of a group's best scores add up to the group's


@dataclass(frozen=True, slots=True)
class Gate:
    """Of an expert's two halves g and u: (u + offset) g sigmoid(alpha g), g at most `limit`, u within +-limit."""

    alpha: float = 1.0
    limit: float = math.inf
    offset: float = 0.0


SILU = Gate()
