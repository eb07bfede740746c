"""The gate of a SwiGLU feed-forward layer, compiled. The definition is kernels/silu_mul.py."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from numba import njit
from torch import Tensor

from kernels.cpu.simd import F32, WIDTH, add, div, exp, first, get, load, mul, put, spread, store, sub
from kernels.cpu.threads import compile_task, describe, run, word

TASK_NUMBERS = 1 << 13

# words of a call's description
X, X_STEP, Y, ROWS, SIZE, PER_TASK = range(6)


@njit(forceinline=True)
def _sigmoid_denominator(v: Any) -> Any:
    """1 + exp(-v) of a vector."""
    return add(spread(1.0), exp(sub(spread(F32), v)))


def _gate_rows(call: int, index: int, thread: int) -> None:
    """The task: PER_TASK rows."""
    size = word(call, SIZE)
    whole = size // WIDTH * WIDTH
    begin = index * word(call, PER_TASK)
    for row in range(begin, min(word(call, ROWS), begin + word(call, PER_TASK))):
        gate = word(call, X) + row * word(call, X_STEP)
        up, y = gate + 4 * size, word(call, Y) + 4 * row * size
        for i in range(0, whole, WIDTH):
            g = load(F32, gate + 4 * i)
            store(F32, y + 4 * i, mul(div(g, _sigmoid_denominator(g)), load(F32, up + 4 * i)))
        for i in range(whole, size):
            g1 = get(F32, gate + 4 * i)
            put(F32, y + 4 * i, g1 / first(_sigmoid_denominator(spread(g1))) * get(F32, up + 4 * i))


@lru_cache
def task() -> int:
    return compile_task(_gate_rows)


def silu_mul(gate_up: Tensor) -> Tensor:
    """As the definition, for float32 gate_up [T, 2I]."""
    if gate_up.dtype is not torch.float32 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be float32 [T, 2I], not {gate_up.dtype} {list(gate_up.shape)}.")
    if gate_up.stride(1) != 1:
        gate_up = gate_up.contiguous()
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, size)
    per_task = max(1, TASK_NUMBERS // max(1, size))
    call = describe("6q", gate_up.data_ptr(), 4 * gate_up.stride(0), y.data_ptr(), rows, size, per_task)
    run(task(), call, -(-rows // per_task))
    return y
