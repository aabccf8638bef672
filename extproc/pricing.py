"""What a call costs, in integer nano-USD: by the policy's prices, else the price data, else the policy's ceiling.

The data is genai-prices' own snapshot, as installed: nothing is fetched. What it says is resolved once a day and model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import ROUND_CEILING, Decimal
from functools import cache
from hashlib import sha256

import genai_prices
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

from extproc.errors import BadRequest
from extproc.limits import MAX_CACHED_PRICES, MAX_ERROR_FIELD_CHARS
from extproc.policy import ANY, NANOUSD_PER_USD, most_specific
from extproc.records import PriceRule, Target, Usage

TOKENS_PER_PRICE = 1_000_000

_PROVIDER_IDS = {"openai": "openai", "anthropic": "anthropic", "gemini": "google"}
_STANDARD, _ANY_TIER = "default", "auto"
_STANDARD_TIERS = frozenset({_STANDARD, "standard", "on_demand", "scale"})  # the providers' names for plain prices
_VERSION_CHARS = 12


@dataclass(frozen=True, slots=True)
class Rates:
    """Nano-USD per million tokens, for prompts of more than `above_prompt_tokens`."""

    above_prompt_tokens: int
    input: int
    cached_input: int
    cache_write: int
    audio_input: int
    output: int
    audio_output: int

    @property
    def dearest_input(self) -> int:
        return max(self.input, self.cached_input, self.cache_write, self.audio_input)

    @property
    def dearest_output(self) -> int:
        return max(self.output, self.audio_output)


@dataclass(frozen=True, slots=True)
class Price:
    """One model's price in one service tier. `bands` go from the longest prompts down; the last is for all the rest.

    A long prompt's rates are those of the whole call, not of what is above the threshold.
    """

    version: str
    bands: tuple[Rates, ...]
    web_search_nanousd: int

    def cost(self, usage: Usage, web_searches: int = 0) -> int:
        """Nano-USD, exact but for being rounded up once. What a kind claims beyond the whole is not billed twice."""
        rates = self._rates(usage.prompt)
        cached = min(usage.cached_prompt, usage.prompt)
        written = min(usage.cache_write_prompt, usage.prompt - cached)
        audio_in = min(usage.audio_prompt, usage.prompt - cached - written)
        audio_out = min(usage.audio_completion, usage.completion)
        billed = (
            (usage.prompt - cached - written - audio_in) * rates.input
            + cached * rates.cached_input
            + written * rates.cache_write
            + audio_in * rates.audio_input
            + (usage.completion - audio_out) * rates.output
            + audio_out * rates.audio_output
        )
        return -(-billed // TOKENS_PER_PRICE) + web_searches * self.web_search_nanousd

    def hold_cost(self, prompt_tokens: int, completion_tokens: int, web_searches: int = 0) -> int:
        """Nano-USD: at least the cost of any usage of so many tokens, whatever kinds they turn out to be."""
        rates = self._rates(prompt_tokens)
        billed = prompt_tokens * rates.dearest_input + completion_tokens * rates.dearest_output
        return -(-billed // TOKENS_PER_PRICE) + web_searches * self.web_search_nanousd

    def _rates(self, prompt_tokens: int) -> Rates:
        for rates in self.bands:
            if prompt_tokens > rates.above_prompt_tokens:
                return rates
        return self.bands[-1]


class PriceBook:
    """The prices of all targets. `now` supplies aware times: prices change on dates that the data knows ahead."""

    def __init__(self, rules: tuple[PriceRule, ...], now: Callable[[], datetime]) -> None:
        self._ceiling = next((rule for rule in rules if rule.pattern == ANY), None)
        self._overrides = tuple(rule for rule in rules if rule.pattern != ANY)
        self._now = now
        self._day = date.min
        self._prices: dict[tuple[Target, str], Price] = {}

    def price(self, target: Target, service_tier: str | None) -> Price:
        """What `target` costs in a tier: the one that an answer reports, or for a hold the one that a caller asks for.

        None and the providers' names for it are the standard tier; `auto` and any name that the data does not know may
        be billed as any tier, so each rate is the dearest. The policy's own prices hold for every tier.
        Raises BadRequest (`model_price_unknown`) where nothing says what the model costs.
        """
        now = self._now().astimezone(UTC)
        if now.date() != self._day or len(self._prices) >= MAX_CACHED_PRICES:
            self._day = now.date()
            self._prices.clear()
        tier = _tier(service_tier)
        price = self._prices.get((target, tier))
        if price is None:
            price = self._prices[target, tier] = self._resolve(target, tier, now)
        return price

    def _resolve(self, target: Target, tier: str, now: datetime) -> Price:
        provider = _provider(target.provider)
        override = most_specific(self._overrides, f"{target.provider}/{target.model}", target.model)
        if override is not None:
            return _policy_price(override, f"policy-{_hash(override)}", provider, now)
        if (price := _data_price(provider, target.model, tier, now)) is not None:
            return price
        if self._ceiling is not None:
            return _policy_price(self._ceiling, "policy-ceiling", provider, now)
        name = ascii(target.model[:MAX_ERROR_FIELD_CHARS])
        raise BadRequest(f"The price of the model {name} is not known.", code="model_price_unknown", param="model")


def _hash(rule: PriceRule) -> str:
    return sha256(repr(rule).encode()).hexdigest()[:_VERSION_CHARS]


def _policy_price(rule: PriceRule, version: str, provider: Provider, now: datetime) -> Price:
    """One rate for all input and one for all output, but for what was read from the cache."""
    input_rate, output_rate = rule.input_nanousd_per_mtok, rule.output_nanousd_per_mtok
    cached = input_rate if rule.cached_input_nanousd_per_mtok is None else rule.cached_input_nanousd_per_mtok
    rates = Rates(-1, input_rate, cached, input_rate, input_rate, output_rate, output_rate)
    return Price(version, (rates,), _dearest_search(provider, now))


# The price data -------------------------------------------------------------------------------------------------------


def _provider(name: str) -> Provider:
    return next(provider for provider in get_snapshot().providers if provider.id == _PROVIDER_IDS[name])


@cache
def _known_tiers() -> frozenset[str]:
    models = (model for name in _PROVIDER_IDS for model in _provider(name).models)
    return frozenset(name for model in models for name in _tiers(model))


def _tiers(model: ModelInfo) -> set[str]:
    return {v.when["service_tier"] for v in model.price_variants or () if "service_tier" in v.when}


def _tier(service_tier: str | None) -> str:
    """One of a few names, so that callers cannot fill the cache with names of their own."""
    if service_tier is None or service_tier in _STANDARD_TIERS:
        return _STANDARD
    return service_tier if service_tier in _known_tiers() else _ANY_TIER


def _data_price(provider: Provider, model: str, tier: str, now: datetime) -> Price | None:
    info = provider.find_model(model, all_providers=get_snapshot().providers)
    if info is None:
        return None
    prices = [info.get_prices(now, context) for context in _contexts(info, tier)]
    if any(price.input_mtok is None or price.output_mtok is None for price in prices):
        return None  # sold by the hour, the picture or the character, which a chat's usage does not say
    starts = {-1}.union(*map(_starts, prices))
    bands = tuple(_rates(prices, above) for above in sorted(starts, reverse=True))
    searches = [_nanousd(price.web_searches_kcount, 0, per=1000) for price in prices]
    search = max(searches) or _dearest_search(provider, now)
    return Price(f"genai-prices-{genai_prices.__version__}", bands, search)


def _contexts(info: ModelInfo, tier: str) -> list[dict[str, str]]:
    """The tiers that may be billed."""
    if tier == _STANDARD:
        return [{}]
    if tier == _ANY_TIER:
        return [{}, *({"service_tier": name} for name in sorted(_tiers(info)))]
    return [{"service_tier": tier}]


def _starts(price: ModelPrice) -> set[int]:
    tiered = (value for value in vars(price).values() if isinstance(value, TieredPrices))
    return {tier.start for value in tiered for tier in value.tiers}


def _rates(prices: Iterable[ModelPrice], above: int) -> Rates:
    """The dearest of each rate among `prices`, for prompts just above a threshold.

    Tokens that a usage does not tell apart (pictures, video, how long a cache entry lives) are billed as the dearest.
    """
    rates = [_one_rates(price, above + 1) for price in prices]
    return Rates(above, *(max(column) for column in zip(*rates, strict=True)))


def _one_rates(price: ModelPrice, prompt_tokens: int) -> tuple[int, ...]:
    def dearest(*kinds: str, default: int = 0) -> int:
        known = [getattr(price, f"{kind}_mtok") for kind in kinds]
        return max((_nanousd(value, prompt_tokens) for value in known if value is not None), default=default)

    plain_in = dearest("input", "input_image", "input_video")
    plain_out = dearest("output", "output_image", "output_video", "output_reasoning")
    return (
        plain_in,
        dearest("cache_read", default=plain_in),
        dearest("cache_write", "cache_write_5m", "cache_write_1h", default=plain_in),
        dearest("input_audio", default=plain_in),
        plain_out,
        dearest("output_audio", default=plain_out),
    )


def _nanousd(price: Decimal | TieredPrices | None, prompt_tokens: int, per: int = 1) -> int:
    if isinstance(price, TieredPrices):
        above = [tier.price for tier in price.tiers if prompt_tokens > tier.start]
        price = above[-1] if above else price.base
    return int(((price or Decimal(0)) * NANOUSD_PER_USD / per).to_integral_value(ROUND_CEILING))


def _dearest_search(provider: Provider, now: datetime) -> int:
    """Where a model's own price of a web search is not known: the dearest that its provider has, never nothing."""
    return max(_nanousd(model.get_prices(now).web_searches_kcount, 0, per=1000) for model in provider.models)
