"""MXFP4, as gpt-oss ships it: 32 floats of 4 bits that share a power of two. OCP Microscaling Formats (MX) 1.0.

Only experts are stored so; engine/layers/experts.py reads their `_blocks` and `_scales`. Linear layers are plain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.config_fields import Fields
from engine.quantization import Headers, Scheme, refuse_unknown
from engine.quantization.fp8 import exponents

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

GROUP = 32


def schemes(fields: Fields, tensors: Headers) -> Callable[[str], Scheme | None]:
    """As `engine.quantization.find_schemes`: no linear layer is packed."""
    refuse_unknown(fields, {"quant_method", "modules_to_not_convert", "dequantize"})
    return lambda name: None


def from_blocks(blocks: Tensor, scales: Tensor) -> Quantized:
    """blocks uint8 [N, K / 2] (or [N, K / 32, 16]), the earlier code low; scales uint8 [N, K / 32], powers of two."""
    import torch

    from kernels.quantized import Quantized

    data = blocks.flatten(1)
    codes = torch.stack([data & 15, data >> 4], dim=-1).flatten(1)
    return Quantized(codes, exponents(scales), None, GROUP, 4, "e2m1")
