"""OpenAI's dialect: what is accepted, what is sent on, and what is read from answers."""

from __future__ import annotations

import json
from typing import Any

import httpx2
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import limits
from extproc.dialects import openai_parts as parts
from extproc.dialects.openai_chat.calls import OpenAIChatCalls
from extproc.errors import BadRequest, BudgetExhausted
from extproc.intake import parse_json
from extproc.metering import count_texts
from extproc.records import Piece, Usage
from extproc.tokens import counter
from tests.each import each_case
from tests.recordings import Case, chat_cases

CHAT = OpenAIChatCalls()
HELLO = {"role": "user", "content": "Hello"}
DATA_URL = "data:image/png;base64,AAAA"


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4o", "messages": [HELLO], **fields}


def with_content(*parts: Any) -> dict[str, Any]:
    return request(messages=[{"role": "user", "content": list(parts)}])


def with_message(**fields: Any) -> dict[str, Any]:
    return request(messages=[{**HELLO, **fields}])


# --- Requests: what is read -------------------------------------------------------------------------------------------


def test_a_plain_call() -> None:
    body = request()
    call = CHAT.read_call(body)
    assert call.body is body
    assert (call.model, call.stream, call.wants_usage, call.choices, call.cap) == ("gpt-4o", False, False, 1, None)
    assert (call.service_tier, call.web_searches) == (None, 0)
    assert call.prompt_texts == ("user", "Hello")
    assert call.prompt_extra == parts.MESSAGE_TOKENS + parts.REPLY_TOKENS


READ: dict[str, tuple[dict[str, Any], str, object]] = {
    "stream": ({"stream": True}, "stream", True),
    "stream null": ({"stream": None}, "stream", False),
    "usage asked for": ({"stream": True, "stream_options": {"include_usage": True}}, "wants_usage", True),
    "usage refused": ({"stream": True, "stream_options": {"include_usage": False}}, "wants_usage", False),
    "usage null": ({"stream": True, "stream_options": {"include_usage": None}}, "wants_usage", False),
    "stream options null": ({"stream_options": None}, "wants_usage", False),
    "n": ({"n": limits.MAX_CHOICES}, "choices", limits.MAX_CHOICES),
    "n null": ({"n": None}, "choices", 1),
    "max_tokens": ({"max_tokens": 7}, "cap", 7),
    "max_completion_tokens": ({"max_completion_tokens": 8}, "cap", 8),
    "both caps, the same": ({"max_tokens": 7, "max_completion_tokens": 7}, "cap", 7),
    "one cap is null": ({"max_tokens": None, "max_completion_tokens": 7}, "cap", 7),
    "service tier": ({"service_tier": "flex"}, "service_tier", "flex"),
    "web search asked for": ({"web_search_options": {}}, "web_searches", 1),
    "web search as a tool": ({"tools": [{"type": "web_search"}]}, "web_searches", 1),
    "web search built in": ({"model": "gpt-4o-search-preview"}, "web_searches", 1),
    "thoughts": ({"reasoning_effort": "low"}, "thinks", True),
    "thoughts, OpenRouter's": ({"reasoning": {"max_tokens": 2_048, "exclude": True}}, "thinks", True),
    "thoughts, DeepSeek's": ({"thinking": {"type": "enabled"}}, "thinks", True),
    "no thoughts": ({"reasoning_effort": "none", "thinking": {"type": "disabled"}}, "thinks", None),
    "a prediction": ({"prediction": {"type": "content", "content": "x"}}, "teaches", False),
    "no prediction": ({}, "teaches", True),
    "sound": ({"modalities": ["text", "audio"]}, "unseen", True),
    "text": ({"modalities": ["text"]}, "unseen", False),
    "a function is no web search": ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "web_searches", 0),
}


@pytest.mark.parametrize(("fields", "name", "expected"), READ.values(), ids=READ)
def test_read(fields: dict[str, Any], name: str, expected: object) -> None:
    assert getattr(CHAT.read_call(request(**fields)), name) == expected


PROMPTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "parts": (with_content({"type": "text", "text": "one"}, {"type": "refusal", "refusal": "two"}), ["one", "two"]),
    "name": (with_message(name="ann"), ["ann"]),
    "refusal": (with_message(refusal="no"), ["no"]),
    "reasoning of an earlier answer": (with_message(reasoning_content="hm"), ["hm"]),
    "tool call id": (with_message(tool_call_id="call_1"), ["call_1"]),
    "tool calls": (with_message(tool_calls=[{"id": "c", "function": {"arguments": "x"}}]), ['"arguments":"x"']),
    "function call": (with_message(function_call={"name": "f", "arguments": "{}"}), ['{"name":"f","arguments":"{}"}']),
    "unknown object": (with_message(annotations=[{"a": 1}]), ['[{"a":1}]']),
    "tools": (request(tools=[{"type": "function", "function": {"name": "f"}}]), ['"name":"f"']),
    "functions": (request(functions=[{"name": "f"}]), ['[{"name":"f"}]']),
    "schema": (request(response_format={"type": "json_schema", "json_schema": {"name": "s"}}), ['"name":"s"']),
    "prediction": (request(prediction={"type": "content", "content": "guess"}), ["guess"]),
    "tool choice": (request(tool_choice={"type": "function", "function": {"name": "f"}}), ['"name":"f"']),
}


