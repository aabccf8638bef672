"""OpenAI's whole chat answers and their figures, to and from the canonical form; and what providers say in errors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import form
from extproc.dialects import pieces
from extproc.dialects.dialect import Seed
from extproc.dialects.openai_chat import OpenAIChat
from extproc.dialects.openai_chat.answers import usage_fields
from extproc.dialects.openai_chat.calls import usage_of
from extproc.form import Answer, Choice, Citation, Finish, Part, Refusal, Text, Thinking, TokenLogprob, ToolCall
from extproc.records import Usage
from tests.each import each_case
from tests.recordings import Case, chat_cases
from tests.test_openai_chat_calls import client

CHAT = OpenAIChat()
SEED = Seed("0123456789abcdef", 1_700_000_000, form.Request("gpt-4o", ()))
OWN = "openai-chat"


def whole(message: dict[str, Any], **choice: Any) -> Choice:
    body = {"choices": [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop", **choice}]}
    answer = CHAT.read_whole(json.dumps(body).encode(), SEED)
    assert answer.unseen == ()
    return answer.choices[0]


def call(call_id: str | None = "c1", arguments: Any = "{}", name: str = "f") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def url(**fields: Any) -> dict[str, Any]:
    return {"type": "url_citation", "url_citation": {"url": "https://x", "title": "X", **fields}}


# --- Read -------------------------------------------------------------------------------------------------------------

CLAUDES = {"type": "reasoning.text", "text": "hm", "signature": "s", "format": "anthropic-claude-v1", "index": 0}
SEALED = '{"type":"reasoning.text","signature":"s","format":"anthropic-claude-v1"}'
XAIS = {"type": "reasoning.encrypted", "data": "x", "format": "xai-responses-v1", "index": 1}
XAIS_SEALED = '{"type":"reasoning.encrypted","data":"x","format":"xai-responses-v1"}'
MISTRALS = [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "a"}]

MESSAGES: dict[str, tuple[dict[str, Any], tuple[Part, ...]]] = {
    "text": ({"content": "a"}, (Text("a"),)),
    "nothing": ({"content": None, "refusal": None, "tool_calls": None, "audio": None}, ()),
    "empty": ({"content": "", "refusal": "", "tool_calls": [], "function_call": {"name": "", "arguments": ""}}, ()),
    "refusal": ({"content": None, "refusal": "no"}, (Refusal("no"),)),
    "calls": (
        {"content": "a", "tool_calls": [call("c1", '{"x":1}'), call("c2", "")]},
        (Text("a"), ToolCall("c1", "f", '{"x":1}'), ToolCall("c2", "f", "{}")),
    ),
    "calls of one index": (
        {"tool_calls": [{**call("c1"), "index": 0}, {**call("c1"), "index": 0}]},
        (ToolCall("c1", "f", "{}"), ToolCall("c1", "f", "{}")),
    ),
    "calls without ids": (
        {"tool_calls": [call(""), call(None)]},
        (ToolCall("call_0123456789ab_0", "f", "{}"), ToolCall("call_0123456789ab_1", "f", "{}")),
    ),
    "arguments as an object": ({"tool_calls": [call("c", {"x": 1})]}, (ToolCall("c", "f", '{"x":1}'),)),
    "a function's call": (
        {"content": None, "function_call": {"name": "f", "arguments": "{}"}},
        (ToolCall("call_0123456789ab_0", "f", "{}"),),
    ),
    "thoughts, DeepSeek's name": ({"content": "a", "reasoning_content": "hm"}, (Thinking("hm"), Text("a"))),
    "thoughts, Groq's name": ({"content": "a", "reasoning": "hm"}, (Thinking("hm"), Text("a"))),
    "thoughts under every name": (
        {"reasoning": "hm", "reasoning_content": "hm", "reasoning_details": [CLAUDES]},
        (Thinking("hm", SEALED, OWN),),
    ),
    "thoughts in details only": (
        {"reasoning_details": [{"type": "reasoning.summary", "summary": "hm"}]},
        (Thinking("hm"),),
    ),
    "a proof of thoughts that are not shown": (
        {"content": "a", "reasoning_details": [XAIS]},
        (Thinking("", XAIS_SEALED, OWN), Text("a")),
    ),
    "Mistral's parts": ({"content": MISTRALS}, (Thinking("hm"), Text("a"))),
    "sources": (
        {"content": "a", "annotations": [url(start_index=0, end_index=1, content="q"), {"type": "file"}]},
        (Text("a", citations=(Citation("https://x", "X", "q", 0, 1),)),),
    ),
    "wrong types": (
        {"content": 7, "refusal": [], "tool_calls": [7, {"function": "f"}], "audio": 7, "function_call": 7,
         "reasoning": 7, "reasoning_details": 7, "annotations": [{"url_citation": 7}]},
        (),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("message", "expected"), MESSAGES.values(), ids=MESSAGES)
def test_message(message: dict[str, Any], expected: tuple[Part, ...]) -> None:
    assert whole(message).parts == expected


CALLS = {"tool_calls": [call()]}

FINISHES: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[Finish | None, str | None]]] = {
    "stop": ({}, {}, (Finish.STOP, None)),
    "length": ({"finish_reason": "length"}, {}, (Finish.LENGTH, None)),
    "calls": ({"finish_reason": "tool_calls"}, CALLS, (Finish.TOOL_CALLS, None)),
    "a function's call": ({"finish_reason": "function_call"}, CALLS, (Finish.TOOL_CALLS, None)),
    "calls, that were forced": ({"finish_reason": "stop"}, CALLS, (Finish.TOOL_CALLS, None)),
    "calls, and no more room": ({"finish_reason": "length"}, CALLS, (Finish.LENGTH, None)),
    "moderation": ({"finish_reason": "content_filter"}, {}, (Finish.CONTENT_FILTER, None)),
    "refusal": ({}, {"refusal": "no"}, (Finish.REFUSAL, None)),
    "refusal, behind OpenRouter": ({"native_finish_reason": "refusal"}, {}, (Finish.REFUSAL, None)),
    "error": ({"finish_reason": "error"}, {}, (Finish.ERROR, None)),
    "vLLM's stop sequence": ({"stop_reason": "END"}, {}, (Finish.STOP_SEQUENCE, "END")),
    "vLLM's stop token": ({"stop_reason": 128009}, {}, (Finish.STOP, None)),
    "SGLang's stop sequence": ({"matched_stop": "END"}, {}, (Finish.STOP_SEQUENCE, "END")),
    "Together's": ({"finish_reason": "eos"}, {}, (Finish.STOP, None)),
    "unknown": ({"finish_reason": "x"}, {}, (Finish.STOP, None)),
    "none": ({"finish_reason": None}, {}, (Finish.STOP, None)),
}


@pytest.mark.parametrize(("choice", "message", "expected"), FINISHES.values(), ids=FINISHES)
def test_finish(choice: dict[str, Any], message: dict[str, Any], expected: tuple[Finish | None, str | None]) -> None:
    read = whole(message, **choice)
    assert (read.finish, read.stop_sequence) == expected


def test_logprobs() -> None:
    token = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": [{"token": "b", "logprob": -1}]}
    expected = (TokenLogprob("a", -0.5, (TokenLogprob("b", -1.0),)),)
    assert whole({}, logprobs={"content": [token], "refusal": None}).logprobs == expected
    assert whole({}, logprobs={"content": None, "refusal": [token]}).logprobs == expected
    assert whole({}, logprobs={"tokens": ["a"], "token_logprobs": [-0.5]}).logprobs == ()


UNSEEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sound": ({"audio": {"id": "a", "data": "AAAA", "transcript": "hi"}}, ("hi",)),
    "a call without a schema": ({"tool_calls": [{"id": "c", "custom": {"name": "f", "input": "x"}}]}, ("f", "x")),
    "a call without a name": ({"tool_calls": [call("c", '{"x":1}', name="")]}, ('{"x":1}',)),
}


@pytest.mark.parametrize(("message", "expected"), UNSEEN.values(), ids=UNSEEN)
def test_what_no_other_dialect_has_is_billed_all_the_same(message: dict[str, Any], expected: tuple[str, ...]) -> None:
    answer = CHAT.read_whole(json.dumps({"choices": [{"message": message}]}).encode(), SEED)
    assert answer.unseen == expected
    assert answer.choices[0].parts == ()


def test_perplexitys_sources() -> None:
    body = {
        "choices": [{"message": {"content": "a"}}],
        "citations": ["https://x", "https://y", 7, "https://x"],
        "search_results": [{"url": "https://x", "title": "X", "snippet": "q"}],
    }
    (choice,) = CHAT.read_whole(json.dumps(body).encode(), SEED).choices
    assert choice.parts == (Text("a", citations=(Citation("https://x", "X", "q"), Citation("https://y"))),)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"{}", b'{"error":{"message":"x"}}', b'{"choices":null}'])
def test_not_an_answer(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a chat completion"):
        CHAT.read_whole(body, SEED)


# --- Written ----------------------------------------------------------------------------------------------------------

FULL = Answer(
    id="msg_1",
    model="claude-sonnet-4-5",
    choices=(
        Choice(
            0,
            (
                Thinking("hm", "s", "anthropic-messages"),
                Thinking("", "r", "anthropic-messages", redacted=True),
                Text("see "),
                Text("this", citations=(Citation("https://x", "X", "q", 0, 4), Citation(title="Book"))),
                Thinking("", "g", "gemini"),
                ToolCall("c1", "f", '{"x": 1.0}'),
                ToolCall("c2", "g", "{}"),
            ),
            Finish.TOOL_CALLS,
            logprobs=(TokenLogprob("a", -0.5, (TokenLogprob("b", -1.0),)),),
        ),
        Choice(1, (Refusal("no"),), Finish.REFUSAL),
    ),
    usage=Usage(10, 5, cached_prompt=4, reasoning=2, cache_write_prompt=3, web_searches=1),
    service_tier="priority",
)


def written(answer: Answer) -> Any:
    return json.loads(CHAT.write_whole(answer, SEED))


def test_written() -> None:
    assert written(FULL) == {
        "id": "msg_1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "claude-sonnet-4-5",
        "service_tier": "priority",
        "choices": [
            {
                "index": 0,
                "finish_reason": "tool_calls",
                "logprobs": {
                    "content": [
                        {
                            **{"token": "a", "logprob": -0.5, "bytes": None},
                            "top_logprobs": [{"token": "b", "logprob": -1.0, "bytes": None}],
                        }
                    ],
                    "refusal": None,
                },
                "message": {
                    "role": "assistant",
                    "content": "see this",
                    "refusal": None,
                    "reasoning_content": "hm",
                    "reasoning_details": [
                        CLAUDES,
                        {"type": "reasoning.encrypted", "data": "r", "format": "anthropic-claude-v1", "index": 1},
                        {
                            **{"type": "reasoning.encrypted", "data": "g", "format": "google-gemini-v1", "index": 2},
                            "id": "c1",
                        },
                    ],
                    "annotations": [
                        url(start_index=4, end_index=8, content="q"),
                        {"type": "url_citation", "url_citation": {"url": "", "title": "Book"}},
                    ],
                    "tool_calls": [call("c1", '{"x": 1.0}'), call("c2", name="g")],
                },
            },
            {
                "index": 1,
                "finish_reason": "stop",
                "native_finish_reason": "refusal",
                "logprobs": None,
                "message": {"role": "assistant", "content": None, "refusal": "no"},
            },
        ],
        "usage": {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 3, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 2, "audio_tokens": 0},
            "server_tool_use_details": {"web_search_requests": 1},
        },
    }


def test_what_the_provider_did_not_say_comes_from_the_request() -> None:
    body = written(Answer(None, None, (Choice(0, (), None),), None))
    assert (body["id"], body["model"]) == ("chatcmpl-0123456789abcdef", "gpt-4o")
    assert "usage" not in body
    assert "service_tier" not in body
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "", "refusal": None}
    assert body["choices"][0]["finish_reason"] == "stop"


def test_the_thoughts_come_back_as_they_were() -> None:
    """A caller sends the message back as it got it: every signature is its dialect's again, and in its place."""
    message = written(FULL)["choices"][0]["message"]
    hello = {"role": "user", "content": "Hello"}
    request = CHAT.read_request({"model": "m", "messages": [hello, message]})
    assert request.extras == ()
    thoughts = FULL.choices[0].parts
    assert request.messages[1].parts == (*thoughts[:2], Text("see this"), *thoughts[4:])


