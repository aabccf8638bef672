"""OpenAI's chat completions (`POST /v1/chat/completions`), and what speaks the same form at another address.

Requests and answers: https://platform.openai.com/docs/api-reference/chat. Where providers of this dialect differ, the
difference is named beside its rule; the recorded answers in `tests/streams` show each one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mypy_extensions import mypyc_attr

from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.dialects.fields import (
    Names,
    count,
    dicts,
    optional,
    parse,
    positive,
    spliced,
)
from extproc.dialects.openai_chat.prompts import read_prompt
from extproc.dialects.openai_parts import (
    model_name,
    refuse_routing,
    render_error,
    wants_usage,
    with_usage,
)
from extproc.errors import BadRequest, TollgateError
from extproc.limits import MAX_CHOICES, MAX_TOKENS
from extproc.records import Answer, Call, Piece, Usage

CAP_FIELDS = ("max_completion_tokens", "max_tokens")

# The fields that decide what a call costs.
# fmt: off
_CALL_FIELDS = Names((
    "model", "messages", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens", "tools", "tool_choice",
    "functions", "function_call", "response_format", "prediction", "modalities", "audio", "service_tier",
    "web_search_options",
))
# fmt: on
_THINKING_FIELDS = (
    "reasoning_effort",
    "reasoning",
    "include_reasoning",
    "thinking",
    "enable_thinking",
    "thinking_budget",
    "chat_template_kwargs",
)
_NO_THOUGHTS: tuple[object, ...] = (
    None,
    False,
    "none",
    {},
    {"effort": "none"},
    {"enabled": False},
    {"type": "disabled"},
    {"enable_thinking": False},
    {"thinking": False},
)

PLAIN_FIELDS = frozenset(
    ("id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier", "obfuscation")
)

_DONE = Piece(done=True)
_NOTHING = Piece()


@mypyc_attr(allow_interpreted_subclasses=True)
class OpenAIChatCalls:
    """What the gate asks of the dialect. Stateless."""

    name = "openai-chat"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest in OpenAI's words and codes, naming the field in `param`."""
        _CALL_FIELDS.refuse_misspelt(body)
        refuse_routing(body)
        _refuse_deferred(body)
        model = model_name(body)
        stream = optional(body, "stream", bool) or False
        prompt = read_prompt(body, model)
        return Call(
            model=model,
            stream=stream,
            wants_usage=wants_usage(body, stream),
            choices=positive(body, "n", at_most=MAX_CHOICES) or 1,
            cap=read_cap(body),
            prompt_texts=tuple(prompt.texts),
            prompt_extra=prompt.extra,
            service_tier=optional(body, "service_tier", str),
            web_searches=int(_searches_web(body, model)),
            body=body,
            thinks=_thinks(body),
            unseen="audio" in (optional(body, "modalities", list) or ()),
            teaches=body.get("prediction") is None,  # what was predicted in vain is billed and not shown
        )

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """The call as a provider gets it. `cap` is the bound on output tokens of each choice, or None for no bound.

        The cap goes where the caller put its own, else into `max_completion_tokens`: reasoning models refuse
        `max_tokens`.
        """
        body = call.body
        changes: dict[str, object] = {} if model == call.model else {"model": model}
        if cap is not None:
            given = [name for name in CAP_FIELDS if body.get(name) is not None] or CAP_FIELDS[:1]
            changes |= {name: cap for name in given if body.get(name) != cap}
        if call.stream and not call.wants_usage:
            changes["stream_options"] = with_usage(body, raw)
        return spliced(raw, changes) if changes else raw

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """Every event speaks for itself."""
        return self.read_event

    def read_event(self, data: bytes) -> Piece:
        """What one event says. Data that is not understood is an empty Piece."""
        event = parse(data)
        if not isinstance(event, dict):
            return _DONE if data.strip() == b"[DONE]" else _NOTHING
        if (plain := _plain_delta(event)) is not None:
            return plain
        texts: list[str] = []
        started: list[int] = []
        finished: list[int] = []
        unseen = False
        choices = dicts(event.get("choices"))
        for choice in choices:
            index = choice.get("index")
            started.append(index if isinstance(index, int) else 0)
            if choice.get("finish_reason"):
                finished.append(started[-1])
            delta = choice.get("delta")
            if isinstance(delta, dict):
                _add_texts(delta, texts)
                unseen = unseen or bool(delta.get("tool_calls") or delta.get("function_call"))
        usage = usage_of(event)
        error = is_error(event)
        return Piece(
            texts=tuple(texts),
            usage=usage,
            usage_only=usage is not None and not choices and not error,
            started=tuple(started),
            finished=tuple(finished),
            error=error,
            unseen=unseen,
            service_tier=service_tier_of(event),
        )

    def read_answer(self, body: bytes) -> Answer:
        """What a whole answer says. Raises ValueError where it is not one, an error with status 200 included."""
        answer = parse(body)
        if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
            raise ValueError("not a chat completion")
        texts: list[str] = []
        for choice in dicts(answer["choices"]):
            message = choice.get("message")
            if isinstance(message, dict):
                _add_texts(message, texts)
        return Answer(tuple(texts), usage_of(answer), service_tier_of(answer))

    def render_error(self, error: TollgateError) -> bytes:
        """The body that OpenAI's clients turn into their own exceptions, by the HTTP status."""
        return render_error(error)

    def render_error_event(self, error: TollgateError) -> bytes:
        """An event for which OpenAI's clients raise APIError in the middle of a stream."""
        return b"data: " + self.render_error(error) + b"\n\n"