@pytest.mark.parametrize(("body", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_prompt_texts(body: dict[str, Any], expected: list[str]) -> None:
    texts = CHAT.read_call(body).prompt_texts
    assert [text for text in expected if not any(text in found for found in texts)] == []


def image(detail: str | None = None) -> dict[str, Any]:
    return with_content({"type": "image_url", "image_url": {"url": DATA_URL, "detail": detail}})


PDF = {"type": "file", "file": {"file_data": "A" * 4_000}}
WAV = {"type": "input_audio", "input_audio": {"data": "A" * 8_000, "format": "wav"}}

EXTRAS: dict[str, tuple[dict[str, Any], int]] = {
    "another message": (request(messages=[HELLO, HELLO]), parts.MESSAGE_TOKENS),
    "a name": (with_message(name="ann"), parts.NAME_TOKENS),
    "tools": (request(tools=[{"type": "function"}]), parts.TOOLS_TOKENS),
    "no tools": (request(tools=[]), 0),
    "image, low": (image("low"), 630),
    "image, high": (image("high"), 6_150),
    "image, auto": (image("auto"), 6_150),
    "image, original": (image("original"), 24_600),
    "image, unsaid": (image(), 6_150),
    "image, a bare address": (with_content({"type": "image_url", "image_url": DATA_URL}), 6_150),
    "image, gpt-4o-mini": ({**image("high"), "model": "gpt-4o-mini"}, 2_833 + 8 * 5_667),
    "image, low, gpt-4o-mini": ({**image("low"), "model": "gpt-4o-mini"}, 2_833),
    "two images": (with_content(*[{"type": "image_url", "image_url": {"url": DATA_URL}}] * 2), 12_300),
    "audio": (with_content(WAV), 375 + 6_000 // 80),
    "audio, bare": (with_content({"type": "input_audio", "input_audio": "A" * 8_000}), 375 + 6_000 // 80),
    "audio of an earlier answer": (with_message(role="assistant", audio={"id": "audio_1"}), 16_384),
    "file": (with_content(PDF), 1_500 + 3_000),
    "file, large": (with_content({"type": "file", "file": {"file_data": "A" * 4_000_000}}), 1_047_576),
    "file, at an address": (with_content({"type": "file", "file": {"file_data": "https://x.example/a"}}), 1_047_576),
}


@pytest.mark.parametrize(("body", "expected"), EXTRAS.values(), ids=EXTRAS)
def test_prompt_extra(body: dict[str, Any], expected: int) -> None:
    assert CHAT.read_call(body).prompt_extra - CHAT.read_call(request()).prompt_extra == expected


# --- Requests: what is refused ----------------------------------------------------------------------------------------

TOO_MANY = [HELLO] * (limits.MAX_MESSAGES + 1)

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": ({"messages": [HELLO]}, "model", "missing_required_parameter"),
    "model null": (request(model=None), "model", "invalid_type"),
    "model empty": (request(model=""), "model", "invalid_value"),
    "model too long": (request(model="x" * (limits.MAX_MODEL_NAME_CHARS + 1)), "model", "invalid_value"),
    "no messages": ({"model": "gpt-4o"}, "messages", "missing_required_parameter"),
    "messages empty": (request(messages=[]), "messages", "empty_array"),
    "messages a string": (request(messages="hi"), "messages", "invalid_type"),
    "too many messages": (request(messages=TOO_MANY), "messages", "array_above_max_length"),
    "message a string": (request(messages=[HELLO, "hi"]), "messages[1]", "invalid_type"),
    "no role": (request(messages=[{"content": "x"}]), "messages[0].role", "missing_required_parameter"),
    "role a number": (with_message(role=1), "messages[0].role", "invalid_type"),
    "name a number": (with_message(name=1), "messages[0].name", "invalid_type"),
    "content a number": (with_message(content=1), "messages[0].content", "invalid_type"),
    "content an object": (with_message(content={}), "messages[0].content", "invalid_type"),
    "part a string": (with_content("x"), "messages[0].content[0]", "invalid_type"),
    "part without a type": (with_content({"text": "x"}), "messages[0].content[0].type", "missing_required_parameter"),
    "part of unknown cost": (with_content({"type": "video_url"}), "messages[0].content[0].type", "invalid_value"),
    "text missing": (with_content({"type": "text"}), "messages[0].content[0].text", "missing_required_parameter"),
    "text a number": (with_content({"type": "text", "text": 1}), "messages[0].content[0].text", "invalid_type"),
    "image without address": (
        with_content({"type": "image_url", "image_url": {}}),
        "messages[0].content[0].image_url.url",
        "missing_required_parameter",
    ),
    "image of unknown detail": (image("huge"), "messages[0].content[0].image_url.detail", "invalid_value"),
    "audio without data": (
        with_content({"type": "input_audio", "input_audio": {"format": "wav"}}),
        "messages[0].content[0].input_audio.data",
        "missing_required_parameter",
    ),
    "file by id": (
        with_content({"type": "file", "file": {"file_id": "file-1"}}),
        "messages[0].content[0].file",
        "invalid_value",
    ),
    "tool calls an object": (with_message(tool_calls={}), "messages[0].tool_calls", "invalid_type"),
    "tool call a string": (with_message(tool_calls=["x"]), "messages[0].tool_calls[0]", "invalid_type"),
    "audio a string": (with_message(audio="audio_1"), "messages[0].audio", "invalid_type"),
    "stream a string": (request(stream="true"), "stream", "invalid_type"),
    "stream a number": (request(stream=1), "stream", "invalid_type"),
    "stream options, no stream": (request(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    "stream options a list": (request(stream=True, stream_options=[]), "stream_options", "invalid_type"),
    "include_usage a number": (
        request(stream=True, stream_options={"include_usage": 1}),
        "stream_options.include_usage",
        "invalid_type",
    ),
    "n a boolean": (request(n=True), "n", "invalid_type"),
    "n a decimal": (request(n=1.0), "n", "invalid_type"),
    "n zero": (request(n=0), "n", "integer_below_min_value"),
    "n too large": (request(n=limits.MAX_CHOICES + 1), "n", "integer_above_max_value"),
    "max_tokens a string": (request(max_tokens="7"), "max_tokens", "invalid_type"),
    "max_tokens a boolean": (request(max_tokens=True), "max_tokens", "invalid_type"),
    "max_tokens zero": (request(max_tokens=0), "max_tokens", "integer_below_min_value"),
    "max_tokens negative": (request(max_tokens=-1), "max_tokens", "integer_below_min_value"),
    "max_tokens huge": (request(max_tokens=2**60), "max_tokens", "integer_above_max_value"),
    "max_completion_tokens zero": (
        request(max_completion_tokens=0),
        "max_completion_tokens",
        "integer_below_min_value",
    ),
    "two different caps": (
        request(max_tokens=1, max_completion_tokens=2),
        "max_tokens",
        "invalid_parameter_combination",
    ),
    "tools an object": (request(tools={}), "tools", "invalid_type"),
    "tool a string": (request(tools=["f"]), "tools[0]", "invalid_type"),
    "functions a string": (request(functions="f"), "functions", "invalid_type"),
    "service tier a number": (request(service_tier=1), "service_tier", "invalid_type"),
    "web search options a boolean": (request(web_search_options=True), "web_search_options", "invalid_type"),
    "response format a string": (request(response_format="json"), "response_format", "invalid_type"),
    "modalities a number": (request(modalities=1), "modalities", "invalid_type"),
    "prediction a string": (request(prediction="x"), "prediction", "invalid_type"),
    "Model": (request(Model="gpt-5"), "Model", "unknown_parameter"),
    "Stream": (request(Stream=True), "Stream", "unknown_parameter"),
    "MAX_TOKENS": (request(MAX_TOKENS=9), "MAX_TOKENS", "unknown_parameter"),
    "maxTokens": (request(maxTokens=9), "maxTokens", "unknown_parameter"),
    "N": (request(N=9), "N", "unknown_parameter"),
    "a long s, which Go folds": ({**request(), "\u017ftream": True}, "\u017ftream", "unknown_parameter"),
    "a Kelvin sign, which Go folds": ({**request(), "max_to\u212aens": 9}, "max_to\u212aens", "unknown_parameter"),
    "Include_Usage": (
        request(stream=True, stream_options={"Include_Usage": False}),
        "stream_options.Include_Usage",
        "unknown_parameter",
    ),
    "models to fall back on": (request(models=["gpt-5-pro"]), "models", "unsupported_parameter"),
    "another address": (request(api_base="http://169.254.169.254"), "api_base", "unsupported_parameter"),
    "a provider in capitals": (request(Provider={"order": ["x"]}), "Provider", "unsupported_parameter"),
    "Content": (with_message(Content="x"), "messages[0].Content", "unknown_parameter"),
    "Text": (
        with_content({"type": "text", "text": "a", "Text": "b"}),
        "messages[0].content[0].Text",
        "unknown_parameter",
    ),
}


@pytest.mark.parametrize(("body", "param", "code"), REFUSED.values(), ids=REFUSED)
def test_refused(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        CHAT.read_call(body)
    assert (refusal.value.param, refusal.value.code) == (param, code)
    assert refusal.value.status == 400


def test_a_refusal_reads_like_openais() -> None:
    with pytest.raises(BadRequest) as refusal:
        CHAT.read_call(with_message(content=7))
    assert refusal.value.message == (
        "Invalid type for 'messages[0].content': expected one of a string or array of objects, "
        "but got an integer instead."
    )


def test_tool_schemas_may_name_their_properties_as_they_like() -> None:
    schema = {"type": "object", "properties": {"Model": {}, "N": {}, "Content": {}}}
    CHAT.read_call(request(tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}]))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**10) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
FIELDS = (
    "model", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "tools", "functions",
    "tool_choice", "response_format", "prediction", "service_tier", "web_search_options", "audio", "modalities",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_value_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        call = CHAT.read_call(request(**fields))
    except BadRequest:
        return
    assert json.loads(CHAT.upstream_body(call, orjson.dumps(request(**fields)), "m", 5))["model"] == "m"


# --- Requests: what is sent on ----------------------------------------------------------------------------------------


def sent(body: dict[str, Any], model: str = "gpt-4o", cap: int | None = None) -> Any:
    return json.loads(CHAT.upstream_body(CHAT.read_call(body), orjson.dumps(body), model, cap))


SENT: dict[str, tuple[dict[str, Any], int | None, dict[str, Any]]] = {
    "nothing to change": ({}, None, {}),
    "unknown fields pass": ({"seed": 7, "x_new": {"a": [None]}}, None, {"seed": 7, "x_new": {"a": [None]}}),
    "cap where none was given": ({}, 9, {"max_completion_tokens": 9}),
    "cap into max_tokens": ({"max_tokens": 50}, 9, {"max_tokens": 9}),
    "cap into max_completion_tokens": ({"max_completion_tokens": 50}, 9, {"max_completion_tokens": 9}),
    "cap into both": (
        {"max_tokens": 50, "max_completion_tokens": 50},
        9,
        {"max_tokens": 9, "max_completion_tokens": 9},
    ),
    "a null is no cap": ({"max_tokens": None}, 9, {"max_tokens": None, "max_completion_tokens": 9}),
    "no cap, no change": ({"max_tokens": 50}, None, {"max_tokens": 50}),
    "usage forced": ({"stream": True}, None, {"stream": True, "stream_options": {"include_usage": True}}),
    "usage forced against the caller's will": (
        {"stream": True, "stream_options": {"include_usage": False, "include_obfuscation": False}},
        None,
        {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}},
    ),
    "usage forced over null": (
        {"stream": True, "stream_options": None},
        None,
        {"stream": True, "stream_options": {"include_usage": True}},
    ),
}


@pytest.mark.parametrize(("fields", "cap", "expected"), SENT.values(), ids=SENT)
def test_sent(fields: dict[str, Any], cap: int | None, expected: dict[str, Any]) -> None:
    body = request(**fields)
    before = orjson.dumps(body)
    assert sent(body, cap=cap) == request(**expected)
    assert orjson.dumps(body) == before  # the caller's own is not written to: another attempt may need it


def test_the_model_is_the_targets() -> None:
    assert sent(request(model="fast"), model="gpt-4o-mini")["model"] == "gpt-4o-mini"


def sent_bytes(raw: bytes, model: str = "gpt-4o", cap: int | None = None) -> bytes:
    return CHAT.upstream_body(CHAT.read_call(parse_json(raw)), raw, model, cap)


def test_a_body_with_nothing_to_change_is_sent_as_it_came() -> None:
    raw = b' {"messages" : [{"role":"user","content":"hi"}],\n\t"model":"gpt-4o"} '
    assert sent_bytes(raw) is raw


# What a JSON parser and writer between caller and provider would change.
KEPT: dict[str, bytes] = {
    "a float with a zero": b"1.0",
    "an exponent": b"1E5",
    "more digits than a double has": b"0.1000000000000000055511151231257827",
    "the largest integer": b"18446744073709551615",
    "a negative zero": b"-0",
    "an order of keys": b'{"z":1,"a":{"c":2,"b":3}}',
    "escapes that need not be": rb'"\u0041\/\u00e9"',
    "raw UTF-8": '"é😀"'.encode(),
    "white space": b'{ "a" :\n[ 1,\t2 ] }',
    "brackets in a string": rb'"}],\"stream\":{"',
}


@pytest.mark.parametrize("value", KEPT.values(), ids=KEPT)
def test_what_need_not_change_stays_byte_for_byte(value: bytes) -> None:
    message = b'[{"role":"user","content":"hi","x_new":%s}]' % value
    raw = b'{"x_first":%s, "model": "fast", "messages":%s,"stream":true,"temperature":%s}' % (value, message, b"1.0")
    assert sent_bytes(raw, model="gpt-4o-mini", cap=9) == (
        b'{"x_first":%s,"model":"gpt-4o-mini","messages":%s,"stream":true,"temperature":1.0,'
        b'"max_completion_tokens":9,"stream_options":{"include_usage":true}}' % (value, message)
    )


@pytest.mark.parametrize("value", KEPT.values(), ids=KEPT)
def test_stream_options_stay_byte_for_byte(value: bytes) -> None:
    raw = b'{"model":"m","messages":[{"role":"user"}],"stream":true,"stream_options":{"x":%s,"include_usage":null}}'
    assert sent_bytes(raw % value, model="m") == (raw % value).replace(b"null", b"true")


def test_sending_is_deterministic() -> None:
    body = request(stream=True, n=2)
    assert sent(body, "m", 5) == sent(body, "m", 5)


# --- Events -----------------------------------------------------------------------------------------------------------


def delta(fields: Any, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, **choice}]}


def read(data: bytes) -> Piece:
    return CHAT.piece_reader()(data)


USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}

