"""Where the time of a start goes, from the beginning of the process on."""

from __future__ import annotations

import gc
import os
import time
from pathlib import Path

_STARTED = 19  # proc(5), /proc/PID/stat: field 22, in clock ticks since the system's start; three are cut off here


def fast() -> None:
    """For the rest of the start: what it makes stays, and looking for garbage in it is a sixth of its time."""
    gc.disable()


def over() -> None:
    """From here on garbage is looked for, in what is made from here on."""
    gc.freeze()
    gc.enable()


class Startup:
    """Steps, each as long as it took. The first began with the process."""

    def __init__(self) -> None:
        self._begun_s = self._last_s = time.monotonic() - _age_s()
        self._steps: list[str] = []

    def done(self, step: str) -> None:
        """A step has ended, and the next one begins."""
        now_s = time.monotonic()
        self._steps.append(f"{step} {now_s - self._last_s:.2f}")
        self._last_s = now_s

    def wait(self) -> None:
        """Something is not there yet, for who knows how long: garbage is looked for again."""
        gc.enable()

    def finish(self) -> str:
        """All of it in one line. The start is `over`."""
        over()
        return f"started in {time.monotonic() - self._begun_s:.2f} s: {', '.join(self._steps)}"


def _age_s() -> float:
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    up_s = float(Path("/proc/uptime").read_text().split()[0])
    return up_s - int(fields[_STARTED]) / os.sysconf("SC_CLK_TCK")
