"""Prices: to the nano-USD what genai-prices says, overridden by the policy, never zero by default, never too little."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from decimal import ROUND_CEILING, Decimal

import genai_prices
import pytest
from genai_prices import calc_price
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import StartDateConstraint, TimeOfDateConstraint
from hypothesis import given
from hypothesis import strategies as st

from extproc import pricing
from extproc.errors import BadRequest
from extproc.limits import MAX_CACHED_PRICES, PRICE_PERIOD_S
from extproc.pricing import Price, PriceBook, Rates, dearest
from extproc.providers import PROVIDERS
from extproc.records import PriceRule, Target, Usage

NOW = datetime(2026, 11, 23, 12, tzinfo=UTC)
GPT_4O = Target("openai", "gpt-4o")
UNPRICED = Target("openai", "my-own-model")
CEILING = PriceRule("*", 10 * 10**9, 30 * 10**9)


def book(*rules: PriceRule, now: datetime = NOW) -> PriceBook:
    return PriceBook(rules, lambda: now)


# Against the library -------------------------------------------------------------------------------------------------

GENAI_PROVIDERS = {
    "openai": "openai",
    "anthropic": "anthropic",
    "gemini": "google",
    "vertex": "google",
    "vertex-anthropic": "google",
    "azure": "azure",
    "groq": "groq",
    "mistral": "mistral",
    "deepseek": "deepseek",
    "xai": "x-ai",
    "together": "together",
    "openrouter": "openrouter",
}

TARGETS = [
    Target("openai", "gpt-3.5-turbo"),
    Target("openai", "gpt-4"),
    Target("openai", "gpt-4o"),
    Target("openai", "gpt-4o-2024-05-13"),
    Target("openai", "gpt-4o-mini"),
    Target("openai", "gpt-4.1-nano-2025-04-14"),
    Target("openai", "o3"),
    Target("openai", "o3-mini"),
    Target("openai", "gpt-5"),
    Target("openai", "gpt-5-pro"),
    Target("openai", "gpt-5.4"),
    Target("openai", "gpt-5.6-sol"),
    Target("openai", "gpt-6.1-terra"),
    Target("openai", "ft:gpt-4o-mini-2024-07-18:org::id"),
    Target("anthropic", "claude-sonnet-4-5"),
    Target("anthropic", "claude-opus-4-1"),
    Target("anthropic", "claude-haiku-5-5"),
    Target("gemini", "gemini-2.5-pro"),
    Target("gemini", "gemini-2.5-flash"),
    Target("gemini", "claude-sonnet-4-5"),  # on Google's own list
    Target("vertex", "gemini-2.5-pro"),
    Target("vertex-anthropic", "claude-sonnet-4-5@20250929"),
    Target("vertex-anthropic", "claude-opus-5-5"),
    Target("vertex-anthropic", "claude-sonnet-5"),  # borrowed from Anthropic's list
    Target("azure", "o3-mini"),
    Target("azure", "gpt-4o"),  # borrowed from OpenAI's list
    Target("groq", "llama-3.3-70b-versatile"),
    Target("groq", "openai/gpt-oss-120b"),
    Target("mistral", "mistral-large-latest"),
    Target("deepseek", "deepseek-v4-pro"),
    Target("xai", "grok-4"),
    Target("xai", "grok-4-fast"),
    Target("together", "meta-llama/Llama-3.3-70B-Instruct-Turbo"),
    Target("openrouter", "anthropic/claude-sonnet-4.5"),
    Target("openrouter", "openai/gpt-4o"),
]

USAGES = {
    "nothing": Usage(0, 0),
    "one token": Usage(1, 0),
    "one token out": Usage(0, 1),
    "odd": Usage(1_237, 7_919),
    "cached": Usage(5_000, 100, cached_prompt=4_864),
    "all cached": Usage(5_000, 100, cached_prompt=5_000),
    "reasoning": Usage(300, 9_000, reasoning=8_704),
    "at the first threshold": Usage(200_000, 11, cached_prompt=77),
    "above the first threshold": Usage(200_001, 11, cached_prompt=77),
    "at OpenAI's threshold": Usage(272_000, 1_000),
    "above OpenAI's threshold": Usage(272_001, 1_000, cached_prompt=1),
    "long": Usage(999_983, 65_521, cached_prompt=131_071),
}


def library(
    target: Target,
    usage: Usage,
    tier: str | None = None,
    web_searches: int = 0,
    now: datetime = NOW,
    **kinds: int,
) -> int:
    theirs = genai_prices.Usage(
        input_tokens=usage.prompt,
        output_tokens=usage.completion,
        cache_read_tokens=usage.cached_prompt,
        output_reasoning_tokens=usage.reasoning,
        web_searches=web_searches,
        **kinds,
    )
    price = calc_price(
        theirs,
        target.model,
        provider_id=GENAI_PROVIDERS[target.provider],
        genai_request_timestamp=now,
        price_context=None if tier is None else {"service_tier": tier, "speed": tier},
    )
    return int((price.total_price * 10**9).to_integral_value(ROUND_CEILING))


@pytest.mark.parametrize("usage", USAGES.values(), ids=USAGES.keys())
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"{target.provider}/{target.model}")
def test_costs_what_the_library_says(target: Target, usage: Usage) -> None:
    price = book().price(target, None)
    assert price.cost(usage) == library(target, usage)
    assert price.version == f"genai-prices-{genai_prices.__version__}"


@pytest.mark.parametrize("tier", ["default", "flex", "priority", "fast"])
@pytest.mark.parametrize("model", ["gpt-4o", "gpt-5", "o3", "o4-mini", "gpt-5.6-sol", "gpt-6-luna", "gpt-3.5-turbo"])
@pytest.mark.parametrize("prompt", [1_000, 300_000])
def test_service_tiers_cost_what_the_library_says(model: str, tier: str, prompt: int) -> None:
    usage = Usage(prompt, 999, cached_prompt=640)
    target = Target("openai", model)
    assert book().price(target, tier).cost(usage) == library(target, usage, tier)


def test_audio_costs_what_the_library_says() -> None:
    target, usage = Target("openai", "gpt-audio"), Usage(1_000, 800, audio_prompt=900, audio_completion=750)
    expected = library(target, usage, input_audio_tokens=900, output_audio_tokens=750)
    assert book().price(target, None).cost(usage) == expected


def test_cache_savings_are_what_the_cached_tokens_would_have_cost_more() -> None:
    price = book().price(Target("openai", "gpt-4o"), None)
    cached, anew = Usage(5_000, 100, cached_prompt=4_864), Usage(5_000, 100)
    assert price.cache_savings(cached) == price.cost(anew) - price.cost(cached) > 0
    assert price.cache_savings(anew) == 0


def test_writing_to_the_cache_costs_what_the_library_says() -> None:
    target, usage = Target("openai", "gpt-6-sol"), Usage(4_000, 10, cached_prompt=1_000, cache_write_prompt=2_000)
    assert book().price(target, None).cost(usage) == library(target, usage, cache_write_tokens=2_000)


@pytest.mark.parametrize("model", ["gpt-4o", "gpt-5-mini", "o3"])
def test_web_searches_cost_what_the_library_says(model: str) -> None:
    target, usage = Target("openai", model), Usage(100, 50)
    assert book().price(target, None).cost(usage, 3) == library(target, usage, web_searches=3)


def test_prices_are_those_of_a_provider_that_the_data_has() -> None:
    assert {name: one.price_id for name, one in PROVIDERS.items()} == {**GENAI_PROVIDERS, "local": None}
    assert set(GENAI_PROVIDERS.values()) <= {provider.id for provider in get_snapshot().providers}


def test_the_snapshot_changes_prices_only_where_they_are_resolved_anew() -> None:
    """Guards the half hours for which a resolved price is kept: a new version of the data may break them."""
    for provider in get_snapshot().providers:
        if provider.id not in GENAI_PROVIDERS.values():
            continue
        for model in provider.models:
            prices = model.prices if isinstance(model.prices, list) else []
            for constraint in [entry.constraint for entry in (*prices, *(model.price_variants or ()))]:
                if isinstance(constraint, TimeOfDateConstraint):
                    for moment in (constraint.start_time, constraint.end_time):
                        assert (moment.hour * 3600 + moment.minute * 60 + moment.second) % PRICE_PERIOD_S == 0, model.id
                else:
                    assert constraint is None or isinstance(constraint, StartDateConstraint), model.id


@pytest.mark.parametrize("model", ["claude-opus-4-8", "claude-opus-5-5", "claude-fable-5-2", "claude-mythos-5-2"])
def test_a_faster_answer_costs_what_the_library_says(model: str) -> None:
    target, usage = Target("anthropic", model), Usage(1_000, 500)
    fast = book().price(target, "fast").cost(usage)
    assert fast == library(target, usage, "fast")
    assert fast > book().price(target, None).cost(usage)


def test_a_tier_left_open_is_not_the_faster_answer_that_only_a_caller_can_ask_for() -> None:
    target = Target("anthropic", "claude-opus-5-5")
    assert book().price(target, "auto") == book().price(target, None)


# Tiers that may be billed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [None, "default", "standard", "on_demand", "scale"], ids=str)
def test_the_standard_tier_by_any_name(tier: str | None) -> None:
    assert book().price(GPT_4O, tier) == book().price(GPT_4O, "default")


@pytest.mark.parametrize("asked", ["auto", "", "PRIORITY", "a tier of tomorrow"])
@pytest.mark.parametrize("model", ["gpt-4o", "gpt-5", "gpt-5.4", "gpt-6-sol", "gpt-4"])
def test_a_tier_left_open_costs_as_much_as_any(model: str, asked: str) -> None:
    target, usage = Target("openai", model), Usage(300_000, 1_000, cached_prompt=1_000)
    open_tier = book().price(target, asked)
    costs = [library(target, usage, tier) for tier in ("default", "flex", "priority", "fast")]
    assert open_tier.cost(usage) == max(costs)
    assert open_tier.hold_cost(300_000, 1_000) >= max(costs)


# The policy's word ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "target", "expected"),
    [
        pytest.param([PriceRule("gpt-4o", 1, 2)], GPT_4O, 1, id="by model"),
        pytest.param([PriceRule("openai/gpt-4o", 1, 2)], GPT_4O, 1, id="by provider and model"),
        pytest.param([PriceRule("openai/*", 1, 2)], GPT_4O, 1, id="by pattern"),
        pytest.param([PriceRule("gpt-*", 3, 4), PriceRule("openai/gpt-4o", 1, 2)], GPT_4O, 1, id="the most specific"),
        pytest.param([PriceRule("openai/*", 3, 4), PriceRule("gpt-4o", 1, 2)], GPT_4O, 1, id="exact before pattern"),
        pytest.param([PriceRule("gpt-4o", 0, 0)], GPT_4O, 0, id="nothing, where it says so"),
        pytest.param([CEILING], UNPRICED, 10 * 10**9, id="the ceiling"),
        pytest.param([CEILING], GPT_4O, 2_500_000_000, id="the data before the ceiling"),
        pytest.param([PriceRule("anthropic/*", 1, 2), CEILING], UNPRICED, 10 * 10**9, id="another provider's rule"),
    ],
)
def test_which_price_applies(rules: list[PriceRule], target: Target, expected: int) -> None:
    assert book(*rules).price(target, None).bands[-1].input == expected


def test_versions_say_where_a_price_is_from() -> None:
    rules = [PriceRule("a", 1, 2), PriceRule("b", 1, 3), CEILING]
    versions = [book(*rules).price(Target("openai", model), None).version for model in ("a", "b", "c")]
    assert versions[2] == "policy-ceiling"
    assert len(set(versions)) == 3
    assert all(version.startswith("policy-") for version in versions)
    assert book(CEILING, rules[0]).price(Target("openai", "a"), None).version == versions[0]


def test_an_override_prices_every_kind_and_tier() -> None:
    price = book(PriceRule("gpt-4o", 2 * 10**9, 8 * 10**9)).price(GPT_4O, "priority")
    usage = Usage(1_000, 500, cached_prompt=100, audio_prompt=200, audio_completion=50, cache_write_prompt=300)
    assert price.cost(usage) == 1_000 * 2_000 + 500 * 8_000


def test_an_override_of_cached_input() -> None:
    price = book(PriceRule("gpt-4o", 2 * 10**9, 8 * 10**9, 10**9)).price(GPT_4O, None)
    assert price.cost(Usage(1_000, 0, cached_prompt=400)) == 600 * 2_000 + 400 * 1_000


@pytest.mark.parametrize(
    "model",
    [
        *("openai/my-own-model", "openai/", "openai/whisper-1", "openai/tts-1", "openai/omni-moderation-latest"),
        *("groq/whisper-large-v3", "groq/canopylabs/orpheus-v1-english", "xai/grok-voice-latest"),
        *("mistral/mistral-ocr-latest", "mistral/voxtral-mini-transcribe-3-0", "openrouter/scaledown/summarize"),
        *("azure/davinci", "azure/my-deployment", "openrouter/google/gemma-3-27b-it:free", f"openai/{'x' * 5_000}"),
    ],
    ids=lambda model: model[:30],
)
def test_an_unknown_price_is_an_error_never_zero(model: str) -> None:
    with pytest.raises(BadRequest) as caught:
        book(PriceRule("gpt-*", 0, 0)).price(Target(*model.split("/", 1)), None)
    assert (caught.value.code, caught.value.param) == ("model_price_unknown", "model")
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "model",
    [
        *("openai/text-embedding-3-small", "openai/text-embedding-ada-002", "azure/text-embedding-3-large"),
        *("mistral/codestral-embed-2505", "gemini/gemini-embedding-001"),
    ],
)
def test_an_embedding_costs_its_input_and_has_no_output(model: str) -> None:
    target, usage = Target(*model.split("/", 1)), Usage(1_237, 0)
    price = book().price(target, None)
    assert price.cost(usage) == library(target, usage) > 0
    assert price.hold_cost(1_237, 0) == price.hold_cost(1_237, 999)


@pytest.mark.parametrize(
    ("rules", "version", "cost"),
    [
        pytest.param([], "own-machine", 0, id="free"),
        pytest.param([CEILING], "own-machine", 0, id="the ceiling is for what is not known"),
        pytest.param([PriceRule("local/*", 10**9, 10**9)], "policy-", 2_000_000, id="the policy says what it is worth"),
    ],
)
def test_a_server_of_ones_own_bills_nothing(rules: list[PriceRule], version: str, cost: int) -> None:
    price = book(*rules).price(Target("local", "gpt-4o"), None)
    assert price.version.startswith(version)
    assert price.cost(Usage(1_000, 1_000), web_searches=1) == cost


@pytest.mark.parametrize("provider", GENAI_PROVIDERS)
@pytest.mark.parametrize("rule", [CEILING, PriceRule("my-own-model", 0, 0)], ids=["ceiling", "override"])
def test_a_web_search_is_never_free(provider: str, rule: PriceRule) -> None:
    assert book(rule).price(Target(provider, "my-own-model"), None).web_search_nanousd > 0
    assert book().price(Target("openai", "gpt-4o-search-preview"), None).web_search_nanousd > 0


# Days ----------------------------------------------------------------------------------------------------------------


def test_a_price_changes_on_its_date_and_is_cached_until_then() -> None:
    now = [datetime(2026, 8, 20, 23, 59, tzinfo=UTC)]
    prices, target = PriceBook((), lambda: now[0]), Target("openai", "gpt-5.6-sol")
    before = prices.price(target, None)
    assert prices.price(target, None) is before
    now[0] += timedelta(minutes=1)
    after = prices.price(target, None)
    assert [price.bands[-1].input for price in (before, after)] == [5 * 10**9, 4 * 10**9]


@pytest.mark.parametrize("model", ["deepseek-v4-pro", "deepseek-v4-flash", "deepseek-flash", "deepseek-chat"])
def test_a_price_changes_in_the_day_as_the_library_says(model: str) -> None:
    now = [NOW.replace(hour=0, minute=0)]
    prices, target, usage = PriceBook((), lambda: now[0]), Target("deepseek", model), Usage(1_000_000, 1_000_000)
    costs = set()
    for _ in range(96):
        cost = prices.price(target, None).cost(usage)
        assert cost == library(target, usage, now=now[0]), now[0]
        costs.add(cost)
        now[0] += timedelta(minutes=15)
    assert len(costs) == 2


def test_the_day_is_utcs() -> None:
    now = [datetime.fromisoformat("2026-08-21T08:00:00+09:00")]  # still the 20th in UTC
    prices, target = PriceBook((), lambda: now[0]), Target("openai", "gpt-5.6-sol")
    assert prices.price(target, None).bands[-1].input == 5 * 10**9
    now[0] += timedelta(hours=2)
    assert prices.price(target, None).bands[-1].input == 4 * 10**9


def test_callers_cannot_fill_the_cache() -> None:
    prices = book(CEILING)
    for number in range(MAX_CACHED_PRICES + 10):
        prices.price(Target("openai", f"m{number}"), f"tier-{number}")
    assert len(prices._prices) <= MAX_CACHED_PRICES
    for number in range(100):
        prices.price(GPT_4O, f"tier-{number}")
    assert len(prices._prices) <= 11


# Arithmetic ----------------------------------------------------------------------------------------------------------

FLAT = Rates(-1, input=3, cached_input=1, cache_write=4, audio_input=7, output=10, audio_output=20)


def test_a_sum_is_rounded_up_once() -> None:
    price = Price("v", (FLAT,), 0)
    assert price.cost(Usage(0, 0)) == 0
    assert price.cost(Usage(1, 0)) == 1
    assert price.cost(Usage(100_000, 70_000)) == 1  # 0.3 + 0.7, not 1 + 1
    assert price.cost(Usage(100_000, 70_001)) == 2


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        pytest.param(Usage(10, 0, cached_prompt=50), 10 * 1, id="more cached than there is"),
        pytest.param(Usage(10, 0, cached_prompt=6, audio_prompt=9), 6 * 1 + 4 * 7, id="cached audio"),
        pytest.param(Usage(10, 0, cached_prompt=6, cache_write_prompt=6), 6 * 1 + 4 * 4, id="read and written"),
        pytest.param(Usage(0, 10, reasoning=50), 10 * 10, id="reasoning is part of the completion"),
        pytest.param(Usage(0, 10, audio_completion=50), 10 * 20, id="more audio than there is"),
    ],
)
def test_kinds_never_add_up_to_more_than_the_whole(usage: Usage, expected: int) -> None:
    million = Usage(**{name: value * 1_000_000 for name, value in asdict(usage).items() if value is not None})
    assert Price("v", (FLAT,), 0).cost(million) == expected


_RATE = st.integers(0, 10**12)
_TOKENS = st.integers(0, 3_000_000)


@given(
    st.lists(st.builds(Rates, st.integers(1, 10**6), *[_RATE] * 6), max_size=3),
    st.builds(Rates, st.just(-1), *[_RATE] * 6),
    st.builds(Usage, *[_TOKENS] * 7),
    st.integers(0, 5),
)
def test_a_hold_covers_whatever_is_billed(bands: list[Rates], base: Rates, usage: Usage, searches: int) -> None:
    ordered = sorted(bands, key=lambda rates: rates.above_prompt_tokens, reverse=True)
    price = Price("v", (*ordered, base), 123)
    assert price.hold_cost(usage.prompt, usage.completion, searches) >= price.cost(usage, searches) >= 0


def _prices() -> st.SearchStrategy[Price]:
    bands = st.lists(st.builds(Rates, st.integers(1, 10**6), *[_RATE] * 6), max_size=3)
    base = st.builds(Rates, st.just(-1), *[_RATE] * 6)
    return st.builds(
        lambda bands, base, search: Price(
            "v", (*sorted(bands, key=lambda rates: rates.above_prompt_tokens, reverse=True), base), search
        ),
        bands,
        base,
        st.integers(0, 10**9),
    )


@given(st.lists(_prices(), min_size=1, max_size=4), st.data())
def test_the_dearest_of_several_is_never_less_than_one_of_them(several: list[Price], data: st.DataObject) -> None:
    top = dearest(several)
    thresholds = [rates.above_prompt_tokens + more for price in several for rates in price.bands for more in (0, 1, 2)]
    usage = data.draw(st.builds(Usage, st.one_of(_TOKENS, st.sampled_from([max(0, t) for t in thresholds])), _TOKENS))
    for price in several:
        assert top.hold_cost(usage.prompt, usage.completion, 2) >= price.hold_cost(usage.prompt, usage.completion, 2)
        for kind in Rates.__dataclass_fields__.keys() - {"above_prompt_tokens"}:
            assert getattr(top.rates(usage.prompt), kind) >= getattr(price.rates(usage.prompt), kind)
    dearest_input = max(price.rates(usage.prompt).dearest_input for price in several)
    assert top.rates(usage.prompt).dearest_input == dearest_input  # and no more than it must be


def test_the_dearest_of_one_is_itself() -> None:
    price = book().price(GPT_4O, None)
    assert dearest([price, price]) is price


def test_there_is_no_dearest_of_none() -> None:
    with pytest.raises(ValueError, match="empty"):
        dearest([])


@given(_TOKENS, _TOKENS, _TOKENS)
def test_more_output_never_costs_less(prompt: int, completion: int, more: int) -> None:
    price = book().price(Target("openai", "gpt-5.4"), None)
    assert price.cost(Usage(prompt, completion + more)) >= price.cost(Usage(prompt, completion))


def test_rates_finer_than_a_nano_usd_are_rounded_up() -> None:
    assert pricing._nanousd(Decimal("0.0000000011"), 0) == 2