PIECES: dict[str, tuple[Any, Piece]] = {
    "content": (delta({"content": "a"}), Piece(texts=("a",), started=(0,))),
    "empty content": (delta({"content": ""}), Piece(started=(0,))),
    "role only": (delta({"role": "assistant", "content": None, "refusal": None}), Piece(started=(0,))),
    "refusal": (delta({"refusal": "no"}), Piece(texts=("no",), started=(0,))),
    "reasoning_content": (delta({"reasoning_content": "hm"}), Piece(texts=("hm",), started=(0,))),
    "reasoning": (delta({"reasoning": "hm"}), Piece(texts=("hm",), started=(0,))),
    "reasoning under every name": (
        delta({"reasoning": "hm", "reasoning_content": "hm", "reasoning_details": [{"text": "hm"}]}),
        Piece(texts=("hm",), started=(0,)),
    ),
    "reasoning and its details": (
        delta({"reasoning": "hm", "reasoning_details": [{"text": "hm"}]}),
        Piece(texts=("hm",), started=(0,)),
    ),
    "reasoning_details only": (
        delta({"reasoning_details": [{"text": "a"}, {"summary": "b"}, {"data": "encrypted"}]}),
        Piece(texts=("a", "b"), started=(0,)),
    ),
    "content in parts": (
        delta({"content": [{"type": "thinking", "thinking": [{"text": "a"}]}, {"type": "text", "text": "b"}]}),
        Piece(texts=("a", "b"), started=(0,)),
    ),
    "tool call": (
        delta({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}, {"function": {"arguments": "}"}}]}),
        Piece(texts=("f", "{", "}"), started=(0,), unseen=True),
    ),
    "custom tool call": (
        delta({"tool_calls": [{"custom": {"name": "f", "input": "x"}}]}),
        Piece(texts=("f", "x"), started=(0,), unseen=True),
    ),
    "function call": (
        delta({"function_call": {"name": "f", "arguments": "{}"}}),
        Piece(texts=("f", "{}"), started=(0,), unseen=True),
    ),
    "no tool calls": (delta({"content": "a", "tool_calls": []}), Piece(texts=("a",), started=(0,))),
    "audio": (delta({"audio": {"data": "AAAA", "transcript": "hi"}}), Piece(texts=("hi",), started=(0,))),
    "finish": (delta({}, finish_reason="stop"), Piece(started=(0,), finished=(0,))),
    "several choices": (
        {"choices": [{"index": 1, "delta": {"content": "b"}}, {"index": 0, "delta": {}, "finish_reason": "length"}]},
        Piece(texts=("b",), started=(1, 0), finished=(0,)),
    ),
    "a choice without an index": ({"choices": [{"delta": {"content": "a"}}]}, Piece(texts=("a",), started=(0,))),
    "usage only": ({"choices": [], "usage": USAGE}, Piece(usage=Usage(3, 4), usage_only=True)),
    "usage only, without choices": ({"usage": USAGE}, Piece(usage=Usage(3, 4), usage_only=True)),
    "usage with a choice": ({**delta({}), "usage": USAGE}, Piece(usage=Usage(3, 4), started=(0,))),
    "usage null": ({**delta({"content": "a"}), "usage": None}, Piece(texts=("a",), started=(0,))),
    "usage with an error": ({"error": {"message": "x"}, "usage": USAGE}, Piece(usage=Usage(3, 4), error=True)),
    "Azure's first event": ({"choices": [], "prompt_filter_results": [{}]}, Piece()),
    "Azure's first event, usage null": ({"choices": [], "prompt_filter_results": [{}], "usage": None}, Piece()),
    "x_groq": ({**delta({}), "x_groq": {"id": "r", "usage": USAGE}}, Piece(usage=Usage(3, 4), started=(0,))),
    "x_groq without usage": ({"choices": [], "x_groq": {"id": "r"}}, Piece()),
    "error": ({"error": {"message": "overloaded"}}, Piece(error=True)),
    "error null": ({"error": None, "choices": []}, Piece()),
    "vLLM's error": ({"object": "error", "message": "x", "code": 400}, Piece(error=True)),
    "service tier": ({"choices": [], "service_tier": "flex"}, Piece(service_tier="flex")),
    "Mistral's service tier": ({"choices": [], "usage": {"service_tier": "x"}}, Piece(service_tier="x")),
    "service tier empty": ({"choices": [], "service_tier": ""}, Piece()),
    "wrong types": (
        {"choices": [1, None, {"index": "0", "delta": "x"}], "usage": 7, "x_groq": 7, "service_tier": 7},
        Piece(started=(0,)),
    ),
    "wrong types in a delta": (
        delta({"content": 7, "refusal": [], "tool_calls": [7, {"function": "f"}], "audio": 7, "function_call": 7}),
        Piece(started=(0,), unseen=True),
    ),
    "choices an object": ({"choices": {"delta": {"content": "a"}}}, Piece()),
    "not an object": ([1], Piece()),
}


