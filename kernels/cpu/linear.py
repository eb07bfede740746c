"""y = x w^T + b from weights packed in panels, compiled. Knows addresses and sizes; kernels/linear.py owns the tensors.

Every output is the bias, plus the sum over the first block of K, plus that over the second, ...; each block's sum is
one chain of fused multiply-adds in the order of K. Tiles and threads only decide which sums run when, so a row's
result is the same bits alone and in any company.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from numba import cfunc, njit

from kernels.cpu.simd import BF16, BYTES, F32, KINDS, WIDTH, copy_16, copy_32, get, get_i64, put, put_i64, stack
from kernels.cpu.threads import parallel, pool
from kernels.cpu.tile import MAX_ROWS, PANELS, dot_tile_packed

K_BLOCK = 256  # features summed in registers before they join y: a panel's share (8 KiB in bf16) stays in the L1 cache
ROW_TILES = 21  # tiles in one task: 126 rows of a K block are 252 KiB, half of an L2 cache
PACK_ROWS = 16  # from more rows on, x is copied tile by tile so that a tile reads it in sequence
TASK_BYTES = 1 << 18

# words of a call's description
X, X_ROW, W, BIAS, Y, ROWS, COLUMNS, FEATURES, TILES, PER_TASK, PACKED = range(11)


_ragged_buffer = stack(MAX_ROWS * WIDTH // 2)
_call = stack(PACKED + 1)


@njit(forceinline=True)
def word(arguments: int, n: int) -> int:
    """The n-th int64 of a call's description."""
    value: int = get_i64(arguments + 8 * n)
    return value


