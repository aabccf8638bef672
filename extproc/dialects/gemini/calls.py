"""Gemini's generateContent as the gate sees it: what is accepted and may cost what, what is sent on, how errors look.

https://ai.google.dev/api/generate-content, and the same of Vertex AI. The model and whether to stream are in the path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any
from urllib.parse import urlsplit

from extproc.dialects import pieces
from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.dialects.fields import count, invalid, members, missing, optional, parse, positive, required, spliced
from extproc.dialects.gemini.answers import read_whole
from extproc.dialects.gemini.errors import render
from extproc.dialects.gemini.names import Spelling, dumps, generation, message, messages, spelt
from extproc.dialects.gemini.stream_reader import StreamReader
from extproc.errors import BadRequest, TollgateError
from extproc.limits import MAX_CHOICES, MAX_MESSAGES, MAX_MODEL_NAME_CHARS, MAX_TOKENS
from extproc.records import Answer, Call, Piece, Usage

# What a prompt costs besides its text. Holds are made from these, so each is an upper bound or says what it assumes.
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
_VIDEO = Spelling("fps")

# By these a caller would choose another model than the one that is held for.
_ROUTING_FIELDS = ("routingConfig", "modelSelectionConfig", "modelConfig")
_COUNTED_FIELDS = ("functionCall", "executableCode", "codeExecutionResult", "toolCall", "toolResponse", "partMetadata")
_SPECIAL_HOSTS = ("googleapis.com", "google.com", "youtube.com", "youtu.be")
_STORED_TOOLS = ("fileSearch", "retrieval")
_FUNCTIONS = "functionDeclarations"
_MEDIA_MODELS = ("-image", "-tts")  # answer in pictures or sound without being asked


class GeminiCalls:
    """What the gate asks of the dialect. Stateless."""

    name = "gemini-generate"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest, naming the field by its camelCase name."""
        fields = BODY.read(body)
        config = read_config(fields)
        model = _model(fields, address)
        prompt = _Prompt(model)
        _read_prompt(fields, config, prompt)
        return Call(
            model=model,
            stream=address.stream,
            wants_usage=True,
            choices=_positive(config, "candidateCount", MAX_CHOICES) or 1,
            cap=_positive(config, "maxOutputTokens", MAX_TOKENS),
            prompt_texts=tuple(prompt.texts),
            prompt_extra=prompt.extra,
            service_tier=_service_tier(fields),
            web_searches=prompt.searches,
            body=body,
            thinks=_thinks(config),
            unseen=asks_for_media(config) or any(kind in model for kind in _MEDIA_MODELS),
        )

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """The call as a provider gets it, the cap under the name that the caller used. The path names the model."""
        changes: dict[str, object] = {"model": None} if "model" in call.body else {}
        name = spelt(call.body, "generationConfig")
        config = call.body.get(name) or {}
        limit = spelt(config, "maxOutputTokens")
        if cap is not None and config.get(limit) != cap:
            given = members(raw)[name] if config else b"{}"
            changes[name] = spliced(given, {limit: cap})
        return spliced(raw, changes) if changes else raw

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """There is no closing event: a stream is whole once all choices are finished, or the prompt is blocked."""
        reader = StreamReader("", unsearched=0)

        def read(data: bytes) -> Piece:
            return pieces.piece(reader.read(data))._replace(finished=reader.finished, done=reader.blocked)

        return read

    def read_answer(self, body: bytes) -> Answer:
        """What a whole answer says. Raises ValueError where it is not one, an error with status 200 included."""
        return pieces.answer(read_whole(body, "", unsearched=0))

    def render_error(self, error: TollgateError) -> bytes:
        """The body that Google's clients turn into their own exceptions, by the HTTP status."""
        return render(error)

    def render_error_event(self, error: TollgateError) -> bytes:
        """An event for which Google's clients raise in the middle of a stream."""
        return b"data: " + render(error) + b"\r\n\r\n"


