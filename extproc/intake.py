"""Request bodies: strict JSON (RFC 8259), in which two readers cannot see two different things.

What is sent on is written from the parsed value, so whatever is accepted must survive that: no duplicate names, no
number outside what 64-bit readers agree on, no text that UTF-8 cannot carry.
"""

from __future__ import annotations

import json
import re
from math import isinf
from typing import Any

import orjson
from mypy_extensions import mypyc_attr

from extproc.errors import BadRequest
from extproc.limits import MAX_ERROR_FIELD_CHARS, MAX_INTEGER_DIGITS, MAX_JSON_DEPTH, MAX_JSON_STRUCTURE_BYTES

MIN_INTEGER, MAX_INTEGER = -(2**63), 2**64 - 1  # what orjson reads and writes exactly

_BOM = b"\xef\xbb\xbf"
_WHITE_SPACE = b" \t\r\n"
_ALL_BUT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_LONG_NUMBER = re.compile(rb"\d{19}")  # any shorter whole number fits 64 bits
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_$-]{1,64}")


def parse_json(body: bytes) -> dict[str, Any]:
    """The object that `body` holds. Raises BadRequest, with the field's path in `param` where one is at fault.

    Codes: `empty_body`, `invalid_encoding`, `invalid_json`, `too_deep`, `too_complex`, `not_an_object`,
    `duplicate_key`, `invalid_number`, `invalid_string`.
    """
    if not body:
        raise BadRequest("The body is empty: send a JSON object.", code="empty_body")
    structure = _structure(body)
    _check_depth(structure)
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise _explain(body) or _invalid("The body is not strict JSON.") from None
    # orjson keeps the last of two equal names, and reads a whole number beyond 64 bits as the nearest float.
    suspect = structure.count(b":") != _count_names(value) or _LONG_NUMBER.search(structure)
    if suspect and (fault := _explain(body)):
        raise fault
    if type(value) is not dict:
        raise BadRequest("The body must be a JSON object.", code="not_an_object")
    return value


def _structure(body: bytes) -> bytes:
    """All of `body` but its texts and white space, in a few C-level passes.

    Without its escaped backslashes and quotes, every other piece between quotes is outside of texts, up to the first
    syntax error: further than that no reader comes.
    """
    if b"\\" in body:
        body = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    if body.count(b'"') > 2 * MAX_JSON_STRUCTURE_BYTES:
        raise _too_complex()
    structure = b"".join(body.split(b'"')[::2]).translate(None, _WHITE_SPACE)
    if len(structure) > MAX_JSON_STRUCTURE_BYTES:
        raise _too_complex()
    return structure


def _too_complex() -> BadRequest:
    return BadRequest("The body has too many values.", code="too_complex")


def _check_depth(structure: bytes) -> None:
    """Before anything recurses over the body."""
    if structure.count(b"[") + structure.count(b"{") <= MAX_JSON_DEPTH:
        return
    depth = 0
    for bracket in structure.translate(None, _ALL_BUT_BRACKETS):
        depth += _STEP[bracket]
        if depth > MAX_JSON_DEPTH:
            raise BadRequest(f"The body is nested deeper than {MAX_JSON_DEPTH} levels.", code="too_deep")


def _count_names(value: Any) -> int:
    count, pending = 0, [value]
    while pending:
        item = pending.pop()
        if type(item) is dict:
            count += len(item)
            pending.extend(item.values())
        elif type(item) is list:
            pending.extend(item)
    return count


# Once something is wrong, a slower reader finds out what and where. ---------------------------------------------------


@mypyc_attr(native_class=False)
class _Pairs(list[tuple[str, Any]]):
    """An object with its duplicates."""


@mypyc_attr(native_class=False)
class _Number(str):
    """A number, or one of Python's additions to JSON (`NaN`), as it was written."""

    __slots__ = ()


_LITERAL = json.JSONDecoder(object_pairs_hook=_Pairs, parse_int=_Number, parse_float=_Number, parse_constant=_Number)


def _explain(body: bytes) -> BadRequest | None:
    """What is wrong with `body`, or None if it is only unusual. Its depth has been checked."""
    if body.startswith(_BOM):
        return BadRequest("The body must not begin with a byte order mark.", code="invalid_encoding")
    try:
        return _first_fault(_LITERAL.decode(body.decode()), "")
    except UnicodeDecodeError as error:
        return BadRequest(f"The body is not UTF-8 at byte {error.start}.", code="invalid_encoding")
    except json.JSONDecodeError as error:
        return _invalid(f"The body is not valid JSON: {error.msg} (line {error.lineno}, column {error.colno}).")


def _first_fault(value: Any, path: str) -> BadRequest | None:
    """The first fault in the body's order."""
    if isinstance(value, _Number):
        return _number_fault(value, path)
    if isinstance(value, str):
        return _string_fault(value, path)
    if isinstance(value, _Pairs):
        return _object_fault(value, path)
    if isinstance(value, list):
        faults = (_first_fault(item, f"{path}[{index}]") for index, item in enumerate(value))
        return next(filter(None, faults), None)
    return None


def _object_fault(pairs: _Pairs, path: str) -> BadRequest | None:
    seen: set[str] = set()
    for name, item in pairs:
        field = _join(path, name)
        if name in seen:
            return BadRequest("A name occurs twice in one object.", code="duplicate_key", param=_clip(field))
        seen.add(name)
        if fault := _string_fault(name, field) or _first_fault(item, field):
            return fault
    return None


def _number_fault(number: _Number, path: str) -> BadRequest | None:
    digits = number.removeprefix("-")
    if digits in ("NaN", "Infinity"):
        return _invalid("NaN and Infinity are not JSON.", path)
    message = ""
    if not digits.isdigit():
        message = "The number is too large." if isinf(float(number)) else ""
    elif len(digits) > MAX_INTEGER_DIGITS:
        message = f"A whole number has at most {MAX_INTEGER_DIGITS} digits."
    elif not MIN_INTEGER <= int(number) <= MAX_INTEGER:
        message = "A whole number must fit 64 bits."
    return BadRequest(message, code="invalid_number", param=_clip(path)) if message else None


def _string_fault(text: str, path: str) -> BadRequest | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        message = "The text has half of a surrogate pair, which UTF-8 cannot carry."
        return BadRequest(message, code="invalid_string", param=_clip(path))
    return None


def _invalid(message: str, path: str = "") -> BadRequest:
    return BadRequest(message, code="invalid_json", param=_clip(path))


def _join(path: str, name: str) -> str:
    """`messages[3].content`. A name that is not plain is quoted in ASCII, so that the answer can always carry it."""
    if not _PLAIN_NAME.fullmatch(name):
        return f"{path}[{json.dumps(name[:MAX_ERROR_FIELD_CHARS])}]"
    return f"{path}.{name}" if path else name


def _clip(path: str) -> str | None:
    return path[:MAX_ERROR_FIELD_CHARS] or None
