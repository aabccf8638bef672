"""Responses, as the gate sees them: what is accepted, what is held for, and what is sent on."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import httpx2
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import limits
from extproc.dialects import openai_parts as parts
from extproc.dialects.openai_responses import OpenAIResponses, prompts
from extproc.errors import BadRequest, BudgetExhausted
from extproc.form import carry
from extproc.metering import count_texts
from extproc.records import Usage
from extproc.tokens import counter
from tests.each import each_case
from tests.recordings import Case, protocol_cases

RESPONSES = OpenAIResponses()
DATA_URL = "data:image/png;base64,AAAA"
FOREIGN = carry("sig", "anthropic-messages", "openai-responses")
JSON = st.recursive(  # what the intake lets through
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "gpt-4.1", "input": "Hello", **fields}


def with_items(*items: Any) -> dict[str, Any]:
    return request(input=list(items))


def with_parts(*content: Any) -> dict[str, Any]:
    return with_items({"role": "user", "content": list(content)})


def sent(body: dict[str, Any], model: str = "gpt-4.1", cap: int | None = None) -> dict[str, Any]:
    sent_on: dict[str, Any] = json.loads(
        RESPONSES.upstream_body(RESPONSES.read_call(body), orjson.dumps(body), model, cap)
    )
    return sent_on


# --- What is read -----------------------------------------------------------------------------------------------------


def test_a_plain_call() -> None:
    body = request()
    call = RESPONSES.read_call(body)
    assert call.body is body
    assert (call.model, call.stream, call.choices, call.cap, call.thinks) == ("gpt-4.1", False, 1, None, None)
    assert (call.service_tier, call.web_searches) == (None, 0)
    assert call.prompt_texts == ("Hello",)
    assert call.prompt_extra == parts.MESSAGE_TOKENS + parts.REPLY_TOKENS


SEARCH = {"type": "web_search"}
FUNCTION = {"type": "function", "name": "f", "parameters": {}}

READ: dict[str, tuple[dict[str, Any], str, object]] = {
    "stream": ({"stream": True}, "stream", True),
    "stream null": ({"stream": None}, "stream", False),
    "cap": ({"max_output_tokens": 16}, "cap", 16),
    "service tier": ({"service_tier": "flex"}, "service_tier", "flex"),
    "no thoughts": ({"reasoning": {"effort": "none"}}, "thinks", False),
    "thoughts": ({"reasoning": {"effort": "high"}}, "thinks", True),
    "as it likes": ({"reasoning": {"summary": "auto"}}, "thinks", None),
    "thoughts, OpenRouter's": ({"reasoning": {"effort": "none", "max_tokens": 2_048}}, "thinks", True),
    "a switch, OpenRouter's": ({"reasoning": {"enabled": True}}, "thinks", True),
    "a web search": ({"tools": [SEARCH]}, "web_searches", limits.DEFAULT_TOOL_CALLS),
    "web searches, bounded": ({"tools": [SEARCH], "max_tool_calls": 3}, "web_searches", 3),
    "xAI's own search": ({"tools": [{"type": "x_search"}]}, "web_searches", limits.DEFAULT_TOOL_CALLS),
    "search built in": ({"model": "gpt-4o-search-preview"}, "web_searches", 1),
    "a search of files": ({"tools": [{"type": "file_search"}]}, "web_searches", 0),
    "a function": ({"tools": [FUNCTION], "max_tool_calls": 3}, "web_searches", 0),
    "a search among the input": (
        {"input": [{"type": "additional_tools", "role": "developer", "tools": [SEARCH]}], "max_tool_calls": 3},
        "web_searches",
        3,
    ),
    "a search that was found": ({"input": [{"type": "tool_search_output", "tools": [SEARCH]}]}, "web_searches", 32),
    "background false": ({"background": False, "conversation": None, "prompt": None}, "cap", None),
}


@pytest.mark.parametrize(("fields", "name", "expected"), READ.values(), ids=READ)
def test_read(fields: dict[str, Any], name: str, expected: object) -> None:
    assert getattr(RESPONSES.read_call(request(**fields)), name) == expected


PROMPTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "instructions": (request(instructions="be brief"), ["be brief"]),
    "a message": (with_items({"type": "message", "role": "user", "content": "one"}), ["user", "one"]),
    "parts": (with_parts({"type": "input_text", "text": "one"}, {"type": "refusal", "refusal": "no"}), ["one", "no"]),
    "a call": (with_items({"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}), ['"name":"f"']),
    "its output": (with_items({"type": "function_call_output", "call_id": "c9", "output": "done"}), ["c9", "done"]),
    "its output in parts": (
        with_items(
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "part"}]}
        ),
        ["part"],
    ),
    "thoughts": (
        with_items(
            {
                "type": "reasoning",
                "summary": [{"type": "summary_text", "text": "sum"}],
                "content": [{"type": "reasoning_text", "text": "all"}],
            }
        ),
        ["sum", "all"],
    ),
    "a provider's tool": (with_items({"type": "web_search_call", "id": "w", "action": {"query": "q1"}}), ["q1"]),
    "tools": (request(tools=[FUNCTION]), ['"name":"f"']),
    "format": (request(text={"format": {"type": "json_schema", "name": "s"}}), ['"name":"s"']),
    "tool choice": (request(tool_choice={"type": "function", "name": "g"}), ['"name":"g"']),
}


@pytest.mark.parametrize(("body", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_prompt_texts(body: dict[str, Any], expected: list[str]) -> None:
    texts = RESPONSES.read_call(body).prompt_texts
    assert [text for text in expected if not any(text in found for found in texts)] == []


def image(detail: str | None = None) -> dict[str, Any]:
    return with_parts({"type": "input_image", "image_url": DATA_URL, "detail": detail})


ONE = with_items({"role": "user", "content": "x"})
LARGEST = parts.LARGEST_CONTEXT_TOKENS

EXTRAS: dict[str, tuple[dict[str, Any], int]] = {
    "instructions": ({**ONE, "instructions": "x"}, 4),
    "another item": (with_items(*ONE["input"], *ONE["input"]), 4),
    "tools": ({**ONE, "tools": [FUNCTION]}, parts.TOOLS_TOKENS),
    "image": (image(), 6_150),
    "image, low": (image("low"), 630),
    "image, original": (image("original"), 24_600),
    "image, gpt-4o-mini": ({**image("low"), "model": "gpt-4o-mini"}, 2_833),
    "screenshot": (
        with_items({"type": "computer_call_output", "output": {"type": "computer_screenshot", "image_url": "u"}}),
        6_150,
    ),
    "audio": (
        with_parts({"type": "input_audio", "input_audio": {"data": "A" * 8_000, "format": "wav"}}),
        375 + 6_000 // 80,
    ),
    "file": (with_parts({"type": "input_file", "file_data": "A" * 4_000}), 1_500 + 3_000),
    "file at an address": (with_parts({"type": "input_file", "file_url": "https://x.test/a.pdf"}), LARGEST),
    "encrypted thoughts": (with_items({"type": "reasoning", "summary": [], "encrypted_content": "A" * 401}), 101),
    "thoughts that are kept": (with_items({"type": "reasoning", "id": "rs_1", "summary": []}), 128_000),
    "a compaction": (with_items({"type": "compaction", "encrypted_content": "A" * 400}), 100),
    "an item that is kept": (with_items({"id": "msg_1"}), LARGEST),
    "an earlier response": ({**ONE, "previous_response_id": "resp_1"}, LARGEST),
    "kept things share the context": (
        {**with_items({"type": "item_reference", "id": "msg_1"}), "previous_response_id": "resp_1"},
        LARGEST,
    ),
    "items that are kept share it": (with_items({"id": "msg_1"}, {"id": "msg_2"}), 4 + LARGEST),
    "rounds, bounded": (
        {**ONE, "tools": [SEARCH], "max_tool_calls": 2},
        parts.TOOLS_TOKENS + prompts.OWN_TOOLS_TOKENS + 3 * prompts.ROUND_TOKENS,
    ),
    "rounds": ({**ONE, "tools": [SEARCH]}, parts.TOOLS_TOKENS + prompts.OWN_TOOLS_TOKENS + LARGEST),
    "rounds of tools among the input": (
        with_items(*ONE["input"], {"type": "additional_tools", "role": "developer", "tools": [SEARCH]}),
        4 + parts.TOOLS_TOKENS + prompts.OWN_TOOLS_TOKENS + LARGEST,
    ),
}


@pytest.mark.parametrize(("body", "expected"), EXTRAS.values(), ids=EXTRAS)
def test_prompt_extra(body: dict[str, Any], expected: int) -> None:
    assert RESPONSES.read_call(body).prompt_extra - RESPONSES.read_call(ONE).prompt_extra == expected


# --- What is refused --------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": ({"input": "x"}, "model", "missing_required_parameter"),
    "no input": ({"model": "m"}, "input", "missing_required_parameter"),
    "input a number": (request(input=1), "input", "invalid_type"),
    "item a string": (with_items("x"), "input[0]", "invalid_type"),
    "too many items": (
        with_items(*[{"role": "user"}] * (limits.MAX_MESSAGES + 1)),
        "input",
        "array_above_max_length",
    ),
    "item of unknown cost": (with_items({"type": "video"}), "input[0].type", "invalid_value"),
    "item type a number": (with_items({"type": 1}), "input[0].type", "invalid_type"),
    "reference without id": (with_items({"type": "item_reference"}), "input[0].id", "missing_required_parameter"),
    "message without role": (
        with_items({"type": "message", "content": "x"}),
        "input[0].role",
        "missing_required_parameter",
    ),
    "content a number": (with_items({"role": "user", "content": 1}), "input[0].content", "invalid_type"),
    "part of unknown cost": (with_parts({"type": "input_video"}), "input[0].content[0].type", "invalid_value"),
    "image without address": (
        with_parts({"type": "input_image"}),
        "input[0].content[0].image_url",
        "missing_required_parameter",
    ),
    "image of unknown detail": (image("huge"), "input[0].content[0].detail", "invalid_value"),
    "image by id": (
        with_parts({"type": "input_image", "file_id": "file-1"}),
        "input[0].content[0].file_id",
        "invalid_value",
    ),
    "file by id": (
        with_parts({"type": "input_file", "file_id": "file-1"}),
        "input[0].content[0].file_id",
        "invalid_value",
    ),
    "file without data": (
        with_parts({"type": "input_file"}),
        "input[0].content[0].file_data",
        "missing_required_parameter",
    ),
    "instructions a list": (request(instructions=[]), "instructions", "invalid_type"),
    "stream a string": (request(stream="true"), "stream", "invalid_type"),
    "cap zero": (request(max_output_tokens=0), "max_output_tokens", "integer_below_min_value"),
    "cap too large": (request(max_output_tokens=2**60), "max_output_tokens", "integer_above_max_value"),
    "in the background": (request(background=True), "background", "unsupported_parameter"),
    "a conversation": (request(conversation="conv_1"), "conversation", "unsupported_parameter"),
    "a template": (request(prompt={"id": "pmpt_1"}), "prompt", "unsupported_parameter"),
    "earlier response a number": (request(previous_response_id=1), "previous_response_id", "invalid_type"),
    "images to be made": (request(tools=[{"type": "image_generation"}]), "tools[0].type", "invalid_value"),
    "images to be made, among the input": (
        with_items({"type": "additional_tools", "role": "developer", "tools": [{"type": "image_generation"}]}),
        "input[0].tools[0].type",
        "invalid_value",
    ),
    "tool without type": (request(tools=[{"name": "f"}]), "tools[0].type", "missing_required_parameter"),
    "tools an object": (request(tools={}), "tools", "invalid_type"),
    "too many tool calls": (request(max_tool_calls=10**6), "max_tool_calls", "integer_above_max_value"),
    "reasoning a string": (request(reasoning="high"), "reasoning", "invalid_type"),
    "misspelt": (request(Max_Output_Tokens=5), "Max_Output_Tokens", "unknown_parameter"),
    "misspelt in an item": (with_items({"role": "user", "Content": "x"}), "input[0].Content", "unknown_parameter"),
    "misspelt in a tool": (request(tools=[{"Type": "function"}]), "tools[0].Type", "unknown_parameter"),
    "misspelt in reasoning": (request(reasoning={"Effort": "x"}), "reasoning.Effort", "unknown_parameter"),
    "another provider": (request(provider={"only": ["x"]}), "provider", "unsupported_parameter"),
}


@pytest.mark.parametrize(("body", "param", "code"), REFUSED.values(), ids=REFUSED)
def test_refused(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as refused:
        RESPONSES.read_call(body)
    assert (refused.value.param, refused.value.code) == (param, code)


FIELDS = ("input", "tools", "instructions", "text", "reasoning", "tool_choice", "max_tool_calls", "stream")


@given(st.sampled_from(FIELDS), JSON)
def test_any_value_is_read_or_refused(name: str, value: Any) -> None:
    with suppress(BadRequest):
        assert RESPONSES.read_call(request(**{name: value})).prompt_extra > 0


@given(st.dictionaries(st.sampled_from(("type", "role", "content", "output", "summary", "id", "text")), JSON))
def test_any_item_is_read_or_refused(item: dict[str, Any]) -> None:
    with suppress(BadRequest):
        assert RESPONSES.read_call(with_items(item)).prompt_extra > 0


# --- What is sent on --------------------------------------------------------------------------------------------------


def test_an_unchanged_call_goes_on_byte_for_byte() -> None:
    raw = b'{ "model":"gpt-4.1", "input" : "x", "unknown":[1,  2] }'
    assert RESPONSES.upstream_body(RESPONSES.read_call(json.loads(raw)), raw, "gpt-4.1", None) == raw


def test_model_and_cap() -> None:
    assert sent(request(), "gpt-5", 100) == request(model="gpt-5", max_output_tokens=100)
    assert sent(request(max_output_tokens=9), cap=9) == request(max_output_tokens=9)
    assert sent(request(max_output_tokens=9), cap=7) == request(max_output_tokens=7)


def test_a_providers_tools_are_bounded_as_they_were_held_for() -> None:
    assert sent(request(tools=[SEARCH]))["max_tool_calls"] == limits.DEFAULT_TOOL_CALLS
    assert sent(request(tools=[SEARCH], max_tool_calls=3)) == request(tools=[SEARCH], max_tool_calls=3)
    assert "max_tool_calls" not in sent(request(tools=[FUNCTION]))


def test_thoughts_of_other_providers_are_left_out() -> None:
    own = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA", "id": "rs_1"}
    hello = {"role": "user", "content": "x", "unknown": 1.50}
    others = [
        {"type": "reasoning", "summary": [], "encrypted_content": FOREIGN},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}], "id": "rs_tollgate_abc_0"},
    ]
    assert sent(with_items(hello, others[0], own, others[1])) == with_items(hello, own)


# --- Recorded requests ------------------------------------------------------------------------------------------------

# The gateway's own refusals: another's choice of providers, an answer in the background, a template at the provider.
ASKED = [case for case in protocol_cases("openai-responses") if case.request]
TAKEN = [case for case in ASKED if case.request and not {"provider", "background", "prompt"} & case.request.keys()]
OPENAIS = [case for case in TAKEN if case.provider in ("openai", "azure-openai", "azure-foundry") and case.usage]


def test_recorded_requests_that_are_refused() -> None:
    params = []
    for case in ASKED:
        if case not in TAKEN and case.request is not None:
            with pytest.raises(BadRequest) as refused:
                RESPONSES.read_call(case.request)
            params.append(refused.value.param)
    assert {*params} <= {"provider", "background", "prompt"}


@each_case(TAKEN)
def test_recorded_requests_are_read(case: Case) -> None:
    assert case.request is not None
    call = RESPONSES.read_call(case.request)
    forced = {"max_tool_calls": limits.DEFAULT_TOOL_CALLS} if prompts.server_tool_calls(case.request) else {}
    assert sent(case.request, call.model, call.cap) == {**case.request, **forced}
    assert sent(case.request, "other", 77) == {**case.request, **forced, "model": "other", "max_output_tokens": 77}


@each_case(OPENAIS)
def test_a_hold_for_a_recorded_prompt_covers_it(case: Case) -> None:
    assert case.request is not None
    call = RESPONSES.read_call(case.request)
    held = count_texts(call.prompt_texts, counter("o200k_base")) + call.prompt_extra
    assert case.usage["input"] <= held
    loose = ('"type": "reasoning"', '"function": {')  # earlier thoughts; definitions nobody reads
    if call.prompt_extra < 1_000 and not any(word in json.dumps(case.request) for word in loose):
        assert held <= 2 * case.usage["input"] + parts.TOOLS_TOKENS + 16


# --- Errors -----------------------------------------------------------------------------------------------------------

EXHAUSTED = BudgetExhausted("Daily budget of team x is used up.", budget_id="team/x/day/usd", retry_after_s=60)


def client(status: int, content_type: str, body: bytes) -> openai.OpenAI:
    answer = httpx2.Response(status, headers={"content-type": content_type}, content=body)
    transport = httpx2.MockTransport(lambda _: answer)
    return openai.OpenAI(api_key="x", max_retries=0, http_client=httpx2.Client(transport=transport))


def test_the_official_client_raises_its_own_errors() -> None:
    with pytest.raises(openai.RateLimitError, match="Daily budget") as limited:
        client(429, "application/json", RESPONSES.render_error(EXHAUSTED)).responses.create(model="m", input="x")
    assert limited.value.code == "insufficient_quota"


def test_the_official_client_raises_in_the_middle_of_a_stream() -> None:
    cut = client(200, "text/event-stream", RESPONSES.render_error_event(EXHAUSTED))
    with pytest.raises(openai.APIError, match="Daily budget") as raised:
        list(cut.responses.create(model="m", input="x", stream=True))
    assert raised.value.code == "insufficient_quota"


def test_an_error_event_is_as_the_reference_has_it() -> None:
    name, data = RESPONSES.render_error_event(EXHAUSTED).decode().split("\n", 1)
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: error"
    assert (event["type"], event["code"], event["param"]) == ("error", "insufficient_quota", None)
    assert event["message"] == event["error"]["message"] == EXHAUSTED.message
    assert event["sequence_number"] == 0


# --- Answers, as they are metered -------------------------------------------------------------------------------------


def test_an_answer() -> None:
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
        {"type": "custom_tool_call", "name": "sql", "input": "select 1"},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "message", "content": [{"type": "output_text", "text": "a"}, {"type": "refusal", "refusal": "b"}]},
    ]
    usage = {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7}
    body = {"output": output, "usage": usage, "service_tier": "flex", "status": "completed"}
    answer = RESPONSES.read_answer(json.dumps(body).encode())
    assert sorted(answer.texts) == ["a", "b", "f", "hm", "select 1", "sql", "{}"]
    assert (answer.usage, answer.service_tier) == (Usage(3, 4, web_searches=0), "flex")


def test_an_answer_that_failed_is_metered() -> None:
    body = {"output": [], "status": "failed", "usage": {"input_tokens": 3, "output_tokens": 4}}
    assert RESPONSES.read_answer(json.dumps(body).encode()).usage == Usage(3, 4, web_searches=0)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"error":{"message":"x"}}', b'{"output":null}'])
def test_not_an_answer(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a response"):
        RESPONSES.read_answer(body)
