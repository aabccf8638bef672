"""What requests and answers of Anthropic's share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson

from extproc.dialects.fields import parse

ORIGIN = "anthropic-messages"  # whose signatures these are; they hold on every platform that serves Claude


def dumps(value: object) -> bytes:
    """JSON. What the fast writer refuses, models write all the same: half surrogate pairs."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":")).encode()


def arguments_of(block: Mapping[str, Any]) -> str:
    """The arguments of a call as JSON text. Anthropic gives them parsed."""
    try:
        return dumps(block.get("input") or {}).decode()
    except RecursionError:  # nested deeper than JSON can be written here, which no arguments are
        return "{}"


def input_of(arguments: str) -> dict[str, Any]:
    """The arguments of a call as Anthropic takes them, an object. What is none was a model's mistake, and is kept."""
    if not arguments.strip():
        return {}
    value = parse(arguments.encode("utf-8", "surrogatepass"))
    return value if isinstance(value, dict) else {"arguments": arguments}
