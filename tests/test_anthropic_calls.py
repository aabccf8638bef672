"""Anthropic's dialect, the gate's half: what is accepted, what is sent on, what is held for."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import limits
from extproc.dialects.anthropic import AnthropicCountTokens, AnthropicMessages, prompts
from extproc.dialects.dialect import ChatDialect, Dialect
from extproc.errors import (
    BadRequest,
    BudgetExhausted,
    Forbidden,
    NotFound,
    ProviderError,
    RequestTooLarge,
    TollgateError,
    Unauthenticated,
    Unavailable,
    UpstreamFailure,
)
from extproc.metering import count_texts
from extproc.records import Usage
from extproc.tokens import counter
from tests.each import each_case
from tests.recordings import Case, protocol_cases

CLAUDE: ChatDialect = AnthropicMessages()
COUNTS: Dialect = AnthropicCountTokens()
HELLO = {"role": "user", "content": "Hello"}


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "claude-sonnet-4-5", "max_tokens": 100, "messages": [HELLO], **fields}


def with_content(*blocks: Any) -> dict[str, Any]:
    return request(messages=[{"role": "user", "content": list(blocks)}])


# --- Requests: what is read -------------------------------------------------------------------------------------------


def test_a_plain_call() -> None:
    body = request()
    call = CLAUDE.read_call(body)
    assert call.body is body
    assert (call.model, call.stream, call.wants_usage, call.choices, call.cap) == (
        "claude-sonnet-4-5", False, True, 1, 100,
    )  # fmt: skip
    assert (call.service_tier, call.web_searches, call.thinks, call.billed) == (None, 0, None, True)
    assert call.prompt_texts == ("Hello",)
    assert call.prompt_extra == prompts.PROMPT_TOKENS + prompts.MESSAGE_TOKENS + 1


SEARCH = {"type": "web_search_20250305", "name": "web_search"}

READ: dict[str, tuple[dict[str, Any], str, object]] = {
    "stream": ({"stream": True}, "stream", True),
    "stream null": ({"stream": None}, "stream", False),
    "a prompt to be cached, and no answer": ({"max_tokens": 0}, "cap", 1),
    "thinking": ({"thinking": {"type": "enabled", "budget_tokens": 2048}}, "thinks", True),
    "thinking as it likes": ({"thinking": {"type": "adaptive"}}, "thinks", True),
    "thinking in a way to come": ({"thinking": {"type": "sideways"}}, "thinks", True),
    "no thinking": ({"thinking": {"type": "disabled"}}, "thinks", False),
    "fast": ({"speed": "fast", "service_tier": "auto"}, "service_tier", "fast"),
    "not so fast": ({"speed": "standard"}, "service_tier", None),
    "any tier": ({"service_tier": "auto"}, "service_tier", "auto"),
    "the standard tier": ({"service_tier": "standard_only"}, "service_tier", None),
    "web search": ({"tools": [SEARCH]}, "web_searches", limits.DEFAULT_TOOL_CALLS),
    "web search, bounded": ({"tools": [{**SEARCH, "max_uses": 3}]}, "web_searches", 3),
    "a function is no web search": ({"tools": [{"name": "web_search", "input_schema": {}}]}, "web_searches", 0),
    "a fetch is no web search": ({"tools": [{"type": "web_fetch_20250910", "name": "f"}]}, "web_searches", 0),
}


@pytest.mark.parametrize(("fields", "name", "expected"), READ.values(), ids=READ)
def test_read(fields: dict[str, Any], name: str, expected: object) -> None:
    assert getattr(CLAUDE.read_call(request(**fields)), name) == expected


def document(**source: Any) -> dict[str, Any]:
    return {"type": "document", "source": source}


def result(*blocks: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "toolu_1", "content": list(blocks)}


TEXT = {"type": "text", "text": "words"}

PROMPTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "system": (request(system="rules"), ["rules"]),
    "system in blocks": (request(system=[TEXT]), ["words"]),
    "text": (with_content(TEXT), ["words"]),
    "document": (
        with_content({**document(type="text", data="words"), "title": "t", "context": "c"}),
        ["t", "c", "words"],
    ),
    "document in blocks": (with_content(document(type="content", content=[TEXT])), ["words"]),
    "document in one": (with_content(document(type="content", content="words")), ["words"]),
    "tool result": (with_content({**result(), "content": "words"}), ["toolu_1", "words"]),
    "tool result in blocks": (with_content(result(TEXT)), ["words"]),
    "tool call": (with_content({"type": "tool_use", "name": "f", "input": {"a": 1}}), ['"input":{"a":1}']),
    "thinking and its signature": (
        with_content({"type": "thinking", "thinking": "hm", "signature": "s"}),
        ['"hm"', '"s"'],
    ),
    "a block to come": (
        with_content({"type": "hologram", "data": {"a": "words"}}),
        ['{"type":"hologram","data":{"a":"words"}}'],
    ),
    "tools": (request(tools=[{"name": "f", "input_schema": {}}]), ['"name":"f"']),
    "schema": (request(output_config={"format": {"type": "json_schema", "schema": {"a": 1}}}), ['{"a":1}']),
    "schema, by its first name": (request(output_format={"type": "json_schema", "schema": {"a": 1}}), ['{"a":1}']),
}


@pytest.mark.parametrize(("body", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_prompt_texts(body: dict[str, Any], expected: list[str]) -> None:
    texts = CLAUDE.read_call(body).prompt_texts
    assert [text for text in expected if not any(text in found for found in texts)] == []


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
LINKED = {"type": "image", "source": {"type": "url", "url": "https://a.example/b.png"}}
PDF = document(type="base64", media_type="application/pdf", data="A" * 4_000)

EXTRAS: dict[str, tuple[dict[str, Any], int]] = {
    "image": (with_content(IMAGE), prompts.IMAGE_TOKENS),
    "image at an address": (with_content(LINKED), prompts.IMAGE_TOKENS),
    "image in a tool result": (with_content(result(IMAGE)), prompts.IMAGE_TOKENS + 1),
    "PDF": (with_content(PDF), prompts.DOCUMENT_TOKENS + 3_000),
    "PDF, large": (
        with_content(document(type="base64", data="A" * 4_000_000)),
        prompts.LARGEST_CONTEXT_TOKENS,
    ),
    "PDF of any size": (
        with_content(document(type="url", url="https://a.example/b.pdf")),
        prompts.LARGEST_CONTEXT_TOKENS,
    ),
    "PDF to be cited": (
        with_content({**PDF, "citations": {"enabled": True}}),
        prompts.DOCUMENT_TOKENS + 3_000 + prompts.CITATIONS_TOKENS,
    ),
}


@pytest.mark.parametrize(("body", "expected"), EXTRAS.values(), ids=EXTRAS)
def test_prompt_extra(body: dict[str, Any], expected: int) -> None:
    assert CLAUDE.read_call(body).prompt_extra - CLAUDE.read_call(with_content()).prompt_extra == expected


ROUNDS: dict[str, tuple[dict[str, Any], int]] = {
    "a function": ({"tools": [{"name": "f"}]}, 0),
    "a tool that the caller runs": ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, 0),
    "one search": ({"tools": [{**SEARCH, "max_uses": 1}]}, 1),
    "three searches, each reading those before": ({"tools": [{**SEARCH, "max_uses": 3}]}, 6),
    "searches without a bound": ({"tools": [SEARCH]}, 55),
    "a server of tools": ({"mcp_servers": [{"type": "url", "url": "https://a.example"}]}, 55),
}


@pytest.mark.parametrize(("fields", "rounds"), ROUNDS.values(), ids=ROUNDS)
def test_rounds_of_the_providers_own_tools_are_held_for(fields: dict[str, Any], rounds: int) -> None:
    extra = CLAUDE.read_call(request(**fields)).prompt_extra - prompts.TOOLS_TOKENS
    assert extra // prompts.ROUND_TOKENS == rounds


# --- Requests: what is refused ----------------------------------------------------------------------------------------

STORED = {"type": "file", "file_id": "file_1"}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"max_tokens": 1, "messages": [HELLO]}, "model"),
    "no bound": ({"model": "m", "messages": [HELLO]}, "max_tokens"),
    "bound null": (request(max_tokens=None), "max_tokens"),
    "bound negative": (request(max_tokens=-1), "max_tokens"),
    "bound huge": (request(max_tokens=2**60), "max_tokens"),
    "bound a boolean": (request(max_tokens=True), "max_tokens"),
    "no messages": ({"model": "m", "max_tokens": 1}, "messages"),
    "messages empty": (request(messages=[]), "messages"),
    "too many messages": (request(messages=[HELLO] * (limits.MAX_MESSAGES + 1)), "messages"),
    "message a string": (request(messages=["hi"]), "messages[0]"),
    "role unknown": (request(messages=[{"role": "tool", "content": ""}]), "messages[0].role"),
    "no content": (request(messages=[{"role": "user"}]), "messages[0].content"),
    "content null": (request(messages=[{"role": "user", "content": None}]), "messages[0].content"),
    "content a number": (request(messages=[{"role": "user", "content": 1}]), "messages[0].content"),
    "block without a type": (with_content({"text": "x"}), "messages[0].content[0].type"),
    "text missing": (with_content({"type": "text"}), "messages[0].content[0].text"),
    "image without a source": (with_content({"type": "image"}), "messages[0].content[0].source"),
    "stored image": (with_content({"type": "image", "source": STORED}), "messages[0].content[0].source.file_id"),
    "stored document": (with_content(document(**STORED)), "messages[0].content[0].source.file_id"),
    "stored, in a result": (
        with_content(result(document(**STORED))),
        "messages[0].content[0].content[0].source.file_id",
    ),
    "stored upload": (with_content({"type": "container_upload"}), "messages[0].content[0].file_id"),
    "source unknown": (with_content(document(type="tape")), "messages[0].content[0].source.type"),
    "system a number": (request(system=1), "system"),
    "tools an object": (request(tools={}), "tools"),
    "uses unbounded": (request(tools=[{**SEARCH, "max_uses": 10**9}]), "tools[0].max_uses"),
    "uses none": (request(tools=[{**SEARCH, "max_uses": 0}]), "tools[0].max_uses"),
    "a tool that asks another model": (request(tools=[{"type": "advisor", "model": "opus"}]), "tools[0].model"),
    "models to fall back on": (request(fallbacks=[{"model": "x"}]), "fallbacks"),
    "stream a number": (request(stream=1), "stream"),
    "thinking a boolean": (request(thinking=True), "thinking"),
    "budget a string": (request(thinking={"type": "enabled", "budget_tokens": "1"}), "thinking.budget_tokens"),
    "Max_Tokens": (request(Max_Tokens=9), "Max_Tokens"),
    "maxTokens": (request(maxTokens=9), "maxTokens"),
    "Content": (request(messages=[{**HELLO, "Content": ""}]), "messages[0].Content"),
    "maxUses": (request(tools=[{**SEARCH, "maxUses": 99}]), "tools[0].maxUses"),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED)
def test_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refusal:
        CLAUDE.read_call(body)
    assert refusal.value.param == param


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**10) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(("type", "content", "source", "text", "a")), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = (
    "model", "messages", "system", "stream", "max_tokens", "tools", "tool_choice", "thinking", "output_config",
    "output_format", "mcp_servers", "service_tier", "speed", "context_management", "temperature", "stop_sequences",
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(FIELDS), JSON))
def test_any_value_is_read_or_refused(fields: dict[str, Any]) -> None:
    body = request(**fields)
    try:
        call = CLAUDE.read_call(body)
        CLAUDE.read_request(body)
    except BadRequest:
        return
    assert json.loads(CLAUDE.upstream_body(call, orjson.dumps(body), "m", 5))["model"] == "m"


# --- Requests: what is sent on ----------------------------------------------------------------------------------------


def sent(body: dict[str, Any], cap: int | None, model: str = "claude-sonnet-4-5") -> Any:
    return json.loads(CLAUDE.upstream_body(CLAUDE.read_call(body), orjson.dumps(body), model, cap))


def thinking(budget_tokens: int) -> dict[str, Any]:
    return {"thinking": {"type": "enabled", "budget_tokens": budget_tokens, "display": "omitted"}}


SENT: dict[str, tuple[dict[str, Any], int | None, dict[str, Any]]] = {
    "no cap, no change": ({}, None, {}),
    "cap": ({}, 9, {"max_tokens": 9}),
    "a cap above the caller's own": ({}, 1_000, {}),
    "a prompt to be cached is not answered": ({"max_tokens": 0}, 1, {}),
    "thoughts end before the cap": (
        {"max_tokens": 9_000, **thinking(8_000)},
        4_000,
        {"max_tokens": 4_000, **thinking(3_999)},
    ),
    "fewer thoughts than the cap": (
        {"max_tokens": 9_000, **thinking(2_000)},
        4_000,
        {"max_tokens": 4_000, **thinking(2_000)},
    ),
    "no room for thoughts": (
        {"max_tokens": 9_000, **thinking(2_000)},
        1_024,
        {"max_tokens": 1_024, "thinking": {"type": "disabled"}},
    ),
    "thoughts over several turns are the caller's to allow": (thinking(8_000), None, thinking(8_000)),
    "adaptive": ({"thinking": {"type": "adaptive"}}, 50, {"thinking": {"type": "adaptive"}, "max_tokens": 50}),
}


@pytest.mark.parametrize(("fields", "cap", "expected"), SENT.values(), ids=SENT)
def test_sent(fields: dict[str, Any], cap: int | None, expected: dict[str, Any]) -> None:
    assert sent(request(**fields), cap) == request(**{**fields, **expected})


def test_what_need_not_change_stays_byte_for_byte() -> None:
    raw = b'{ "max_tokens":1e2,"messages":[{"role":"user","content":[{"type":"hologram", "x":1.0}]}] ,"model":"a"}'
    call = CLAUDE.read_call(json.loads(raw.replace(b"1e2", b"100")))
    assert CLAUDE.upstream_body(call, raw, "a", None) is raw
    assert b'[{"role":"user","content":[{"type":"hologram", "x":1.0}]}]' in CLAUDE.upstream_body(call, raw, "b", 7)


# --- Recorded requests ------------------------------------------------------------------------------------------------


def body_of(case: Case) -> dict[str, Any]:
    """Vertex AI's path names the model."""
    return {"model": case.model, **(case.request or {})}


