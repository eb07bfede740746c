"""The inside of a helper process (server.helper_pool is the outside): frames in, frames out, within limits.

Knows pipes and resource limits; imports only the standard library. Frames are four bytes of little-endian length and a
body. An answer that starts with * is the process's last: it ran out of something.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

MAX_FRAME = 1 << 25


def set_limits(memory_bytes: int) -> None:
    """So much address space, no files written, no core dumps."""
    _limit(resource.RLIMIT_AS, memory_bytes)
    for kind in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(kind, (0, 0))


def read_frame() -> bytes:
    """The next frame; leaves when the parent is gone or has closed the pipe."""
    length = int.from_bytes(_read(4), "little")
    if length > MAX_FRAME:
        raise SystemExit(1)
    return _read(length)


def write_frame(body: bytes) -> None:
    """Send one frame."""
    sys.stdout.buffer.write(len(body).to_bytes(4, "little") + body)
    sys.stdout.buffer.flush()


def answer_frames(answer: Callable[[bytes], bytes], cpu_seconds: int) -> None:
    """Answer until stdin closes. cpu_seconds for each; the parent's clock is stricter, this holds when it is gone."""
    write_frame(b"+")
    while True:
        frame = read_frame()
        _limit(resource.RLIMIT_CPU, int(time.process_time()) + 1 + cpu_seconds)
        answered = answer(frame)
        write_frame(answered)
        if answered.startswith(b"*"):
            raise SystemExit(0)


def _read(count: int) -> bytes:
    data = sys.stdin.buffer.read(count)
    if len(data) < count:
        raise SystemExit(0)
    return data


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
