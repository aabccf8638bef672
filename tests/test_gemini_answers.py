"""Gemini's answers: whole ones, streams, errors and usage, both ways, and as Google's own client reads them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from google import genai
from google.genai import types
from google.genai.errors import APIError, ClientError, ServerError
from hypothesis import given
from hypothesis import strategies as st

from extproc import form
from extproc.dialects import pieces
from extproc.dialects.dialect import Address, ChatDialect, Seed
from extproc.dialects.gemini import GeminiGenerate
from extproc.dialects.gemini import usage as figures
from extproc.errors import BadRequest, BudgetExhausted, ProviderError, TollgateError, Unauthenticated, UpstreamFailure
from extproc.form import Choice, Citation, Finish, Text, Thinking, TokenLogprob, ToolCall
from extproc.jsonarray import JsonArrayParser
from extproc.records import Piece, Usage
from extproc.sse import SseParser
from tests.each import each_case
from tests.recordings import Case, protocol_cases

GEMINI: ChatDialect = GeminiGenerate()
SEED = Seed("0123456789abcdef", 1_700_000_000, form.Request("gemini-2.5-flash", ()))

WHOLE = tuple(case for case in protocol_cases("gemini", stream=False) if case.status == 200)
# The recorder of one dropped the blank lines between its events.
STREAMS = tuple(
    case for case in protocol_cases("gemini", stream=True) if case.name != "gemini/generate-stream-unknown-truncated-01"
)
ERRORS = tuple(case for case in protocol_cases("gemini") if case.status != 200)

# A candidate without a finish reason, what is no answer at all, and an error in the middle.
UNFINISHED = {
    "vertex/generate-stream-unknown-stream-error-error-01",
    "vertex/generate-stream-unknown-truncated-01",
    "vertex/generate-stream-unknown-truncated-02",
    "vertex/generate-stream-unknown-truncated-03",
}


# Reading --------------------------------------------------------------------------------------------------------------


def datas(chunks: Iterable[bytes], *, array: bool) -> list[bytes]:
    """The data of each event, one that is not closed at the end included."""
    parser = JsonArrayParser() if array else SseParser()
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    if not array:
        events += SseParser().feed(parser.finish() + b"\n\n")
    return [event.data for event in events if event.data]


def is_array(body: bytes) -> bool:
    return body.lstrip().startswith(b"[")


def read(chunks: list[bytes], *, array: bool = False) -> list[form.StreamEvent]:
    reader = GEMINI.stream_reader(SEED)
    events = [event for data in datas(chunks, array=array) for event in reader.read(data)]
    return [*events, *reader.finish()]


def read_case(case: Case) -> list[form.StreamEvent]:
    return read([case.body], array=is_array(case.body))


def values(case: Case) -> list[dict[str, Any]]:
    """What the body holds, line by line and not by the parsers that are tried here."""
    if is_array(case.body):
        return list(json.loads(case.body))
    if not case.stream:
        return [json.loads(case.body)]
    lines = (line for line in case.body.splitlines() if line.startswith(b"data:"))
    return [json.loads(line.removeprefix(b"data:")) for line in lines]


Said = tuple[str, str, list[tuple[str, Any]]]  # text, thoughts, calls


def said_in(case: Case) -> Said:
    parts = [
        part
        for value in values(case)
        for candidate in value.get("candidates", ())
        for part in (candidate.get("content") or {}).get("parts", ())
    ]
    texts = [part["text"] for part in parts if "text" in part and not part.get("thought")]
    thoughts = [part["text"] for part in parts if "text" in part and part.get("thought")]
    calls = [part["functionCall"] for part in parts if "functionCall" in part]
    return "".join(texts), "".join(thoughts), [(call["name"], call.get("args", {})) for call in calls]


def said_by_events(events: list[form.StreamEvent]) -> Said:
    names = [event.name for event in events if isinstance(event, form.ToolStarted)]
    arguments = [json.loads(event.json) for event in events if isinstance(event, form.ToolArguments)]
    text = "".join(event.text for event in events if isinstance(event, form.TextDelta))
    thoughts = "".join(event.text for event in events if isinstance(event, form.ThinkingDelta))
    return text, thoughts, list(zip(names, arguments, strict=True))


def said_by(answer: form.Answer) -> Said:
    parts = [part for choice in answer.choices for part in choice.parts]
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, ToolCall)]
    text = "".join(part.text for part in parts if isinstance(part, Text))
    return text, "".join(part.text for part in parts if isinstance(part, Thinking)), calls


def last_usage(events: list[form.StreamEvent]) -> Usage | None:
    return next((event.usage for event in reversed(events) if isinstance(event, form.Used)), None)


def check_usage(case: Case, found: Usage | None) -> None:
    """Thoughts are output, what Google's tools read is input, and both together are the total."""
    if not case.usage:
        assert found is None
        return
    assert found is not None
    asked = case.usage
    assert found.prompt == asked["input"] + asked.get("tool_use_prompt", 0)
    assert found.completion == asked.get("output", 0) + asked.get("reasoning", 0)
    assert found.prompt + found.completion == asked["total"]
    assert (found.reasoning, found.cached_prompt) == (asked.get("reasoning", 0), asked.get("cached", 0))


