"""OpenAI's embeddings (`POST /v1/embeddings`), which most providers of embeddings speak. Native only, never a stream.

Requests and answers: https://platform.openai.com/docs/api-reference/embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from extproc.dialects import openai_parts
from extproc.dialects.dialect import NO_ADDRESS, Address
from extproc.dialects.fields import Names, count, invalid, optional, spliced
from extproc.dialects.openai_parts import model_name, prompt_for, read_inputs, refuse_routing
from extproc.errors import TollgateError
from extproc.records import Answer, Call, Piece, Usage

INPUT_TOKENS = 3  # of each text, besides its own: a beginning and an end, where a model marks them

# The fields that decide what a call costs.
_CALL_FIELDS = Names(("model", "input", "stream", "service_tier"))
_NOTHING = Piece()


class _Vectors(msgspec.Struct):
    """An answer without its numbers, of which there may be millions."""

    data: msgspec.Raw
    usage: Any = None


_ANSWER = msgspec.json.Decoder(_Vectors)


class OpenAIEmbeddings:
    """What the gate asks of the dialect. Stateless."""

    name = "openai-embeddings"

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest in OpenAI's words and codes, naming the field in `param`."""
        _CALL_FIELDS.refuse_misspelt(body)
        refuse_routing(body)
        if optional(body, "stream", bool):
            raise invalid("stream", "embeddings do not stream")
        model = model_name(body)
        prompt = prompt_for(model)
        inputs = read_inputs(body, "input", prompt)
        return Call(
            model=model,
            stream=False,
            wants_usage=True,  # it is part of every answer
            choices=1,
            cap=1,  # nothing is written
            prompt_texts=tuple(prompt.texts),
            prompt_extra=prompt.extra + INPUT_TOKENS * inputs,
            service_tier=optional(body, "service_tier", str),
            web_searches=0,
            body=body,
            thinks=False,
        )

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """The call as a provider gets it: there is no answer to bound."""
        return raw if model == call.model else spliced(raw, {"model": model})

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """Embeddings do not stream."""
        return lambda data: _NOTHING

    def read_answer(self, body: bytes) -> Answer:
        """What they cost. Raises ValueError where they are none."""
        answer = _ANSWER.decode(body)
        if not bytes(answer.data).startswith(b"["):
            raise ValueError("not a list of embeddings")
        figures = answer.usage if isinstance(answer.usage, dict) else {}
        prompt = count(figures, "prompt_tokens")
        if prompt is None:  # Voyage gives the total only
            prompt = count(figures, "total_tokens")
        return Answer((), None if prompt is None else Usage(prompt, 0))

    def render_error(self, error: TollgateError) -> bytes:
        """The body that OpenAI's clients turn into their own exceptions, by the HTTP status."""
        return openai_parts.render_error(error)

    def render_error_event(self, error: TollgateError) -> bytes:
        """As above: there are no events."""
        return b"data: " + openai_parts.render_error(error) + b"\n\n"
