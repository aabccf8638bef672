"""What the gate asks of Gemini's generateContent, and of its counting of tokens.

https://ai.google.dev/api/generate-content, and the same of Vertex AI. The model and whether to stream are in the path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mypy_extensions import mypyc_attr

from extproc.dialects import pieces
from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.dialects.fields import count, invalid, members, missing, optional, parse, positive, spliced
from extproc.dialects.gemini.answers import read_whole
from extproc.dialects.gemini.errors import render
from extproc.dialects.gemini.names import BODY, CONFIG, THINKING, message, spelt
from extproc.dialects.gemini.prompts import read_prompt
from extproc.dialects.gemini.stream_reader import StreamReader
from extproc.errors import BadRequest, TollgateError
from extproc.limits import MAX_CHOICES, MAX_MODEL_NAME_CHARS, MAX_TOKENS
from extproc.records import Answer, Call, Piece, Usage

# By these a caller would choose another model than the one that is held for.
_ROUTING_FIELDS = ("routingConfig", "modelSelectionConfig", "modelConfig")
_MEDIA_MODELS = ("-image", "-tts")  # answer in pictures or sound without being asked


@mypyc_attr(allow_interpreted_subclasses=True)
class GeminiCalls:
    """What the gate asks of the dialect. Stateless."""

    name = "gemini-generate"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest, naming the field by its camelCase name."""
        fields = BODY.read(body)
        config = read_config(fields)
        model = _model(fields, address)
        prompt = read_prompt(fields, config, model)
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
