# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of kernels have Triton's types, which mypy does not know)
"""Drawing the next token of every row at once. Knows logits and numbers in [0, 1), not where either comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.jit import OPTIONS, jit, tl

# R rows, V vocabulary


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """One token id per row, int64 [R].

    logits float32 [R, V]; temperature, top_p, min_p float32 [R]; top_k int32 [R], 0 is off; uniform float64 [R] in
    [0, 1). Temperature 0 takes the largest logit, the lowest id among equals. Otherwise, in vLLM's and Hugging
    Face's order: divide by the temperature; top-k keeps tokens with fewer than k strictly likelier ones (so ties
    stay together); top-p keeps tokens whose strictly likelier ones have, renormalised over what top-k kept, a mass
    below top_p; min-p keeps tokens at least min_p times as likely as the likeliest, which always stays. The draw
    inverts the cumulative distribution in order of token id: the smallest id whose cumulative kept mass exceeds
    uniform * (kept mass). A logit of -inf is never drawn. A row with NaN gives some valid id: check it first.
    """
    scaled = logits.double() / torch.where(temperature > 0, temperature, 1).double()[:, None]
    threshold = _keep_threshold(scaled, top_k, top_p, min_p)
    weight = torch.exp(scaled - scaled.amax(-1, keepdim=True)) * (scaled >= threshold[:, None])
    cumulative = weight.cumsum(-1)
    drawn = (cumulative <= cumulative[:, -1:] * uniform.double()[:, None]).sum(-1)
    last_kept = logits.shape[-1] - 1 - (weight > 0).flip(-1).int().argmax(-1)  # uniform * total may round up to total
    return torch.where(temperature > 0, torch.minimum(drawn, last_kept), logits.argmax(-1))


def _keep_threshold(scaled: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Float64 [R]: the smallest scaled logit that top-k, then top-p, then min-p keep."""
    ordered = scaled.sort(-1, descending=True).values
    vocab = scaled.shape[-1]
    kth = torch.where(top_k > 0, top_k, vocab).clamp(max=vocab).long()[:, None] - 1
    ordered = ordered.masked_fill(ordered < ordered.gather(-1, kth), -torch.inf)
    mass = torch.softmax(ordered, -1)
    likelier = mass.cumsum(-1) - mass  # of a token's strictly likelier ones, at the first of equals
    in_nucleus = (likelier < top_p.double()[:, None]) & (ordered > -torch.inf)
    in_nucleus[:, 0] = True  # the likeliest stays, whatever the numbers
    last = in_nucleus.sum(-1, keepdim=True) - 1
    floor = ordered[:, 0] + torch.log(min_p.double())  # p_i >= min_p * p_max, as a scaled logit; -inf when off
    return torch.maximum(ordered.gather(-1, last).squeeze(-1), torch.minimum(floor, ordered[:, 0]))


# The Triton form: one program per row, no sort. A threshold is searched by passes over the row (it stays in the L2
# cache): each pass sums what lies above three pivots, which quarters the interval, and shrinks it to the logits inside.
# Pivots are taken evenly among the 32-bit patterns of floats, so that a search ends exactly, in at most 16 passes;
# with the shrinking it takes about 8. Qrita (arXiv 2602.01518) works alike.

BLOCK = 2048
WARPS = 16
STAGES = tl.constexpr(4) if tl else 4  # three blocks are on their way while one is summed: 24 KiB fill a multiprocessor


@jit()
def _key(x):
    """float32 -> int64 in the same order."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@jit()
def _value(key):
    """The float32 of a key."""
    bits = key.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit()
def _threshold(row_ptr, vocab, low, high, limit, peak, scale, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Key of the least t in (low, high] above which lie fewer than `limit` logits, or less than that mass.

    The mass of x is 2^((x - peak) * scale). Above `high` the sum must be below the limit.
    """
    offset = tl.arange(0, BLOCK)
    rounds = 0  # 16 are enough for numbers; a row of NaN must end too
    while (high - low > 1) & (rounds < 32):
        quarter = (high - low + 3) // 4
        key_1, key_2, key_3 = low + quarter, tl.minimum(low + 2 * quarter, high), tl.minimum(low + 3 * quarter, high)
        pivot_1, pivot_2, pivot_3 = _value(key_1), _value(key_2), _value(key_3)
        floor, ceiling = _value(low), _value(high)
        above_1 = tl.zeros([BLOCK], tl.float32)
        above_2 = tl.zeros([BLOCK], tl.float32)
        above_3 = tl.zeros([BLOCK], tl.float32)
        least = tl.full([BLOCK], float("inf"), tl.float32)
        most = tl.full([BLOCK], float("-inf"), tl.float32)
        for begin in tl.range(0, vocab, BLOCK, num_stages=STAGES):
            x = tl.load(row_ptr + begin + offset, mask=begin + offset < vocab, other=float("-inf"))
            weight = tl.exp2((x - peak) * scale) if BY_MASS else 1.0
            above_1 += tl.where(x > pivot_1, weight, 0.0)
            above_2 += tl.where(x > pivot_2, weight, 0.0)
            above_3 += tl.where(x > pivot_3, weight, 0.0)
            least = tl.minimum(least, tl.where(x > floor, x, float("inf")))
            most = tl.maximum(most, tl.where(x <= ceiling, x, float("-inf")))
        sum_1, sum_2, sum_3 = tl.sum(above_1), tl.sum(above_2), tl.sum(above_3)
        lowest, highest = tl.min(least), tl.max(most)
        high = tl.where(highest > floor, tl.minimum(high, _key(highest)), high)
        high = tl.where(sum_3 < limit, tl.minimum(high, key_3), high)
        high = tl.where(sum_2 < limit, tl.minimum(high, key_2), high)
        high = tl.where(sum_1 < limit, tl.minimum(high, key_1), high)
        low = tl.maximum(low, _key(lowest) - 1)
        low = tl.where(sum_1 >= limit, tl.maximum(low, key_1), low)
        low = tl.where(sum_2 >= limit, tl.maximum(low, key_2), low)
        low = tl.where(sum_3 >= limit, tl.maximum(low, key_3), low)
        rounds += 1
    return high


