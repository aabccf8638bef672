"""The models that callers may name, and the lists of them, as the official clients of each API read them.

A policy's names are offered as they are. Of what a pattern lets through, the models are listed that are known at the
provider which is asked first: another name may well be callable, and is not in the list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from itertools import islice
from types import MappingProxyType
from typing import Any

import orjson
from genai_prices.data_snapshot import get_snapshot

from extproc.errors import NotFound
from extproc.limits import MAX_CACHED_OFFERS, MAX_ERROR_FIELD_CHARS, MAX_OFFERS
from extproc.models import published
from extproc.policy import ANY, most_specific
from extproc.providers import PROVIDERS, Provider
from extproc.records import ModelRule, Policy, Target

_PATTERN = re.compile(r"[*?[]")

# What the price data lists, and no path here serves: by the words of their names, since it does not say what a model is
# for. And what a customer's own fine-tuned models begin with.
_ELSEWHERE = re.compile(
    r"\b(batch|guard|image|live|moderation|nano-banana|ocr|realtime|transcribe|translate|tts|voice|whisper)\b|^ft:|\.ft-"
)
_EMBEDDING = re.compile(r"\bembed(ding)?\b")

# Vertex AI has both, each called in its own way, under one list of prices.
_GOOGLE, _ANTHROPIC, _CLAUDE = "google", "anthropic", "claude"


@dataclass(frozen=True, slots=True)
class Offer:
    """A name that a call may have as its model, and the provider that is asked first."""

    name: str
    owner: str

    @property
    def chats(self) -> bool:
        """Whether it is answered in any dialect, and not only where vectors are."""
        return not _EMBEDDING.search(self.name)


@lru_cache(maxsize=MAX_CACHED_OFFERS)
def offered(policy: Policy, providers: frozenset[str]) -> tuple[Offer, ...]:
    """What this policy offers from those of `providers`, by name, at most MAX_OFFERS. Its own names go first."""
    owners: dict[str, str] = {}
    for name, owner in islice(_names(policy, providers), MAX_OFFERS):
        owners.setdefault(name, owner)
    return tuple(Offer(name, owners[name]) for name in sorted(owners))


def _names(policy: Policy, providers: frozenset[str]) -> Iterator[tuple[str, str]]:
    reachable = [(rule, target) for rule in policy.models if (target := _first(rule, providers)) is not None]
    for rule, target in reachable:
        if not _PATTERN.search(rule.pattern):
            yield rule.pattern, target.provider
    for rule, target in reachable:
        if _PATTERN.search(rule.pattern):
            names = _catalogue(target.provider) if target.model == ANY else (target.model,)
            matching = (name for name in names if fnmatchcase(name, rule.pattern))
            yield from ((name, target.provider) for name in matching if most_specific(policy.models, name) is rule)


def _first(rule: ModelRule, providers: frozenset[str]) -> Target | None:
    return next((target for target in rule.targets if target.provider in providers), None)


@cache
def _catalogue(name: str) -> tuple[str, ...]:
    """A provider's models by the names that it takes: those of which both the price and the traits are known."""
    provider = PROVIDERS[name]
    if provider.base_url is None and provider.publisher is None:  # each customer's own deployments, by its own names
        return ()
    priced = next((known.models for known in get_snapshot().providers if known.id == provider.price_id), [])
    names = (model.id for model in priced if model.is_match(model.id) and not model.deprecated)
    return tuple(model for model in names if _is_served(provider, model))


def _is_served(provider: Provider, model: str) -> bool:
    if provider.price_id == _GOOGLE and model.startswith(_CLAUDE) is not (provider.publisher == _ANTHROPIC):
        return False
    if _ELSEWHERE.search(model):
        return False
    return _EMBEDDING.search(model) is not None or published(provider.name, model) is not None


# As each API's clients read them --------------------------------------------------------------------------------------


def render(dialect: str, offers: tuple[Offer, ...], model: str | None) -> bytes:
    """The list of models, or the one called `model`, in this dialect (one that has a list: see `endpoints`).

    Raises NotFound where no such model is offered.
    """
    shape = _SHAPES[dialect]
    if model is None:
        return orjson.dumps(shape.all([offer for offer in offers if shape.takes(offer)]))
    for offer in offers:
        if offer.name == model and shape.takes(offer):
            return orjson.dumps(shape.one(offer))
    name = ascii(model[:MAX_ERROR_FIELD_CHARS])
    raise NotFound(f"The model {name} is not offered by this gateway.", code="model_not_found", param="model")


@dataclass(frozen=True, slots=True)
class _Shape:
    """`takes`: whether a model can be called in the dialect at all."""

    one: Callable[[Offer], dict[str, Any]]
    all: Callable[[list[Offer]], dict[str, Any]]
    takes: Callable[[Offer], bool] = lambda offer: offer.chats


def _openais(offer: Offer) -> dict[str, Any]:
    """When a model was made is not known here; the field must be a number."""
    return {"id": offer.name, "object": "model", "created": 0, "owned_by": offer.owner}


def _openais_all(offers: Iterable[Offer]) -> dict[str, Any]:
    return {"object": "list", "data": [_openais(offer) for offer in offers]}


def _anthropics(offer: Offer) -> dict[str, Any]:
    """Anthropic's own word on `created_at`: an epoch value, where the date is unknown."""
    return {
        "type": "model",
        "id": offer.name,
        "display_name": offer.name,
        "created_at": "1970-01-01T00:00:00Z",
        "lifecycle": "active",
    }


def _anthropics_all(offers: list[Offer]) -> dict[str, Any]:
    """All on one page, whatever `limit` asks for."""
    first, last = (offers[0].name, offers[-1].name) if offers else (None, None)
    return {"data": [_anthropics(offer) for offer in offers], "has_more": False, "first_id": first, "last_id": last}


def _googles(offer: Offer) -> dict[str, Any]:
    return {
        "name": f"models/{offer.name}",
        "displayName": offer.name,
        "supportedGenerationMethods": ["generateContent", "streamGenerateContent", "countTokens"],
    }


def _googles_all(offers: Iterable[Offer]) -> dict[str, Any]:
    return {"models": [_googles(offer) for offer in offers]}


_SHAPES: Mapping[str, _Shape] = MappingProxyType(
    {
        "openai-chat": _Shape(_openais, _openais_all, takes=lambda _: True),
        "anthropic-messages": _Shape(_anthropics, _anthropics_all),
        "gemini-generate": _Shape(_googles, _googles_all),
    }
)