def _plain_delta(event: dict[str, Any]) -> Piece | None:
    """Nearly every event of a stream: one choice, a piece of text, nothing else that counts. None for any other."""
    choices = event.get("choices")
    if type(choices) is not list or len(choices) != 1 or event.get("usage") or not PLAIN_FIELDS.issuperset(event):
        return None
    choice = choices[0]
    if type(choice) is not dict or choice.get("finish_reason") or choice.get("usage"):
        return None
    index, delta = choice.get("index"), choice.get("delta")
    if type(index) is not int or type(delta) is not dict or len(delta) != 1:
        return None
    text, tier = delta.get("content"), event.get("service_tier")
    if type(text) is not str:
        return None
    return Piece(
        (text,) if text else (), None, False, (index,), service_tier=tier if type(tier) is str and tier else None
    )


# Requests -------------------------------------------------------------------------------------------------------------


def read_cap(body: Mapping[str, Any]) -> int | None:
    """The caller's bound on the output tokens of each choice."""
    caps = {cap for name in CAP_FIELDS if (cap := positive(body, name, at_most=MAX_TOKENS)) is not None}
    if len(caps) > 1:
        problem = "Setting 'max_tokens' and 'max_completion_tokens' to different values is not supported."
        raise BadRequest(problem, code="invalid_parameter_combination", param="max_tokens")
    return caps.pop() if caps else None


def _thinks(body: Mapping[str, Any]) -> bool | None:
    """Whether thoughts are asked for, which may be hidden (OpenRouter's `exclude`). None: the model's own way.

    Providers have a word each: OpenAI and others an effort, OpenRouter, DeepSeek and Anthropic an object, Qwen a
    switch, vLLM and Together what a chat's template knows. No word is taken for a promise that there are none.
    """
    return True if any(body.get(name) not in _NO_THOUGHTS for name in _THINKING_FIELDS) else None


def _refuse_deferred(body: Mapping[str, Any]) -> None:
    """xAI's answers that are fetched later would be written, and billed, past the meter."""
    if body.get("deferred"):
        message = "Unsupported parameter: 'deferred'. An answer comes with its call, or not at all."
        raise BadRequest(message, code="unsupported_parameter", param="deferred")


def _searches_web(body: Mapping[str, Any], model: str) -> bool:
    """Whether a search may be billed: asked for, offered as a tool, or part of the model's name.

    OpenAI's `…-search-preview` always search, and so does any model of OpenRouter's with `:online` behind its name.
    """
    asked = optional(body, "web_search_options", dict) is not None
    offered = any("search" in str(tool.get("type")) for tool in body.get("tools") or ())
    return asked or offered or "-search" in model or model.endswith(":online")


# Answers --------------------------------------------------------------------------------------------------------------


def service_tier_of(event: dict[str, Any]) -> str | None:
    """Mistral names it beside its figures."""
    tier = event.get("service_tier")
    if tier is None and isinstance(usage := event.get("usage"), dict):
        tier = usage.get("service_tier")
    return tier if isinstance(tier, str) and tier else None


def is_error(event: dict[str, Any]) -> bool:
    """Whether an event, or a body, is an error. vLLM's older ones are not nested."""
    return bool(event.get("error")) or (event.get("object") == "error" and "choices" not in event)


def _add_text(value: object, texts: list[str]) -> bool:
    if isinstance(value, str) and value:
        texts.append(value)
        return True
    return False


