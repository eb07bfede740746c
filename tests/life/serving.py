"""A running client and supervisor for a test, and what a reader of streams does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from engine.messages import EngineOptions, Submit, TokenLogprob
from server.engine_client import EngineClient
from server.supervisor import Supervisor

HASH_COMMAND = (sys.executable, "-P", "-m", "tests.life.hash_worker")


@dataclass
class Answer:
    """One sequence's deltas, folded."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: str | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprob | None]] = field(default_factory=list)  # one entry for each time it came
    cached: list[int] = field(default_factory=list)  # likewise


@contextlib.asynccontextmanager
async def serving(
    settings: str = "",
    *,
    command: Sequence[str] = HASH_COMMAND,
    options: Mapping[str, Any] = MappingProxyType({}),
    progress_limit: float = 60.0,
    load_limit: float = 280.0,
) -> AsyncIterator[tuple[EngineClient, Supervisor]]:
    """A supervised engine that has settled; afterwards nothing is open and no process is left."""
    client = EngineClient(progress_limit=progress_limit)
    engine_options = EngineOptions(model_dir=settings, **options)
    supervisor = Supervisor(client, engine_options, command=command, load_limit=load_limit)
    supervisor.start()
    try:
        await asyncio.wait_for(client.settled(), 290)  # a first start may compile kernels
        yield client, supervisor
    finally:
        pid = supervisor.pid
        await asyncio.wait_for(supervisor.stop(), 20)
        assert supervisor.pid is None
        assert pid is None or not alive(pid)
        assert client.num_open() == 0


async def read(
    client: EngineClient, asks: list[Submit], seen: Callable[[int], None] = lambda tokens: None
) -> list[Answer]:
    """Read a stream to its end; `seen` hears how many tokens each batch brought."""
    answers = [Answer() for _ in asks]
    async with client.open(asks) as stream:
        async for batch in stream:
            for index, delta in batch:
                answer = answers[index]
                assert answer.finish is None, "a delta after the last"
                answer.tokens += delta.tokens
                answer.finish, answer.error = delta.finish, delta.error
                answer.logprobs += delta.logprobs or []
                if delta.prompt_logprobs is not None:
                    answer.prompt_logprobs.append(delta.prompt_logprobs)
                if delta.cached is not None:
                    answer.cached.append(delta.cached)
            seen(sum(len(delta.tokens) for _, delta in batch))
    return answers


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait for a condition, looking often."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        await asyncio.sleep(0.005)


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def num_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
