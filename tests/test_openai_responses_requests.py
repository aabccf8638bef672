"""Requests of Responses, to and from the canonical form."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.dialects.dialect import ChatDialect
from extproc.dialects.openai_responses import OpenAIResponses
from extproc.errors import BadRequest
from extproc.form import (
    Audio,
    Choose,
    Document,
    Feature,
    Format,
    Image,
    Message,
    Output,
    Part,
    Reasoning,
    Refusal,
    Request,
    Role,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    carry,
    features,
)
from tests.each import each_case
from tests.recordings import Case, protocol_cases
from tests.test_openai_responses_calls import JSON, TAKEN

RESPONSES: ChatDialect = OpenAIResponses()
OWN = "openai-responses"
PNG = "data:image/png;base64,AAAA"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
TEXT_FILE = "data:text/plain;base64," + base64.b64encode(b"words").decode()


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "gpt-5", "input": "Hello", **fields}


def read(**fields: Any) -> Request:
    body = request(**fields)
    RESPONSES.read_call(body)
    return RESPONSES.read_request(body)


def write(asked: Request, model: str = "gpt-5", cap: int | None = None) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(RESPONSES.write_request(asked, model, cap))
    return body


def one(role: Role, *parts: Part) -> Request:
    return Request("gpt-5", (Message(role, parts),))


# --- From a caller ----------------------------------------------------------------------------------------------------

FUNCTION = {"type": "function", "name": "f", "description": "does", "parameters": SCHEMA, "strict": True}
NAMED = {"type": "function", "name": "f"}
ALLOWED = {"type": "allowed_tools", "mode": "required", "tools": [NAMED]}
JSON_SCHEMA = {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True, "description": "d"}

FIELDS: dict[str, tuple[dict[str, Any], str, object]] = {
    "model": ({}, "model", "gpt-5"),
    "stream": ({"stream": True}, "stream", True),
    "cap": ({"max_output_tokens": 16}, "cap", 16),
    "temperature": ({"temperature": 1}, "temperature", 1),
    "top_p": ({"top_p": 0.5}, "top_p", 0.5),
    "log probabilities": ({"include": ["message.output_text.logprobs"]}, "logprobs", True),
    "no log probabilities": ({"include": ["reasoning.encrypted_content"], "top_logprobs": 0}, "top_logprobs", None),
    "likeliest tokens": ({"top_logprobs": 3}, "top_logprobs", 3),
    "tools": ({"tools": [FUNCTION]}, "tools", (Tool("f", "does", SCHEMA, True),)),
    "tools, nested": (
        {"tools": [{"type": "function", "name": "f", "function": {"name": "f", "parameters": SCHEMA}}]},
        "tools",
        (Tool("f", None, SCHEMA),),
    ),
    "tool choice": ({"tool_choice": "required"}, "tool_choice", ToolChoice(Choose.REQUIRED)),
    "tool choice, named": ({"tool_choice": NAMED}, "tool_choice", ToolChoice(Choose.NAMED, ("f",))),
    "tool choice, some": ({"tool_choice": ALLOWED}, "tool_choice", ToolChoice(Choose.REQUIRED, ("f",))),
    "serial calls": ({"parallel_tool_calls": False}, "parallel_tool_calls", False),
    "text": ({"text": {"format": {"type": "text"}}}, "format", Format(Output.TEXT)),
    "JSON": ({"text": {"format": {"type": "json_object"}}}, "format", Format(Output.JSON)),
    "schema": ({"text": {"format": JSON_SCHEMA}}, "format", Format(Output.SCHEMA, SCHEMA, "s", "d", True)),
    "effort": ({"reasoning": {"effort": "low"}}, "reasoning", Reasoning("low")),
    "summary": ({"reasoning": {"summary": "auto"}}, "reasoning", Reasoning(visible=True)),
    "no reasoning": ({"reasoning": {"effort": None, "summary": None}}, "reasoning", None),
}


@pytest.mark.parametrize(("fields", "name", "expected"), FIELDS.values(), ids=FIELDS)
def test_field(fields: dict[str, Any], name: str, expected: object) -> None:
    asked = read(**fields)
    assert getattr(asked, name) == expected
    assert asked.extras == ()


def item(**fields: Any) -> list[dict[str, Any]]:
    return [fields]


def content(*parts: Any) -> list[dict[str, Any]]:
    return item(role="user", content=list(parts))


SIGNED = {"summary": [{"type": "summary_text", "text": "hm"}], "encrypted_content": "gAAAA"}

INPUTS: dict[str, tuple[Any, Role, tuple[Part, ...]]] = {
    "a string": ("Hello", Role.USER, (Text("Hello"),)),
    "a message": (item(role="developer", content="x"), Role.DEVELOPER, (Text("x"),)),
    "a cache's end": (
        content({"type": "input_text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}),
        Role.USER,
        (Text("x", cache_ttl="5m"),),
    ),
    "an answer": (
        item(
            type="message",
            role="assistant",
            id="msg_1",
            status="completed",
            content=[{"type": "output_text", "text": "a", "annotations": []}, {"type": "refusal", "refusal": "no"}],
        ),
        Role.ASSISTANT,
        (Text("a"), Refusal("no")),
    ),
    "an image": (
        content({"type": "input_image", "image_url": PNG, "detail": "low"}),
        Role.USER,
        (Image("AAAA", "image/png", detail="low"),),
    ),
    "an image's address": (
        content({"type": "input_image", "image_url": "https://x.test/a.png"}),
        Role.USER,
        (Image(url="https://x.test/a.png"),),
    ),
    "a PDF": (
        content({"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,JVBE"}),
        Role.USER,
        (Document("JVBE", "application/pdf", name="a.pdf"),),
    ),
    "a bare PDF": (
        content({"type": "input_file", "file_data": "JVBE"}),
        Role.USER,
        (Document("JVBE", "application/pdf"),),
    ),
    "a PDF's address": (
        content({"type": "input_file", "file_url": "https://x.test/a.pdf"}),
        Role.USER,
        (Document(url="https://x.test/a.pdf"),),
    ),
    "a text file": (
        content({"type": "input_file", "filename": "a.txt", "file_data": TEXT_FILE}),
        Role.USER,
        (Document(text="words", name="a.txt"),),
    ),
    "audio": (
        content({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
        Role.USER,
        (Audio("AAAA", "wav"),),
    ),
    "thoughts": (item(type="reasoning", id="rs_1", **SIGNED), Role.ASSISTANT, (Thinking("hm", "gAAAA", OWN),)),
    "thoughts in full": (
        item(type="reasoning", summary=[], content=[{"type": "reasoning_text", "text": t} for t in ("a", "b")]),
        Role.ASSISTANT,
        (Thinking("a\n\nb"),),
    ),
    "another's thoughts": (
        item(type="reasoning", summary=[], encrypted_content=carry("s", "gemini-generate", OWN)),
        Role.ASSISTANT,
        (Thinking("", "s", "gemini-generate"),),
    ),
    "a call": (
        item(type="function_call", id="fc_1", call_id="call_1", name="f", arguments="{}"),
        Role.ASSISTANT,
        (ToolCall("call_1", "f", "{}"),),
    ),
    "its result": (
        item(type="function_call_output", call_id="call_1", output="done"),
        Role.USER,
        (ToolResult("call_1", (Text("done"),)),),
    ),
    "its result in parts": (
        item(type="function_call_output", call_id="c", output=[{"type": "input_image", "image_url": PNG}]),
        Role.USER,
        (ToolResult("c", (Image("AAAA", "image/png"),)),),
    ),
}


@pytest.mark.parametrize(("given_input", "role", "parts"), INPUTS.values(), ids=INPUTS)
def test_input(given_input: Any, role: Role, parts: tuple[Part, ...]) -> None:
    asked = read(input=given_input)
    assert (asked.messages, asked.extras) == ((Message(role, parts),), ())


def test_instructions_come_first() -> None:
    asked = read(instructions="be brief")
    assert asked.messages == (Message(Role.SYSTEM, (Text("be brief"),)), Message(Role.USER, (Text("Hello"),)))


def test_thoughts_that_are_kept_at_the_provider_say_nothing() -> None:
    assert read(input=item(type="reasoning", id="rs_1", summary=[])).messages == ()


HINTS = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "prompt_cache_key": "k",
    "safety_identifier": "s",
    "service_tier": "flex",
    "stream_options": {"include_obfuscation": False},
    "truncation": "disabled",
    "background": False,
    "max_tool_calls": 3,
    "include": ["file_search_call.results"],
}


def test_hints_are_let_go() -> None:
    assert read(**HINTS).extras == ()


UNTRANSLATABLE: dict[str, tuple[dict[str, Any], str]] = {
    "an earlier response": ({"previous_response_id": "resp_1"}, "previous_response_id"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "verbosity": ({"text": {"verbosity": "low"}}, "text.verbosity"),
    "a mode of reasoning": ({"reasoning": {"effort": "low", "mode": "pro"}}, "reasoning.mode"),
    "a provider's tool": ({"tools": [FUNCTION, {"type": "web_search"}]}, "tools[1]"),
    "a custom tool": ({"tools": [{"type": "custom", "name": "sql"}]}, "tools[0]"),
    "a tool that is found later": ({"tools": [{**FUNCTION, "defer_loading": True}]}, "tools[0].defer_loading"),
    "a choice of a provider's tool": ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
    "a choice among providers' tools": (
        {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}},
        "tool_choice",
    ),
    "an earlier search": ({"input": item(type="web_search_call", id="ws_1")}, "input[0]"),
    "an earlier custom call": (
        {"input": item(type="custom_tool_call", call_id="c", name="n", input="i")},
        "input[0]",
    ),
    "a reference": ({"input": item(type="item_reference", id="msg_1")}, "input[0]"),
    "an unknown field": ({"context_management": [{"type": "compaction"}]}, "context_management"),
}


@pytest.mark.parametrize(("fields", "extra"), UNTRANSLATABLE.values(), ids=UNTRANSLATABLE)
def test_extras(fields: dict[str, Any], extra: str) -> None:
    assert read(**fields).extras == (extra,)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": ({"temperature": "1"}, "temperature"),
    "role": ({"input": item(role="tool", content="x")}, "input[0].role"),
    "call without name": ({"input": item(type="function_call", call_id="c")}, "input[0].name"),
    "call without arguments": ({"input": item(type="function_call", call_id="c", name="f")}, "input[0].arguments"),
    "result without call": ({"input": item(type="function_call_output", output="x")}, "input[0].call_id"),
    "audio without format": (
        {"input": content({"type": "input_audio", "input_audio": {"data": "A"}})},
        "input[0].content[0].input_audio.format",
    ),
    "a text file of no text": (
        {"input": content({"type": "input_file", "file_data": "data:text/plain;base64,/w=="})},
        "input[0].content[0].file_data",
    ),
    "tool without name": ({"tools": [{"type": "function"}]}, "tools[0].name"),
    "parameters a string": ({"tools": [{**FUNCTION, "parameters": "x"}]}, "tools[0].parameters"),
    "tool choice": ({"tool_choice": "some"}, "tool_choice"),
    "tool choice a number": ({"tool_choice": 1}, "tool_choice"),
    "tool choice without name": ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
    "allowed tools without mode": ({"tool_choice": {"type": "allowed_tools", "tools": [NAMED]}}, "tool_choice.mode"),
    "format": ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
    "schema missing": ({"text": {"format": {"type": "json_schema", "name": "s"}}}, "text.format.schema"),
    "text a string": ({"text": "json"}, "text"),
    "summary a number": ({"reasoning": {"summary": 1}}, "reasoning.summary"),
    "include a string": ({"include": "x"}, "include"),
    "top_logprobs": ({"top_logprobs": "3"}, "top_logprobs"),
    "parallel calls": ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    "truncation": ({"truncation": 1}, "truncation"),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(**fields)
    assert refused.value.param == param


@given(st.sampled_from(("input", "tools", "tool_choice", "text", "reasoning", "include", "temperature")), JSON)
def test_any_value_is_read_or_refused(name: str, value: Any) -> None:
    with suppress(BadRequest):
        assert read(**{name: value}).model == "gpt-5"


# --- To a provider ----------------------------------------------------------------------------------------------------

WRITTEN: dict[str, tuple[Request, str, object]] = {
    "stream": (Request("m", (), stream=True), "stream", True),
    "temperature": (Request("m", (), temperature=0.0), "temperature", 0.0),
    "tools are not strict": (
        Request("m", (), tools=(Tool("f"),)),
        "tools",
        [{"type": "function", "name": "f", "description": None, "parameters": None, "strict": False}],
    ),
    "a strict tool": (Request("m", (), tools=(Tool("f", "does", SCHEMA, True),)), "tools", [FUNCTION]),
    "choice": (Request("m", (), tool_choice=ToolChoice(Choose.NONE)), "tool_choice", "none"),
    "choice, named": (Request("m", (), tool_choice=ToolChoice(Choose.NAMED, ("f",))), "tool_choice", NAMED),
    "choice, some": (Request("m", (), tool_choice=ToolChoice(Choose.REQUIRED, ("f",))), "tool_choice", ALLOWED),
    "JSON": (Request("m", (), format=Format(Output.JSON)), "text", {"format": {"type": "json_object"}}),
    "schema": (
        Request("m", (), format=Format(Output.SCHEMA, SCHEMA, "s", "d", True)),
        "text",
        {"format": JSON_SCHEMA},
    ),
    "log probabilities": (Request("m", (), logprobs=True), "include", ["message.output_text.logprobs"]),
    "nothing is stored": (Request("m", ()), "store", False),
    "effort": (Request("m", (), reasoning=Reasoning("low")), "reasoning", {"effort": "low"}),
    "thoughts come encrypted": (
        Request("m", (), reasoning=Reasoning("low")),
        "include",
        ["reasoning.encrypted_content"],
    ),
    "a budget": (Request("m", (), reasoning=Reasoning(budget_tokens=4_000)), "reasoning", {"effort": "low"}),
    "a large budget": (Request("m", (), reasoning=Reasoning(budget_tokens=90_000)), "reasoning", {"effort": "high"}),
    "to be seen": (Request("m", (), reasoning=Reasoning(visible=True)), "reasoning", {"summary": "auto"}),
    "no thoughts": (Request("m", (), reasoning=Reasoning(budget_tokens=0)), "reasoning", {"effort": "minimal"}),
}


@pytest.mark.parametrize(("asked", "name", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_written(asked: Request, name: str, expected: object) -> None:
    assert write(asked).get(name) == expected


LEAST = {"gpt-5.1": "none", "openai/gpt-5-mini": "minimal", "o3": "low", "grok-4": "none", "gpt-4.1": None}


@pytest.mark.parametrize(("model", "effort"), LEAST.items())
def test_no_thoughts_in_a_word_that_the_model_knows(model: str, effort: str | None) -> None:
    body = write(Request("m", (), reasoning=Reasoning("none")), model)
    assert body.get("reasoning") == (effort and {"effort": effort})
    assert ("include" in body) is (effort in ("minimal", "low"))


def test_model_and_cap() -> None:
    assert write(Request("m", ()), "gpt-4.1", 50) == {
        "model": "gpt-4.1",
        "input": [],
        "max_output_tokens": 50,
        "store": False,
    }


ITEMS: dict[str, tuple[Request, list[dict[str, Any]]]] = {
    "system": (one(Role.SYSTEM, Text("a")), [{"role": "system", "content": [{"type": "input_text", "text": "a"}]}]),
    "an answer": (
        one(Role.ASSISTANT, Text("a"), Refusal("b")),
        [
            {
                "role": "assistant",
                "content": [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}],
            }
        ],
    ),
    "image": (
        one(Role.USER, Image("AAAA", "image/png")),
        [{"role": "user", "content": [{"type": "input_image", "image_url": PNG, "detail": "auto"}]}],
    ),
    "PDF": (
        one(Role.USER, Document("JVBE", "application/pdf")),
        [
            {
                "role": "user",
                "content": [
                    {
                        "type": "input_file",
                        "filename": "document.pdf",
                        "file_data": "data:application/pdf;base64,JVBE",
                    }
                ],
            }
        ],
    ),
    "text file": (
        one(Role.USER, Document(text="words", name="a.txt")),
        [{"role": "user", "content": [{"type": "input_file", "filename": "a.txt", "file_data": TEXT_FILE}]}],
    ),
    "address": (
        one(Role.USER, Document(url="https://x.test/a.pdf")),
        [{"role": "user", "content": [{"type": "input_file", "file_url": "https://x.test/a.pdf"}]}],
    ),
    "own thoughts, text, call": (
        one(Role.ASSISTANT, Thinking("hm", "gAAAA", OWN), Text("a"), ToolCall("c", "f", "{}")),
        [
            {"type": "reasoning", **SIGNED},
            {"role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        ],
    ),
    "others' thoughts": (one(Role.ASSISTANT, Thinking("hm", "s", "gemini-generate"), Thinking("hm")), []),
    "result, then text": (
        one(Role.USER, ToolResult("c", (Text("done"),)), Text("go on")),
        [
            {"type": "function_call_output", "call_id": "c", "output": "done"},
            {"role": "user", "content": [{"type": "input_text", "text": "go on"}]},
        ],
    ),
    "result of nothing": (
        one(Role.USER, ToolResult("c", ())),
        [{"type": "function_call_output", "call_id": "c", "output": ""}],
    ),
    "result in parts": (
        one(Role.USER, ToolResult("c", (Text("a"), Image("AAAA", "image/png")))),
        [
            {
                "type": "function_call_output",
                "call_id": "c",
                "output": [
                    {"type": "input_text", "text": "a"},
                    {"type": "input_image", "image_url": PNG, "detail": "auto"},
                ],
            }
        ],
    ),
}


@pytest.mark.parametrize(("asked", "items"), ITEMS.values(), ids=ITEMS)
def test_items(asked: Request, items: list[dict[str, Any]]) -> None:
    expected = [one_item if "type" in one_item else {"type": "message", **one_item} for one_item in items]
    assert write(asked)["input"] == expected


def test_every_feature_has_a_name_for_the_caller() -> None:
    assert set(RESPONSES.fields) == set(Feature)
    assert all(RESPONSES.fields.values())


# --- Both ways --------------------------------------------------------------------------------------------------------


def as_written(asked: Request) -> Request:
    """Without what a request says by leaving it out, or says of caches."""
    tools = tuple(replace(tool, strict=tool.strict or False) for tool in asked.tools)
    messages = tuple(replace(message, parts=tuple(map(_uncached, message.parts))) for message in asked.messages)
    signed = [m for m in messages if not any(isinstance(p, Thinking) and p.signature is None for p in m.parts)]
    return replace(asked, tools=tools, messages=tuple(signed), extras=())


def _uncached(part: Part) -> Part:
    if isinstance(part, Image):
        return replace(part, detail=part.detail or "auto")
    return replace(part, cache_ttl=None) if isinstance(part, Text) else part


@each_case(TAKEN)
def test_recorded_requests_written_again(case: Case) -> None:
    assert case.request is not None
    asked = RESPONSES.read_request(case.request)
    body = write(asked, asked.model, asked.cap)
    RESPONSES.read_call(body)
    again = RESPONSES.read_request(body)
    assert again == as_written(asked)
    assert write(again, again.model, again.cap) == body
    assert not features(asked) & RESPONSES.cannot


def test_there_are_recorded_requests() -> None:
    assert len([case for case in protocol_cases("openai-responses") if case.request]) >= 3
