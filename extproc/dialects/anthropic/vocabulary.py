"""What requests and answers of Anthropic's share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from extproc.dialects.fields import dumps, parse
from extproc.limits import MAX_JSON_DEPTH

ORIGIN = "anthropic-messages"  # whose signatures these are; they hold on every platform that serves Claude


def arguments_of(block: Mapping[str, Any]) -> str:
    """The arguments of a call as JSON text. Anthropic gives them parsed."""
    given = block.get("input") or {}
    return "{}" if _too_deep(given) else dumps(given).decode()


def input_of(arguments: str) -> dict[str, Any]:
    """The arguments of a call as Anthropic takes them, an object. What is none was a model's mistake, and is kept."""
    if not arguments.strip():
        return {}
    value = parse(arguments.encode("utf-8", "surrogatepass"))
    return value if isinstance(value, dict) and not _too_deep(value) else {"arguments": arguments}


def _too_deep(value: object) -> bool:
    """Whether no request could hold this: it may be read from JSON, and yet be too deep to be written."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()