ASKED = [case for case in protocol_cases("anthropic-messages") if case.request and case.status == 200]
# Its prompt of 55,000 tokens was taken out of the recording.
SHORTENED = {"anthropic/messages-stream-claude-sonnet-4-6-04"}


@each_case(ASKED)
def test_recorded_requests_are_read(case: Case) -> None:
    body = body_of(case)
    assert sent(body, body["max_tokens"], body["model"]) == body


@each_case([case for case in ASKED if case.name not in SHORTENED])
def test_a_hold_for_a_recorded_prompt_covers_it(case: Case) -> None:
    call = CLAUDE.read_call(body_of(case))
    held = count_texts(call.prompt_texts, counter("o200k_base")) + call.prompt_extra
    prompt = sum(case.usage.get(name, 0) for name in ("input", "cached", "cache_creation"))
    assert prompt <= held
    if not case.features & {"image-in", "document-in"} and call.prompt_extra < prompts.ROUND_TOKENS:
        assert held <= 2.2 * prompt + prompts.TOOLS_TOKENS


# --- Counts of tokens -------------------------------------------------------------------------------------------------


def test_counting_is_free() -> None:
    body = {"model": "m", "messages": [HELLO], "tools": [SEARCH]}
    call = COUNTS.read_call(body)
    assert (call.prompt_texts, call.prompt_extra, call.web_searches, call.cap, call.billed) == ((), 0, 0, 1, False)
    assert COUNTS.upstream_body(call, b'{"model":"m", "messages":[]}', "n", 1) == b'{"model":"n","messages":[]}'
    assert COUNTS.piece_reader()(b'{"input_tokens":3}').usage is None


