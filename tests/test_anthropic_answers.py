"""Anthropic's answers and streams, to and from the canonical form."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import anthropic
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import form
from extproc.dialects import pieces
from extproc.dialects.anthropic import AnthropicMessages
from extproc.dialects.anthropic.answers import read_usage, write_usage
from extproc.dialects.dialect import Seed
from extproc.errors import ProviderError
from extproc.form import Answer, Choice, Citation, Finish, Part, Refusal, Text, Thinking, ToolCall
from extproc.metering import StreamMeter
from extproc.records import Piece, Usage
from extproc.sse import SseParser
from tests.each import each_case
from tests.recordings import Case, protocol_cases

CLAUDE = AnthropicMessages()
OWN = "anthropic-messages"
SEED = Seed("0123456789abcdef", 1_700_000_000, form.Request("claude-sonnet-4-5", ()))
E = TypeVar("E")

# What was sampled beside the answer is billed, and is only in `iterations`: (prompt, completion, cached).
BESIDE = {
    "anthropic/messages-json-claude-sonnet-4-6-long-output-02": (2414 + 2728, 3200 + 874, 0),  # an adviser
    "anthropic/messages-stream-claude-opus-4-6-long-output-01": (
        612 + 60385,
        2819 + 522,
        0,
    ),  # a long context, summed up
    "anthropic/messages-stream-claude-sonnet-4-6-04": (181 + 100 + 55096, 8 + 83, 55096),  # likewise
}


def billed(case: Case) -> tuple[int, int, int, int, int]:
    """(prompt, completion, cached, written to the cache, reasoning), from the recording's description."""
    usage = case.usage
    cached, created = usage.get("cached", 0), usage.get("cache_creation", 0)
    prompt, completion, cached = BESIDE.get(case.name, (usage["input"] + cached + created, usage["output"], cached))
    return prompt, completion, cached, created, usage.get("reasoning", 0)


def figures(usage: Usage | None) -> tuple[int, int, int, int, int]:
    assert usage is not None
    return usage.prompt, usage.completion, usage.cached_prompt, usage.cache_write_prompt, usage.reasoning


# --- Streams: what is read --------------------------------------------------------------------------------------------


def events_of(chunks: Iterable[bytes]) -> list[form.StreamEvent]:
    parser, reader = SseParser(), CLAUDE.stream_reader(SEED)
    blocks = [block for chunk in chunks for block in parser.feed(chunk)]
    blocks += SseParser().feed(parser.finish() + b"\n\n")
    events = [event for block in blocks if block.data for event in reader.read(block.data)]
    return [*events, *reader.finish()]


def stream_of(events: Iterable[form.StreamEvent]) -> bytes:
    writer = CLAUDE.stream_writer(SEED)
    return b"".join(writer.write(event) for event in events)


def said(events: Iterable[form.StreamEvent], kind: type[form.TextDelta] | type[form.ThinkingDelta]) -> str:
    return "".join(event.text for event in events if isinstance(event, kind))


def calls(events: Iterable[form.StreamEvent]) -> list[tuple[str, str, Any]]:
    begun: dict[int, form.ToolStarted] = {}
    arguments: dict[int, str] = {}
    for event in events:
        if isinstance(event, form.ToolStarted):
            begun[event.call] = event
        elif isinstance(event, form.ToolArguments):
            arguments[event.call] = arguments.get(event.call, "") + event.json
    return [(one.id, one.name, json.loads(arguments[call] or "{}")) for call, one in begun.items()]


def last(events: Sequence[form.StreamEvent], kind: type[E]) -> E | None:
    return next((event for event in reversed(events) if isinstance(event, kind)), None)


STREAMS = protocol_cases("anthropic-messages", True)


