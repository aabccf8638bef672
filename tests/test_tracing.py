"""W3C trace context: what of a caller's `traceparent` is believed, by the specification's own cases."""

from __future__ import annotations

import pytest

from extproc.events import ForwardRequest, Headers, RequestBody
from extproc.tracing import TRACEPARENT, TRACESTATE, TraceContext, onward, parse
from tests.exchanges import Talk, body

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"
OWN = TraceContext(TRACE, "b7ad6b7169203331", 1)

ACCEPTED = {
    "sampled": (VALID, 1),
    "not sampled": (f"00-{TRACE}-{SPAN}-00", 0),
    "random, of Level 2": (f"00-{TRACE}-{SPAN}-03", 3),
    "flags that are not known": (f"00-{TRACE}-{SPAN}-ff", 3),
    "a later version": (f"01-{TRACE}-{SPAN}-01", 1),
    "a later version with more": (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", 1),
    "a later version with nothing more": (f"cc-{TRACE}-{SPAN}-01-", 1),
}

REFUSED = {
    "empty": "",
    "version ff": f"ff-{TRACE}-{SPAN}-01",
    "more in version 00": f"{VALID}-more",
    "a dash in version 00": f"{VALID}-",
    "more without a dash": f"cc-{TRACE}-{SPAN}-01.more",
    "version in upper case": f"CC-{TRACE}-{SPAN}-01",
    "version of one digit": f"0-{TRACE}-{SPAN}-01",
    "version of three digits": f"000-{TRACE}-{SPAN}-01",
    "version that is none": f".0-{TRACE}-{SPAN}-01",
    "trace of zeros": f"00-{'0' * 32}-{SPAN}-01",
    "trace in upper case": f"00-{TRACE.upper()}-{SPAN}-01",
    "trace too long": f"00-{TRACE}0-{SPAN}-01",
    "trace too short": f"00-{TRACE[1:]}-{SPAN}-01",
    "trace that is none": f"00-.{TRACE[1:]}-{SPAN}-01",
    "parent of zeros": f"00-{TRACE}-{'0' * 16}-01",
    "parent too long": f"00-{TRACE}-{SPAN}0-01",
    "parent too short": f"00-{TRACE}-{SPAN[1:]}-01",
    "parent that is none": f"00-{TRACE}-{SPAN[1:]}g-01",
    "flags too long": f"00-{TRACE}-{SPAN}-001",
    "flags too short": f"00-{TRACE}-{SPAN}-1",
    "flags that are none": f"00-{TRACE}-{SPAN}-.0",
    "no flags": f"00-{TRACE}-{SPAN}",
    "two of them": f"{VALID}, {VALID}",
    "white space": f" {VALID}",
    "a line's end": f"{VALID}\n",
    "other digits": f"00-{TRACE[:-1]}٣-{SPAN}-01",
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_valid_one_is_read(case: str) -> None:
    text, flags = ACCEPTED[case]
    assert parse(text) == TraceContext(TRACE, SPAN, flags)


@pytest.mark.parametrize("case", REFUSED)
def test_an_invalid_one_is_none(case: str) -> None:
    assert parse(REFUSED[case]) is None


def test_none_is_none() -> None:
    assert parse(None) is None


def test_it_is_written_in_the_version_that_is_known() -> None:
    context = parse(f"cc-{TRACE}-{SPAN}-ff-more")
    assert context is not None
    assert context.header == f"00-{TRACE}-{SPAN}-03"


BOTH = (TRACEPARENT, TRACESTATE)
STATE = {TRACESTATE: "congo=t61rcWkgMzE"}
OURS = ((TRACEPARENT, OWN.header),)


@pytest.mark.parametrize(
    ("headers", "own", "expected"),
    [
        ({}, None, ((), ())),
        ({}, OWN, (OURS, ())),
        ({TRACEPARENT: VALID, **STATE}, None, (((TRACEPARENT, VALID),), ())),
        ({TRACEPARENT: VALID, **STATE}, OWN, (OURS, ())),
        ({TRACEPARENT: "no", **STATE}, None, ((), BOTH)),
        ({TRACEPARENT: "no", **STATE}, OWN, (OURS, (TRACESTATE,))),
        (STATE, None, ((), BOTH)),
        (STATE, OWN, (OURS, (TRACESTATE,))),
    ],
    ids=["none", "none, ours", "valid", "valid, ours", "invalid", "invalid, ours", "state alone", "state alone, ours"],
)
def test_what_goes_on(
    headers: dict[str, str], own: TraceContext | None, expected: tuple[Headers, tuple[str, ...]]
) -> None:
    assert onward(headers, own) == expected


def test_the_exchange_tells_the_provider_its_own_span() -> None:
    begun: list[tuple[str, TraceContext | None, str]] = []

    def begin(*asked: object) -> TraceContext:
        begun.append(asked)  # type: ignore[arg-type]
        return OWN

    talk = Talk(begin_span=begin)
    talk.ask((TRACEPARENT, VALID))
    talk.feed(RequestBody(body(), True))
    talk.hold(100)
    assert dict(talk.one(ForwardRequest).set_headers)[TRACEPARENT] == OWN.header
    ((_, parent, dialect),) = begun
    assert (parent, dialect) == (TraceContext(TRACE, SPAN, 1), "openai-chat")
