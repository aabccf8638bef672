"""Embeddings, as the gate sees them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc import limits
from extproc.dialects.dialect import Dialect
from extproc.dialects.openai_embeddings import INPUT_TOKENS, OpenAIEmbeddings
from extproc.errors import BadRequest, BudgetExhausted
from extproc.metering import count_texts
from extproc.records import Piece, Usage
from extproc.tokens import counter
from tests.each import each_case
from tests.recordings import Case, protocol_cases
from tests.test_openai_responses_calls import JSON, client

EMBEDDINGS: Dialect = OpenAIEmbeddings()


def request(**fields: Any) -> dict[str, Any]:
    return {"model": "text-embedding-3-small", "input": "Hello", **fields}


READ: dict[str, tuple[dict[str, Any], tuple[str, ...], int]] = {
    "a text": ({}, ("Hello",), INPUT_TOKENS),
    "an empty text": ({"input": ""}, ("",), INPUT_TOKENS),
    "texts": ({"input": ["a", "b"]}, ("a", "b"), 2 * INPUT_TOKENS),
    "tokens": ({"input": [1, 2, 3]}, (), 3 + INPUT_TOKENS),
    "tokens of several": ({"input": [[1, 2], [3]]}, (), 3 + 2 * INPUT_TOKENS),
}


@pytest.mark.parametrize(("fields", "texts", "extra"), READ.values(), ids=READ)
def test_read(fields: dict[str, Any], texts: tuple[str, ...], extra: int) -> None:
    call = EMBEDDINGS.read_call(request(**fields))
    assert (call.prompt_texts, call.prompt_extra) == (texts, extra)
    assert (call.stream, call.choices, call.cap, call.thinks, call.web_searches) == (False, 1, 1, False, 0)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no model": ({"input": "x"}, "model", "missing_required_parameter"),
    "no input": ({"model": "m"}, "input", "missing_required_parameter"),
    "input empty": (request(input=[]), "input", "empty_array"),
    "an image": (request(input=[{"type": "image_url"}]), "input[0]", "invalid_type"),
    "too many": (request(input=["x"] * (limits.MAX_INPUTS + 1)), "input", "array_above_max_length"),
    "too many tokens": (
        request(input=[[1], [1] * (limits.MAX_INPUT_TOKENS + 1)]),
        "input[1]",
        "array_above_max_length",
    ),
    "a boolean among tokens": (request(input=[1, True]), "input[1]", "invalid_type"),
    "a stream": (request(stream=True), "stream", "invalid_value"),
    "misspelt": (request(Input="x"), "Input", "unknown_parameter"),
    "another provider": (request(provider={}), "provider", "unsupported_parameter"),
}


@pytest.mark.parametrize(("body", "param", "code"), REFUSED.values(), ids=REFUSED)
def test_refused(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as refused:
        EMBEDDINGS.read_call(body)
    assert (refused.value.param, refused.value.code) == (param, code)


@given(JSON)
def test_any_input_is_read_or_refused(given_input: Any) -> None:
    with suppress(BadRequest):
        assert EMBEDDINGS.read_call(request(input=given_input)).prompt_extra >= INPUT_TOKENS


def test_only_the_model_changes() -> None:
    raw = b'{"model": "a",  "input":"x", "dimensions": 8}'
    call = EMBEDDINGS.read_call(json.loads(raw))
    assert EMBEDDINGS.upstream_body(call, raw, "a", 1) == raw
    assert json.loads(EMBEDDINGS.upstream_body(call, raw, "b", 1)) == {"model": "b", "input": "x", "dimensions": 8}


ANSWERS: dict[str, tuple[bytes, Usage | None]] = {
    "figures": (b'{"data":[{"embedding":[1]}],"usage":{"prompt_tokens":3,"total_tokens":3}}', Usage(3, 0)),
    "a total": (b'{"data":[],"usage":{"total_tokens":3}}', Usage(3, 0)),
    "no figures": (b'{"data":[]}', None),
    "wrong figures": (b'{"data":[],"usage":7}', None),
}


@pytest.mark.parametrize(("body", "usage"), ANSWERS.values(), ids=ANSWERS)
def test_answer(body: bytes, usage: Usage | None) -> None:
    answer = EMBEDDINGS.read_answer(body)
    assert (answer.texts, answer.usage) == ((), usage)


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"data":7}', b'{"error":{"message":"x"}}', b'{"data":[\xff'])
def test_not_an_answer(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        EMBEDDINGS.read_answer(body)


@given(st.binary())
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    with suppress(ValueError):
        assert EMBEDDINGS.read_answer(body).texts == ()


def test_there_are_no_events() -> None:
    assert EMBEDDINGS.piece_reader()(b'{"data":[]}') == Piece()


# --- Recordings -------------------------------------------------------------------------------------------------------

CASES = protocol_cases("openai-embeddings")


@each_case([case for case in CASES if case.request])
def test_recorded_requests_are_read(case: Case) -> None:
    assert case.request is not None
    call = EMBEDDINGS.read_call(case.request)
    if case.usage:
        assert case.usage["input"] <= count_texts(call.prompt_texts, counter("cl100k_base")) + call.prompt_extra


@each_case(CASES)
def test_recorded_answers(case: Case) -> None:
    if case.status != 200:
        with pytest.raises(ValueError, match=r"."):
            EMBEDDINGS.read_answer(case.body)
        return
    assert EMBEDDINGS.read_answer(case.body).usage == Usage(case.usage["input"], 0)


# --- Errors -----------------------------------------------------------------------------------------------------------


def test_the_official_client_raises_its_own_errors() -> None:
    exhausted = BudgetExhausted("Daily budget of team x is used up.", budget_id="team/x/day/usd", retry_after_s=60)
    refused = client(429, "application/json", EMBEDDINGS.render_error(exhausted))
    with pytest.raises(openai.RateLimitError, match="Daily budget"):
        refused.embeddings.create(model="m", input="x")