@each_case(STREAMS)
def test_recorded_stream(case: Case) -> None:
    events = events_of([case.body])
    for chunks in (case.recorded_chunks(), case.random_chunks(1), case.random_chunks(2, largest=3)):
        assert list(map(repr, events_of(chunks))) == list(map(repr, events))  # errors are equal to themselves only
    used = last(events, form.Used)
    started = last(events, form.Started)
    usage = used.usage if used else started and started.usage
    assert figures(usage) == billed(case)
    assert isinstance(events[-1], form.Done if case.complete else form.Failed)
    expected = _by_hand(case)
    assert said(events, form.TextDelta) == expected["text"]
    assert said(events, form.ThinkingDelta) == expected["thinking"]
    if case.complete:
        assert calls(events) == expected["calls"]
        assert len(expected["calls"]) == case.meta["tool_calls"]


def _by_hand(case: Case) -> dict[str, Any]:
    """What the stream says, by its deltas' own types and the order of its blocks."""
    lines = [line[5:].strip() for line in case.body.split(b"\n") if line.startswith(b"data:")]
    told = [json.loads(line) for line in lines]
    blocks = {one["index"]: one["content_block"] for one in told if one["type"] == "content_block_start"}
    deltas = [(one["index"], one["delta"]) for one in told if one["type"] == "content_block_delta"]

    def joined(index: int) -> str:
        return "".join(delta.get("partial_json", "") for of, delta in deltas if of == index)

    return {
        "text": "".join(delta["text"] for _, delta in deltas if delta["type"] == "text_delta"),
        "thinking": "".join(delta["thinking"] for _, delta in deltas if delta["type"] == "thinking_delta"),
        "calls": [
            (block["id"], block["name"], json.loads(joined(index) or "{}"))
            for index, block in blocks.items()
            if case.complete and block["type"] == "tool_use"
        ],
    }


def client(status: int, content_type: str, body: bytes) -> anthropic.Anthropic:
    answer = httpx2.Response(status, headers={"content-type": content_type}, content=body)
    transport = httpx2.MockTransport(lambda _: answer)
    return anthropic.Anthropic(api_key="x", max_retries=0, http_client=httpx2.Client(transport=transport))


def final_message(body: bytes) -> dict[str, Any]:
    """A stream, as the official client puts it together."""
    asking = client(200, "text/event-stream", body)
    with asking.messages.stream(model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}]) as stream:
        return stream.get_final_message().model_dump(warnings=False)


@each_case([case for case in STREAMS if case.complete])
def test_recorded_stream_written_again(case: Case) -> None:
    events = events_of([case.body])
    again = stream_of(events)
    read = events_of([again])
    assert said(read, form.TextDelta) == said(events, form.TextDelta)
    assert said(read, form.ThinkingDelta) == said(events, form.ThinkingDelta)
    assert calls(read) == calls(events)
    for kind in (form.Finished, form.Used):
        assert last(read, kind) == last(events, kind)
    kept = (form.ThinkingSigned, form.Cited, form.RefusalDelta, form.Started, form.Done)
    assert [event for event in read if isinstance(event, kept)] == [
        event for event in events if isinstance(event, kept)
    ]
    _assert_one_block_after_the_other(again)
    _assert_same_message(final_message(again), final_message(case.body))


def _assert_one_block_after_the_other(body: bytes) -> None:
    told = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: ")]
    assert [one["type"] for one in (told[0], *told[-2:])] == ["message_start", "message_delta", "message_stop"]
    open_block, begun = None, 0
    for one in told[1:-2]:
        if one["type"] == "content_block_start":
            assert (open_block, one["index"]) == (None, begun)
            open_block, begun = one["index"], begun + 1
        elif one["type"] == "content_block_delta":
            assert one["index"] == open_block
        else:
            assert (one["type"], one["index"]) == ("content_block_stop", open_block)
            open_block = None
    assert open_block is None


def _assert_same_message(again: dict[str, Any], first: dict[str, Any]) -> None:
    assert {**again, "content": None, "usage": None, "container": None, "stop_details": None} == {
        **first, "content": None, "usage": None, "container": None, "stop_details": None,
    }  # fmt: skip
    for kind, name in (("text", "text"), ("thinking", "thinking"), ("tool_use", "input")):
        texts, expected = (
            [block[name] for block in message["content"] if block["type"] == kind] for message in (again, first)
        )
        assert (texts if kind == "tool_use" else "".join(texts)) == (
            expected if kind == "tool_use" else "".join(expected)
        )


