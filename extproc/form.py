"""The canonical form of a chat: every dialect is read into it and written from it. N dialects, N readers and writers.

A request is a `Request`; a whole answer an `Answer`; a stream a sequence of `StreamEvent`. What no other dialect could
take (a provider's own tools, say) is named in `Request.extras`, and never guessed at.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple

from extproc.errors import ProviderError
from extproc.records import Usage

# Content --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Citation:
    """What a text rests on. `start` and `end` are character offsets into the text it belongs to, where known."""

    url: str | None = None
    title: str | None = None
    quote: str | None = None
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """`cache_ttl` (`5m`, `1h`): the prompt is to be cached up to here; a hint, which some providers do anyway."""

    text: str
    cache_ttl: str | None = None
    citations: tuple[Citation, ...] = ()


@dataclass(frozen=True, slots=True)
class Image:
    """Exactly one of `data` (base64, with its `media_type`) and `url`."""

    data: str | None = None
    media_type: str | None = None
    url: str | None = None
    detail: str | None = None
    cache_ttl: str | None = None


@dataclass(frozen=True, slots=True)
class Document:
    """A PDF (`data` in base64, or `url`) or plain text (`text`)."""

    data: str | None = None
    media_type: str | None = None
    url: str | None = None
    text: str | None = None
    name: str | None = None
    cache_ttl: str | None = None


@dataclass(frozen=True, slots=True)
class Audio:
    """`data` in base64, `format` as OpenAI names it: `wav`, `mp3`."""

    data: str
    format: str


@dataclass(frozen=True, slots=True)
class Thinking:
    """A model's thoughts. `signature` proves them to the provider of dialect `origin`, and is nothing to any other.

    Without `text`, only the signature was given out: Anthropic's redacted thinking (`redacted`), OpenAI's encrypted
    reasoning, or Gemini's thought signature, which belongs to the part that follows.
    """

    text: str
    signature: str | None = None
    origin: str | None = None
    redacted: bool = False


@dataclass(frozen=True, slots=True)
class Refusal:
    """The model's own words for not answering."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """`arguments` is JSON text, an object, exactly as the model wrote it where the dialect gives that."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool gave back. `parts` are texts, images and documents."""

    call_id: str
    parts: tuple[Part, ...]
    is_error: bool = False
    cache_ttl: str | None = None


Part = Text | Image | Document | Audio | Thinking | Refusal | ToolCall | ToolResult


class Role(StrEnum):
    """Who speaks. Tool results are parts of a user's message."""

    SYSTEM = "system"
    DEVELOPER = "developer"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn, or a part of one: two of the same role may follow each other, and a writer joins them where it must."""

    role: Role
    parts: tuple[Part, ...]
    name: str | None = None


# Requests -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Tool:
    """A function. `schema` is JSON Schema, as the caller wrote it; None for no parameters."""

    name: str
    description: str | None = None
    schema: Mapping[str, Any] | None = None
    strict: bool | None = None
    cache_ttl: str | None = None


class Choose(StrEnum):
    """Whether the model calls tools: as it likes, not at all, some tool, or the one that is named."""

    AUTO = "auto"
    NONE = "none"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`names`: the one that must be called (NAMED), or those that may be (others; empty: all)."""

    choose: Choose
    names: tuple[str, ...] = ()


class Output(StrEnum):
    """The form of the answer's text."""

    TEXT = "text"
    JSON = "json"
    SCHEMA = "schema"


