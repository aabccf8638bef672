"""OpenAI's legacy completions (`POST /v1/completions`), which base models and local servers still speak. Native only.

Requests and answers: https://platform.openai.com/docs/api-reference/completions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from extproc.dialects import openai_parts
from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.dialects.fields import Names, dicts, optional, parse, positive, spliced
from extproc.dialects.openai_chat.calls import is_error, service_tier_of, usage_of
from extproc.dialects.openai_parts import (
    model_name,
    prompt_for,
    read_inputs,
    refuse_routing,
    wants_usage,
    with_usage,
)
from extproc.errors import TollgateError
from extproc.limits import MAX_CHOICES, MAX_TOKENS
from extproc.records import Answer, Call, Piece

DEFAULT_CAP = 16  # of the API itself, where `max_tokens` is not given

# The fields that decide what a call costs.
_CALL_FIELDS = Names(
    ("model", "prompt", "suffix", "max_tokens", "n", "best_of", "echo", "stream", "stream_options", "service_tier")
)
_DONE = Piece(done=True)
_NOTHING = Piece()


class OpenAICompletions:
    """What the gate asks of the dialect. Stateless."""

    name = "openai-completions"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest in OpenAI's words and codes, naming the field in `param`.

        Of `best_of` answers to each prompt all are billed, and `n` are given out. `echo` counts a prompt as answer
        too, until the provider's own figures come.
        """
        _CALL_FIELDS.refuse_misspelt(body)
        refuse_routing(body)
        model = model_name(body)
        prompt = prompt_for(model)
        prompts = read_inputs(body, "prompt", prompt)
        if (suffix := optional(body, "suffix", str)) is not None:
            prompt.texts.append(suffix)
        echo = optional(body, "echo", bool) or False
        choices, written = (positive(body, name, at_most=MAX_CHOICES) or 1 for name in ("n", "best_of"))
        stream = optional(body, "stream", bool) or False
        return Call(
            model=model,
            stream=stream,
            wants_usage=wants_usage(body, stream),
            choices=prompts * max(choices, written),
            cap=positive(body, "max_tokens", at_most=MAX_TOKENS) or DEFAULT_CAP,
            prompt_texts=tuple(prompt.texts),
            prompt_extra=prompt.extra,
            service_tier=optional(body, "service_tier", str),
            web_searches=0,
            body=body,
            teaches=not echo and written <= choices,
        )

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """The call as a provider gets it. `cap` is the bound on output tokens of each choice, or None for no bound."""
        changes: dict[str, object] = {} if model == call.model else {"model": model}
        if cap is not None and call.body.get("max_tokens") != cap:
            changes["max_tokens"] = cap
        if call.stream and not call.wants_usage:
            changes["stream_options"] = with_usage(call.body, raw)
        return spliced(raw, changes) if changes else raw

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """Every event speaks for itself."""
        return read_event

    def read_answer(self, body: bytes) -> Answer:
        """What a whole answer says. Raises ValueError where it is not one."""
        answer = parse(body)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise ValueError("not a completion")
        return Answer(_texts(dicts(answer["choices"])), usage_of(answer), service_tier_of(answer))

    def render_error(self, error: TollgateError) -> bytes:
        """The body that OpenAI's clients turn into their own exceptions, by the HTTP status."""
        return openai_parts.render_error(error)

    def render_error_event(self, error: TollgateError) -> bytes:
        """An event for which OpenAI's clients raise APIError in the middle of a stream."""
        return b"data: " + openai_parts.render_error(error) + b"\n\n"


def read_event(data: bytes) -> Piece:
    """What one event of a stream says. Data that is not understood is an empty Piece."""
    event = parse(data)
    if not isinstance(event, dict):
        return _DONE if data.strip() == b"[DONE]" else _NOTHING
    choices, usage, error = dicts(event.get("choices")), usage_of(event), is_error(event)
    places = [index if type(index := choice.get("index")) is int else 0 for choice in choices]
    return Piece(
        texts=_texts(choices),
        usage=usage,
        usage_only=usage is not None and not choices and not error,
        started=tuple(places),
        finished=tuple(place for place, choice in zip(places, choices, strict=True) if choice.get("finish_reason")),
        error=error,
        service_tier=service_tier_of(event),
    )


def _texts(choices: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(text for choice in choices if isinstance(text := choice.get("text"), str) and text)
