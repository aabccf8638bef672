"""One attempt: its own provider's path, key and body, whatever an attempt before it has set, and the answer back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.errors import ProtocolViolation
from extproc.events import (
    AwaitMore,
    Closed,
    Command,
    ContinueRequest,
    ContinueResponse,
    Crossing,
    DropTrailers,
    Event,
    ForwardChunk,
    ForwardRequest,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    TimerFired,
)
from extproc.itinerary import Itinerary, Leg
from extproc.limits import FIRST_EVENT_WAIT_MS, MAX_EVENT_BYTES
from extproc.records import Target
from extproc.target import Attempt, State, Targets

KEYS = {name: f"key-of-{name}" for name in ("openai", "anthropic", "gemini", "vertex-anthropic", "groq")}
TARGETS = Targets(
    {
        "openai": "https://api.openai.com/v1",
        "anthropic": "https://api.anthropic.com",
        "gemini": "https://generativelanguage.googleapis.com",
        "vertex-anthropic": "https://aiplatform.googleapis.com/v1/projects/p/locations/global/publishers/anthropic",
        "groq": "https://api.groq.com/openai/v1",
        "mistral": "https://api.mistral.ai/v1",
    },
    KEYS.get,
    lambda: 1_770_000_000_000,
)
CHAT = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
BODY = orjson.dumps(CHAT)


def itinerary(*legs: str, dialect: str = "openai-chat", **changed: Any) -> Itinerary:
    """A call's, whose legs are `provider/model` or `provider/model/cap`."""
    parsed = [leg.split("/") for leg in legs or ("openai/gpt-4o",)]
    plain = Itinerary(
        request_id="6f1c2e00",
        dialect=dialect,
        address=NO_ADDRESS,
        stream=False,
        legs=tuple(Leg(Target(leg[0], leg[1]), int(leg[2]) if len(leg) > 2 else None) for leg in parsed),
        body_bytes=len(BODY),
        written=True,
        drop=False,
    )
    return replace(plain, **changed)


def asked(provider: str | None, way: Itinerary, *headers: tuple[str, str], attempt: int = 1) -> RequestHeaders:
    pairs = ((":method", "POST"), (":path", "/left/by/another"), ("x-envoy-attempt-count", str(attempt)), *headers)
    return RequestHeaders(pairs, False, provider, way.encode())


def begun(provider: str, way: Itinerary, *, patient: bool = False, body: bytes = BODY, attempt: int = 1) -> Attempt:
    """An attempt that has sent its request."""
    made = Attempt(TARGETS, patient=patient)
    made.handle(asked(provider, way, attempt=attempt))
    if not made.done:
        assert isinstance(made.handle(RequestBody(body, True))[0], ForwardRequest)
    return made


def answer(attempt: Attempt, status: int = 200, *headers: tuple[str, str], end: bool = False) -> list[Command]:
    return attempt.handle(ResponseHeaders(((":status", str(status)), *headers), end))


def told(commands: list[Command]) -> bytes:
    """What goes on to the caller in place of a chunk."""
    (command,) = commands
    assert isinstance(command, ForwardChunk)
    assert command.body is not None
    return command.body


def set_by(command: Command) -> dict[str, str]:
    assert isinstance(command, ContinueRequest | ContinueResponse | ForwardRequest)
    return dict(command.set_headers)


SSE = ("content-type", "text/event-stream")
JSON = ("content-type", "application/json")


def anthropics(kind: str, **fields: Any) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), orjson.dumps({"type": kind, **fields}))


STARTED = anthropics(
    "message_start",
    message={
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-sonnet-4-5",
        "content": [],
        "usage": {"input_tokens": 9, "output_tokens": 1},
    },
)
OVERLOADED = anthropics("error", error={"type": "overloaded_error", "message": "Overloaded"})

# The request ----------------------------------------------------------------------------------------------------------


