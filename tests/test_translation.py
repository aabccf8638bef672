"""Every recorded answer, error and request of each dialect of chat, translated into each of the others.

What was recorded is read by hand, and what was translated by the official client: see `tests/answers.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import orjson
import pytest

from extproc import form
from extproc.dialects import CHAT as DIALECTS
from extproc.dialects.dialect import Address, Seed
from extproc.errors import BadRequest, ProviderError, UpstreamFailure
from extproc.metering import StreamMeter
from extproc.records import Usage
from extproc.sse import SseParser
from extproc.translation import Translation, refusal
from tests.answers import (
    DIALECT_OF,
    GEMINI,
    recorded,
)
from tests.conformance import Conforms
from tests.each import each_case
from tests.recordings import Case, protocol_cases
from tests.translated import REPLACED, UNASKED, as_events, asked, check_heard, check_raised, exception, whole

CASES = [case for protocol in DIALECT_OF for case in protocol_cases(protocol)]
SMALL_BYTES = 3_000
PAIRS = [(case, into) for case in CASES for into in DIALECTS if into != DIALECT_OF[case.protocol]]
ANSWERED = [pair for pair in PAIRS if pair[0].status == 200]
FAILED = [pair for pair in PAIRS if pair[0].status != 200]


def translation(case: Case, into: str, *, array: bool = False) -> Translation:
    body, address = asked(into, case, "m", array=array)
    return Translation(
        DIALECTS[into],
        DIALECTS[DIALECT_OF[case.protocol]],
        body,
        address,
        drop=False,
        request_id="0123456789abcdef",
        created_s=1_700_000_000,
    )


def translated(case: Case, into: str, chunks: Iterable[bytes], *, array: bool = False) -> bytes:
    making = translation(case, into, array=array)
    if not case.stream:
        return making.whole(b"".join(chunks))
    return b"".join([*(making.chunk(chunk, end=False) for chunk in chunks), making.chunk(b"", end=True)])


def chunkings(case: Case, into: str) -> Iterator[list[bytes]]:
    """Other ways in which the body may come. Each dialect is given one of its own."""
    if len(case.recorded_chunks()) > 1:
        yield case.recorded_chunks()
    seed = list(DIALECTS).index(into)
    if len(case.body) <= SMALL_BYTES:
        yield [bytes((byte,)) for byte in case.body]
    else:
        yield case.random_chunks(seed, largest=(400, 40, 3, 100)[seed])


@each_case(ANSWERED)
def test_an_answer(case: Case, into: str, conforms: Conforms) -> None:
    """As it came in one piece, as the official client reads it; and in other pieces the same, byte for byte."""
    why_not = exception(case, into)
    with conforms(case, f"into {into}", why_not):
        if why_not in UNASKED:
            return
        case = as_events(case)
        if not case.stream and "error" in case.meta:
            with pytest.raises(ValueError, match="not a"):  # an error with status 200
                translated(case, into, [case.body])
            return
        body = translated(case, into, [case.body])
        for chunks in chunkings(case, into) if case.stream else ():
            assert translated(case, into, chunks) == body
        if case.stream:
            body += missing(case, into, body)
        check_heard(case, into, body)


def missing(case: Case, into: str, body: bytes) -> bytes:
    """What is not whole does not look whole to the gate, which meters the caller's dialect and adds the error."""
    meter = StreamMeter(DIALECTS[into], len, 1.0, choices=len(recorded(case).choices) or 1)
    meter.feed(body)
    meter.finish()
    assert meter.errored == ("error" in case.meta)
    assert meter.complete == whole(case)
    if meter.complete or meter.errored:
        return b""
    return DIALECTS[into].render_error_event(UpstreamFailure("The provider's stream ended early."))


ARRAYS = [case for case, into in ANSWERED if into == GEMINI and case.stream and whole(case)]


@each_case(ARRAYS)
def test_a_stream_as_one_array(case: Case) -> None:
    """Google's other form of a stream, which no client of its own asks for: the same events."""
    said = json.loads(translated(case, GEMINI, [case.body], array=True))
    body = translated(case, GEMINI, [case.body])
    assert said == [json.loads(line[6:]) for line in body.splitlines() if line.startswith(b"data: ")]


