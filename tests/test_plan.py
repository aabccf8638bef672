"""What is decided of a request before anything is held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import orjson
import pytest

from extproc.dialects import DIALECTS
from extproc.dialects.dialect import Address
from extproc.dialects.openai_chat import OpenAIChat
from extproc.endpoints import Endpoint
from extproc.errors import BadRequest, Unavailable
from extproc.gate import Clock, Gate
from extproc.plan import Plan, make_plan
from extproc.records import ModelRule, Target
from tests.exchanges import BUDGET_ID, CALLER, DEAR, INPUT_NANOUSD, OUTPUT_NANOUSD, Callers, body, gate

CHAT_COMPLETIONS = Endpoint(OpenAIChat())
GATE = gate(Callers(), Clock(lambda: 0, lambda: 0))


def plan(data: bytes | None = None, forced: str | None = None, **fields: Any) -> Plan:
    return make_plan(GATE, CHAT_COMPLETIONS, CALLER, data if data is not None else body(**fields), forced)


def test_a_plan_has_the_call_its_route_price_and_budgets() -> None:
    made = plan(stream=True)
    assert (made.call.model, made.route.name, made.candidates[0].target) == (
        "gpt-4o",
        "gpt-4o",
        Target("openai", "gpt-4o"),
    )
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


# Several targets ------------------------------------------------------------------------------------------------------

EVERYBODY = gate(Callers(), Clock(lambda: 0, lambda: 0), providers=lambda: frozenset({"openai", "anthropic", "gemini"}))


def gate_of(model: str) -> Gate:
    """One that calls this model of OpenAI's `gpt-4o`."""
    policy = replace(EVERYBODY.policy, models=(ModelRule("gpt-4o", (Target("openai", model),)),))
    return replace(EVERYBODY, policy=policy)


def chain(endpoint: Endpoint = CHAT_COMPLETIONS, forced: str | None = None, **fields: Any) -> Plan:
    return make_plan(EVERYBODY, endpoint, CALLER, body(**fields), forced)


def providers(made: Plan) -> list[str]:
    return [candidate.target.provider for candidate in made.candidates]


def test_every_target_that_can_is_a_candidate_in_order() -> None:
    made = chain(model="three")
    assert providers(made) == ["openai", "anthropic", "gemini"]
    assert [candidate.native for candidate in made.candidates] == [True, False, False]
    assert made.route.targets == tuple(candidate.target for candidate in made.candidates)


@pytest.mark.parametrize(
    ("fields", "left"),
    [
        ({"seed": 7}, ["openai", "gemini"]),
        ({"n": 2}, ["openai", "gemini"]),
        ({"logit_bias": {"1": 1}}, ["openai"]),
        ({"tools": [{"type": "web_search"}]}, ["openai"]),
        ({"something_new": 1}, ["openai"]),
        ({"user": "u", "metadata": {}, "store": False}, ["openai", "anthropic", "gemini"]),
    ],
    ids=["seed", "n", "logit_bias", "a provider's own tool", "an unknown field", "what changes nothing"],
)
def test_a_chain_skips_a_target_that_cannot(fields: dict[str, Any], left: list[str]) -> None:
    assert providers(chain(model="three", **fields)) == left


def test_where_none_can_the_field_is_named() -> None:
    with pytest.raises(BadRequest) as caught:
        chain(model="both", forced="anthropic", seed=7)
    assert (caught.value.code, caught.value.param) == ("unsupported_parameter", "seed")


def test_the_policy_may_have_it_dropped() -> None:
    made = chain(model="lenient", seed=7, something_new=1)
    assert made.itinerary("r", 1).drop
    image = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    with pytest.raises(BadRequest) as caught:  # but not what the call is about
        chain(model="lenient", messages=[{"role": "user", "content": [image]}])
    assert caught.value.code == "unsupported_parameter"


def test_until_somebody_answers_the_dearest_counts() -> None:
    made = chain(model="both")
    assert made.price.bands[-1].output == DEAR * OUTPUT_NANOUSD * 10**6
    assert [candidate.price.bands[-1].output // 10**6 for candidate in made.candidates] == [
        OUTPUT_NANOUSD,
        DEAR * OUTPUT_NANOUSD,
    ]


def test_one_that_may_think_unseen_is_held_for_whole() -> None:
    """Asked for thoughts, a model of another dialect bills what it does not show."""
    assert chain(model="both", stream=True).cuttable
    assert not chain(model="both", stream=True, reasoning_effort="high").cuttable