def test_a_count_is_checked_like_a_call() -> None:
    with pytest.raises(BadRequest, match="role"):
        COUNTS.read_call({"model": "m", "messages": [{"content": "x"}]})


@each_case(protocol_cases("anthropic-count-tokens"))
def test_recorded_count(case: Case) -> None:
    assert case.request is not None
    COUNTS.read_call(case.request)
    if case.status != 200:
        with pytest.raises(ValueError, match="not a count"):
            COUNTS.read_answer(case.body)
        return
    assert COUNTS.read_answer(case.body).usage == Usage(0, 0)
    prompt = prompts.read_prompt(case.request)
    assert case.usage["input"] <= count_texts(prompt.texts, counter("o200k_base")) + prompt.extra


# --- Errors -----------------------------------------------------------------------------------------------------------

EXHAUSTED = BudgetExhausted("Budget team/x/day/usd is used up.", budget_id="team/x/day/usd", retry_after_s=60)

RAISED: dict[str, tuple[TollgateError, type[anthropic.APIStatusError], str]] = {
    "bad request": (BadRequest("no", param="tools[2]"), anthropic.BadRequestError, "invalid_request_error"),
    "unauthenticated": (Unauthenticated("no"), anthropic.AuthenticationError, "authentication_error"),
    "forbidden": (Forbidden("no"), anthropic.PermissionDeniedError, "permission_error"),
    "not found": (NotFound("no"), anthropic.NotFoundError, "not_found_error"),
    "too large": (RequestTooLarge("no"), anthropic.APIStatusError, "request_too_large"),
    "budget": (EXHAUSTED, anthropic.RateLimitError, "rate_limit_error"),
    "provider's limit": (ProviderError("no", status=429), anthropic.RateLimitError, "rate_limit_error"),
    "failure": (UpstreamFailure("no"), anthropic.InternalServerError, "api_error"),
    "unavailable": (Unavailable("no"), anthropic.InternalServerError, "api_error"),
    "timeout": (ProviderError("no", status=504), anthropic.InternalServerError, "timeout_error"),
    "overloaded": (ProviderError("no", status=529), anthropic.InternalServerError, "overloaded_error"),
    "provider's bill": (ProviderError("no", status=402), anthropic.APIStatusError, "billing_error"),
}