@dataclass(frozen=True, slots=True)
class Format:
    """`schema` for Output.SCHEMA only."""

    output: Output
    schema: Mapping[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


@dataclass(frozen=True, slots=True)
class Reasoning:
    """How much to think: in words (`none`, `minimal`, `low`, `medium`, `high`, `xhigh`), or in tokens (0: not at all).

    `visible`: the caller wants to see the thoughts (None: as the provider does it).
    """

    effort: str | None = None
    budget_tokens: int | None = None
    visible: bool | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One call. None is always: not asked for.

    `extras` are the caller's fields that have no place here, by their path in the caller's dialect: what only a
    provider of that dialect can do. What changes nothing about the answer (`user`, `metadata`, `store`) is not in them.
    """

    model: str
    messages: tuple[Message, ...]
    stream: bool = False
    cap: int | None = None
    choices: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[str, Any] | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    format: Format | None = None
    reasoning: Reasoning | None = None
    extras: tuple[str, ...] = ()


NO_REQUEST = Request(model="", messages=())


class Feature(StrEnum):
    """What a request may ask for and a dialect may not be able to say. Each dialect lists those that it cannot."""

    CHOICES = "choices"
    TEMPERATURE_ABOVE_1 = "temperature"
    TOP_K = "top_k"
    STOP = "stop"
    SEED = "seed"
    PRESENCE_PENALTY = "presence_penalty"
    FREQUENCY_PENALTY = "frequency_penalty"
    LOGIT_BIAS = "logit_bias"
    LOGPROBS = "logprobs"
    TOOL_SUBSET = "tool_choice"
    SERIAL_TOOL_CALLS = "parallel_tool_calls"
    JSON_MODE = "json_mode"
    JSON_SCHEMA = "json_schema"
    REASONING = "reasoning"
    IMAGE = "image"
    IMAGE_URL = "image_url"
    DOCUMENT = "document"
    DOCUMENT_URL = "document_url"
    AUDIO = "audio"
    TOOL_RESULT_MEDIA = "tool_result_media"


MEDIA = frozenset(
    {
        Feature.IMAGE,
        Feature.IMAGE_URL,
        Feature.DOCUMENT,
        Feature.DOCUMENT_URL,
        Feature.AUDIO,
        Feature.TOOL_RESULT_MEDIA,
    }
)

# Without them a request still means what it meant, so that a policy may have them dropped.
DROPPABLE = frozenset(Feature) - MEDIA - {Feature.JSON_SCHEMA, Feature.TOOL_SUBSET}


def features(request: Request) -> frozenset[Feature]:
    """What `request` asks for."""
    asked = {feature for feature, given in _asked(request) if given}
    for message in request.messages:
        asked.update(_features_of_parts(message.parts))
    return frozenset(asked)


def _asked(request: Request) -> Iterator[tuple[Feature, object]]:
    yield Feature.CHOICES, (request.choices or 1) > 1
    yield Feature.TEMPERATURE_ABOVE_1, (request.temperature or 0) > 1
    yield Feature.TOP_K, request.top_k is not None
    yield Feature.STOP, request.stop
    yield Feature.SEED, request.seed is not None
    yield Feature.PRESENCE_PENALTY, request.presence_penalty
    yield Feature.FREQUENCY_PENALTY, request.frequency_penalty
    yield Feature.LOGIT_BIAS, request.logit_bias
    yield Feature.LOGPROBS, request.logprobs or request.top_logprobs
    choice = request.tool_choice
    yield Feature.TOOL_SUBSET, choice is not None and choice.choose is not Choose.NAMED and choice.names
    yield Feature.SERIAL_TOOL_CALLS, request.parallel_tool_calls is False and request.tools
    yield Feature.JSON_MODE, request.format is not None and request.format.output is Output.JSON
    yield Feature.JSON_SCHEMA, request.format is not None and request.format.output is Output.SCHEMA
    yield Feature.REASONING, request.reasoning is not None


def _features_of_parts(parts: tuple[Part, ...]) -> Iterator[Feature]:
    for part in parts:
        match part:
            case Image():
                yield Feature.IMAGE if part.url is None else Feature.IMAGE_URL
            case Document() if part.text is None:
                yield Feature.DOCUMENT if part.url is None else Feature.DOCUMENT_URL
            case Audio():
                yield Feature.AUDIO
            case ToolResult():
                nested = frozenset(_features_of_parts(part.parts))
                yield from nested
                if nested:
                    yield Feature.TOOL_RESULT_MEDIA


def without(request: Request, dropped: frozenset[Feature]) -> Request:
    """`request` without these DROPPABLE features, and without its extras."""
    changes: dict[str, Any] = {"extras": ()}
    for feature in dropped:
        changes |= _DROPS[feature]
    return replace(request, **changes)


_DROPS: Mapping[Feature, Mapping[str, Any]] = {
    Feature.CHOICES: {"choices": None},
    Feature.TEMPERATURE_ABOVE_1: {"temperature": 1.0},
    Feature.TOP_K: {"top_k": None},
    Feature.STOP: {"stop": ()},
    Feature.SEED: {"seed": None},
    Feature.PRESENCE_PENALTY: {"presence_penalty": None},
    Feature.FREQUENCY_PENALTY: {"frequency_penalty": None},
    Feature.LOGIT_BIAS: {"logit_bias": None},
    Feature.LOGPROBS: {"logprobs": False, "top_logprobs": None},
    Feature.SERIAL_TOOL_CALLS: {"parallel_tool_calls": None},
    Feature.JSON_MODE: {"format": None},
    Feature.REASONING: {"reasoning": None},
}


# Answers --------------------------------------------------------------------------------------------------------------


class Finish(StrEnum):
    """Why a choice ended."""

    STOP = "stop"
    STOP_SEQUENCE = "stop_sequence"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CONTENT_FILTER = "content_filter"  # moderation, safety, recitation
    REFUSAL = "refusal"  # the model's own
    PAUSE = "pause"  # the provider's own tools need another turn
    ERROR = "error"  # a tool call that cannot be read, and the like


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token of the answer. `top` are the likeliest in its place."""

    token: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the answers asked for. `stop_sequence`: which one ended it, where the provider says."""

    index: int
    parts: tuple[Part, ...]
    finish: Finish | None
    stop_sequence: str | None = None
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer. `unseen` are texts that are billed as output and have no place in `choices`."""

    id: str | None
    model: str | None
    choices: tuple[Choice, ...]
    usage: Usage | None
    service_tier: str | None = None
    unseen: tuple[str, ...] = ()


# Streams: events in order. Made for every piece of text, so named tuples ----------------------------------------------


class Started(NamedTuple):
    """The answer begins: once, first. `usage` is what is known of the prompt by then."""

    id: str | None
    model: str | None
    usage: Usage | None = None
    service_tier: str | None = None


class TextDelta(NamedTuple):
    choice: int
    text: str


class ThinkingDelta(NamedTuple):
    choice: int
    text: str


class ThinkingSigned(NamedTuple):
    """The signature of the thinking before it (see `Thinking`). Ends that block of thoughts."""

    choice: int
    signature: str
    origin: str
    redacted: bool = False


class RefusalDelta(NamedTuple):
    choice: int
    text: str


class ToolStarted(NamedTuple):
    """A call of a tool begins. `call` numbers the calls of one choice from 0, in order."""

    choice: int
    call: int
    id: str
    name: str


class ToolArguments(NamedTuple):
    """The next piece of a call's JSON text. Calls may be interleaved in no dialect but OpenAI's chat."""

    choice: int
    call: int
    json: str


class Cited(NamedTuple):
    """Something that the text of this choice rests on."""

    choice: int
    citation: Citation


class Logprobs(NamedTuple):
    choice: int
    tokens: tuple[TokenLogprob, ...]


class Unseen(NamedTuple):
    """Text that is billed as output and has no place in any other dialect: a provider's own tools at work.

    Empty where the text itself is not shown either.
    """

    text: str


class Finished(NamedTuple):
    """A choice has ended."""

    choice: int
    finish: Finish
    stop_sequence: str | None = None


class Used(NamedTuple):
    """The figures so far. Cumulative: the last one counts."""

    usage: Usage
    service_tier: str | None = None


class Failed(NamedTuple):
    """The provider broke off, and says why. Nothing follows."""

    error: ProviderError


class Done(NamedTuple):
    """The dialect's closing event, or the end of a stream that has none and whose choices are finished."""


StreamEvent = (
    Started
    | TextDelta
    | ThinkingDelta
    | ThinkingSigned
    | RefusalDelta
    | ToolStarted
    | ToolArguments
    | Cited
    | Logprobs
    | Unseen
    | Finished
    | Used
    | Failed
    | Done
)


# Signatures on their way through a dialect that is not theirs ---------------------------------------------------------

_CARRIED = "tollgate:"


def carry(signature: str, origin: str | None, own: str) -> str:
    """A signature as one text of dialect `own`, base64 where it is another dialect's: it must come back unchanged."""
    if origin is None or origin == own:
        return signature
    return base64.b64encode(f"{_CARRIED}{origin}:{signature}".encode()).decode()


def uncarry(text: str, own: str) -> tuple[str, str]:
    """(signature, origin) of what `carry` wrote, or of a signature of dialect `own` itself."""
    try:
        carried = base64.b64decode(text, validate=True).decode()
    except (binascii.Error, ValueError):
        return text, own
    if not carried.startswith(_CARRIED):
        return text, own
    origin, _, signature = carried.removeprefix(_CARRIED).partition(":")
    return signature, origin
