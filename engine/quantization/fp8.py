"""FP8 as DeepSeek, Qwen and older vLLM tools ship it: e4m3 weights with a scale per block, channel or tensor.

`weight` float8_e4m3fn [N, K]. With weight_block_size [a, b]: `weight_scale_inv` [ceil(N / a), ceil(K / b)], by which,
its name notwithstanding, a block is multiplied. Else `weight_scale` (or weight_scale_inv), one or [N, 1].
Activations are not rounded to 8 bits, whatever activation_scheme says: a result is never less exact for that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from engine.config_fields import Fields
from engine.quantization import FLOATS, Headers, Scheme, Stored, refuse_unknown, stored_shape

if TYPE_CHECKING:
    from torch import Tensor

    from kernels.quantized import Quantized

UNDERSTOOD = {"quant_method", "fmt", "weight_block_size", "activation_scheme", "scale_fmt", "weight_per_tensor"}
IRRELEVANT = {
    "modules_to_not_convert",
    "ignored_layers",
    "ignore",
    "kv_cache_scheme",
    "dequantize",
}  # seen from the tensors


def schemes(fields: Fields, tensors: Headers) -> Callable[[str], Scheme | None]:
    """As `engine.quantization.find_schemes`: what is stored as FP8 has a scale."""
    refuse_unknown(fields, UNDERSTOOD | IRRELEVANT)
    fields.choice("fmt", ("e4m3", "float8_e4m3fn"), "e4m3")
    fields.choice("activation_scheme", ("dynamic", "static"), "dynamic")
    fields.choice("scale_fmt", ("float", "ue8m0"), "float")
    block = None
    if fields.has("weight_block_size"):
        rows, columns = fields.numbers("weight_block_size", 2, 1, 1 << 20)
        block = (int(rows), int(columns))
    of_tensors = scaled_floats(tensors, block)
    return lambda name: of_tensors if is_float8(tensors, name) else None


def is_float8(tensors: Headers, name: str) -> bool:
    info = tensors.get(f"{name}.weight")
    return info is not None and info.dtype == "F8_E4M3"


def scaled_floats(tensors: Headers, block: tuple[int, int] | None) -> Scheme:
    """e4m3 with scales per block, or per whatever the scales' own shape says."""

    def scale(name: str) -> str:
        inverse = f"{name}.weight_scale_inv"
        return inverse if inverse in tensors else f"{name}.weight_scale"

    def stored(name: str, n: int, k: int) -> Stored:
        shapes: list[tuple[int, ...]] = [(1,), (), (1, 1), (n, 1), (n,)]
        if block is not None:
            shapes.insert(0, (-(-n // block[0]), -(-k // block[1])))
        shape = stored_shape(tensors, scale(name), *shapes)
        return {f"{name}.weight": ((n, k), ("F8_E4M3",)), scale(name): (shape, (*FLOATS, "F8_E8M0"))}

    def read(name: str, n: int, k: int, get: Callable[[str], Tensor]) -> Quantized:
        import torch

        from kernels.quantized import Quantized

        scales, group = get(scale(name)), k
        scales = exponents(scales) if scales.dtype is torch.uint8 else scales.float()
        if block is not None and scales.shape == (-(-n // block[0]), -(-k // block[1])):
            scales, group = scales.repeat_interleave(block[0], dim=0)[:n], min(block[1], k)
        else:
            scales = scales.reshape(-1, 1).expand(n, 1)
        return Quantized(get(f"{name}.weight").view(torch.uint8), scales.contiguous(), None, group, 8, "e4m3")

    shape = "" if block is None else f" in blocks of {block[0]}x{block[1]}"
    return Scheme(f"FP8{shape}", 8 + (0.0 if block is None else 32 / block[1]), stored, read)


def exponents(stored: Tensor) -> Tensor:
    """E8M0, uint8, as float32: powers of two from 2^-127; 255 is NaN. OCP Microscaling Formats (MX) 1.0."""
    import torch

    found = torch.ldexp(torch.ones_like(stored, dtype=torch.float64), stored.int() - 127).float()
    return torch.where(stored == 255, float("nan"), found)
