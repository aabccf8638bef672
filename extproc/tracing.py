"""W3C trace context: what of a caller's trace is believed, and what of it goes on to the provider. Pure.

https://www.w3.org/TR/trace-context/ (Level 2), sections 3.2 and 4.3.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from extproc.events import Headers

TRACEPARENT, TRACESTATE = "traceparent", "tracestate"

SAMPLED = 0x01
_KNOWN_FLAGS = SAMPLED | 0x02  # and Level 2's random-trace-id; the others must go on as zeros (3.2.2.5)

# Of a version that is not known yet, more may follow (3.2.4).
_FORMAT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")


@dataclass(frozen=True, slots=True)
class TraceContext:
    """One span: 32 and 16 digits of lower-case hexadecimal, never all zeros, and the flags that are known."""

    trace_id: str
    span_id: str
    flags: int

    @property
    def header(self) -> str:
        """The value of `traceparent` for what happens under this span."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"


# Begins the gateway's own span, if the call is to have one: of a request, under the caller's, in the caller's dialect.
BeginSpan = Callable[[str, TraceContext | None, str], TraceContext | None]


def parse(traceparent: str | None) -> TraceContext | None:
    """What a caller's `traceparent` says; None where it sent none, or one that is invalid (two of them, too)."""
    match = _FORMAT.fullmatch(traceparent) if traceparent is not None else None
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    unknown = version == "ff" or (version == "00" and more is not None)
    if unknown or not int(trace_id, 16) or not int(span_id, 16):
        return None
    return TraceContext(trace_id, span_id, int(flags, 16) & _KNOWN_FLAGS)


def onward(headers: Mapping[str, str], own: TraceContext | None) -> tuple[Headers, tuple[str, ...]]:
    """Headers to set for the provider, and names to remove.

    `own` is the gateway's span. Without one nobody would ever find it as a parent: a valid trace goes on as the
    caller's. `tracestate` belongs to a valid `traceparent`, and means nothing without it.
    """
    if TRACEPARENT not in headers and TRACESTATE not in headers:
        return ((TRACEPARENT, own.header),) if own is not None else (), ()
    callers = parse(headers.get(TRACEPARENT))
    here = own or callers
    kept = ((TRACEPARENT, here.header),) if here is not None else ()
    removed = () if callers is not None else (TRACEPARENT, TRACESTATE) if here is None else (TRACESTATE,)
    return kept, removed
