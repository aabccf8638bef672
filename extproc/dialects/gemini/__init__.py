"""Gemini's generateContent, of the Gemini API and of Vertex AI, and its counting of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc import form
from extproc.dialects.dialect import NO_ADDRESS, Address, Seed
from extproc.dialects.gemini import answers, errors, request_reader, request_writer
from extproc.dialects.gemini.calls import GeminiCalls, GeminiCountTokens
from extproc.dialects.gemini.stream_reader import StreamReader
from extproc.dialects.gemini.stream_writer import StreamWriter
from extproc.errors import ProviderError

__all__ = ["GeminiCountTokens", "GeminiGenerate"]


class GeminiGenerate(GeminiCalls):
    """`ChatDialect` for Gemini. Stateless."""

    cannot = request_reader.CANNOT
    fields = request_reader.FIELDS
    calls_come_whole = True

    def read_request(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> form.Request:
        return request_reader.read_request(body, address)

    def write_request(self, request: form.Request, model: str, cap: int | None) -> bytes:
        return request_writer.write_request(request, model, cap)

    def read_whole(self, body: bytes, seed: Seed) -> form.Answer:
        return answers.read_whole(body, seed.request_id)

    def write_whole(self, answer: form.Answer, seed: Seed) -> bytes:
        return answers.write_whole(answer, seed)

    def read_error(self, status: int, body: bytes) -> ProviderError:
        return errors.read(status, body)

    def stream_reader(self, seed: Seed) -> StreamReader:
        return StreamReader(seed.request_id)

    def stream_writer(self, seed: Seed) -> StreamWriter:
        return StreamWriter(seed)
