"""What formats of integer weights share: codes packed in 32-bit words, zero points, one order of columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized


def split_words(words: Tensor, bits: int) -> Tensor:
    """int32 [A, B] -> uint8 [A, B, 32 / bits], least significant first. bits: 4 or 8."""
    import torch

    data = words.contiguous().view(torch.uint8).unflatten(-1, (-1, 4))
    return data if bits == 8 else torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


def codes_of(signed: Tensor) -> Tensor:
    """int8 as codes above -128."""
    import torch

    return signed.contiguous().view(torch.uint8) ^ 128


def with_zeros(
    codes: Tensor, scales: Tensor, zeros: Tensor, group: int, bits: int, order: Tensor | None = None
) -> Quantized:
    """scale * (code - zero) for codes uint8 [N, K], scales and zeros [N, groups]."""
    from kernels.quantized import Quantized

    if bool((zeros == 2 ** (bits - 1)).all()):
        return Quantized(codes, scale_dtype(scales), None, group, bits, "signed", order)
    scales = scales.float().contiguous()
    return Quantized(codes, scales, -(scales * zeros), group, bits, "unsigned", order)


def scale_dtype(scales: Tensor) -> Tensor:
    """float16 stays; all else becomes float32."""
    import torch

    return (scales if scales.dtype is torch.float16 else scales.float()).contiguous()