def client(status: int, content_type: str, body: bytes) -> anthropic.Anthropic:
    answer = httpx2.Response(status, headers={"content-type": content_type}, content=body)
    transport = httpx2.MockTransport(lambda _: answer)
    return anthropic.Anthropic(api_key="x", max_retries=0, http_client=httpx2.Client(transport=transport))


@pytest.mark.parametrize(("error", "raised", "kind"), RAISED.values(), ids=RAISED)
def test_the_official_client_raises_its_own_errors(
    error: TollgateError, raised: type[anthropic.APIStatusError], kind: str
) -> None:
    failing = client(error.status, "application/json", CLAUDE.render_error(error))
    with pytest.raises(raised, match=error.message) as caught:
        failing.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}])
    assert caught.value.status_code == error.status
    assert caught.value.type == kind
    assert CLAUDE.read_error(error.status, CLAUDE.render_error(error)).status == error.status


def test_an_error_says_where_and_which_budget() -> None:
    details = json.loads(CLAUDE.render_error(EXHAUSTED))["error"]["details"]
    assert details == {"error_code": "insufficient_quota", "budget": "team/x/day/usd"}
    assert (
        json.loads(CLAUDE.render_error(BadRequest("no", param="tools[2]")))["error"]["details"]["param"] == "tools[2]"
    )


