"""OpenAI's Responses, which some other providers speak too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc import form
from extproc.dialects import openai_parts
from extproc.dialects.dialect import NO_ADDRESS, Address, Seed, StreamReader, StreamWriter
from extproc.dialects.openai_responses.answers import read_response, write_response
from extproc.dialects.openai_responses.calls import OpenAIResponsesCalls
from extproc.dialects.openai_responses.request_reader import read_request
from extproc.dialects.openai_responses.request_writer import write_request
from extproc.dialects.openai_responses.stream_reader import ResponseReader
from extproc.dialects.openai_responses.stream_writer import ResponseWriter
from extproc.errors import ProviderError
from extproc.form import Feature

__all__ = ["OpenAIResponses"]

# fmt: off
_CANNOT = frozenset((
    Feature.CHOICES, Feature.TOP_K, Feature.STOP, Feature.SEED, Feature.PRESENCE_PENALTY, Feature.FREQUENCY_PENALTY,
    Feature.LOGIT_BIAS, Feature.AUDIO,
))
# fmt: on
_FIELDS = {feature: feature.value for feature in Feature} | {
    Feature.CHOICES: "n",
    Feature.LOGPROBS: "top_logprobs",
    Feature.JSON_MODE: "text.format",
    Feature.JSON_SCHEMA: "text.format",
    Feature.IMAGE: "input",
    Feature.IMAGE_URL: "input",
    Feature.DOCUMENT: "input",
    Feature.DOCUMENT_URL: "input",
    Feature.AUDIO: "input",
    Feature.TOOL_RESULT_MEDIA: "input",
}


class OpenAIResponses(OpenAIResponsesCalls):
    """A `dialect.ChatDialect`. Stateless."""

    cannot: frozenset[Feature] = _CANNOT
    calls_come_whole = False
    fields: Mapping[Feature, str] = _FIELDS

    def read_request(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> form.Request:
        """A request that `read_call` has accepted. Raises BadRequest for what cannot be read, naming the field."""
        return read_request(body)

    def write_request(self, request: form.Request, model: str, cap: int | None) -> bytes:
        """The body for a provider, which is to store nothing."""
        return write_request(request, model, cap)

    def read_whole(self, body: bytes, seed: Seed) -> form.Answer:
        """A provider's whole answer. Raises ValueError where it is none, or says that it failed."""
        answer = read_response(body)
        if answer.choices[0].finish is form.Finish.ERROR:
            raise ValueError("a response that failed")
        return answer

    def write_whole(self, answer: form.Answer, seed: Seed) -> bytes:
        """The body for a caller."""
        return write_response(answer, seed)

    def read_error(self, status: int, body: bytes) -> ProviderError:
        """A provider's error, in whatever form."""
        return openai_parts.read_error(status, body)

    def stream_reader(self, seed: Seed) -> StreamReader:
        """A reader for one stream."""
        return ResponseReader()

    def stream_writer(self, seed: Seed) -> StreamWriter:
        """A writer for one stream."""
        return ResponseWriter(seed)