def test_an_attempt_that_needs_no_other_body_sees_none() -> None:
    attempt = Attempt(TARGETS)
    (command,) = attempt.handle(asked("openai", itinerary()))
    assert isinstance(command, ContinueRequest)
    assert (command.crossing, attempt.done) == (Crossing.NOTHING, True)
    assert set_by(command) == {
        ":path": "/v1/chat/completions",
        "authorization": "Bearer key-of-openai",
        "content-type": "application/json",
        "content-length": str(len(BODY)),
        "accept-encoding": "identity",
    }


def test_what_the_caller_or_an_earlier_attempt_sent_is_removed() -> None:
    sent = asked(
        "openai",
        itinerary("anthropic/claude-sonnet-4-5", "openai/gpt-4o"),
        ("authorization", "Bearer of-the-caller"),
        ("x-api-key", "key-of-anthropic"),
        ("anthropic-version", "2023-06-01"),
        ("x-tollgate-internal-route", "anthropic,openai"),
        ("user-agent", "curl"),
        ("accept-encoding", "gzip"),
        ("content-type", "text/plain"),
        ("traceparent", "00-1"),
        attempt=2,
    )
    (command,) = Attempt(TARGETS).handle(sent)
    assert isinstance(command, ContinueRequest)
    assert command.remove_headers == (
        "x-envoy-attempt-count",
        "authorization",
        "x-api-key",
        "anthropic-version",
        "x-tollgate-internal-route",
        "user-agent",
        "accept-encoding",
    )
    assert set_by(command)["authorization"] == "Bearer key-of-openai"


@pytest.mark.parametrize(
    ("provider", "dialect", "stream", "path", "key"),
    [
        ("openai", "openai-responses", True, "/v1/responses", "authorization"),
        ("openai", "anthropic-messages", True, "/v1/chat/completions", "authorization"),
        ("groq", "openai-chat", False, "/openai/v1/chat/completions", "authorization"),
        ("anthropic", "openai-chat", False, "/v1/messages", "x-api-key"),
        ("gemini", "openai-chat", False, "/v1beta/models/m%2F..%2Fx:generateContent", "x-goog-api-key"),
        ("gemini", "openai-chat", True, "/v1beta/models/m%2F..%2Fx:streamGenerateContent?alt=sse", "x-goog-api-key"),
    ],
    ids=str,
)
def test_path_and_key_are_the_providers(provider: str, dialect: str, stream: bool, path: str, key: str) -> None:
    way = itinerary(f"{provider}/m", dialect=dialect, stream=stream)
    legs = (Leg(Target(provider, "m/../x"), None),)  # a model's name is a caller's text
    (command,) = Attempt(TARGETS).handle(asked(provider, replace(way, legs=legs)))
    headers = set_by(command)
    assert headers[":path"] == path
    assert headers[key].removeprefix("Bearer ") == KEYS[provider]


def test_googles_array_is_asked_for_only_where_the_caller_wants_it() -> None:
    array = Address("m", stream=True, array=True)
    native = itinerary("gemini/m", dialect="gemini-generate", address=array, stream=True)
    (command,) = Attempt(TARGETS).handle(asked("gemini", native))
    assert set_by(command)[":path"] == "/v1beta/models/m:streamGenerateContent"


def test_a_native_caller_chooses_the_version_of_its_api() -> None:
    way = itinerary("anthropic/claude-sonnet-4-5", dialect="anthropic-messages")
    (command,) = Attempt(TARGETS).handle(
        asked("anthropic", way, ("anthropic-version", "2026-10-21"), ("anthropic-beta", "x"))
    )
    assert isinstance(command, ContinueRequest)
    assert "anthropic-beta" not in command.remove_headers
    assert set_by(command)["anthropic-version"] == "2026-10-21"
    (translated,) = Attempt(TARGETS).handle(
        asked("anthropic", itinerary("anthropic/claude-sonnet-4-5"), ("anthropic-version", "2026-10-21"))
    )
    assert set_by(translated)["anthropic-version"] == "2023-06-01"


