"""What is decided of a request before anything is held."""

from __future__ import annotations

from typing import Any

import pytest

from extproc.dialects.openai_chat import OpenAIChatCalls as OpenAIChat
from extproc.endpoints import Endpoint
from extproc.errors import BadRequest, Unavailable
from extproc.gate import Clock
from extproc.plan import Plan, make_plan
from extproc.records import Target
from tests.exchanges import BUDGET_ID, CALLER, INPUT_NANOUSD, OUTPUT_NANOUSD, Callers, body, gate

CHAT_COMPLETIONS = Endpoint(OpenAIChat())
GATE = gate(Callers(), Clock(lambda: 0, lambda: 0))


def plan(data: bytes | None = None, forced: str | None = None, **fields: Any) -> Plan:
    return make_plan(GATE, CHAT_COMPLETIONS, CALLER, data if data is not None else body(**fields), forced)


def test_a_plan_has_the_call_its_route_price_and_budgets() -> None:
    made = plan(stream=True)
    assert (made.call.model, made.route.name, made.candidates[0].target) == ("gpt-4o", "gpt-4o", Target("openai", "gpt-4o"))
    assert (made.price.bands[-1].input, made.price.bands[-1].output) == (INPUT_NANOUSD * 10**6, OUTPUT_NANOUSD * 10**6)
    assert [budget.id for budget in made.budgets] == [BUDGET_ID]


def test_the_target_may_have_another_name_than_the_call() -> None:
    made = plan(model="real-4.1")
    assert (made.call.model, made.candidates[0].target.model, made.route.name) == ("real-4.1", "gpt-4.1", "real-*")
    assert made.candidates[0].traits.max_output_tokens == 32_768


@pytest.mark.parametrize(
    ("fields", "cap"),
    [({}, 1_000), ({"max_tokens": 5}, 5), ({"max_tokens": 2_000}, 1_000), ({"max_completion_tokens": 7}, 7)],
    ids=["the policy's", "the caller's", "never above the policy's", "by its newer name"],
)
def test_the_cap_is_the_least(fields: dict[str, Any], cap: int) -> None:
    assert plan(**fields).cap == cap


@pytest.mark.parametrize(
    ("fields", "cuttable", "sent_cap"),
    [
        pytest.param({"stream": True}, True, None, id="a stream"),
        pytest.param({"stream": True, "max_tokens": 50}, True, 50, id="a stream with a cap"),
        pytest.param({}, False, 1_000, id="a whole answer"),
        pytest.param({"model": "o3", "stream": True}, False, 500, id="a stream after thoughts"),
        pytest.param({"model": "o3"}, False, 500, id="a whole answer after thoughts"),
    ],
)
def test_what_cannot_be_cut_is_sent_with_its_cap(fields: dict[str, Any], cuttable: bool, sent_cap: int | None) -> None:
    made = plan(**fields)
    assert (made.cuttable, made.sent_cap(made.candidates[0])) == (cuttable, sent_cap)


def test_the_price_is_that_of_the_tier_that_is_asked_for() -> None:
    plain, priority, either = (
        plan(model="real-4.1", service_tier=tier).price.bands[-1].output for tier in (None, "priority", "auto")
    )
    assert plain < priority <= either


@pytest.mark.parametrize(
    ("data", "forced", "code"),
    [
        (b"[]", None, None),
        (b'{"model": 1}', None, "invalid_type"),
        (body(model="?"), None, "model_not_found"),
        (body(), "anthropic", "provider_not_found"),
        (body(model="priceless"), None, "model_price_unknown"),
    ],
    ids=["no object", "no call", "no model", "no such provider", "no price"],
)
def test_what_cannot_be_planned_is_a_bad_request(data: bytes, forced: str | None, code: str | None) -> None:
    with pytest.raises(BadRequest) as raised:
        plan(data, forced)
    assert code is None or raised.value.code == code


def test_what_is_offered_and_cannot_be_reached_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        plan(model="elsewhere")
