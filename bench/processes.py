"""What processes use, from Linux itself: a process with all its threads, and its children's children."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_SCHEDULED = 2  # CPUCLOCK_SCHED: user and system time of all threads, in nanoseconds (proc(5) counts in 10 ms)


def tree(root: int) -> list[int]:
    """A process and its descendants."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                found += map(int, children.read_text().split())
    return found


def cpu_us(roots: Iterable[int]) -> float:
    """CPU microseconds that the processes below these have used so far, by clock_getcpuclockid(3)'s clocks."""
    total_ns = 0
    for root in roots:
        for pid in tree(root):
            with suppress(OSError):
                total_ns += time.clock_gettime_ns((~pid << 3) | _SCHEDULED)
    return total_ns / 1000


def resident_bytes(roots: Iterable[int]) -> int:
    """Resident memory of the processes below these."""
    total = 0
    for root in roots:
        for pid in tree(root):
            with suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES
    return total
