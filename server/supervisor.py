"""The engine process's life: spawn, watch, kill, restart, stop.

Knows processes, the socketpair and time; the requests themselves are the client's. An engine is over when its socket
ends, when its process is gone, when it sends something unreadable, or when it does not get on for `progress_limit`
seconds; it is then killed, reaped and replaced, and the client gives what was open to the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec

from engine.messages import (
    EngineOptions,
    Failed,
    Frames,
    FromEngine,
    Ready,
    Start,
    StepOutput,
    Stop,
    ToEngine,
    decode_from_engine,
    encode,
)
from server.engine_client import EngineClient
from server.paths import cache_dir

ENGINE_COMMAND = (sys.executable, "-P", "-m", "engine.worker")  # -P: the user's own folder must not shadow ours
TICK = 0.25  # seconds between two looks at a living engine
PING_INTERVAL = 1.0  # seconds
LOAD_LIMIT = 900.0  # seconds without a Progress message while loading; compiling kernels may be silent for minutes
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds before a restart after failures in a row, doubling
HEALTHY_SECONDS = 60.0  # an engine that was ready for so long, or produced a token, is no failure
MAX_FAILURES, FAILURE_WINDOW = 5, 300.0  # so many failures in so many seconds: give up
MAX_FIRST_FAILURES = 2  # an engine that has never been ready: it will not be

EXIT_PATIENCE = 1.0  # seconds for a process whose socket has ended to end itself and show its own status
THE_APIS_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

log = logging.getLogger("penstock.supervisor")


class EngineLink(asyncio.Protocol):
    """The API's end of one engine's socket: whole messages to `receive`, and `gone` when it ends."""

    def __init__(self, receive: Callable[[FromEngine], None], lost: Callable[[], None]) -> None:
        self.gone = asyncio.Event()
        self._receive = receive
        self._lost = lost
        self._frames = Frames()
        self._transport: asyncio.Transport | None = None

    def send(self, message: ToEngine) -> None:
        """Queue one message; after the end it goes nowhere."""
        if self._transport is not None:
            self._transport.write(encode(message))

    async def close(self) -> None:
        """Drop the connection and whatever is unsent; afterwards it is gone."""
        if self._transport is not None:
            self._transport.abort()
            await self.gone.wait()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self._receive(decode_from_engine(body))
        except (ValueError, msgspec.MsgspecError):
            log.exception("the engine sent something unreadable")
            assert self._transport is not None
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._lost()
        self.gone.set()


class Supervisor:
    """Keeps one engine process alive for `client`. `command` is argv up to `--fd N`; times are seconds."""

    def __init__(
        self,
        client: EngineClient,
        options: EngineOptions,
        *,
        command: Sequence[str] = ENGINE_COMMAND,
        load_limit: float = LOAD_LIMIT,
    ) -> None:
        self._client = client
        self._options = options
        self._command = command
        self._load_limit = load_limit
        self._process: subprocess.Popen[bytes] | None = None
        self._link: EngineLink | None = None
        self._refusal: Failed | None = None  # what the present engine said before it gave up loading
        self._ready_at: float | None = None  # when the present engine became ready
        self._productive = False  # the present engine has produced a token
        self._failures: deque[float] = deque(maxlen=8)  # when engines failed in a row
        self._stop = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The present engine process, if there is one."""
        return self._process.pid if self._process is not None else None

    def start(self) -> None:
        """Spawn the engine and watch it from now on; returns at once (see `EngineClient.settled`)."""
        self._task = asyncio.create_task(self._run(), name="engine supervisor")

    async def stop(self, grace: float = 5.0) -> None:
        """End every open stream with an error, then the engine: Stop, and SIGKILL after `grace`. Idempotent."""
        if self._task is None:
            return
        loaded = self._client.state == "ready"
        if self._client.state != "failed":
            self._client.close("stopping")
        self._stop.set()
        if loaded and self._link is not None:
            self._link.send(Stop())
            await asyncio.wait([self._task], timeout=grace)
        if self._process is not None:
            self._process.kill()
        await self._task

    async def _run(self) -> None:
        """One engine after the other, until it is hopeless or `stop` is called."""
        try:
            while not self._stop.is_set():
                reason = await self._life()
                if self._stop.is_set():
                    return
                if self._hopeless(reason):
                    self._client.close("failed")
                    return
                delay = self._delay()
                open_now = self._client.num_open()
                log.warning("the engine %s; restart in %g s; %d open sequences are kept", reason, delay, open_now)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stop.wait()
                self._client.restarts += 1
        except Exception:
            log.exception("the supervisor failed")
            self._client.failure = Failed("internal_error", "The engine's supervisor failed; the log has more.")
            self._client.close("failed")

    async def _life(self) -> str:
        """One engine from spawn to burial; what happened to it, as the rest of a sentence."""
        self._refusal, self._ready_at, self._productive = None, None, False
        self._client.heard = time.monotonic()
        try:
            process, sock = spawn(self._command)
        except OSError as error:
            return f"could not be spawned: {error.strerror}"
        link = EngineLink(self._receive, self._client.engine_lost)
        self._process, self._link = process, link
        reason = None
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: link, sock=sock)
            link.send(Start(self._options))
            reason = await self._watch(process, link)
        finally:
            status = await bury(process, EXIT_PATIENCE if link.gone.is_set() else 0.0)
            await link.close()
            self._process = self._link = None
        return reason or describe(status)

    async def _watch(self, process: subprocess.Popen[bytes], link: EngineLink) -> str | None:
        """Until the engine has ended (None) or must be ended (why)."""
        client, pinged = self._client, time.monotonic()
        while True:
            before = time.monotonic()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK):
                    await link.gone.wait()
            if link.gone.is_set() or process.poll() is not None:
                return None
            now = time.monotonic()
            late = now - before - TICK  # it was this process that stood still, and it proves nothing about the engine
            client.heard = min(now, client.heard + max(0.0, late))
            limit = self._load_limit if self._ready_at is None else client.progress_limit
            if client.silence() > limit:
                return f"made no progress for {limit:g} s and was killed"
            if now - pinged >= PING_INTERVAL:
                client.ping()
                pinged = now

    def _receive(self, message: FromEngine) -> None:
        if isinstance(message, Ready):
            assert self._link is not None
            self._ready_at = time.monotonic()
            self._client.connect(self._link.send, message)
        elif isinstance(message, Failed):
            self._refusal = message  # its process ends by itself
        else:
            self._client.receive(message)
            if not self._productive and isinstance(message, StepOutput):
                self._productive = any(delta.tokens for delta in message.deltas)

    def _hopeless(self, reason: str) -> bool:
        """Count what just ended; True with the client's `failure` set when another try would be as bad."""
        now = time.monotonic()
        if self._productive or (self._ready_at is not None and now - self._ready_at > HEALTHY_SECONDS):
            self._failures.clear()
            return False
        self._failures.append(now)
        first = self._client.ready is None
        recent = sum(now - moment < FAILURE_WINDOW for moment in self._failures)
        if not (first and self._refusal) and recent < (MAX_FIRST_FAILURES if first else MAX_FAILURES):
            return False
        self._client.failure = self._refusal or Failed(
            "engine_died",
            f"The engine {reason}, {recent} times in a row.\n"
            "If that was SIGKILL, the machine is probably out of memory: try a smaller --kv-cache-bytes or model.\n"
            "The log has more.",
        )
        return True

    def _delay(self) -> float:
        """Seconds before the next engine: none after one that worked, then doubling."""
        return min(LONGEST_DELAY, FIRST_DELAY * 2 ** (len(self._failures) - 1)) if self._failures else 0.0


