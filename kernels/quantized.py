"""Quantised weights: codes of 4 or 8 bits with a scale, and perhaps an offset, for every few weights of a row.

    w[n, k] = scales[n, k // G] * value(codes[n, k]) + offsets[n, k // G]

Every integer and small-float format that checkpoints come in is a case of this, so one definition, one compiled form
for CPUs and one Triton kernel serve all of them; engine/quantization/ reads the formats. Knows no model and no file.
N outputs, K inputs, G weights that share a scale, W columns of a panel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

# What a code stands for. Integers: unsigned, or minus half their range. Floats: OCP Microscaling Formats (MX) 1.0 for
# e2m1 and e4m3; nf4 and fp4 are bitsandbytes' tables (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BITS = {"unsigned": (4, 8), "signed": (4, 8), "e2m1": (4,), "nf4": (4,), "fp4": (4,), "e4m3": (8,)}
SCALES = (torch.float32, torch.float16)


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight [N, K] as a format's reader hands it over. ValueError if the parts do not fit together."""

    codes: Tensor  # uint8 [N, K], below 2^bits
    scales: Tensor  # float32 or float16 [N, ceil(K / group)]
    offsets: Tensor | None  # the same shape and dtype
    group: int
    bits: int
    values: str  # a key of BITS
    order: Tensor | None = None  # int64 [K]: column j of the codes is input order[j]; None: as they come

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        expected = (n, -(-k // self.group))
        if self.bits not in BITS.get(self.values, ()):
            raise ValueError(f"There are no {self.bits}-bit {self.values} weights.")
        for part in (self.scales, self.offsets):
            if part is not None and (tuple(part.shape) != expected or part.dtype not in SCALES):
                raise ValueError(f"Scales and offsets must be {list(expected)}, not {part.dtype} {list(part.shape)}.")
        if self.offsets is not None and self.offsets.dtype is not self.scales.dtype:
            raise ValueError("Scales and offsets must have one dtype.")
        if self.order is not None and not torch.equal(self.order.sort().values.cpu(), torch.arange(k)):
            raise ValueError(f"The order of columns must be a permutation of {k}.")

    @property
    def kind(self) -> tuple[object, ...]:
        """Weights of one kind can be stacked."""
        order = None if self.order is None else self.order.cpu().numpy().tobytes()
        return self.codes.shape[1], self.group, self.bits, self.values, self.scales.dtype, self.offsets is None, order


def stack(above: Quantized, below: Quantized) -> Quantized:
    """Two weights of one kind as one, along N."""
    assert above.kind == below.kind, "only weights of one kind can be stacked"
    offsets = None
    if above.offsets is not None and below.offsets is not None:
        offsets = torch.cat([above.offsets, below.offsets])
    codes, scales = torch.cat([above.codes, below.codes]), torch.cat([above.scales, below.scales])
    return Quantized(codes, scales, offsets, above.group, above.bits, above.values, above.order)


def value_table(values: str, bits: int) -> Tensor:
    """What each code stands for: float32 [2^bits]."""
    if values in ("unsigned", "signed"):
        return torch.arange(2**bits, dtype=torch.float32) - (2 ** (bits - 1) if values == "signed" else 0)
    if values == "nf4":
        return torch.tensor(NF4)
    if values == "e4m3":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    positive = torch.tensor(FP4 if values == "fp4" else E2M1)
    return torch.cat([positive, -positive])


@cache
def table_on(values: str, bits: int, device: torch.device) -> Tensor:
    """`value_table` on a device, copied there once: no copy may come between the kernels of a recorded step."""
    return value_table(values, bits).to(device)


def dequantize(weight: Quantized) -> Tensor:
    """float32 [N, K]; exact but for one rounding of the sum."""
    k = weight.codes.shape[1]
    values = table_on(weight.values, weight.bits, weight.codes.device)[weight.codes.long()]

    def spread(part: Tensor) -> Tensor:
        return part.float().repeat_interleave(weight.group, dim=1)[:, :k]

    scaled = values.double() * spread(weight.scales)  # a product of two float32 is exact in float64
    found = (scaled if weight.offsets is None else scaled + spread(weight.offsets)).float()
    return found if weight.order is None else torch.empty_like(found).index_copy_(1, weight.order, found)


@dataclass(frozen=True, slots=True)
class PackedQuantized:
    """A quantised weight in a form. "torch": rows, two 4-bit codes to a byte with the earlier one low. "triton": the
    same, multiplied by a kernel (kernels/quantized_triton.py). "numba": panels,
    [ceil(N / W), K, W * bits / 8] of small floats, [ceil(N / W), K / 2, W * bits / 4] of integers (K rounded up to
    segments); with scales [ceil(N / W), K / G, W]."""

    form: str
    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    out_features: int
    in_features: int
    group: int
    bits: int
    values: str
    order: Tensor | None = None  # as Quantized's

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scales, self.offsets, self.order) if part is not None)


