"""The weighted layers of a model under their checkpoint names.

A model's constructor asks for its layers by name and gets them empty; the loader (engine/checkpoint.py) compares the
`shapes()` of all with the files, then calls `load` on each. Models know no files, the loader knows no layer's inside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.layers.placement import Layer
from kernels import Kernels


@dataclass(frozen=True)
class Weights:
    """Makes empty layers under a prefix and remembers them; `at` narrows the prefix and shares what is remembered."""

    kernels: Kernels
    fused: Mapping[str, tuple[str, ...]]  # our name -> the checkpoint's projections that it stacks
    prefix: str = ""
    layers: list[Layer] = field(default_factory=list)

    def linears(self) -> list[Linear]:
        return [layer for layer in self.layers if isinstance(layer, Linear)]

    def at(self, path: str) -> Weights:
        return replace(self, prefix=f"{self.prefix}{path}.")

    def linear(self, name: str, in_features: int, *out_features: int, bias: bool = False) -> Linear:
        """`out_features` has one size for each of `fused[name]`, or the one of a projection that stands alone."""
        names = self.fused.get(name, (name,))
        parts = {self.prefix + part: size for part, size in zip(names, out_features, strict=True)}
        layer = Linear(parts, in_features, bias)
        self.layers.append(layer)
        return layer

    def norm(self, name: str, size: int, eps: float) -> RMSNorm:
        layer = RMSNorm(self.prefix + name, size, eps, self.kernels)
        self.layers.append(layer)
        return layer

    def embedding(self, name: str, vocab_size: int, size: int, tied: bool) -> Embedding:
        layer = Embedding(self.prefix + name, vocab_size, size, tied)
        self.layers.append(layer)
        return layer
