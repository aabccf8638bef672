"""What a prompt of Gemini's may cost, besides the words in it. Holds are made from this: an upper bound, or it says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil
from typing import Any
from urllib.parse import urlsplit

from extproc.dialects.fields import invalid, missing, optional, required
from extproc.dialects.gemini.names import (
    BLOB,
    CONTENT,
    FILE,
    FUNCTION_RESPONSE,
    PART,
    TOOL,
    Spelling,
    dumps,
    generation,
    message,
    messages,
)
from extproc.limits import MAX_MESSAGES

CONTENT_TOKENS = 4  # the turn and its role
TOOLS_TOKENS = 64  # the preamble before function declarations
SCHEMA_TOKENS = 64  # the words around the schema of an answer
# Gemini's own tokens are not public. It has one for each digit, where the count here has one for three; of other text
# the recorded answers have at most a token more for 24 characters.
CHARS_PER_TOKEN_MORE = 20
TOKENS_MORE_PER_DIGIT = 2 / 3
# Gemini 3 takes 1,120 tokens for an image, 2,240 for one of ultra high resolution; Gemini 2 takes 258 for each tile.
# Assumes no more than 16 tiles, an image of 3,072 pixels square.
IMAGE_TOKENS = 4_128
# Audio is 32 tokens a second. Assumes no less than 1,000 bytes a second.
AUDIO_TOKENS = 64
AUDIO_BYTES_PER_TOKEN = 31
# Video is 258 tokens a frame and 32 of sound, one frame a second unless asked otherwise. Assumes no less than 4,000
# bytes a second.
VIDEO_TOKENS = 600
VIDEO_BYTES_PER_TOKEN = 13
# A page of a PDF is at most 1,120 tokens. Assumes no more than a token a byte, for any other file too.
FILE_TOKENS = 1_500
LARGEST_CONTEXT_TOKENS = 1_048_576
# A thought's signature holds thoughts, encrypted, of which the recorded prompts were billed none. Assumes that they
# were written in no fewer than 4 characters of it for each token.
SIGNATURE_CHARS_PER_TOKEN = 4
# What a tool of Google's own reads is billed as prompt (`toolUsePromptTokenCount`) and known only afterwards. Assumes
# no more; the recorded answers have 37,441 at most.
SERVER_TOOL_TOKENS = 65_536
SEARCHES = 8  # from Gemini 3 on each is billed. Assumes no more; the recorded answers have 5 at most

_VIDEO = Spelling("fps")

_COUNTED_FIELDS = ("functionCall", "executableCode", "codeExecutionResult", "toolCall", "toolResponse", "partMetadata")
_SPECIAL_HOSTS = ("googleapis.com", "google.com", "youtube.com", "youtu.be")
_STORED_TOOLS = ("fileSearch", "retrieval")
_FUNCTIONS = "functionDeclarations"


@dataclass(slots=True)
class Prompt:
    """What the provider will read, as it is found: texts to count, and tokens of all that is not text."""

    model: str
    texts: list[str] = field(default_factory=list)
    extra: int = 0
    searches: int = 0

    def add(self, text: str) -> None:
        encoded = text.encode("utf-8", "replace")
        digits = len(encoded) - len(encoded.translate(None, b"0123456789"))
        self.extra += len(text) // CHARS_PER_TOKEN_MORE + ceil(digits * TOKENS_MORE_PER_DIGIT)
        self.texts.append(text)

    def add_json(self, value: object) -> None:
        self.add(dumps(value).decode())


def read_prompt(fields: Mapping[str, Any], config: Mapping[str, Any], model: str) -> Prompt:
    """All of a request that the model reads. Raises BadRequest, naming the field, for what cannot be held for."""
    prompt = Prompt(model)
    if fields.get("cachedContent") is not None:
        problem = "the cost of stored content is not known, nor whose it is"
        raise invalid("cachedContent", problem, "unsupported_parameter")
    if fields.get("contents") is None:
        raise missing("contents")
    contents = messages(fields, "contents")
    if not 1 <= len(contents) <= MAX_MESSAGES:
        raise invalid("contents", f"expected 1 to {MAX_MESSAGES} contents")
    for i, content in enumerate(contents):
        _read_content(content, f"contents[{i}].", prompt)
    if (system := optional(fields, "systemInstruction", dict)) is not None:
        _read_content(system, "systemInstruction.", prompt)
    for i, tool in enumerate(messages(fields, "tools")):
        _read_tool(tool, f"tools[{i}].", prompt)
    for name in ("responseSchema", "responseJsonSchema", "responseFormat"):
        if config.get(name) is not None:
            prompt.extra += SCHEMA_TOKENS
            prompt.add_json(config[name])
    return prompt


def _read_content(content: dict[str, Any], where: str, prompt: Prompt) -> None:
    content = CONTENT.read(content, where)
    optional(content, "role", str, where)
    prompt.extra += CONTENT_TOKENS
    for i, part in enumerate(messages(content, "parts", where)):
        _read_part(PART.read(part, f"{where}parts[{i}]."), f"{where}parts[{i}].", prompt)


def _read_part(part: dict[str, Any], where: str, prompt: Prompt) -> None:
    """A field whose cost is unknown is refused: what cannot be held for is not sent."""
    for name in part:
        if not PART.knows(name):
            raise invalid(where + name, "its cost is not known", "unsupported_parameter")
    if (text := optional(part, "text", str, where)) is not None:
        prompt.add(text)
    signature = optional(part, "thoughtSignature", str, where) or ""
    prompt.extra += len(signature) // SIGNATURE_CHARS_PER_TOKEN
    for name in _COUNTED_FIELDS:
        if (value := optional(part, name, dict, where)) is not None:
            prompt.add_json(value)
    _read_media(part, where, prompt)
    if part.get("functionResponse") is not None:
        _read_function_response(message(part, "functionResponse", FUNCTION_RESPONSE, where), where, prompt)


def _read_function_response(given: dict[str, Any], where: str, prompt: Prompt) -> None:
    prompt.add_json({name: value for name, value in given.items() if name != "parts"})
    where = f"{where}functionResponse."
    for i, part in enumerate(messages(given, "parts", where)):
        _read_media(PART.read(part, f"{where}parts[{i}]."), f"{where}parts[{i}].", prompt)


def _read_media(part: dict[str, Any], where: str, prompt: Prompt) -> None:
    if part.get("inlineData") is not None:
        blob = message(part, "inlineData", BLOB, where)
        kind: str = required(blob, "mimeType", str, f"{where}inlineData.")
        size = len(required(blob, "data", str, f"{where}inlineData.")) * 3 // 4
        frames = message(part, "videoMetadata", _VIDEO, where).get("fps")
        prompt.extra += _media_tokens(kind.partition("/")[0].lower(), size, _frames_per_s(frames, where))
    if part.get("fileData") is not None:
        _read_file(message(part, "fileData", FILE, where), f"{where}fileData", prompt)


def _frames_per_s(value: object, where: str) -> float:
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 24:
        raise invalid(f"{where}videoMetadata.fps", "expected a number above 0, and at most 24")
    return max(1, value)


def _media_tokens(kind: str, size_bytes: int, frames_per_s: float) -> int:
    if kind == "image":
        return IMAGE_TOKENS
    if kind == "audio":
        tokens = AUDIO_TOKENS + size_bytes // AUDIO_BYTES_PER_TOKEN
    elif kind == "video":
        tokens = VIDEO_TOKENS + int(size_bytes / VIDEO_BYTES_PER_TOKEN * frames_per_s)
    else:
        tokens = FILE_TOKENS + size_bytes
    return min(tokens, LARGEST_CONTEXT_TOKENS)


def _read_file(file: dict[str, Any], where: str, prompt: Prompt) -> None:
    """A file by its address is of unknown size, and in Google's own stores of unknown owner. An image is bounded."""
    kind = optional(file, "mimeType", str, where + ".") or ""
    address: str = required(file, "fileUri", str, where + ".")
    if not kind.lower().startswith("image/") or not is_public(address):
        problem = (
            "files are accepted as 'inlineData' only, but for images of public addresses, since the cost of others "
        )
        raise invalid(where, problem + "is not known", "unsupported_parameter")
    prompt.extra += IMAGE_TOKENS


def is_public(address: str) -> bool:
    """Whether Google fetches an address as anyone could: not by its own or its customer's rights, nor as a video."""
    try:
        parts = urlsplit(address)
        host = (parts.hostname or "").rstrip(".")
    except ValueError:
        return False
    special = any(host == own or host.endswith("." + own) for own in _SPECIAL_HOSTS)
    return (
        parts.scheme in ("http", "https") and bool(host) and not special and address.isascii() and "\\" not in address
    )


def _read_tool(tool: dict[str, Any], where: str, prompt: Prompt) -> None:
    tool = TOOL.read(tool, where)
    for name, value in tool.items():
        if name in _STORED_TOOLS:
            problem = "the cost of stored files is not known, nor whose they are"
            raise invalid(where + name, problem, "unsupported_parameter")
        if name == _FUNCTIONS:
            prompt.extra += TOOLS_TOKENS
            prompt.add_json(messages(tool, name, where))
        elif value is not None:
            prompt.extra += SERVER_TOOL_TOKENS
            if "search" in name.lower() or "maps" in name.lower():
                prompt.searches += SEARCHES if generation(prompt.model) >= 3 else 1
