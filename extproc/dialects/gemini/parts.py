"""The parts of a model's turn, both ways: text, thoughts and their signatures, calls of tools.

A signature stands on the part that it belongs to: on a call, on a text, on an empty text where all has been said
(https://ai.google.dev/gemini-api/docs/thought-signatures). In the canonical form it is a `Thinking` before that part.
Another dialect's signature is carried on the thought itself, or, where its thoughts were never shown, on an empty text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from extproc import form
from extproc.dialects.fields import parse
from extproc.dialects.gemini.names import OWN, dumps

_URL_SAFE = str.maketrans("-_", "+/")


def read_part(part: Mapping[str, Any], call_id: str) -> Iterator[form.Part]:
    """What one part says, leniently: text, thoughts, a call, or nothing. `call_id` is for a call that has none."""
    text, signature = part.get("text"), part.get("thoughtSignature")
    signed = _signature(signature) if isinstance(signature, str) and signature else None
    if part.get("thought") is True:
        said = text if isinstance(text, str) else ""
        if said or signed is not None:
            yield form.Thinking(said, *(signed or (None, OWN)))
        return
    if signed is not None:
        yield form.Thinking("", *signed, redacted=signed[1] != OWN)
    if isinstance(text, str) and text:
        yield form.Text(text)
    call = part.get("functionCall")
    if isinstance(call, dict) and isinstance(call.get("name"), str):
        given = call.get("id")
        arguments = call.get("args")
        yield form.ToolCall(
            given if isinstance(given, str) and given else call_id,
            call["name"],
            dumps(arguments if isinstance(arguments, dict) else {}).decode(),
        )


def _signature(text: str) -> tuple[str, str]:
    """(signature, origin). Google's Python client sends base64 back in its other alphabet."""
    standard = text.translate(_URL_SAFE)
    signature, origin = form.uncarry(standard + "=" * (-len(standard) % 4), OWN)
    return (text, OWN) if origin == OWN else (signature, origin)


def joined(parts: Iterable[form.Part]) -> tuple[form.Part, ...]:
    """Parts as they came in pieces, whole: a text, a thought, a thought and then its signature."""
    whole: list[form.Part] = []
    for part in parts:
        last = whole[-1] if whole else None
        match last, part:
            case form.Text(), form.Text():
                whole[-1] = replace(last, text=last.text + part.text, citations=last.citations + part.citations)
            case form.Thinking(signature=None), form.Thinking(redacted=False):
                whole[-1] = replace(part, text=last.text + part.text)
            case _:
                whole.append(part)
    return tuple(whole)


def write_parts(parts: Iterable[form.Part]) -> list[dict[str, Any]]:
    """A model's turn. Signatures of this dialect move to the part that follows, or, without one, to an empty text."""
    written: list[dict[str, Any]] = []
    signature: str | None = None
    for part in parts:
        if isinstance(part, form.Thinking):
            written += write_thinking(part)
            if part.signature is not None and part.origin == OWN:
                written += alone(signature)
                signature = part.signature
        elif (one := _write_part(part)) is not None:
            written.append(signed(one, signature))
            signature = None
    return written + alone(signature)


def write_thinking(thinking: form.Thinking) -> list[dict[str, Any]]:
    """A thought. A signature of this dialect is not in it: see `signed`."""
    if thinking.signature is None or thinking.origin == OWN:
        return [{"text": thinking.text, "thought": True}] if thinking.text else []
    carried = form.carry(thinking.signature, thinking.origin, OWN)
    shown = {} if thinking.redacted else {"thought": True}
    return [signed({"text": thinking.text, **shown}, carried)]


def signed(part: dict[str, Any], signature: str | None) -> dict[str, Any]:
    return part if signature is None else {**part, "thoughtSignature": signature}


def alone(signature: str | None) -> list[dict[str, Any]]:
    """A signature, if there is one, that no part follows."""
    return [] if signature is None else [signed({"text": ""}, signature)]


def _write_part(part: form.Part) -> dict[str, Any] | None:
    match part:
        case form.Text() | form.Refusal():
            return {"text": part.text} if part.text else None
        case form.ToolCall():
            return write_call(part.id, part.name, part.arguments)
    return None


def write_call(call_id: str, name: str, arguments: str) -> dict[str, Any] | None:
    """None where the arguments are no JSON object: the model was cut off, or wrote nonsense."""
    args = parse(arguments.encode("utf-8", "replace")) if arguments.strip() else {}
    return {"functionCall": {"id": call_id, "name": name, "args": args}} if isinstance(args, dict) else None
