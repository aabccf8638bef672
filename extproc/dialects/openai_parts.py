"""What OpenAI's APIs share: who answers, what a prompt costs besides its text, files in data URLs, errors."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from extproc.dialects.fields import Names, invalid, is_a, members, optional, parse, required, spliced, wrong_type
from extproc.errors import BadRequest, ProviderError, TollgateError
from extproc.form import Document, Reasoning
from extproc.limits import MAX_INPUT_TOKENS, MAX_INPUTS, MAX_MODEL_NAME_CHARS

# What a prompt costs besides its text. Holds are made from these, so each is an upper bound or says what it assumes.
# The first four hold for OpenAI's own models; other providers add up to a thousand tokens of instructions of their own.
MESSAGE_TOKENS = 4  # OpenAI's cookbook, "How to count tokens": every message is wrapped in its role
NAME_TOKENS = 1
REPLY_TOKENS = 3  # the answer is primed with its role
TOOLS_TOKENS = 64  # the preamble before tool definitions
# Images, OpenAI's guide "Images and vision": `low` is 512 px square (256 patches), `high` at most 2,500 patches,
# `original` 10,000, each patch at most 2.46 tokens. Tiled models cost less (gpt-4o: 85 and 1,445) but for gpt-4o-mini:
# 2,833 and 5,667 a tile, of which an image has eight at most.
IMAGE_TOKENS = {"low": 630, "high": 6_150, "auto": 6_150, "original": 24_600}
IMAGE_TOKENS_4O_MINI = {"low": 2_833, "high": 48_169, "auto": 48_169, "original": 48_169}
# Audio is 10 tokens a second (OpenAI) or 12.5, from 30 s on (Mistral). Assumes no less than 1,000 bytes a second.
AUDIO_TOKENS = 375
AUDIO_BYTES_PER_TOKEN = 80
# A PDF is billed for its text and an image of each page. Assumes no more than a token a byte; never above the largest
# context that OpenAI sells.
FILE_TOKENS = 1_500
LARGEST_CONTEXT_TOKENS = 1_047_576

# Fields by which aggregators (OpenRouter, LiteLLM) let a caller choose another model, provider or key.
_ROUTING_FIELDS = frozenset(
    ("models", "route", "provider", "plugins", "preset", "fallbacks", "api_base", "base_url", "api_key")
)

_OPTION_FIELDS = Names(("include_usage",))

PDF = "application/pdf"

_DATA_URL = re.compile(r"data:(?P<type>[^;,]*)(?:;[^;,]*)*?;base64,", re.IGNORECASE)

# OpenAI's codes in a stream's error events, which have no status of their own.
_STATUS_OF_CODES = {
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
    "invalid_api_key": 401,
    "model_not_found": 404,
    "invalid_prompt": 400,
    "context_length_exceeded": 400,
    "content_filter": 400,
    "server_overloaded": 503,
}


# Requests -------------------------------------------------------------------------------------------------------------


def refuse_routing(body: Mapping[str, Any]) -> None:
    """Raises BadRequest for a field that would choose who answers, or who pays."""
    for name in body:
        if name.casefold() in _ROUTING_FIELDS:
            message = f"Unsupported parameter: '{name}'. Where a call goes is this gateway's policy."
            raise BadRequest(message, code="unsupported_parameter", param=name)


def model_name(body: Mapping[str, Any]) -> str:
    """The model asked for. Raises BadRequest where there is none, or one too long to be a name."""
    model: str = required(body, "model", str)
    if not 1 <= len(model) <= MAX_MODEL_NAME_CHARS:
        raise invalid("model", f"expected a name of 1 to {MAX_MODEL_NAME_CHARS} characters")
    return model


@dataclass(slots=True)
class Prompt:
    """What the provider will read, as it is found: texts to count, and tokens of all that is not text."""

    image_tokens: Mapping[str, int]
    extra: int = 0
    texts: list[str] = field(default_factory=list)

    def add_json(self, value: object) -> None:
        self.texts.append(orjson.dumps(value).decode())


def prompt_for(model: str, extra: int = 0) -> Prompt:
    """An empty prompt for a model. `extra` is what every prompt costs there."""
    return Prompt(IMAGE_TOKENS_4O_MINI if "4o-mini" in model else IMAGE_TOKENS, extra)


def image_tokens(image: Mapping[str, Any], where: str, prompt: Prompt) -> int:
    """What an image of `detail` costs at most. `where` ends with a dot."""
    detail = optional(image, "detail", str, where) or "auto"
    if detail not in prompt.image_tokens:
        raise invalid(where + "detail", "expected one of 'low', 'high', 'auto' and 'original'")
    return prompt.image_tokens[detail]


def audio_tokens(base64_text: str) -> int:
    """What sound costs at most."""
    return AUDIO_TOKENS + decoded_bytes(base64_text) // AUDIO_BYTES_PER_TOKEN


def file_tokens(data: str) -> int:
    """What a document costs at most. OpenRouter takes an address for its base64: what lies there may be of any size."""
    if "://" in data:
        return LARGEST_CONTEXT_TOKENS
    return min(FILE_TOKENS + decoded_bytes(data), LARGEST_CONTEXT_TOKENS)


def decoded_bytes(base64_text: str) -> int:
    return len(base64_text) * 3 // 4


def document(data: str, where: str) -> Document:
    """A file's data: a PDF unless its URL says otherwise. Text is read, for those who take documents as PDFs only."""
    media_type, data = data_url(data) or (PDF, data)
    if not media_type.startswith("text/"):
        return Document(data=data, media_type=media_type)
    try:
        return Document(text=base64.b64decode(data).decode())
    except (binascii.Error, ValueError):
        raise invalid(where, "expected text in UTF-8, in base64") from None