def is_integer(weight: Quantized | PackedQuantized) -> bool:
    return weight.values in ("unsigned", "signed")


@cache
def _compiled(integers: bool) -> ModuleType:
    """The compiled form's module, imported when it is first used."""
    from kernels.cpu import integers as integer_codes
    from kernels.cpu import quantized as small_floats

    return integer_codes if integers else small_floats


@cache
def _triton() -> ModuleType:
    from kernels import quantized_triton

    return quantized_triton


def pack_quantized(weight: Quantized, form: str, device: torch.device | None = None) -> PackedQuantized:
    """Copies a weight into a form, on its own device or another. ValueError for one that cannot hold it."""
    if device is not None:
        weight = replace(
            weight,
            codes=weight.codes.to(device),
            scales=weight.scales.to(device),
            offsets=None if weight.offsets is None else weight.offsets.to(device),
            order=None if weight.order is None else weight.order.to(device),
        )
    n, k = weight.codes.shape
    codes, scales, offsets = weight.codes.contiguous(), weight.scales.contiguous(), weight.offsets
    offsets = None if offsets is None else offsets.contiguous()
    if form == "numba":
        codes = _pack_panels(weight, codes)
        scales, offsets = _panels(scales), None if offsets is None else _panels(offsets)
    elif weight.bits == 4:
        even, odd = torch.nn.functional.pad(codes, (0, k % 2)).unflatten(1, (-1, 2)).unbind(-1)
        codes = even | odd << 4
    return PackedQuantized(form, codes, scales, offsets, n, k, weight.group, weight.bits, weight.values, weight.order)


