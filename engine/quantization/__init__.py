"""How a checkpoint may store its linear weights: one file per format, found by config.json's quantization_config.

A format says which tensors stand for a weight and turns them into one `Quantized` (kernels/quantized.py). Models and
layers know no format; importing this package imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from engine.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

Stored = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Tensors of the checkpoint: name -> (shape, the safetensors dtypes it may have)."""


@dataclass(frozen=True)
class Scheme:
    """How one weight [N, K] is stored."""

    name: str  # for people: "GGUF Q4_1"
    bits: float  # a weight takes in memory, its share of scales and offsets included
    stored: Callable[[str, int, int], Stored]  # (the weight's name without ".weight", N, K)
    read: Callable[[str, int, int, Callable[[str], Tensor]], Quantized]  # the same, and a way to read a stored tensor


# quantization_config's quant_method -> module here with `schemes(quantization_config)`
METHODS = {"gguf": "gguf"}


def find_schemes(config: dict[str, Any]) -> Callable[[str], Scheme | None]:
    """From a weight's name (without ".weight") to its scheme, or None where it is stored plainly.

    CheckpointError names a method or a variant of one that is not supported.
    """
    settings = config.get("quantization_config", config.get("compression_config"))
    if settings is None:
        return lambda name: None
    if not isinstance(settings, dict) or not isinstance(settings.get("quant_method"), str):
        raise CheckpointError("config.json: quantization_config should be an object with a quant_method.")
    method = settings["quant_method"]
    if method not in METHODS:
        raise CheckpointError(
            f"config.json: quantization_config.quant_method {method[:60]!r} is not supported; supported: "
            f"{', '.join(METHODS)}.\nServe the model's unquantised checkpoint instead."
        )
    found: Callable[[str], Scheme | None] = import_module(f"engine.quantization.{METHODS[method]}").schemes(settings)
    return found
