"""Which experts a token goes to, compiled: a task is a few rows. The definition is kernels/route.py."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from numba import njit
from torch import Tensor

from kernels.cpu.simd import F32, get, get_f64, put, put_f64, put_i32
from kernels.cpu.threads import compile_task, describe, pool, run, scratch, word
from kernels.mixture import Routing

TASK_NUMBERS = 1 << 11

# words of a call's description
(LOGITS, ROW, BIAS, IDS, WEIGHTS, ROWS, EXPERTS, TOP, SIGMOID, NORMALISE, GROUPS, KEPT, GROUP_BEST, PER_TASK, SCRATCH,
 SCALE) = range(16)  # fmt: skip
FORM = "15qd"


@njit
def _score(call: int, row: int, scores: int) -> None:
    """The scores of one row as float64."""
    experts = word(call, EXPERTS)
    if word(call, SIGMOID) != 0:
        for e in range(experts):
            put_f64(scores + 8 * e, 1 / (1 + math.exp(-get(F32, row + 4 * e))))
        return
    peak = -math.inf
    for e in range(experts):
        peak = max(peak, get(F32, row + 4 * e))
    total = 0.0
    for e in range(experts):
        power = math.exp(get(F32, row + 4 * e) - peak)
        put_f64(scores + 8 * e, power)
        total += power
    for e in range(experts):
        put_f64(scores + 8 * e, get_f64(scores + 8 * e) / total)


@njit
def _take(merits: int, first: int, last: int) -> int:
    """The place of the largest number from `first` to `last`, of equal ones the first; `last` - 1 if all are NaN."""
    best, at = -math.inf, -1
    for e in range(first, last):
        merit = get_f64(merits + 8 * e)
        if merit > best:
            best, at = merit, e
    return at if at >= 0 else last - 1


@njit
def _keep_groups(call: int, merits: int, spare: int) -> None:
    """Sets the merits of experts outside the best groups to -inf; `spare` holds a group's and the groups' merits."""
    groups = word(call, GROUPS)
    size = word(call, EXPERTS) // groups
    totals = spare + 8 * size
    for g in range(groups):
        for e in range(size):
            put_f64(spare + 8 * e, get_f64(merits + 8 * (g * size + e)))
        total = 0.0
        for _ in range(word(call, GROUP_BEST)):
            best = _take(spare, 0, size)
            total += get_f64(spare + 8 * best)
            put_f64(spare + 8 * best, -math.inf)
        put_f64(totals + 8 * g, total)
    for _ in range(word(call, KEPT)):
        put_f64(totals + 8 * _take(totals, 0, groups), math.nan)  # kept
    for g in range(groups):
        kept = get_f64(totals + 8 * g)
        for e in range(g * size, (g + 1) * size):
            if kept == kept:
                put_f64(merits + 8 * e, -math.inf)


def _route_rows(call: int, index: int, thread: int) -> None:
    """The task: PER_TASK rows."""
    experts, top, bias = word(call, EXPERTS), word(call, TOP), word(call, BIAS)
    scores = word(call, SCRATCH) + thread * 32 * experts
    merits, spare = scores + 8 * experts, scores + 16 * experts
    begin = index * word(call, PER_TASK)
    for row in range(begin, min(word(call, ROWS), begin + word(call, PER_TASK))):
        _score(call, word(call, LOGITS) + row * word(call, ROW), scores)
        for e in range(experts):
            extra = get(F32, bias + 4 * e) if bias != 0 else F32
            put_f64(merits + 8 * e, get_f64(scores + 8 * e) + extra)
        if word(call, KEPT) < word(call, GROUPS):
            _keep_groups(call, merits, spare)
        total = 0.0
        for j in range(top):
            best = _take(merits, 0, experts)
            put_i32(word(call, IDS) + 4 * (row * top + j), best)
            put_f64(spare + 8 * j, get_f64(scores + 8 * best))
            put_f64(merits + 8 * best, -math.inf)
            total += get_f64(spare + 8 * j)
        factor = get_f64(call + 8 * SCALE)
        if word(call, NORMALISE) != 0:
            factor /= max(total, 1e-20)
        for j in range(top):
            put(F32, word(call, WEIGHTS) + 4 * (row * top + j), get_f64(spare + 8 * j) * factor)


@lru_cache
def task() -> int:
    return compile_task(_route_rows)


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As the definition, for float32 logits [T, X]; scores and sums are float64."""
    rows, experts = logits.shape
    if logits.dtype is not torch.float32 or logits.stride(1) != 1:
        raise ValueError(f"logits must be float32 with contiguous rows, not {logits.dtype}.")
    bias = None if bias is None else bias.float().contiguous()
    ids = torch.empty(rows, routing.top_k, dtype=torch.int32)
    weights = torch.empty(rows, routing.top_k)
    per_task = max(1, TASK_NUMBERS // experts)
    call = describe(
        FORM, logits.data_ptr(), 4 * logits.stride(0), 0 if bias is None else bias.data_ptr(), ids.data_ptr(),
        weights.data_ptr(), rows, experts, routing.top_k, routing.scoring == "sigmoid", routing.normalise,
        routing.groups, routing.kept_groups, routing.group_best, per_task, scratch(32 * experts * pool().threads),
        routing.scale,
    )  # fmt: skip
    run(task(), call, -(-rows // per_task))
    return ids, weights
