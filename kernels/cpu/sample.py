"""Drawing the next token of every row, compiled, without sorting a row. The definition is kernels/sample.py.

A row is looked at in blocks of 128 logits. Their maxima find the largest logit and bound the k-th; the masses of the
blocks find the block of the draw. What is kept is "logit >= threshold", and the threshold of top-k and of top-p is the
same question: the smallest value whose strictly larger ones weigh less than a limit. It is answered by a radix search
(11 bits of the ordered float at a time) among the few logits that can matter. Weights are exp((logit - largest) /
temperature) in float32, their sums float64. Logits themselves are compared: dividing by a temperature keeps their
order.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from kernels.cpu.simd import (
    F32,
    WIDTH,
    add_wide,
    exp,
    get,
    get_f64,
    get_i32,
    keep_from,
    larger,
    largest,
    load,
    mul,
    nothing_yet,
    put,
    put_f64,
    put_i64,
    spread,
    stack,
    store,
    sub,
    total_wide,
)
from kernels.cpu.threads import compile_task, describe, pool, run, scratch, word

BLOCK = 128
BINS = 2048

# words of a call's description
LOGITS, ROW_STEP, VOCAB, TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM, IDS, SCRATCH, SCRATCH_STEP = range(11)

_tail = stack(WIDTH // 2)
_weights = stack(BLOCK // 2)
_histogram = stack(BINS)


@njit(forceinline=True)
def _logits(row: int, i: int, vocab: int) -> Any:
    """A vector of logits from i on; -inf past the end."""
    address, buffer = row + 4 * i, _tail()
    if i + WIDTH > vocab:
        _copy_last(row, i, vocab, buffer)
        address = buffer
    return load(F32, address)


@njit
def _copy_last(row: int, i: int, vocab: int, to: int) -> None:
    """WIDTH logits from i on, with -inf behind the last."""
    for j in range(WIDTH):
        put(F32, to + 4 * j, get(F32, row + 4 * (i + j)) if i + j < vocab else -math.inf)


@njit
def _block_maxima(row: int, vocab: int, to: int) -> float:
    """Writes the largest logit of each block; returns the largest of all. NaN is passed over."""
    best = spread(-math.inf)
    for begin in range(0, vocab, BLOCK):
        block = spread(-math.inf)
        for i in range(begin, min(vocab, begin + BLOCK), WIDTH):
            block = larger(_logits(row, i, vocab), block)
        put(F32, to + 4 * (begin // BLOCK), largest(block))
        best = larger(block, best)
    return largest(best)


@njit
def _first_of(row: int, vocab: int, maxima: int, value: float) -> int:
    """The lowest id whose logit is `value`, which is the largest; 0 if there is none (all NaN)."""
    for begin in range(0, vocab, BLOCK):
        if get(F32, maxima + 4 * (begin // BLOCK)) == value:
            for i in range(begin, min(vocab, begin + BLOCK)):
                if get(F32, row + 4 * i) == value:
                    return i
    return 0


@njit
def _block_masses(row: int, vocab: int, maxima: int, peak: float, rate: float, threshold: float, to: int) -> float:
    """Writes the weight of each block's logits from `threshold` up; returns the sum in order of blocks."""
    everything = 0.0
    for begin in range(0, vocab, BLOCK):
        mass = 0.0
        if get(F32, maxima + 4 * (begin // BLOCK)) >= threshold:
            sums = nothing_yet()
            for i in range(begin, min(vocab, begin + BLOCK), WIDTH):
                sums = add_wide(sums, _weight(keep_from(_logits(row, i, vocab), threshold), peak, rate))
            mass = total_wide(sums)
        put_f64(to + 8 * (begin // BLOCK), mass)
        everything += mass
    return everything


@njit(forceinline=True)
def _weight(logits: Any, peak: float, rate: float) -> Any:
    """exp((logit - peak) / temperature) of a vector; 0 for -inf."""
    return exp(mul(sub(logits, spread(peak)), spread(rate)))


@njit
def _candidates(row: int, vocab: int, maxima: int, bound: float, to: int) -> int:
    """Copies the logits from `bound` up; returns their number."""
    count = 0
    for begin in range(0, vocab, BLOCK):
        if get(F32, maxima + 4 * (begin // BLOCK)) >= bound:
            for i in range(begin, min(vocab, begin + BLOCK)):
                logit = get(F32, row + 4 * i)
                put(F32, to + 4 * count, logit)
                count += logit >= bound
    return count


@njit(forceinline=True)
def _key(address: int) -> int:
    """A float32 as a number of 32 bits in the same order."""
    bits = get_i32(address) & 0xFFFFFFFF
    return bits ^ (0xFFFFFFFF if bits >> 31 else 0x80000000)


@njit
def _threshold(values: int, weights: int, count: int, limit: float) -> float:
    """The smallest of `count` values whose strictly larger ones weigh less than `limit`; -inf if all together do.

    weights 0: each weighs 1. Overwrites both arrays.
    """
    histogram, above = _histogram(), 0.0
    for shift in (21, 10, 0):
        for b in range(BINS):
            put_f64(histogram + 8 * b, 0.0)
        for i in range(count):
            b = _key(values + 4 * i) >> shift & (BINS - 1 if shift else 1023)
            weight = get(F32, weights + 4 * i) if weights != 0 else 1.0
            put_f64(histogram + 8 * b, get_f64(histogram + 8 * b) + weight)
        digit = BINS - 1
        while digit >= 0 and above + get_f64(histogram + 8 * digit) < limit:
            above += get_f64(histogram + 8 * digit)
            digit -= 1
        kept = 0
        for i in range(count):
            if _key(values + 4 * i) >> shift & (BINS - 1 if shift else 1023) == digit:
                put(F32, values + 4 * kept, get(F32, values + 4 * i))
                if weights != 0:
                    put(F32, weights + 4 * kept, get(F32, weights + 4 * i))
                kept += 1
        count = kept
    return get(F32, values) if count > 0 else -math.inf


@njit
def _top_k(row: int, vocab: int, maxima: int, k: int, values: int) -> float:
    """The k-th largest logit, 0 < k < vocab. It is no less than the k-th largest of the blocks' maxima."""
    blocks, bound = (vocab + BLOCK - 1) // BLOCK, -math.inf
    if k < blocks:
        for b in range(blocks):
            put(F32, values + 4 * b, get(F32, maxima + 4 * b))
        bound = _threshold(values, 0, blocks, k)
    return _threshold(values, 0, _candidates(row, vocab, maxima, bound, values), k)


@njit
def _top_p(
    row: int, vocab: int, maxima: int, peak: float, rate: float, p: float, least: float, masses: int, values: int,
    weights: int,
) -> float:  # fmt: skip
    """The smallest logit of the nucleus among those from `least` up, 0 < p < 1.

    All logits that each weigh less than (1 - p) / vocab of the whole weigh less than 1 - p together, so none of them is
    in the nucleus: it is searched among the others.
    """
    mass = _block_masses(row, vocab, maxima, peak, rate, least, masses)
    bound = max(least, peak + (math.log((1 - p) * mass / vocab) - 0.001) / rate)
    count = _candidates(row, vocab, maxima, bound, values)
    for i in range(0, count, WIDTH):
        store(F32, weights + 4 * i, _weight(_logits(values, i, count), peak, rate))
    return _threshold(values, weights, count, p * mass)


@njit
def _draw(
    row: int, vocab: int, maxima: int, peak: float, rate: float, threshold: float, uniform: float, masses: int
) -> int:
    """The smallest id whose cumulative kept weight exceeds uniform * (all kept weight)."""
    target = uniform * _block_masses(row, vocab, maxima, peak, rate, threshold, masses)
    before, chosen, at = 0.0, 0, 0.0
    for b in range((vocab + BLOCK - 1) // BLOCK):
        mass = get_f64(masses + 8 * b)
        if mass > 0:
            chosen, at = b, before
            if before + mass > target:
                break
            before += mass
    begin, end = chosen * BLOCK, min(vocab, (chosen + 1) * BLOCK)
    buffer = _weights()
    for i in range(begin, end, WIDTH):
        store(F32, buffer + 4 * (i - begin), _weight(keep_from(_logits(row, i, vocab), threshold), peak, rate))
    drawn = begin
    for i in range(begin, end):
        weight = get(F32, buffer + 4 * (i - begin))
        if weight > 0:
            drawn = i
            at += weight
            if at > target:
                break
    return drawn


@njit
def _round_up(value: float) -> float:
    """The least float32 that is no less than a float64."""
    rounded = np.float32(value)
    nearest: Any = rounded if rounded >= value else np.nextafter(rounded, np.float32(math.inf))
    return nearest


def _sample_row(call: int, index: int, thread: int) -> None:
    """The task: one row."""
    vocab = word(call, VOCAB)
    row = word(call, LOGITS) + index * word(call, ROW_STEP)
    maxima = word(call, SCRATCH) + thread * word(call, SCRATCH_STEP)
    blocks = (vocab + BLOCK - 1) // BLOCK
    masses = maxima + 8 * blocks
    values = masses + 8 * blocks
    weights = values + 4 * (vocab + WIDTH)
    temperature = get(F32, word(call, TEMPERATURE) + 4 * index)
    k, p = get_i32(word(call, TOP_K) + 4 * index), get(F32, word(call, TOP_P) + 4 * index)
    min_p = get(F32, word(call, MIN_P) + 4 * index)
    peak = _block_maxima(row, vocab, maxima)
    chosen = _first_of(row, vocab, maxima, peak)
    if temperature > 0 and peak > -math.inf:
        rate, threshold = 1 / temperature, -math.inf
        if 0 < k < vocab:
            threshold = _top_k(row, vocab, maxima, k, values)
        if p <= 0:
            threshold = peak
        elif p < 1:
            threshold = max(threshold, _top_p(row, vocab, maxima, peak, rate, p, threshold, masses, values, weights))
        if min_p > 0:
            least = _round_up(peak + temperature * math.log(min_p))
            threshold = max(threshold, min(peak, least))
        chosen = _draw(row, vocab, maxima, peak, rate, threshold, get_f64(word(call, UNIFORM) + 8 * index), masses)
    put_i64(word(call, IDS) + 8 * index, chosen)


@lru_cache
def task() -> int:
    return compile_task(_sample_row)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """As the definition."""
    if logits.dtype != torch.float32:
        raise ValueError(f"Logits must be float32, not {logits.dtype}.")
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    columns = (temperature.float(), top_k.int(), top_p.float(), min_p.float(), uniform.double())
    held = [column.contiguous() for column in columns]
    rows, vocab = logits.shape
    ids = torch.empty(rows, dtype=torch.int64)
    blocks = -(-vocab // BLOCK)
    each = 16 * blocks + 8 * (vocab + WIDTH)  # maxima, masses, values, weights
    memory = scratch(each * pool().threads)
    addresses = [column.data_ptr() for column in (*held, ids)]
    call = describe("11q", logits.data_ptr(), 4 * logits.stride(0), vocab, *addresses, memory, each)
    run(task(), call, rows)
    return ids