@each_case(STREAMS)
def test_recorded_stream_is_metered_alike_when_it_was_written_again(case: Case) -> None:
    first, again = StreamMeter(CLAUDE, len, 1.0), StreamMeter(CLAUDE, len, 1.0)
    events = events_of([case.body])
    first.feed(case.body)
    again.feed(stream_of(events))
    unseen = sum(len(event.text) for event in events if isinstance(event, form.Unseen))
    assert (again.usage, again.complete, again.errored) == (first.usage, first.complete, first.errored)
    assert again.counted == first.counted - unseen
    assert first.counted >= case.meta["text_chars"] + case.meta["thinking_chars"]


def event(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def started(**usage: Any) -> bytes:
    return event(type="message_start", message={"id": "msg_1", "model": "m", "usage": usage})


def read_all(*data: bytes) -> list[form.StreamEvent]:
    reader = CLAUDE.stream_reader(SEED)
    return [said for one in data for said in reader.read(one)]


def block(index: int = 0, **fields: Any) -> bytes:
    return event(type="content_block_start", index=index, content_block=fields)


def delta(**fields: Any) -> bytes:
    return event(type="content_block_delta", index=0, delta=fields)


STOP = event(type="content_block_stop", index=0)

READ: dict[str, tuple[list[bytes], list[form.StreamEvent]]] = {
    "ping": ([event(type="ping")], []),
    "to come": ([event(type="hologram"), delta(type="hologram_delta", text="x"), block(type="hologram")], []),
    "done": ([event(type="message_stop")], [form.Done()]),
    "text at once": (
        [block(type="text", text="a"), delta(type="text_delta", text="b")],
        [form.TextDelta(0, "a"), form.TextDelta(0, "b")],
    ),
    "input at once": (
        [block(type="tool_use", id="t", name="f", input={"a": 1}), STOP],
        [form.ToolStarted(0, 0, "t", "f"), form.ToolArguments(0, 0, '{"a":1}')],
    ),
    "input in pieces": (
        [block(type="tool_use", id="t", name="f", input={}), delta(type="input_json_delta", partial_json="{}"), STOP],
        [form.ToolStarted(0, 0, "t", "f"), form.ToolArguments(0, 0, "{}")],
    ),
    "a call of nothing": (
        [block(type="tool_use", id="t", name="f", input={}), delta(type="input_json_delta", partial_json=""), STOP],
        [form.ToolStarted(0, 0, "t", "f"), form.ToolArguments(0, 0, "{}")],
    ),
    "signed thinking": (
        [
            block(type="thinking", thinking=""),
            delta(type="thinking_delta", thinking="hm"),
            delta(type="signature_delta", signature="s"),
            STOP,
        ],
        [form.ThinkingDelta(0, "hm"), form.ThinkingSigned(0, "s", OWN)],
    ),
    "hidden thinking": (
        [block(type="thinking", thinking="", signature="s"), STOP],
        [form.ThinkingSigned(0, "s", OWN)],
    ),
    "redacted thinking": ([block(type="redacted_thinking", data="s"), STOP], [form.ThinkingSigned(0, "s", OWN, True)]),
    "a search of the provider's": (
        [
            block(type="server_tool_use", name="web_search", input={}),
            delta(type="input_json_delta", partial_json='{"q":1}'),
            STOP,
            block(type="web_search_tool_result", content=[{"type": "web_search_result", "title": "not the model's"}]),
            STOP,
        ],
        [form.Unseen("web_search"), form.Unseen('{"q":1}')],
    ),
    "a citation's framing": (
        [block(type="text", text=""), delta(type="citations_delta", citation={"type": "x"}), STOP],
        [form.Unseen(""), form.Cited(0, Citation())],
    ),
    "compaction": (
        [block(type="compaction", content=None), delta(type="compaction_delta", content="sum")],
        [form.Unseen("sum")],
    ),
    "refusal": (
        [
            started(input_tokens=1, output_tokens=1),
            event(type="message_delta", delta={"stop_reason": "refusal", "stop_details": {"explanation": "no"}}),
        ],
        [
            form.Started("msg_1", "m", Usage(1, 1, web_searches=0)),
            form.RefusalDelta(0, "no"),
            form.Finished(0, Finish.REFUSAL),
        ],
    ),
    "an input that grows, by a search": (
        [
            started(input_tokens=10, output_tokens=1, service_tier="standard"),
            event(
                type="message_delta",
                delta={"stop_reason": "pause_turn"},
                usage={
                    "input_tokens": 90,
                    "cache_read_input_tokens": 5,
                    "output_tokens": 7,
                    "server_tool_use": {"web_search_requests": 2},
                },
            ),
        ],
        [
            form.Started("msg_1", "m", Usage(10, 1, web_searches=0), "standard"),
            form.Finished(0, Finish.PAUSE),
            form.Used(Usage(95, 7, cached_prompt=5, web_searches=2), "standard"),
        ],
    ),
    "figures that are left out hold on": (
        [
            started(input_tokens=10, cache_creation_input_tokens=3, output_tokens=1),
            event(type="message_delta", delta={}, usage={"input_tokens": None, "output_tokens": 7}),
        ],
        [
            form.Started("msg_1", "m", Usage(13, 1, cache_write_prompt=3, web_searches=0)),
            form.Used(Usage(13, 7, cache_write_prompt=3, web_searches=0)),
        ],
    ),
    "a second beginning": ([started(), started(input_tokens=1, output_tokens=1)], [form.Started("msg_1", "m")]),
    "wrong types": (
        [
            event(type=7),
            event(type="message_start", message=[]),
            block(),
            event(type="content_block_start", content_block=[]),
            delta(type=[]),
            event(type="content_block_delta", delta=1),
            delta(type="text_delta", text=1),
            event(type="message_delta", delta=[], usage=[]),
            b"[]",
            b"",
            b"{oops",
        ],
        [],
    ),
}


@pytest.mark.parametrize(("data", "expected"), READ.values(), ids=READ)
def test_read(data: list[bytes], expected: list[form.StreamEvent]) -> None:
    assert read_all(*data) == expected


def test_an_error_in_the_middle() -> None:
    (failed,) = read_all(event(type="error", error={"type": "overloaded_error", "message": "Overloaded"}))
    assert isinstance(failed, form.Failed)
    assert (failed.error.status, failed.error.code, failed.error.message) == (529, "overloaded_error", "Overloaded")
    (unknown,) = read_all(event(type="error", error="boom"))
    assert isinstance(unknown, form.Failed)
    assert unknown.error.status == 500


@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_bytes_are_read(data: list[bytes]) -> None:
    read_all(*data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("type", "text", "input", "name", "usage", "content")), inner, max_size=3)
    ),
    max_leaves=6,
)
KINDS = ("message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "error")
MEMBERS = ("message", "content_block", "delta", "usage", "error", "index")
BLOCK_KINDS = (
    "text",
    "thinking",
    "tool_use",
    "server_tool_use",
    "input_json_delta",
    "compaction",
    "advisor_tool_result",
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(KINDS)},
            optional=dict.fromkeys(MEMBERS, JSON)
            | {"content_block": st.dictionaries(st.sampled_from(("input", "text", "content")), JSON).flatmap(
                lambda fields: st.sampled_from(BLOCK_KINDS).map(lambda kind: {**fields, "type": kind})
            )},
        ),
        max_size=4,
    )
)  # fmt: skip
def test_any_events_are_read_and_written(events: list[dict[str, Any]]) -> None:
    stream_of(read_all(*(json.dumps(one).encode() for one in events)))