def _add_texts(message: dict[str, Any], texts: list[str]) -> None:
    """All of a delta or message that is billed as output."""
    content = message.get("content")
    if _add_text(content, texts) and len(message) == 1:  # most deltas
        return
    if isinstance(content, list):
        _add_parts(content, texts)
    _add_text(message.get("refusal"), texts)
    _add_reasoning(message, texts)
    for call in dicts(message.get("tool_calls")):
        _add_function(call.get("function"), "arguments", texts)
        _add_function(call.get("custom"), "input", texts)
    _add_function(message.get("function_call"), "arguments", texts)
    audio = message.get("audio")
    if isinstance(audio, dict):
        _add_text(audio.get("transcript"), texts)


def _add_parts(parts: list[Any], texts: list[str]) -> None:
    """Mistral's reasoning models answer in parts: `text`, and `thinking` with parts of its own."""
    for part in dicts(parts):
        _add_text(part.get("text"), texts)
        for thought in dicts(part.get("thinking")):
            _add_text(thought.get("text"), texts)


def _add_reasoning(message: dict[str, Any], texts: list[str]) -> None:
    """Providers that send reasoning under two names send the same text twice: the first that is there counts."""
    if _add_text(message.get("reasoning_content"), texts) or _add_text(message.get("reasoning"), texts):
        return
    for detail in dicts(message.get("reasoning_details")):
        _add_text(detail.get("text"), texts)
        _add_text(detail.get("summary"), texts)


def _add_function(function: object, payload: str, texts: list[str]) -> None:
    if isinstance(function, dict):
        _add_text(function.get("name"), texts)
        _add_text(function.get(payload), texts)


def usage_of(event: dict[str, Any]) -> Usage | None:
    """The provider's figures, if both are there. Groq puts them under `x_groq` as well, or only."""
    usage = event.get("usage")
    if not isinstance(usage, dict):
        groq = event.get("x_groq")
        usage = groq.get("usage") if isinstance(groq, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt, completion = count(usage, "prompt_tokens"), count(usage, "completion_tokens")
    if prompt is None or completion is None:
        return None
    return _billed(usage, prompt, completion)


def _billed(usage: dict[str, Any], prompt: int, completion: int) -> Usage:
    """What is billed, which the two figures do not always hold.

    Where `total_tokens` is more than their sum, something was left out of them: the reasoning (xAI), the prompt's
    audio (Mistral), or reasoning that is not named at all (Gemini). More reasoning than completion was left out of
    both (Vercel's gateway, by the cost that it states).
    """
    prompt_details = _details(usage, "prompt_tokens_details")
    completion_details = _details(usage, "completion_tokens_details")
    reasoning = count(completion_details, "reasoning_tokens") or 0
    audio_prompt = count(prompt_details, "audio_tokens") or 0
    left_out = max(0, (count(usage, "total_tokens") or 0) - prompt - completion)
    if left_out and left_out == audio_prompt:
        prompt += left_out
    elif left_out:
        completion += left_out
        reasoning = max(reasoning, left_out)
    if reasoning > completion:
        completion += reasoning
    cached = min(_cached(usage, prompt_details), prompt)
    return Usage(
        prompt=prompt,
        completion=completion,
        cached_prompt=cached,
        reasoning=reasoning,
        audio_prompt=min(audio_prompt, prompt),
        audio_completion=min(count(completion_details, "audio_tokens") or 0, completion),
        cache_write_prompt=min(_cache_written(usage, prompt_details), prompt - cached),
        web_searches=count(_details(usage, "server_tool_use_details"), "web_search_requests"),
    )


def _cached(usage: dict[str, Any], prompt_details: dict[str, Any]) -> int:
    """Together and Moonshot name them at the top, DeepSeek's older answers by another name."""
    for cached in (
        count(prompt_details, "cached_tokens"),
        count(usage, "cached_tokens"),
        count(usage, "prompt_cache_hit_tokens"),
    ):
        if cached is not None:
            return cached
    return 0


def _cache_written(usage: dict[str, Any], prompt_details: dict[str, Any]) -> int:
    """OpenRouter's name, or Anthropic's, which Doubleword gives as well."""
    written = count(prompt_details, "cache_write_tokens")
    return written if written is not None else count(usage, "cache_creation_input_tokens") or 0


def _details(usage: dict[str, Any], name: str) -> dict[str, Any]:
    details = usage.get(name)
    return details if isinstance(details, dict) else {}
