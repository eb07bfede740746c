# mypy: allow-untyped-defs, allow-incomplete-defs
# (arguments of kernels have Triton's types, which mypy does not know)
"""The routed feed-forward network of a mixture of experts: each token through the experts that were chosen for it.

Shazeer et al. 2017, arXiv 1701.06538; sorted by expert and without padding as in MegaBlocks (Gale et al. 2022, arXiv
2211.15841). T tokens, D hidden, I intermediate, X experts, k of them for each token; a pair is a token and one of its
experts, P = T k, numbered token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from kernels.attention.plan import target_name
from kernels.jit import OPTIONS, jit, next_power_of_2, tl
from kernels.linear import DTYPES
from kernels.mixture import SILU, Gate


def form_of(kernels: str) -> str:
    """The form of weights that the experts of `Kernels.name` read."""
    return "numba" if kernels == "cpu" else "torch"


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """X matrices [N, K] in a form. "torch": data is [X, N, K]; "numba": [X, ceil(N / W), K, W], zeros after N."""

    form: str
    data: Tensor
    out_features: int
    in_features: int

    @staticmethod
    def empty(
        form: str, num_experts: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
    ) -> PackedExperts:
        """To be filled by `put`. ValueError for a dtype that the form cannot hold."""
        if form == "torch":
            data = torch.empty(num_experts, out_features, in_features, dtype=dtype, device=device)
            return PackedExperts(form, data, out_features, in_features)
        if dtype not in DTYPES:
            raise ValueError(f"The numba form takes float32, bfloat16 and float16 weights, not {dtype}.")
        from kernels.cpu import linear as compiled
        from kernels.cpu.simd import WIDTH

        shape = (num_experts, compiled.panels(out_features), in_features, WIDTH)
        return PackedExperts(form, torch.zeros(shape, dtype=dtype), out_features, in_features)

    def put(self, expert: int, weight: Tensor) -> None:
        """One expert's matrix [N, K], cast to the weights' dtype."""
        if self.form == "torch":
            self.data[expert].copy_(weight)
            return
        from kernels.cpu import linear as compiled

        weight = weight.to(self.data.dtype).contiguous()
        to = self.data[expert].data_ptr()
        compiled.pack(self.data.dtype, weight.data_ptr(), to, self.out_features, self.in_features)

    def matrix(self, expert: int) -> Tensor:
        """One expert's [N, K], bit for bit."""
        if self.form == "torch":
            return self.data[expert]
        from kernels.cpu import linear as compiled

        column, width = torch.arange(self.out_features), self.data.shape[3]
        return self.data[expert][column // width, :, compiled.lane(column % width, self.data.dtype)]


def gated(gate_up: Tensor, gate: Gate) -> Tensor:
    """The gate of [.., 2I] -> [.., I]."""
    g, u = gate_up.chunk(2, dim=-1)
    g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit)
    return (u + gate.offset) * g * torch.sigmoid(gate.alpha * g)


def experts(
    x: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    ids: Tensor,
    weights: Tensor,
    *,
    gate: Gate = SILU,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    load: Tensor | None = None,
) -> Tensor:
    """y[t] = sum over j of weights[t, j] down_e(gate(gate_up_e(x[t]))) with e = ids[t, j]; [T, D] in x's dtype.

    x [T, D]; gate_up holds [2I, D] of each expert, gate first, down [D, I]; ids int32 and weights [T, k] are `route`'s.
    Biases [X, 2I] and [X, D]. shared [T, D] is added at last, times sigmoid(shared_gate [T, 1]) where that is given.
    load int64 [X]: how many pairs each expert has had; this call's are added. Sums are in float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = torch.zeros((*ids.shape, x.shape[1]), dtype=wide, device=x.device)
    for e in range(gate_up.data.shape[0]):
        token, j = torch.where(ids == e)
        h = x[token].to(wide) @ gate_up.matrix(e).to(wide).T
        h = gated(h if gate_up_bias is None else h + gate_up_bias[e].to(wide), gate)
        h = h @ down.matrix(e).to(wide).T
        parts[token, j] = h if down_bias is None else h + down_bias[e].to(wide)
    y = (parts * weights[..., None].to(wide)).sum(1)
    if shared is not None:
        share = shared.to(wide)
        y += share if shared_gate is None else share * shared_gate.to(wide).sigmoid()
    if load is not None:
        load += torch.bincount(ids.flatten(), minlength=load.shape[0])
    return y.to(x.dtype)


# The Triton form. Pairs are sorted by expert (two small kernels); each program of a product takes a tile of rows of
# one expert, which it finds from the experts' first rows, so that no tile is padded to the longest expert. Grids depend
# only on P and X: tiles that turn out not to be needed end at once, and a captured graph stays right.


@dataclass(frozen=True)
class Tile:
    """One program's share of a product: `rows` of one expert times `columns` of its outputs, `depth` at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


