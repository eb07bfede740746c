"""Quantised linear layers: the compiled forms against float64, and the same bits in any crowd."""

from __future__ import annotations

import pytest
import torch

from kernels.cpu import threads
from kernels.quantized import (
    BITS,
    Quantized,
    dequantize,
    pack_quantized,
    quantized_linear,
    quantized_rows,
    unpack_quantized,
    value_table,
)

KINDS = [(values, bits) for values, each in BITS.items() for bits in each]
# N, K, group: whole panels and ragged ones, groups that cross blocks of K, one group a row, a last group cut short
SHAPES = ((64, 64, 32), (17, 96, 16), (5, 300, 128), (37, 513, 1000), (200, 1029, 32), (40, 320, 48))


def half_for(values: str) -> torch.dtype:
    """float16 scales where a format has them; each dtype of each kind is seconds of compiling."""
    return torch.float16 if values in ("signed", "unsigned") else torch.float32


@pytest.fixture(autouse=True)
def _threads() -> None:
    threads.set_threads(2)


def random_weight(
    n: int, k: int, group: int, values: str, bits: int, offsets: bool, dtype: torch.dtype, seed: int | None = None
) -> Quantized:
    generator = torch.Generator().manual_seed(torch.seed() % 2**40 if seed is None else seed)
    codes = torch.randint(0, 2**bits, (n, k), generator=generator).byte()
    if values == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0  # NaN
    groups = -(-k // group)
    scales = torch.randn(n, groups, generator=generator).to(dtype)
    moved = torch.randn(n, groups, generator=generator).to(dtype) if offsets else None
    return Quantized(codes, scales, moved, group, bits, values)


@pytest.mark.parametrize(("values", "bits"), KINDS)
def test_the_compiled_form_equals_float64_on_the_dequantised_weight(values: str, bits: int) -> None:
    for n, k, group in SHAPES:
        for dtype, offsets in ((torch.float32, True), (half_for(values), False)):
            weight = random_weight(n, k, group, values, bits, offsets, dtype)
            packed, bias = pack_quantized(weight, "numba"), torch.randn(n)
            w = dequantize(weight).double()
            for t in (1, 2, 3, 6, 7, 17, 40):
                x = torch.randn(t, k)
                for b in (None, bias):
                    y = quantized_linear(x, packed, b)
                    expected = x.double() @ w.T + (0 if b is None else b.double())
                    scale = x.abs().double() @ w.abs().T + 1
                    # integers: each of x's numbers is off by at most 2^-16 of its segment's largest
                    most = 2e-6 if values not in ("signed", "unsigned") else 4e-5
                    assert ((y - expected).abs() / scale).max() < most, (n, k, group, t, dtype)


@pytest.mark.parametrize(("values", "bits"), KINDS)
def test_a_row_has_the_same_bits_alone_and_in_any_crowd(values: str, bits: int) -> None:
    for n, k, group in ((48, 64, 32), (37, 300, 400), (200, 1029, 64), (24, 64, 16)):
        packed = pack_quantized(random_weight(n, k, group, values, bits, True, half_for(values)), "numba")
        x, bias = torch.randn(60, k), torch.randn(n)
        crowd = quantized_linear(x, packed, bias)
        for t in (1, 2, 3, 4, 5, 6, 7, 13, 33):
            for start in (0, 5, 27):
                assert torch.equal(quantized_linear(x[start : start + t], packed, bias), crowd[start : start + t])


@pytest.mark.parametrize("form", ["torch", "numba"])
@pytest.mark.parametrize(("values", "bits"), KINDS)
def test_unpacking_gives_the_weight_back_bit_for_bit(values: str, bits: int, form: str) -> None:
    for n, k, group in SHAPES:
        weight = random_weight(n, k, group, values, bits, True, torch.float32)
        packed = pack_quantized(weight, form)
        again = unpack_quantized(packed)
        assert torch.equal(again.codes, weight.codes)
        assert torch.equal(again.scales, weight.scales)
        assert again.offsets is not None
        assert weight.offsets is not None
        assert torch.equal(again.offsets, weight.offsets)
        ids = torch.randint(0, n, (9,))
        assert torch.equal(quantized_rows(packed, ids), dequantize(weight)[ids])


def test_the_torch_form_is_the_definition() -> None:
    weight = random_weight(24, 50, 16, "unsigned", 4, True, torch.float32)
    x = torch.randn(3, 50)
    got = quantized_linear(x, pack_quantized(weight, "torch"))
    torch.testing.assert_close(got, x @ dequantize(weight).T)


def test_the_tables_are_bitsandbytes_and_the_mx_specification() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for kind in ("nf4", "fp4"):
        theirs = functional.get_4bit_type(kind, device="cpu")
        assert torch.equal(value_table(kind, 4), theirs), kind
    exponent, mantissa = torch.arange(8) // 2, torch.arange(8) % 2
    spec = torch.where(exponent > 0, 2.0 ** (exponent - 1) * (1 + mantissa / 2), mantissa / 2)
    assert torch.equal(value_table("e2m1", 4), torch.cat([spec, -spec]))


def test_parts_that_do_not_fit_together_are_told() -> None:
    codes = torch.zeros(4, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no 8-bit nf4"):
        Quantized(codes, torch.zeros(4, 1), None, 8, 8, "nf4")
    with pytest.raises(ValueError, match=r"must be \[4, 2\]"):
        Quantized(codes, torch.zeros(4, 1), None, 4, 4, "nf4")
    with pytest.raises(ValueError, match="no groups of 5 integers"):
        pack_quantized(Quantized(codes, torch.zeros(4, 2), None, 5, 4, "signed"), "numba")
    with pytest.raises(ValueError, match="one dtype"):
        Quantized(codes, torch.zeros(4, 1), torch.zeros(4, 1).half(), 8, 4, "nf4")
