"""What a peer may make the server do for nothing: bounded by a budget that refills with time."""

from __future__ import annotations

from collections.abc import Callable

from extproc.limits import FLOOD_BURST, FLOOD_REFILL_PER_S


class FloodBudget:
    """A token bucket over the frames that cost the peer nothing and carry nothing. `now` is in seconds, and injected.

    It stops the known floods: PING, SETTINGS, PRIORITY and unknown frames, empty DATA, streams that are reset before
    they were answered (rapid reset), and errors made only to have the server reset (CVE-2019-9511 to 9518,
    CVE-2023-44487, CVE-2025-8671).
    """

    __slots__ = ("_at_s", "_left", "_now")

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._at_s = now()
        self._left = float(FLOOD_BURST)

    def spend(self, cost: int = 1) -> bool:
        """False where the peer has done too much of this."""
        at_s = self._now()
        self._left = min(FLOOD_BURST, self._left + (at_s - self._at_s) * FLOOD_REFILL_PER_S) - cost
        self._at_s = at_s
        return self._left >= 0
