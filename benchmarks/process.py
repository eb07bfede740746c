"""What a process and all its children use, from /proc (Linux)."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """CPU seconds so far; memory in bytes. `shared_out`: pages that several processes map are counted once (PSS)."""

    cpu: float
    shared_out: int
    peak: int  # sum of each process's most resident bytes


def usage(pid: int) -> Usage:
    """Of the tree below `pid`; what has ended meanwhile is left out."""
    cpu, shared_out, peak = 0.0, 0, 0
    for one in tree(pid):
        try:
            fields = Path(f"/proc/{one}/stat").read_text().rsplit(")", 1)[1].split()
            cpu += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            shared_out += kilobytes(Path(f"/proc/{one}/smaps_rollup"), "Pss:") * 1024
            peak += kilobytes(Path(f"/proc/{one}/status"), "VmHWM:") * 1024
        except OSError:
            continue
    return Usage(cpu, shared_out, peak)


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found, todo = [], [pid]
    while todo:
        one = todo.pop()
        found.append(one)
        for thread in Path(f"/proc/{one}/task").glob("*/children"):
            todo += [int(child) for child in thread.read_text().split()]
    return found


def kilobytes(file: Path, label: str) -> int:
    """The number after a label of a /proc file."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(label))
