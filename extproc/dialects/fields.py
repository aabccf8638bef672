"""Reading JSON that someone else wrote: strictly what callers send, leniently what providers answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
import orjson

from extproc.errors import BadRequest
from extproc.limits import MAX_TOKENS

# What callers send, in OpenAI's words and codes: types and values ----------------------------------------------------

_KINDS = {
    str: "a string",
    bool: "a boolean",
    int: "an integer",
    float: "a decimal number",
    list: "an array",
    dict: "an object",
    type(None): "null",
}


def wrong_type(where: str, expected: str, value: object) -> BadRequest:
    got = _KINDS.get(type(value), "something else")
    message = f"Invalid type for '{where}': expected {expected}, but got {got} instead."
    return BadRequest(message, code="invalid_type", param=where)


def invalid(where: str, problem: str, code: str = "invalid_value") -> BadRequest:
    return BadRequest(f"Invalid '{where}': {problem}.", code=code, param=where)


def missing(where: str) -> BadRequest:
    message = f"Missing required parameter: '{where}'."
    return BadRequest(message, code="missing_required_parameter", param=where)


def is_a(value: object, kind: type) -> bool:
    """True and False are integers to Python, and not to JSON."""
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def optional(fields: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    """A field that may be absent or null, both None."""
    value = fields.get(name)
    if value is not None and not is_a(value, kind):
        raise wrong_type(where + name, _KINDS[kind], value)
    return value


def required(fields: Mapping[str, Any], name: str, kind: type, where: str = "") -> Any:
    if name not in fields:
        raise missing(where + name)
    value = fields[name]
    if not is_a(value, kind):
        raise wrong_type(where + name, _KINDS[kind], value)
    return value


def number(fields: Mapping[str, Any], name: str, where: str = "") -> float | None:
    """A field that may be absent or null, both None. It stays an integer where it came as one."""
    value = fields.get(name)
    if value is not None and not is_a(value, int) and not is_a(value, float):
        raise wrong_type(where + name, _KINDS[float], value)
    return value


def strings(fields: Mapping[str, Any], name: str, where: str = "") -> tuple[str, ...]:
    """A list of texts, none where it is absent or null."""
    values: list[Any] = optional(fields, name, list, where) or []
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise wrong_type(f"{where}{name}[{i}]", _KINDS[str], value)
    return tuple(values)


def positive(body: Mapping[str, Any], name: str, at_most: int) -> int | None:
    value: int | None = optional(body, name, int)
    if value is not None and value < 1:
        raise invalid(name, "integer below minimum value. Expected a value >= 1", "integer_below_min_value")
    if value is not None and value > at_most:
        raise invalid(name, f"integer above maximum value. Expected a value <= {at_most}", "integer_above_max_value")
    return value


def objects(values: list[Any], where: str) -> list[dict[str, Any]]:
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise wrong_type(f"{where}[{i}]", "an object", value)
    return values


def read_content(
    content: object,
    where: str,
    add_text: Callable[[str], None],
    read_part: Callable[[dict[str, Any], str], None],
) -> None:
    """What a message holds: a text, an array of parts, each read with its path, or null."""
    if isinstance(content, str):
        add_text(content)
    elif isinstance(content, list):
        for i, part in enumerate(objects(content, where)):
            read_part(part, f"{where}[{i}].")
    elif content is not None:
        raise wrong_type(where, "one of a string or array of objects", content)


class Names:
    """The fields of one object that decide something.

    Some providers read JSON without regard to case (Go's encoding/json), so that `Max_Tokens` would be obeyed there and
    overlooked here: such spellings are refused.
    """

    __slots__ = ("_folded", "_known")

    def __init__(self, names: Iterable[str]) -> None:
        self._known = frozenset(names)
        self._folded = {_fold(name): name for name in self._known}

    def refuse_misspelt(self, fields: Mapping[str, Any], where: str = "") -> None:
        """Raises BadRequest for a field that is spelt like one of these, but not quite."""
        for name in fields:
            if name not in self._known and (meant := self._folded.get(_fold(name))) is not None:
                message = f"Unknown parameter: '{where}{name}'. Did you mean '{where}{meant}'?"
                raise BadRequest(message, code="unknown_parameter", param=where + name)


def _fold(name: str) -> str:
    return name.casefold().replace("_", "").replace("-", "")


# What is sent on ------------------------------------------------------------------------------------------------------

_MEMBERS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def members(raw: bytes) -> dict[str, bytes]:
    """The fields of a JSON object, each with its bytes as they were written. `raw` has been parsed before."""
    return {name: bytes(value) for name, value in _MEMBERS.decode(raw).items()}


def spliced(raw: bytes, changes: Mapping[str, object]) -> bytes:
    """A JSON object with some fields set, or, where the change is None, left out. All else stays byte for byte.

    A change that is bytes is JSON already.
    """
    fields = members(raw)
    for name, value in changes.items():
        fields.pop(name, None) if value is None else fields.update({name: _json(value)})
    return b"{" + b",".join(b"%s:%s" % (orjson.dumps(name), value) for name, value in fields.items()) + b"}"


def _json(value: object) -> bytes:
    return value if isinstance(value, bytes) else orjson.dumps(value)


def dumps(value: object) -> bytes:
    """JSON of what was read leniently: half a surrogate pair, whose other half comes with the next event, stays one."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":")).encode()


def renamed(raw: bytes, names: Sequence[tuple[str, str]]) -> bytes:
    """A JSON object whose fields of these names have others. What already has the other name gives way."""
    if not names:
        return raw
    fields = members(raw)
    changes: dict[str, object] = {}
    for old, new in names:
        if old in fields:
            changes |= {old: None, new: fields[old]}
    return spliced(raw, changes) if changes else raw


# What providers answer ------------------------------------------------------------------------------------------------


def parse(data: bytes) -> Any:
    """JSON as providers write it, or None. NaN, half surrogate pairs and broken UTF-8 must not hide text from count."""
    try:
        return orjson.loads(data)
    except ValueError:
        pass
    try:
        return json.loads(data.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None


def dicts(values: object) -> list[dict[str, Any]]:
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []


def count(figures: dict[str, Any], name: str) -> int | None:
    value = figures.get(name)
    return value if type(value) is int and 0 <= value <= MAX_TOKENS else None