def data_url(url: str) -> tuple[str, str] | None:
    """(media type, base64) of a `data:` URL, None for any other."""
    match = _DATA_URL.match(url)
    return (match["type"].lower(), url[match.end() :]) if match else None


def wants_usage(body: Mapping[str, Any], stream: bool) -> bool:
    """Whether a caller of chat, or of completions, asked for figures at the end of its stream."""
    options = optional(body, "stream_options", dict)
    if options is None:
        return False
    if not stream:
        problem = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
        raise BadRequest(problem, code="invalid_value", param="stream_options")
    _OPTION_FIELDS.refuse_misspelt(options, "stream_options.")
    return bool(optional(options, "include_usage", bool, "stream_options."))


def with_usage(body: Mapping[str, Any], raw: bytes) -> bytes:
    """The caller's `stream_options`, with the figures asked for."""
    options = members(raw)["stream_options"] if body.get("stream_options") else b"{}"
    return spliced(options, {"include_usage": True})


def read_inputs(body: Mapping[str, Any], name: str, prompt: Prompt) -> int:
    """A text, or several, or either as token ids, into `prompt`. Returns how many texts."""
    given = body.get(name)
    if isinstance(given, str):
        prompt.texts.append(given)
        return 1
    inputs: list[Any] = required(body, name, list)
    if not inputs:
        raise invalid(name, "empty array. Expected an array with minimum length 1", "empty_array")
    if is_a(inputs[0], int):
        prompt.extra += _token_ids(inputs, name)
        return 1
    if len(inputs) > MAX_INPUTS:
        raise invalid(name, f"array too long. Expected at most {MAX_INPUTS} texts", "array_above_max_length")
    for i, text in enumerate(inputs):
        if isinstance(text, str):
            prompt.texts.append(text)
        elif isinstance(text, list):
            prompt.extra += _token_ids(text, f"{name}[{i}]")
        else:
            raise wrong_type(f"{name}[{i}]", "one of a string or array of integers", text)
    return len(inputs)


def _token_ids(ids: list[Any], where: str) -> int:
    if len(ids) > MAX_INPUT_TOKENS:
        raise invalid(where, f"array too long. Expected at most {MAX_INPUT_TOKENS} tokens", "array_above_max_length")
    for i, token in enumerate(ids):
        if not is_a(token, int):
            raise wrong_type(f"{where}[{i}]", "an integer", token)
    return len(ids)


