"""A caller and a model that a policy lets through, for the call that `tollgate up` prints to try it with."""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase

from extproc.errors import TollgateError
from extproc.records import Policy
from extproc.routing import route

_ANYONE = "dev@example.com"
_MODEL = "gpt-4o"
_WILDCARD = re.compile(r"\*|\?|\[(?P<one>[^]!])[^]]*\]")


def caller(policy: Policy) -> str:
    """An address that the allow list admits: by its first pattern, if one can be made of it."""
    patterns = [pattern.lower() for pattern in policy.identity.allow]
    addresses = [_address(pattern) for pattern in patterns]
    admitted = (one for one in addresses if any(fnmatchcase(one, pattern) for pattern in patterns))
    return next(admitted, addresses[0])


def model(policy: Policy, providers: Collection[str]) -> str:
    """`gpt-4o` where it is offered from one of the providers, else the first name that is."""
    names = [_MODEL, *(rule.pattern for rule in policy.models if not _WILDCARD.search(rule.pattern))]
    return next((name for name in names if _routes(policy, name, providers)), _MODEL)


def _address(pattern: str) -> str:
    star = "dev" if "@" in pattern else _ANYONE
    # Only the first star may stand for a whole address: it has one @.
    address = pattern.replace("*", star, 1)
    return _WILDCARD.sub(lambda found: found["one"] or "x", address)


def _routes(policy: Policy, name: str, providers: Collection[str]) -> bool:
    try:
        route(policy, name, None, providers)
    except TollgateError:
        return False
    return True