def test_arguments_too_deep_to_be_written_are_none() -> None:
    deep = b'{"a":' * 990 + b"1" + b"}" * 990
    data = b'{"type":"content_block_start","content_block":{"type":"tool_use","input":%s}}' % deep
    assert read_all(data, STOP)[-1] == form.ToolArguments(0, 0, "{}")
    answer = Answer(None, None, (Choice(0, (ToolCall("c", "f", deep.decode()),), None),), None)
    (call,) = json.loads(CLAUDE.write_whole(answer, SEED))["content"]
    assert call["input"] == {"arguments": deep.decode()}


# --- Streams: what is written -----------------------------------------------------------------------------------------

BEGUN = form.Started("id", "model")
USED = form.Used(Usage(5, 3, web_searches=0))


def test_a_foreign_stream() -> None:
    """Finish first, figures later, as OpenAI's chat has it."""
    message = final_message(
        stream_of(
            [
                BEGUN,
                form.ThinkingDelta(0, "hm"),
                form.ThinkingSigned(0, "s", "gemini"),
                form.TextDelta(0, "Hel"),
                form.TextDelta(0, "lo"),
                form.Cited(0, Citation(url="https://a.example", title="t")),
                form.ToolStarted(0, 0, "call_1", "f"),
                form.ToolArguments(0, 0, '{"a"'),
                form.ToolArguments(0, 0, ":1}"),
                form.Finished(0, Finish.STOP),
                form.Used(Usage(20, 9, cached_prompt=4, reasoning=2), "flex"),
                form.Done(),
            ]
        )
    )
    thought, text, call = message["content"]
    assert (thought["thinking"], form.uncarry(thought["signature"], OWN)) == ("hm", ("s", "gemini"))
    assert (text["text"], text["citations"][0]["url"]) == ("Hello", "https://a.example")
    assert (call["id"], call["name"], call["input"]) == ("call_1", "f", {"a": 1})
    assert (message["id"], message["model"], message["stop_reason"]) == ("id", "model", "tool_use")
    usage = message["usage"]
    assert (usage["input_tokens"], usage["cache_read_input_tokens"], usage["output_tokens"]) == (16, 4, 9)


