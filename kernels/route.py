# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of kernels have Triton's types, which mypy does not know)
"""Which experts a token goes to, and with what weight.

T tokens, X experts, k of them for each token. The two scorings are those of Shazeer et al. 2017 (arXiv 1701.06538) and
DeepSeek-V3 (arXiv 2412.19437); groups are DeepSeek-V2's (arXiv 2405.04434, section 2.2.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.jit import OPTIONS, jit, next_power_of_2, tl
from kernels.mixture import Routing

LEAST_TOTAL = tl.constexpr(1e-20) if tl is not None else 1e-20  # DeepSeek-V3's guard against 0 / 0


def route(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(ids int32 [T, k], weights float32 [T, k]) from logits [T, X]; float64 logits give float64 weights.

    The best first, of equal ones the lower id. bias [X] is added to the scores for the choice alone, never to the
    weights. Logits that are NaN give ids that exist and weights that are NaN.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = logits.softmax(-1) if routing.scoring == "softmax" else logits.sigmoid()
    merit = scores if bias is None else scores + bias
    if routing.kept_groups < routing.groups:
        grouped = merit.unflatten(-1, (routing.groups, -1))
        group_merit = grouped.topk(routing.group_best, dim=-1).values.sum(-1)
        best = group_merit.sort(dim=-1, descending=True, stable=True).indices[:, : routing.kept_groups]
        kept = torch.zeros_like(group_merit, dtype=torch.bool).scatter_(1, best, True)
        merit = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)
    ids = merit.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k]
    weights = scores.gather(1, ids)
    if routing.normalise:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return ids.int(), weights * routing.scale


# The Triton form: a program takes one token's row.


@jit()
def _order(value):
    """float32 as int64 of the same order, the low half free."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # + 0.0: minus zero equals zero
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32


@jit()
def _best(merit, lane, taken):
    """The lane of the largest merit that is not taken, of equal ones the first."""
    rest = 0x7FFFFFFF - lane
    key = tl.where(taken, -0x7FFFFFFFFFFFFFFF - 1, _order(merit) | rest)
    return (0x7FFFFFFF - (tl.max(key, 0) & 0x7FFFFFFF)).to(tl.int32)


@jit()
def _kept(
    merit, expert, X: tl.constexpr, GROUPS: tl.constexpr, G_BLOCK: tl.constexpr, KEPT: tl.constexpr,
    GROUP_BEST: tl.constexpr,
):  # fmt: skip
    """Is an expert in one of the best groups?"""
    SIZE: tl.constexpr = X // GROUPS
    group = tl.arange(0, G_BLOCK)
    group_merit = tl.full([G_BLOCK], float("-inf"), tl.float32)
    for g in tl.static_range(GROUPS):
        taken = expert // SIZE != g
        total = 0.0
        for _ in tl.static_range(GROUP_BEST):
            best = _best(merit, expert, taken)
            total += tl.sum(tl.where(expert == best, merit, 0.0), 0)
            taken = taken | (expert == best)
        group_merit = tl.where(group == g, total, group_merit)
    left = group >= GROUPS
    kept = expert < 0
    for _ in tl.static_range(KEPT):
        best = _best(group_merit, group, left)
        left = left | (group == best)
        kept = kept | (expert // SIZE == best)
    return kept


@jit(("stride",))
def _route(
    ids_ptr, weights_ptr, logits_ptr, bias_ptr, stride, scale,
    X: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, TOP_BLOCK: tl.constexpr, SIGMOID: tl.constexpr,
    BIAS: tl.constexpr, NORMALISE: tl.constexpr, GROUPS: tl.constexpr, G_BLOCK: tl.constexpr, KEPT: tl.constexpr,
    GROUP_BEST: tl.constexpr,
):  # fmt: skip
    """Grid (T,): ids and weights [T, TOP] are contiguous, rows of logits `stride` apart."""
    token = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BLOCK)
    here = expert < X
    logits = tl.load(logits_ptr + token * stride + expert, mask=here, other=float("-inf")).to(tl.float32)
    if SIGMOID:
        scores = tl.where(here, 1 / (1 + tl.exp(-logits)), 0.0)
    else:
        powers = tl.exp(logits - tl.max(logits, 0))
        scores = powers / tl.sum(powers, 0)
    merit = scores
    if BIAS:
        merit += tl.load(bias_ptr + expert, mask=here, other=0.0)
    merit = tl.where(merit == merit, merit, float("-inf"))
    taken = expert >= X
    if KEPT < GROUPS:
        kept = _kept(merit, expert, X, GROUPS, G_BLOCK, KEPT, GROUP_BEST)
        merit = tl.where(kept, merit, float("-inf"))
    place = tl.arange(0, TOP_BLOCK)
    ids = tl.zeros([TOP_BLOCK], tl.int32)
    weights = tl.zeros([TOP_BLOCK], tl.float32)
    for j in tl.static_range(TOP):
        best = _best(merit, expert, taken)
        taken = taken | (expert == best)
        ids = tl.where(place == j, best, ids)
        weights = tl.where(place == j, tl.sum(tl.where(expert == best, scores, 0.0), 0), weights)
    if NORMALISE:
        total = tl.sum(weights, 0)
        weights = weights / tl.where(total < LEAST_TOTAL, LEAST_TOTAL, total)
    tl.store(ids_ptr + token * TOP + place, ids, mask=place < TOP)
    tl.store(weights_ptr + token * TOP + place, weights * scale, mask=place < TOP)


def constants(num_experts: int, routing: Routing, bias: bool) -> dict[str, Any]:
    """`_route`'s compile-time constants: nothing but the model's."""
    return {
        "X": num_experts,
        "BLOCK": next_power_of_2(num_experts),
        "TOP": routing.top_k,
        "TOP_BLOCK": next_power_of_2(routing.top_k),
        "SIGMOID": routing.scoring == "sigmoid",
        "BIAS": bias,
        "NORMALISE": routing.normalise,
        "GROUPS": routing.groups,
        "G_BLOCK": next_power_of_2(routing.groups),
        "KEPT": routing.kept_groups,
        "GROUP_BEST": routing.group_best,
    }


WARPS = 1  # a row is a few hundred numbers: one warp reduces it without a barrier


def route_triton(logits: Tensor, routing: Routing, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """route on a GPU; bias is float32."""
    tokens, num_experts = logits.shape
    assert logits.stride(1) == 1
    ids = torch.empty((tokens, routing.top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, routing.top_k), dtype=torch.float32, device=logits.device)
    if tokens:
        _route[(tokens,)](
            ids, weights, logits, logits if bias is None else bias, logits.stride(0), routing.scale,
            **constants(num_experts, routing, bias is not None), num_warps=WARPS, **OPTIONS,
        )  # fmt: skip
    return ids, weights