def _pack_panels(weight: Quantized, codes: Tensor) -> Tensor:
    (n, k), bits = codes.shape, weight.bits
    compiled = _compiled(is_integer(weight))
    panels = -(-n // compiled.WIDTH)
    if not is_integer(weight):
        packed = torch.empty(panels, k, compiled.WIDTH * bits // 8, dtype=torch.uint8)
        compiled.pack(codes.data_ptr(), packed.data_ptr(), n, k, bits)
        return packed
    segment = compiled.segment_of(weight.group, k)
    if not segment:
        raise ValueError(f"The numba form has no groups of {weight.group} integers, only multiples of 16.")
    packed = torch.empty(panels, -(-k // segment) * segment // 2, compiled.WIDTH * bits // 4, dtype=torch.uint8)
    compiled.pack(codes.data_ptr(), packed.data_ptr(), n, k, bits, segment)
    return packed


def _panels(part: Tensor) -> Tensor:
    """[N, groups] -> [ceil(N / W), groups, W], zeros after N."""
    from kernels.cpu.simd import WIDTH

    padded = torch.nn.functional.pad(part, (0, 0, 0, -part.shape[0] % WIDTH))
    return padded.view(-1, WIDTH, part.shape[1]).transpose(1, 2).contiguous()


def unpack_quantized(packed: PackedQuantized) -> Quantized:
    """The weight again, bit for bit."""
    return _select(packed, torch.arange(packed.out_features, device=packed.codes.device))


def quantized_rows(packed: PackedQuantized, ids: Tensor) -> Tensor:
    """Rows of the weight: float32 [T, K] for ids int64 [T]."""
    return dequantize(_select(packed, ids))


def _select(packed: PackedQuantized, ids: Tensor) -> Quantized:
    scales, offsets = packed.scales, packed.offsets
    if packed.form == "numba":
        width = packed.scales.shape[2]
        panel, column = ids // width, ids % width
        codes = _columns(packed, panel, column)
        scales, offsets = scales[panel, :, column], None if offsets is None else offsets[panel, :, column]
    else:
        codes, scales, offsets = packed.codes[ids], scales[ids], None if offsets is None else offsets[ids]
        if packed.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)[:, : packed.in_features]
    return Quantized(codes, scales, offsets, packed.group, packed.bits, packed.values, packed.order)


def _columns(packed: PackedQuantized, panel: Tensor, column: Tensor) -> Tensor:
    """uint8 [T, K]: the codes of T columns of panels."""
    width = packed.scales.shape[2]
    if is_integer(packed):
        # [panels, two pairs or one, blocks of 16 columns, 8 columns, 2 features, 2 bytes]
        words = packed.codes.unflatten(1, (-1, 8 // packed.bits)).flatten(2).unflatten(2, (-1, 8, 2, 2))
        words = words[panel, :, column // 16, column % 8]
        high = column % 16 >= 8
        if packed.bits == 8:
            codes = torch.where(high[:, None, None], words[..., 1], words[..., 0])
        else:
            codes = words.transpose(2, 3)
        codes = codes.flatten(1)[:, : packed.in_features]
    else:
        high = column >= width // 2
        codes = packed.codes[panel, :, column % (width // 2) if packed.bits == 4 else column]
    return torch.where(high[:, None], codes >> 4, codes & 15) if packed.bits == 4 else codes


def quantized_linear(
    x: Tensor, packed: PackedQuantized, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [T, K] w^T + bias [N] -> [T, N] in x's dtype, or in `out`.

    The torch form is the definition: dequantise, multiply. The numba form computes from exactly those weights, small
    floats in float32, integers with x as 16-bit integers (kernels/cpu/integers.py), and gives a row the same bits
    whatever rows are beside it.
    """
    if packed.form == "torch":
        weight = dequantize(unpack_quantized(packed)).to(x.dtype)
        y = torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        return y if out is None else out.copy_(y)
    if packed.form == "triton":
        return _triton().linear(x, packed, bias, out)  # type: ignore[no-any-return]
    t, k = x.shape
    n = packed.out_features
    if x.dtype is not torch.float32 or k != packed.in_features:
        raise ValueError(f"x must be float32 [T, {packed.in_features}], not {x.dtype} {list(x.shape)}.")
    if bias is not None and (bias.dtype is not torch.float32 or bias.stride(0) != 1):
        bias = bias.float().contiguous()
    if packed.order is not None:
        x = x.index_select(1, packed.order)
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(t, n) if out is None else out
    scales, offsets = packed.scales.data_ptr(), 0 if packed.offsets is None else packed.offsets.data_ptr()
    shape = (0 if bias is None else bias.data_ptr(), y.data_ptr(), 4 * y.stride(0), t, n, k)
    weights = (
        packed.scales.dtype,
        x.data_ptr(),
        4 * x.stride(0),
        packed.codes.data_ptr(),
        scales,
        offsets,
        packed.group,
    )
    if is_integer(packed):
        zero = 1 << (packed.bits - 1) if packed.values == "signed" else 0
        _compiled(True).linear(packed.bits, *weights, zero, *shape)
    else:
        _compiled(False).linear(packed.values, packed.bits, *weights, *shape)
    return y