def test_calls_that_were_interleaved_are_told_apart() -> None:
    written = stream_of(
        [
            BEGUN,
            form.ToolStarted(0, 0, "a", "f"),
            form.ToolStarted(0, 1, "b", "g"),
            form.ToolArguments(0, 1, '{"y"'),
            form.ToolArguments(0, 0, '{"x":'),
            form.ToolStarted(0, 2, "c", "h"),
            form.ToolArguments(0, 1, ":2}"),
            form.ToolArguments(0, 0, "1}"),
            form.ToolArguments(0, 2, '{"z":3}'),
            form.Finished(0, Finish.TOOL_CALLS),
            USED,
            form.Done(),
        ]
    )
    _assert_one_block_after_the_other(written)
    assert calls(events_of([written])) == [("a", "f", {"x": 1}), ("b", "g", {"y": 2}), ("c", "h", {"z": 3})]


def test_a_call_that_is_never_whole_does_not_hold_up_the_end() -> None:
    interleaved: list[form.StreamEvent] = [
        form.ToolStarted(0, 0, "a", "f"),
        form.ToolStarted(0, 1, "b", "g"),
        form.ToolArguments(0, 1, "{}"),
        form.ToolArguments(0, 0, '{"x'),
    ]
    written = stream_of([BEGUN, *interleaved, form.Finished(0, Finish.LENGTH), USED, form.Done()])
    _assert_one_block_after_the_other(written)
    assert b'"name":"g"' in written


def test_calls_one_after_the_other_are_written_as_they_come() -> None:
    writer = CLAUDE.stream_writer(SEED)
    writer.write(form.ToolStarted(0, 0, "a", "f"))
    writer.write(form.ToolArguments(0, 0, "{} "))
    assert b'"name":"g"' in writer.write(form.ToolStarted(0, 1, "b", "g"))
    assert b'"partial_json":"{"' in writer.write(form.ToolArguments(0, 1, "{"))


