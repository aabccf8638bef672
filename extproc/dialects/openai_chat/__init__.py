"""OpenAI's chat completions, which most other providers speak too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc import form
from extproc.dialects import openai_parts
from extproc.dialects.dialect import NO_ADDRESS, Address, Seed
from extproc.dialects.openai_chat import answers, request_reader, request_writer
from extproc.dialects.openai_chat.calls import OpenAIChatCalls
from extproc.dialects.openai_chat.stream_reader import ChatStreamReader
from extproc.dialects.openai_chat.stream_writer import ChatStreamWriter
from extproc.errors import ProviderError

__all__ = ["OpenAIChat"]


class OpenAIChat(OpenAIChatCalls):
    """The dialect: `ChatDialect`. Stateless."""

    cannot = request_reader.CANNOT
    fields = request_reader.FIELDS
    calls_come_whole = False

    def read_request(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> form.Request:
        return request_reader.read_request(body)

    def write_request(self, request: form.Request, model: str, cap: int | None) -> bytes:
        return request_writer.write_request(request, model, cap)

    def read_whole(self, body: bytes, seed: Seed) -> form.Answer:
        return answers.read_whole(body, seed)

    def write_whole(self, answer: form.Answer, seed: Seed) -> bytes:
        return answers.write_whole(answer, seed)

    def read_error(self, status: int, body: bytes) -> ProviderError:
        return openai_parts.read_error(status, body)

    def stream_reader(self, seed: Seed) -> ChatStreamReader:
        return ChatStreamReader(seed)

    def stream_writer(self, seed: Seed) -> ChatStreamWriter:
        return ChatStreamWriter(seed)
