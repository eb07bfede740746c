"""How compiled kernels are called: one small pool of threads runs `task(call, index, thread)` for every index.

`call` is the address of the call's description: int64 words that `describe` writes and `word` reads.

Numba's own pools cost 64 us (workqueue) or spin without bound (OpenMP: 4 us, but ten milliseconds beside a busy
process). This one costs about 1 us, its threads look for work for at most SPIN rounds after a call and then sleep,
and a caller never waits for a thread that has not begun: indices are claimed one by one, so the caller does all of
them itself if nobody comes. Knows no operation. Linux and macOS (pthreads).

One 64-bit word, the ticket, holds the call's number (upper half) and the next index (lower half). A thread claims an
index by compare-and-swap on the whole word, so a late one cannot take an index of a call that is over, and what it
read of that call beforehand is right exactly if the swap succeeds. For that, the ticket is closed (its index set beyond
every count) before the next call's task and count are written: else a thread could match the old ticket with them.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, Protocol

import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from kernels.cpu.simd import I32, I64, NOTHING, get_i64, op1, op2, op3, pointer

SPIN = 1500  # rounds of 25 to 60 ns: about the time that Python takes from one operation of a layer to the next
# Byte offsets in the shared state; what different threads write is on different cache lines.
TICKET, DONE, SLEEPING, BUSY = 0, 128, 256, 384
TASK, CALL, COUNT, THREADS, STOP = 512, 520, 528, 536, 544
MUTEX, CONDITION, STATE_BYTES = 640, 768, 1024
LOW = 0xFFFFFFFF
WORDS = 64  # of a call's description


def _emit_add(builder: Any, address: Any, value: Any) -> Any:
    return builder.atomic_rmw("add", pointer(builder, address, I64), value, "seq_cst")


def _emit_swap(builder: Any, address: Any, expected: Any, value: Any) -> Any:
    pair = builder.cmpxchg(pointer(builder, address, I64), expected, value, "seq_cst", "seq_cst")
    return builder.extract_value(pair, 1)


def _emit_read(builder: Any, address: Any) -> Any:
    return builder.load_atomic(pointer(builder, address, I64), "seq_cst", 8)


def _emit_write(builder: Any, address: Any, value: Any) -> Any:
    builder.store_atomic(value, pointer(builder, address, I64), "seq_cst", 8)
    return NOTHING


def _emit_pause(builder: Any) -> Any:
    """Tells the core that this is a wait loop."""
    arm = os.uname().machine in ("aarch64", "arm64")
    kind = ir.FunctionType(ir.VoidType(), [I32] if arm else [])
    name = "llvm.aarch64.hint" if arm else "llvm.x86.sse2.pause"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    builder.call(function, [ir.Constant(I32, 1)] if arm else [])
    return NOTHING


@intrinsic
def pause(typing: Any) -> Any:
    return types.void(), lambda context, builder, sig, args: _emit_pause(builder)


atomic_add = op2(types.int64, types.int64, types.int64, _emit_add)  # returns the value before
atomic_swap = op3(types.boolean, types.int64, types.int64, types.int64, _emit_swap)
atomic_read = op1(types.int64, types.int64, _emit_read)
atomic_write = op2(types.void, types.int64, types.int64, _emit_write)


def _libc(name: str) -> Any:
    """The emitter of a call to a C function of addresses, found by name in the running process."""

    def emit(builder: Any, *args: Any) -> Any:
        kind = ir.FunctionType(I32, [I64] * len(args))
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)

    return emit


mutex_init = op2(types.int32, types.int64, types.int64, _libc("pthread_mutex_init"))
mutex_lock = op1(types.int32, types.int64, _libc("pthread_mutex_lock"))
mutex_unlock = op1(types.int32, types.int64, _libc("pthread_mutex_unlock"))
condition_init = op2(types.int32, types.int64, types.int64, _libc("pthread_cond_init"))
condition_wait = op2(types.int32, types.int64, types.int64, _libc("pthread_cond_wait"))
condition_wake = op1(types.int32, types.int64, _libc("pthread_cond_broadcast"))
give_way = op1(types.int32, types.int64, _libc("sched_yield"))  # ignores its argument


@intrinsic
def invoke(typing: Any, task: Any, call: Any, index: Any, thread: Any) -> Any:
    """Calls the address of a task."""

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64] * 3)
        builder.call(pointer(builder, args[0], kind), args[1:])
        return NOTHING

    return types.void(*[types.int64] * 4), generate


@njit
def _claim(state: int, number: int, thread: int) -> None:
    """Does indices of one call until none is left or another call has begun."""
    while True:
        ticket = atomic_read(state + TICKET)
        index = ticket & LOW
        task, call = atomic_read(state + TASK), atomic_read(state + CALL)
        if ticket >> 32 != number or index >= atomic_read(state + COUNT):
            return
        if atomic_swap(state + TICKET, ticket, ticket + 1):
            invoke(task, call, index, thread)
            atomic_add(state + DONE, 1)


@njit
def parallel(state: int, task: int, call: int, count: int) -> None:
    """task(call, index, thread) for every index below `count`; returns when all are done.

    Runs them one after the other here if there is nothing to share or another caller has the pool.
    """
    if count <= 1 or get_i64(state + THREADS) <= 1 or not atomic_swap(state + BUSY, 0, 1):
        for index in range(count):
            invoke(task, call, index, 0)
        return
    last = atomic_read(state + TICKET)
    atomic_write(state + TICKET, last | LOW)
    atomic_write(state + TASK, task)
    atomic_write(state + CALL, call)
    atomic_write(state + COUNT, count)
    atomic_write(state + DONE, 0)
    number = ((last >> 32) + 1) & 0x7FFFFFFF
    atomic_write(state + TICKET, number << 32)
    if atomic_read(state + SLEEPING) > 0:
        mutex_lock(state + MUTEX)
        condition_wake(state + CONDITION)
        mutex_unlock(state + MUTEX)
    _claim(state, number, 0)
    spins = 0
    while atomic_read(state + DONE) < count:  # only indices that another thread has begun
        spins += 1
        if spins < SPIN:
            pause()
        else:
            give_way(0)
    atomic_write(state + BUSY, 0)


@njit("void(int64, int64, int64, int64)", nogil=True, cache=True)
def _run(state: int, task: int, call: int, count: int) -> None:
    parallel(state, task, call, count)


@njit("void(int64, int64, int64, int64, int64)", nogil=True, cache=True)
def _run_all(state: int, tasks: int, calls: int, counts: int, number: int) -> None:
    """Many calls, each after the one before: int64 tasks and counts, descriptions of WORDS int64 each."""
    for i in range(number):
        parallel(state, get_i64(tasks + 8 * i), calls + 8 * WORDS * i, get_i64(counts + 8 * i))


@njit("void(int64, int64)", nogil=True, cache=True)
def _work(state: int, thread: int) -> None:
    """A pool thread's life: look for a call, help, sleep when none came for SPIN rounds."""
    seen = atomic_read(state + TICKET) >> 32
    while atomic_read(state + STOP) == 0:
        spins = 0
        while atomic_read(state + TICKET) >> 32 == seen and spins < SPIN:
            pause()
            spins += 1
        if atomic_read(state + TICKET) >> 32 == seen:
            mutex_lock(state + MUTEX)
            atomic_add(state + SLEEPING, 1)
            while atomic_read(state + TICKET) >> 32 == seen and atomic_read(state + STOP) == 0:
                condition_wait(state + CONDITION, state + MUTEX)
            atomic_add(state + SLEEPING, -1)
            mutex_unlock(state + MUTEX)
        seen = atomic_read(state + TICKET) >> 32
        _claim(state, seen, thread)


