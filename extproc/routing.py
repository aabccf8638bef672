"""Which targets a call goes to, in order: the policy's rule for its model, cut to what this gateway can reach."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

from extproc.errors import BadRequest, Unavailable
from extproc.headers import PROVIDER
from extproc.limits import MAX_CACHED_WAYS, MAX_ERROR_FIELD_CHARS
from extproc.models import traits
from extproc.policy import ANY, Same, most_specific
from extproc.records import ModelRule, ModelTraits, Policy, Route, Target

_Rules = tuple[ModelRule, ...]


@dataclass(frozen=True, slots=True)
class Way:
    """A model's route, with what is known of each of its targets, in the same order.

    `drop` is the policy's word on what a target cannot do.
    """

    route: Route
    traits: tuple[ModelTraits, ...]
    drop: bool


def way(policy: Policy, call_model: str, forced_provider: str | None, providers: frozenset[str]) -> Way:
    """The way of a call for `call_model`: all that its name decides, remembered until the policy is reloaded.

    Raises what `route` does, to which the arguments are the same.
    """
    return _way(Same(policy.models), call_model, forced_provider, providers)


@lru_cache(maxsize=MAX_CACHED_WAYS)
def _way(same: Same[_Rules], call_model: str, forced_provider: str | None, providers: frozenset[str]) -> Way:
    rule, found = _ruled(same.part, call_model, forced_provider, providers)
    known = [traits(target.provider, target.model, rule) for target in found.targets]
    return Way(found, tuple(known), rule.drop_unsupported)


def route(policy: Policy, call_model: str, forced_provider: str | None, providers: Collection[str]) -> Route:
    """The route of a call for `call_model`: every target that may be tried, in the policy's order.

    `providers` are those that this gateway has a place and a key for. What a target can do is not looked at here.

    `forced_provider` is the caller's `x-llm-provider`. Raises BadRequest (`model_not_found`, `provider_not_found`)
    where the policy offers no such thing, Unavailable where it does and the gateway has no way there.
    """
    return _ruled(policy.models, call_model, forced_provider, providers)[1]


def _ruled(
    rules: _Rules, call_model: str, forced_provider: str | None, providers: Collection[str]
) -> tuple[ModelRule, Route]:
    rule = most_specific(rules, call_model)
    if rule is None:
        message = f"The model {_shown(call_model)} is not offered by this gateway."
        raise BadRequest(message, code="model_not_found", param="model")
    targets = _targets(rule, call_model)
    if forced_provider is not None:
        targets = tuple(target for target in targets if target.provider == forced_provider)
        if not targets:
            message = f"The model {_shown(call_model)} is not offered from the provider that {PROVIDER} asks for."
            raise BadRequest(message, code="provider_not_found", param=PROVIDER)
    targets = tuple(target for target in targets if target.provider in providers)
    if not targets:
        raise Unavailable(f"No provider of the model {_shown(call_model)} can be reached from this gateway.")
    return rule, Route(rule.pattern, targets)


def _targets(rule: ModelRule, call_model: str) -> tuple[Target, ...]:
    return tuple(Target(target.provider, call_model) if target.model == ANY else target for target in rule.targets)


def _shown(model: str) -> str:
    """A caller's text, quoted in ASCII and bounded, since it comes back in an answer and in logs."""
    return ascii(model[:MAX_ERROR_FIELD_CHARS])
