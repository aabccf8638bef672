"""What a prompt of chat completions may cost, besides the words in it. Holds are made from this: an upper bound."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from extproc.dialects.fields import Names, invalid, objects, optional, read_content, required
from extproc.dialects.openai_parts import (
    MESSAGE_TOKENS,
    NAME_TOKENS,
    REPLY_TOKENS,
    TOOLS_TOKENS,
    Prompt,
    audio_tokens,
    file_tokens,
    image_tokens,
    prompt_for,
)
from extproc.limits import MAX_MESSAGES

EARLIER_AUDIO_TOKENS = 16_384  # an answer kept at the provider: as long as any audio model's answer may be

_MESSAGE_FIELDS = Names(("role", "content", "name", "tool_calls", "function_call", "refusal", "audio"))
_PART_FIELDS = Names(("type", "text", "refusal", "image_url", "input_audio", "file"))


def read_prompt(body: Mapping[str, Any], model: str) -> Prompt:
    """All of a request that the model reads. Raises BadRequest, naming the field."""
    prompt = prompt_for(model, REPLY_TOKENS)
    _read_messages(body, prompt)
    _read_definitions(body, prompt)
    return prompt


def _read_messages(body: Mapping[str, Any], prompt: Prompt) -> None:
    messages = objects(required(body, "messages", list), "messages")
    if not messages:
        raise invalid("messages", "empty array. Expected an array with minimum length 1", "empty_array")
    if len(messages) > MAX_MESSAGES:
        problem = f"array too long. Expected an array with maximum length {MAX_MESSAGES}"
        raise invalid("messages", problem, "array_above_max_length")
    for i, message in enumerate(messages):
        _read_message(message, f"messages[{i}].", prompt)


def _read_message(message: dict[str, Any], where: str, prompt: Prompt) -> None:
    """Everything in a message is prompt: histories carry tool calls, refusals, reasoning, and more to come."""
    _MESSAGE_FIELDS.refuse_misspelt(message, where)
    prompt.texts.append(required(message, "role", str, where))
    prompt.extra += MESSAGE_TOKENS
    if optional(message, "name", str, where) is not None:
        prompt.extra += NAME_TOKENS
    if optional(message, "audio", dict, where) is not None:
        prompt.extra += EARLIER_AUDIO_TOKENS
    objects(optional(message, "tool_calls", list, where) or [], where + "tool_calls")
    for name, value in message.items():
        if name == "content":
            _read_content(value, where + name, prompt)
        elif isinstance(value, str) and name != "role":
            prompt.texts.append(value)
        elif isinstance(value, (dict, list)):
            prompt.add_json(value)


def _read_content(content: object, where: str, prompt: Prompt) -> None:
    read_content(content, where, prompt.texts.append, partial(_read_part, prompt=prompt))


def _read_part(part: dict[str, Any], where: str, prompt: Prompt) -> None:
    """One part of a content. A type whose cost is unknown is refused: what cannot be held for is not sent."""
    _PART_FIELDS.refuse_misspelt(part, where)
    kind = required(part, "type", str, where)
    if kind in ("text", "refusal"):
        prompt.texts.append(required(part, kind, str, where))
    elif kind == "image_url":
        prompt.extra += image_tokens(_unwrapped(part, kind, where, "url"), f"{where}{kind}.", prompt)
    elif kind == "input_audio":
        prompt.extra += audio_tokens(_unwrapped(part, kind, where, "data")["data"])
    elif kind == "file":
        prompt.extra += file_tokens(_file_data(required(part, kind, dict, where), where + kind))
    else:
        raise invalid(where + "type", "expected one of 'text', 'image_url', 'input_audio', 'file' and 'refusal'")


def _unwrapped(part: dict[str, Any], kind: str, where: str, name: str) -> dict[str, Any]:
    """Mistral takes the bare string for `{name: string}` too."""
    value = part.get(kind)
    wrapped: dict[str, Any] = {name: value} if isinstance(value, str) else required(part, kind, dict, where)
    required(wrapped, name, str, f"{where}{kind}.")
    return wrapped


def _file_data(file: dict[str, Any], where: str) -> str:
    """A file given by id lies at the provider, of unknown size and unknown owner."""
    if "file_data" not in file:
        raise invalid(where, "files are accepted as 'file_data' only, since the cost of a stored file is not known")
    data: str = required(file, "file_data", str, where + ".")
    return data


def _read_definitions(body: Mapping[str, Any], prompt: Prompt) -> None:
    """Tools, schemas and predictions: the provider writes them into the prompt in a form of its own, never longer."""
    for name in ("tools", "functions"):
        if definitions := optional(body, name, list):
            prompt.extra += TOOLS_TOKENS
            prompt.add_json(objects(definitions, name))
    for name in ("response_format", "prediction"):
        if (definition := optional(body, name, dict)) is not None:
            prompt.add_json(definition)
    for name in ("tool_choice", "function_call"):
        if isinstance(body.get(name), dict):
            prompt.add_json(body[name])
