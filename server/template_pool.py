"""A few processes that render chat templates (template_worker), each killed when it takes too long.

Knows processes and frames; not where templates come from. A rendering gets 2 s, 256 MiB and 4 Mi characters of output;
what goes over is an error of that request alone, and the next one gets a fresh process.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from server.errors import RequestError

WALL_SECONDS = 2.0
START_SECONDS = 60.0
MAX_WORKERS = 2
MAX_REQUEST_BYTES = 16 << 20
MAX_MESSAGE = 200  # characters of a template's own error text
INHERITED = ("TZ", "PATH", "LD_LIBRARY_PATH")
SCRIPT = Path(__file__).with_name("template_worker.py")


class TemplatePool:
    """At most MAX_WORKERS processes, started when needed; belongs to one event loop."""

    def __init__(self) -> None:
        self._idle: list[asyncio.subprocess.Process] = []
        self._slots = asyncio.Semaphore(MAX_WORKERS)

    async def render(self, template: str, variables: Mapping[str, Any]) -> str:
        """Raises RequestError for whatever the template does other than render."""
        try:
            request = orjson.dumps({"template": template, "variables": variables})
        except (TypeError, ValueError):
            raise _error("invalid_request", "The request holds values that are not JSON.") from None
        if len(request) > MAX_REQUEST_BYTES:
            raise _error("chat_template_limit", f"The messages are larger than {MAX_REQUEST_BYTES} bytes.")
        async with self._slots:
            worker = await self._worker()
            try:
                answer = await asyncio.wait_for(_ask(worker, request), WALL_SECONDS)
            except TimeoutError:
                raise _error("chat_template_limit", _stopped(f"it took longer than {WALL_SECONDS:g} s")) from None
            except (asyncio.IncompleteReadError, OSError):
                raise _error("chat_template_limit", _stopped("it took too much time or memory")) from None
            else:
                if not answer.startswith(b"*"):  # it leaves after that
                    self._idle.append(worker)
            finally:
                if worker not in self._idle:
                    await _kill(worker)
        return _text_of(answer)

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
        command = [sys.executable, "-I", str(SCRIPT)]
        pipe = asyncio.subprocess.PIPE
        environment = {name: os.environ[name] for name in INHERITED if name in os.environ}
        worker = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL, env=environment, cwd="/"
        )
        try:
            await asyncio.wait_for(_read(worker), START_SECONDS)
        except BaseException as error:
            await _kill(worker)
            if isinstance(error, TimeoutError | asyncio.IncompleteReadError | OSError):
                raise RequestError(
                    503,
                    code="chat_template_unavailable",
                    message="The process that renders chat templates does not start. Try again.",
                    headers={"Retry-After": "1"},
                ) from None
            raise
        return worker


async def _ask(worker: asyncio.subprocess.Process, request: bytes) -> bytes:
    assert worker.stdin is not None
    worker.stdin.write(len(request).to_bytes(4, "little") + request)
    await worker.stdin.drain()
    return await _read(worker)


async def _read(worker: asyncio.subprocess.Process) -> bytes:
    assert worker.stdout is not None
    length = int.from_bytes(await worker.stdout.readexactly(4), "little")
    return await worker.stdout.readexactly(length)


async def _kill(worker: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()


def _text_of(answer: bytes) -> str:
    status, text = answer[:1], answer[1:].decode("utf-8")
    if status == b"+":
        return text
    said = " ".join(text.split())[:MAX_MESSAGE]
    if status == b"!":
        raise _error("chat_template_error", f"The model's chat template refuses these messages: {said}")
    if status == b"*":
        raise _error("chat_template_limit", _stopped(said))
    raise _error("chat_template_error", f"The model's chat template fails on these messages. {said}")


def _stopped(why: str) -> str:
    return f"The chat template was stopped: {why}. Send shorter messages, or start the server with --chat-template."


def _error(code: str, message: str) -> RequestError:
    return RequestError(400, code=code, message=message, param="messages")
