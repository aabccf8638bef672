"""What the gate asks of Anthropic's messages (`POST /v1/messages`) and of the counting of their tokens.

Requests and answers: https://platform.claude.com/docs/en/api/messages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mypy_extensions import mypyc_attr

from extproc.dialects import pieces
from extproc.dialects.anthropic.answers import read_message
from extproc.dialects.anthropic.errors import render_error, render_error_event
from extproc.dialects.anthropic.prompts import read_prompt, web_searches
from extproc.dialects.anthropic.stream_reader import MessageReader
from extproc.dialects.anthropic.thinking import MIN_BUDGET_TOKENS
from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.dialects.fields import Names, count, invalid, missing, optional, parse, spliced
from extproc.dialects.openai_parts import model_name, refuse_routing
from extproc.errors import TollgateError
from extproc.limits import MAX_TOKENS
from extproc.records import Answer, Call, Piece, Usage

# The fields that decide what a call costs.
# fmt: off
_CALL_FIELDS = Names((
    "model", "messages", "system", "max_tokens", "stream", "tools", "tool_choice", "thinking", "output_config",
    "output_format", "mcp_servers", "service_tier", "speed", "inference_geo", "container", "context_management",
))
# fmt: on
_THINKING_FIELDS = Names(("type", "budget_tokens", "display"))
_THINKS = {"enabled": True, "adaptive": True, "between_tools": True, "disabled": False}
_NOTHING = Piece()


@mypyc_attr(allow_interpreted_subclasses=True)
class AnthropicCalls:
    """The gate's half of the dialect. Stateless."""

    name = "anthropic-messages"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest, naming the field in `param`."""
        if "max_tokens" not in body:
            raise missing("max_tokens")
        return _call(body, stream=optional(body, "stream", bool) or False, cap=_cap(body))

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """The call as a provider gets it. `cap` lowers the caller's own bound, and the thoughts' with it."""
        changes: dict[str, object] = {} if model == call.model else {"model": model}
        if cap is not None and cap < (call.cap or 0):
            changes["max_tokens"] = cap
            thinking = call.body.get("thinking") or {}
            budget_tokens = thinking.get("budget_tokens")
            if budget_tokens is not None and budget_tokens >= cap:
                changes["thinking"] = _fewer_thoughts(thinking, cap)
        return spliced(raw, changes) if changes else raw

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """For one stream."""
        return pieces.piece_reader(MessageReader())

    def read_answer(self, body: bytes) -> Answer:
        """What a whole answer says. Raises ValueError where it is not one."""
        return pieces.answer(read_message(body))

    def render_error(self, error: TollgateError) -> bytes:
        """A JSON error body that Anthropic's clients read."""
        return render_error(error)

    def render_error_event(self, error: TollgateError) -> bytes:
        """The same as one event of a stream."""
        return render_error_event(error)


class AnthropicCountTokens(AnthropicCalls):
    """`POST /v1/messages/count_tokens`: the same body without a bound. Counting is free, so that nothing is held."""

    name = "anthropic-count-tokens"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest, naming the field in `param`."""
        return _call(body, stream=False, cap=1, billed=False)

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """The call as a provider gets it: there is no answer to bound."""
        return raw if model == call.model else spliced(raw, {"model": model})

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """Counts do not stream."""
        return lambda data: _NOTHING

    def read_answer(self, body: bytes) -> Answer:
        """A count, which costs nothing. Raises ValueError where it is none."""
        answer = parse(body)
        if not isinstance(answer, dict) or count(answer, "input_tokens") is None:
            raise ValueError("not a count of tokens")
        return Answer((), Usage(0, 0))


def _call(body: Mapping[str, Any], *, stream: bool, cap: int, billed: bool = True) -> Call:
    _CALL_FIELDS.refuse_misspelt(body)
    refuse_routing(body)
    prompt = read_prompt(body)
    return Call(
        model=model_name(body),
        stream=stream,
        wants_usage=True,  # it is part of every answer
        choices=1,
        cap=cap,
        prompt_texts=tuple(prompt.texts) if billed else (),
        prompt_extra=prompt.extra if billed else 0,
        service_tier=_service_tier(body),
        web_searches=web_searches(body) if billed else 0,
        body=body,
        thinks=_thinks(body),
        billed=billed,
    )


def _cap(body: Mapping[str, Any]) -> int:
    """The bound on output tokens, thoughts included. 0 asks for nothing but to have the prompt cached."""
    cap: int | None = optional(body, "max_tokens", int)
    if cap is None or cap < 0:
        raise invalid("max_tokens", "expected an integer of at least 0", "integer_below_min_value")
    if cap > MAX_TOKENS:
        raise invalid("max_tokens", f"expected an integer of at most {MAX_TOKENS}", "integer_above_max_value")
    return max(1, cap)


def _service_tier(body: Mapping[str, Any]) -> str | None:
    """What the answer may be priced by: `fast` costs a multiple, `standard_only` is the standard."""
    tier: str | None = optional(body, "service_tier", str)
    speed: str | None = optional(body, "speed", str)
    if speed not in (None, "standard"):
        return speed
    return None if tier == "standard_only" else tier


def _thinks(body: Mapping[str, Any]) -> bool | None:
    """Whether thoughts are asked for, of which no more than a summary is shown. None: the model's own way."""
    thinking = optional(body, "thinking", dict)
    if thinking is None:
        return None
    _THINKING_FIELDS.refuse_misspelt(thinking, "thinking.")
    optional(thinking, "budget_tokens", int, "thinking.")
    return _THINKS.get(optional(thinking, "type", str, "thinking.") or "", True)


def _fewer_thoughts(thinking: Mapping[str, Any], cap: int) -> dict[str, Any]:
    """Thoughts that end before the answer must. Below the least that Anthropic accepts there are none."""
    if cap <= MIN_BUDGET_TOKENS:
        return {"type": "disabled"}
    return {**thinking, "budget_tokens": cap - 1}
