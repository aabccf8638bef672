"""Legacy completions, as the gate sees them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import openai
import orjson
import pytest
from hypothesis import given

from extproc import limits
from extproc.dialects.dialect import Dialect
from extproc.dialects.openai_completions import DEFAULT_CAP, OpenAICompletions
from extproc.errors import BadRequest, BudgetExhausted
from extproc.metering import count_texts
from extproc.records import Piece, Usage
from extproc.sse import SseParser
from extproc.tokens import counter
from tests.each import each_case
from tests.recordings import Case, protocol_cases
from tests.test_openai_responses_calls import JSON, client

COMPLETIONS: Dialect = OpenAICompletions()
USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "davinci-002", "prompt": "Once", **fields}


def sent(body: dict[str, Any], model: str = "davinci-002", cap: int | None = None) -> dict[str, Any]:
    raw = COMPLETIONS.upstream_body(COMPLETIONS.read_call(body), orjson.dumps(body), model, cap)
    sent_on: dict[str, Any] = json.loads(raw)
    return sent_on


READ: dict[str, tuple[dict[str, Any], str, object]] = {
    "the default cap": ({}, "cap", DEFAULT_CAP),
    "cap": ({"max_tokens": 7}, "cap", 7),
    "stream": ({"stream": True}, "stream", True),
    "usage asked for": ({"stream": True, "stream_options": {"include_usage": True}}, "wants_usage", True),
    "usage not asked for": ({"stream": True}, "wants_usage", False),
    "n": ({"n": 3}, "choices", 3),
    "best of": ({"n": 2, "best_of": 5}, "choices", 5),
    "best of none": ({"n": None, "best_of": None}, "choices", 1),
    "prompts": ({"prompt": ["a", "b"], "n": 3}, "choices", 6),
    "an echo teaches nothing": ({"echo": True}, "teaches", False),
    "answers that are thrown away teach nothing": ({"n": 1, "best_of": 2}, "teaches", False),
    "no echo": ({"echo": False, "best_of": 1}, "teaches", True),
    "a text": ({}, "prompt_texts", ("Once",)),
    "texts": ({"prompt": ["a", "b"]}, "prompt_texts", ("a", "b")),
    "suffix": ({"suffix": "end"}, "prompt_texts", ("Once", "end")),
    "tokens": ({"prompt": [1, 2, 3]}, "prompt_extra", 3),
    "tokens are one prompt": ({"prompt": [1, 2, 3]}, "choices", 1),
    "tokens of several": ({"prompt": [[1, 2], [3]]}, "prompt_extra", 3),
    "several of tokens": ({"prompt": [[1, 2], [3]]}, "choices", 2),
}


@pytest.mark.parametrize(("fields", "name", "expected"), READ.values(), ids=READ)
def test_read(fields: dict[str, Any], name: str, expected: object) -> None:
    assert getattr(COMPLETIONS.read_call(request(**fields)), name) == expected


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": ({"prompt": "x"}, "model", "missing_required_parameter"),
    "no prompt": ({"model": "m"}, "prompt", "missing_required_parameter"),
    "prompt a number": (request(prompt=1), "prompt", "invalid_type"),
    "prompt empty": (request(prompt=[]), "prompt", "empty_array"),
    "prompt of objects": (request(prompt=[{}]), "prompt[0]", "invalid_type"),
    "token a string": (request(prompt=[1, "x"]), "prompt[1]", "invalid_type"),
    "token a string, nested": (request(prompt=["x", ["y"]]), "prompt[1][0]", "invalid_type"),
    "too many prompts": (request(prompt=["x"] * (limits.MAX_INPUTS + 1)), "prompt", "array_above_max_length"),
    "too many tokens": (request(prompt=[1] * (limits.MAX_INPUT_TOKENS + 1)), "prompt", "array_above_max_length"),
    "n too large": (request(n=limits.MAX_CHOICES + 1), "n", "integer_above_max_value"),
    "best of too many": (request(best_of=limits.MAX_CHOICES + 1), "best_of", "integer_above_max_value"),
    "cap zero": (request(max_tokens=0), "max_tokens", "integer_below_min_value"),
    "echo a string": (request(echo="yes"), "echo", "invalid_type"),
    "suffix a number": (request(suffix=1), "suffix", "invalid_type"),
    "stream options, no stream": (request(stream_options={"include_usage": True}), "stream_options", "invalid_value"),
    "misspelt": (request(Best_Of=5), "Best_Of", "unknown_parameter"),
    "another provider": (request(provider={}), "provider", "unsupported_parameter"),
}


@pytest.mark.parametrize(("body", "param", "code"), REFUSED.values(), ids=REFUSED)
def test_refused(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as refused:
        COMPLETIONS.read_call(body)
    assert (refused.value.param, refused.value.code) == (param, code)


@given(JSON)
def test_any_prompt_is_read_or_refused(prompt: Any) -> None:
    with suppress(BadRequest):
        assert COMPLETIONS.read_call(request(prompt=prompt)).choices > 0


def test_what_is_sent_on() -> None:
    assert sent(request(), "m2", 9) == request(model="m2", max_tokens=9)
    assert sent(request(max_tokens=9), cap=9) == request(max_tokens=9)
    assert sent(request(stream=True, stream_options={"x": 1})) == request(
        stream=True, stream_options={"x": 1, "include_usage": True}
    )
    assert sent(request(stream=True))["stream_options"] == {"include_usage": True}
    assert "stream_options" not in sent(request())


def test_an_unchanged_call_goes_on_byte_for_byte() -> None:
    raw = b'{ "model":"davinci-002", "prompt" : "x", "unknown":[1,  2] }'
    assert COMPLETIONS.upstream_body(COMPLETIONS.read_call(json.loads(raw)), raw, "davinci-002", None) == raw


PIECES: dict[str, tuple[bytes, Piece]] = {
    "text": (b'{"choices":[{"index":1,"text":"a"}]}', Piece(("a",), started=(1,))),
    "end": (
        b'{"choices":[{"index":0,"text":"","finish_reason":"stop"},{"index":1,"text":"b"}]}',
        Piece(("b",), started=(0, 1), finished=(0,)),
    ),
    "usage": (
        b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4,"total_tokens":7}}',
        Piece(usage=Usage(3, 4), usage_only=True),
    ),
    "error": (b'{"error":{"message":"x"}}', Piece(error=True)),
    "done": (b"[DONE]", Piece(done=True)),
    "not JSON": (b"{oops", Piece()),
    "wrong types": (b'{"choices":[7,{"index":"x","text":7}],"usage":7}', Piece(started=(0,))),
}


@pytest.mark.parametrize(("data", "expected"), PIECES.values(), ids=PIECES)
def test_event(data: bytes, expected: Piece) -> None:
    assert COMPLETIONS.piece_reader()(data) == expected


def test_an_answer() -> None:
    answer = COMPLETIONS.read_answer(json.dumps({"choices": [{"text": "a"}, {"text": "b"}], "usage": USAGE}).encode())
    assert (answer.texts, answer.usage) == (("a", "b"), Usage(3, 4))


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"error":{"message":"x"}}'])
def test_not_an_answer(body: bytes) -> None:
    with pytest.raises(ValueError, match="not a completion"):
        COMPLETIONS.read_answer(body)


# --- Recordings -------------------------------------------------------------------------------------------------------

CASES = protocol_cases("openai-completions")
# One request names no model, being Azure's, and one is refused for its cap; one recording is no completion, but a list
# of what had been used.
ASKED = [c for c in CASES if c.request and c.request.get("model") and (c.request.get("max_tokens") or 1) > 0]
GOOD = [case for case in CASES if case.status == 200 and case.name != "openai/completions-json-unknown-01"]


@each_case(ASKED)
def test_recorded_requests_are_read(case: Case) -> None:
    assert case.request is not None
    call = COMPLETIONS.read_call(case.request)
    forced = {"stream_options": {"include_usage": True}} if call.stream else {}
    assert sent(case.request, call.model, None) == {**case.request, **forced}
    if "input" in case.usage and case.provider == "openai":
        assert case.usage["input"] <= count_texts(call.prompt_texts, counter("cl100k_base")) + call.prompt_extra


@each_case([case for case in GOOD if not case.stream])
def test_recorded_answer(case: Case) -> None:
    answer, expected = COMPLETIONS.read_answer(case.body), json.loads(case.body)
    assert list(answer.texts) == [choice["text"] for choice in expected["choices"]]
    assert (answer.usage and (answer.usage.prompt, answer.usage.completion)) == case.billed


@each_case([case for case in GOOD if case.stream])
def test_recorded_stream(case: Case) -> None:
    read = COMPLETIONS.piece_reader()
    heard = [read(event.data) for event in SseParser().feed(case.body + b"\n\n") if event.data]
    texts = "".join(text for piece in heard for text in piece.texts)
    assert len(texts) == case.meta["text_chars"]
    assert heard[-1].done
    assert {place for piece in heard for place in piece.finished} == {p for piece in heard for p in piece.started}


@each_case([case for case in CASES if case.status != 200])
def test_recorded_error(case: Case) -> None:
    with pytest.raises(ValueError, match="not a completion"):
        COMPLETIONS.read_answer(case.body)


# --- Errors -----------------------------------------------------------------------------------------------------------

EXHAUSTED = BudgetExhausted("Daily budget of team x is used up.", budget_id="team/x/day/usd", retry_after_s=60)


def test_the_official_client_raises_its_own_errors() -> None:
    refused = client(429, "application/json", COMPLETIONS.render_error(EXHAUSTED))
    with pytest.raises(openai.RateLimitError, match="Daily budget"):
        refused.completions.create(model="m", prompt="x")
    cut = client(200, "text/event-stream", COMPLETIONS.render_error_event(EXHAUSTED))
    with pytest.raises(openai.APIError, match="Daily budget"):
        list(cut.completions.create(model="m", prompt="x", stream=True))
