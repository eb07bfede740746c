"""MXFP4, as gpt-oss ships it: 32 floats of 4 bits that share a power of two. OCP Microscaling Formats (MX) 1.0.

Only experts are stored so. A weight NAME of X experts is NAME_blocks uint8 [X, N, K / 32, 16], two codes to a byte with
the earlier one low, and NAME_scales uint8 [X, N, K / 32], exponents with a bias of 127.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.config_fields import Fields
from engine.quantization import Headers, Scheme, Stored, refuse_unknown
from engine.quantization.fp8 import exponents

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

GROUP = 32
EXPERTS = (".experts.gate_up_proj", ".experts.down_proj")


def schemes(fields: Fields, tensors: Headers) -> Callable[[str], Scheme | None]:
    """As `engine.quantization.find_schemes`, for the weight [N, K] of one expert; no linear layer is packed."""
    refuse_unknown(fields, {"quant_method", "modules_to_not_convert", "dequantize"})
    scheme = Scheme("MXFP4", 4 + 8 / GROUP, stored, read)
    return lambda name: scheme if name.endswith(EXPERTS) else None


def stored(name: str, n: int, k: int) -> Stored:
    """Without the dimension of the experts, which the layer puts in front."""
    return {f"{name}_blocks": ((n, k // GROUP, GROUP // 2), ("U8",)), f"{name}_scales": ((n, k // GROUP), ("U8",))}


def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
    return from_blocks(get(f"{name}_blocks"), get(f"{name}_scales"))


def from_blocks(blocks: Tensor, scales: Tensor) -> Quantized:
    """blocks uint8 [N, K / 2] (or [N, K / 32, 16]), the earlier code low; scales uint8 [N, K / 32], powers of two."""
    import torch

    from kernels.quantized import Quantized

    data = blocks.flatten(1)
    codes = torch.stack([data & 15, data >> 4], dim=-1).flatten(1)
    return Quantized(codes, exponents(scales), None, GROUP, 4, "e2m1")
