"""The pool under compiled kernels: every index once, whoever calls, and no work while idle."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from numba import njit

from kernels import cpu
from kernels.cpu import threads
from kernels.linear import linear, pack


def answer(rows: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    x, w = torch.arange(rows * 64.0).view(rows, 64) / 100, torch.arange(200 * 64.0).view(200, 64) % 7
    return linear(x, pack(w.bfloat16(), "numba")), x @ w.T


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_many_short_calls_each_do_all_their_work(count: int) -> None:
    threads.set_threads(count)
    x, w = torch.randn(3, 64), torch.randn(70, 64)
    packed = pack(w, "numba")
    first = linear(x, packed)
    torch.testing.assert_close(first, x @ w.T, rtol=1e-4, atol=1e-4)
    for _ in range(2000):
        assert torch.equal(linear(x, packed), first)


def _count_index(call: int, index: int, thread: int) -> None:
    threads.atomic_add(call + 8 * index, 1)


@njit("void(int64, int64, int64, int64)", nogil=True)  # type: ignore[untyped-decorator]
def _call_without_a_pause(state: int, task: int, call: int, rounds: int) -> None:
    for i in range(rounds):
        threads.parallel(state, task, call, 2 + i % 7)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_calls_of_different_sizes_without_a_pause_do_each_index_once(count: int) -> None:
    threads.set_threads(count)
    rounds, done = 700_000, np.zeros(8, np.int64)
    task = threads.compile_task(_count_index)
    _call_without_a_pause(threads.pool().state, task, done.ctypes.data, rounds)
    assert done.tolist() == [rounds] * 2 + [rounds // 7 * n for n in (6, 5, 4, 3, 2, 1)]


def test_calls_after_the_threads_fell_asleep_wake_them() -> None:
    threads.set_threads(2)
    for _ in range(5):
        time.sleep(0.02)
        y, expected = answer()
        torch.testing.assert_close(y, expected)


def test_callers_from_several_python_threads_do_not_mix() -> None:
    threads.set_threads(2)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            x, w = torch.randn(20, 300), torch.randn(90, 300)
            packed = pack(w, "numba")
            first = linear(x, packed)
            for _ in range(200):
                assert torch.equal(linear(x, packed), first)
        except BaseException as failure:
            failures.append(failure)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not failures


def test_idle_threads_use_no_cpu() -> None:
    threads.set_threads(3)
    answer()
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05


def test_a_forked_child_starts_its_own_threads() -> None:
    """In a fresh interpreter: torch's own threads must not be there at the fork."""
    code = (
        "import os, torch; torch.set_num_threads(1)\n"
        "from kernels import cpu; from tests.kernels.test_cpu_threads import answer\n"
        "cpu.set_threads(2); answer()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    y, expected = answer(); os._exit(0 if torch.allclose(y, expected) else 3)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
    )
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=120, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_the_tables_imports_no_numba() -> None:
    code = "import sys, kernels, kernels.linear; raise SystemExit('numba' in sys.modules or 'llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_second_process_compiles_nothing(tmp_path: object) -> None:
    """One small kernel is enough to see that the cache is written and read."""
    code = (
        "import torch; from kernels import cpu; from kernels.cpu import threads\n"
        "cpu.rms_norm(torch.ones(1, 8), torch.ones(8), 1e-5)\n"
        "print(threads.compiled_now())\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    counts = [
        int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
        for _ in range(2)
    ]
    assert counts[0] > 0
    assert counts[1] == 0


def test_warming_compiles_what_a_dtype_needs() -> None:
    cpu.warm(torch.bfloat16)
    before = threads.compiled_now()
    y, _ = answer()
    cpu.rms_norm(y, torch.ones(200), 1e-5)
    assert threads.compiled_now() == before
