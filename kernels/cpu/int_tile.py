"""The integer tile: a few rows of 16-bit integers times one panel of 4- or 8-bit codes, as LLVM IR.

K is cut into segments of 16 or 32 features, in which a row of x is integers times one scale. The products of a segment
are added as 32-bit integers, exactly, two features at a time by the CPU's multiply-add of pairs (`vpmaddwd`; twice as
many products an instruction as float32 has, and no conversion of codes); then one float32 step per column adds

    scale_w * (scale_x * (sum of integers - zero * sum of x)) + offset_w * (scale_x * sum of x)

to the row's sum. Every row goes through the same steps in the same order, whatever rows are beside it.

A panel of codes is read as 16-bit words, of which masks and shifts make the 16-bit numbers to multiply. A block of 16
columns has 16 words, one for each of (8 columns, 2 features of a pair). Of 8-bit codes a word holds column c below
column c + 8; of 4-bit codes it holds the same of two pairs of features, four codes.
"""

from __future__ import annotations

import os
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from kernels.cpu.simd import FLOAT, I16, I32, I64, NOTHING, WIDTH, emit_load, emit_store, pointer
from kernels.cpu.tile import MAX_ROWS, emit_prefetch

X86 = os.uname().machine in ("x86_64", "amd64")
CHUNKS = WIDTH // 8
UNROLLED = 8  # pairs
PREFETCH = 2048  # bytes ahead in a stream of codes
FLOATS, INTS, SHORTS = ir.VectorType(FLOAT, 8), ir.VectorType(I32, 8), ir.VectorType(I16, 16)
NAMES = ("x", "statistics", "w", "segments", "rounds", "group", "scales", "scales_step", "offsets", "offsets_step",
         "start", "start_row", "y", "y_row")  # fmt: skip