@each_case(WHOLE)
def test_recorded_answer(case: Case) -> None:
    answer = GEMINI.read_whole(case.body, SEED)
    assert said_by(answer) == said_in(case)
    check_usage(case, answer.usage)
    again = GEMINI.read_whole(GEMINI.write_whole(answer, SEED), SEED)
    assert (said_by(again), again.usage) == (said_by(answer), answer.usage)
    assert [choice.finish for choice in again.choices] == [choice.finish for choice in answer.choices]
    assert [signatures(choice.parts) for choice in again.choices] == [signatures(c.parts) for c in answer.choices]
    assert (again.id, again.model) == (answer.id or SEED.request_id, answer.model or SEED.request.model)


def signatures(parts: Iterable[form.Part]) -> list[tuple[str | None, str | None]]:
    return [(part.signature, part.origin) for part in parts if isinstance(part, Thinking) and part.signature]


@each_case(STREAMS)
def test_recorded_stream(case: Case) -> None:
    array = is_array(case.body)
    events = read_case(case)
    for chunks in (case.recorded_chunks(), case.random_chunks(7), case.random_chunks(8, largest=5)):
        assert list(map(repr, read(chunks, array=array))) == list(map(repr, events))  # errors are equal to none other
    assert said_by_events(events) == said_in(case)
    check_usage(case, last_usage(events))
    assert (form.Done() in events) == (case.name not in UNFINISHED)


@pytest.mark.parametrize("array", [False, True], ids=["events", "array"])
@each_case(STREAMS)
def test_recorded_stream_written_and_read_again(case: Case, array: bool) -> None:
    events = read_case(case)
    body = written(events, array=array)
    again = read([body], array=array)
    assert said_by_events(again) == said_by_events(events)
    assert last_usage(again) == (last_usage(events) if form.Done() in events else last_usage(again))
    assert [e for e in again if isinstance(e, form.Finished)] == [e for e in events if isinstance(e, form.Finished)]
    assert [e[:3] for e in again if isinstance(e, form.ThinkingSigned)] == [
        e[:3] for e in events if isinstance(e, form.ThinkingSigned)
    ]
    assert (form.Done() in again) == (form.Done() in events)
    if array and form.Done() in events:
        assert json.loads(body)


def written(events: Iterable[form.StreamEvent], *, array: bool = False) -> bytes:
    writer = GEMINI.stream_writer(replace(SEED, array=array))
    return b"".join(map(writer.write, events))


@each_case([*WHOLE, *STREAMS])
def test_the_meter_reads_the_same(case: Case) -> None:
    """All texts, each once, and usage; the stream is whole without a closing event."""
    text, thoughts, calls = said_in(case)
    seen = "".join((text, thoughts, *(name for name, _ in calls)))
    if not case.stream:
        answer = GEMINI.read_answer(case.body)
        assert sum(map(len, answer.texts)) >= len(seen)
        found, count = answer.usage, len(answer.texts)
        assert count >= len(calls)
    else:
        reader = GEMINI.piece_reader()
        told = [reader(data) for data in datas([case.body], array=is_array(case.body))]
        assert sum(len(one) for piece in told for one in piece.texts) >= len(seen)
        found = next((piece.usage for piece in reversed(told) if piece.usage), None)
        started = {index for piece in told for index in piece.started}
        whole = any(piece.done for piece in told) or (bool(told[-1].finished) and started <= set(told[-1].finished))
        assert (whole and not any(piece.error for piece in told)) == (case.name not in UNFINISHED)
        assert any(piece.unseen for piece in told) or not calls
    check_usage(case, found)
    assert found is None or found.web_searches is not None


