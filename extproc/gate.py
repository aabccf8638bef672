"""What every exchange at the gate is judged by: the policy and what follows from it, and the seams to the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from extproc.identity import Identity
from extproc.limits import MAX_CACHED_SECONDS
from extproc.pricing import PriceBook
from extproc.records import Policy, Target
from extproc.tracing import BeginSpan


@dataclass(frozen=True, slots=True)
class Clock:
    """Time, injected. `now_ns` only measures; `wall_ms` dates records, and decides nothing about money."""

    now_ns: Callable[[], int]
    wall_ms: Callable[[], int]

    def date(self, ago_ms: int) -> str:
        """When it was so long ago: RFC 3339, in UTC, with milliseconds."""
        then_ms = self.wall_ms() - ago_ms
        return f"{_second(then_ms // 1000)}.{then_ms % 1000:03}+00:00"


@lru_cache(maxsize=MAX_CACHED_SECONDS)
def _second(wall_s: int) -> str:
    return datetime.fromtimestamp(wall_s, UTC).strftime("%Y-%m-%dT%H:%M:%S")


@dataclass(frozen=True, slots=True)
class Gate:
    """One policy's worth of decisions. A reload makes another; exchanges under way keep the one they began with.

    `providers` gives those that can be asked. `unready` says in one line what the gateway cannot do without and lacks,
    or None. `factor` is a target's billed ÷ counted, as learned so far. `begin_span` is None where none is exported.
    """

    policy: Policy
    identity: Identity
    prices: PriceBook
    providers: Callable[[], frozenset[str]]
    counter: Callable[[str], Callable[[str], int]]
    factor: Callable[[Target], float]
    redact: Callable[[bytes], bytes]
    unready: Callable[[], str | None]
    clock: Clock
    lease_tokens: int
    heartbeat_ms: int
    first_byte_timeout_ms: int
    admission_timeout_ms: int
    begin_span: BeginSpan | None = None
