"""OpenAI's chat requests, to and from the canonical form."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.dialects.openai_chat import OpenAIChat
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
    features,
)
from tests.each import each_case
from tests.recordings import Case, chat_cases

CHAT = OpenAIChat()
HELLO = {"role": "user", "content": "Hello"}
DATA_URL = "data:image/png;base64,AAAA"
SCHEMA = {"type": "object", "properties": {"x": {"type": "number"}}}


def read(**fields: Any) -> Request:
    body = {"model": "gpt-4o", "messages": [HELLO], **fields}
    CHAT.read_call(body)
    return CHAT.read_request(body)


def parts_of(message: dict[str, Any]) -> tuple[Part, ...]:
    request = read(messages=[message])
    assert len(request.messages) == 1
    assert request.extras == ()
    return request.messages[0].parts


# --- Read: fields -----------------------------------------------------------------------------------------------------


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


READ: dict[str, tuple[dict[str, Any], str, object]] = {
    "stream": ({"stream": True}, "stream", True),
    "max_tokens": ({"max_tokens": 7}, "cap", 7),
    "max_completion_tokens": ({"max_completion_tokens": 7}, "cap", 7),
    "n": ({"n": 2}, "choices", 2),
    "temperature": ({"temperature": 1.5}, "temperature", 1.5),
    "temperature, whole": ({"temperature": 1}, "temperature", 1),
    "temperature null": ({"temperature": None}, "temperature", None),
    "top_p": ({"top_p": 0.5}, "top_p", 0.5),
    "top_k": ({"top_k": 5}, "top_k", 5),
    "stop": ({"stop": "a"}, "stop", ("a",)),
    "stops": ({"stop": ["a", "b"]}, "stop", ("a", "b")),
    "stop null": ({"stop": None}, "stop", ()),
    "seed": ({"seed": 7}, "seed", 7),
    "presence penalty": ({"presence_penalty": -1}, "presence_penalty", -1),
    "frequency penalty": ({"frequency_penalty": 0.5}, "frequency_penalty", 0.5),
    "logit bias": ({"logit_bias": {"50256": -100}}, "logit_bias", {"50256": -100}),
    "logprobs": ({"logprobs": True}, "logprobs", True),
    "top logprobs": ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", 3),
    "one call at a time": ({"parallel_tool_calls": False}, "parallel_tool_calls", False),
    "tool": (
        {"tools": [function("f", description="d", parameters=SCHEMA, strict=True)]},
        "tools",
        (Tool("f", "d", SCHEMA, True),),
    ),
    "tool, bare": ({"tools": [function("f")]}, "tools", (Tool("f"),)),
    "tool to cache": (
        {"tools": [{**function("f"), "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
        "tools",
        (Tool("f", cache_ttl="1h"),),
    ),
    "tools as it likes": ({"tool_choice": "auto"}, "tool_choice", ToolChoice(Choose.AUTO)),
    "no tools": ({"tool_choice": "none"}, "tool_choice", ToolChoice(Choose.NONE)),
    "some tool": ({"tool_choice": "required"}, "tool_choice", ToolChoice(Choose.REQUIRED)),
    "some tool, in Mistral's word": ({"tool_choice": "any"}, "tool_choice", ToolChoice(Choose.REQUIRED)),
    "this tool": ({"tool_choice": function("f")}, "tool_choice", ToolChoice(Choose.NAMED, ("f",))),
    "some tools": (
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "required", "tools": [function("f"), function("g")]},
            }
        },
        "tool_choice",
        ToolChoice(Choose.REQUIRED, ("f", "g")),
    ),
    "text": ({"response_format": {"type": "text"}}, "format", Format(Output.TEXT)),
    "JSON": ({"response_format": {"type": "json_object"}}, "format", Format(Output.JSON)),
    "JSON schema": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "n", "description": "d", "schema": SCHEMA, "strict": True},
            }
        },
        "format",
        Format(Output.SCHEMA, SCHEMA, "n", "d", True),
    ),
    "effort": ({"reasoning_effort": "high"}, "reasoning", Reasoning("high")),
    "OpenRouter's effort": ({"reasoning": {"effort": "low"}}, "reasoning", Reasoning("low")),
    "OpenRouter's budget": (
        {"reasoning": {"max_tokens": 2000, "exclude": True}},
        "reasoning",
        Reasoning(budget_tokens=2000, visible=False),
    ),
    "OpenRouter's on": ({"reasoning": {"enabled": True}}, "reasoning", Reasoning("medium")),
    "OpenRouter's off": ({"reasoning": {"enabled": False}}, "reasoning", Reasoning("none")),
    "Anthropic's budget": (
        {"thinking": {"type": "enabled", "budget_tokens": 2000}},
        "reasoning",
        Reasoning(budget_tokens=2000),
    ),
    "Anthropic's off": ({"thinking": {"type": "disabled"}}, "reasoning", Reasoning(budget_tokens=0)),
    "hints": (
        {"user": "u", "metadata": {}, "store": True, "prompt_cache_key": "k", "service_tier": "flex"},
        "extras",
        (),
    ),
    "modalities as ever": ({"modalities": ["text"]}, "extras", ()),
    "null is nothing": ({"x_new": None, "functions": None}, "extras", ()),
}


@pytest.mark.parametrize(("fields", "name", "expected"), READ.values(), ids=READ)
def test_read(fields: dict[str, Any], name: str, expected: object) -> None:
    request = read(**fields)
    assert getattr(request, name) == expected
    assert request.extras == ()


def test_a_plain_request() -> None:
    assert read() == Request("gpt-4o", (Message(Role.USER, (Text("Hello"),)),))


# What only a provider of this dialect could do is named, in the caller's words.
EXTRAS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown": ({"x_new": 1}, ("x_new",)),
    "functions": ({"functions": [{"name": "f"}], "function_call": "auto"}, ("functions", "function_call")),
    "sound": ({"modalities": ["text", "audio"], "audio": {"voice": "alloy"}}, ("modalities", "audio")),
    "a search": ({"web_search_options": {}}, ("web_search_options",)),
    "a tool of the provider's": ({"tools": [function("f"), {"type": "web_search"}]}, ("tools[1]",)),
    "a tool without a schema": ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, ("tools[0]",)),
    "a choice of such a tool": ({"tool_choice": {"type": "custom", "custom": {"name": "f"}}}, ("tool_choice",)),
    "a grammar": ({"response_format": {"type": "grammar"}}, ("response_format",)),
    "a function's result": (
        {"messages": [HELLO, {"role": "function", "name": "f", "content": "1"}]},
        ("messages[1].role",),
    ),
    "a function's call": (
        {"messages": [{"role": "assistant", "function_call": {"name": "f", "arguments": "{}"}}]},
        ("messages[0].function_call",),
    ),
    "a call without a schema": (
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom", "id": "c", "custom": {}}]}]},
        ("messages[0].tool_calls[0]",),
    ),
    "an earlier sound": ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, ("messages[0].audio",)),
    "sound without a format": (
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "AAAA"}]}]},
        ("messages[0].content[0].input_audio",),
    ),
}


@pytest.mark.parametrize(("fields", "expected"), EXTRAS.values(), ids=EXTRAS)
def test_extras(fields: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert read(**fields).extras == expected


# --- Read: messages ---------------------------------------------------------------------------------------------------


def user(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts), **fields}


def file(data: str, **fields: Any) -> dict[str, Any]:
    return {"type": "file", "file": {"file_data": data, **fields}}


CACHE = {"cache_control": {"type": "ephemeral"}}
TEXT = {"type": "text", "text": "a"}
TOOL = {"role": "tool", "tool_call_id": "c"}

PARTS: dict[str, tuple[dict[str, Any], tuple[Part, ...]]] = {
    "a string": (HELLO, (Text("Hello"),)),
    "no content": ({"role": "user", "content": None}, ()),
    "text": (user(TEXT, TEXT), (Text("a"), Text("a"))),
    "text to cache": (user({**TEXT, **CACHE}, TEXT), (Text("a", "5m"), Text("a"))),
    "a message to cache": (user(TEXT, TEXT, **CACHE), (Text("a"), Text("a", "5m"))),
    "a string to cache": ({**HELLO, **CACHE}, (Text("Hello", "5m"),)),
    "image by address": (
        user({"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}}),
        (Image(url="https://x/y.png", detail="low"),),
    ),
    "image": (user({"type": "image_url", "image_url": {"url": DATA_URL}}), (Image("AAAA", "image/png"),)),
    "image, a bare address": (user({"type": "image_url", "image_url": DATA_URL}), (Image("AAAA", "image/png"),)),
    "sound": (user({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}), (Audio("AA", "wav"),)),
    "PDF": (
        user(file("data:application/pdf;base64,AAAA", filename="a.pdf")),
        (Document("AAAA", "application/pdf", name="a.pdf"),),
    ),
    "PDF, bare": (user(file("AAAA")), (Document("AAAA", "application/pdf"),)),
    "file by address": (user(file("https://x/y.pdf")), (Document(url="https://x/y.pdf"),)),
    "text file": (
        user(file("data:text/plain;base64," + base64.b64encode("hé".encode()).decode())),
        (Document(text="hé"),),
    ),
    "tool result": ({**TOOL, "content": "1"}, (ToolResult("c", (Text("1"),)),)),
    "tool result in parts": ({**TOOL, "content": [TEXT, TEXT]}, (ToolResult("c", (Text("a"), Text("a"))),)),
    "tool result with an image": (
        {**TOOL, "content": [{"type": "image_url", "image_url": {"url": DATA_URL}}]},
        (ToolResult("c", (Image("AAAA", "image/png"),)),),
    ),
}


@pytest.mark.parametrize(("message", "expected"), PARTS.values(), ids=PARTS)
def test_parts(message: dict[str, Any], expected: tuple[Part, ...]) -> None:
    assert parts_of(message) == expected


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_roles(role: str) -> None:
    message = {"role": role, "content": "a", "name": "ann"}
    assert read(messages=[message]).messages == (Message(Role(role), (Text("a"),), "ann"),)


def call(call_id: str, name: str = "f", arguments: str | None = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


CLAUDES = {"type": "reasoning.text", "text": "hm", "signature": "s", "format": "anthropic-claude-v1", "index": 0}
REDACTED = {"type": "reasoning.encrypted", "data": "r", "format": "anthropic-claude-v1"}
GEMINIS = {"type": "reasoning.encrypted", "data": "g", "format": "google-gemini-v1", "id": "c2"}
XAIS = {"type": "reasoning.encrypted", "data": "x", "format": "xai-responses-v1", "index": 1}

ASSISTANTS: dict[str, tuple[dict[str, Any], tuple[Part, ...]]] = {
    "text": ({"content": "a"}, (Text("a"),)),
    "text in parts": ({"content": [TEXT, {"type": "refusal", "refusal": "no"}]}, (Text("a"), Refusal("no"))),
    "refusal": ({"content": None, "refusal": "no"}, (Refusal("no"),)),
    "calls": (
        {"content": "a", "tool_calls": [call("c1", arguments='{"x": 1.0}'), call("c2", arguments="")]},
        (Text("a"), ToolCall("c1", "f", '{"x": 1.0}'), ToolCall("c2", "f", "{}")),
    ),
    "thoughts": ({"content": "a", "reasoning_content": "hm"}, (Thinking("hm"), Text("a"))),
    "thoughts by another name": ({"content": "a", "reasoning": "hm"}, (Thinking("hm"), Text("a"))),
    "a signature": (
        {"content": "a", "reasoning_content": "hm", "reasoning_details": [CLAUDES]},
        (Thinking("hm", "s", "anthropic-messages"), Text("a")),
    ),
    "several": (
        {"reasoning_content": "hm", "reasoning_details": [CLAUDES, REDACTED]},
        (Thinking("hm", "s", "anthropic-messages"), Thinking("", "r", "anthropic-messages", redacted=True)),
    ),
    "a call's own signature": (
        {"content": "a", "tool_calls": [call("c1"), call("c2")], "reasoning_details": [GEMINIS]},
        (Text("a"), ToolCall("c1", "f", "{}"), Thinking("", "g", "gemini"), ToolCall("c2", "f", "{}")),
    ),
    "text that no entry has": (
        {"reasoning": "hm", "reasoning_details": [{**GEMINIS, "id": "x"}]},
        (Thinking("hm"), Thinking("", "g", "gemini")),
    ),
    "no such origin": (
        {"reasoning_details": [XAIS]},
        (Thinking("", '{"type":"reasoning.encrypted","data":"x","format":"xai-responses-v1"}', "openai-chat"),),
    ),
}


@pytest.mark.parametrize(("fields", "expected"), ASSISTANTS.values(), ids=ASSISTANTS)
def test_assistant(fields: dict[str, Any], expected: tuple[Part, ...]) -> None:
    assert parts_of({"role": "assistant", **fields}) == expected


# --- Read: what is refused --------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature a string": ({"temperature": "1"}, "temperature"),
    "temperature a boolean": ({"temperature": True}, "temperature"),
    "seed a decimal": ({"seed": 1.5}, "seed"),
    "stop a number": ({"stop": 7}, "stop"),
    "stop of numbers": ({"stop": ["a", 7]}, "stop[1]"),
    "logprobs a number": ({"logprobs": 5}, "logprobs"),
    "logit bias a list": ({"logit_bias": []}, "logit_bias"),
    "unknown role": ({"messages": [{"role": "judge", "content": "a"}]}, "messages[0].role"),
    "result of no call": ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].tool_call_id"),
    "call without an id": (
        {"messages": [HELLO, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]},
        "messages[1].tool_calls[0].id",
    ),
    "call without a name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {}}]}]},
        "messages[0].tool_calls[0].function.name",
    ),
    "arguments an object": (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": {}}}]}]},
        "messages[0].tool_calls[0].function.arguments",
    ),
    "sound without a format": (
        {"messages": [user({"type": "input_audio", "input_audio": {"data": "AA"}})]},
        "messages[0].content[0].input_audio.format",
    ),
    "text that is none": (
        {"messages": [user(file("data:text/plain;base64,gICA"))]},
        "messages[0].content[0].file.file_data",
    ),
    "tool without a type": ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
    "tool without a name": ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
    "strict a string": ({"tools": [function("f", strict="yes")]}, "tools[0].function.strict"),
    "tool choice unknown": ({"tool_choice": "perhaps"}, "tool_choice"),
    "tool choice a number": ({"tool_choice": 7}, "tool_choice"),
    "tool choice without a name": ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    "allowed tools in no mode": (
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "x", "tools": []}}},
        "tool_choice.allowed_tools.mode",
    ),
    "format without a type": ({"response_format": {}}, "response_format.type"),
    "format without a schema": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    "schema a string": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
        "response_format.json_schema.schema",
    ),
    "effort a number": ({"reasoning_effort": 3}, "reasoning_effort"),
    "budget a string": ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking.budget_tokens"),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
def test_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        read(**fields)
    assert refusal.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**10) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "stream", "n", "max_tokens", "temperature", "top_k", "stop", "seed", "logit_bias", "logprobs", "tools",
    "tool_choice", "response_format", "reasoning", "thinking", "reasoning_effort",
)  # fmt: skip
MESSAGE_FIELDS = (
    "content", "name", "refusal", "tool_calls", "tool_call_id", "function_call", "audio", "reasoning",
    "reasoning_content", "reasoning_details", "cache_control",
)  # fmt: skip
MESSAGES = st.builds(
    lambda role, fields: {"role": role, **fields},
    st.sampled_from(("system", "developer", "user", "assistant", "tool", "function")),
    st.dictionaries(st.sampled_from(MESSAGE_FIELDS), JSON),
)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.lists(MESSAGES, max_size=3))
def test_any_value_is_read_or_refused(fields: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    try:
        request = read(**fields, messages=messages)
    except BadRequest:
        return
    json.loads(CHAT.write_request(request, "m", 5))


# --- Written ----------------------------------------------------------------------------------------------------------


def written(request: Request, model: str = "gpt-4o", cap: int | None = None) -> Any:
    return json.loads(CHAT.write_request(request, model, cap))


PLAIN = Request("claude", (Message(Role.USER, (Text("Hello"),)),))

WRITTEN: dict[str, tuple[Request, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "stream": (replace(PLAIN, stream=True), {"stream": True, "stream_options": {"include_usage": True}}),
    "the caller's cap is the gate's to give": (replace(PLAIN, cap=7), {}),
    "all the figures": (
        replace(
            PLAIN,
            choices=2,
            temperature=1.5,
            top_p=0.5,
            stop=("a", "b"),
            seed=7,
            presence_penalty=0.0,
            frequency_penalty=1,
            logit_bias={"1": 2},
            logprobs=True,
            top_logprobs=3,
        ),
        {
            "n": 2,
            "temperature": 1.5,
            "top_p": 0.5,
            "stop": ["a", "b"],
            "seed": 7,
            "presence_penalty": 0.0,
            "frequency_penalty": 1,
            "logit_bias": {"1": 2},
            "logprobs": True,
            "top_logprobs": 3,
        },
    ),
    "tools": (
        replace(PLAIN, tools=(Tool("f", "d", SCHEMA, True, "5m"), Tool("g")), parallel_tool_calls=False),
        {
            "tools": [function("f", description="d", parameters=SCHEMA, strict=True), function("g")],
            "parallel_tool_calls": False,
            "tool_choice": None,
        },
    ),
    "nothing of tools without tools": (
        replace(PLAIN, parallel_tool_calls=False, tool_choice=ToolChoice(Choose.AUTO)),
        {},
    ),
    "this tool": (
        replace(PLAIN, tools=(Tool("f"),), tool_choice=ToolChoice(Choose.NAMED, ("f",))),
        {"tools": [function("f")], "tool_choice": function("f")},
    ),
    "some tools": (
        replace(PLAIN, tools=(Tool("f"),), tool_choice=ToolChoice(Choose.AUTO, ("f",))),
        {
            "tools": [function("f")],
            "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [function("f")]}},
        },
    ),
    "any tool": (
        replace(PLAIN, tools=(Tool("f"),), tool_choice=ToolChoice(Choose.REQUIRED)),
        {"tools": [function("f")], "tool_choice": "required"},
    ),
    "text": (replace(PLAIN, format=Format(Output.TEXT)), {}),
    "JSON": (replace(PLAIN, format=Format(Output.JSON)), {"response_format": {"type": "json_object"}}),
    "JSON schema": (
        replace(PLAIN, format=Format(Output.SCHEMA, SCHEMA)),
        {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}},
    ),
}


@pytest.mark.parametrize(("request_", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_written(request_: Request, expected: dict[str, Any]) -> None:
    assert written(request_) == {
        **{"model": "gpt-4o", "messages": [HELLO]},
        **{name: value for name, value in expected.items() if value is not None},
    }


def test_the_cap_and_the_model_are_the_targets() -> None:
    body = written(replace(PLAIN, cap=7), model="o3", cap=5)
    assert (body["model"], body["max_completion_tokens"]) == ("o3", 5)


@pytest.mark.parametrize(
    ("model", "reasoning", "expected"),
    [
        ("gpt-5", Reasoning("high"), "high"),
        ("gpt-5", Reasoning(budget_tokens=2_048), "low"),
        ("gpt-5", Reasoning(visible=True), None),
        ("gpt-4o", Reasoning("high"), None),
    ],
    ids=["effort", "budget", "as it likes", "a model that does not think"],
)
def test_reasoning_is_written(model: str, reasoning: Reasoning, expected: str | None) -> None:
    assert written(replace(PLAIN, reasoning=reasoning), model).get("reasoning_effort") == expected


OWN = '{"type":"reasoning.encrypted","data":"x","format":"xai-responses-v1"}'
OWN_TEXT = '{"type":"reasoning.text","signature":"s","format":"anthropic-claude-v1"}'

MESSAGES_WRITTEN: dict[str, tuple[list[Message], list[dict[str, Any]]]] = {
    "instructions": (
        [Message(Role.SYSTEM, (Text("a"),)), Message(Role.DEVELOPER, (Text("b", "1h"),))],
        [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}],
    ),
    "parts": (
        [
            Message(
                Role.USER,
                (
                    Text("a", "5m"),
                    Image("AAAA", "image/png", detail="low"),
                    Image(url="https://x/y.png"),
                    Document("AAAA", "application/pdf"),
                    Document(text="plain"),
                    Audio("AA", "mp3"),
                ),
                "ann",
            )
        ],
        [
            {
                "role": "user",
                "name": "ann",
                "content": [
                    TEXT,
                    {"type": "image_url", "image_url": {"url": DATA_URL, "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
                    file("data:application/pdf;base64,AAAA", filename="document.pdf"),
                    {"type": "text", "text": "plain"},
                    {"type": "input_audio", "input_audio": {"data": "AA", "format": "mp3"}},
                ],
            }
        ],
    ),
    "results before words": (
        [Message(Role.USER, (Text("so?"), ToolResult("c1", (Text("1"),)), ToolResult("c2", (), is_error=True)))],
        [
            {"role": "tool", "tool_call_id": "c1", "content": "1"},
            {"role": "tool", "tool_call_id": "c2", "content": ""},
            {"role": "user", "content": "so?"},
        ],
    ),
    "a result in parts": (
        [Message(Role.USER, (ToolResult("c", (Text("a"), Document(text="b"), Image("AAAA"))),))],
        [
            {
                **TOOL,
                "content": [TEXT, {"type": "text", "text": "b"}, {"type": "image_url", "image_url": {"url": DATA_URL}}],
            }
        ],
    ),
    "a turn": (
        [Message(Role.ASSISTANT, (Text("a"), Text("b"), ToolCall("c1", "f", '{"x": 1.0}'), Refusal("no")))],
        [
            {
                "role": "assistant",
                "content": "ab",
                "refusal": "no",
                "tool_calls": [call("c1", arguments='{"x": 1.0}')],
            }
        ],
    ),
    "a turn in several messages": (
        [
            Message(Role.ASSISTANT, (Text("a"),)),
            Message(Role.ASSISTANT, (ToolCall("c1", "f", "{}"),)),
            Message(Role.ASSISTANT, (Text("b"), ToolCall("c2", "f", "{}"))),
        ],
        [{"role": "assistant", "content": "a\n\nb", "tool_calls": [call("c1"), call("c2")]}],
    ),
    "foreign thoughts": (
        [Message(Role.ASSISTANT, (Thinking("hm", "s", "anthropic-messages"), Thinking("hm"), Text("a")))],
        [{"role": "assistant", "content": "a"}],
    ),
    "nothing but foreign thoughts": (
        [Message(Role.USER, (Text("Hello"),)), Message(Role.ASSISTANT, (Thinking("hm"),))],
        [HELLO],
    ),
    "thoughts of its own": (
        [
            Message(
                Role.ASSISTANT, (Thinking("hm", OWN_TEXT, "openai-chat"), Thinking("", OWN, "openai-chat"), Text("a"))
            )
        ],
        [{"role": "assistant", "content": "a", "reasoning_details": [CLAUDES, XAIS]}],
    ),
}


@pytest.mark.parametrize(("messages", "expected"), MESSAGES_WRITTEN.values(), ids=MESSAGES_WRITTEN)
def test_messages_written(messages: list[Message], expected: list[dict[str, Any]]) -> None:
    assert written(replace(PLAIN, messages=tuple(messages)))["messages"] == expected


def test_each_feature_has_the_callers_name() -> None:
    assert set(CHAT.fields) == set(Feature)
    assert CHAT.cannot == {Feature.TOP_K, Feature.DOCUMENT_URL, Feature.TOOL_RESULT_MEDIA}
    assert features(read(top_k=5)) == {Feature.TOP_K}


# --- Recorded ---------------------------------------------------------------------------------------------------------

# Azure names the model in the path, which is not served; one request was recorded for having no messages; three choose
# OpenRouter's providers and plugins by themselves.
WAYS = {"provider", "plugins"}
ASKED = [
    case
    for case in chat_cases()
    if case.request and case.request.get("model") and case.request["messages"] and not WAYS & case.request.keys()
]


def sendable(request: Request) -> Request:
    """What of a request this dialect's writer sends: all but hints, thoughts, and what stands alone in vain."""
    messages = [
        Message(Role.SYSTEM if message.role is Role.DEVELOPER else message.role, _sendable(message), message.name)
        for message in request.messages
    ]
    wanted = request.format if request.format != Format(Output.TEXT) else None
    return replace(
        request,
        messages=tuple(message for message in messages if message.parts or message.role is not Role.ASSISTANT),
        tools=tuple(replace(tool, cache_ttl=None) for tool in request.tools),
        parallel_tool_calls=request.parallel_tool_calls if request.tools else None,
        format=replace(wanted, name=wanted.name or "answer") if wanted and wanted.output is Output.SCHEMA else wanted,
        extras=(),
        cap=None,
        top_k=None,
    )


def _sendable(message: Message) -> tuple[Part, ...]:
    return tuple(
        replace(part, cache_ttl=None) if isinstance(part, Text | ToolResult) else part
        for part in message.parts
        if not isinstance(part, Thinking)
    )


@each_case(ASKED)
def test_recorded_request(case: Case) -> None:
    assert case.request is not None
    CHAT.read_call(case.request)
    asked = CHAT.read_request(case.request)
    once = CHAT.read_request(json.loads(CHAT.write_request(asked, case.request["model"], None)))
    assert once == sendable(asked)
    assert CHAT.read_request(json.loads(CHAT.write_request(once, case.request["model"], None))) == once
    said = json.dumps([message.get("content") for message in case.request["messages"]])
    for message in once.messages:
        for part in message.parts:
            if isinstance(part, Text):
                assert json.dumps(part.text)[1:-1] in said
