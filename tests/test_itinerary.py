"""What the gate tells the targets comes there as it was said, and both make the same of an attempt."""

from __future__ import annotations

import pytest

from extproc.dialects.dialect import Address
from extproc.itinerary import Itinerary, Leg, pick
from extproc.records import Target

FIRST, SECOND, AGAIN = Target("openai", "gpt-4o"), Target("anthropic", "claude-sonnet-4-5"), Target("openai", "gpt-4.1")
ITINERARY = Itinerary(
    request_id="0b2e",
    dialect="gemini-generate",
    address=Address("gemini-2.5-flash", stream=True, array=True),
    stream=True,
    legs=(Leg(FIRST, 16_384), Leg(SECOND, None)),
    body_bytes=812,
    written=False,
    drop=True,
)


def test_it_arrives_as_it_was_sent() -> None:
    assert Itinerary.decode(ITINERARY.encode()) == ITINERARY


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1,2,3]", "null", '["a","b",null,true,[],0,true,true]', "[" * 9])
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (orjson's own are ValueErrors too)
        Itinerary.decode(text)


@pytest.mark.parametrize(
    ("targets", "provider", "attempt", "number"),
    [
        pytest.param([FIRST, SECOND], "openai", 1, 0, id="the first"),
        pytest.param([FIRST, SECOND], "anthropic", 2, 1, id="the second, after the first has failed"),
        pytest.param([FIRST, SECOND], "anthropic", 1, 1, id="the second, since the first is ejected"),
        pytest.param([FIRST, SECOND], "openai", 2, 0, id="the first again: operators have turned the order"),
        pytest.param([FIRST, AGAIN], "openai", 2, 1, id="the same provider's other model"),
        pytest.param([FIRST, AGAIN], "openai", 3, 0, id="more attempts than targets"),
        pytest.param([FIRST, SECOND], "gemini", 1, None, id="nobody that was asked for"),
        pytest.param([FIRST, SECOND], "", 1, None, id="nobody answered"),
    ],
)
def test_which_leg_an_attempt_is(targets: list[Target], provider: str, attempt: int, number: int | None) -> None:
    assert pick(targets, provider, attempt) == number
