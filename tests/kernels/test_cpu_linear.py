"""The compiled linear layer against float64, and its promise: a row's bits do not depend on the rows beside it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.cpu import threads
from kernels.linear import FORMS, PackedLinear, choose_form, linear, pack, rows, unpack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# N and K: a panel and its neighbours, less than a panel, odd, one block of K and a little more, many blocks
SHAPES = ((16, 64), (15, 8), (17, 9), (5, 7), (1, 1), (37, 255), (33, 257), (200, 1029), (576, 1536))


@pytest.fixture(autouse=True)
def _threads() -> None:
    threads.set_threads(2)


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def assert_close(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None = None) -> None:
    """Against float64, with the bound of a float32 sum of K products in blocks of 256."""
    expected = x.double() @ w.double().T + (0 if bias is None else bias.double())
    scale = x.abs().double() @ w.abs().double().T + 1
    worst = ((y.double() - expected).abs() / scale).max().item()
    assert worst < 2e-6, worst


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_equals_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    n, k = shape
    w, bias = random(generator, n, k).to(dtype), random(generator, n)
    packed = pack(w, "numba")
    for t in (1, 2, 3, 4, 5, 6, 7, 12, 16, 17, 33, 70):
        x = random(generator, t, k)
        assert_close(linear(x, packed), x, w)
        assert_close(linear(x, packed, bias), x, w, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(48, 64), (37, 300), (200, 1029)], ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_crowd(shape: tuple[int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    n, k = shape
    packed, bias = pack(random(generator, n, k).to(dtype), "numba"), random(generator, n)
    x = random(generator, 300, k)
    crowd = linear(x, packed, bias)
    for t in range(1, 40):
        for start in (0, 5, 131):
            assert torch.equal(linear(x[start : start + t], packed, bias), crowd[start : start + t]), (t, start)
    assert torch.equal(linear(x[100:300], packed, bias), crowd[100:300])


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    generator = torch.Generator().manual_seed(11)
    packed, x = pack(random(generator, 333, 500).bfloat16(), "numba"), random(generator, 40, 500)
    results = []
    for count in (1, 2, 5):
        threads.set_threads(count)
        results.append(linear(x, packed))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacking_gives_the_weight_back_bit_for_bit(shape: tuple[int, int], dtype: torch.dtype, form: str) -> None:
    w = random(torch.Generator().manual_seed(3), *shape).to(dtype)
    packed = pack(w, form)
    assert (packed.out_features, packed.in_features, packed.dtype) == (*shape, dtype)
    assert torch.equal(unpack(packed), w)
    ids = torch.randint(0, shape[0], (9,), generator=torch.Generator().manual_seed(4))
    assert torch.equal(rows(packed, ids), w[ids])


def test_weights_that_are_not_contiguous_are_packed_as_they_read() -> None:
    w = random(torch.Generator().manual_seed(5), 40, 30).T
    assert torch.equal(unpack(pack(w, "numba")), w)


def test_rows_of_x_may_be_strided() -> None:
    generator = torch.Generator().manual_seed(6)
    w, wide = random(generator, 20, 30), random(generator, 50, 64)
    x = wide[:, 7:37]
    assert torch.equal(linear(x, pack(w, "numba")), linear(x.contiguous(), pack(w, "numba")))
    assert_close(linear(wide.T[:30].T, pack(w, "numba")), wide[:, :30], w)


def test_no_rows_give_no_rows() -> None:
    packed = pack(torch.ones(4, 3), "numba")
    assert linear(torch.empty(0, 3), packed).shape == (0, 4)


def test_a_nan_stays_in_its_row() -> None:
    packed = pack(random(torch.Generator().manual_seed(8), 40, 30), "numba")
    x = random(torch.Generator().manual_seed(9), 9, 30)
    clean = linear(x, packed)
    x[4, 3] = torch.nan
    y = linear(x, packed)
    assert y[4].isnan().all()
    assert torch.equal(y[[0, 1, 2, 3, 5, 6, 7, 8]], clean[[0, 1, 2, 3, 5, 6, 7, 8]])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_torch_form_computes_in_the_weights_dtype(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(10)
    w, bias, x = random(generator, 20, 30).to(dtype), random(generator, 20), random(generator, 5, 30)
    y = linear(x, pack(w, "torch"), bias)
    assert y.dtype == torch.float32
    assert torch.equal(y, torch.nn.functional.linear(x.to(dtype), w, bias.to(dtype)).float())


def test_misuse_is_told() -> None:
    with pytest.raises(ValueError, match="not known"):
        pack(torch.ones(2, 2), "onednn")
    with pytest.raises(ValueError, match="float64"):
        pack(torch.ones(2, 2, dtype=torch.float64), "numba")
    with pytest.raises(ValueError, match=r"\[T, 2\]"):
        linear(torch.ones(1, 3), pack(torch.ones(2, 2), "numba"))
    with pytest.raises(ValueError, match="at least 1"):
        threads.set_threads(0)


def test_choose_form_names_its_reason() -> None:
    assert choose_form(torch.bfloat16, "cuda", [(64, 64)], 1) == ("torch", "the only form on cuda")
    form, reason = choose_form(torch.bfloat16, "cpu", [(64, 64), (256, 128)], 1)
    assert form in FORMS
    assert "ms" in reason
    assert choose_form(torch.float64, "cpu", [(64, 64)], 1)[0] == "torch"


def test_packed_linear_is_data() -> None:
    packed = pack(torch.ones(3, 2), "torch")
    assert packed == PackedLinear("torch", packed.data, 3, 2)