ENDINGS: dict[str, tuple[Choice, dict[str, str]]] = {
    "stop": (Choice(0, (), Finish.STOP), {"finish_reason": "stop"}),
    "length": (Choice(0, (), Finish.LENGTH), {"finish_reason": "length"}),
    "filter": (Choice(0, (), Finish.CONTENT_FILTER), {"finish_reason": "content_filter"}),
    "calls": (Choice(0, (), Finish.TOOL_CALLS), {"finish_reason": "tool_calls"}),
    "sequence": (Choice(0, (), Finish.STOP_SEQUENCE, "END"), {"finish_reason": "stop", "stop_reason": "END"}),
    "pause": (Choice(0, (), Finish.PAUSE), {"finish_reason": "stop", "native_finish_reason": "pause_turn"}),
    "error": (Choice(0, (), Finish.ERROR), {"finish_reason": "stop", "native_finish_reason": "error"}),
    "refusal": (
        Choice(0, (Refusal("no"),), Finish.REFUSAL),
        {"finish_reason": "stop", "native_finish_reason": "refusal"},
    ),
    "refusal without words": (
        Choice(0, (), Finish.REFUSAL),
        {"finish_reason": "content_filter", "native_finish_reason": "refusal"},
    ),
    "unsaid, with calls": (Choice(0, (ToolCall("c", "f", "{}"),), None), {"finish_reason": "tool_calls"}),
}