def test_no_word_of_a_caller_stops_a_model_that_always_thinks() -> None:
    quiet = body(model="o3", max_tokens=9, stream=True, thinking={"type": "disabled"})
    responses = orjson.dumps({"model": "o3", "input": "hi", "stream": True, "reasoning": {"effort": "none"}})
    assert make_plan(
        EVERYBODY, Endpoint(DIALECTS["openai-responses"]), CALLER, responses, None
    ).cuttable  # its own word
    assert not make_plan(EVERYBODY, Endpoint(DIALECTS["anthropic-messages"]), CALLER, quiet, None).cuttable


@pytest.mark.parametrize(
    ("dialect", "fields", "code"),
    [
        ("anthropic-messages", {"max_tokens": 9, "top_k": 5}, "unsupported_parameter"),
        ("anthropic-count-tokens", {}, "unsupported_endpoint"),
    ],
)
def test_a_model_that_always_thinks_is_asked_no_less_what_it_can(
    dialect: str, fields: dict[str, Any], code: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        make_plan(EVERYBODY, Endpoint(DIALECTS[dialect]), CALLER, body(model="o3", **fields), None)
    assert caught.value.code == code


def test_calls_that_a_caller_gets_whole_are_not_seen_before_their_end() -> None:
    address = Address("both", stream=True)
    tools = {"tools": [{"functionDeclarations": [{"name": "f"}]}]}
    contents = {"contents": [{"parts": [{"text": "hi"}]}]}
    gemini = Endpoint(DIALECTS["gemini-generate"], address)
    assert make_plan(EVERYBODY, gemini, CALLER, orjson.dumps(contents), None).cuttable
    assert not make_plan(EVERYBODY, gemini, CALLER, orjson.dumps(contents | tools), None).cuttable


def test_a_tier_that_is_not_translated_is_not_what_is_held_for() -> None:
    messages = Endpoint(DIALECTS["anthropic-messages"])
    plain, asked = (
        make_plan(EVERYBODY, messages, CALLER, body(model="real-4.1", max_tokens=9, **tier), None).price
        for tier in ({}, {"service_tier": "priority"})
    )
    assert asked == plain


def test_the_body_is_the_first_targets_or_as_it_came() -> None:
    native = chain(model="both", max_tokens=5)
    assert (native.written, b'"gpt-4o"' in native.body()) == (True, True)
    foreign = chain(model="both", forced="anthropic", max_tokens=5)
    assert (foreign.written, foreign.body()) == (False, foreign.raw)


def test_targets_are_told_what_they_need() -> None:
    made = chain(model="both", max_tokens=5, stream=True)
    way = made.itinerary("6f1c", 99)
    assert [(leg.target, leg.cap) for leg in way.legs] == [(one.target, 5) for one in made.candidates]
    assert (way.dialect, way.stream, way.body_bytes, way.written) == ("openai-chat", True, 99, True)


def test_what_has_no_other_dialect_goes_only_where_it_is_spoken() -> None:
    embeddings = Endpoint(DIALECTS["openai-embeddings"])
    made = make_plan(EVERYBODY, embeddings, CALLER, orjson.dumps({"model": "three", "input": "hi"}), None)
    assert providers(made) == ["openai"]
    with pytest.raises(BadRequest) as caught:
        make_plan(EVERYBODY, embeddings, CALLER, orjson.dumps({"model": "three", "input": "hi"}), "gemini")
    assert caught.value.code == "unsupported_endpoint"


def test_media_and_tools_are_held_for_as_each_dialect_has_them() -> None:
    """A picture at OpenAI's lowest detail is any picture at Anthropic."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}
    made = chain(model="both", messages=[{"role": "user", "content": [picture] * 10}])
    ours, theirs = (candidate.call.prompt_extra for candidate in made.candidates)
    assert theirs > 2 * ours


def test_a_models_real_name_decides_what_a_picture_costs() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    by_alias, by_name = (
        make_plan(
            gate_of(name), CHAT_COMPLETIONS, CALLER, body(messages=[{"role": "user", "content": [picture]}]), None
        )
        .candidates[0]
        .call.prompt_extra
        for name in ("gpt-4o", "gpt-4o-mini")
    )
    assert by_name > by_alias


def test_choices_that_are_dropped_are_not_waited_for() -> None:
    assert chain(model="lenient", n=3).candidates[0].call.choices == 1


def test_counting_tokens_costs_nothing() -> None:
    counting = Endpoint(DIALECTS["anthropic-count-tokens"])
    made = make_plan(EVERYBODY, counting, CALLER, body(model="three"), None)
    assert (made.call.billed, made.price.hold_cost(1_000, 1_000)) == (False, 0)
