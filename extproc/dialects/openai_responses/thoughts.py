"""Thoughts on their way through Responses: its own are encrypted, those of other dialects travel in their place."""

from __future__ import annotations

from collections.abc import Mapping

from extproc.form import Thinking, carry, uncarry

NAME = "openai-responses"
ITEM_PREFIX = "rs_tollgate_"  # of items that were written here, which no provider knows

_REDACTED = "+redacted"  # after the origin of a signature that stands for thoughts


def encrypted(thinking: Thinking) -> str | None:
    """The `encrypted_content` of an item."""
    if thinking.signature is None:
        return None
    origin = thinking.origin
    if origin is not None and origin != NAME and thinking.redacted:
        origin += _REDACTED
    return carry(thinking.signature, origin, NAME)


def thinking(text: str, encrypted_content: str | None) -> Thinking:
    """An item's text and `encrypted_content`, as the thoughts that they were."""
    if encrypted_content is None:
        return Thinking(text)
    signature, origin = uncarry(encrypted_content, NAME)
    return Thinking(text, signature, origin.removesuffix(_REDACTED), origin.endswith(_REDACTED))


def is_foreign(item: Mapping[str, object]) -> bool:
    """Whether an item of the input holds thoughts that no provider of this dialect had."""
    if item.get("type") != "reasoning":
        return False
    content, item_id = item.get("encrypted_content"), item.get("id")
    if isinstance(content, str):
        return uncarry(content, NAME)[1] != NAME
    return isinstance(item_id, str) and item_id.startswith(ITEM_PREFIX)