def test_a_stream_that_broke_off_is_not_closed() -> None:
    written = stream_of([BEGUN, form.TextDelta(0, "a")])
    assert b"content_block_stop" not in written
    assert b"message_delta" not in written
    failed = stream_of([BEGUN, form.Failed(ProviderError("Busy.", status=529)), form.TextDelta(0, "a"), form.Done()])
    assert failed.endswith(b"\n\n")
    assert b"text_delta" not in failed
    with pytest.raises(anthropic.APIStatusError, match="Busy") as caught:
        final_message(failed)
    assert caught.value.type == "overloaded_error"


def test_figures_that_come_late_are_told() -> None:
    late = form.Used(Usage(7, 8, web_searches=0))
    written = stream_of([BEGUN, form.TextDelta(0, "a"), USED, form.Finished(0, Finish.STOP), late, form.Done()])
    assert written.count(b"event: message_delta") == 1
    assert last(events_of([written]), form.Used) == late


def test_figures_that_never_came_are_not_zeros() -> None:
    written = stream_of([BEGUN, form.TextDelta(0, "a"), form.Finished(0, Finish.STOP), form.Done()])
    meter = StreamMeter(CLAUDE, len, 1.0)
    meter.feed(written)
    assert (meter.usage, meter.complete, meter.counted) == (None, True, 1)
    assert final_message(written)["usage"]["output_tokens"] == 0


def test_a_stream_without_a_beginning_is_given_one() -> None:
    message = final_message(stream_of([form.TextDelta(0, "a"), form.Finished(0, Finish.STOP), form.Done()]))
    assert (message["id"], message["model"]) == ("msg_0123456789abcdef", "claude-sonnet-4-5")


def test_a_refusal_is_told_at_the_end() -> None:
    refusing: list[form.StreamEvent] = [
        BEGUN,
        form.RefusalDelta(0, "I "),
        form.RefusalDelta(0, "won't."),
        form.Finished(0, Finish.STOP),
    ]
    written = stream_of([*refusing, USED, form.Done()])
    message = final_message(written)
    assert (message["stop_reason"], message["stop_details"]["explanation"]) == ("refusal", "I won't.")
    assert form.RefusalDelta(0, "I won't.") in events_of([written])


# --- Whole answers ----------------------------------------------------------------------------------------------------

WHOLE = [case for case in protocol_cases("anthropic-messages", False) if case.status == 200]


@each_case(WHOLE)
def test_recorded_answer(case: Case) -> None:
    answer = CLAUDE.read_whole(case.body, SEED)
    assert figures(answer.usage) == billed(case)
    blocks = json.loads(case.body)["content"]
    (choice,) = answer.choices
    assert [part.text for part in choice.parts if isinstance(part, Text)] == [b["text"] for b in blocks if "text" in b]
    assert [json.loads(part.arguments) for part in choice.parts if isinstance(part, ToolCall)] == [
        b["input"] for b in blocks if b["type"] == "tool_use"
    ]
    again = CLAUDE.read_whole(CLAUDE.write_whole(answer, SEED), SEED)
    assert (again.choices, again.usage, again.service_tier, again.id, again.model) == (
        answer.choices, answer.usage, answer.service_tier, answer.id, answer.model,
    )  # fmt: skip
    _assert_same_message(_created(CLAUDE.write_whole(answer, SEED)), _created(case.body))


def _created(body: bytes) -> dict[str, Any]:
    asking = client(200, "application/json", body)
    message = asking.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}])
    return message.model_dump(warnings=False)


@each_case([case for case in STREAMS if case.complete])
def test_a_stream_says_what_the_whole_answer_says(case: Case) -> None:
    """The whole one as the official client puts it together, without what Anthropic's own tools brought."""
    events, whole = (
        events_of([case.body]),
        CLAUDE.read_whole(json.dumps(final_message(case.body), default=str).encode(), SEED),
    )
    parts = whole.choices[0].parts
    assert "".join(part.text for part in parts if isinstance(part, Text)) == said(events, form.TextDelta)
    assert "".join(part.text for part in parts if isinstance(part, Thinking)) == said(events, form.ThinkingDelta)
    assert [(part.id, part.name, json.loads(part.arguments)) for part in parts if isinstance(part, ToolCall)] == calls(
        events
    )
    finished = last(events, form.Finished)
    assert finished is not None
    assert (whole.choices[0].finish, whole.choices[0].stop_sequence) == (finished.finish, finished.stop_sequence)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"type":"error","error":{}}', b'{"content":null}'])