def test_a_later_target_of_the_same_dialect_gets_its_own_model_and_cap() -> None:
    attempt = Attempt(TARGETS)
    way = itinerary("openai/gpt-4o", "groq/llama-3.3-70b-versatile/100")
    (command,) = attempt.handle(asked("groq", way, attempt=2))
    assert isinstance(command, ContinueRequest)
    assert command.crossing is Crossing.REQUEST
    (forward,) = attempt.handle(RequestBody(BODY, True))
    assert isinstance(forward, ForwardRequest)
    sent = orjson.loads(forward.body)
    assert sent == {**CHAT, "model": "llama-3.3-70b-versatile", "max_completion_tokens": 100}
    assert set_by(forward) == {"content-length": str(len(forward.body))}
    assert attempt.done


def test_a_cap_has_the_name_that_the_provider_knows() -> None:
    attempt = Attempt(replace(TARGETS, key=lambda _: "key"))
    attempt.handle(asked("mistral", itinerary("openai/gpt-4o", "mistral/mistral-small/100"), attempt=2))
    (forward,) = attempt.handle(RequestBody(BODY, True))
    assert isinstance(forward, ForwardRequest)
    assert orjson.loads(forward.body) == {**CHAT, "model": "mistral-small", "max_tokens": 100}


def test_vertex_wants_the_version_in_the_body_and_the_model_in_the_path() -> None:
    attempt = Attempt(TARGETS)
    way = itinerary("vertex-anthropic/claude-sonnet-4-5@20250929", dialect="anthropic-messages", written=False)
    (command,) = attempt.handle(asked("vertex-anthropic", way))
    assert set_by(command)[":path"].endswith("/publishers/anthropic/models/claude-sonnet-4-5@20250929:rawPredict")
    body = orjson.dumps({"model": "claude", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]})
    (forward,) = attempt.handle(RequestBody(body, True))
    assert isinstance(forward, ForwardRequest)
    sent = orjson.loads(forward.body)
    assert (sent["anthropic_version"], "model" in sent, sent["max_tokens"]) == ("vertex-2023-10-16", False, 5)


@pytest.mark.parametrize("provider", [None, "", "unknown"])
def test_a_provider_that_nobody_configured_is_no_provider(provider: str | None) -> None:
    with pytest.raises(ProtocolViolation):
        Attempt(TARGETS).handle(asked(provider, itinerary()))


@pytest.mark.parametrize("text", [None, "", "{}", "[1]"])
def test_without_an_itinerary_nothing_goes_on(text: str | None) -> None:
    with pytest.raises(ProtocolViolation):
        Attempt(TARGETS).handle(RequestHeaders((), False, "openai", text))


def test_without_a_key_nothing_is_sent() -> None:
    assert Attempt(TARGETS).handle(asked("mistral", itinerary("mistral/m"))) == [Reply(503, details="no_provider_key")]


def test_a_provider_that_the_policy_does_not_name_is_not_asked() -> None:
    assert Attempt(TARGETS).handle(asked("groq", itinerary("openai/gpt-4o"))) == [Reply(503, details="not_a_target")]


def test_the_key_is_the_one_of_the_moment() -> None:
    keys = iter(["old", "new"])
    targets = replace(TARGETS, key=lambda _: next(keys))
    sent = [Attempt(targets).handle(asked("openai", itinerary()))[0] for _ in range(2)]
    assert [set_by(command)["authorization"] for command in sent] == ["Bearer old", "Bearer new"]


@pytest.mark.parametrize(
    "event",
    [RequestBody(b"", True), ResponseHeaders((), False), TimerFired(), asked("openai", itinerary())],
    ids=lambda event: type(event).__name__,
)
def test_anything_else_breaks_the_order(event: Event) -> None:
    attempt = begun("openai", itinerary())
    with pytest.raises(ProtocolViolation):
        attempt.handle(event)