@pytest.mark.parametrize(("choice", "expected"), ENDINGS.values(), ids=ENDINGS)
def test_endings(choice: Choice, expected: dict[str, str]) -> None:
    (given_back,) = written(Answer(None, None, (choice,), None))["choices"]
    names = ("finish_reason", "native_finish_reason", "stop_reason")
    assert {name: given_back[name] for name in names if name in given_back} == expected


def test_the_official_client_reads_it() -> None:
    chat = client(200, "application/json", CHAT.write_whole(FULL, SEED)).chat.completions
    answer = chat.create(model="m", messages=[{"role": "user", "content": "x"}])
    message = answer.choices[0].message
    assert answer.model_dump(exclude_unset=True) == written(FULL)
    assert message.content == "see this"
    assert message.annotations is not None
    assert message.annotations[0].url_citation.start_index == 4
    assert message.tool_calls is not None
    assert [one.id for one in message.tool_calls] == ["c1", "c2"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 4


@given(
    st.builds(
        lambda cached, written, prompt, reasoning, audio, completion, searches: Usage(
            prompt=cached + written + prompt,
            completion=reasoning + audio + completion,
            cached_prompt=cached,
            cache_write_prompt=written,
            reasoning=reasoning,
            audio_prompt=prompt,
            audio_completion=audio,
            web_searches=searches,
        ),
        *[st.integers(0, 10**7)] * 6,
        st.none() | st.integers(0, 100),
    )
)
def test_figures_come_back_as_they_were(usage: Usage) -> None:
    assert usage_of({"usage": usage_fields(usage)}) == usage


# --- Recorded ---------------------------------------------------------------------------------------------------------

ANSWERED = [case for case in chat_cases(False) if case.status == 200 and not case.meta.get("error")]


def _by_hand(case: Case) -> list[dict[str, Any]]:
    """What the choices say, by the names that their providers give it."""
    said = []
    for choice in json.loads(case.body)["choices"]:
        message = choice["message"]
        content = message.get("content") or ""
        parts: list[dict[str, Any]] = content if isinstance(content, list) else [{"type": "text", "text": content}]
        inner = [thought["text"] for part in parts for thought in part.get("thinking", ())]
        inner += [entry.get("text", "") for entry in message.get("reasoning_details") or ()]
        calls = [one["function"] for one in message.get("tool_calls") or ()]
        old = message.get("function_call") or {}
        calls += [old] if old.get("name") else []
        said.append(
            {
                "text": "".join(part.get("text", "") for part in parts),
                "thinking": message.get("reasoning_content") or message.get("reasoning") or "".join(inner),
                "refusal": message.get("refusal") or "",
                "calls": [(one["name"], json.loads(one["arguments"] or "{}")) for one in calls],
            }
        )
    return said


def _said(choice: Choice) -> dict[str, Any]:
    def joined(kind: type[Text] | type[Thinking] | type[Refusal]) -> str:
        return "".join(part.text for part in choice.parts if isinstance(part, kind))

    calls = [(part.name, json.loads(part.arguments)) for part in choice.parts if isinstance(part, ToolCall)]
    return {"text": joined(Text), "thinking": joined(Thinking), "refusal": joined(Refusal), "calls": calls}


@each_case(ANSWERED)
def test_recorded_answer(case: Case) -> None:
    answer = CHAT.read_whole(case.body, SEED)
    assert [_said(choice) for choice in answer.choices] == _by_hand(case)
    metered = CHAT.read_answer(case.body)
    assert sorted("".join(pieces.answer(answer).texts)) == sorted("".join(metered.texts))
    assert (answer.usage, answer.service_tier) == (metered.usage, metered.service_tier)
    assert (answer.usage and (answer.usage.prompt, answer.usage.completion)) == case.billed
    again = CHAT.read_whole(CHAT.write_whole(answer, SEED), SEED)
    assert again == replace(answer, unseen=(), id=answer.id or "chatcmpl-0123456789abcdef")


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes(body: bytes) -> None:
    CHAT.read_error(500, body)
    with pytest.raises(ValueError, match="not a chat completion"):
        CHAT.read_whole(body, SEED)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**10) | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ("message", "delta", "content", "text", "tool_calls", "function", "name", "arguments", "index", "id",
                 "reasoning_details", "signature", "data", "logprobs", "token", "finish_reason", "error", "usage",
                 "annotations", "url_citation", "thinking", "custom", "input", "detail", "msg")
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)  # fmt: skip