def _spread(builder: Any, value: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(I32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(INTS, [ir.Constant(I32, 0)] * 8))


def _pairs(builder: Any, a: Any, b: Any) -> Any:
    """a[2i] * b[2i] + a[2i + 1] * b[2i + 1] as int32."""
    if X86:
        kind = ir.FunctionType(INTS, [SHORTS, SHORTS])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx2.pmadd.wd")
        return builder.call(function, [a, b])
    wide = ir.VectorType(I32, 16)
    product = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (ir.Constant(INTS, [ir.Constant(I32, 2 * i + j) for i in range(8)]) for j in (0, 1))
    nothing = ir.Constant(wide, ir.Undefined)
    return builder.add(builder.shuffle_vector(product, nothing, even), builder.shuffle_vector(product, nothing, odd))


def _codes(builder: Any, bits: int, address: Any) -> list[list[Any]]:
    """The codes of the next pair of features, or of two with 4 bits: for each pair, 8 columns at a time, as int16."""
    number = lambda n: ir.Constant(SHORTS, [ir.Constant(I16, n)] * 16)  # noqa: E731
    pairs: list[list[Any]] = [[] for _ in range(8 // bits)]
    for block in range(WIDTH // 16):
        at = builder.add(address, ir.Constant(I64, 32 * block))
        words = builder.load(pointer(builder, at, SHORTS), align=2)
        for i in range(16 // bits):
            shifted = builder.lshr(words, number(bits * i)) if i else words
            last = bits * (i + 1) == 16
            pairs[i // 2].append(shifted if last else builder.and_(shifted, number((1 << bits) - 1)))
    return pairs


class _Loop:
    """`for _ in range(count)`, count > 0, with values carried from round to round."""

    def __init__(self, builder: Any, count: Any, carried: list[Any]) -> None:
        self.builder, self.before = builder, builder.block
        self.body = builder.append_basic_block("body")
        builder.branch(self.body)
        builder.position_at_end(self.body)
        self.left = builder.phi(I64)
        self.left.add_incoming(count, self.before)
        self.values = [builder.phi(value.type) for value in carried]
        for phi, value in zip(self.values, carried, strict=True):
            phi.add_incoming(value, self.before)

    def close(self, following: list[Any]) -> None:
        builder, end = self.builder, self.builder.append_basic_block("end")
        left = builder.sub(self.left, ir.Constant(I64, 1))
        self.left.add_incoming(left, builder.block)
        for phi, value in zip(self.values, following, strict=True):
            phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed(">", left, ir.Constant(I64, 0)), self.body, end)
        builder.position_at_end(end)


def _emit_rows(builder: Any, bits: int, scale_kind: Any, rows: int, a: dict[str, Any]) -> None:
    """The tile for one number of rows; `a` holds the LLVM values of the arguments."""
    number = lambda n: ir.Constant(I64, n)  # noqa: E731
    spots = [(m, h) for m in range(rows) for h in range(CHUNKS)]
    pair_bytes = WIDTH * bits // 4
    none, zero = ir.Constant(INTS, [ir.Constant(I32, 0)] * 8), ir.Constant(FLOATS, [ir.Constant(FLOAT, 0.0)] * 8)
    outer = _Loop(builder, a["segments"], [a["x"], a["w"], a["statistics"], a["scales"], a["offsets"], a["group"],
                                           *[zero] * len(spots)])  # fmt: skip
    x, w, statistics, scales, offsets, group, *sums = outer.values

    inner = _Loop(builder, a["rounds"], [x, w, *[none] * len(spots)])
    x, w, *integers = inner.values
    for pair in range(UNROLLED):
        if pair * bits % 8 == 0:
            ready = _codes(builder, bits, builder.add(w, number(pair * pair_bytes)))
        if pair * pair_bytes % 64 == 0:
            emit_prefetch(builder, builder.add(w, number(pair * pair_bytes + PREFETCH)))
        codes = ready.pop(0)
        for m in range(rows):
            at = builder.add(x, number(4 * (pair * rows + m)))
            both = builder.load(pointer(builder, at, I32), align=4)
            here = builder.bitcast(_spread(builder, both, INTS), SHORTS)
            for h in range(CHUNKS):
                i = m * CHUNKS + h
                integers[i] = builder.add(integers[i], _pairs(builder, codes[h], here))
    x, w = builder.add(x, number(4 * UNROLLED * rows)), builder.add(w, number(UNROLLED * pair_bytes))
    inner.close([x, w, *integers])

    def word(kind: Any, n: int) -> Any:
        return builder.load(pointer(builder, builder.add(statistics, number(4 * n)), kind), align=4)

    sums = list(sums)
    element = 2 if scale_kind == types.int16 else 4
    for h in range(CHUNKS):
        scale = emit_load(builder, scale_kind, builder.add(scales, number(8 * h * element)), 8)
        offset = emit_load(builder, scale_kind, builder.add(offsets, number(8 * h * element)), 8)
        for m in range(rows):
            i = m * CHUNKS + h
            whole = builder.sub(integers[i], _spread(builder, word(I32, rows + m), INTS))
            scaled = builder.fmul(builder.sitofp(whole, FLOATS), _spread(builder, word(FLOAT, m), FLOATS))
            sums[i] = _fma(builder, scaled, scale, sums[i])
            sums[i] = _fma(builder, offset, _spread(builder, word(FLOAT, 2 * rows + m), FLOATS), sums[i])
    statistics = builder.add(statistics, number(12 * rows))
    left = builder.sub(group, number(1))
    over = builder.icmp_signed("==", left, number(0))
    step = lambda at, name: builder.select(over, builder.add(at, a[name]), at)  # noqa: E731
    outer.close([x, w, statistics, step(scales, "scales_step"), step(offsets, "offsets_step"),
                 builder.select(over, a["group"], left), *sums])  # fmt: skip
    _store(builder, spots, sums, a)


def _store(builder: Any, spots: list[tuple[int, int]], sums: list[Any], a: dict[str, Any]) -> None:
    """y = start + sums; start 0: nothing is added."""
    number = lambda n: ir.Constant(I64, n)  # noqa: E731
    alone, onto, done = (builder.append_basic_block(name) for name in ("alone", "onto", "done"))
    builder.cbranch(builder.icmp_unsigned("==", a["start"], number(0)), alone, onto)
    for block in (alone, onto):
        builder.position_at_end(block)
        for value, (m, h) in zip(sums, spots, strict=True):
            if block is onto:
                at = builder.add(a["start"], builder.mul(a["start_row"], number(m)))
                before = emit_load(builder, types.float32, builder.add(at, number(32 * h)), 8)
                value = builder.fadd(before, value)
            at = builder.add(a["y"], builder.mul(a["y_row"], number(m)))
            emit_store(builder, types.float32, builder.add(at, number(32 * h)), value, 8)
        builder.branch(done)
    builder.position_at_end(done)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(FLOATS, [FLOATS] * 3), "llvm.fma.v8f32")
    return builder.call(function, [a, b, c])


@intrinsic
def int_tile(
    typing: Any, code: Any, scale: Any, rows: Any, x: Any, statistics: Any, w: Any, segments: Any, rounds: Any,
    group: Any, scales: Any, scales_step: Any, offsets: Any, offsets_step: Any, start: Any, start_row: Any, y: Any,
    y_row: Any,
) -> Any:  # fmt: skip
    """y[m] = start + x[m] w for `rows` rows, 1 to MAX_ROWS, and the columns of one panel.

    code: a uint8 value for 4 bits, another for 8. x: int16 [K / 2][rows][2]; statistics: [segments][3][rows] of
    float32 scale, int32 zero * sum, float32 scale * sum. rounds: a segment's pairs / 8; group: segments that share
    scales. Steps in bytes to the next group's scales and offsets.
    """

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits, values = 4 if code == types.uint8 else 8, dict(zip(NAMES, args[3:], strict=True))
        after = builder.append_basic_block("after")
        switch = builder.switch(args[2], after)
        for count in range(1, MAX_ROWS + 1):
            block = builder.append_basic_block("rows")
            switch.add_case(ir.Constant(I64, count), block)
            builder.position_at_end(block)
            _emit_rows(builder, bits, scale, count, values)
            builder.branch(after)
        builder.position_at_end(after)
        return NOTHING

    return types.void(code, scale, *[types.int64] * 15), generate