def test_a_close_changes_nothing() -> None:
    attempt = Attempt(TARGETS)
    assert attempt.handle(Closed()) == []
    assert attempt.state is State.ASKED


# The answer, translated -----------------------------------------------------------------------------------------------

CLAUDE = "anthropic/claude-sonnet-4-5"


def test_a_stream_comes_back_in_the_callers_dialect() -> None:
    attempt = begun("anthropic", itinerary(CLAUDE, stream=True))
    (command,) = answer(attempt, 200, SSE)
    assert isinstance(command, ContinueResponse)
    assert set_by(command)["content-type"].startswith("text/event-stream")
    assert "content-length" in command.remove_headers
    stream = b"".join(
        (
            STARTED,
            anthropics("content_block_start", index=0, content_block={"type": "text", "text": ""}),
            anthropics("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi."}),
            anthropics("content_block_stop", index=0),
            anthropics("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 4}),
            anthropics("message_stop"),
        )
    )
    out = b"".join(told(attempt.handle(ResponseBody(stream[i : i + 7], False))) for i in range(0, len(stream), 7))
    out += told(attempt.handle(ResponseBody(b"", True)))
    events = [orjson.loads(block[6:]) for block in out.split(b"\n\n") if block.startswith(b"data: {")]
    assert "".join(c["delta"].get("content") or "" for e in events for c in e["choices"]) == "Hi."
    assert [c["finish_reason"] for e in events for c in e["choices"]][-1] == "stop"
    assert events[-1]["usage"]["total_tokens"] == 13
    assert out.endswith(b"data: [DONE]\n\n")
    assert attempt.done


def test_a_stream_that_breaks_off_is_not_made_whole() -> None:
    attempt = begun("anthropic", itinerary(CLAUDE, stream=True))
    answer(attempt, 200, SSE)
    out = told(attempt.handle(ResponseBody(STARTED, False))) + told(attempt.handle(ResponseBody(b"", True)))
    assert b"[DONE]" not in out
    assert b'finish_reason":"' not in out


def test_an_event_without_end_breaks_the_stream_off() -> None:
    attempt = begun("anthropic", itinerary(CLAUDE, stream=True))
    answer(attempt, 200, SSE)
    out = told(attempt.handle(ResponseBody(b"data: " + b"x" * 9 * 2**20, False)))
    assert orjson.loads(out.removeprefix(b"data: "))["error"]["message"]
    assert told(attempt.handle(ResponseBody(b"more", True))) == b""


def test_a_whole_answer_waits_for_its_end() -> None:
    attempt = begun("anthropic", itinerary(CLAUDE))
    answer(attempt, 200, JSON, ("content-length", "1"))
    whole = orjson.dumps(
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "claude-sonnet-4-5",
            "content": [{"type": "text", "text": "Hi."}],
            "stop_reason": "end_turn",
            "usage": {"input_tokens": 9, "output_tokens": 4},
        }
    )
    assert told(attempt.handle(ResponseBody(whole[:50], False))) == b""
    written = orjson.loads(told(attempt.handle(ResponseBody(whole[50:], True))))
    assert (written["object"], written["choices"][0]["message"]["content"]) == ("chat.completion", "Hi.")


def test_an_answer_that_cannot_be_read_is_lost() -> None:
    """The gate is told, since the provider may bill for it."""
    attempt = begun("anthropic", itinerary(CLAUDE))
    answer(attempt, 200, JSON)
    (reply,) = attempt.handle(ResponseBody(b"<html>", True))
    assert isinstance(reply, Reply)
    assert (reply.status, reply.details) == (502, "unreadable_answer")
    assert reply.headers == (("x-tollgate-internal-flags", "UPE"),)