@njit("void(int64)", cache=True)
def _prepare(state: int) -> None:
    mutex_init(state + MUTEX, 0)
    condition_init(state + CONDITION, 0)


@njit("void(int64)", nogil=True, cache=True)
def _stop(state: int) -> None:
    mutex_lock(state + MUTEX)
    atomic_write(state + STOP, 1)
    condition_wake(state + CONDITION)
    mutex_unlock(state + MUTEX)


class Pool:
    """The threads and the state they share. The caller is one of the `threads`."""

    def __init__(self, threads: int) -> None:
        self.threads = max(1, threads)
        self._words = np.zeros(STATE_BYTES // 8 + 16, np.int64)  # must outlive the threads
        self.state = -(-self._words.ctypes.data // 128) * 128
        offset = (self.state + THREADS - self._words.ctypes.data) // 8
        _prepare(self.state)
        self._words[offset] = self.threads
        self._helpers = [
            threading.Thread(target=_work, args=(self.state, i), name=f"kernel-{i}", daemon=True)
            for i in range(1, self.threads)
        ]
        for helper in self._helpers:
            helper.start()

    def close(self) -> None:
        """Ends the threads; the pool must be idle."""
        _stop(self.state)
        for helper in self._helpers:
            helper.join()


def available_threads() -> int:
    """What the machine and OMP_NUM_THREADS allow."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return min(cores, int(wanted)) if wanted.isdigit() and int(wanted) > 0 else cores


_pool: Pool | None = None


def set_threads(threads: int) -> None:
    """Sets the number of threads, the caller included. ValueError below 1."""
    global _pool
    if threads < 1:
        raise ValueError(f"The number of threads must be at least 1, not {threads}.")
    if _pool is not None and _pool.threads != threads:
        _pool.close()
        _pool = None
    if _pool is None:
        _pool = Pool(threads)


def pool() -> Pool:
    """The process's pool, started at its first use."""
    if _pool is None:
        set_threads(available_threads())
    assert _pool is not None
    return _pool


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


# --- tasks and calls


def _emit_word(builder: Any, call: Any, n: Any) -> Any:
    address = builder.add(call, builder.mul(n, ir.Constant(I64, 8)))
    return builder.load(pointer(builder, address, I64), align=8)


word = op2(types.int64, types.int64, types.int64, _emit_word)  # the n-th int64 of a call's description
_tasks: list[Any] = []  # a task's code lives as long as its object


def compile_task(function: Callable[[int, int, int], None]) -> int:
    """The address of a task, compiled or read from the cache."""
    task = cfunc("void(int64, int64, int64)", cache=True, error_model="numpy")(function)
    _tasks.append(task)
    return int(task.address)


def compiled_now() -> int:
    """How many tasks this process compiled, rather than read from the cache."""
    return sum(task.cache_hits == 0 for task in _tasks)


class _Memory(threading.local):
    """What each Python thread lends to its calls."""

    def __init__(self) -> None:
        self.words = np.zeros(WORDS, np.int64)
        self.address = self.words.ctypes.data
        self.scratch = np.empty(0, np.uint8)
        self.recorder: Recorder | None = None


class Recorder(Protocol):
    """What takes note of this Python thread's calls so that they can be made again (recording.py)."""

    def call(self, task: int, words: NDArray[np.int64], count: int) -> None: ...

    def scratch(self, size: int) -> int: ...

    def lasting(self, size: int) -> int: ...

    def opaque(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any: ...


_memory = _Memory()


def record(recorder: Recorder | None) -> Recorder | None:
    """From now on this thread's calls are told to `recorder`; returns the one before."""
    before, _memory.recorder = _memory.recorder, recorder
    return before


def depends_on_values(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks an operation whose calls depend on what its inputs hold: a recording runs it anew as a whole."""

    @wraps(function)
    def operation(*args: Any, **kwargs: Any) -> Any:
        recorder = _memory.recorder
        return function(*args, **kwargs) if recorder is None else recorder.opaque(function, args, kwargs)

    return operation


def scratch(size: int) -> int:
    """The address of `size` bytes that are this Python thread's until it asks again; aligned to 64."""
    if _memory.recorder is not None:
        return _memory.recorder.scratch(size)
    if _memory.scratch.nbytes < size + 64:
        _memory.scratch = np.empty(2 * size + 64, np.uint8)
    return -(-_memory.scratch.ctypes.data // 64) * 64


def scratch_and_plan(size: int, plan: int) -> tuple[int, int]:
    """As `scratch`, and `plan` bytes more, whose content is still there when a recorded call is made again."""
    if _memory.recorder is not None:
        return _memory.recorder.scratch(size), _memory.recorder.lasting(plan)
    address = scratch(size + plan)
    return address, address + size


def describe(form: str, *values: float) -> int:
    """Writes a call's description, `form` as in `struct`, and returns its address: good until the next one."""
    struct.pack_into(form, _memory.words.data, 0, *values)
    return _memory.address


def run(task: int, call: int, count: int) -> None:
    """`parallel` from Python, with the GIL released. `call` is what `describe` returned."""
    if _memory.recorder is not None:
        _memory.recorder.call(task, _memory.words, count)
    _run(pool().state, task, call, count)


def run_all(tasks: NDArray[np.int64], calls: NDArray[np.int64], counts: NDArray[np.int64]) -> None:
    """Calls with descriptions [n, WORDS], one after the other, without Python between them."""
    _run_all(pool().state, tasks.ctypes.data, calls.ctypes.data, counts.ctypes.data, len(tasks))