@given(JSON, JSON)
def test_any_json(choice: Any, other: Any) -> None:
    body = json.dumps({"choices": [choice, other], "usage": other, "citations": other, "search_results": choice})
    answer = CHAT.read_whole(body.encode(), SEED)
    CHAT.read_whole(CHAT.write_whole(answer, SEED), SEED)
    CHAT.read_error(400, json.dumps(choice).encode())


# --- Errors -----------------------------------------------------------------------------------------------------------

LOC = {"loc": ["body", "tools"], "msg": "wrong", "type": "x"}

ERRORS: dict[str, tuple[Any, tuple[str, str, str | None]]] = {
    "OpenAI's": (
        {"error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": "bad"}},
        ("no", "bad", "n"),
    ),
    "a text": ({"error": "no"}, ("no", "upstream_error", None)),
    "xAI's": ({"code": "bad", "error": "no"}, ("no", "bad", None)),
    "not nested": ({"code": 400, "message": "no", "type": "Bad Request"}, ("no", "400", None)),
    "a detail": ({"detail": "no"}, ("no", "upstream_error", None)),
    "FastAPI's": ({"detail": [LOC, {**LOC, "msg": "worse"}]}, ("wrong; worse", "upstream_error", None)),
    "Mistral's": (
        {"object": "error", "message": {"detail": [LOC]}, "type": "x", "code": None},
        ("wrong", "upstream_error", None),
    ),
    "a list, Google's": ([{"error": {"code": 400, "message": "no"}}], ("no", "400", None)),
    "Cloudflare's": ({"success": False, "errors": [{"code": 1, "message": "no"}]}, ("no", "upstream_error", None)),
    "empty": ({"error": {}}, ("The provider answered with an error.", "upstream_error", None)),
    "no object": ("no", ("The provider answered with an error.", "upstream_error", None)),
    "nested too deep": (
        {"error": {"error": {"error": {"error": {"error": {"error": "no"}}}}}},
        ("The provider answered with an error.", "upstream_error", None),
    ),
}


@pytest.mark.parametrize(("body", "expected"), ERRORS.values(), ids=ERRORS)
def test_error(body: Any, expected: tuple[str, str, str | None]) -> None:
    error = CHAT.read_error(422, json.dumps(body).encode())
    assert (error.message, error.code, error.param) == expected
    assert error.status == 422


@pytest.mark.parametrize("body", [b"", b"<html>502</html>", b"\xff", b"[" * 100_000, b"null", b"[]"])
def test_an_error_without_details(body: bytes) -> None:
    assert CHAT.read_error(502, body).message == "The provider answered with an error."


FAILED = [case for case in chat_cases(False) if case.status != 200]


@each_case(FAILED)
def test_recorded_error(case: Case) -> None:
    error = CHAT.read_error(case.status, case.body)
    said = json.loads(case.body)
    nested = said.get("error", said)
    assert error.message == (nested if isinstance(nested, str) else nested["message"])
    assert error.status == case.status
    failing = client(case.status, "application/json", CHAT.render_error(error)).chat.completions
    with pytest.raises(openai.APIStatusError) as raised:
        failing.create(model="m", messages=[{"role": "user", "content": "x"}])
    assert raised.value.status_code == case.status
    assert error.message in raised.value.message