def test_an_error_that_came_as_a_success_is_an_error() -> None:
    attempt = begun("anthropic", itinerary(CLAUDE))
    answer(attempt, 200, JSON)
    body = orjson.dumps({"type": "error", "error": {"type": "api_error", "message": "It broke."}})
    assert attempt.handle(ResponseBody(body, True)) == [Reply(502, details="error_as_answer")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", [400, 429, 500, 529])
def test_an_error_keeps_its_status_and_gets_the_callers_shape(status: int, stream: bool) -> None:
    attempt = begun("anthropic", itinerary(CLAUDE, stream=stream))
    (command,) = answer(attempt, status, JSON, ("retry-after", "3"))
    assert isinstance(command, ContinueResponse)
    assert "retry-after" not in command.remove_headers
    assert set_by(command)[":status"] == str(status)
    assert told(attempt.handle(ResponseBody(b'{"type":"error","error":{"type":"api_error",', False))) == b""
    error = orjson.loads(told(attempt.handle(ResponseBody(b'"message":"It broke."}}', True))))["error"]
    assert error["message"] == "It broke."


@pytest.mark.parametrize("headers", [(JSON,), (SSE, ("content-encoding", "gzip"))], ids=["no stream", "compressed"])
def test_a_success_that_is_no_stream_does_not_pass_as_one(headers: tuple[tuple[str, str], ...]) -> None:
    attempt = begun("anthropic", itinerary(CLAUDE, stream=True))
    (command,) = answer(attempt, 200, *headers)
    assert set_by(command)[":status"] == "502"
    assert orjson.loads(told(attempt.handle(ResponseBody(b"\x1f\x8b", True))))["error"]


def test_an_empty_answer_is_left_to_the_gate() -> None:
    attempt = begun("anthropic", itinerary(CLAUDE))
    assert answer(attempt, 200, JSON, end=True) == [ContinueResponse()]
    assert attempt.done


def test_trailers_end_a_stream_and_break_a_whole_answer() -> None:
    stream = begun("anthropic", itinerary(CLAUDE, stream=True))
    answer(stream, 200, SSE)
    assert stream.handle(ResponseTrailers(("x",))) == [DropTrailers(("x",))]
    whole = begun("anthropic", itinerary(CLAUDE))
    answer(whole, 200, JSON)
    (reply,) = whole.handle(ResponseTrailers(("x",)))
    assert isinstance(reply, Reply)
    assert reply.details == "answer_in_trailers"


def test_an_array_for_a_caller_whose_provider_streams_events() -> None:
    array = Address("m", stream=True, array=True)
    way = itinerary(CLAUDE, dialect="gemini-generate", address=array, stream=True, written=False)
    body = orjson.dumps({"contents": [{"role": "user", "parts": [{"text": "hi"}]}]})
    attempt = begun("anthropic", way, body=body)
    (command,) = answer(attempt, 200, SSE)
    assert set_by(command)["content-type"] == "application/json"
    stream = (
        STARTED
        + anthropics("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hi."})
        + anthropics("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 4})
        + anthropics("message_stop")
    )
    out = told(attempt.handle(ResponseBody(stream, False))) + told(attempt.handle(ResponseBody(b"", True)))
    elements = orjson.loads(out)
    assert "".join(p["text"] for e in elements for c in e["candidates"] for p in c["content"]["parts"]) == "Hi."


# Headers that wait for the first event --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("provider", "way"),
    [
        pytest.param("anthropic", itinerary(CLAUDE, stream=True), id="translated"),
        pytest.param("anthropic", itinerary(CLAUDE, dialect="anthropic-messages", stream=True), id="native"),
    ],
)
def test_headers_wait_for_the_first_whole_event(provider: str, way: Itinerary) -> None:
    body = BODY if way.dialect == "openai-chat" else orjson.dumps({**CHAT, "max_tokens": 5})
    attempt = begun(provider, way, patient=True, body=body)
    assert answer(attempt, 200, SSE) == [AwaitMore(FIRST_EVENT_WAIT_MS)]
    assert attempt.handle(ResponseBody(b": waiting\n\n", False)) == []
    assert attempt.handle(ResponseBody(STARTED[:20], False)) == []
    first, *chunks = attempt.handle(ResponseBody(STARTED[20:], False))
    assert isinstance(first, ContinueResponse)
    assert [type(chunk) for chunk in chunks] == [ForwardChunk] * 3
    assert len(attempt.handle(ResponseBody(b"", True))) == 1
    assert attempt.done