# The least tile that holds the rows an expert has on average. Few rows: bound by the weights' bytes, so what counts is
# loads in flight. Many: bound by the tensor cores. docs/kernels.md holds what they compile to.
TILES: dict[str, tuple[Tile, ...]] = {
    "sm_80": (Tile(16, 64, 64, 4, 4), Tile(64, 128, 32, 4, 3), Tile(128, 128, 32, 8, 3)),
    "sm_90": (Tile(16, 64, 64, 4, 4), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    "sm_100": (Tile(16, 64, 64, 4, 4), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    "gfx942": (Tile(16, 64, 64, 4, 2), Tile(64, 128, 32, 4, 2), Tile(128, 128, 32, 8, 2)),
}
FLOAT32 = Tile(16, 32, 32, 4, 2)  # exact products, not the tensor cores'; for checking, not for speed
CHUNK, PART, CHUNKS_AT_ONCE = 128, 16, 16  # pairs of a sorting program; compared at a time; histograms read at a time
SUM_BLOCK, WARPS = 1024, 4  # of the kernels beside the products


def tile(target: str, pairs: int, num_experts: int, item_bytes: int) -> Tile:
    """The tile for a step with so many pairs."""
    if item_bytes == 4:
        return FLOAT32
    few, some, many = TILES[target]
    average = pairs / num_experts
    return few if average <= few.rows else some if average <= some.rows else many


def num_tiles(pairs: int, num_experts: int, rows: int) -> int:
    """Row tiles at most, however the pairs fall: each expert that has any wastes less than one."""
    used = min(pairs, num_experts)
    return (pairs - used) // rows + used


@jit(("pairs",))
def _count(histogram_ptr, ids_ptr, pairs, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Grid (chunks,): how many of a chunk's pairs go to each expert, histogram [chunks, BLOCK]."""
    chunk = tl.program_id(0)
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + pair, mask=pair < pairs, other=0)
    counts = tl.histogram(ids, BLOCK, mask=pair < pairs)
    tl.store(histogram_ptr + chunk * BLOCK + tl.arange(0, BLOCK), counts)


@jit(("pairs", "chunks"))
def _place(
    order_ptr, starts_ptr, load_ptr, histogram_ptr, ids_ptr, pairs, chunks,
    X: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, PART: tl.constexpr, AT_ONCE: tl.constexpr,
    LOAD: tl.constexpr,
):  # fmt: skip
    """Grid (chunks,): a stable counting sort. order [P]: pairs by expert; starts [X + 1]: each expert's first place."""
    chunk = tl.program_id(0)
    expert = tl.arange(0, BLOCK)
    before = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, chunks, AT_ONCE):
        other = first + tl.arange(0, AT_ONCE)
        at = histogram_ptr + other[:, None] * BLOCK + expert[None, :]
        counts = tl.load(at, mask=(other < chunks)[:, None], other=0)
        total += tl.sum(counts, 0)
        before += tl.sum(tl.where((other < chunk)[:, None], counts, 0), 0)
    starts = tl.cumsum(total, 0) - total
    pair = chunk * CHUNK + tl.arange(0, CHUNK)
    is_pair = pair < pairs
    ids = tl.load(ids_ptr + pair, mask=is_pair, other=0)
    rank = tl.zeros([CHUNK], tl.int32)
    for part in tl.static_range(CHUNK // PART):
        earlier = chunk * CHUNK + part * PART + tl.arange(0, PART)
        theirs = tl.load(ids_ptr + earlier, mask=earlier < pairs, other=-1)
        same = (theirs[None, :] == ids[:, None]) & (earlier[None, :] < pair[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    tl.store(order_ptr + tl.gather(starts + before, ids, 0) + rank, pair, mask=is_pair)
    if chunk == 0:
        tl.store(starts_ptr + expert, starts, mask=expert < X)
        tl.store(starts_ptr + X, pairs)
        if LOAD:
            so_far = tl.load(load_ptr + expert, mask=expert < X, other=0)
            tl.store(load_ptr + expert, so_far + total, mask=expert < X)


@jit(("pairs",))
def _product(
    out_ptr, x_ptr, w_ptr, bias_ptr, order_ptr, starts_ptr, x_stride, pairs, alpha, limit, offset,
    X: tl.constexpr, BLOCK: tl.constexpr, TOP: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, column tiles), row tiles of one expert beside each other so that they share its weights.

    GATED: rows of x are tokens, w is [X, 2N, K], and out [P, N] is the gate of both halves, in sorted order.
    Else rows of x are sorted pairs, w is [X, N, K], and out [P, N] is in the order of pairs.
    """
    index = tl.program_id(0)
    block = tl.arange(0, BLOCK)
    starts = tl.load(starts_ptr + block, mask=block < X, other=pairs)
    ends = tl.load(starts_ptr + block + 1, mask=block < X, other=pairs)
    tiles = tl.cdiv(ends - starts, ROWS)
    up_to = tl.cumsum(tiles, 0)
    expert = tl.sum((up_to <= index).to(tl.int32), 0)
    if expert >= X:
        return
    is_mine = block == expert
    first = tl.sum(tl.where(is_mine, starts + (index - up_to + tiles) * ROWS, 0), 0)
    row = first + tl.arange(0, ROWS)
    is_row = row < tl.sum(tl.where(is_mine, ends, 0), 0)
    pair = tl.load(order_ptr + row, mask=is_row, other=0)
    source = (pair // TOP if GATED else row).to(tl.int64)

    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    feature = tl.arange(0, DEPTH)
    wide: tl.constexpr = 2 * N if GATED else N
    x_at = x_ptr + source[:, None] * x_stride + feature[None, :]
    w_at = w_ptr + expert.to(tl.int64) * wide * K + column[:, None] * K + feature[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    acc_up = tl.zeros([ROWS, COLUMNS], tl.float32)
    for k in range(0, K, DEPTH):
        inside = feature[None, :] < K - k
        x = tl.load(x_at + k, mask=is_row[:, None] & inside, other=0.0)
        is_weight = (column < N)[:, None] & inside
        w = tl.load(w_at + k, mask=is_weight, other=0.0)
        acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
        if GATED:
            up = tl.load(w_at + N * K + k, mask=is_weight, other=0.0)
            acc_up = tl.dot(x, tl.trans(up.to(x.dtype)), acc_up, input_precision="ieee")
    if BIAS:
        bias_at = bias_ptr + expert.to(tl.int64) * wide + column
        acc += tl.load(bias_at, mask=column < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            acc_up += tl.load(bias_at + N, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if GATED:
        acc = tl.where(acc > limit, limit, acc)  # as written, a NaN stays
        acc_up = tl.where(acc_up > limit, limit, tl.where(acc_up < -limit, -limit, acc_up))
        acc = (acc_up + offset) * (acc / (1 + tl.exp(-alpha * acc)))
    target = (row if GATED else pair).to(tl.int64)
    is_item = is_row[:, None] & (column < N)[None, :]
    tl.store(out_ptr + target[:, None] * N + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_item)


@jit(("shared_stride",))
def _sum(
    out_ptr, y_ptr, weights_ptr, shared_ptr, shared_gate_ptr, shared_stride,
    N: tl.constexpr, TOP: tl.constexpr, BLOCK: tl.constexpr, SHARED: tl.constexpr, SHARED_GATE: tl.constexpr,
):  # fmt: skip
    """Grid (T, stretches): a token's k results by their weights, and the shared expert's, into out [T, N]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < N
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP):
        weight = tl.load(weights_ptr + token * TOP + j)
        acc += weight * tl.load(y_ptr + (token * TOP + j) * N + column, mask=here, other=0.0).to(tl.float32)
    if SHARED:
        share = tl.load(shared_ptr + token * shared_stride + column, mask=here, other=0.0).to(tl.float32)
        if SHARED_GATE:
            share = share / (1 + tl.exp(-tl.load(shared_gate_ptr + token).to(tl.float32)))
        acc += share
    tl.store(out_ptr + token * N + column, acc.to(out_ptr.dtype.element_ty), mask=here)


def product_constants(
    num_experts: int, top_k: int, columns: int, features: int, tile: Tile, gated: bool, bias: bool
) -> dict[str, Any]:
    """`_product`'s compile-time constants: nothing but the model's shape and the tile."""
    return {
        "X": num_experts,
        "BLOCK": next_power_of_2(num_experts),
        "TOP": top_k,
        "N": columns,
        "K": features,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns // 2 if gated else tile.columns,
        "DEPTH": tile.depth,
        "GATED": gated,
        "BIAS": bias,
    }


def sorting_constants(num_experts: int, load: bool) -> dict[str, dict[str, Any]]:
    """The compile-time constants of `_count` and `_place`."""
    block = next_power_of_2(num_experts)
    place = {"X": num_experts, "BLOCK": block, "CHUNK": CHUNK, "PART": PART, "AT_ONCE": CHUNKS_AT_ONCE, "LOAD": load}
    return {"count": {"BLOCK": block, "CHUNK": CHUNK}, "place": place}


@lru_cache
def _target(device: torch.device) -> str:
    """The row of the tile table; on a CPU, where Triton only interprets, any."""
    if device.type != "cuda":
        return "sm_80"
    return target_name(torch.cuda.get_device_capability(device), torch.version.hip is not None)


def sort_pairs(ids: Tensor, num_experts: int, load: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(order int32 [P], starts int32 [X + 1]) on a GPU: pairs by expert, those of one in their order."""
    pairs, constants = ids.numel(), sorting_constants(num_experts, load is not None)
    chunks = -(-pairs // CHUNK)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    starts = torch.empty(num_experts + 1, dtype=torch.int32, device=ids.device)
    histogram = torch.empty((chunks, constants["count"]["BLOCK"]), dtype=torch.int32, device=ids.device)
    _count[(chunks,)](histogram, ids, pairs, **constants["count"], num_warps=WARPS, **OPTIONS)
    _place[(chunks,)](
        order, starts, starts if load is None else load, histogram, ids, pairs, chunks, **constants["place"],
        num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return order, starts


def experts_triton(
    x: Tensor,
    gate_up: PackedExperts,
    down: PackedExperts,
    ids: Tensor,
    weights: Tensor,
    *,
    gate: Gate = SILU,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    shared: Tensor | None = None,
    shared_gate: Tensor | None = None,
    load: Tensor | None = None,
) -> Tensor:
    """experts on a GPU, to the rounding of the tensor cores; each expert's result is rounded to x's dtype."""
    (tokens, hidden), (num_experts, inner) = x.shape, (gate_up.data.shape[0], down.in_features)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not tokens:
        return y
    assert ids.is_contiguous()
    assert weights.is_contiguous()
    assert x.stride(1) == 1
    pairs, top_k = ids.numel(), ids.shape[1]
    order, starts = sort_pairs(ids, num_experts, load)
    chosen = tile(_target(x.device), pairs, num_experts, x.element_size())
    rows = num_tiles(pairs, num_experts, chosen.rows)
    h = torch.empty((pairs, inner), dtype=x.dtype, device=x.device)
    parts = torch.empty((pairs, hidden), dtype=x.dtype, device=x.device)
    for out, source, matrix, bias, gated in ((h, x, gate_up, gate_up_bias, True), (parts, h, down, down_bias, False)):
        columns = out.shape[1]
        constants = product_constants(num_experts, top_k, columns, matrix.in_features, chosen, gated, bias is not None)
        _product[(rows, -(-columns // constants["COLUMNS"]))](
            out, source, matrix.data, out if bias is None else bias, order, starts, source.stride(0), pairs,
            gate.alpha, gate.limit, gate.offset, **constants, **chosen.options(), **OPTIONS,
        )  # fmt: skip
    _sum[(tokens, -(-hidden // SUM_BLOCK))](
        y, parts, weights, y if shared is None else shared, y if shared_gate is None else shared_gate,
        0 if shared is None else shared.stride(0), N=hidden, TOP=top_k, BLOCK=SUM_BLOCK,
        SHARED=shared is not None, SHARED_GATE=shared_gate is not None, num_warps=WARPS, **OPTIONS,
    )  # fmt: skip
    return y
