"""GGUF's own blocks, kept as they are in a folder that engine/convert.py wrote: 32 or 256 weights with their scales.

A tensor is uint8 [N, bytes of a row]; quantization_config.tensors gives its type. The blocks are those of ggml's
ggml-common.h; every value is the one that the `gguf` package dequantises to, bit for bit. All shapes below are
[blocks, ...]; a block's weights follow each other in a row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.config_fields import Fields
from engine.errors import CheckpointError
from engine.quantization import Headers, Scheme

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

# type -> (weights in a block, its bytes, weights that share a scale, bits of our codes, what they are, has offsets)
TYPES = {
    "Q4_0": (32, 18, 32, 4, "signed", False),
    "Q4_1": (32, 20, 32, 4, "unsigned", True),
    "Q5_0": (32, 22, 32, 8, "signed", False),
    "Q5_1": (32, 24, 32, 8, "unsigned", True),
    "Q8_0": (32, 34, 32, 8, "signed", False),
    "Q2_K": (256, 84, 16, 4, "unsigned", True),
    "Q3_K": (256, 110, 16, 4, "signed", False),
    "Q4_K": (256, 144, 32, 4, "unsigned", True),
    "Q5_K": (256, 176, 32, 8, "unsigned", True),
    "Q6_K": (256, 210, 16, 8, "signed", False),
}


def schemes(fields: Fields, headers: Headers) -> Callable[[str], Scheme | None]:
    """As `engine.quantization.find_schemes`."""
    tensors = fields.values.get("tensors")
    if not isinstance(tensors, dict) or not all(isinstance(kind, str) and kind in TYPES for kind in tensors.values()):
        raise CheckpointError(f"quantization_config.tensors should map names to types among {', '.join(TYPES)}.")
    made = {kind: _scheme(kind) for kind in set(tensors.values())}
    return lambda name: made.get(tensors.get(f"{name}.weight", ""))


def _scheme(kind: str) -> Scheme:
    per_block, block_bytes, group, bits, _, offset = TYPES[kind]
    scale_bits = 32 if kind.endswith("_K") else 16  # a K type's scale is a product of two

    def stored(name: str, n: int, k: int) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        return {f"{name}.weight": ((n, k // per_block * block_bytes), ("U8",))}

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        return from_blocks(get(f"{name}.weight"), kind)

    return Scheme(f"GGUF {kind}", bits + scale_bits * (1 + offset) / group, stored, read)


def from_blocks(raw: Tensor, kind: str) -> Quantized:
    """uint8 [N, bytes of a row] of a type as codes, scales and offsets."""
    from kernels.quantized import Quantized

    _, block_bytes, group, bits, values, _ = TYPES[kind]
    n = raw.shape[0]
    blocks = raw.reshape(-1, block_bytes)
    codes, scales, offsets = READERS[kind](blocks)
    return Quantized(
        codes=codes.reshape(n, -1),
        scales=scales.reshape(n, -1),
        offsets=None if offsets is None else offsets.reshape(n, -1),
        group=group,
        bits=bits,
        values=values,
    )


Parts = tuple["Tensor", "Tensor", "Tensor | None"]  # codes [B, weights], scales and offsets [B, groups]


def _half(blocks: Tensor, at: int) -> Tensor:
    """float16 [B, 1] from two bytes."""
    import torch

    return blocks[:, at : at + 2].contiguous().view(torch.float16)


def _nibbles(data: Tensor) -> Tensor:
    """[B, n, m] -> [B, n, 2, m]: low nibbles, then high ones."""
    import torch

    return torch.stack([data & 15, data >> 4], dim=2)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """[B, 32]: bit i of the four bytes at `at`."""
    import torch

    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    return ((blocks[:, at : at + 4, None] >> shifts) & 1).flatten(1)


def _q4_0(blocks: Tensor) -> Parts:
    return _nibbles(blocks[:, None, 2:]), _half(blocks, 0), None


def _q4_1(blocks: Tensor) -> Parts:
    return _nibbles(blocks[:, None, 4:]), _half(blocks, 0), _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Parts:
    codes = _nibbles(blocks[:, None, 6:]).flatten(1) | _fifth_bits(blocks, 2) << 4
    return codes + (128 - 16), _half(blocks, 0), None


def _q5_1(blocks: Tensor) -> Parts:
    codes = _nibbles(blocks[:, None, 8:]).flatten(1) | _fifth_bits(blocks, 4) << 4
    return codes, _half(blocks, 0), _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Parts:
    return blocks[:, 2:] ^ 128, _half(blocks, 0), None  # two's complement as a code above -128


def _q2_k(blocks: Tensor) -> Parts:
    steps, data = blocks[:, :16], blocks[:, 16:80].view(-1, 2, 1, 32)
    codes = _two_bits(data)
    return codes, _half(blocks, 80).float() * (steps & 15), -(_half(blocks, 82).float() * (steps >> 4))


def _two_bits(data: Tensor) -> Tensor:
    """[B, n, 1, 32] -> [B, n, 4, 32]."""
    import torch

    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)
    return (data >> shifts[:, None]) & 3


def _q3_k(blocks: Tensor) -> Parts:
    import torch

    high = (blocks[:, None, :32] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1  # [B, 8, 32]
    codes = _two_bits(blocks[:, 32:96].view(-1, 2, 1, 32)).view(-1, 8, 32) | high << 2
    low, top = blocks[:, None, 96:104], blocks[:, None, 104:108]
    low = torch.cat([low & 15, low >> 4], dim=1).flatten(1)
    top = _two_bits(top.unsqueeze(2)).flatten(1)
    steps = (low | top << 4).char() - 32
    return codes + 4, _half(blocks, 108).float() * steps, None


def _steps(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima of a Q4_K or Q5_K block, from 12 bytes."""
    import torch

    first, second, rest = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat([first & 63, rest & 15 | first >> 2 & 48], dim=1)
    return scales, torch.cat([second & 63, rest >> 4 | second >> 2 & 48], dim=1)


def _with_steps(blocks: Tensor, codes: Tensor) -> Parts:
    scales, minima = _steps(blocks[:, 4:16].contiguous())
    return codes, _half(blocks, 0).float() * scales, -(_half(blocks, 2).float() * minima)


def _q4_k(blocks: Tensor) -> Parts:
    return _with_steps(blocks, _nibbles(blocks[:, 16:].view(-1, 4, 32)))


def _q5_k(blocks: Tensor) -> Parts:
    import torch

    high = (blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None]) & 1  # [B, 8, 32]
    return _with_steps(blocks, _nibbles(blocks[:, 48:].view(-1, 4, 32)).view(-1, 8, 32) | high << 4)


def _q6_k(blocks: Tensor) -> Parts:
    import torch

    low = _nibbles(blocks[:, :128].view(-1, 2, 64))  # [B, 2, 2, 64]
    high = _two_bits(blocks[:, 128:192].view(-1, 2, 1, 32))  # [B, 2, 4, 32]
    codes = low.view(-1, 8, 32) | high.view(-1, 8, 32) << 4
    steps = blocks[:, 192:208].contiguous().view(torch.int8)
    return codes + (128 - 32), _half(blocks, 208).float() * steps, None


READERS: dict[str, Callable[[Tensor], Parts]] = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
