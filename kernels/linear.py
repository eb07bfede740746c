"""The linear layer: how weights are kept, and y = x w^T + b from them. Knows no model and no quantised format.

Two forms. "torch" keeps the checkpoint's matrix and calls torch (the only form on a GPU). "numba" keeps panels that
this CPU reads fastest (kernels/cpu/linear.py) and gives each row the same bits whatever rows are beside it.
`choose_form` measures both. T tokens, N outputs, K inputs, W columns of a panel.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from kernels.quantized import PackedQuantized, quantized_linear, quantized_rows

FORMS = ("torch", "numba")
WORTH = 1.5  # how many times as fast torch must be for its form to be chosen
MEASURED_ROWS, MEASURED_SIZE, MEASURED_SECONDS = (1, 8, 32), 3072, 0.2  # rows of x; N and K at most; in all
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One weight matrix [N, K] in a form. "torch": data is [N, K]; "numba": [ceil(N / W), K, W], zeros after N."""

    form: str
    data: Tensor
    out_features: int
    in_features: int

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype


AnyPacked = PackedLinear | PackedQuantized


@cache
def _compiled() -> ModuleType:
    """kernels/cpu/linear.py, imported when the numba form is first used."""
    from kernels.cpu import linear as compiled

    return compiled


def pack(weight: Tensor, form: str) -> PackedLinear:
    """A weight [N, K] in a form of FORMS. "torch" keeps the tensor itself; "numba" copies it.

    ValueError for an unknown form, or for one that cannot hold the weight.
    """
    if form not in FORMS:
        raise ValueError(f"Linear form {form!r} is not known; choose one of: {', '.join(FORMS)}.")
    n, k = weight.shape
    if form == "torch":
        return PackedLinear(form, weight, n, k)
    if weight.dtype not in DTYPES or weight.device.type != "cpu":
        raise ValueError(
            f"The numba form takes float32, bfloat16 and float16 weights in memory, not {weight.dtype} on "
            f"{weight.device}; use the torch form."
        )
    weight = weight.contiguous()
    data = torch.zeros(_compiled().panels(n), k, _compiled().WIDTH, dtype=weight.dtype)
    _compiled().pack(weight.dtype, weight.data_ptr(), data.data_ptr(), n, k)
    return PackedLinear(form, data, n, k)


def unpack(packed: PackedLinear) -> Tensor:
    """The weight [N, K] again, bit for bit."""
    return rows(packed, torch.arange(packed.out_features, device=packed.data.device))


def rows(packed: AnyPacked, ids: Tensor) -> Tensor:
    """Rows of the weight in its dtype (float32 of a quantised one), [T, K] for ids int64 [T]: an embedding from the
    matrix that is also the head."""
    if isinstance(packed, PackedQuantized):
        return quantized_rows(packed, ids)
    if packed.form == "torch":
        return torch.nn.functional.embedding(ids, packed.data)
    width = packed.data.shape[2]
    return packed.data[ids // width, :, _compiled().lane(ids % width, packed.dtype)]


def linear(x: Tensor, packed: AnyPacked, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x [T, K] w^T + bias [N] -> [T, N] in x's dtype, or in `out`. x is float32 on a CPU, whatever the weight's dtype.

    The torch form computes in the weight's dtype. The numba form computes in float32 from exact weights, each output
    one chain of fused multiply-adds in the order of K: its bits do not depend on T.
    """
    if isinstance(packed, PackedQuantized):
        return quantized_linear(x, packed, bias, out)
    if packed.form == "torch":
        cast_bias = None if bias is None else bias.to(packed.dtype)
        y = torch.nn.functional.linear(x.to(packed.dtype), packed.data, cast_bias).to(x.dtype)
        return y if out is None else out.copy_(y)
    t, k = x.shape
    n = packed.out_features
    if x.dtype is not torch.float32 or k != packed.in_features:
        raise ValueError(f"x must be float32 [T, {packed.in_features}], not {x.dtype} {list(x.shape)}.")
    if bias is not None and (bias.dtype is not torch.float32 or bias.stride(0) != 1):
        bias = bias.float().contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(t, n) if out is None else out
    assert y.dtype is torch.float32, "activations on a CPU are float32"
    _compiled().linear(
        packed.dtype, x.data_ptr(), 4 * x.stride(0), packed.data.data_ptr(),
        0 if bias is None else bias.data_ptr(), y.data_ptr(), 4 * y.stride(0), t, n, k,
    )  # fmt: skip
    return y


def choose_form(dtype: torch.dtype, device_type: str, shapes: list[tuple[int, int]], threads: int) -> tuple[str, str]:
    """(form, reason) for weights of a dtype, by timing both forms on the largest of `shapes` [(N, K), ...].

    Takes about MEASURED_SECONDS once the kernels are compiled. Numba is preferred, since with it a request's logits do
    not depend on its company; torch is chosen where it takes less than 1 / WORTH of the time, or is the only form.
    """
    if device_type != "cpu":
        return "torch", f"the only form on {device_type}"
    if dtype not in DTYPES:
        return "torch", f"the numba form has no {dtype}"
    from kernels.cpu import threads as cpu_threads

    cpu_threads.set_threads(threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours, theirs = _measure(dtype, max(shapes, key=math.prod))
    finally:
        torch.set_num_threads(before)
    times = ", ".join(
        f"{a * 1e3:.2f} / {b * 1e3:.2f} ms at {t}" for t, a, b in zip(MEASURED_ROWS, ours, theirs, strict=True)
    )
    factor = math.prod(a / b for a, b in zip(ours, theirs, strict=True)) ** (1 / len(ours))
    compared = f"numba is {1 / factor:.1f} times as fast as torch ({times} rows)"
    if factor > WORTH:
        return "torch", compared
    return "numba", f"{compared}, and a row's bits do not depend on the batch"


def _measure(dtype: torch.dtype, shape: tuple[int, int]) -> tuple[list[float], list[float]]:
    """Seconds of the numba and the torch form for each of MEASURED_ROWS: the least of a few, taken in turn."""
    n, k = (min(size, MEASURED_SIZE) for size in shape)
    weight = torch.full((n, k), 0.5, dtype=dtype)
    forms = [pack(weight, "numba"), pack(weight, "torch")]
    best = [[float("inf")] * len(MEASURED_ROWS) for _ in forms]
    end, turn = time.perf_counter() + MEASURED_SECONDS, 0
    while turn < 2 or (turn < 10 and time.perf_counter() < end):  # the first turn warms up
        turn += 1
        for i, t in enumerate(MEASURED_ROWS):
            x = torch.full((t, k), 0.5)
            for form, seconds in zip(forms, best, strict=True):
                start = time.perf_counter()
                linear(x, form)
                seconds[i] = min(seconds[i], time.perf_counter() - start)
    return best[0], best[1]