def test_the_official_client_raises_in_the_middle_of_a_stream() -> None:
    first = b'event: message_start\ndata: {"type":"message_start","message":{"content":[],"usage":{}}}\n\n'
    cut = client(200, "text/event-stream", first + CLAUDE.render_error_event(EXHAUSTED))
    stream = cut.messages.create(model="m", max_tokens=1, messages=[{"role": "user", "content": "x"}], stream=True)
    assert next(stream).type == "message_start"
    with pytest.raises(anthropic.APIStatusError, match="team/x/day/usd") as caught:
        next(stream)
    assert caught.value.type == "rate_limit_error"


READ_ERRORS: dict[str, tuple[int, bytes, tuple[int, str, str]]] = {
    "Anthropic's": (
        529,
        b'{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"},"request_id":"r"}',
        (529, "overloaded_error", "Overloaded"),
    ),
    "Google's": (
        403,
        b'[{"error":{"code":403,"message":"No.","status":"PERMISSION_DENIED"}}]',
        (403, "PERMISSION_DENIED", "No."),
    ),
    "Azure's": (404, b'{"error":{"code":"DeploymentNotFound","message":"No."}}', (404, "DeploymentNotFound", "No.")),
    "nothing": (502, b"", (502, "upstream_error", "The provider answered with status 502.")),
    "a page": (502, b"<html>\xff", (502, "upstream_error", "The provider answered with status 502.")),
    "wrong types": (
        500,
        b'{"error":{"type":7,"message":[]}}',
        (500, "upstream_error", "The provider answered with status 500."),
    ),
}


@pytest.mark.parametrize(("status", "body", "expected"), READ_ERRORS.values(), ids=READ_ERRORS)
def test_read_error(status: int, body: bytes, expected: tuple[int, str, str]) -> None:
    error = CLAUDE.read_error(status, body)
    assert (error.status, error.code, error.message) == expected


FAILED = [case for case in protocol_cases("anthropic-messages", False) if case.status != 200]


@each_case(FAILED)
def test_recorded_error(case: Case) -> None:
    error = CLAUDE.read_error(case.status, case.body)
    assert (error.message, error.code) == (case.meta["error"]["message"], case.meta["error"]["type"])