@pytest.mark.parametrize(("event", "expected"), PIECES.values(), ids=PIECES)
def test_event(event: Any, expected: Piece) -> None:
    assert read(json.dumps(event).encode()) == expected


RAW_EVENTS = {
    "done": (b"[DONE]", Piece(done=True)),
    "done, with white space": (b"[DONE] ", Piece(done=True)),
    "empty": (b"", Piece()),
    "not JSON": (b"{oops", Piece()),
    "NaN": (b'{"choices":[{"delta":{"content":"a"},"logprobs":NaN}]}', Piece(texts=("a",), started=(0,))),
    "half a surrogate pair": (rb'{"choices":[{"delta":{"content":"\ud83d"}}]}', Piece(texts=("\ud83d",), started=(0,))),
    "broken UTF-8": (b'{"choices":[{"delta":{"content":"a\xff"}}]}', Piece(texts=("a\ufffd",), started=(0,))),
    "nested too deep": (b"[" * 100_000, Piece()),
}


@pytest.mark.parametrize(("data", "expected"), RAW_EVENTS.values(), ids=RAW_EVENTS)
def test_raw_event(data: bytes, expected: Piece) -> None:
    assert read(data) == expected


@given(JSON)
def test_any_event_is_read(value: Any) -> None:
    assert isinstance(read(orjson.dumps({"choices": value, "usage": value, "x_groq": value})), Piece)


