"""--quantize: the linear weights of a 16- or 32-bit checkpoint, rounded while they are read, one tensor at a time.

Embeddings and the output head stay as they are. int8: symmetric, 128 weights share a float16 scale. int4: 64 weights
share a float16 scale and offset. nf4: 64 weights share their largest magnitude, in float16 (bitsandbytes' format; arXiv
2305.14314). fp8: e4m3, a row shares a float32 scale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from engine.errors import ConfigError
from engine.quantization import FLOATS, Headers, Scheme, Stored

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

# kind -> (what the codes are, their bits, weights that share a scale (0: a row), bits of scales and offsets)
KINDS = {
    "int8": ("signed", 8, 128, 16),
    "int4": ("unsigned", 4, 64, 32),
    "nf4": ("nf4", 4, 64, 16),
    "fp8": ("e4m3", 8, 0, 32),
}
AT_ONCE = 1 << 22  # weights that are rounded at once: what is copied for it stays small beside a tensor
LARGEST_HALF = 65504.0


def schemes(kind: str, tensors: Headers, plain: Collection[str]) -> Callable[[str], Scheme | None]:
    """As `engine.quantization.find_schemes`, for every weight but those in `plain`. ConfigError for an unknown kind."""
    if kind not in KINDS:
        raise ConfigError(f"--quantize {kind} is not known; use one of {', '.join(KINDS)}.")

    def stored(name: str, n: int, k: int) -> Stored:
        return {f"{name}.weight": ((n, k), FLOATS)}

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        return quantize(get(f"{name}.weight"), kind)

    made = Scheme(kind, bits_of(kind), stored, read)
    return lambda name: made if f"{name}.weight" in tensors and f"{name}.weight" not in plain else None


def bits_of(kind: str) -> float:
    """Of one weight, its share of scales and offsets included."""
    _, bits, group, extra = KINDS[kind]
    return bits + (extra / group if group else 0.0)


def quantize(weight: Tensor, kind: str) -> Quantized:
    """float [N, K] to the nearest codes of a kind."""
    import torch

    from kernels.quantized import Quantized

    values, bits, group, _ = KINDS[kind]
    n, k = weight.shape
    size = group or k
    groups = -(-k // size)
    codes = torch.empty(n, k, dtype=torch.uint8)
    scales = torch.empty(n, groups, dtype=torch.float16 if group else torch.float32)
    offsets = torch.empty_like(scales) if values == "unsigned" else None
    rows = max(1, AT_ONCE // k)
    for start in range(0, n, rows):
        here = slice(start, start + rows)
        padding = groups * size - k
        part = torch.nn.functional.pad(weight[here].float(), (0, padding)).unflatten(1, (groups, size))
        found, scale, offset = _round(part, values, bits)
        codes[here] = found.flatten(1)[:, :k]
        scales[here] = scale
        if offsets is not None and offset is not None:
            offsets[here] = offset
    return Quantized(codes, scales, offsets, size, bits, values)


def _round(x: Tensor, values: str, bits: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """float32 [rows, groups, size] to codes, and scales and offsets [rows, groups] as they will be stored."""
    import torch

    from kernels.quantized import value_table

    most = x.abs().amax(-1)
    if values == "e4m3":
        scale = most / 448.0
        return (x / _divisor(scale)).to(torch.float8_e4m3fn).view(torch.uint8), scale, None
    if values == "nf4":
        table = value_table("nf4", 4)
        scale = most.clamp(max=LARGEST_HALF).half()
        return torch.bucketize(x / _divisor(scale), (table[1:] + table[:-1]) / 2).byte(), scale, None
    if values == "signed":
        scale = (most / (2 ** (bits - 1) - 1)).clamp(max=LARGEST_HALF).half()
        middle = 2 ** (bits - 1)
        return ((x / _divisor(scale)).round() + middle).clamp(1, 2**bits - 1).byte(), scale, None
    low, high = x.aminmax(dim=-1)
    offset = low.clamp(-LARGEST_HALF, LARGEST_HALF).half()
    scale = ((high - offset.float()) / (2**bits - 1)).clamp(0, LARGEST_HALF).half()
    steps = (x - offset.float()[..., None]) / _divisor(scale)
    return steps.round().clamp(0, 2**bits - 1).byte(), scale, offset


def _divisor(scale: Tensor) -> Tensor:
    """[rows, groups, 1], with 1 where all weights are 0."""
    found = scale.float()[..., None]
    return found.where(found > 0, found.new_ones(()))
