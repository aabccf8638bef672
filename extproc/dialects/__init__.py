"""The seam between the gateway and an API's form. A dialect is one file and one line in `DIALECTS`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol

from extproc.dialects.openai import OpenAIChat
from extproc.errors import TollgateError
from extproc.records import Answer, Call, Piece


class Dialect(Protocol):
    """One API's requests, answers, streams and errors. Pure: bytes and values in, bytes and values out."""

    def read_call(self, body: Mapping[str, Any]) -> Call:
        """Check a parsed request. Raises BadRequest, naming the field in `param`."""

    def upstream_body(self, call: Call, model: str, cap: int | None) -> bytes:
        """The body for a provider of this dialect: its own model name, the clamped cap, usage reporting forced."""

    def read_event(self, data: bytes) -> Piece:
        """What the data of one event says. Data that is not understood is an empty Piece, never an exception."""

    def read_answer(self, body: bytes) -> Answer:
        """What a whole answer says. Raises ValueError where it is not an answer of this dialect."""

    def render_error(self, error: TollgateError) -> bytes:
        """A JSON error body that the dialect's official client reads."""

    def render_error_event(self, error: TollgateError) -> bytes:
        """The same as one event of a stream, its closing blank line included."""


# By exact path: what is not here is not served.
DIALECTS: Mapping[str, Dialect] = MappingProxyType({"/v1/chat/completions": OpenAIChat()})

SPOKEN = frozenset({"openai"})  # the providers that are called in one of them
