"""RMSNorm, alone and after a residual addition, compiled. The definition is kernels/rms_norm.py."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from numba import njit
from torch import Tensor

from kernels.cpu.simd import F32, WIDTH, add, fma, get, load, mul, put, spread, store, total
from kernels.cpu.threads import compile_task, describe, run, word

TASK_NUMBERS = 1 << 14  # elements worth a task of their own

# words of a call's description; row r of x is at X + r // INNER * OUTER_STEP + r % INNER * INNER_STEP
X, OUTER_STEP, INNER, INNER_STEP, RESIDUAL, W, Y, ROWS, SIZE, PER_TASK, EPS = range(11)
FORM = "10qf"


@njit
def _add(x: int, residual: int, size: int) -> None:
    """residual += x."""
    whole = size // WIDTH * WIDTH
    for i in range(0, whole, WIDTH):
        store(F32, residual + 4 * i, add(load(F32, residual + 4 * i), load(F32, x + 4 * i)))
    for i in range(whole, size):
        put(F32, residual + 4 * i, get(F32, residual + 4 * i) + get(F32, x + 4 * i))


@njit
def _normalize(x: int, w: int, y: int, size: int, eps: float) -> None:
    whole = size // WIDTH * WIDTH
    squares = spread(F32)
    for i in range(0, whole, WIDTH):
        v = load(F32, x + 4 * i)
        squares = fma(v, v, squares)
    square = total(squares)
    for i in range(whole, size):
        square += get(F32, x + 4 * i) * get(F32, x + 4 * i)
    factor = 1 / math.sqrt(square / size + eps)
    for i in range(0, whole, WIDTH):
        store(F32, y + 4 * i, mul(mul(load(F32, x + 4 * i), spread(factor)), load(F32, w + 4 * i)))
    for i in range(whole, size):
        put(F32, y + 4 * i, get(F32, x + 4 * i) * factor * get(F32, w + 4 * i))


def _norm_rows(call: int, index: int, thread: int) -> None:
    """The task: PER_TASK rows."""
    size, inner = word(call, SIZE), word(call, INNER)
    first = index * word(call, PER_TASK)
    for row in range(first, min(word(call, ROWS), first + word(call, PER_TASK))):
        x = word(call, X) + row // inner * word(call, OUTER_STEP) + row % inner * word(call, INNER_STEP)
        if word(call, RESIDUAL) != 0:
            residual = word(call, RESIDUAL) + 4 * row * size
            _add(x, residual, size)
            x = residual
        _normalize(x, word(call, W), word(call, Y) + 4 * row * size, size, get(F32, call + 8 * EPS))


@lru_cache
def task() -> int:
    return compile_task(_norm_rows)


def _run(x: Tensor, residual: int, w: Tensor, eps: float) -> Tensor:
    if x.dtype is not torch.float32:
        raise ValueError(f"Activations on a CPU are float32, not {x.dtype}.")
    if w.dtype is not torch.float32 or w.stride(0) != 1:
        w = w.float().contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    steps, size = x.stride(), x.shape[-1]
    inner, inner_step = 1, 0
    if len(steps) == 3 and steps[2] == 1:
        inner, inner_step = x.shape[1], steps[1]
    elif len(steps) != 2 or steps[1] != 1:
        x = x.contiguous()
        steps = (size,)
    rows = y.numel() // max(1, size)
    per_task = max(1, TASK_NUMBERS // max(1, size))
    call = describe(FORM, x.data_ptr(), 4 * steps[0], inner, 4 * inner_step, residual, w.data_ptr(), y.data_ptr(), rows,
                    size, per_task, eps)  # fmt: skip
    run(task(), call, -(-rows // per_task))
    return y


def rms_norm(x: Tensor, w: Tensor, eps: float) -> Tensor:
    """As the definition, for float32 x [..., D]."""
    return _run(x, 0, w, eps)


def add_rms_norm(x: Tensor, residual: Tensor, w: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 x [..., D]; writes the sum over `residual` if that is contiguous."""
    if residual.dtype is not torch.float32 or residual.shape != x.shape:
        raise ValueError(f"The residual must be float32 {list(x.shape)}, not {residual.dtype} {list(residual.shape)}.")
    residual = residual.contiguous()
    return _run(x, residual.data_ptr(), w, eps), residual
