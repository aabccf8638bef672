"""What a call costs, in integer nano-USD: by the policy's prices, else the price data, else the policy's ceiling.

The data is genai-prices' own snapshot, as installed: nothing is fetched. What it says of a model is resolved once every
half hour, since some providers are cheaper at night.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import ROUND_CEILING, Decimal
from functools import cache, lru_cache
from hashlib import sha256

import genai_prices
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelInfo, ModelPrice, Provider, TieredPrices

from extproc.errors import BadRequest
from extproc.limits import MAX_CACHED_PRICES, MAX_ERROR_FIELD_CHARS, PRICE_PERIOD_S
from extproc.policy import ANY, NANOUSD_PER_USD, most_specific
from extproc.providers import PROVIDERS
from extproc.records import PriceRule, Target, Usage

TOKENS_PER_PRICE = 1_000_000

_PRICE_IDS = tuple(sorted({one.price_id for one in PROVIDERS.values() if one.price_id is not None}))
_TIERS = ("service_tier", "speed")  # what a price may depend on that a caller asks for and an answer reports
_STANDARD, _ANY_TIER = "default", "auto"
_STANDARD_TIERS = frozenset({_STANDARD, "standard", "on_demand", "scale"})  # the providers' names for plain prices
_EMBEDDING = "embed"
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
        rates = self.rates(usage.prompt)
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

    def cache_savings(self, usage: Usage) -> int:
        """Nano-USD that the provider's cache took off the bill, beside the same tokens sent anew; rounded down."""
        if not usage.cached_prompt:
            return 0
        rates = self.rates(usage.prompt)
        return min(usage.cached_prompt, usage.prompt) * max(rates.input - rates.cached_input, 0) // TOKENS_PER_PRICE

    def hold_cost(self, prompt_tokens: int, completion_tokens: int, web_searches: int = 0) -> int:
        """Nano-USD: at least the cost of any usage of so many tokens, whatever kinds they turn out to be."""
        rates = self.rates(prompt_tokens)
        billed = prompt_tokens * rates.dearest_input + completion_tokens * rates.dearest_output
        return -(-billed // TOKENS_PER_PRICE) + web_searches * self.web_search_nanousd

    def rates(self, prompt_tokens: int) -> Rates:
        """What a call with a prompt of this length costs."""
        for rates in self.bands:
            if prompt_tokens > rates.above_prompt_tokens:
                return rates
        return self.bands[-1]


def dearest(prices: Iterable[Price]) -> Price:
    """At least as dear as each of `prices`, whatever is used: for a hold while any of several targets may answer.

    Raises ValueError where there is none.
    """
    every = tuple(prices)
    if every and every.count(every[0]) == len(every):
        return every[0]
    starts = {rates.above_prompt_tokens for price in every for rates in price.bands}
    bands = tuple(_dearest_rates(every, above) for above in sorted(starts, reverse=True))
    return Price("dearest", bands, max(price.web_search_nanousd for price in every))


def _dearest_rates(prices: Iterable[Price], above: int) -> Rates:
    """Of each kind the dearest rate, for prompts just above a threshold: up to the next one all prices are constant."""
    rates = [price.rates(above + 1) for price in prices]
    kinds = ("input", "cached_input", "cache_write", "audio_input", "output", "audio_output")
    return Rates(above, *(max(getattr(one, kind) for one in rates) for kind in kinds))


class PriceBook:
    """The prices of all targets. `now` supplies aware times: prices change on dates that the data knows ahead."""

    def __init__(self, rules: tuple[PriceRule, ...], now: Callable[[], datetime]) -> None:
        self._ceiling = next((rule for rule in rules if rule.pattern == ANY), None)
        self._overrides = tuple(rule for rule in rules if rule.pattern != ANY)
        self._now = now
        self._period = 0
        self._prices: dict[tuple[Target, str], Price] = {}

    def price(self, target: Target, service_tier: str | None) -> Price:
        """What `target` costs in a tier: the one that an answer reports, or for a hold the one that a caller asks for.

        None and the providers' names for it are the standard tier; `auto` and any name that the data does not know may
        be billed as any tier, so each rate is the dearest. The policy's own prices hold for every tier.
        Raises BadRequest (`model_price_unknown`) where nothing says what the model costs.
        """
        now = self._now()
        period = int(now.timestamp()) // PRICE_PERIOD_S
        if period != self._period or len(self._prices) >= MAX_CACHED_PRICES:
            self._period = period
            self._prices.clear()
        tier = _tier(service_tier)
        price = self._prices.get((target, tier))
        if price is None:
            price = self._prices[target, tier] = self._resolve(target, tier, now.astimezone(UTC))
        return price

    def _resolve(self, target: Target, tier: str, now: datetime) -> Price:
        price_id = PROVIDERS[target.provider].price_id
        override = most_specific(self._overrides, f"{target.provider}/{target.model}", target.model)
        if override is not None:
            return _policy_price(override, f"policy-{_hash(override)}", price_id, now)
        if price_id is None:
            return _OWN_MACHINE
        if (price := _data_price(price_id, target.model, tier, now)) is not None:
            return price
        if self._ceiling is not None:
            return _policy_price(self._ceiling, "policy-ceiling", price_id, now)
        name = ascii(target.model[:MAX_ERROR_FIELD_CHARS])
        raise BadRequest(f"The price of the model {name} is not known.", code="model_price_unknown", param="model")


FREE = Price("free", (Rates(-1, 0, 0, 0, 0, 0, 0),), 0)  # what no provider bills: counting tokens

# A server of one's own bills nothing. What it is worth, the policy may say.
_OWN_MACHINE = Price("own-machine", (Rates(-1, 0, 0, 0, 0, 0, 0),), 0)


def _hash(rule: PriceRule) -> str:
    return sha256(repr(rule).encode()).hexdigest()[:_VERSION_CHARS]


def _policy_price(rule: PriceRule, version: str, price_id: str | None, now: datetime) -> Price:
    """One rate for all input and one for all output, but for what was read from the cache."""
    input_rate, output_rate = rule.input_nanousd_per_mtok, rule.output_nanousd_per_mtok
    cached = input_rate if rule.cached_input_nanousd_per_mtok is None else rule.cached_input_nanousd_per_mtok
    rates = Rates(-1, input_rate, cached, input_rate, input_rate, output_rate, output_rate)
    return Price(version, (rates,), _dearest_search(price_id, now.date()))


# The price data -------------------------------------------------------------------------------------------------------


@cache
def _provider(price_id: str) -> Provider:
    return next(provider for provider in get_snapshot().providers if provider.id == price_id)


@cache
def _known_tiers() -> frozenset[str]:
    variants = (variant for name in _PRICE_IDS for model in _provider(name).models for variant in _variants(model))
    return frozenset(variant[axis] for variant in variants for axis in _TIERS if axis in variant)


def _variants(model: ModelInfo) -> list[Mapping[str, str]]:
    return [variant.when for variant in model.price_variants or ()]


def _tier(service_tier: str | None) -> str:
    """One of a few names, so that callers cannot fill the cache with names of their own."""
    if service_tier is None or service_tier in _STANDARD_TIERS:
        return _STANDARD
    return service_tier if service_tier in _known_tiers() else _ANY_TIER


def _data_price(price_id: str, model: str, tier: str, now: datetime) -> Price | None:
    info = _provider(price_id).find_model(model, all_providers=get_snapshot().providers)
    if info is None:
        return None
    prices = [info.get_prices(now, context) for context in _contexts(info, tier)]
    if not all(_sold_by_token(info, price) for price in prices):
        return None
    starts = {-1}.union(*map(_starts, prices))
    bands = tuple(_rates(prices, above) for above in sorted(starts, reverse=True))
    searches = [_nanousd(price.web_searches_kcount, 0, per=1000) for price in prices]
    search = max(searches) or _dearest_search(price_id, now.date())
    return Price(f"genai-prices-{genai_prices.__version__}", bands, search)


def _sold_by_token(info: ModelInfo, price: ModelPrice) -> bool:
    """And not by the hour, the picture, the page or the character, which a usage does not say.

    Input alone is what embeddings are sold by. Others of which the data says no more (old completion models, judges,
    summaries) write answers that somebody is billed for.
    """
    return price.input_mtok is not None and (price.output_mtok is not None or _EMBEDDING in info.id)


def _contexts(info: ModelInfo, tier: str) -> list[dict[str, str]]:
    """The tiers that may be billed. Only a service tier is ever left to the provider."""
    if tier == _STANDARD:
        return [{}]
    if tier == _ANY_TIER:
        names = {variant["service_tier"] for variant in _variants(info) if "service_tier" in variant}
        return [{}, *({"service_tier": name} for name in sorted(names))]
    return [dict.fromkeys(_TIERS, tier)]


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


@lru_cache(maxsize=2 * len(PROVIDERS))
def _dearest_search(price_id: str | None, day: date) -> int:
    """Where a model's own price of a web search is not known: the dearest that its provider has, never nothing.

    A provider that publishes none is taken to search as dear as any. A server of one's own searches nothing.
    """
    if price_id is None:
        return 0
    return _dearest_search_of(price_id, day) or max(_dearest_search_of(name, day) for name in _PRICE_IDS)


def _dearest_search_of(price_id: str, day: date) -> int:
    now = datetime.combine(day, time.min, UTC)
    models = _provider(price_id).models
    return max(_nanousd(model.get_prices(now).web_searches_kcount, 0, per=1000) for model in models)