@pytest.mark.parametrize("dialect", ["openai-chat", "anthropic-messages"])
def test_an_error_before_anything_else_is_an_errors_status(dialect: str) -> None:
    body = BODY if dialect == "openai-chat" else orjson.dumps({**CHAT, "max_tokens": 5})
    attempt = begun("anthropic", itinerary(CLAUDE, dialect=dialect, stream=True), patient=True, body=body)
    answer(attempt, 200, SSE)
    first, chunk = attempt.handle(ResponseBody(OVERLOADED, False))
    assert set_by(first) == {":status": "529", "content-type": "application/json"}
    assert told([chunk]) == b""
    error = orjson.loads(told(attempt.handle(ResponseBody(b"", True))))["error"]
    assert error["message"] == "Overloaded"


def test_an_arrays_first_element_is_its_first_event() -> None:
    way = itinerary("gemini/m", dialect="gemini-generate", address=Address("m", stream=True, array=True), stream=True)
    body = orjson.dumps({"contents": [{"role": "user", "parts": [{"text": "hi"}]}]})
    attempt = begun("gemini", way, patient=True, body=body)
    answer(attempt, 200, JSON)
    assert attempt.handle(ResponseBody(b'[{"candidates":', False)) == []
    assert attempt.handle(ResponseBody(b"[]}", False)) == [ContinueResponse(), ForwardChunk(), ForwardChunk()]
    failed = begun("gemini", way, patient=True, body=body)
    answer(failed, 200, JSON)
    first, *_ = failed.handle(
        ResponseBody(b'[{"error":{"code":503,"message":"Overloaded","status":"UNAVAILABLE"}}', False)
    )
    assert set_by(first)[":status"] == "503"


@pytest.mark.parametrize("native", [True, False])
def test_what_came_before_the_headers_went_on_is_answered_at_the_trailers_too(native: bool) -> None:
    way = itinerary("openai/gpt-4o" if native else CLAUDE, stream=True)
    attempt = begun("openai" if native else "anthropic", way, patient=True)
    answer(attempt, 200, SSE)
    assert attempt.handle(ResponseBody(b": waiting\n\n", False)) == []
    commands = attempt.handle(ResponseTrailers(("x",)))
    assert [type(command) for command in commands] == [ContinueResponse, ForwardChunk, DropTrailers]
    assert attempt.done


def test_a_first_event_that_is_too_long_goes_on_to_who_says_so() -> None:
    attempt = begun("openai", itinerary(stream=True), patient=True)
    answer(attempt, 200, SSE)
    commands = attempt.handle(ResponseBody(b"data: " + b"x" * MAX_EVENT_BYTES, False))
    assert commands == [ContinueResponse(), ForwardChunk()]


def test_only_a_streams_headers_wait() -> None:
    whole = begun("openai", itinerary(), patient=True)
    assert answer(whole, 200, JSON) == [ContinueResponse()]
    assert whole.handle(ResponseBody(b"{}", True)) == [ForwardChunk()]
    failed = begun("openai", itinerary(stream=True), patient=True)
    answer(failed, 200, SSE)
    assert [type(one) for one in failed.handle(ResponseBody(b"", True))] == [ContinueResponse, ForwardChunk]


def test_a_patient_chain_sends_the_body_as_the_gate_wrote_it() -> None:
    attempt = Attempt(TARGETS, patient=True)
    attempt.handle(asked("openai", itinerary(stream=True)))
    (forward,) = attempt.handle(RequestBody(BODY, True))
    assert isinstance(forward, ForwardRequest)
    assert forward.body == BODY
