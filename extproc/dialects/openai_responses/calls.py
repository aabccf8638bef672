"""What the gate asks of OpenAI's Responses (`POST /v1/responses`), and of what speaks the same form elsewhere.

Requests and answers: https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from mypy_extensions import mypyc_attr

from extproc.dialects import openai_parts, pieces
from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.dialects.fields import Names, invalid, members, optional, positive, spliced
from extproc.dialects.openai_parts import model_name, refuse_routing
from extproc.dialects.openai_responses.answers import read_response
from extproc.dialects.openai_responses.errors import error_event
from extproc.dialects.openai_responses.prompts import read_prompt, server_tool_calls, web_searches
from extproc.dialects.openai_responses.stream_reader import ResponseReader
from extproc.dialects.openai_responses.thoughts import is_foreign
from extproc.errors import TollgateError
from extproc.limits import MAX_TOKENS
from extproc.records import Answer, Call, Piece

# The fields that decide what a call costs.
# fmt: off
_CALL_FIELDS = Names((
    "model", "input", "instructions", "stream", "max_output_tokens", "max_tool_calls", "tools", "tool_choice", "text",
    "reasoning", "background", "previous_response_id", "conversation", "prompt", "service_tier",
))
# fmt: on
_REASONING_FIELDS = Names(("effort",))

# An answer of a background call is fetched later, from where it is not metered. Templates and conversations lie at the
# provider, and choose tools and models, or hold what others said.
_REFUSED = {
    "background": "answers in the background cannot be metered",
    "conversation": "conversations that are kept at the provider are not offered",
    "prompt": "prompts that are kept at the provider are not offered",
}

_ITEMS = msgspec.json.Decoder(list[msgspec.Raw])


@mypyc_attr(allow_interpreted_subclasses=True)
class OpenAIResponsesCalls:
    """The gate's half of the dialect. Stateless."""

    name = "openai-responses"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest in OpenAI's words and codes, naming the field in `param`."""
        _CALL_FIELDS.refuse_misspelt(body)
        refuse_routing(body)
        for name, why in _REFUSED.items():
            if body.get(name) not in (None, False):
                raise invalid(name, why, "unsupported_parameter")
        model = model_name(body)
        prompt = read_prompt(body, model)
        return Call(
            model=model,
            stream=optional(body, "stream", bool) or False,
            wants_usage=True,  # it is part of every answer
            choices=1,
            cap=positive(body, "max_output_tokens", at_most=MAX_TOKENS),
            prompt_texts=tuple(prompt.texts),
            prompt_extra=prompt.extra,
            service_tier=optional(body, "service_tier", str),
            web_searches=web_searches(body, model),
            body=body,
            thinks=_thinks(body),
        )

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """The call as a provider gets it. `cap` is the bound on output tokens, or None for no bound.

        The provider's own tools are bounded as they were held for. Thoughts of other providers, which an earlier turn
        was given in translation, are left out: they would be refused.
        """
        body = call.body
        changes: dict[str, object] = {} if model == call.model else {"model": model}
        if cap is not None and body.get("max_output_tokens") != cap:
            changes["max_output_tokens"] = cap
        if body.get("max_tool_calls") is None and (calls := server_tool_calls(body)):
            changes["max_tool_calls"] = calls
        given = body["input"]
        if isinstance(given, list) and any(map(is_foreign, given)):
            items = _ITEMS.decode(members(raw)["input"])
            own = [bytes(item) for item, value in zip(items, given, strict=True) if not is_foreign(value)]
            changes["input"] = b"[" + b",".join(own) + b"]"
        return spliced(raw, changes) if changes else raw

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """For one stream."""
        return pieces.piece_reader(ResponseReader())

    def read_answer(self, body: bytes) -> Answer:
        """What a whole answer says, one that failed included. Raises ValueError where it is not one."""
        return pieces.answer(read_response(body))

    def render_error(self, error: TollgateError) -> bytes:
        """The body that OpenAI's clients turn into their own exceptions, by the HTTP status."""
        return openai_parts.render_error(error)

    def render_error_event(self, error: TollgateError) -> bytes:
        """An event for which OpenAI's clients raise APIError in the middle of a stream."""
        return error_event(error, 0)


def _thinks(body: Mapping[str, Any]) -> bool | None:
    """Whether it asks for thoughts or for none. None: the model's own way, of which nothing may be seen."""
    reasoning = optional(body, "reasoning", dict)
    if reasoning is None:
        return None
    _REASONING_FIELDS.refuse_misspelt(reasoning, "reasoning.")
    effort = optional(reasoning, "effort", str, "reasoning.")
    if reasoning.get("max_tokens") or reasoning.get("enabled"):  # OpenRouter's
        return True
    return None if effort is None else effort != "none"