def event(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def candidate(*parts: Any, **fields: Any) -> bytes:
    return event(candidates=[{"content": {"role": "model", "parts": list(parts)}, **fields}])


def read_one(*bodies: bytes) -> list[form.StreamEvent]:
    """Without the beginning."""
    reader = GEMINI.stream_reader(SEED)
    return [e for body in bodies for e in reader.read(body) if not isinstance(e, form.Started)] + [*reader.finish()]


def finished(reason: object) -> Finish | None:
    ends = [e.finish for e in read_one(candidate({"text": "a"}, finishReason=reason)) if isinstance(e, form.Finished)]
    return ends[0] if ends else None


FINISH: dict[str, tuple[object, Finish | None]] = {
    "stop": ("STOP", Finish.STOP),
    "length": ("MAX_TOKENS", Finish.LENGTH),
    "safety": ("SAFETY", Finish.CONTENT_FILTER),
    "recitation": ("RECITATION", Finish.CONTENT_FILTER),
    "blocklist": ("BLOCKLIST", Finish.CONTENT_FILTER),
    "prohibited": ("PROHIBITED_CONTENT", Finish.CONTENT_FILTER),
    "personal data": ("SPII", Finish.CONTENT_FILTER),
    "language": ("LANGUAGE", Finish.CONTENT_FILTER),
    "image": ("IMAGE_SAFETY", Finish.CONTENT_FILTER),
    "malformed call": ("MALFORMED_FUNCTION_CALL", Finish.ERROR),
    "other": ("OTHER", Finish.ERROR),
    "a new one": ("FAKE_ENUM", Finish.STOP),
    "a number": (1, Finish.STOP),
    "a number, length": (2, Finish.LENGTH),
    "a number, safety": (3, Finish.CONTENT_FILTER),
    "none yet": (None, None),
    "unspecified": ("FINISH_REASON_UNSPECIFIED", None),
    "a number, unspecified": (0, None),
}


@pytest.mark.parametrize(("reason", "expected"), FINISH.values(), ids=FINISH)
def test_finish(reason: object, expected: Finish | None) -> None:
    assert finished(reason) == expected


CALL = {"functionCall": {"name": "f", "args": {"a": 1}}}


def test_stop_with_calls_is_a_call_of_tools() -> None:
    assert read_one(candidate(CALL, finishReason="STOP"))[-2] == form.Finished(0, Finish.TOOL_CALLS)
    assert read_one(candidate(CALL, finishReason="MAX_TOKENS"))[-2] == form.Finished(0, Finish.LENGTH)


def test_calls_without_an_id_get_one_each() -> None:
    calls = read_one(candidate(CALL, CALL), candidate({"functionCall": {"name": "g", "id": "given"}}), candidate(CALL))
    started = [e for e in calls if isinstance(e, form.ToolStarted)]
    assert [(e.call, e.id) for e in started] == [
        (0, "call_0123456789ab_0"),
        (1, "call_0123456789ab_1"),
        (2, "given"),
        (3, "call_0123456789ab_3"),
    ]


def test_an_older_model_says_stop_in_every_event() -> None:
    assert read_one(candidate({"text": "a"}, finishReason="STOP"), candidate({"text": "b"}, finishReason="SAFETY")) == [
        form.TextDelta(0, "a"),
        form.TextDelta(0, "b"),
        form.Finished(0, Finish.CONTENT_FILTER),
        form.Done(),
    ]


def test_a_stream_is_whole_when_each_of_its_choices_is() -> None:
    one = {"index": 1, "content": {"parts": [{"text": "b"}]}}
    two = event(candidates=[{"content": {"parts": [{"text": "a"}]}, "finishReason": "STOP"}, one])
    assert form.Done() not in read_one(two)
    assert read_one(two, event(candidates=[{"index": 1, "finishReason": "STOP"}]))[-1] == form.Done()


BLOCKED = event(promptFeedback={"blockReason": "SAFETY"}, usageMetadata={"promptTokenCount": 7})


def test_a_blocked_prompt_is_billed() -> None:
    assert read_one(BLOCKED) == [
        form.Used(Usage(7, 0)),
        form.Finished(0, Finish.CONTENT_FILTER),
        form.Done(),
    ]
    whole = GEMINI.read_whole(BLOCKED, SEED)
    assert whole.choices == (Choice(0, (), Finish.CONTENT_FILTER),)
    piece = GEMINI.piece_reader()(BLOCKED)
    assert (piece.done, piece.usage) == (True, Usage(7, 0, web_searches=0))


UNSEEN = {
    "code": ({"executableCode": {"language": "PYTHON", "code": "1+1"}}, ["1+1"]),
    "its output": ({"codeExecutionResult": {"outcome": "OUTCOME_OK", "output": "2"}}, ["2"]),
    "a tool of Google's": ({"toolCall": {"toolType": "GOOGLE_SEARCH", "args": {"q": "x"}}}, ['{"q":"x"}']),
    "what it gave": ({"toolResponse": {"response": {"a": 1}}}, []),
    "a picture": ({"inlineData": {"mimeType": "image/png", "data": "AAAA"}}, []),
    "streamed arguments": ({"functionCall": {"partialArgs": [{"jsonPath": "$.a", "stringValue": "x"}]}}, ["x"]),
}


@pytest.mark.parametrize(
    ("said", "expected"),
    [({"content": None}, [form.Unseen("")]), ({}, []), ({"content": {}}, [])],
    ids=["left out", "nothing yet", "empty"],
)
def test_text_that_is_billed_and_left_out(said: dict[str, Any], expected: list[form.StreamEvent]) -> None:
    assert read_one(json.dumps({"candidates": [{"index": 0, **said}]}).encode()) == expected


@pytest.mark.parametrize(("part", "expected"), UNSEEN.values(), ids=UNSEEN)
def test_what_no_other_dialect_has_is_counted_where_it_is_text(part: dict[str, Any], expected: list[str]) -> None:
    assert read_one(candidate(part)) == [form.Unseen(text) for text in expected]
    assert list(GEMINI.read_whole(candidate(part), SEED).unseen) == expected


def test_a_malformed_call_is_counted() -> None:
    message = "Malformed function call: f(a=)"
    body = candidate(finishReason="MALFORMED_FUNCTION_CALL", finishMessage=message)
    assert GEMINI.read_answer(body).texts == (message,)


THOUGHTS: dict[str, tuple[list[Any], tuple[form.Part, ...]]] = {
    "a thought": ([{"text": "hm", "thought": True}], (Thinking("hm", None, "gemini"),)),
    "in pieces": (
        [{"text": "h", "thought": True}, {"text": "m", "thought": True}],
        (Thinking("hm", None, "gemini"),),
    ),
    "signed on the text after it": (
        [{"text": "hm", "thought": True}, {"text": "a", "thoughtSignature": "c2ln"}],
        (Thinking("hm", "c2ln", "gemini"), Text("a")),
    ),
    "signed on a call": (
        [{**CALL, "thoughtSignature": "c2ln"}, CALL],
        (
            Thinking("", "c2ln", "gemini"),
            ToolCall("call_0123456789ab_0", "f", '{"a":1}'),
            ToolCall("call_0123456789ab_1", "f", '{"a":1}'),
        ),
    ),
    "signed at the end": (
        [{"text": "a"}, {"text": "", "thoughtSignature": "c2ln"}],
        (Text("a"), Thinking("", "c2ln", "gemini")),
    ),
    "nothing but a signature": ([{"thoughtSignature": "c2ln"}], (Thinking("", "c2ln", "gemini"),)),
    "a signature after a signature": (
        [{"thoughtSignature": "c2ln"}, {"thoughtSignature": "bmFs"}, {"text": "a"}],
        (Thinking("", "c2ln", "gemini"), Thinking("", "bmFs", "gemini"), Text("a")),
    ),
    "two signatures": (
        [{"text": "a", "thoughtSignature": "c2ln"}, {"text": "b", "thoughtSignature": "bmFs"}],
        (Thinking("", "c2ln", "gemini"), Text("a"), Thinking("", "bmFs", "gemini"), Text("b")),
    ),
}


@pytest.mark.parametrize(("parts", "expected"), THOUGHTS.values(), ids=THOUGHTS)
def test_thoughts(parts: list[Any], expected: tuple[form.Part, ...]) -> None:
    answer = GEMINI.read_whole(candidate(*parts, finishReason="STOP"), SEED)
    assert answer.choices[0].parts == expected
    assert GEMINI.read_whole(GEMINI.write_whole(answer, SEED), SEED).choices == answer.choices


FOREIGN = (
    Thinking("hm", "sig==", "anthropic"),
    Thinking("", "sealed", "anthropic", redacted=True),
    Text("a"),
    Thinking("", "empty", "anthropic"),
    ToolCall("id", "f", "{}"),
)


def test_another_dialects_thoughts_travel_through() -> None:
    answer = form.Answer("id", "claude", (Choice(0, FOREIGN, Finish.TOOL_CALLS),), None)
    assert GEMINI.read_whole(GEMINI.write_whole(answer, SEED), SEED).choices[0].parts == FOREIGN


GROUNDED = {
    "groundingChunks": [{"web": {"uri": "https://a.test", "title": "A"}}, {"retrievedContext": {"title": "B"}}],
    "groundingSupports": [{"segment": {"startIndex": 3, "endIndex": 6, "text": "är"}, "groundingChunkIndices": [0, 9]}],
    "webSearchQueries": ["x", "y"],
}


def test_citations() -> None:
    """Google counts bytes, and a source that supports nothing is named still."""
    body = candidate({"text": "Bäär."}, groundingMetadata=GROUNDED, finishReason="STOP")
    answer = GEMINI.read_whole(body, SEED)
    (text,) = answer.choices[0].parts
    assert isinstance(text, Text)
    assert text.citations == (Citation("https://a.test", "A", "är", 2, 4), Citation(None, "B"))
    assert GEMINI.read_whole(GEMINI.write_whole(answer, SEED), SEED).choices == answer.choices


def test_citations_are_told_once_though_they_are_repeated() -> None:
    one = candidate({"text": "Bäär."}, groundingMetadata=GROUNDED)
    assert len([e for e in read_one(one, candidate(groundingMetadata=GROUNDED)) if isinstance(e, form.Cited)]) == 2


def test_an_offset_of_another_text_is_no_offset() -> None:
    source = {"startIndex": 1, "endIndex": 99, "uri": "https://a.test"}
    body = candidate({"text": "a"}, citationMetadata={"citationSources": [source]})
    assert [e.citation for e in read_one(body) if isinstance(e, form.Cited)] == [Citation("https://a.test")]


SEARCHED = {"webSearchQueries": ["x", "y", "x"]}


@pytest.mark.parametrize(("model", "billed"), [("gemini-2.5-pro", 1), ("gemini-3.5-flash", 2)])
def test_searches(model: str, billed: int) -> None:
    body = event(
        candidates=[{"groundingMetadata": SEARCHED}], usageMetadata={"promptTokenCount": 1}, modelVersion=model
    )
    usage = GEMINI.read_answer(body).usage
    assert usage is not None
    assert usage.web_searches == billed


def test_logprobs() -> None:
    result = {
        "chosenCandidates": [{"token": "a", "logProbability": -0.5}, {"token": "b", "logProbability": 0}],
        "topCandidates": [{"candidates": [{"token": "a", "logProbability": -0.5}, {"token": "c"}]}],
    }
    answer = GEMINI.read_whole(candidate({"text": "ab"}, logprobsResult=result, finishReason="STOP"), SEED)
    likeliest = (TokenLogprob("a", -0.5), TokenLogprob("c", 0.0))
    assert answer.choices[0].logprobs == (TokenLogprob("a", -0.5, likeliest), TokenLogprob("b", 0.0))
    assert GEMINI.read_whole(GEMINI.write_whole(answer, SEED), SEED) == replace(
        answer, id=SEED.request_id, model=SEED.request.model
    )


# Usage ----------------------------------------------------------------------------------------------------------------

USAGE: dict[str, tuple[dict[str, Any], Usage | None]] = {
    "plain": ({"promptTokenCount": 5, "candidatesTokenCount": 3, "totalTokenCount": 8}, Usage(5, 3)),
    "zeros are left out": ({"promptTokenCount": 5}, Usage(5, 0)),
    "thoughts": (
        {"promptTokenCount": 5, "candidatesTokenCount": 3, "thoughtsTokenCount": 9},
        Usage(5, 12, reasoning=9),
    ),
    "tools' prompt": ({"promptTokenCount": 5, "toolUsePromptTokenCount": 4, "totalTokenCount": 9}, Usage(9, 0)),
    "cached": ({"promptTokenCount": 5, "cachedContentTokenCount": 4}, Usage(5, 0, cached_prompt=4)),
    "in the total only": (
        {"promptTokenCount": 5, "candidatesTokenCount": 3, "totalTokenCount": 20},
        Usage(5, 15, reasoning=12),
    ),
    "audio": (
        {
            "promptTokenCount": 5,
            "candidatesTokenCount": 7,
            "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 1}, {"modality": "AUDIO", "tokenCount": 4}],
            "candidatesTokensDetails": [{"modality": 4, "tokenCount": 6}],
        },
        Usage(5, 7, audio_prompt=4, audio_completion=6),
    ),
    "nothing": ({}, None),
    "traffic only": ({"trafficType": "ON_DEMAND"}, None),
    "not figures": ({"promptTokenCount": "5", "totalTokenCount": -1}, None),
}


@pytest.mark.parametrize(("metadata", "expected"), USAGE.values(), ids=USAGE)
def test_usage(metadata: dict[str, Any], expected: Usage | None) -> None:
    assert figures.read({"usageMetadata": metadata}) == expected


TIERS = {
    "Gemini API": ({"serviceTier": "flex"}, "flex"),
    "Vertex AI": ({"trafficType": "ON_DEMAND_PRIORITY"}, "priority"),
    "Vertex AI, plain": ({"trafficType": "ON_DEMAND"}, "standard"),
    "as a number": ({"trafficType": 1}, "standard"),
    "unspecified": ({"trafficType": "TRAFFIC_TYPE_UNSPECIFIED"}, None),
    "provisioned": ({"trafficType": "PROVISIONED_THROUGHPUT"}, "provisioned_throughput"),
    "none": ({}, None),
    "no name": ({"serviceTier": 1, "trafficType": [1]}, None),
}


@pytest.mark.parametrize(("metadata", "expected"), TIERS.values(), ids=TIERS)
def test_service_tier(metadata: dict[str, Any], expected: str | None) -> None:
    assert figures.read_tier({"usageMetadata": metadata}) == expected


COUNTS = st.integers(0, 1_000)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    cached, writes, heard, thoughts, said = (draw(COUNTS) for _ in range(5))
    return Usage(
        prompt=draw(COUNTS) + cached + writes + heard,
        completion=said + thoughts,
        cached_prompt=cached,
        reasoning=thoughts,
        audio_prompt=heard,
        audio_completion=said // 2,
        cache_write_prompt=writes,
        web_searches=draw(st.none() | COUNTS),
    )


@given(usages(), st.sampled_from([None, "flex"]))
def test_usage_comes_back(usage: Usage, tier: str | None) -> None:
    metadata = {"usageMetadata": figures.write(usage, tier)}
    assert (figures.read(metadata), figures.read_tier(metadata)) == (usage, tier)


# Errors ---------------------------------------------------------------------------------------------------------------


@each_case(ERRORS)
def test_recorded_error(case: Case) -> None:
    error = GEMINI.read_error(case.status, case.body)
    assert error.status == case.status
    if b'"error"' in case.body:
        assert error.message == json.loads(case.body)["error"]["message"]
    assert GEMINI.read_error(case.status, b"[" + case.body + b"]").message == error.message
    again = GEMINI.read_error(case.status, GEMINI.render_error(error))
    assert (again.message, again.code, again.retry_after_s) == (error.message, error.code, error.retry_after_s)


DELAYS = {"34.4s": 35, "48s": 48, "0s": 0, "1m": None, "-1s": None, "": None}


@pytest.mark.parametrize(("delay", "expected"), DELAYS.items(), ids=DELAYS)
def test_retry_after(delay: str, expected: int | None) -> None:
    details = [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": delay}]
    body = event(error={"code": 429, "message": "m", "details": details})
    assert GEMINI.read_error(429, body).retry_after_s == expected


def test_an_error_names_the_field() -> None:
    violation = {"field": "generation_config.top_k", "description": "d"}
    details = [{"@type": "type.googleapis.com/google.rpc.BadRequest", "fieldViolations": [violation]}]
    body = event(error={"code": 400, "message": "m", "status": "INVALID_ARGUMENT", "details": details})
    error = GEMINI.read_error(400, body)
    assert (error.param, error.code, error.type) == (
        "generation_config.top_k",
        "invalid_argument",
        "invalid_request_error",
    )


STREAM_ERRORS = {
    "with a code": ({"code": 503, "message": "m", "status": "UNAVAILABLE"}, 503),
    "by its status": ({"message": "m", "status": "RESOURCE_EXHAUSTED"}, 429),
    "without either": ({"message": "m"}, 500),
    "no HTTP status": ({"code": 14, "message": "m"}, 500),
}


@pytest.mark.parametrize(("error", "status"), STREAM_ERRORS.values(), ids=STREAM_ERRORS)
def test_an_error_in_a_stream(error: dict[str, Any], status: int) -> None:
    (failed,) = read_one(event(error=error))
    assert isinstance(failed, form.Failed)
    assert (failed.error.status, failed.error.message) == (status, "m")
    assert GEMINI.piece_reader()(event(error=error)).error
    with pytest.raises(ValueError, match="not an answer"):
        GEMINI.read_whole(event(error=error), SEED)


# Writing --------------------------------------------------------------------------------------------------------------

LIKELY = (TokenLogprob("a", -1.0, (TokenLogprob("b", -2.0),)),)
BILL = Usage(10, 7, 2, 3, 1, 1, 2, 1)
EVENTS: list[form.StreamEvent] = [
    form.Started("id1", "claude-x", Usage(10, 0)),
    form.ThinkingDelta(0, "hm "),
    form.ThinkingDelta(0, "ok"),
    form.ThinkingSigned(0, "sig", "anthropic"),
    form.TextDelta(0, "Hel"),
    form.TextDelta(0, "lo ж"),
    form.Cited(0, Citation("https://a.test", "A", "lo ж", 3, 7)),
    form.Logprobs(0, LIKELY),
    form.ToolStarted(0, 0, "tc1", "f"),
    form.ToolArguments(0, 0, '{"a":'),
    form.ToolStarted(0, 1, "tc2", "g"),
    form.ToolArguments(0, 0, "1}"),  # OpenAI may interleave them
    form.Unseen("not for this caller"),
    form.Finished(0, Finish.TOOL_CALLS),
    form.Used(BILL, "flex"),
    form.Done(),
]


def test_a_stream_is_written_and_read() -> None:
    again = read([written(EVENTS)])
    assert said_by_events(again) == ("Hello ж", "hm ok", [("f", {"a": 1}), ("g", {})])
    for expected in (
        form.Started("id1", "claude-x"),
        form.ThinkingSigned(0, "sig", "anthropic"),
        form.Cited(0, Citation("https://a.test", "A", "lo ж", 3, 7)),
        form.Logprobs(0, LIKELY),
        form.ToolStarted(0, 0, "tc1", "f"),
        form.ToolStarted(0, 1, "tc2", "g"),
        form.Finished(0, Finish.TOOL_CALLS),
        form.Used(BILL, "flex"),
        form.Done(),
    ):
        assert expected in again
    assert b"not for this caller" not in written(EVENTS)


@pytest.mark.parametrize("at", range(len(EVENTS)))
def test_a_stream_that_ended_early_is_not_closed(at: int) -> None:
    assert form.Done() not in read([written(EVENTS[:at])])
    with pytest.raises(json.JSONDecodeError):
        json.loads(written(EVENTS[:at], array=True) or b"")


BROKEN = ProviderError("Overloaded.", status=529, code="overloaded_error")


@pytest.mark.parametrize("at", range(len(EVENTS)))
def test_a_failure_ends_the_stream_and_leaves_legal_json(at: int) -> None:
    events: list[form.StreamEvent] = [*EVENTS[:at], form.Failed(BROKEN)]
    *_, last = json.loads(written(events, array=True))
    assert last["error"]["code"] == 529
    told = read([written(events)])
    assert isinstance(told[-1], form.Failed)
    reported = [e for e in EVENTS[:at] if isinstance(e, (form.Started, form.Used)) and e.usage]
    assert last_usage(told) == (reported[-1].usage if reported else None)


def test_the_last_event_of_several_choices() -> None:
    events: list[form.StreamEvent] = [
        form.Started(None, None),
        form.TextDelta(1, "b"),
        form.Finished(1, Finish.LENGTH),
        form.TextDelta(0, "a"),
        form.Finished(0, Finish.STOP),
        form.Done(),
    ]
    again = read([written(events)])
    assert again[-3:] == [form.Finished(0, Finish.STOP), form.Finished(1, Finish.LENGTH), form.Done()]


MALFORMED = {"cut": '{"a": "b', "a list": "[1]", "a text": '"x"'}


@pytest.mark.parametrize("arguments", MALFORMED.values(), ids=MALFORMED)
def test_arguments_that_are_no_object_are_told_as_google_does(arguments: str) -> None:
    """What was billed is in the answer, and the choice did not end well."""
    call = ToolCall("id", "f", arguments)
    whole = GEMINI.write_whole(form.Answer(None, None, (Choice(0, (call,), Finish.TOOL_CALLS),), None), SEED)
    events: list[form.StreamEvent] = [form.ToolStarted(0, 0, "id", "f"), form.ToolArguments(0, 0, arguments)]
    stream = written([*events, form.Finished(0, Finish.TOOL_CALLS), form.Done()])
    assert GEMINI.read_answer(whole).texts == (f"Malformed function call: f({arguments})",)
    assert GEMINI.read_whole(whole, SEED).choices[0].finish is Finish.ERROR
    assert form.Unseen(f"Malformed function call: f({arguments})") in read([stream])
    assert form.Finished(0, Finish.ERROR) in read([stream])


def test_a_call_that_was_cut_by_the_cap_says_so() -> None:
    events: list[form.StreamEvent] = [
        form.ToolStarted(0, 0, "id", "f"),
        form.ToolArguments(0, 0, '{"a'),
        form.Finished(0, Finish.LENGTH),
    ]
    again = read([written([*events, form.Done()])])
    assert form.Finished(0, Finish.LENGTH) in again
    assert form.Unseen('Malformed function call: f({"a)') in again


# Google's client ------------------------------------------------------------------------------------------------------


def client(status: int, body: bytes, *, stream: bool = False, asked: list[Any] | None = None) -> genai.Client:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if asked is not None:
            asked.append(json.loads(request.content))
        kind = "text/event-stream" if stream else "application/json"
        return httpx2.Response(status, headers={"content-type": kind}, content=body)

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    options = types.HttpOptions(httpx_client=http, base_url="http://gateway.test")
    return genai.Client(api_key="key", http_options=options)


def test_the_client_reads_an_answer() -> None:
    parts = (Thinking("hm", None, None), Text("Hello."), ToolCall("tc1", "f", '{"a":1}'))
    answer = form.Answer("id1", "claude-x", (Choice(0, parts, Finish.TOOL_CALLS),), BILL, "flex")
    read_back = client(200, GEMINI.write_whole(answer, SEED)).models.generate_content(model="m", contents="hi")
    assert (read_back.response_id, read_back.model_version) == ("id1", "claude-x")
    assert read_back.text == "Hello."
    assert read_back.function_calls == [types.FunctionCall(id="tc1", name="f", args={"a": 1})]
    metadata = read_back.usage_metadata
    assert metadata is not None
    assert (metadata.prompt_token_count, metadata.candidates_token_count, metadata.thoughts_token_count) == (10, 4, 3)
    assert (metadata.cached_content_token_count, metadata.total_token_count) == (2, 17)


def test_the_client_reads_structured_output() -> None:
    answer = form.Answer(None, None, (Choice(0, (Text('{"a":1}'),), Finish.STOP),), None)
    config = types.GenerateContentConfig(response_mime_type="application/json", response_schema={"type": "OBJECT"})
    read_back = client(200, GEMINI.write_whole(answer, SEED)).models.generate_content(
        model="m", contents="hi", config=config
    )
    assert read_back.parsed == {"a": 1}


def test_the_client_reads_a_stream() -> None:
    chunks = list(client(200, written(EVENTS), stream=True).models.generate_content_stream(model="m", contents="hi"))
    parts = [part for chunk in chunks for one in chunk.candidates or () for part in one.content.parts]  # type: ignore[union-attr]
    assert "".join(part.text or "" for part in parts if not part.thought) == "Hello ж"
    assert "".join(part.text or "" for part in parts if part.thought) == "hm ok"
    assert [part.function_call.name for part in parts if part.function_call] == ["f", "g"]
    last = chunks[-1].candidates
    assert last is not None
    assert last[0].finish_reason is types.FinishReason.STOP
    assert chunks[-1].usage_metadata is not None
    assert chunks[-1].usage_metadata.total_token_count == 17


def test_the_clients_chat_sends_back_what_it_got() -> None:
    """Piece by piece, with its signatures in the other base64 alphabet, and without what is not of the model."""
    signature = "sig" + "\u00fb\u00ff" * 3  # in base64 with both of the letters that differ
    events: list[form.StreamEvent] = [event for event in EVENTS if not isinstance(event, form.ThinkingSigned)]
    events.insert(3, form.ThinkingSigned(0, signature, "anthropic"))
    asked: list[Any] = []
    chat = client(200, written(events), stream=True, asked=asked).chats.create(model="m")
    list(chat.send_message_stream("one"))
    list(chat.send_message_stream("two"))
    request = GEMINI.read_request(asked[-1], Address("m", stream=True))
    assert [message.role for message in request.messages] == [form.Role.USER, form.Role.ASSISTANT, form.Role.USER]
    assert request.messages[1].parts == (
        Thinking("hm ok", signature, "anthropic"),
        Text("Hello ж"),
        ToolCall("tc1", "f", '{"a":1}'),
        ToolCall("tc2", "g", "{}"),
    )


@each_case([c for c in STREAMS if "SAFETY" not in str(c.meta["finish"])])
def test_the_client_reads_recorded_streams_as_written_again(case: Case) -> None:
    events = read_case(case)
    if form.Done() not in events:
        return
    text, _, calls = said_in(case)
    chunks = list(client(200, written(events), stream=True).models.generate_content_stream(model="m", contents="hi"))
    parts = [part for chunk in chunks for one in chunk.candidates or () for part in one.content.parts]  # type: ignore[union-attr]
    assert "".join(part.text or "" for part in parts if not part.thought) == text
    assert [(p.function_call.name, p.function_call.args or {}) for p in parts if p.function_call] == calls


REFUSALS: dict[str, tuple[TollgateError, type[APIError], str]] = {
    "budget": (BudgetExhausted("m", budget_id="b", retry_after_s=60), ClientError, "RESOURCE_EXHAUSTED"),
    "request": (BadRequest("m", param="contents"), ClientError, "INVALID_ARGUMENT"),
    "token": (Unauthenticated("m"), ClientError, "UNAUTHENTICATED"),
    "provider": (UpstreamFailure("m"), ServerError, "UNAVAILABLE"),
    "overloaded": (BROKEN, ServerError, "UNAVAILABLE"),
}


@pytest.mark.parametrize(("error", "kind", "status"), REFUSALS.values(), ids=REFUSALS)
def test_the_client_raises_errors(error: TollgateError, kind: type[APIError], status: str) -> None:
    with pytest.raises(kind) as whole:
        client(error.status, GEMINI.render_error(error)).models.generate_content(model="m", contents="hi")
    body = written(EVENTS[:5]) + GEMINI.render_error_event(error)
    with pytest.raises(kind) as streamed:
        list(client(200, body, stream=True).models.generate_content_stream(model="m", contents="hi"))
    for raised in (whole.value, streamed.value):
        assert (raised.code, raised.status, raised.message) == (error.status, status, error.message)


# Anything -------------------------------------------------------------------------------------------------------------

NAMES = """
candidates content parts text thought thoughtSignature functionCall name args id index finishReason finishMessage
usageMetadata promptTokenCount trafficType promptTokensDetails modality groundingMetadata groundingChunks web uri
groundingSupports segment startIndex endIndex groundingChunkIndices webSearchQueries logprobsResult token
chosenCandidates topCandidates logProbability promptFeedback blockReason error code message details modelVersion
executableCode toolCall partialArgs citationMetadata citations
""".split()  # noqa: SIM905
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


def survives(data: bytes) -> None:
    reader = GEMINI.stream_reader(SEED)
    events = [*reader.read(data), *reader.read(data), *reader.finish()]
    written(events)
    assert isinstance(GEMINI.piece_reader()(data), Piece)
    assert isinstance(GEMINI.read_error(500, data), ProviderError)
    with contextlib.suppress(ValueError):
        GEMINI.write_whole(GEMINI.read_whole(data, SEED), SEED)


@given(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4))
def test_any_json_is_read(value: dict[str, Any]) -> None:
    survives(json.dumps(value).encode())


@given(st.lists(st.dictionaries(st.sampled_from(NAMES), JSON, max_size=5), max_size=3))
def test_any_part_and_candidate_is_read(value: list[dict[str, Any]]) -> None:
    survives(
        json.dumps(
            {"candidates": [{"content": {"parts": value}}, *value], "usageMetadata": value and value[0]}
        ).encode()
    )


@given(st.binary(max_size=60))
def test_any_bytes_are_read(data: bytes) -> None:
    survives(data)


def test_deep_nesting_is_read() -> None:
    args = b'{"a":' * 900 + b"1" + b"}" * 900
    survives(b'{"candidates":[{"content":{"parts":[{"functionCall":{"name":"f","args":' + args + b"}}]}}]}")


def test_pieces_of_a_whole_answer_are_those_of_its_stream() -> None:
    body = candidate({"text": "a"}, CALL, finishReason="STOP")
    whole = GEMINI.read_answer(body)
    assert whole.texts == pieces.piece(GEMINI.stream_reader(SEED).read(body)).texts