# Errors ---------------------------------------------------------------------------------------------------------------


def error_fields(error: TollgateError) -> dict[str, str | None]:
    """The error object of OpenAI's APIs. Clients make their own exceptions of it, by the HTTP status."""
    return {"message": error.message, "type": error.type, "param": error.param, "code": error.code}


def render_error(error: TollgateError) -> bytes:
    """A body that OpenAI's clients read."""
    return orjson.dumps({"error": error_fields(error)})


def read_error(status: int, body: bytes) -> ProviderError:
    """A provider's error body, in whatever form: see `provider_error`."""
    return provider_error(parse(body), status)


def provider_error(said: object, status: int | None = None) -> ProviderError:
    """An error object, nested under `error` or not. Without a `status`, the code tells which one stands for it.

    Most nest it as OpenAI does. Some say `{"error": text}`, `message` or `detail` (a list of faults, from FastAPI), and
    Google puts the whole into an array.
    """
    if isinstance(said, list) and said:
        said = said[0]
    fields: dict[str, Any] = said if isinstance(said, dict) else {}
    nested = fields.get("error")
    inner: dict[str, Any] = nested if isinstance(nested, dict) else {}
    code = _text(inner.get("code")) or _text(fields.get("code"))
    message = _words(inner) or _words(fields) or "The provider answered with an error."
    param = _text(inner.get("param")) or _text(fields.get("param"))
    if status is None:
        status = _status_of(inner.get("code", fields.get("code")), inner.get("type"))
    return ProviderError(message, status=status, code=code, param=param)


_SAID_IN = ("message", "msg", "error", "detail", "details", "errors")


def _words(said: object, depth: int = 4) -> str:
    """What an error says, wherever it says it. `depth` bounds how far down."""
    if isinstance(said, str) or depth == 0:
        return said if isinstance(said, str) else ""
    if isinstance(said, list):
        return "; ".join(filter(None, (_words(one, depth - 1) for one in said[:3])))
    if not isinstance(said, dict):
        return ""
    return next(filter(None, (_words(said.get(name), depth - 1) for name in _SAID_IN)), "")


def _status_of(code: object, kind: object) -> int:
    """OpenRouter gives a number for a code, which is the status."""
    if type(code) is int and 400 <= code <= 599:
        return code
    for name in (code, kind):
        if isinstance(name, str) and name in _STATUS_OF_CODES:
            return _STATUS_OF_CODES[name]
    return 400 if kind == "invalid_request_error" else 500


def _text(value: object) -> str | None:
    if isinstance(value, str):
        return value or None
    return str(value) if type(value) is int else None


# Reasoning ------------------------------------------------------------------------------------------------------------

_UNTHINKING = ("gpt-3.5", "gpt-4", "chatgpt-4")  # refuse an effort, `none` included
_LEAST_EFFORT = (("gpt-5.", "none"), ("gpt-5", "minimal"), ("o1", "low"), ("o3", "low"), ("o4", "low"))
_BUDGETS = (("minimal", 1_024), ("low", 4_096), ("medium", 12_288))  # efforts in tokens, at most


def thinks(model: str) -> bool:
    """Whether a model may be told how much to think: OpenAI's older ones refuse every word about it."""
    return not _bare(model).startswith(_UNTHINKING)


def effort(reasoning: Reasoning, model: str) -> str | None:
    """How much to think, in a word that the model knows. None: as it likes."""
    asked, budget_tokens = reasoning.effort, reasoning.budget_tokens
    if asked is None and budget_tokens is not None:
        asked = next((word for word, most in _BUDGETS if budget_tokens <= most), "high") if budget_tokens else "none"
    if asked == "none":
        return next((least for prefix, least in _LEAST_EFFORT if _bare(model).startswith(prefix)), "none")
    return asked


def _bare(model: str) -> str:
    return model.rsplit("/", 1)[-1]
