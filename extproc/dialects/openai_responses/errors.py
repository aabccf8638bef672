"""Errors in the middle of a stream of Responses. Whole ones are as in all of OpenAI's APIs."""

from __future__ import annotations

from collections.abc import Mapping

from extproc.dialects.fields import dumps
from extproc.dialects.openai_parts import error_fields
from extproc.errors import TollgateError


def error_event(error: TollgateError, sequence_number: int, usage: Mapping[str, object] | None = None) -> bytes:
    """Said twice: as the reference has it, and nested, as OpenAI sends it and its Python client wants it.

    `usage`: the figures until then, which are billed all the same.
    """
    fields = error_fields(error)
    flat = {name: fields[name] for name in ("code", "message", "param")}
    event: dict[str, object] = {"type": "error", **flat, "sequence_number": sequence_number, "error": fields}
    if usage is not None:
        event["usage"] = usage
    return b"event: error\ndata: " + dumps(event) + b"\n\n"
