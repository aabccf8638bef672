"""The names of things in Google's JSON, and what a model's name tells of it.

Google reads every field under two names, `maxOutputTokens` and `max_output_tokens`, a single object for a list of one,
and writes enumerations as numbers where it is asked to (https://protobuf.dev/programming-guides/json/).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from extproc.dialects import fields
from extproc.dialects.fields import Names, invalid, objects, optional, wrong_type

OWN = "gemini"  # whose thought signatures these are

_HUMP = re.compile(r"(?=[A-Z])")
_GENERATION = re.compile(r"gemini-(\d{1,3})")
_UNNUMBERED = 99  # `gemini-flash-latest`: newer than whatever is known here


class Spelling:
    """The fields of one message that decide something, by their camelCase names."""

    __slots__ = ("_camel", "_names")

    def __init__(self, *names: str) -> None:
        self._camel = {snake(name): name for name in names} | {name: name for name in names}
        self._names = Names(self._camel)

    def read(self, given: Mapping[str, Any], where: str = "") -> dict[str, Any]:
        """`given` under its camelCase names. Raises BadRequest for one that is given twice, or is misspelt."""
        self._names.refuse_misspelt(given, where)
        read: dict[str, Any] = {}
        for spelling, value in given.items():
            name = self._camel.get(spelling, spelling)
            if name in read:
                raise invalid(where + name, "given under both of its names")
            read[name] = value
        return read

    def knows(self, name: str) -> bool:
        return name in self._camel


def snake(name: str) -> str:
    return _HUMP.sub("_", name).lower()


def spelt(given: Mapping[str, Any], name: str) -> str:
    """The one of a field's names that is in `given`, else the camelCase one."""
    return snake(name) if snake(name) in given else name


def message(given: Mapping[str, Any], name: str, spelling: Spelling, where: str = "") -> dict[str, Any]:
    """A field that is an object: its own fields, none where it is absent."""
    return spelling.read(optional(given, name, dict, where) or {}, f"{where}{name}.")


def messages(given: Mapping[str, Any], name: str, where: str = "") -> list[dict[str, Any]]:
    """A field that is a list of objects, or one object for a list of one."""
    value = given.get(name)
    if value is None:
        return []
    if isinstance(value, dict):
        return [value]
    if not isinstance(value, list):
        raise wrong_type(where + name, "an array", value)
    return objects(value, where + name)


def generation(model: str) -> int:
    """2 for `gemini-2.5-flash`. From 3 on, thoughts are signed, have levels, and searches are billed one by one."""
    found = _GENERATION.search(model)
    return int(found[1]) if found else _UNNUMBERED


def dumps(value: object) -> bytes:
    """JSON of what has been read, null where it is nested deeper than anybody means."""
    try:
        return fields.dumps(value)
    except RecursionError:
        return b"null"


# The messages that are read here, by the fields that decide something -------------------------------------------------

BODY = Spelling(
    "model",
    "contents",
    "systemInstruction",
    "tools",
    "toolConfig",
    "generationConfig",
    "cachedContent",
    "serviceTier",
    "safetySettings",
    "generateContentRequest",
)
CONFIG = Spelling(
    "candidateCount",
    "maxOutputTokens",
    "temperature",
    "topP",
    "topK",
    "stopSequences",
    "seed",
    "presencePenalty",
    "frequencyPenalty",
    "responseLogprobs",
    "logprobs",
    "responseMimeType",
    "responseSchema",
    "responseJsonSchema",
    "responseModalities",
    "responseFormat",
    "thinkingConfig",
    "routingConfig",
    "modelSelectionConfig",
    "modelConfig",
)
THINKING = Spelling("includeThoughts", "thinkingBudget", "thinkingLevel")
CONTENT = Spelling("role", "parts")
PART = Spelling(
    "text",
    "inlineData",
    "fileData",
    "functionCall",
    "functionResponse",
    "executableCode",
    "codeExecutionResult",
    "toolCall",
    "toolResponse",
    "thought",
    "thoughtSignature",
    "videoMetadata",
    "mediaResolution",
    "partMetadata",
)
BLOB = Spelling("mimeType", "data", "displayName")
FILE = Spelling("mimeType", "fileUri", "displayName")
FUNCTION_RESPONSE = Spelling("id", "name", "response", "parts", "willContinue", "scheduling")
TOOL = Spelling("functionDeclarations", "fileSearch", "retrieval", "googleSearch", "googleSearchRetrieval")
