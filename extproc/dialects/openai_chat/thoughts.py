"""Thoughts and their signatures, which OpenAI's chat has no words for, and most that speak it have.

The text stands in `reasoning_content` (DeepSeek's name) or `reasoning`, and, with what proves it, once more in
`reasoning_details` (https://openrouter.ai/docs/use-cases/reasoning-tokens). There `format` says whose the signature
is, and an `id` that is a call's, that it belongs to that call, as Gemini's do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from extproc.dialects.fields import dicts, dumps, parse
from extproc.form import Thinking

ORIGIN = "openai-chat"

_ANTHROPIC, _GEMINI, _RESPONSES = "anthropic-messages", "gemini", "openai-responses"
_ORIGINS = {"anthropic-claude-v1": _ANTHROPIC, "google-gemini-v1": _GEMINI, "openai-responses-v1": _RESPONSES}
_FORMATS = {origin: name for name, origin in _ORIGINS.items()}


def thoughts_of_provider(message: Mapping[str, Any]) -> list[Thinking]:
    """The thoughts of an answer or a piece of one. Whoever made a signature, it goes back to the provider that sent it:
    the canonical one is the whole entry without its text.
    """
    return [thinking for thinking, _ in _thoughts(message, {})]


def thoughts_of_caller(message: Mapping[str, Any]) -> list[tuple[Thinking, str | None]]:
    """The thoughts of an earlier answer, each with the id of its entry."""
    return _thoughts(message, _ORIGINS)


def said(message: Mapping[str, Any]) -> str:
    """The text under its plain names: providers that know both send it twice, and the first that is there counts."""
    for name in ("reasoning_content", "reasoning"):
        text = message.get(name)
        if isinstance(text, str) and text:
            return text
    return ""


def _thoughts(message: Mapping[str, Any], origins: Mapping[str, str]) -> list[tuple[Thinking, str | None]]:
    plain = said(message)
    entries = dicts(message.get("reasoning_details"))
    if not entries:
        return [(Thinking(plain), None)] if plain else []
    detailed = [(_thinking(entry, origins), _text(entry, "id") or None) for entry in entries]
    if plain and plain != "".join(thinking.text for thinking, _ in detailed):
        detailed = [(Thinking(plain), None), *((replace(thinking, text=""), entry) for thinking, entry in detailed)]
    return [(thinking, entry) for thinking, entry in detailed if thinking.text or thinking.signature]


def _thinking(entry: dict[str, Any], origins: Mapping[str, str]) -> Thinking:
    text = _text(entry, "text") or _text(entry, "summary")
    signature = _text(entry, "signature") or _text(entry, "data")
    if not signature:
        return Thinking(text)
    made_by = _text(entry, "format")
    redacted = entry.get("type") == "reasoning.encrypted" and _ORIGINS.get(made_by) == _ANTHROPIC
    origin = origins.get(made_by)
    return Thinking(text, signature if origin else _sealed(entry), origin or ORIGIN, redacted)


def _text(entry: Mapping[str, Any], name: str) -> str:
    value = entry.get(name)
    return value if isinstance(value, str) else ""


def _sealed(entry: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in entry.items() if name not in ("text", "summary", "index")}
    return dumps(kept).decode()


def entry_of(thinking: Thinking) -> dict[str, Any]:
    """What `reasoning_details` holds of these thoughts, but for its `index`."""
    if thinking.signature is None:
        return {"type": "reasoning.text", "text": thinking.text}
    entry = proof_of(thinking.signature, thinking.origin, redacted=thinking.redacted, shown=bool(thinking.text))
    return entry if entry["type"] == "reasoning.encrypted" else {**entry, "text": thinking.text}


def proof_of(signature: str, origin: str | None, *, redacted: bool, shown: bool) -> dict[str, Any]:
    """An entry without the text that it proves. `shown`: there is one."""
    if origin == ORIGIN:
        kept = parse(signature.encode())
        return {"type": "reasoning.text", **(kept if isinstance(kept, dict) else {})}
    made_by = {"format": _FORMATS[origin]} if origin in _FORMATS else {}
    if redacted or not (shown or origin == _ANTHROPIC):
        return {"type": "reasoning.encrypted", "data": signature, **made_by}
    return {"type": "reasoning.text", "signature": signature, **made_by}