@jit()
def _survey(row_ptr, vocab, BLOCK: tl.constexpr):
    """(largest logit, the lowest id that has it, least finite logit) of a row."""
    offset = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    best_id = offset
    least = tl.full([BLOCK], float("inf"), tl.float32)
    for begin in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        x = tl.load(row_ptr + begin + offset, mask=begin + offset < vocab, other=float("-inf"))
        best_id = tl.where(x > best, begin + offset, best_id)
        best = tl.maximum(best, x)
        least = tl.minimum(least, tl.where(x > float("-inf"), x, float("inf")))
    peak = tl.max(best)
    return peak, tl.min(tl.where(best == peak, best_id, vocab - 1)), tl.min(least)


@jit()
def _weight(x, threshold, floor, peak, scale):
    """2^((x - peak) * scale), the probability but for a factor, of a kept logit; 0 for one that is not kept."""
    exponent = (x - peak) * scale
    return tl.where((x >= threshold) & (exponent >= floor), tl.exp2(exponent), 0.0)


@jit()
def _mass(row_ptr, vocab, threshold, floor, peak, scale, BLOCK: tl.constexpr):
    """The sum of a row's weights."""
    offset = tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.float32)
    for begin in tl.range(0, vocab, BLOCK, num_stages=STAGES):
        x = tl.load(row_ptr + begin + offset, mask=begin + offset < vocab, other=float("-inf"))
        mass += _weight(x, threshold, floor, peak, scale)
    return tl.sum(mass)


@jit()
def _draw(row_ptr, vocab, threshold, floor, peak, scale, uniform, BLOCK: tl.constexpr):
    """The smallest id whose cumulative weight exceeds uniform * (sum); the last kept one if rounding hides it."""
    target = uniform * _mass(row_ptr, vocab, threshold, floor, peak, scale, BLOCK).to(tl.float64)
    offset = tl.arange(0, BLOCK)
    before = tl.zeros([], tl.float64)  # the weight of earlier blocks
    drawn = -1
    begin = 0
    searching = True
    while searching:
        x = tl.load(row_ptr + begin + offset, mask=begin + offset < vocab, other=float("-inf"))
        weight = _weight(x, threshold, floor, peak, scale)
        cumulative = tl.cumsum(weight, 0)
        is_past = (cumulative > (target - before).to(tl.float32)) & (weight > 0)
        first = tl.min(tl.where(is_past, begin + offset, vocab))
        last = tl.max(tl.where(weight > 0, begin + offset, -1))
        drawn = tl.where(first < vocab, first, tl.maximum(drawn, last))
        before += tl.sum(weight).to(tl.float64)
        begin += BLOCK
        searching = (first == vocab) & (begin < vocab)
    return tl.maximum(drawn, 0)


@jit(("temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "uniform_ptr"))
def _sample(
    id_ptr, logits_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, uniform_ptr, vocab, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (R,): each row takes only the passes that its parameters ask for."""
    row = tl.program_id(0)
    row_ptr = logits_ptr + row.to(tl.int64) * stride
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    peak, best_id, least = _survey(row_ptr, vocab, BLOCK)
    if temperature <= 0:
        tl.store(id_ptr + row, best_id.to(tl.int64))
        return
    scale = tl.minimum(1.4426950408889634 / temperature, 1.0e30)  # weights are powers of two; 0 * inf would be NaN
    high = _key(peak)
    low = _key(least) - 1
    kept = low + 1
    if (top_k > 0) & (top_k < vocab):
        kept = _threshold(row_ptr, vocab, low, high, top_k.to(tl.float32), peak, scale, False, BLOCK)
    if top_p < 1:
        # What lies below `bound` weighs less than half of 1 - top_p even if it were the whole vocabulary.
        bound = peak + tl.log2(tl.maximum(0.5 * (1 - top_p), 1.0e-8) / vocab) / scale
        low = tl.maximum(kept - 1, _key(bound))
        mass = _mass(row_ptr, vocab, _value(kept), float("-inf"), peak, scale, BLOCK)
        kept = _threshold(row_ptr, vocab, low, high, tl.maximum(top_p, 1.0e-30) * mass, peak, scale, True, BLOCK)
    floor = tl.log2(tl.minimum(tl.maximum(tl.load(min_p_ptr + row), 1.0e-38), 1.0))  # below 1e-38 a weight is 0 anyway
    uniform = tl.load(uniform_ptr + row)
    drawn = _draw(row_ptr, vocab, _value(kept), floor, peak, scale, uniform, BLOCK)
    tl.store(id_ptr + row, drawn.to(tl.int64))


def sample_triton(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor
) -> Tensor:
    """sample on a GPU, in one launch, masses in float32: a draw may differ where it falls on a boundary's rounding."""
    rows, vocab = logits.shape
    assert logits.stride(1) == 1
    ids = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _sample[(rows,)](
        ids, logits, temperature, top_k, top_p, min_p, uniform, vocab, logits.stride(0),
        BLOCK=BLOCK, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return ids
