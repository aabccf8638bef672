"""Anthropic's messages, which Vertex AI and Azure serve too, and the counting of their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from extproc.dialects.anthropic import answers, errors, request_reader, request_writer
from extproc.dialects.anthropic.calls import AnthropicCalls, AnthropicCountTokens
from extproc.dialects.anthropic.stream_reader import MessageReader
from extproc.dialects.anthropic.stream_writer import MessageWriter
from extproc.dialects.dialect import NO_ADDRESS, Address, Seed
from extproc.errors import ProviderError
from extproc.form import Answer, Feature, Request

__all__ = ["AnthropicCountTokens", "AnthropicMessages"]

_FIELDS: Mapping[Feature, str] = MappingProxyType(
    {
        Feature.TOP_K: "top_k",
        Feature.STOP: "stop_sequences",
        Feature.TOOL_SUBSET: "tool_choice",
        Feature.SERIAL_TOOL_CALLS: "tool_choice.disable_parallel_tool_use",
        Feature.JSON_SCHEMA: "output_config.format",
        Feature.REASONING: "thinking",
    }
)


class AnthropicMessages(AnthropicCalls):
    """`POST /v1/messages`, to and from the canonical form. Stateless."""

    cannot = request_writer.CANNOT
    calls_come_whole = False
    # Of the rest, what a caller of this dialect can ask for at all stands in the messages.
    fields: Mapping[Feature, str] = MappingProxyType({feature: _FIELDS.get(feature, "messages") for feature in Feature})

    def read_request(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Request:
        """A request that `read_call` has accepted. Raises BadRequest for what cannot be read, naming the field."""
        return request_reader.read_request(body)

    def write_request(self, request: Request, model: str, cap: int | None) -> bytes:
        """The body for a provider. Always bounded, since Anthropic demands it."""
        return request_writer.write_request(request, model, cap)

    def read_whole(self, body: bytes, seed: Seed) -> Answer:
        """A provider's whole answer. Raises ValueError where it is none."""
        return answers.read_message(body)

    def write_whole(self, answer: Answer, seed: Seed) -> bytes:
        """The body for a caller."""
        return answers.write_message(answer, seed)

    def read_error(self, status: int, body: bytes) -> ProviderError:
        """A provider's error, whatever its body is."""
        return errors.read_error(status, body)

    def stream_reader(self, seed: Seed) -> MessageReader:
        """A reader for one stream."""
        return MessageReader()

    def stream_writer(self, seed: Seed) -> MessageWriter:
        """A writer for one stream."""
        return MessageWriter(seed)
