"""Anthropic's requests, to and from the canonical form."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from extproc import form
from extproc.dialects.anthropic import AnthropicMessages
from extproc.dialects.anthropic.thinking import generation
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
)
from extproc.models import traits
from tests.each import each_case
from tests.recordings import Case, protocol_cases

CLAUDE = AnthropicMessages()
OWN = "anthropic-messages"
HELLO = {"role": "user", "content": "Hello"}
MODEL = "claude-sonnet-4-5"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 100, "messages": [HELLO], **fields}


def read(**fields: Any) -> Request:
    asked = body(**fields)
    CLAUDE.read_call(asked)
    return CLAUDE.read_request(asked)


def parts(*blocks: Any, role: str = "user") -> tuple[Part, ...]:
    return read(messages=[{"role": role, "content": list(blocks)}]).messages[0].parts


def user(*said: Part) -> Message:
    return Message(Role.USER, said)


def assistant(*said: Part) -> Message:
    return Message(Role.ASSISTANT, said)


PLAIN = Request(model="m", messages=(user(Text("Hello")),))


def written(request: Request, model: str = MODEL, cap: int | None = 4_000) -> dict[str, Any]:
    asked: dict[str, Any] = json.loads(CLAUDE.write_request(request, model, cap))
    return asked


def turns(*messages: Message) -> list[dict[str, Any]]:
    said: list[dict[str, Any]] = written(Request("m", messages))["messages"]
    return said


# --- Read -------------------------------------------------------------------------------------------------------------


def test_a_plain_request() -> None:
    assert read() == Request(model=MODEL, messages=(user(Text("Hello")),), cap=100)


TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object"}, "strict": True}

FIELDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stream": ({"stream": True}, {"stream": True}),
    "sampling": (
        {"temperature": 0, "top_p": 0.5, "top_k": 7},
        {"temperature": 0.0, "top_p": 0.5, "top_k": 7},
    ),
    "stop": ({"stop_sequences": ["a", "b"]}, {"stop": ("a", "b")}),
    "tool": ({"tools": [TOOL]}, {"tools": (Tool("f", "d", {"type": "object"}, True),)}),
    "tool to be cached": (
        {"tools": [{**TOOL, "cache_control": {"type": "ephemeral", "ttl": "1h"}}]},
        {"tools": (Tool("f", "d", {"type": "object"}, True, "1h"),)},
    ),
    "a tool of the provider's": (
        {"tools": [TOOL, {"type": "web_search_20250305", "name": "web_search"}]},
        {"tools": (Tool("f", "d", {"type": "object"}, True),), "extras": ("tools[1]",)},
    ),
    "tools called by code only": (
        {"tools": [{"name": "f", "allowed_callers": ["code_execution_20260120"]}]},
        {"tools": (Tool("f"),), "extras": ("tools[0].allowed_callers",)},
    ),
    "choice: auto": ({"tool_choice": {"type": "auto"}}, {"tool_choice": ToolChoice(Choose.AUTO)}),
    "choice: any": ({"tool_choice": {"type": "any"}}, {"tool_choice": ToolChoice(Choose.REQUIRED)}),
    "choice: none": ({"tool_choice": {"type": "none"}}, {"tool_choice": ToolChoice(Choose.NONE)}),
    "choice: one": ({"tool_choice": {"type": "tool", "name": "f"}}, {"tool_choice": ToolChoice(Choose.NAMED, ("f",))}),
    "one at a time": (
        {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
        {"tool_choice": ToolChoice(Choose.AUTO), "parallel_tool_calls": False},
    ),
    "schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}},
        {"format": Format(Output.SCHEMA, {"a": 1})},
    ),
    "schema, by its first name": (
        {"output_format": {"type": "json_schema", "schema": {"a": 1}}},
        {"format": Format(Output.SCHEMA, {"a": 1})},
    ),
    "thinking": (
        {"thinking": {"type": "enabled", "budget_tokens": 2048}},
        {"reasoning": Reasoning(budget_tokens=2048)},
    ),
    "thinking, shown": (
        {"thinking": {"type": "enabled", "budget_tokens": 2048, "display": "summarized"}},
        {"reasoning": Reasoning(budget_tokens=2048, visible=True)},
    ),
    "thinking, adaptive": (
        {"thinking": {"type": "adaptive", "display": "omitted"}, "output_config": {"effort": "max"}},
        {"reasoning": Reasoning("xhigh", visible=False)},
    ),
    "thinking, disabled": ({"thinking": {"type": "disabled"}}, {"reasoning": Reasoning("none")}),
    "effort alone": ({"output_config": {"effort": "low"}}, {"reasoning": Reasoning("low")}),
    "hints": ({"metadata": {"user_id": "u"}, "service_tier": "auto", "cache_control": {"type": "ephemeral"}}, {}),
    "unknown": (
        {"container": "c", "context_management": {}, "mcp_servers": None},
        {"extras": ("container", "context_management")},
    ),
}


@pytest.mark.parametrize(("fields", "expected"), FIELDS.values(), ids=FIELDS)
def test_fields(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(**fields) == replace(read(), **expected)


def test_system() -> None:
    blocks = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "b"}]
    assert read(system=blocks).messages[0] == Message(Role.SYSTEM, (Text("a", "5m"), Text("b")))
    assert read(system="a").messages[0] == Message(Role.SYSTEM, (Text("a"),))
    assert read(messages=[HELLO, {"role": "system", "content": "b"}]).messages[1] == Message(Role.SYSTEM, (Text("b"),))


BASE64 = {"type": "base64", "media_type": "image/png", "data": "AAAA"}
LINK = {"type": "url", "url": "https://a.example/b"}
PAPER = {"type": "text", "media_type": "text/plain", "data": "words"}

BLOCKS: dict[str, tuple[dict[str, Any], tuple[Part, ...]]] = {
    "image": ({"type": "image", "source": BASE64}, (Image("AAAA", "image/png"),)),
    "image at an address": ({"type": "image", "source": LINK}, (Image(url="https://a.example/b"),)),
    "document": ({"type": "document", "source": BASE64, "title": "t"}, (Document("AAAA", "image/png", name="t"),)),
    "document at an address": ({"type": "document", "source": LINK}, (Document(url="https://a.example/b"),)),
    "document of text": (
        {"type": "document", "source": PAPER, "context": "c"},
        (Text("c"), Document(text="words")),
    ),
    "document of blocks": (
        {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "a"}]}},
        (Document(text="a"),),
    ),
    "search result": (
        {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "a"}]},
        (Document(text="a", name="t"),),
    ),
    "tool call": ({"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}}, (ToolCall("t", "f", '{"a":1}'),)),
    "tool result": ({"type": "tool_result", "tool_use_id": "t", "content": "a"}, (ToolResult("t", (Text("a"),)),)),
    "tool result with an image": (
        {"type": "tool_result", "tool_use_id": "t", "is_error": True, "content": [{"type": "image", "source": BASE64}]},
        (ToolResult("t", (Image("AAAA", "image/png"),), is_error=True),),
    ),
    "no tool result": ({"type": "tool_result", "tool_use_id": "t"}, (ToolResult("t", ()),)),
    "thinking": ({"type": "thinking", "thinking": "hm", "signature": "s"}, (Thinking("hm", "s", OWN),)),
    "thinking without a signature": ({"type": "thinking", "thinking": "hm", "signature": ""}, (Thinking("hm"),)),
    "redacted": ({"type": "redacted_thinking", "data": "s"}, (Thinking("", "s", OWN, redacted=True),)),
    "another's signature": (
        {"type": "thinking", "thinking": "hm", "signature": form.carry("s", "gemini", OWN)},
        (Thinking("hm", "s", "gemini"),),
    ),
}


@pytest.mark.parametrize(("block", "expected"), BLOCKS.values(), ids=BLOCKS)
def test_blocks(block: dict[str, Any], expected: tuple[Part, ...]) -> None:
    assert parts(block) == expected


EXTRAS: dict[str, tuple[dict[str, Any], str]] = {
    "citations": ({"type": "document", "source": PAPER, "citations": {"enabled": True}}, ".citations"),
    "a search of the provider's": ({"type": "server_tool_use", "id": "s", "name": "web_search", "input": {}}, ""),
    "a block to come": ({"type": "hologram"}, ""),
    "a picture in a document": (
        {"type": "document", "source": {"type": "content", "content": [{"type": "image", "source": BASE64}]}},
        ".source.content",
    ),
}


@pytest.mark.parametrize(("block", "path"), EXTRAS.values(), ids=EXTRAS)
def test_extras(block: dict[str, Any], path: str) -> None:
    assert read(messages=[{"role": "user", "content": [block]}]).extras == ("messages[0].content[0]" + path,)


UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "temperature a string": ({"temperature": "1"}, "temperature"),
    "temperature a boolean": ({"temperature": True}, "temperature"),
    "stop a string": ({"stop_sequences": "a"}, "stop_sequences"),
    "stop of numbers": ({"stop_sequences": [1]}, "stop_sequences[0]"),
    "choice unknown": ({"tool_choice": {"type": "perhaps"}}, "tool_choice.type"),
    "choice without a name": ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    "tool without a name": ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
    "format unknown": ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    "schema missing": ({"output_format": {"type": "json_schema"}}, "output_format.schema"),
    "budget missing": ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
    "input a list": (
        {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": []}]}]},
        "messages[0].content[0].input",
    ),
}


@pytest.mark.parametrize(("fields", "param"), UNREADABLE.values(), ids=UNREADABLE)
def test_unreadable(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        read(**fields)
    assert refusal.value.param == param


# --- Written: fields --------------------------------------------------------------------------------------------------


def test_a_plain_request_is_written() -> None:
    hello = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert written(PLAIN) == {"model": MODEL, "max_tokens": 4_000, "messages": hello}


def test_there_is_always_a_bound() -> None:
    assert written(replace(PLAIN, cap=7), cap=None)["max_tokens"] == 7
    assert written(PLAIN, cap=None)["max_tokens"] == traits("anthropic", MODEL, None).max_output_tokens


F, G = Tool("f", schema={"properties": {}}), Tool("g", "d", {"type": "object"}, True, "1h")
SHAPE = Format(Output.SCHEMA, {"a": 1}, name="n", strict=True)

WRITTEN: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stream": ({"stream": True}, {"stream": True}),
    "temperature of none": ({"temperature": 0.0}, {"temperature": 0.0}),
    "temperature too high": ({"temperature": 1.7}, {"temperature": 1.0}),
    "one way of sampling": ({"temperature": 0.5, "top_p": 0.9, "top_k": 3}, {"temperature": 0.5, "top_k": 3}),
    "stop": ({"stop": ("a",)}, {"stop_sequences": ["a"]}),
    "tools": (
        {"tools": (F, G)},
        {
            "tools": [
                {"name": "f", "input_schema": {"type": "object", "properties": {}}},
                {
                    "name": "g",
                    "description": "d",
                    "input_schema": {"type": "object"},
                    "strict": True,
                    "cache_control": {"type": "ephemeral", "ttl": "1h"},
                },
            ]
        },
    ),
    "serial calls": (
        {"tools": (F,), "parallel_tool_calls": False},
        {
            "tools": [{"name": "f", "input_schema": {"type": "object", "properties": {}}}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        },
    ),
    "schema": ({"format": SHAPE}, {"output_config": {"format": {"type": "json_schema", "schema": {"a": 1}}}}),
    "text": ({"format": Format(Output.TEXT)}, {}),
    "what it cannot": ({"seed": 1, "presence_penalty": 1.0, "logprobs": True, "choices": 2}, {}),
}


@pytest.mark.parametrize(("fields", "expected"), WRITTEN.values(), ids=WRITTEN)
def test_written(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert written(replace(PLAIN, **fields)) == {**written(PLAIN), **expected}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (ToolChoice(Choose.AUTO), {"type": "auto"}),
        (ToolChoice(Choose.NONE), {"type": "none"}),
        (ToolChoice(Choose.REQUIRED), {"type": "any"}),
        (ToolChoice(Choose.NAMED, ("f",)), {"type": "tool", "name": "f"}),
    ],
    ids=["auto", "none", "required", "named"],
)
def test_tool_choice(choice: ToolChoice, expected: dict[str, Any]) -> None:
    assert written(replace(PLAIN, tools=(F, G), tool_choice=choice))["tool_choice"] == expected
    assert "tool_choice" not in written(replace(PLAIN, tool_choice=choice))


def test_a_part_of_the_tools_is_all_that_is_offered() -> None:
    asked = written(replace(PLAIN, tools=(F, G), tool_choice=ToolChoice(Choose.REQUIRED, ("g",))))
    assert [tool["name"] for tool in asked["tools"]] == ["g"]
    assert asked["tool_choice"] == {"type": "any"}


def test_older_models_follow_no_schemas() -> None:
    assert "strict" not in written(replace(PLAIN, tools=(G,)), model="claude-sonnet-4-0")["tools"][0]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("claude-sonnet-4-0", {"temperature": 0.5, "top_p": 0.9}),
        ("claude-opus-4-1-20250805", {"temperature": 0.5}),
        ("claude-opus-4-7", {}),
        ("claude-sonnet-5", {}),
        ("deployment-7", {}),
    ],
)
def test_sampling_as_the_model_takes_it(model: str, expected: dict[str, Any]) -> None:
    asked = written(replace(PLAIN, temperature=0.5, top_p=0.9), model)
    assert {name: asked[name] for name in ("temperature", "top_p") if name in asked} == expected


# --- Written: thinking ------------------------------------------------------------------------------------------------

LOW, HIGH, NONE = Reasoning("low"), Reasoning("high", visible=True), Reasoning("none")

THINKING: dict[str, tuple[str, int, Reasoning, dict[str, Any] | None, str | None]] = {
    "by budget": ("claude-sonnet-4-5", 8_000, LOW, {"type": "enabled", "budget_tokens": 2_048}, None),
    "half is for the answer": (
        "claude-haiku-4-5",
        8_000,
        HIGH,
        {"type": "enabled", "budget_tokens": 4_000, "display": "summarized"},
        None,
    ),
    "no room": ("claude-sonnet-4-5", 2_000, HIGH, None, None),
    "a budget, below the bound": (
        "claude-3-7-sonnet-latest",
        3_000,
        Reasoning(budget_tokens=5_000),
        {"type": "enabled", "budget_tokens": 2_999},
        None,
    ),
    "a budget below the least": (
        "claude-sonnet-4-20250514",
        3_000,
        Reasoning(budget_tokens=5),
        {"type": "enabled", "budget_tokens": 1_024},
        None,
    ),
    "a budget of nothing": ("claude-opus-4-5", 3_000, Reasoning(budget_tokens=0), {"type": "disabled"}, None),
    "none": ("claude-opus-4-8", 3_000, NONE, {"type": "disabled"}, None),
    "none, of one that cannot stop": ("claude-fable-5", 3_000, NONE, None, "low"),
    "none, of one that never began": ("claude-3-5-haiku-20241022", 3_000, NONE, None, None),
    "one that never began": ("claude-3-5-haiku-20241022", 3_000, HIGH, None, None),
    "by effort": ("claude-sonnet-5", 3_000, LOW, {"type": "adaptive"}, "low"),
    "by effort, shown": ("claude-opus-4-7@default", 3_000, HIGH, {"type": "adaptive", "display": "summarized"}, "high"),
    "as it likes": ("claude-opus-4-7", 3_000, Reasoning(), {"type": "adaptive"}, None),
    "minimal": ("claude-opus-4-6", 3_000, Reasoning("minimal"), {"type": "adaptive"}, "low"),
    "xhigh, too early": ("claude-sonnet-4-6", 3_000, Reasoning("xhigh"), {"type": "adaptive"}, "high"),
    "xhigh": ("claude-opus-4-7", 3_000, Reasoning("xhigh"), {"type": "adaptive"}, "xhigh"),
    "a budget still": (
        "claude-opus-4-6",
        9_000,
        Reasoning(budget_tokens=5_000),
        {"type": "enabled", "budget_tokens": 5_000},
        None,
    ),
    "a budget no more": ("claude-opus-5", 9_000, Reasoning(budget_tokens=5_000), {"type": "adaptive"}, "medium"),
    "a name that says nothing": ("my-deployment", 9_000, LOW, {"type": "adaptive"}, "low"),
}


@pytest.mark.parametrize(("model", "cap", "reasoning", "thinking", "effort"), THINKING.values(), ids=THINKING)
def test_thinking(
    model: str, cap: int, reasoning: Reasoning, thinking: dict[str, Any] | None, effort: str | None
) -> None:
    asked = written(replace(PLAIN, reasoning=reasoning), model, cap)
    assert asked.get("thinking") == thinking
    assert asked.get("output_config", {}).get("effort") == effort


def test_who_thinks_samples_freely() -> None:
    asked = written(replace(PLAIN, reasoning=HIGH, temperature=0.1, top_p=0.5, top_k=1), cap=9_000)
    assert not {"temperature", "top_p", "top_k"} & asked.keys()
    assert "temperature" in written(replace(PLAIN, reasoning=NONE, temperature=0.1))


CALL, ANSWER = ToolCall("call.1:f", "f", '{"a": 1}'), ToolResult("call.1:f", (Text("r"),))


def test_a_tool_that_must_be_called_is_called_without_thinking() -> None:
    forced = replace(PLAIN, reasoning=HIGH, tools=(F,), tool_choice=ToolChoice(Choose.REQUIRED))
    assert "thinking" not in written(forced, cap=9_000)
    assert "thinking" in written(replace(forced, tool_choice=ToolChoice(Choose.AUTO)), cap=9_000)


def test_after_a_call_without_its_thoughts_there_are_none() -> None:
    bare = Request("m", (user(Text("q")), assistant(CALL), user(ANSWER)), reasoning=HIGH)
    own = Request("m", (user(Text("q")), assistant(Thinking("hm", "s", OWN), CALL), user(ANSWER)), reasoning=HIGH)
    assert "thinking" not in written(bare, cap=9_000)
    assert "thinking" in written(own, cap=9_000)
    assert "thinking" in written(bare, "claude-opus-4-7", 9_000)


@pytest.mark.parametrize(
    ("name", "version"),
    [
        ("claude-3-7-sonnet-20250219", (3, 7)),
        ("claude-3-opus-20240229", (3, 0)),
        ("claude-opus-4-20250514", (4, 0)),
        ("claude-sonnet-4@20250514", (4, 0)),
        ("us.anthropic.claude-opus-4-5-20251101-v1:0", (4, 5)),
        ("claude-haiku-5-5", (5, 5)),
        ("anthropic/claude-opus-4.6", (4, 6)),
        ("claude-mythos-preview", (99, 0)),
    ],
)
def test_generations(name: str, version: tuple[int, int]) -> None:
    assert generation(name).version == version


# --- Written: messages ------------------------------------------------------------------------------------------------


def text(words: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **more}


def test_turns_of_one_role_are_joined() -> None:
    said = turns(user(Text("a")), user(Text("b")), assistant(Text("c")), assistant(), user(Text("d")))
    assert said == [
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": [text("c")]},
        {"role": "user", "content": [text("d")]},
    ]


def test_turns_that_were_apart_by_nothing_are_joined() -> None:
    assert turns(user(Text("a")), assistant(Text(" ")), user(Text("b"))) == [
        {"role": "user", "content": [text("a"), text("b")]}
    ]


def test_results_come_first_and_directly_after_the_calls() -> None:
    said = turns(user(Text("q")), assistant(CALL), user(Text("and")), user(ANSWER, Text("now")))
    call = {"type": "tool_use", "id": "call_1_f", "name": "f", "input": {"a": 1}}
    answer = {"type": "tool_result", "tool_use_id": "call_1_f", "content": [text("r")]}
    assert said[1:] == [
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [answer, text("and"), text("now")]},
    ]


def test_a_begun_answer_stays_the_last_word() -> None:
    said = turns(user(Text("q")), assistant(Text("The answer is (\n ")))
    assert said[-1] == {"role": "assistant", "content": [text("The answer is (")]}


def test_instructions() -> None:
    messages = (
        Message(Role.SYSTEM, (Text("a", "5m"),)),
        user(Text("q")),
        Message(Role.DEVELOPER, (Text("b"),)),
    )
    asked = written(Request("m", messages))
    assert asked["system"] == [text("a", cache_control={"type": "ephemeral"}), text("b")]
    assert len(asked["messages"]) == 1


def test_instructions_alone_are_said_to_the_model() -> None:
    asked = written(Request("m", (Message(Role.SYSTEM, (Text("a"),)),)))
    assert asked["messages"] == [{"role": "user", "content": [text("a")]}]
    assert "system" not in asked


PARTS: dict[str, tuple[Part, dict[str, Any] | None]] = {
    "image": (
        Image("AAAA", "image/webp", cache_ttl="5m"),
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/webp", "data": "AAAA"},
            "cache_control": {"type": "ephemeral"},
        },
    ),
    "image at an address": (Image(url="u"), {"type": "image", "source": {"type": "url", "url": "u"}}),
    "document": (
        Document("AAAA", name="t"),
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"},
            "title": "t",
        },
    ),
    "document of text": (Document(text="words"), {"type": "document", "source": PAPER}),
    "refusal": (Refusal("no"), text("no")),
    "own thoughts": (Thinking("hm", "s", OWN), {"type": "thinking", "thinking": "hm", "signature": "s"}),
    "own thoughts, hidden": (Thinking("", "s", OWN), {"type": "thinking", "thinking": "", "signature": "s"}),
    "redacted": (Thinking("", "s", OWN, redacted=True), {"type": "redacted_thinking", "data": "s"}),
    "another's thoughts": (Thinking("hm", "s", "gemini"), None),
    "unsigned thoughts": (Thinking("hm"), None),
    "sound": (Audio("AAAA", "wav"), None),
    "nothing said": (Text(""), None),
    "a call of nothing": (ToolCall("t", "f", ""), {"type": "tool_use", "id": "t", "name": "f", "input": {}}),
    "a call that is no object": (
        ToolCall("t", "f", "[1"),
        {"type": "tool_use", "id": "t", "name": "f", "input": {"arguments": "[1"}},
    ),
    "an error": (
        ToolResult("t", (Text(""),), is_error=True, cache_ttl="1h"),
        {
            "type": "tool_result",
            "tool_use_id": "t",
            "is_error": True,
            "cache_control": {"type": "ephemeral", "ttl": "1h"},
        },
    ),
}


@pytest.mark.parametrize(("part", "expected"), PARTS.values(), ids=PARTS)
def test_parts(part: Part, expected: dict[str, Any] | None) -> None:
    said = turns(user(part), assistant(Text("x")))
    assert said[0]["content"] == ([expected] if expected is not None else [text("x")])


def test_what_is_asked_for_can_be_said_or_is_named() -> None:
    assert Feature.JSON_MODE in CLAUDE.cannot
    assert Feature.JSON_SCHEMA not in CLAUDE.cannot
    assert CLAUDE.fields.keys() == set(Feature)


# --- Recorded requests ------------------------------------------------------------------------------------------------

ASKED = [case for case in protocol_cases("anthropic-messages") if case.request and case.status == 200]


@each_case(ASKED)
def test_recorded_requests_come_back_as_they_were(case: Case) -> None:
    asked = CLAUDE.read_request({"model": case.model, **(case.request or {})})
    again = CLAUDE.read_request(json.loads(CLAUDE.write_request(asked, asked.model, None)))
    assert again == CLAUDE.read_request(json.loads(CLAUDE.write_request(again, again.model, None)))
    thinks = asked.reasoning is not None  # and so samples freely
    assert again == replace(
        asked,
        messages=tuple(_said(message) for message in asked.messages),
        extras=(),
        tool_choice=asked.tool_choice if asked.tools else None,
        temperature=None if thinks else asked.temperature,
        top_p=None if thinks else asked.top_p,
    )


def _said(message: Message) -> Message:
    """Without a text of nothing but a space."""
    return replace(
        message, parts=tuple(part for part in message.parts if not (isinstance(part, Text) and part.text == " "))
    )