def spawn(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """The engine process and our end of its socket. It starts with the API's signals blocked, until it ignores them."""
    surroundings = environment()
    ours, theirs = socket.socketpair()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, THE_APIS_SIGNALS)
    try:
        argv = [*command, "--fd", str(theirs.fileno())]
        process = subprocess.Popen(argv, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=surroundings)
    except OSError:
        ours.close()
        raise
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()
    ours.setblocking(False)
    return process, ours


def environment() -> dict[str, str]:
    """Ours, a place for compiled kernels, and our packages on the path unless they are there anyway (installed)."""
    ours = {"NUMBA_CACHE_DIR": str(cache_dir() / "numba"), **os.environ}
    root = Path(__file__).resolve().parents[1]
    if root.name in ("site-packages", "dist-packages"):
        return ours
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return {**ours, "PYTHONPATH": path}


async def bury(process: subprocess.Popen[bytes], patience: float) -> int:
    """The exit status; SIGKILL after `patience` seconds. A process may take long to die, so this never blocks."""
    deadline = time.monotonic() + patience
    while (status := process.poll()) is None:
        if time.monotonic() >= deadline:
            process.kill()
        await asyncio.sleep(0.01)
    return status


def describe(status: int) -> str:
    """An exit status as the rest of a sentence."""
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"
