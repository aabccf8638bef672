"""Answers and streams of Responses, to and from the canonical form."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ParsedResponse
from pydantic import BaseModel

from extproc import form
from extproc.dialects import pieces
from extproc.dialects.dialect import Seed
from extproc.dialects.openai_responses import OpenAIResponses
from extproc.dialects.openai_responses.answers import read_usage, write_usage
from extproc.errors import ProviderError
from extproc.form import Answer, Choice, Citation, Finish, Part, Refusal, Text, Thinking, TokenLogprob, ToolCall
from extproc.records import Usage
from extproc.sse import SseParser
from tests.each import each_case
from tests.recordings import Case, protocol_cases
from tests.test_openai_responses_calls import JSON, client

RESPONSES = OpenAIResponses()
OWN = "openai-responses"
ASKED = form.Request(
    "gpt-5",
    (form.Message(form.Role.SYSTEM, (Text("be brief"),)), form.Message(form.Role.USER, (Text("hi"),))),
    cap=100,
    temperature=0.5,
    tools=(form.Tool("f", "does", {"type": "object", "properties": {}}),),
    tool_choice=form.ToolChoice(form.Choose.AUTO),
    parallel_tool_calls=False,
    reasoning=form.Reasoning("low", visible=True),
)
SEED = Seed("0123456789abcdef", 1_700_000_000, ASKED)
USAGE = Usage(30, 20, cached_prompt=5, reasoning=7, cache_write_prompt=3, web_searches=2)
E = TypeVar("E")


def events_of(chunks: Iterable[bytes]) -> list[form.StreamEvent]:
    parser, reader = SseParser(), RESPONSES.stream_reader(SEED)
    blocks = [block for chunk in chunks for block in parser.feed(chunk)]
    blocks += SseParser().feed(parser.finish() + b"\n\n")
    events = [event for block in blocks if block.data for event in reader.read(block.data)]
    return [*events, *reader.finish()]


def stream_of(events: Iterable[form.StreamEvent]) -> bytes:
    writer = RESPONSES.stream_writer(SEED)
    return b"".join(writer.write(event) for event in events)


def told(stream: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[5:]) for line in stream.split(b"\n") if line.startswith(b"data:")]


def as_stream(*told: dict[str, Any]) -> bytes:
    return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in told)


def read(*told: dict[str, Any]) -> list[form.StreamEvent]:
    return events_of([as_stream(*told)])


def last(events: Iterable[form.StreamEvent], kind: type[E]) -> E | None:
    return next((event for event in reversed(list(events)) if isinstance(event, kind)), None)


def said(events: Iterable[form.StreamEvent]) -> dict[str, Any]:
    """What a stream says, put together."""
    texts: dict[str, str] = {"text": "", "thinking": "", "refusal": ""}
    calls: dict[int, list[str]] = {}
    signatures: list[tuple[str, str, bool]] = []
    for event in events:
        match event:
            case form.TextDelta():
                texts["text"] += event.text
            case form.ThinkingDelta():
                texts["thinking"] += event.text
            case form.RefusalDelta():
                texts["refusal"] += event.text
            case form.ThinkingSigned():
                signatures.append((event.signature, event.origin, event.redacted))
            case form.ToolStarted():
                calls[event.call] = [event.id, event.name, ""]
            case form.ToolArguments():
                calls[event.call][2] += event.json
    return {**texts, "calls": [tuple(call) for call in calls.values()], "signatures": signatures}


def said_whole(answer: Answer) -> dict[str, Any]:
    parts = answer.choices[0].parts
    thoughts = [part for part in parts if isinstance(part, Thinking)]
    return {
        "text": "".join(part.text for part in parts if isinstance(part, Text)),
        "thinking": "".join(part.text for part in thoughts),
        "refusal": "".join(part.text for part in parts if isinstance(part, Refusal)),
        "calls": [(part.id, part.name, part.arguments) for part in parts if isinstance(part, ToolCall)],
        "signatures": [(part.signature, part.origin, part.redacted) for part in thoughts if part.signature is not None],
    }


def by_hand(response: dict[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
    """The same from the whole response, or, where it holds no output, from its finished items."""
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    items = response["output"] or done
    contents = [part for one in items if one["type"] == "message" for part in one["content"]]
    thoughts = [one for one in items if one["type"] == "reasoning"]
    signed = [one for one in done or items if one["type"] == "reasoning"]  # the whole response encrypts them anew
    calls = [one for one in items if one["type"] == "function_call"]
    paragraphs = ["\n\n".join(p["text"] for p in (*(t.get("content") or ()), *t["summary"])) for t in thoughts]
    return {
        "text": "".join(part.get("text", "") for part in contents),
        "thinking": "".join(paragraphs),
        "refusal": "".join(part.get("refusal", "") for part in contents),
        "calls": [(one["call_id"], one["name"], one["arguments"]) for one in calls],
        "signatures": [(one["encrypted_content"], OWN, False) for one in signed if one.get("encrypted_content")],
    }


def figures(usage: Usage | None) -> tuple[int, int, int, int]:
    assert usage is not None
    return usage.prompt, usage.completion, usage.cached_prompt, usage.reasoning


def billed(case: Case) -> tuple[int, int, int, int]:
    usage = case.usage
    return usage["input"], usage["output"], usage.get("cached", 0), usage.get("reasoning", 0)


# --- Recorded streams -------------------------------------------------------------------------------------------------

STREAMS = [case for case in protocol_cases(OWN, True) if case.status == 200]
GOOD = [case for case in STREAMS if not case.meta.get("error")]
FINISHES = {
    "response.completed": (Finish.STOP, Finish.TOOL_CALLS, Finish.REFUSAL),
    "response.incomplete": (Finish.LENGTH,),
}


@each_case(STREAMS)
def test_any_chunks_say_the_same(case: Case) -> None:
    events = list(map(repr, events_of([case.body])))
    for chunks in (case.recorded_chunks(), case.random_chunks(1), case.random_chunks(2, largest=3)):
        assert list(map(repr, events_of(chunks))) == events


@each_case(GOOD)
def test_recorded_stream(case: Case) -> None:
    events, by_line = events_of([case.body]), told(case.body)
    assert said(events) == by_hand(by_line[-1]["response"], by_line)
    used, finished = last(events, form.Used), last(events, form.Finished)
    assert used is not None
    assert figures(used.usage) == billed(case)
    assert finished is not None
    assert finished.finish in FINISHES[by_line[-1]["type"]]
    assert (finished.finish is Finish.LENGTH) is ("finish:length" in case.features)
    assert isinstance(events[0], form.Started)
    assert isinstance(events[-1], form.Done)
    searched = [e for e in by_line if e["type"] == "response.web_search_call.completed"]
    x_search = [e for e in by_line if e.get("item", {}).get("name") == "x_keyword_search"][:1]
    assert used.usage.web_searches == len(searched) + len(x_search)


@each_case([case for case in STREAMS if case not in GOOD])
def test_recorded_stream_that_fails(case: Case) -> None:
    *_, failed = events_of([case.body])
    assert isinstance(failed, form.Failed)
    first = next(event["error"] for event in told(case.body) if event["type"] == "error")
    assert (failed.error.code, failed.error.message) == (first["code"], first["message"])
    assert failed.error.status == (429 if first["code"] == "insufficient_quota" else 500)


@each_case(GOOD)
def test_recorded_stream_written_again(case: Case) -> None:
    events = events_of([case.body])
    again = stream_of(events)
    legal(again)
    heard = events_of([again])
    assert said(heard) == said(events)
    for kind in (form.Used, form.Finished):
        assert last(heard, kind) == last(events, kind)
    final = told(again)[-1]["response"]
    whole = RESPONSES.read_whole(orjson.dumps(final), SEED)
    assert said_whole(whole) == said(events)
    if (finished := last(events, form.Finished)) is not None and finished.finish is not Finish.LENGTH:
        assert comparable(accumulated(again)) == final["output"]


@each_case(GOOD)
def test_the_meter_hears_everything_once(case: Case) -> None:
    """By its pieces, and by its end as a whole answer."""
    read_piece = RESPONSES.piece_reader()
    heard = [read_piece(event.data) for event in SseParser().feed(case.body + b"\n\n") if event.data]
    response = told(case.body)[-1]["response"]
    if response["output"]:
        whole = pieces.answer(RESPONSES.read_whole(orjson.dumps(response), SEED))
        streamed = "".join(text for piece in heard for text in piece.texts)
        assert sorted(streamed) == sorted("".join(whole.texts))
        assert heard[-1].usage == whole.usage
    assert heard[-1].done


def accumulated(stream: bytes) -> ParsedResponse[Any]:
    """A stream, as the official client puts it together."""
    asking = client(200, "text/event-stream", stream)
    with asking.responses.stream(model="m", input="x") as heard:
        return heard.get_final_response()


def comparable(response: ParsedResponse[Any]) -> list[dict[str, Any]]:
    output: list[dict[str, Any]] = json.loads(response.to_json(warnings=False))["output"]
    for item in output:
        item.pop("parsed_arguments", None)
        for part in item.get("content") or ():
            part.pop("parsed", None)
    return output


def legal(stream: bytes) -> None:
    """Every event counted and named; what is added is done, once; deltas say what the end says."""
    events = told(stream)
    names = [line[7:].decode() for line in stream.split(b"\n") if line.startswith(b"event: ")]
    assert names == [event["type"] for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert names[:2] == ["response.created", "response.in_progress"]
    output = events[-1]["response"]["output"]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    done = {event["output_index"]: event["item"] for event in events if event["type"] == "response.output_item.done"}
    assert [event["output_index"] for event in added] == list(range(len(output)))
    assert [done[i] for i in range(len(output))] == output
    assert [event["item"]["id"] for event in added] == [item["id"] for item in output]
    for event in events:
        if "item_id" in event:
            assert event["item_id"] == output[event["output_index"]]["id"]
    for about, text in (("output_text", "text"), ("refusal", "refusal"), ("reasoning_summary_text", "text")):
        deltas: dict[tuple[Any, ...], str] = {}
        for event in events:
            place = tuple(event.get(name) for name in ("output_index", "content_index", "summary_index"))
            if event["type"] == f"response.{about}.delta":
                deltas[place] = deltas.get(place, "") + event["delta"]
            elif event["type"] == f"response.{about}.done":
                assert deltas.pop(place, "") == event[text]
        assert deltas == {}


# --- Recorded whole answers -------------------------------------------------------------------------------------------

WHOLE = [case for case in protocol_cases(OWN, False) if case.status == 200]
FAILED = [case for case in protocol_cases(OWN, False) if case.status != 200]


@each_case(WHOLE)
def test_recorded_answer(case: Case) -> None:
    answer, response = RESPONSES.read_whole(case.body, SEED), json.loads(case.body)
    expected = by_hand(response, [])
    if case.provider == "mistralrs":  # thoughts beside the output
        expected["thinking"] = response["reasoning"]
    assert said_whole(answer) == expected
    assert figures(answer.usage) == billed(case)
    assert (answer.choices[0].finish is Finish.LENGTH) is ("finish:length" in case.features)
    searches = [item["action"]["type"] for item in response["output"] if item["type"] == "web_search_call"]
    assert answer.usage is not None
    assert answer.usage.web_searches == searches.count("search")


@each_case(WHOLE)
def test_recorded_answer_written_again(case: Case) -> None:
    answer = RESPONSES.read_whole(case.body, SEED)
    again = RESPONSES.read_whole(RESPONSES.write_whole(answer, SEED), SEED)
    assert (again.choices, again.usage) == (answer.choices, answer.usage)
    assert (again.service_tier, again.model) == (answer.service_tier, answer.model)


@each_case(FAILED)
def test_recorded_error(case: Case) -> None:
    error = RESPONSES.read_error(case.status, case.body)
    body = json.loads(case.body)
    said_so = body.get("error", body.get("detail"))
    assert error.status == case.status
    assert error.message == (said_so["message"] if isinstance(said_so, dict) else said_so)
    with pytest.raises(ValueError, match="not a response"):
        RESPONSES.read_whole(case.body, SEED)
    again = RESPONSES.read_error(case.status, RESPONSES.render_error(error))
    assert (again.message, again.param) == (error.message, error.param)


# --- Streams: what is read --------------------------------------------------------------------------------------------

CREATED = {"type": "response.created", "response": {"id": "resp_1", "model": "gpt-5"}}
COMPLETED = {"type": "response.completed", "response": {"status": "completed", "output": []}}
STARTED = form.Started("resp_1", "gpt-5", None, None)
END = [form.Finished(0, Finish.STOP), form.Done()]
MESSAGE = {"type": "message", "content": [{"type": "output_text", "text": "Hello", "annotations": []}]}


def delta(about: str, text: str, index: int = 0, **place: int) -> dict[str, Any]:
    return {"type": f"response.{about}.delta", "output_index": index, "delta": text, **place}


def item_done(item: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def item_added(item: dict[str, Any], index: int = 0) -> dict[str, Any]:
    return {"type": "response.output_item.added", "output_index": index, "item": item}


def ended(**response: Any) -> dict[str, Any]:
    return {"type": "response.completed", "response": {"status": "completed", "output": [], **response}}


CALL = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "f", "arguments": '{"a":1}'}

SAID: dict[str, tuple[list[dict[str, Any]], list[form.StreamEvent]]] = {
    "text, four times": (
        [
            delta("output_text", "Hel"),
            delta("output_text", "lo"),
            {"type": "response.output_text.done", "output_index": 0, "text": "Hello"},
            item_done(MESSAGE),
        ],
        [form.TextDelta(0, "Hel"), form.TextDelta(0, "lo")],
    ),
    "text without its last delta": (
        [delta("output_text", "Hel"), item_done(MESSAGE)],
        [form.TextDelta(0, "Hel"), form.TextDelta(0, "lo")],
    ),
    "text at its end only": (
        [{"type": "response.output_text.done", "output_index": 0, "text": "Hello"}],
        [form.TextDelta(0, "Hello")],
    ),
    "an item at its end only": ([item_done(MESSAGE)], [form.TextDelta(0, "Hello")]),
    "a call at its end only": (
        [item_done(CALL)],
        [form.ToolStarted(0, 0, "call_1", "f"), form.ToolArguments(0, 0, '{"a":1}')],
    ),
    "a call, with new ids each time": (
        [
            item_added({**CALL, "id": "x", "arguments": ""}),
            {**delta("function_call_arguments", '{"a":1}'), "item_id": "y"},
            item_done({**CALL, "id": "z"}),
        ],
        [form.ToolStarted(0, 0, "call_1", "f"), form.ToolArguments(0, 0, '{"a":1}')],
    ),
    "a summary in two parts": (
        [
            delta("reasoning_summary_text", "a", summary_index=0),
            delta("reasoning_summary_text", "b", summary_index=1),
            item_done({"type": "reasoning", "summary": [{"text": "a"}, {"text": "b"}], "encrypted_content": "gAA"}),
        ],
        [
            form.ThinkingDelta(0, "a"),
            form.ThinkingDelta(0, "\n\n"),
            form.ThinkingDelta(0, "b"),
            form.ThinkingSigned(0, "gAA", OWN),
        ],
    ),
    "a custom tool": (
        [
            delta("custom_tool_call_input", "select"),
            item_done({"type": "custom_tool_call", "name": "sql", "input": "select 1"}),
        ],
        [form.Unseen("select"), form.Unseen(" 1"), form.Unseen("sql")],
    ),
    "compaction": ([item_done({"type": "compaction", "encrypted_content": "gAA"})] * 2, [form.Unseen("")]),
    "thoughts, twice": (
        [item_done({"type": "reasoning", "summary": [{"text": "a"}], "encrypted_content": "gAA"})] * 2,
        [form.ThinkingDelta(0, "a"), form.ThinkingSigned(0, "gAA", OWN)],
    ),
    "a query, alone and listed": (
        [item_done({"type": "web_search_call", "action": {"type": "search", "query": "q", "queries": ["q", "r"]}})],
        [form.Unseen("q"), form.Unseen("r")],
    ),
    "a page": (
        [
            delta("output_text", "ab"),
            delta("output_text", "see", index=1),
            {
                "type": "response.output_text.annotation.added",
                "output_index": 1,
                "annotation": {"type": "url_citation", "url": "u", "title": "t", "start_index": 0, "end_index": 3},
            },
        ],
        [
            form.TextDelta(0, "ab"),
            form.TextDelta(0, "see"),
            form.Cited(0, Citation("u", "t", None, 2, 5)),
        ],
    ),
    "a file, with its item": (
        [
            item_done(
                {"type": "message", "content": [{"text": "a", "annotations": [{"filename": "f.txt", "index": 1}]}]}
            )
        ],
        [form.TextDelta(0, "a"), form.Cited(0, Citation(title="f.txt"))],
    ),
    "log probabilities": (
        [
            {
                **delta("output_text", "a"),
                "logprobs": [
                    {"token": "a", "logprob": -1, "top_logprobs": [{"token": "b", "logprob": -2.0}, {"token": 1}]}
                ],
            }
        ],
        [form.TextDelta(0, "a"), form.Logprobs(0, (TokenLogprob("a", -1.0, (TokenLogprob("b", -2.0),)),))],
    ),
    "half a surrogate pair": ([delta("output_text", "\ud83d")], [form.TextDelta(0, "\ud83d")]),
    "wrong types": (
        [
            {"type": "response.output_text.delta", "delta": 7, "output_index": [], "content_index": {}},
            {"type": "response.output_item.done", "item": 7},
            {"type": "response.output_item.done", "output_index": {}, "item": {"type": ["message"]}},
            {"type": "response.output_text.annotation.added", "annotation": 7},
            {"type": "response.function_call_arguments.delta", "delta": "", "output_index": "x"},
            {"type": "response.completed", "response": []},
            {"type": 7},
            {"type": "ping"},
        ],
        [],
    ),
}


@pytest.mark.parametrize(("events", "expected"), SAID.values(), ids=SAID)
def test_said(events: list[dict[str, Any]], expected: list[form.StreamEvent]) -> None:
    heard = read(CREATED, *events, COMPLETED)
    assert heard[:1] == [STARTED]
    assert heard[1:-2] == expected


def test_a_stream_of_its_end_alone() -> None:
    heard = read(ended(output=[MESSAGE, CALL], usage={"input_tokens": 1, "output_tokens": 2}))
    assert said(heard)["text"] == "Hello"
    assert said(heard)["calls"] == [("call_1", "f", '{"a":1}')]
    assert heard[-3:] == [
        form.Finished(0, Finish.TOOL_CALLS),
        form.Used(Usage(1, 2, web_searches=0)),
        form.Done(),
    ]


def test_a_gap_in_the_places_says_nothing_twice() -> None:
    heard = read(CREATED, item_done(MESSAGE, 1), ended(output=[MESSAGE]))
    assert said(heard)["text"] == "Hello"


def test_searches_are_counted_where_the_response_does_not_repeat_them() -> None:
    search = {"type": "web_search_call", "action": {"type": "search", "query": "q"}}
    page = {"type": "web_search_call", "action": {"type": "open_page", "url": "u"}}
    heard = read(CREATED, item_done(search), item_done(page, 1), ended(usage={"input_tokens": 1, "output_tokens": 2}))
    assert last(heard, form.Used) == form.Used(Usage(1, 2, web_searches=1))
    assert [event.text for event in heard if isinstance(event, form.Unseen)] == ["q", "u"]


ENDS: dict[str, tuple[dict[str, Any], Finish]] = {
    "length": ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, Finish.LENGTH),
    "filter": ({"status": "incomplete", "incomplete_details": {"reason": "content_filter"}}, Finish.CONTENT_FILTER),
    "another reason": ({"status": "incomplete", "incomplete_details": {"reason": "x"}}, Finish.PAUSE),
    "no reason": ({"status": "incomplete", "incomplete_details": None}, Finish.PAUSE),
    "cancelled": ({"status": "cancelled"}, Finish.ERROR),
    "completed": ({"status": "completed"}, Finish.STOP),
    "no status": ({}, Finish.STOP),
}


@pytest.mark.parametrize(("response", "finish"), ENDS.values(), ids=ENDS)
def test_finish(response: dict[str, Any], finish: Finish) -> None:
    heard = read(CREATED, {"type": "response.completed", "response": response})
    assert heard == [STARTED, form.Finished(0, finish), form.Done()]


def test_a_response_that_failed() -> None:
    error = {"code": "rate_limit_exceeded", "message": "slow down"}
    usage = {"input_tokens": 1, "output_tokens": 2}
    failed = {"type": "response.failed", "response": {"status": "failed", "error": error, "usage": usage}}
    *_, used, end = read(CREATED, failed, COMPLETED)
    assert used == form.Used(Usage(1, 2, web_searches=0))
    assert isinstance(end, form.Failed)
    assert (end.error.status, end.error.code, end.error.message) == (429, "rate_limit_exceeded", "slow down")


def test_an_error_event_as_the_reference_has_it() -> None:
    *_, end = read(CREATED, {"type": "error", "code": "server_error", "message": "oops", "param": None})
    assert isinstance(end, form.Failed)
    assert (end.error.status, end.error.code, end.error.message) == (500, "server_error", "oops")


def test_a_stream_that_breaks_off_is_not_done() -> None:
    assert read(CREATED, delta("output_text", "a")) == [STARTED, form.TextDelta(0, "a")]


@given(st.binary())
def test_any_bytes_are_read(data: bytes) -> None:
    assert isinstance(RESPONSES.stream_reader(SEED).read(data), list)
    assert isinstance(RESPONSES.read_error(500, data), ProviderError)


KINDS = ("output_text.delta", "output_item.added", "output_item.done", "completed", "reasoning_text.done")
PLACES = ("delta", "text", "item", "response", "output_index", "annotation", "logprobs")


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.dictionaries(st.sampled_from(PLACES), JSON))))
def test_any_events_are_read_and_written(given_events: list[tuple[str, dict[str, Any]]]) -> None:
    reader, writer = RESPONSES.stream_reader(SEED), RESPONSES.stream_writer(SEED)
    for kind, fields in given_events:
        for event in reader.read(json.dumps({"type": f"response.{kind}", **fields}).encode()):
            writer.write(event)


@given(st.dictionaries(st.sampled_from(("output", "usage", "status", "reasoning", "incomplete_details")), JSON))
def test_any_answer_is_read_or_refused(body: dict[str, Any]) -> None:
    try:
        answer = RESPONSES.read_whole(json.dumps(body).encode(), SEED)
    except ValueError:
        return
    assert RESPONSES.write_whole(answer, SEED)


# --- Usage ------------------------------------------------------------------------------------------------------------

USAGES: dict[str, tuple[dict[str, Any], Usage | None]] = {
    "plain": ({"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}, Usage(3, 4, web_searches=0)),
    "half": ({"input_tokens": 3}, None),
    "wrong types": ({"input_tokens": "3", "output_tokens": True}, None),
    "details": (
        {
            "input_tokens": 3,
            "output_tokens": 4,
            "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 1},
            "output_tokens_details": {"reasoning_tokens": 3},
        },
        Usage(3, 4, cached_prompt=2, reasoning=3, cache_write_prompt=1, web_searches=0),
    ),
    "more cached than prompted": (
        {"input_tokens": 3, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 9}},
        Usage(3, 4, cached_prompt=3, web_searches=0),
    ),
    "a total that holds more": (
        {"input_tokens": 3, "output_tokens": 4, "total_tokens": 27},
        Usage(3, 24, web_searches=0),
    ),
    "searches of two kinds": (
        {
            "input_tokens": 3,
            "output_tokens": 4,
            "server_side_tool_usage_details": {"web_search_calls": 2, "x_search_calls": 1},
        },
        Usage(3, 4, web_searches=3),
    ),
    "searches not counted": (
        {"input_tokens": 3, "output_tokens": 4, "server_side_tool_usage_details": None},
        Usage(3, 4),
    ),
}


@pytest.mark.parametrize(("usage", "expected"), USAGES.values(), ids=USAGES)
def test_usage(usage: dict[str, Any], expected: Usage | None) -> None:
    assert read_usage({"usage": usage}, 0) == expected


def test_searches_as_openai_counts_them() -> None:
    usage = {"input_tokens": 3, "output_tokens": 4}
    response = {"usage": usage, "tool_usage": {"web_search": {"num_requests": 5}}}
    assert read_usage(response, 1) == Usage(3, 4, web_searches=5)


@given(st.integers(0, 99), st.integers(0, 99), st.none() | st.integers(0, 9), st.lists(st.integers(0, 99), min_size=5))
def test_usage_comes_back_as_it_was_written(
    prompt: int, completion: int, searches: int | None, rest: list[int]
) -> None:
    cached, wrote, audio, reasoning, spoken = rest[:5]
    usage = Usage(
        prompt,
        completion,
        cached_prompt=min(cached, prompt),
        reasoning=min(reasoning, completion),
        audio_prompt=min(audio, prompt),
        audio_completion=min(spoken, completion),
        cache_write_prompt=min(wrote, prompt),
        web_searches=searches,
    )
    assert read_usage({"usage": write_usage(usage)}, 7) == usage


# --- What is written --------------------------------------------------------------------------------------------------

FOREIGN = Thinking("deep", "sig", "anthropic-messages")
REDACTED = Thinking("", "data", "anthropic-messages", redacted=True)
HIDDEN = Thinking("", "gAAAA", OWN)

ANSWERS: dict[str, tuple[tuple[Part, ...], Finish]] = {
    "text": ((Text("Hello"),), Finish.STOP),
    "nothing": ((), Finish.STOP),
    "a cited text": ((Text("Hello", citations=(Citation("u", "t", None, 0, 5),)),), Finish.STOP),
    "a refusal": ((Refusal("I will not"),), Finish.REFUSAL),
    "text, then a refusal": ((Text("Well"), Refusal("no")), Finish.REFUSAL),
    "parallel calls": (
        (Text("Let me see"), ToolCall("c1", "f", '{"a":1}'), ToolCall("c2", "g", "{}")),
        Finish.TOOL_CALLS,
    ),
    "thoughts of another": ((FOREIGN, REDACTED, Text("Hello")), Finish.STOP),
    "hidden thoughts": ((HIDDEN, ToolCall("c1", "f", "{}")), Finish.TOOL_CALLS),
    "unsigned thoughts": ((Thinking("hm"), Text("Hello")), Finish.STOP),
    "cut short": ((Thinking("hm"), Text("Hel")), Finish.LENGTH),
    "a call cut short": ((ToolCall("c1", "f", '{"a'),), Finish.LENGTH),
    "filtered": ((Text("Hel"),), Finish.CONTENT_FILTER),
    "paused": ((Text("Hel"),), Finish.PAUSE),
}


def answer_of(parts: tuple[Part, ...], finish: Finish) -> Answer:
    return Answer("msg_1", "claude", (Choice(0, parts, finish),), USAGE, "priority")


def events_for(answer: Answer) -> list[form.StreamEvent]:
    """A stream that says the same, in pieces."""
    events: list[form.StreamEvent] = [form.Started(answer.id, answer.model)]
    calls = 0
    for part in answer.choices[0].parts:
        match part:
            case Text():
                events += [form.TextDelta(0, part.text[:2]), form.TextDelta(0, part.text[2:])]
                events += [form.Cited(0, citation) for citation in part.citations]
            case Refusal():
                events += [form.RefusalDelta(0, part.text)]
            case Thinking():
                events += [form.ThinkingDelta(0, part.text)] * bool(part.text)
                if part.signature is not None:
                    events.append(form.ThinkingSigned(0, part.signature, part.origin or "", part.redacted))
            case ToolCall():
                events += [form.ToolStarted(0, calls, part.id, part.name), form.ToolArguments(0, calls, part.arguments)]
                calls += 1
    finish = answer.choices[0].finish
    assert finish is not None
    assert answer.usage is not None
    return [*events, form.Finished(0, finish), form.Used(answer.usage, answer.service_tier), form.Done()]


@pytest.mark.parametrize(("parts", "finish"), ANSWERS.values(), ids=ANSWERS)
def test_answer_written_and_read_again(parts: tuple[Part, ...], finish: Finish) -> None:
    answer = answer_of(parts, finish)
    again = RESPONSES.read_whole(RESPONSES.write_whole(answer, SEED), SEED)
    assert again.choices == answer.choices
    assert (again.usage, again.model, again.service_tier) == (USAGE, "claude", "priority")


@pytest.mark.parametrize(("parts", "finish"), ANSWERS.values(), ids=ANSWERS)
def test_stream_and_whole_answer_are_the_same_response(parts: tuple[Part, ...], finish: Finish) -> None:
    answer = answer_of(parts, finish)
    whole = json.loads(RESPONSES.write_whole(answer, SEED))
    stream = stream_of(events_for(answer))
    legal(stream)
    assert told(stream)[-1]["response"] == whole
    heard = events_of([stream])
    assert said(heard) == said_whole(answer)
    assert heard[-3:] == [form.Finished(0, finish), form.Used(USAGE, "priority"), form.Done()]


@pytest.mark.parametrize(
    ("parts", "finish"),
    [pair for pair in ANSWERS.values() if pair[1] in (Finish.STOP, Finish.TOOL_CALLS, Finish.REFUSAL)],
)
def test_the_official_client_puts_the_stream_together(parts: tuple[Part, ...], finish: Finish) -> None:
    answer = answer_of(parts, finish)
    response = accumulated(stream_of(events_for(answer)))
    assert comparable(response) == json.loads(RESPONSES.write_whole(answer, SEED))["output"]
    assert response.output_text == said_whole(answer)["text"]
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens_details.reasoning_tokens) == (30, 7)


class Person(BaseModel):
    name: str


def test_the_official_client_parses_answers() -> None:
    body = RESPONSES.write_whole(answer_of((Text('{"name":"Ann"}'),), Finish.STOP), SEED)
    parsed = client(200, "application/json", body).responses.parse(model="m", input="x", text_format=Person)
    assert parsed.output_parsed == Person(name="Ann")


def test_a_response_repeats_its_request() -> None:
    response = json.loads(RESPONSES.write_whole(answer_of((), Finish.STOP), SEED))
    repeated = {
        "instructions": "be brief",
        "max_output_tokens": 100,
        "temperature": 0.5,
        "top_p": 1.0,
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "metadata": {},
        "created_at": 1_700_000_000,
        "id": "resp_0123456789abcdef",
    }
    assert {name: response[name] for name in repeated} == repeated
    assert [tool["name"] for tool in response["tools"]] == ["f"]
    created, going_on = told(stream_of([form.Started("x", None)]))
    assert created["response"] == going_on["response"]
    changing: dict[str, Any] = {
        "status": "in_progress",
        "output": [],
        "usage": None,
        "model": "gpt-5",
        "service_tier": None,
    }
    assert created["response"] == {**response, **changing}


def test_thoughts_come_back_as_they_were() -> None:
    response = json.loads(RESPONSES.write_whole(answer_of((FOREIGN, REDACTED, HIDDEN), Finish.STOP), SEED))
    asked = RESPONSES.read_request({"model": "m", "input": response["output"]})
    assert [part for message in asked.messages for part in message.parts] == [FOREIGN, REDACTED, HIDDEN]


def test_calls_may_be_interleaved() -> None:
    events: list[form.StreamEvent] = [
        form.Started("x", "m"),
        form.ToolStarted(0, 0, "c0", "f"),
        form.ToolStarted(0, 1, "c1", "g"),
        form.ToolArguments(0, 1, '{"b"'),
        form.ToolArguments(0, 0, "{}"),
        form.ToolArguments(0, 1, ":1}"),
        form.TextDelta(0, "so"),
        form.Finished(0, Finish.TOOL_CALLS),
        form.Done(),
    ]
    stream = stream_of(events)
    legal(stream)
    assert said(events_of([stream]))["calls"] == [("c0", "f", "{}"), ("c1", "g", '{"b":1}')]
    assert [item["type"] for item in comparable(accumulated(stream))] == ["function_call", "function_call", "message"]


def test_log_probabilities_come_back() -> None:
    tokens = (TokenLogprob("a", -1.0, (TokenLogprob("b", -2.0),)),)
    start: list[form.StreamEvent] = [form.Started("x", "m"), form.TextDelta(0, "a"), form.Logprobs(0, tokens)]
    stream = stream_of([*start, form.Finished(0, Finish.STOP), form.Done()])
    legal(stream)
    assert form.Logprobs(0, tokens) in events_of([stream])
    whole = replace(answer_of((), Finish.STOP), choices=(Choice(0, (Text("a"),), Finish.STOP, logprobs=tokens),))
    again = RESPONSES.read_whole(RESPONSES.write_whole(whole, SEED), SEED)
    assert again.choices[0].logprobs == tokens
    assert told(stream)[-1]["response"]["output"] == json.loads(RESPONSES.write_whole(whole, SEED))["output"]


def test_a_citation_that_comes_late_is_in_the_response() -> None:
    start: list[form.StreamEvent] = [form.Started("x", "m"), form.TextDelta(0, "ab"), form.ToolStarted(0, 0, "c", "f")]
    stream = stream_of([*start, form.Cited(0, Citation("u")), form.Finished(0, Finish.STOP), form.Done()])
    message = told(stream)[-1]["response"]["output"][0]
    assert [annotation["url"] for annotation in message["content"][0]["annotations"]] == ["u"]


def test_a_refusal_without_words_is_a_filters() -> None:
    response = json.loads(RESPONSES.write_whole(answer_of((Text("Hel"),), Finish.REFUSAL), SEED))
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "content_filter"})


def test_what_cannot_be_read_has_failed() -> None:
    answer = answer_of((Text("Hel"),), Finish.ERROR)
    whole = RESPONSES.write_whole(answer, SEED)
    assert json.loads(whole)["status"] == "failed"
    with pytest.raises(ValueError, match="failed"):
        RESPONSES.read_whole(whole, SEED)
    assert told(stream_of(events_for(answer)))[-1]["type"] == "response.failed"


def test_an_error_ends_the_stream_and_raises_in_the_official_client() -> None:
    error = ProviderError("overloaded", status=503, code="server_overloaded")
    stream = stream_of([form.Started("x", "m"), form.TextDelta(0, "a"), form.Failed(error), form.Done()])
    event = told(stream)[-1]
    assert (event["type"], event["code"], event["message"]) == ("error", "server_overloaded", "overloaded")
    assert event["sequence_number"] == len(told(stream)) - 1
    with pytest.raises(openai.APIError, match="overloaded"):
        accumulated(stream)


def test_a_stream_that_broke_off_is_not_closed() -> None:
    stream = stream_of([form.Started("x", "m"), form.TextDelta(0, "a")])
    assert "response.completed" not in {event["type"] for event in told(stream)}
    with pytest.raises(RuntimeError):
        accumulated(stream)


def test_half_surrogate_pairs_go_through() -> None:
    halves: list[form.StreamEvent] = [form.TextDelta(0, "\ud83d"), form.TextDelta(0, "\ude00")]
    stream = stream_of([form.Started("x", "m"), *halves, form.Finished(0, Finish.STOP), form.Done()])
    assert b"\\ud83d" in stream