@each_case(FAILED)
def test_an_error(case: Case, into: str, conforms: Conforms) -> None:
    with conforms(case, "error classes"):
        status = REPLACED.get(case.status, case.status)
        if case.status in REPLACED:
            body = DIALECTS[into].render_error(UpstreamFailure("The provider did not accept the gateway's request."))
        else:
            body = translation(case, into).error(case.status, case.body)
        for stream in (case.stream, not case.stream):
            check_raised(case, into, status, body, stream=stream)


# Requests -------------------------------------------------------------------------------------------------------------


def request_address(case: Case) -> Address:
    """Gemini's path says what other dialects' bodies do."""
    return Address(case.model, case.stream) if case.protocol == "gemini" else Address()


def request_of(case: Case) -> dict[str, Any]:
    """Azure and Vertex AI name the model in the path, too, and a caller of the gateway in the body."""
    return {**({} if case.protocol == "gemini" else {"model": case.model}), **(case.request or {})}


ASKED = [pair for pair in PAIRS if pair[0].request is not None]


@pytest.mark.parametrize("drop", [False, True], ids=["as it is", "dropping"])
@each_case(ASKED)
def test_a_request(case: Case, into: str, drop: bool) -> None:
    """It becomes one that the other dialect takes, and that asks for as much; or a field of it is named."""
    caller, provider = DIALECTS[DIALECT_OF[case.protocol]], DIALECTS[into]
    body = request_of(case)
    try:
        call = caller.read_call(body, request_address(case))
        request = caller.read_request(body, request_address(case))
    except BadRequest as error:
        assert_named(error, body)
        return
    if (refused := refusal(caller, provider, request, drop=drop)) is not None:
        assert_named(refused, body)
        return
    making = Translation(
        caller, provider, body, request_address(case), drop=drop, request_id="0" * 16, created_s=1_700_000_000
    )
    written = orjson.loads(making.body("target-model", call.cap))
    there = provider.read_call(written, Address("target-model", call.stream))
    assert there.model == "target-model"
    assert (there.stream, there.cap) == (call.stream, call.cap or there.cap)
    assert there.choices == (1 if form.Feature.CHOICES in provider.cannot else call.choices)
    prompt = "".join(there.prompt_texts)
    assert all(text.strip() in prompt for text in said_by_user(request))


def said_by_user(request: form.Request) -> Iterator[str]:
    for message in request.messages:
        for part in message.parts:
            if isinstance(part, form.Text):
                yield part.text


def assert_named(error: BadRequest, body: dict[str, Any]) -> None:
    """By its path in what the caller sent."""
    assert error.param
    found = [body]
    for step in re.findall(r"[^.\[\]]+", error.param):
        found = [inner for outer in found for inner in within(outer, step)]
    assert found


def within(outer: Any, step: str) -> list[Any]:
    """What is at one step of a path, of a list's members at any of them; Google's names are spelt in two ways."""
    if isinstance(outer, list):
        return outer[int(step) : int(step) + 1] if step.isdecimal() else [i for one in outer for i in within(one, step)]
    spelt = {re.sub(r"_(.)", lambda found: found[1].upper(), name): value for name, value in outer.items()} | outer
    return [spelt[step]] if step in spelt else []


# Figures of what broke off --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(DIALECTS))
def test_what_was_reported_before_an_error_is_not_lost(name: str) -> None:
    """The gate meters the caller's dialect, and the provider bills what it did until then."""
    dialect = DIALECTS[name]
    seed = Seed("6f1c2e", 1, form.NO_REQUEST)
    reported = Usage(472, 9, cached_prompt=100, web_searches=0)
    writer = dialect.stream_writer(seed)
    events: list[form.StreamEvent] = [
        form.Started("1", "m"),
        form.TextDelta(0, "Hi."),
        form.Used(reported),
        form.Failed(ProviderError("It broke.", status=529)),
    ]
    body = b"".join(map(writer.write, events))
    reader = dialect.stream_reader(seed)
    said = [event for block in SseParser().feed(body) if block.data for event in reader.read(block.data)]
    used = [event.usage for event in said if isinstance(event, form.Used)]
    assert (used[-1].prompt, used[-1].completion, used[-1].cached_prompt) == (472, 9, 100)
    assert isinstance(said[-1], form.Failed)
