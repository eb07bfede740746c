"""A few processes of one kind that do what may hang, crash or eat memory, each killed when it takes too long.

Knows processes and frames (helper_process is their other end); not what is asked of them: template_worker renders,
grammar_worker compiles. They run isolated, with an empty environment. A process says one frame when it is ready, then
answers one by one. What goes over a limit costs that request alone: the next gets a fresh process.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

from server.errors import RequestError

START_SECONDS = 60.0
MAX_WORKERS = 2
MAX_REQUEST_BYTES = 16 << 20
ROOT = Path(__file__).resolve().parents[1]
BOOT = "import sys, importlib; sys.path.insert(0, sys.argv[1]); importlib.import_module(sys.argv[2]).main()"
INHERITED = ("TZ", "PATH", "LD_LIBRARY_PATH")


class Stopped(Exception):
    """The process was killed or died over this request; the text says why."""


class HelperPool:
    """At most MAX_WORKERS processes of one module, started when needed; belongs to one event loop."""

    def __init__(self, module: str, wall_seconds: float, first: bytes | None = None) -> None:
        """module: its `main` is run. first: a frame that every new process gets before it says that it is ready."""
        self._module = module
        self._wall_seconds = wall_seconds
        self._first = first
        self._idle: list[asyncio.subprocess.Process] = []
        self._slots = asyncio.Semaphore(MAX_WORKERS)

    async def ask(self, request: bytes) -> bytes:
        """The answer to a request of at most MAX_REQUEST_BYTES. Raises Stopped."""
        async with self._slots:
            worker = await self._worker()
            try:
                answer = await asyncio.wait_for(_ask(worker, request), self._wall_seconds)
            except TimeoutError:
                raise Stopped(f"it took longer than {self._wall_seconds:g} s") from None
            except (asyncio.IncompleteReadError, OSError):
                raise Stopped("it took too much time or memory") from None
            else:
                if not answer.startswith(b"*"):
                    self._idle.append(worker)
            finally:
                if worker not in self._idle:
                    await _kill(worker)
        return answer

    async def start(self) -> None:
        """Have one process ready."""
        async with self._slots:
            self._idle.append(await self._worker())

    async def close(self) -> None:
        """End all processes; the pool may be used again."""
        while self._idle:
            await _kill(self._idle.pop())

    async def _worker(self) -> asyncio.subprocess.Process:
        while self._idle:
            if (worker := self._idle.pop()).returncode is None:
                return worker
        command = [sys.executable, "-I", "-c", BOOT, str(ROOT), self._module]
        pipe = asyncio.subprocess.PIPE
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        worker = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=environment, cwd="/"
        )
        try:
            async with asyncio.timeout(START_SECONDS):
                if self._first is not None:
                    await _send(worker, self._first)
                await _read(worker)
        except BaseException as error:
            await _kill(worker)
            if isinstance(error, TimeoutError | asyncio.IncompleteReadError | OSError):
                raise RequestError(
                    503,
                    code="helper_unavailable",
                    message="A helper process of the server does not start. Try again.",
                    headers={"Retry-After": "1"},
                ) from None
            raise
        return worker


async def _ask(worker: asyncio.subprocess.Process, request: bytes) -> bytes:
    await _send(worker, request)
    return await _read(worker)


async def _send(worker: asyncio.subprocess.Process, frame: bytes) -> None:
    assert worker.stdin is not None
    worker.stdin.write(len(frame).to_bytes(4, "little") + frame)
    await worker.stdin.drain()


async def _read(worker: asyncio.subprocess.Process) -> bytes:
    assert worker.stdout is not None
    length = int.from_bytes(await worker.stdout.readexactly(4), "little")
    return await worker.stdout.readexactly(length)


async def _kill(worker: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
