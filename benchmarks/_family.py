"""A process and what it started, together: a server and its engine's process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def children(pid: int) -> Iterator[int]:
    """Those that it started and that still run."""
    for tasks in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, tasks.read_text().split())


def members(pid: int) -> Iterator[int]:
    """The process first."""
    yield pid
    for child in children(pid):
        yield from members(child)


def resident_bytes(pid: int) -> int:
    """In RAM; what processes share is counted for each."""
    pages = sum(int(Path(f"/proc/{member}/statm").read_text().split()[1]) for member in members(pid))
    return pages * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    """That all threads have used so far."""
    ticks = 0
    for member in members(pid):
        fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")