class GeminiCountTokens:
    """`:countTokens`, which Google does not bill. Native only."""

    name = "gemini-count-tokens"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """What would be counted is checked as if it were asked."""
        fields = BODY.read(body)
        asked = optional(fields, "generateContentRequest", dict)
        call = _GENERATE.read_call(body if asked is None else asked, replace(address, stream=False, array=False))
        return replace(call, body=body, choices=1, cap=None, prompt_texts=(), prompt_extra=0, billed=False)

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """Where a whole request is to be counted, Google wants its model named in it."""
        name = spelt(call.body, "generateContentRequest")
        if call.body.get(name):
            return spliced(raw, {name: spliced(members(raw)[name], {"model": f"models/{model}"})})
        return spliced(raw, {"model": None}) if "model" in call.body else raw

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """There are no streams of it."""
        return lambda data: Piece()

    def read_answer(self, body: bytes) -> Answer:
        """Nothing is billed. Raises ValueError where no count is in it."""
        answer = parse(body)
        if not isinstance(answer, dict) or count(answer, "totalTokens") is None:
            raise ValueError("not a count of tokens")
        return Answer((), Usage(0, 0))

    def render_error(self, error: TollgateError) -> bytes:
        return render(error)

    def render_error_event(self, error: TollgateError) -> bytes:
        return _GENERATE.render_error_event(error)


_GENERATE = GeminiCalls()


# The fields -----------------------------------------------------------------------------------------------------------


def read_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """`generationConfig` under its camelCase names. Raises BadRequest for what would choose another model."""
    config = message(fields, "generationConfig", CONFIG)
    for name in _ROUTING_FIELDS:
        if name in config:
            problem = f"Unsupported parameter: 'generationConfig.{name}'. Where a call goes is this gateway's policy."
            raise BadRequest(problem, code="unsupported_parameter", param=f"generationConfig.{name}")
    return config


def _positive(config: Mapping[str, Any], name: str, at_most: int) -> int | None:
    where = f"generationConfig.{name}"
    return positive({where: config.get(name)}, where, at_most)


def _model(fields: Mapping[str, Any], address: Address) -> str:
    """The path's. A body may repeat it, and then has to mean the same."""
    model = address.model
    if model is None:
        raise missing("model")
    if not 1 <= len(model) <= MAX_MODEL_NAME_CHARS:
        raise invalid("model", f"expected a name of 1 to {MAX_MODEL_NAME_CHARS} characters")
    named = optional(fields, "model", str)
    if named is not None and named.rpartition("/")[2] != model:
        raise invalid("model", "the path names another one")
    return model


def _service_tier(fields: Mapping[str, Any]) -> str | None:
    tier: str | None = optional(fields, "serviceTier", str)
    return None if tier is None else tier.lower().removeprefix("service_tier_")


def _thinks(config: Mapping[str, Any]) -> bool | None:
    """False only where no thoughts are allowed at all, which some models do in spite of a level."""
    thinking = message(config, "thinkingConfig", THINKING, "generationConfig.")
    where = "generationConfig.thinkingConfig."
    budget = optional(thinking, "thinkingBudget", int, where)
    if budget is not None:
        return bool(budget)
    shown = optional(thinking, "includeThoughts", bool, where)
    return True if shown or optional(thinking, "thinkingLevel", str, where) else None


def asks_for_media(config: Mapping[str, Any]) -> bool:
    asked = optional(config, "responseModalities", list, "generationConfig.") or []
    return any(str(modality).upper() != "TEXT" for modality in asked)


# The prompt -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Prompt:
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


def _read_prompt(fields: Mapping[str, Any], config: Mapping[str, Any], prompt: _Prompt) -> None:
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


def _read_content(content: dict[str, Any], where: str, prompt: _Prompt) -> None:
    content = CONTENT.read(content, where)
    optional(content, "role", str, where)
    prompt.extra += CONTENT_TOKENS
    for i, part in enumerate(messages(content, "parts", where)):
        _read_part(PART.read(part, f"{where}parts[{i}]."), f"{where}parts[{i}].", prompt)


def _read_part(part: dict[str, Any], where: str, prompt: _Prompt) -> None:
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


def _read_function_response(given: dict[str, Any], where: str, prompt: _Prompt) -> None:
    prompt.add_json({name: value for name, value in given.items() if name != "parts"})
    where = f"{where}functionResponse."
    for i, part in enumerate(messages(given, "parts", where)):
        _read_media(PART.read(part, f"{where}parts[{i}]."), f"{where}parts[{i}].", prompt)


def _read_media(part: dict[str, Any], where: str, prompt: _Prompt) -> None:
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


def _read_file(file: dict[str, Any], where: str, prompt: _Prompt) -> None:
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


def _read_tool(tool: dict[str, Any], where: str, prompt: _Prompt) -> None:
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