def test_not_an_answer(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a message"):
        CLAUDE.read_whole(body, SEED)
    with pytest.raises(ValueError, match="not a message"):
        CLAUDE.read_answer(body)


PARTS: tuple[Part, ...] = (
    Thinking("hm", "s", OWN),
    Thinking("", "t", "gemini"),
    Thinking("", "r", OWN, redacted=True),
    Text("a", citations=(Citation(url="u", title="t", quote="q"), Citation(title="d", quote="quoted"))),
    ToolCall("c", "f", '{"a":1}'),
    Refusal("no"),
)


def test_every_part_is_kept() -> None:
    answer = Answer("i", "m", (Choice(0, PARTS, Finish.LENGTH),), Usage(3, 4), "flex")
    written = CLAUDE.write_whole(answer, SEED)
    again = CLAUDE.read_whole(written, SEED)
    foreign = Thinking("", form.carry("t", "gemini", OWN), OWN)  # which read_request of the next turn takes apart
    assert again.choices[0].parts == (PARTS[0], foreign, *PARTS[2:])
    assert (again.choices[0].finish, again.usage, again.service_tier) == (Finish.LENGTH, Usage(3, 4), "flex")


FINISHES: dict[str, tuple[Finish | None, tuple[Part, ...], str]] = {
    "stop": (Finish.STOP, (), "end_turn"),
    "a stop with a call": (Finish.STOP, (ToolCall("c", "f", ""),), "tool_use"),
    "a stop with a refusal": (Finish.STOP, (Refusal("no"),), "refusal"),
    "length": (Finish.LENGTH, (), "max_tokens"),
    "sequence": (Finish.STOP_SEQUENCE, (), "stop_sequence"),
    "filtered": (Finish.CONTENT_FILTER, (), "refusal"),
    "pause": (Finish.PAUSE, (), "pause_turn"),
    "error": (Finish.ERROR, (), "end_turn"),
    "none": (None, (), "end_turn"),
}


@pytest.mark.parametrize(("finish", "parts", "expected"), FINISHES.values(), ids=FINISHES)
def test_finish(finish: Finish | None, parts: tuple[Part, ...], expected: str) -> None:
    written = CLAUDE.write_whole(Answer(None, None, (Choice(0, parts, finish),), None), SEED)
    assert json.loads(written)["stop_reason"] == expected


@pytest.mark.parametrize(
    ("reason", "finish"),
    [
        ("model_context_window_exceeded", Finish.LENGTH),
        ("compaction", Finish.PAUSE),
        ("whatever", Finish.STOP),
        (None, None),
        (7, None),
    ],
)
def test_stop_reasons(reason: object, finish: Finish | None) -> None:
    body = json.dumps({"content": [], "stop_reason": reason}).encode()
    assert CLAUDE.read_whole(body, SEED).choices[0].finish == finish


def test_half_a_surrogate_pair_is_kept() -> None:
    call = rb'{"type":"tool_use","id":"c","name":"f","input":{"a":"\ud83d"}}'
    body = rb'{"content":[{"type":"text","text":"\ud83d"},%s],"stop_reason":"tool_use"}' % call
    answer = CLAUDE.read_whole(body, SEED)
    assert CLAUDE.read_whole(CLAUDE.write_whole(answer, SEED), SEED).choices == answer.choices


def test_what_the_providers_own_tools_wrote_is_counted() -> None:
    content = [
        {"type": "server_tool_use", "name": "web_search", "input": {"q": 1}},
        {"type": "web_search_tool_result", "content": [{"title": "found"}]},
        {"type": "advisor_tool_result", "content": {"type": "advisor_result", "text": "advice"}},
        {"type": "compaction", "content": "sum"},
        {"type": "text", "text": "a"},
    ]
    answer = CLAUDE.read_answer(json.dumps({"content": content}).encode())
    assert answer.texts == ("a", "web_search", '{"q":1}', "advice", "sum")


# --- Usage ------------------------------------------------------------------------------------------------------------

USAGES: dict[str, tuple[dict[str, Any], Usage | None]] = {
    "plain": ({"input_tokens": 3, "output_tokens": 4}, Usage(3, 4, web_searches=0)),
    "the cache is part of the prompt": (
        {"input_tokens": 3, "output_tokens": 4, "cache_read_input_tokens": 5, "cache_creation_input_tokens": 6},
        Usage(14, 4, cached_prompt=5, cache_write_prompt=6, web_searches=0),
    ),
    "written, by how long it is kept": (
        {
            "input_tokens": 3,
            "output_tokens": 4,
            "cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 6},
        },
        Usage(14, 4, cache_write_prompt=11, web_searches=0),
    ),
    "thinking": (
        {"input_tokens": 3, "output_tokens": 4, "output_tokens_details": {"thinking_tokens": 2}},
        Usage(3, 4, reasoning=2, web_searches=0),
    ),
    "searches": (
        {"input_tokens": 3, "output_tokens": 4, "server_tool_use": {"web_search_requests": 2}},
        Usage(3, 4, web_searches=2),
    ),
    "rounds of the answer itself are in its figures": (
        {
            "input_tokens": 3,
            "output_tokens": 4,
            "iterations": [{"type": "message", "input_tokens": 3, "output_tokens": 4}],
        },
        Usage(3, 4, web_searches=0),
    ),
    "half": ({"input_tokens": 3}, None),
    "wrong types": ({"input_tokens": "3", "output_tokens": True}, None),
    "negative": ({"input_tokens": -3, "output_tokens": 1}, None),
}


@pytest.mark.parametrize(("usage", "expected"), USAGES.values(), ids=USAGES)
def test_usage(usage: dict[str, Any], expected: Usage | None) -> None:
    assert read_usage(usage) == expected


COUNTS = st.integers(0, 1_000)


@st.composite
def usages(draw: st.DrawFn) -> Usage:
    cached, written, completion = draw(COUNTS), draw(COUNTS), draw(COUNTS)
    prompt = draw(COUNTS) + cached + written
    return Usage(
        prompt,
        completion,
        cached_prompt=cached,
        reasoning=draw(st.integers(0, completion)),
        audio_prompt=draw(st.integers(0, prompt)),
        audio_completion=draw(st.integers(0, completion)),
        cache_write_prompt=written,
        web_searches=draw(COUNTS | st.none()),
    )


@given(usages(), st.sampled_from((None, "standard", "flex", "fast")))
def test_figures_come_back_as_they_were(usage: Usage, tier: str | None) -> None:
    whole = CLAUDE.read_whole(CLAUDE.write_whole(Answer(None, None, (), usage, tier), SEED), SEED)
    assert (whole.usage, whole.service_tier) == (usage, tier)
    ended: list[form.StreamEvent] = [form.Finished(0, Finish.STOP), form.Used(usage, tier), form.Done()]
    for begun in (Usage(1, 0), None):
        streamed = events_of([stream_of([form.Started(None, None, begun), *ended])])
        assert last(streamed, form.Used) == form.Used(usage, tier)


def test_no_figures_are_not_zeros() -> None:
    assert read_usage(write_usage(None, None)) is None


def test_fast_answers_are_priced_so() -> None:
    body = b'{"content":[],"usage":{"input_tokens":1,"output_tokens":1,"service_tier":"standard","speed":"fast"}}'
    assert CLAUDE.read_answer(body).service_tier == "fast"


def test_pieces() -> None:
    read = CLAUDE.piece_reader()
    assert read(block(type="text", text="")) == Piece()
    assert read(delta(type="text_delta", text="a")) == Piece(texts=("a",), started=(0,))
    assert read(event(type="error")).error
    assert pieces.piece([form.Done()]).done