# --- Usage ------------------------------------------------------------------------------------------------------------

PROMPT_DETAILS = {"cached_tokens": 2, "audio_tokens": 1}
DETAILS = {"reasoning_tokens": 2, "audio_tokens": 1, "accepted_prediction_tokens": 0}

USAGES: dict[str, tuple[dict[str, Any], Usage | None]] = {
    "plain": (USAGE, Usage(3, 4)),
    "zero is not missing": ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, Usage(0, 0)),
    "no total": ({"prompt_tokens": 3, "completion_tokens": 4}, Usage(3, 4)),
    "empty": ({}, None),
    "half": ({"prompt_tokens": 3}, None),
    "wrong types": ({"prompt_tokens": "3", "completion_tokens": True}, None),
    "negative": ({"prompt_tokens": 3, "completion_tokens": -1}, None),
    "absurd": ({"prompt_tokens": 3, "completion_tokens": 2**62}, None),
    "details": (
        {**USAGE, "prompt_tokens_details": PROMPT_DETAILS, "completion_tokens_details": DETAILS},
        Usage(3, 4, cached_prompt=2, reasoning=2, audio_prompt=1, audio_completion=1),
    ),
    "details null": ({**USAGE, "prompt_tokens_details": None, "completion_tokens_details": None}, Usage(3, 4)),
    "a detail null": ({**USAGE, "completion_tokens_details": {"reasoning_tokens": None}}, Usage(3, 4)),
    "cached at the top": ({**USAGE, "cached_tokens": 2}, Usage(3, 4, cached_prompt=2)),
    "cached by DeepSeek's name": ({**USAGE, "prompt_cache_hit_tokens": 2}, Usage(3, 4, cached_prompt=2)),
    "cached zero in the details": (
        {**USAGE, "prompt_tokens_details": {"cached_tokens": 0}, "cached_tokens": 2},
        Usage(3, 4),
    ),
    "more cached than prompted": ({**USAGE, "cached_tokens": 9}, Usage(3, 4, cached_prompt=3)),
    "written to the cache": (
        {**USAGE, "prompt_tokens_details": {"cached_tokens": 1, "cache_write_tokens": 2}},
        Usage(3, 4, cached_prompt=1, cache_write_prompt=2),
    ),
    "written to the cache, by Anthropic's name": (
        {**USAGE, "cache_creation_input_tokens": 2},
        Usage(3, 4, cache_write_prompt=2),
    ),
    "more in the cache than prompted": (
        {**USAGE, "prompt_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 9}},
        Usage(3, 4, cached_prompt=2, cache_write_prompt=1),
    ),
    "searches": ({**USAGE, "server_tool_use_details": {"web_search_requests": 2}}, Usage(3, 4, web_searches=2)),
    "no searches": ({**USAGE, "server_tool_use_details": {"web_search_requests": 0}}, Usage(3, 4, web_searches=0)),
    "reasoning outside, by the total": (
        {**USAGE, "total_tokens": 27, "completion_tokens_details": {"reasoning_tokens": 20}},
        Usage(3, 24, reasoning=20),
    ),
    "reasoning outside, by its size": (
        {**USAGE, "completion_tokens_details": {"reasoning_tokens": 20}},
        Usage(3, 24, reasoning=20),
    ),
    "reasoning outside of the total too": (
        {**USAGE, "total_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 20}},
        Usage(3, 26, reasoning=20),
    ),
    "more audio than prompted": (
        {**USAGE, "prompt_tokens_details": {"audio_tokens": 9}},
        Usage(3, 4, audio_prompt=3),
    ),
    "reasoning unnamed": ({**USAGE, "total_tokens": 17}, Usage(3, 14, reasoning=10)),
    "audio outside the prompt": (
        {**USAGE, "total_tokens": 57, "prompt_tokens_details": {"audio_tokens": 50}},
        Usage(53, 4, audio_prompt=50),
    ),
    "a total that is too small": ({**USAGE, "total_tokens": 1}, Usage(3, 4)),
}


@pytest.mark.parametrize(("usage", "expected"), USAGES.values(), ids=USAGES)
def test_usage(usage: dict[str, Any], expected: Usage | None) -> None:
    assert read(json.dumps({"choices": [], "usage": usage}).encode()).usage == expected
    assert CHAT.read_answer(json.dumps({"choices": [], "usage": usage}).encode()).usage == expected


# --- Answers ----------------------------------------------------------------------------------------------------------


def test_an_answer() -> None:
    choices = [{"message": {"content": "a", "reasoning": "b"}}, {"message": {"refusal": "c"}}]
    answer = CHAT.read_answer(json.dumps({"choices": choices, "usage": USAGE, "service_tier": "default"}).encode())
    assert (answer.texts, answer.usage, answer.service_tier) == (("a", "b", "c"), Usage(3, 4), "default")


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"error":{"message":"x"}}', b'{"choices":null}'])
def test_not_an_answer(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a chat completion"):
        CHAT.read_answer(body)


@each_case(chat_cases(False))
def test_recorded_answer(case: Case) -> None:
    if case.status != 200 or case.meta.get("error"):
        with pytest.raises(ValueError, match="not a chat completion"):
            CHAT.read_answer(case.body)
        return
    answer = CHAT.read_answer(case.body)
    usage = answer.usage
    assert (usage and (usage.prompt, usage.completion)) == case.billed
    if usage:
        assert usage.cached_prompt == min(case.usage.get("cached", 0), usage.prompt)
        assert usage.reasoning >= case.usage.get("reasoning", 0)
    visible = sum(map(len, answer.texts))
    assert visible >= case.meta["text_chars"] + (case.meta["thinking_chars"] > 0)


# Azure names the model in the path, which is not served; one request was recorded for having no messages; three choose
# OpenRouter's providers and plugins by themselves.
WAYS = {"provider", "plugins"}
ASKED = [
    case
    for case in chat_cases()
    if case.request and case.request.get("model") and case.request["messages"] and not WAYS & case.request.keys()
]
# The upper bounds of prompts are OpenAI's; other providers put instructions of their own before the caller's.
OPENAIS = [case for case in ASKED if case.provider in ("openai", "azure-openai") and "input" in case.usage]


@each_case(ASKED)
def test_recorded_requests_are_read(case: Case) -> None:
    assert case.request is not None
    call = CHAT.read_call(case.request)
    assert sent(case.request, model=call.model, cap=call.cap) == {
        **case.request,
        **({"stream_options": {"include_usage": True}} if call.stream else {}),
    }


@each_case(OPENAIS)
def test_a_hold_for_a_recorded_prompt_covers_it(case: Case) -> None:
    assert case.request is not None
    call = CHAT.read_call(case.request)
    held = count_texts(call.prompt_texts, counter("o200k_base")) + call.prompt_extra
    assert case.usage["input"] <= held
    if not case.features & {"image-in", "audio-in", "audio-out", "document-in"}:
        assert held <= 1.5 * case.usage["input"] + parts.TOOLS_TOKENS + 16


# --- Errors -----------------------------------------------------------------------------------------------------------

EXHAUSTED = BudgetExhausted("Daily budget of team x is used up.", budget_id="team/x/day/usd", retry_after_s=60)
REFUSAL = BadRequest("Invalid 'n'.", param="n", code="integer_below_min_value")


def test_error() -> None:
    assert json.loads(CHAT.render_error(REFUSAL)) == {
        "error": {
            "message": "Invalid 'n'.",
            "type": "invalid_request_error",
            "param": "n",
            "code": "integer_below_min_value",
        }
    }


def client(status: int, content_type: str, body: bytes) -> openai.OpenAI:
    answer = httpx2.Response(status, headers={"content-type": content_type}, content=body)
    transport = httpx2.MockTransport(lambda _: answer)
    return openai.OpenAI(api_key="x", max_retries=0, http_client=httpx2.Client(transport=transport))


def test_the_official_client_raises_its_own_errors() -> None:
    refused = client(429, "application/json", CHAT.render_error(EXHAUSTED))
    with pytest.raises(openai.RateLimitError, match="Daily budget") as limited:
        refused.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
    assert limited.value.code == "insufficient_quota"


def test_the_official_client_raises_in_the_middle_of_a_stream() -> None:
    first = b"data: " + json.dumps(delta({"content": "a"})).encode() + b"\n\n"
    cut = client(200, "text/event-stream", first + CHAT.render_error_event(EXHAUSTED))
    stream = cut.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}], stream=True)
    assert next(stream).choices[0].delta.content == "a"
    with pytest.raises(openai.APIError, match="Daily budget"):
        next(stream)


def test_an_answer_that_is_fetched_later_would_pass_the_meter() -> None:
    with pytest.raises(BadRequest) as caught:
        CHAT.read_call({"model": "grok-4", "messages": [{"role": "user", "content": "hi"}], "deferred": True})
    assert caught.value.param == "deferred"


def test_openrouters_suffix_searches() -> None:
    call = CHAT.read_call({"model": "x/y:online", "messages": [{"role": "user", "content": "hi"}]})
    assert call.web_searches == 1