def _share(kind: Any, element: int) -> Any:
    """The task of one index for weights of one kind: PER_TASK panels times ROW_TILES tiles, all of K."""

    def share(arguments: int, index: int, thread: int) -> None:
        features, columns, tiles = word(arguments, FEATURES), word(arguments, COLUMNS), word(arguments, TILES)
        rows, per_task = word(arguments, ROWS), word(arguments, PER_TASK)
        row_tasks = (tiles + ROW_TILES - 1) // ROW_TILES
        first_tile = index % row_tasks * ROW_TILES
        last_tile = min(tiles, first_tile + ROW_TILES)
        panel = index // row_tasks * per_task
        last = min((columns + WIDTH - 1) // WIDTH, panel + per_task)
        full = min(last, columns // WIDTH)  # the panels that the columns fill
        if tiles == 1:  # few rows: the weights are read in sequence
            while panel < full:
                n = PANELS[rows] if panel + PANELS[rows] <= full else 1
                for k in range(0, features, K_BLOCK):
                    _tile(kind, element, arguments, 0, panel, n, k)
                panel += n
        else:  # many rows: a block of x is used for all panels before the next
            for k in range(0, features, K_BLOCK):
                for p in range(panel, full):
                    for t in range(first_tile, last_tile):
                        _tile(kind, element, arguments, t, p, 1, k)
        if last > full:
            for t in range(first_tile, last_tile):
                for k in range(0, features, K_BLOCK):
                    _ragged_tile(kind, element, arguments, t, full, k)

    return share


@njit(forceinline=True)
def _input(arguments: int, row: int, rows: int, k: int) -> tuple[int, int, int]:
    """Where a tile's first number is, and the steps to the next row and the next feature."""
    if word(arguments, PACKED) != 0:
        return word(arguments, PACKED) + 4 * (row * word(arguments, FEATURES) + k * rows), 4, 4 * rows
    return word(arguments, X) + row * word(arguments, X_ROW) + 4 * k, word(arguments, X_ROW), 4


@njit
def _tile(kind: Any, element: int, arguments: int, tile: int, panel: int, panels: int, k: int) -> None:
    """One tile of `panels` whole panels over the block of K that begins at k."""
    features, y_row = word(arguments, FEATURES), 4 * word(arguments, COLUMNS)
    row, rows = _rows_of(arguments, tile)
    x, x_row, x_step = _input(arguments, row, rows, k)
    step = WIDTH * element
    w = word(arguments, W) + (panel * features + k) * step
    y = word(arguments, Y) + row * y_row + panel * WIDTH * 4
    start, start_row = y, y_row
    if k == 0:
        start, start_row = word(arguments, BIAS), 0
        start += panel * WIDTH * 4 if start != 0 else 0
    length = min(K_BLOCK, features - k)
    dot_tile_packed(kind, rows, panels, x, x_row, x_step, w, step, features * step, length, start, start_row, y, y_row)


@njit
def _ragged_tile(kind: Any, element: int, arguments: int, tile: int, panel: int, k: int) -> None:
    """The same for the last panel, which the columns fill only in part: through a buffer."""
    features, y_row = word(arguments, FEATURES), 4 * word(arguments, COLUMNS)
    row, rows = _rows_of(arguments, tile)
    x, x_row, x_step = _input(arguments, row, rows, k)
    w = word(arguments, W) + (panel * features + k) * WIDTH * element
    y = word(arguments, Y) + row * y_row + panel * WIDTH * 4
    start, start_row = y, y_row
    if k == 0:
        start, start_row = word(arguments, BIAS), 0
        start += panel * WIDTH * 4 if start != 0 else 0
    buffer = _ragged_buffer()
    length = min(K_BLOCK, features - k)
    dot_tile_packed(kind, rows, 1, x, x_row, x_step, w, WIDTH * element, 0, length, 0, 0, buffer, WIDTH * 4)
    for m in range(rows):
        for c in range(word(arguments, COLUMNS) - panel * WIDTH):
            before = get(F32, start + m * start_row + 4 * c) if start != 0 else F32
            put(F32, y + m * y_row + 4 * c, before + get(F32, buffer + 4 * (m * WIDTH + c)))


@njit(forceinline=True)
def _rows_of(arguments: int, tile: int) -> tuple[int, int]:
    """The first row of a tile and their number: the rows are dealt out evenly."""
    rows, tiles = word(arguments, ROWS), word(arguments, TILES)
    first = tile * rows // tiles
    return first, (tile + 1) * rows // tiles - first


def _pack_rows(arguments: int, index: int, thread: int) -> None:
    """Copies the rows of tile `index` to [K][rows]."""
    features = word(arguments, FEATURES)
    row, rows = _rows_of(arguments, index)
    to = word(arguments, PACKED) + 4 * row * features
    for m in range(rows):
        x = word(arguments, X) + (row + m) * word(arguments, X_ROW)
        for k in range(features):
            put(F32, to + 4 * (k * rows + m), get(F32, x + 4 * k))


def _pack_weights(element: int, pairs: bool) -> Any:
    """The task that copies rows of W, as X, to panel `index` of PACKED; missing rows stay as they are."""

    def pack_weights(arguments: int, index: int, thread: int) -> None:
        features = word(arguments, FEATURES)
        to = word(arguments, PACKED) + index * features * WIDTH * element
        columns = min(WIDTH, word(arguments, COLUMNS) - index * WIDTH)
        for start in range(0, features, 128):  # so much of a panel stays in the L1 cache
            for c in range(columns):
                lane = c % (WIDTH // 2) * 2 + c // (WIDTH // 2) if pairs else c
                source = word(arguments, X) + (index * WIDTH + c) * features * element
                for k in range(start, min(features, start + 128)):
                    if element == 2:
                        copy_16(to + 2 * (k * WIDTH + lane), source + 2 * k)
                    else:
                        copy_32(to + 4 * (k * WIDTH + lane), source + 4 * k)

    return pack_weights


TASK = "void(int64, int64, int64)"


@lru_cache
def _compiled(name: str, dtype: str) -> int:
    """The address of a compiled task for weights of `dtype`."""
    kind, element = KINDS[dtype], BYTES[dtype]
    function = {
        "share": lambda: _share(kind, element),
        "pack_weights": lambda: _pack_weights(element, kind is BF16),
        "pack_rows": lambda: _pack_rows,
    }[name]()
    return int(cfunc(TASK, cache=True, error_model="numpy")(function).address)


@njit("void(" + "int64, " * 13 + "int64)", nogil=True, cache=True, error_model="numpy")
def _linear(
    state: int, share: int, pack: int, x: int, x_row: int, w: int, bias: int, y: int,
    rows: int, columns: int, features: int, tiles: int, per_task: int, packed: int,
) -> None:  # fmt: skip
    """All of one linear layer; `packed` is the address of a copy of x to be made, or 0."""
    call = _call()
    put_i64(call + 8 * X, x)
    put_i64(call + 8 * X_ROW, x_row)
    put_i64(call + 8 * W, w)
    put_i64(call + 8 * BIAS, bias)
    put_i64(call + 8 * Y, y)
    put_i64(call + 8 * ROWS, rows)
    put_i64(call + 8 * COLUMNS, columns)
    put_i64(call + 8 * FEATURES, features)
    put_i64(call + 8 * TILES, tiles)
    put_i64(call + 8 * PER_TASK, per_task)
    put_i64(call + 8 * PACKED, packed)
    if packed != 0:
        parallel(state, pack, call, tiles)
    row_tasks = (tiles + ROW_TILES - 1) // ROW_TILES
    panels = (columns + WIDTH - 1) // WIDTH
    parallel(state, share, call, row_tasks * ((panels + per_task - 1) // per_task))


@njit("void(int64, int64, int64, int64, int64, int64)", nogil=True, cache=True, error_model="numpy")
def _pack(state: int, task: int, weights: int, packed: int, columns: int, features: int) -> None:
    call = _call()
    put_i64(call + 8 * X, weights)
    put_i64(call + 8 * PACKED, packed)
    put_i64(call + 8 * COLUMNS, columns)
    put_i64(call + 8 * FEATURES, features)
    parallel(state, task, call, (columns + WIDTH - 1) // WIDTH)


def panels(columns: int) -> int:
    """How many panels hold so many columns."""
    return -(-columns // WIDTH)


def lane(column: Any, dtype: str) -> Any:
    """Where a column of its panel stands in memory; works on arrays too. See `emit_weights`."""
    half = WIDTH // 2
    return column % half * 2 + column // half if dtype == "bfloat16" else column


def pack(dtype: str, weights: int, packed: int, columns: int, features: int) -> None:
    """Copies row-major weights [columns, features] into panels [panels, features, WIDTH], zeroed before."""
    _pack(pool().state, _compiled("pack_weights", dtype), weights, packed, columns, features)


def scratch_floats(rows: int, features: int) -> int:
    """How many float32 `linear` wants for its copy of x; 0: none."""
    return rows * features if rows > PACK_ROWS else 0


def linear(
    dtype: str, x: int, x_row: int, w: int, bias: int, y: int, rows: int, columns: int, features: int, scratch: int
) -> None:
    """y [rows, columns] = x [rows, features] w^T + bias. Addresses; x_row in bytes; bias and scratch may be 0.

    x, bias and y are float32. `scratch` must hold `scratch_floats(rows, features)` float32.
    """
    threads = pool()
    panel_bytes = features * WIDTH * BYTES[dtype]
    fair = panels(columns) // (4 * threads.threads)  # panels a task, if each thread had four tasks
    per_task = max(4, min(TASK_BYTES // max(panel_bytes, 1), fair) // 4 * 4)
    tiles = -(-rows // MAX_ROWS)
    share, pack_rows = _compiled("share", dtype), _compiled("pack_rows", dtype)
    _linear(threads.state, share, pack_rows, x, x_row, w, bias, y, rows, columns, features, tiles, per_task, scratch)
