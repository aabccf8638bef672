"""Which rule a model falls under, and which of its targets are left."""

from __future__ import annotations

import pytest

from extproc.errors import BadRequest, Unavailable
from extproc.models import UNKNOWN
from extproc.records import IdentityRules, ModelRule, Policy, Route, Target
from extproc.routing import route, way

ALL = ("openai", "anthropic", "gemini")
GPT = Target("openai", "gpt-4o")
CLAUDE = Target("anthropic", "claude-sonnet-4-5")


def policy(*rules: ModelRule) -> Policy:
    identity = IdentityRules(audiences=("a",), issuers=("i",), allow=("*",))
    return Policy(version="v", identity=identity, models=rules, prices=(), budgets=())


ANY = ModelRule("*", (Target("openai", "*"),))
GPTS = ModelRule("gpt-*", (Target("gemini", "*"),))
MINIS = ModelRule("gpt-*-mini", (Target("anthropic", "*"),))
EXACT = ModelRule("gpt-4o", (GPT, CLAUDE))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        pytest.param("gpt-4o", Route("gpt-4o", (GPT, CLAUDE)), id="exact name"),
        pytest.param("gpt-5-mini", Route("gpt-*-mini", (Target("anthropic", "gpt-5-mini"),)), id="longer pattern"),
        pytest.param("gpt-5", Route("gpt-*", (Target("gemini", "gpt-5"),)), id="shorter pattern"),
        pytest.param("other", Route("*", (Target("openai", "other"),)), id="any name"),
        pytest.param("GPT-4o", Route("*", (Target("openai", "GPT-4o"),)), id="case matters"),
    ],
)
@pytest.mark.parametrize("reverse", [False, True], ids=["in order", "reversed"])
def test_the_most_specific_rule_applies(model: str, expected: Route, reverse: bool) -> None:
    rules = (ANY, GPTS, EXACT, MINIS)
    assert route(policy(*(reversed(rules) if reverse else rules)), model, None, ALL) == expected


def test_an_exact_name_beats_a_longer_pattern() -> None:
    rules = policy(ModelRule("gpt-4o*****", (CLAUDE,)), ModelRule("gpt-4o", (GPT,)))
    assert route(rules, "gpt-4o", None, ALL).targets == (GPT,)


def test_a_name_with_a_patterns_characters_matches_itself() -> None:
    assert route(policy(ModelRule("m[1]", (GPT,))), "m[1]", None, ALL).targets == (GPT,)


def test_targets_at_providers_without_a_key_are_skipped() -> None:
    assert route(policy(EXACT), "gpt-4o", None, ("anthropic",)).targets == (CLAUDE,)


def test_all_others_stay_in_order() -> None:
    chain = tuple(Target(name, "m") for name in ("azure", "openai", "local", "vertex", "azure"))
    rules = policy(ModelRule("m", (*chain, Target("vertex", "*"))))
    assert route(rules, "m", None, ("vertex", "azure", "local")).targets == (
        *(Target("azure", "m"), Target("local", "m"), Target("vertex", "m"), Target("azure", "m")),
        Target("vertex", "m"),
    )
    assert route(rules, "m", "vertex", ("vertex", "azure")).targets == (Target("vertex", "m"), Target("vertex", "m"))


def test_no_target_left_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        route(policy(EXACT), "gpt-4o", None, ("gemini",))


def test_a_forced_provider_filters() -> None:
    assert route(policy(EXACT), "gpt-4o", "anthropic", ALL).targets == (CLAUDE,)


def test_a_forced_provider_that_is_offered_but_not_spoken_to_is_unavailable() -> None:
    with pytest.raises(Unavailable):
        route(policy(EXACT), "gpt-4o", "anthropic", ("openai",))


@pytest.mark.parametrize("forced", ["gemini", "", "http://169.254.169.254", "openai,anthropic"])
def test_a_forced_provider_never_adds_a_target(forced: str) -> None:
    with pytest.raises(BadRequest) as caught:
        route(policy(EXACT), "gpt-4o", forced, ALL)
    assert (caught.value.code, caught.value.param) == ("provider_not_found", "x-llm-provider")


@pytest.mark.parametrize("model", ["gpt-5", "", "x" * 10_000, "a\r\nset-cookie: b", "\ud800"], ids=ascii)
def test_an_unknown_model_is_named_safely(model: str) -> None:
    with pytest.raises(BadRequest) as caught:
        route(policy(EXACT), model, None, ALL)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    assert caught.value.message.isascii()
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 400


def test_a_way_has_what_is_known_of_each_target() -> None:
    rule = ModelRule("m", (GPT, Target("local", "*")), max_output_tokens=7, drop_unsupported=True)
    found = way(policy(rule), "m", None, frozenset({"openai", "local"}))
    assert found.route == Route("m", (GPT, Target("local", "m")))
    assert found.drop
    assert [(one.max_output_tokens, one.reasoning) for one in found.traits] == [(7, False), (7, UNKNOWN.reasoning)]


def test_a_way_is_remembered_for_these_providers_and_this_policy_only() -> None:
    rules, every = policy(EXACT), frozenset(ALL)
    found = way(rules, "gpt-4o", None, every)
    assert way(rules, "gpt-4o", None, frozenset(ALL)) is found
    assert way(rules, "gpt-4o", "anthropic", every).route.targets == (CLAUDE,)
    assert way(rules, "gpt-4o", None, frozenset({"anthropic"})).route.targets == (CLAUDE,)
    assert way(policy(ANY), "gpt-4o", None, every).route == Route("*", (GPT,))


def test_a_model_that_is_not_offered_is_named_each_time() -> None:
    rules = policy(EXACT)
    for _ in range(2):
        with pytest.raises(BadRequest) as caught:
            way(rules, "gpt-5", None, frozenset(ALL))
        assert caught.value.code == "model_not_found"
    with pytest.raises(Unavailable):
        way(rules, "gpt-4o", None, frozenset({"gemini"}))
    assert way(rules, "gpt-4o", None, frozenset(ALL)).route.targets == (GPT, CLAUDE)
