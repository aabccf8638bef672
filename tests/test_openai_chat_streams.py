"""OpenAI's chat streams, to and from the canonical form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.lib.streaming.chat._types import ParsedChatCompletionSnapshot

from extproc import form
from extproc.dialects import pieces
from extproc.dialects.dialect import Seed
from extproc.dialects.openai_chat import OpenAIChat
from extproc.errors import ProviderError
from extproc.form import (
    Citation,
    Cited,
    Done,
    Failed,
    Finish,
    Finished,
    Logprobs,
    RefusalDelta,
    Started,
    StreamEvent,
    TextDelta,
    ThinkingDelta,
    ThinkingSigned,
    TokenLogprob,
    ToolArguments,
    ToolStarted,
    Unseen,
    Used,
)
from extproc.metering import StreamMeter
from extproc.records import Usage
from extproc.sse import SseParser
from tests.each import each_case
from tests.recordings import Case, chat_cases
from tests.test_openai_chat_answers import JSON
from tests.test_openai_chat_calls import client

CHAT = OpenAIChat()
OWN = "openai-chat"


def seed(choices: int | None = None) -> Seed:
    return Seed("0123456789abcdef", 1_700_000_000, form.Request("gpt-4o", (), choices=choices))


def events_of(chunks: Iterable[bytes], choices: int | None = None) -> list[StreamEvent]:
    parser, reader = SseParser(), CHAT.stream_reader(seed(choices))
    blocks = [block for chunk in chunks for block in parser.feed(chunk)]
    blocks += SseParser().feed(parser.finish() + b"\n\n")
    events = [event for block in blocks if block.data for event in reader.read(block.data)]
    return [*events, *reader.finish()]


def stream_of(events: Iterable[StreamEvent]) -> bytes:
    writer = CHAT.stream_writer(seed())
    return b"".join(writer.write(event) for event in events)


# --- Read -------------------------------------------------------------------------------------------------------------


def read(*events: Any, choices: int | None = None) -> list[StreamEvent]:
    """What these events say, after the first: how an answer begins is tried on its own."""
    began = {"id": "i", "model": "m", "choices": [{"index": 0, "delta": {"role": "assistant"}}]}
    reader = CHAT.stream_reader(seed(choices))
    assert reader.read(json.dumps(began).encode()) == [Started("i", "m")]
    said = [event for data in events for event in reader.read(json.dumps(data).encode())]
    assert reader.read(b"[DONE]") == [*_ending(said), Done()]
    return said


def _ending(said: list[StreamEvent]) -> list[StreamEvent]:
    called = any(isinstance(event, ToolStarted) for event in said)
    refused = any(isinstance(event, RefusalDelta) for event in said)
    return [Finished(0, Finish.TOOL_CALLS if called else Finish.REFUSAL if refused else Finish.STOP)]


def delta(fields: Any, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, **choice}]}


def piece(arguments: str | None = None, name: str | None = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    function = {field: value for field, value in function.items() if value is not None}
    return delta({"tool_calls": [{**fields, "function": function}]})


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
CLAUDES = {"type": "reasoning.text", "format": "anthropic-claude-v1", "index": 0}
SEALED = '{"type":"reasoning.text","format":"anthropic-claude-v1","signature":"s"}'
MISTRALS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "a"}]
CITED = {"type": "url_citation", "url_citation": {"url": "https://x", "title": "X"}}

EVENTS: dict[str, tuple[list[Any], list[StreamEvent]]] = {
    "text": ([delta({"content": "a"}), delta({"content": "b"})], [TextDelta(0, "a"), TextDelta(0, "b")]),
    "text with its role": ([delta({"role": "assistant", "content": "a"})], [TextDelta(0, "a")]),
    "nothing": ([delta({}), delta({"content": ""}), delta({"content": None, "tool_calls": None})], []),
    "refusal": ([delta({"refusal": "no"})], [RefusalDelta(0, "no")]),
    "thoughts": ([delta({"reasoning_content": "hm"}), delta({"reasoning": "hm"})], [ThinkingDelta(0, "hm")] * 2),
    "thoughts under every name": (
        [delta({"reasoning": "hm", "reasoning_content": "hm", "reasoning_details": [{**CLAUDES, "text": "hm"}]})],
        [ThinkingDelta(0, "hm")],
    ),
    "thoughts and their proof": (
        [
            delta({"reasoning": "hm", "reasoning_details": [{**CLAUDES, "text": "hm"}]}),
            delta({"reasoning_details": [{**CLAUDES, "signature": "s"}]}),
        ],
        [ThinkingDelta(0, "hm"), ThinkingSigned(0, SEALED, OWN)],
    ),
    "Mistral's parts": ([delta({"content": MISTRALS})], [ThinkingDelta(0, "hm"), TextDelta(0, "a")]),
    "calls, as OpenAI's": (
        [
            piece("", "f", index=0, id="c1"),
            piece('{"x"', index=0),
            piece(":1}", index=0),
            piece("", "g", index=1, id="c2"),
            piece("{}", index=1),
        ],
        [
            ToolStarted(0, 0, "c1", "f"),
            ToolArguments(0, 0, '{"x"'),
            ToolArguments(0, 0, ":1}"),
            ToolStarted(0, 1, "c2", "g"),
            ToolArguments(0, 1, "{}"),
        ],
    ),
    "calls, interleaved": (
        [piece("", "f", index=3, id="c1"), piece("", "g", index=1, id="c2"), piece("1", index=3), piece("2", index=1)],
        [
            ToolStarted(0, 0, "c1", "f"),
            ToolStarted(0, 1, "c2", "g"),
            ToolArguments(0, 0, "1"),
            ToolArguments(0, 1, "2"),
        ],
    ),
    "calls, whole and without an index (Mistral)": (
        [delta({"tool_calls": [{"id": "c1", "function": {"name": "f", "arguments": "1"}},
                               {"id": "c2", "function": {"name": "f", "arguments": "2"}}]})],
        [
            ToolStarted(0, 0, "c1", "f"),
            ToolArguments(0, 0, "1"),
            ToolStarted(0, 1, "c2", "f"),
            ToolArguments(0, 1, "2"),
        ],
    ),
    "a call without an index, in pieces": (
        [piece("1", "f", id="c1"), piece("2", id="c1"), piece("3")],
        [ToolStarted(0, 0, "c1", "f"), ToolArguments(0, 0, "1"), ToolArguments(0, 0, "2"), ToolArguments(0, 0, "3")],
    ),
    "a call that repeats its id and name": (
        [piece("1", "f", index=0, id="c1"), piece("2", "f", index=0, id="c1")],
        [ToolStarted(0, 0, "c1", "f"), ToolArguments(0, 0, "1"), ToolArguments(0, 0, "2")],
    ),
    "a call with another id at each piece": (
        [piece("1", "f", index=0, id="c1"), piece("2", index=0, id="c2")],
        [ToolStarted(0, 0, "c1", "f"), ToolArguments(0, 0, "1"), ToolArguments(0, 0, "2")],
    ),
    "calls of one index": (
        [piece("1", "f", index=0, id="c1"), piece("2", "g", index=0, id="c2")],
        [
            ToolStarted(0, 0, "c1", "f"),
            ToolArguments(0, 0, "1"),
            ToolStarted(0, 1, "c2", "g"),
            ToolArguments(0, 1, "2"),
        ],
    ),
    "calls without ids": (
        [piece("1", "f", index=0), piece("2", "g", index=1, id="")],
        [
            ToolStarted(0, 0, "call_0123456789ab_0", "f"),
            ToolArguments(0, 0, "1"),
            ToolStarted(0, 1, "call_0123456789ab_1", "g"),
            ToolArguments(0, 1, "2"),
        ],
    ),
    "calls without index and id": (
        [piece("1", "f"), piece("2"), piece("3", "g")],
        [
            ToolStarted(0, 0, "call_0123456789ab_0", "f"),
            ToolArguments(0, 0, "1"),
            ToolArguments(0, 0, "2"),
            ToolStarted(0, 1, "call_0123456789ab_1", "g"),
            ToolArguments(0, 1, "3"),
        ],
    ),
    "a call whose name comes late": (
        [piece("1", index=0, id="c1"), piece("2", "f", index=0)],
        [ToolStarted(0, 0, "c1", "f"), ToolArguments(0, 0, "12")],
    ),
    "a function's call": (
        [delta({"function_call": {"name": "f", "arguments": ""}}), delta({"function_call": {"arguments": "{}"}})],
        [ToolStarted(0, 0, "call_0123456789ab_0", "f"), ToolArguments(0, 0, "{}")],
    ),
    "sound": ([delta({"audio": {"data": "AAAA", "transcript": "hi"}})], [Unseen("hi")]),
    "logprobs": (
        [delta({"content": "a"}, logprobs={"content": [{"token": "a", "logprob": -1, "top_logprobs": []}]})],
        [TextDelta(0, "a"), Logprobs(0, (TokenLogprob("a", -1.0),))],
    ),
    "logprobs that are none": ([delta({"content": "a"}, logprobs=-1.5)], [TextDelta(0, "a")]),
    "sources, repeated": (
        [delta({"annotations": [CITED]}), delta({"annotations": [CITED]})],
        [Cited(0, Citation("https://x", "X"))],
    ),
    "Perplexity's sources": (
        [{**delta({"content": "a"}), "citations": ["https://x"]}, {**delta({}), "citations": ["https://x", "https://y"]}],
        [TextDelta(0, "a"), Cited(0, Citation("https://x")), Cited(0, Citation("https://y"))],
    ),
    "figures alone": ([{"choices": [], "usage": USAGE}], [Used(Usage(3, 4))]),
    "figures with every piece": (
        [{**delta({"content": "a"}), "usage": USAGE, "service_tier": "flex"}],
        [TextDelta(0, "a"), Used(Usage(3, 4), "flex")],
    ),
    "Mistral's tier": ([{"choices": [], "usage": {**USAGE, "service_tier": "x"}}], [Used(Usage(3, 4), "x")]),
    "Groq's figures": ([{"choices": [], "x_groq": {"usage": USAGE}}], [Used(Usage(3, 4))]),
    "moderation, at the end": ([{"choices": [], "moderation": {}}], []),
    "the whole message beside each piece": (
        [delta({"content": "b"}, message={"role": "assistant", "content": "ab"})],
        [TextDelta(0, "b")],
    ),
    "wrong types": ([{"choices": [7, {"delta": 7}, {"index": "0", "delta": {"content": 7}}], "usage": 7}], []),
    "no object": ([[1], 7, None, "x"], []),
}  # fmt: skip


@pytest.mark.parametrize(("events", "expected"), EVENTS.values(), ids=EVENTS)
def test_read(events: list[Any], expected: list[StreamEvent]) -> None:
    assert read(*events) == expected


def test_a_choice_that_is_out_of_bounds_is_the_first() -> None:
    assert read({"choices": [{"index": 10**9, "delta": {"content": "a"}}]}) == [TextDelta(0, "a")]


def test_the_first_event_of_azures_is_no_beginning() -> None:
    reader = CHAT.stream_reader(seed())
    assert reader.read(b'{"id":"","model":"","choices":[],"prompt_filter_results":[]}') == []
    first = {"id": "i", "model": "gpt-4o-2024", "service_tier": "default", **delta({"content": "a"})}
    assert reader.read(json.dumps(first).encode()) == [
        Started("i", "gpt-4o-2024", None, "default"),
        TextDelta(0, "a"),
    ]


def ended(*events: Any, choices: int | None = None) -> list[StreamEvent]:
    """How a stream of these events ends that has no closing event."""
    reader = CHAT.stream_reader(seed(choices))
    for event in events:
        reader.read(json.dumps(event).encode())
    return list(reader.finish())


STOP = delta({}, finish_reason="stop")
SECOND = {"choices": [{"index": 1, "delta": {}, "finish_reason": "length"}]}

ENDS: dict[str, tuple[list[Any], int | None, list[StreamEvent]]] = {
    "finished": ([delta({"content": "a"}), STOP], None, [Finished(0, Finish.STOP), Done()]),
    "finished twice": ([STOP, STOP], None, [Finished(0, Finish.STOP), Done()]),
    "finished after each call": (
        [piece("{}", "f", index=0), delta({}, finish_reason="tool_calls"), piece("{}", "g", index=1)],
        None,
        [Finished(0, Finish.TOOL_CALLS), Done()],
    ),
    "not finished": ([delta({"content": "a"})], None, []),
    "nothing has come": ([], None, []),
    "one of two": ([STOP], 2, []),
    "one of two has not finished": ([STOP, {"choices": [{"index": 1, "delta": {}}]}], None, []),
    "both": ([STOP, SECOND], 2, [Finished(0, Finish.STOP), Finished(1, Finish.LENGTH), Done()]),
    "an error": ([STOP, {"error": {"message": "no"}}], None, []),
}


@pytest.mark.parametrize(("events", "choices", "expected"), ENDS.values(), ids=ENDS)
def test_end(events: list[Any], choices: int | None, expected: list[StreamEvent]) -> None:
    assert ended(*events, choices=choices) == expected


def test_the_closing_event_ends_what_nobody_finished() -> None:
    reader = CHAT.stream_reader(seed())
    assert reader.read(b"[DONE]") == [Started(None, None), Finished(0, Finish.STOP), Done()]
    assert reader.read(json.dumps(delta({"content": "late"})).encode()) == ()
    assert reader.finish() == ()


FAILURES: dict[str, tuple[dict[str, Any], tuple[int, str, str]]] = {
    "OpenRouter's": ({"error": {"code": 502, "message": "no"}, "choices": []}, (502, "502", "no")),
    "Groq's": (
        {"error": {"message": "no", "type": "invalid_request_error", "code": "tool_use_failed"}},
        (400, "tool_use_failed", "no"),
    ),
    "OpenAI's": ({"error": {"message": "no", "type": "server_error", "code": None}}, (500, "upstream_error", "no")),
    "a limit": ({"error": {"message": "no", "code": "rate_limit_exceeded"}}, (429, "rate_limit_exceeded", "no")),
    "a text": ({"error": "no"}, (500, "upstream_error", "no")),
    "vLLM's": ({"object": "error", "message": "no", "code": 400}, (400, "400", "no")),
}


@pytest.mark.parametrize(("event", "expected"), FAILURES.values(), ids=FAILURES)
def test_failure(event: dict[str, Any], expected: tuple[int, str, str]) -> None:
    reader = CHAT.stream_reader(seed())
    data = json.dumps(event).encode()
    (failed,) = reader.read(data)
    assert isinstance(failed, Failed)
    assert (failed.error.status, failed.error.code, failed.error.message) == expected
    assert CHAT.piece_reader()(data).error
    assert (reader.read(b"[DONE]"), reader.finish()) == ((), ())


def test_an_error_does_not_hide_what_came_with_it() -> None:
    event = {**delta({"content": "a"}, finish_reason="error"), "error": {"message": "no"}, "usage": USAGE}
    events = CHAT.stream_reader(seed()).read(json.dumps(event).encode())
    assert list(events[:-1]) == [Started(None, None), TextDelta(0, "a"), Used(Usage(3, 4))]


@given(st.lists(st.binary() | JSON.map(lambda value: json.dumps({"choices": [value, value]}).encode())))
def test_any_bytes_are_read(events: list[bytes]) -> None:
    reader, writer = CHAT.stream_reader(seed()), CHAT.stream_writer(seed())
    told = [event for data in events for event in (*reader.read(data), *CHAT.stream_reader(seed()).read(data))]
    again = SseParser().feed(b"".join(map(writer.write, [*told, *reader.finish()])))
    assert all(block.data is not None for block in again)


# --- Written ----------------------------------------------------------------------------------------------------------

FIGURES = Usage(10, 5, cached_prompt=4, reasoning=2, cache_write_prompt=3, web_searches=1)
HEAD = {"id": "msg_1", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "claude"}


def chunks_of(*events: StreamEvent) -> list[Any]:
    """The data of what these events become after the first."""
    blocks = SseParser().feed(stream_of([Started("msg_1", "claude"), *events]))
    said = [block.data.decode() if block.data == b"[DONE]" else json.loads(block.data or b"") for block in blocks]
    assert said[0] == {**HEAD, **delta({"role": "assistant", "content": ""}, finish_reason=None)}
    return [
        {name: value for name, value in chunk.items() if name not in HEAD} if isinstance(chunk, dict) else chunk
        for chunk in said[1:]
    ]


def chunk(fields: Any, **choice: Any) -> dict[str, Any]:
    return delta(fields, **{"finish_reason": None, **choice})


def calling(**call: Any) -> dict[str, Any]:
    return chunk({"tool_calls": [{"index": 0, **call}]})


def proof(**entry: Any) -> dict[str, Any]:
    return chunk({"reasoning_details": [entry]})


def thought(text: str, index: int = 0) -> dict[str, Any]:
    entry = {"type": "reasoning.text", "index": index, "text": text}
    return chunk({"reasoning_content": text, "reasoning_details": [entry]})


SIGNED = {"type": "reasoning.text", "signature": "s", "format": "anthropic-claude-v1", "index": 0}

WRITTEN: dict[str, tuple[list[StreamEvent], list[Any]]] = {
    "text": ([TextDelta(0, 'a"\n')], [chunk({"content": 'a"\n'})]),
    "half a surrogate pair": ([TextDelta(0, "\ud83d")], [chunk({"content": "\ud83d"})]),
    "refusal": ([RefusalDelta(0, "no")], [chunk({"refusal": "no"})]),
    "a call": (
        [ToolStarted(0, 0, "c1", "f"), ToolArguments(0, 0, "{}")],
        [
            calling(id="c1", type="function", function={"name": "f", "arguments": ""}),
            calling(function={"arguments": "{}"}),
        ],
    ),
    "thoughts": (
        [ThinkingDelta(0, "a"), ThinkingDelta(0, "b"), ThinkingSigned(0, "s", "anthropic-messages"), TextDelta(0, "c")],
        [thought("a"), thought("b"), proof(**SIGNED), chunk({"content": "c"})],
    ),
    "two blocks of thoughts": (
        [
            ThinkingDelta(0, "a"),
            ThinkingSigned(0, "s", "anthropic-messages"),
            ThinkingDelta(0, "b"),
            ThinkingSigned(0, "t", "anthropic-messages"),
            TextDelta(0, "c"),
        ],
        [
            thought("a"),
            proof(**SIGNED),
            thought("b", 1),
            proof(**{**SIGNED, "signature": "t", "index": 1}),
            chunk({"content": "c"}),
        ],
    ),
    "thoughts that are not shown": (
        [ThinkingSigned(0, "r", "anthropic-messages", redacted=True), TextDelta(0, "a")],
        [proof(type="reasoning.encrypted", data="r", format="anthropic-claude-v1", index=0), chunk({"content": "a"})],
    ),
    "a call's own proof": (
        [ThinkingSigned(0, "g", "gemini"), ToolStarted(0, 0, "c1", "f")],
        [
            proof(type="reasoning.encrypted", data="g", format="google-gemini-v1", index=0, id="c1"),
            calling(id="c1", type="function", function={"name": "f", "arguments": ""}),
        ],
    ),
    "a proof of its own": (
        [ThinkingDelta(0, "hm"), ThinkingSigned(0, SEALED, OWN), Finished(0, Finish.STOP)],
        [thought("hm"), proof(**{**CLAUDES, "signature": "s"}), chunk({}, finish_reason="stop")],
    ),
    "sources": (
        [Cited(0, Citation("https://x", "X", "q", 0, 1)), Cited(0, Citation(title="Y"))],
        [
            chunk({"annotations": [
                {"index": 0, "type": "url_citation", "url_citation": {
                    "url": "https://x", "title": "X", "content": "q", "start_index": 0, "end_index": 1}}]}),
            chunk({"annotations": [{"index": 1, "type": "url_citation", "url_citation": {"url": "", "title": "Y"}}]}),
        ],
    ),
    "logprobs": (
        [Logprobs(0, (TokenLogprob("a", -1.0),))],
        [chunk({}, logprobs={
            "content": [{"token": "a", "logprob": -1.0, "bytes": None, "top_logprobs": []}], "refusal": None})],
    ),
    "an end": ([Finished(0, Finish.LENGTH)], [chunk({}, finish_reason="length")]),
    "an end after a refusal": (
        [RefusalDelta(0, "no"), Finished(0, Finish.REFUSAL)],
        [chunk({"refusal": "no"}), chunk({}, finish_reason="stop", native_finish_reason="refusal")],
    ),
    "an end by a sequence": (
        [Finished(0, Finish.STOP_SEQUENCE, "END")],
        [chunk({}, finish_reason="stop", stop_reason="END")],
    ),
    "choices begin in their order": (
        [TextDelta(2, "a")],
        [
            chunk({"role": "assistant", "content": ""}, index=1),
            chunk({"role": "assistant", "content": ""}, index=2),
            chunk({"content": "a"}, index=2),
        ],
    ),
    "the last figures, at the end": (
        [Used(Usage(1, 1)), TextDelta(0, "a"), Used(FIGURES, "priority"), Done()],
        [
            chunk({"content": "a"}),
            {
                "choices": [],
                "service_tier": "priority",
                "usage": {
                    "prompt_tokens": 10,
                    "completion_tokens": 5,
                    "total_tokens": 15,
                    "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3, "audio_tokens": 0},
                    "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 0},
                    "server_tool_use_details": {"web_search_requests": 1},
                },
            },
            "[DONE]",
        ],
    ),
    "no figures": ([Done()], ["[DONE]"]),
    "what no caller can see": ([Unseen("x")], []),
}  # fmt: skip


@pytest.mark.parametrize(("events", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_written(events: list[StreamEvent], expected: list[Any]) -> None:
    assert chunks_of(*events) == expected


def test_a_stream_that_broke_off_is_not_closed() -> None:
    error = ProviderError("Overloaded", status=529)
    *_, failure = chunks_of(Used(FIGURES), TextDelta(0, "a"), Failed(error))
    assert failure["error"] == {
        "message": "Overloaded",
        "type": "overloaded_error",
        "param": None,
        "code": "upstream_error",
    }
    piece_ = CHAT.piece_reader()(json.dumps(failure).encode())
    assert (piece_.error, piece_.usage, piece_.usage_only) == (True, FIGURES, False)
    assert b"[DONE]" not in stream_of([Started("i", "m"), TextDelta(0, "a"), Failed(error)])


def test_the_figures_can_be_kept_from_the_caller() -> None:
    meter = StreamMeter(CHAT, len, 1.0)
    metered = meter.feed(
        stream_of([Started("i", "m"), TextDelta(0, "a"), Used(FIGURES), Finished(0, Finish.STOP), Done()])
    )
    assert [event.hidden for event in metered] == [False, False, False, True, False]
    assert (meter.usage, meter.complete) == (FIGURES, True)


# --- The official client ----------------------------------------------------------------------------------------------


def accumulated(body: bytes) -> ParsedChatCompletionSnapshot:
    chat = client(200, "text/event-stream", body).chat.completions
    with chat.stream(model="m", messages=[{"role": "user", "content": "x"}]) as stream:
        for _ in stream:
            pass
        return stream.current_completion_snapshot


TOLD: list[StreamEvent] = [
    Started("msg_1", "claude", Usage(10, 1), "priority"),
    ThinkingDelta(0, "h"),
    ThinkingDelta(0, "m"),
    ThinkingSigned(0, "s", "anthropic-messages"),
    ThinkingSigned(0, "r", "anthropic-messages", redacted=True),
    TextDelta(0, "see "),
    TextDelta(1, "other"),
    TextDelta(0, "this"),
    Cited(0, Citation("https://x", "X")),
    Cited(0, Citation("https://y", "Y")),
    Logprobs(0, (TokenLogprob("a", -0.5, (TokenLogprob("b", -1.0),)),)),
    Logprobs(0, (TokenLogprob("c", -0.5),)),
    ToolStarted(0, 0, "c1", "f"),
    ToolArguments(0, 0, '{"x":'),
    ThinkingSigned(0, "g", "gemini"),
    ToolStarted(0, 1, "c2", "g"),
    ToolArguments(0, 1, "{"),
    ToolArguments(0, 0, " 1.0}"),
    ToolArguments(0, 1, "}"),
    Finished(1, Finish.LENGTH),
    Finished(0, Finish.TOOL_CALLS),
    Used(FIGURES),
    Done(),
]


def test_the_official_clients_helper_accumulates_it() -> None:
    completion = accumulated(stream_of(TOLD))
    first, second = completion.choices
    assert (completion.id, completion.model, completion.service_tier) == ("msg_1", "claude", "priority")
    assert (first.finish_reason, second.finish_reason) == ("tool_calls", "length")
    assert (first.message.role, first.message.content, second.message.content) == ("assistant", "see this", "other")
    assert first.message.tool_calls is not None
    calls = [(one.id, one.function.name, one.function.arguments) for one in first.message.tool_calls]
    assert calls == [("c1", "f", '{"x": 1.0}'), ("c2", "g", "{}")]
    assert first.logprobs is not None
    assert [token.token for token in first.logprobs.content or ()] == ["a", "c"]
    assert completion.usage is not None
    assert completion.usage.completion_tokens == 5
    assert [one.url_citation.url for one in first.message.annotations or ()] == ["https://x", "https://y"]


def test_the_accumulated_message_comes_back_as_it_was() -> None:
    """A caller sends on what the helper gave it: thoughts with their proofs, and in their places."""
    message = accumulated(stream_of(TOLD)).choices[0].message.model_dump(exclude_none=True, exclude={"parsed"})
    request = CHAT.read_request({"model": "m", "messages": [message]})
    assert request.messages[0].parts == (
        form.Thinking("hm", "s", "anthropic-messages"),
        form.Thinking("", "r", "anthropic-messages", redacted=True),
        form.Text("see this"),
        form.ToolCall("c1", "f", '{"x": 1.0}'),
        form.Thinking("", "g", "gemini"),
        form.ToolCall("c2", "g", "{}"),
    )


def test_the_official_client_raises_where_it_broke_off() -> None:
    body = stream_of([Started("i", "m"), TextDelta(0, "a"), Failed(ProviderError("Overloaded", status=529))])
    with pytest.raises(openai.APIError, match="Overloaded"):
        accumulated(body)


# --- Recorded ---------------------------------------------------------------------------------------------------------

STREAMS = [case for case in chat_cases(True) if case.status == 200]


def choices_asked(case: Case) -> int:
    return (case.request or {}).get("n") or 1


def _by_hand(case: Case) -> dict[str, Any]:
    """What a stream says, by the names that its provider gives it."""
    lines = [line[5:].strip() for line in case.body.splitlines() if line.startswith(b"data:")]
    told = [json.loads(line) for line in lines if line not in (b"[DONE]", b"")]
    deltas = [
        (choice["index"], choice["delta"])
        for event in told
        for choice in event.get("choices") or ()
        if isinstance(choice.get("delta"), dict)
    ]
    text, thinking, refusal = "", "", ""
    calls: list[list[str]] = []
    begun: dict[Any, list[str]] = {}  # the last call of each index
    for index, fields in sorted(deltas, key=lambda one: one[0]):
        content = fields.get("content") or ""
        parts: list[dict[str, Any]] = content if isinstance(content, list) else [{"text": content}]
        text += "".join(part.get("text", "") for part in parts)
        said = fields.get("reasoning_content") or fields.get("reasoning")
        details = [part["text"] for part in fields.get("reasoning_details") or () if part.get("text")]
        inner = [one["text"] for part in parts for one in part.get("thinking", ())]
        thinking += said or "".join([*details, *inner])
        refusal += fields.get("refusal") or ""
        for call in fields.get("tool_calls") or ():
            key = index, call.get("index", call.get("id"))
            if name := call["function"].get("name"):
                begun[key] = [name, ""]
                calls.append(begun[key])
            begun[key][1] += call["function"].get("arguments") or ""
    return {
        "text": text,
        "thinking": thinking,
        "refusal": refusal,
        "calls": [tuple(call) for call in calls],
    }


def _said(events: Iterable[StreamEvent]) -> dict[str, Any]:
    of_choices: list[Any] = [event for event in events if hasattr(event, "choice")]
    ordered = sorted(of_choices, key=lambda event: event.choice)

    def joined(kind: type[TextDelta] | type[ThinkingDelta] | type[RefusalDelta]) -> str:
        return "".join(event.text for event in ordered if isinstance(event, kind))

    arguments: dict[tuple[int, int], str] = {}
    for event in ordered:
        if isinstance(event, ToolArguments):
            arguments[event.choice, event.call] = arguments.get((event.choice, event.call), "") + event.json
    return {
        "text": joined(TextDelta),
        "thinking": joined(ThinkingDelta),
        "refusal": joined(RefusalDelta),
        "calls": [
            (event.name, arguments.get((event.choice, event.call), ""))
            for event in ordered
            if isinstance(event, ToolStarted)
        ],
    }


def _told(events: Iterable[StreamEvent]) -> list[Any]:
    """All but what the writer moves, or has no place for. Errors are equal to themselves only."""
    kept = (event for event in events if not isinstance(event, Used | Unseen | Started))
    return [str(event.error) if isinstance(event, Failed) else event for event in kept]


def _figures(events: Iterable[StreamEvent]) -> Usage | None:
    return next((event.usage for event in reversed(list(events)) if isinstance(event, Used)), None)


@each_case(STREAMS)
def test_recorded_stream(case: Case) -> None:
    events = events_of([case.body], choices_asked(case))
    for chunks in (case.recorded_chunks(), case.random_chunks(1), case.random_chunks(2, largest=3)):
        assert list(map(str, events_of(chunks, choices_asked(case)))) == list(map(str, events))
    assert _said(events) == _by_hand(case)
    assert [type(event) for event in events].count(Started) == 1
    assert isinstance(events[0], Started)
    assert isinstance(events[-1], Done) == case.complete
    usage = _figures(events)
    assert (usage and (usage.prompt, usage.completion)) == case.billed
    meter = StreamMeter(CHAT, len, 1.0, choices=choices_asked(case))
    meter.feed(case.body)
    meter.finish()
    assert (usage, len("".join(pieces.piece(events).texts))) == (meter.usage, meter.counted)


@each_case(STREAMS)
def test_recorded_stream_written(case: Case) -> None:
    """What is written says the same again, to this reader and to the official client."""
    events = events_of([case.body], choices_asked(case))
    body = stream_of(events)
    again = events_of([body], choices_asked(case))
    assert _told(again) == _told(events)
    failed = any(isinstance(event, Failed) for event in events)
    assert _figures(again) == _figures(events) or (not case.complete and not failed)
    if case.complete:
        said = _said(events)
        completion = accumulated(body)
        messages = [choice.message for choice in completion.choices]
        assert "".join(message.content or "" for message in messages) == said["text"]
        assert "".join(message.refusal or "" for message in messages) == said["refusal"]
        calls = [one.function for message in messages for one in message.tool_calls or ()]
        assert [(one.name, one.arguments) for one in calls] == said["calls"]
        finishes = [choice.finish_reason for choice in completion.choices]
        assert finishes == [choice.finish_reason for choice in accumulated(stream_of(again)).choices]
        assert None not in finishes
