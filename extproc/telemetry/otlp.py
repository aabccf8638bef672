"""OpenTelemetry's traces and metrics, by its conventions for generative AI, over OTLP/HTTP.

https://github.com/open-telemetry/semantic-conventions-genai (gen-ai-spans.md, gen-ai-metrics.md). Nothing of a prompt
or an answer is in them. The SDK exports from threads of its own, with bounded queues, and heeds the standard variables
(OTEL_EXPORTER_OTLP_*, OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_TRACES_SAMPLER, OTEL_BSP_*).

Only imported where OTEL_EXPORTER_OTLP_ENDPOINT is set.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit
from uuid import uuid4

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import IdGenerator
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from extproc.limits import MAX_OPEN_SPANS, OTLP_FLUSH_S
from extproc.records import Outcome, UsageRecord
from extproc.tracing import SAMPLED, TraceContext

_SCOPE = "tollgate"

# The conventions' names of operations, by the caller's dialect. What is not here is no inference, and has no span.
_OPERATIONS = {
    "openai-chat": "chat",
    "openai-responses": "chat",
    "openai-completions": "text_completion",
    "openai-embeddings": "embeddings",
    "anthropic-messages": "chat",
    "gemini-generate": "generate_content",
}

# The conventions' names of providers, where they are not ours.
_PROVIDERS = {
    "gemini": "gcp.gemini",
    "vertex": "gcp.vertex_ai",
    "vertex-anthropic": "gcp.vertex_ai",
    "azure": "azure.ai.openai",
    "mistral": "mistral_ai",
    "xai": "x_ai",
}

_SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_TOKENS = tuple(4**power for power in range(14))

_ENDED_WELL = (Outcome.OK, Outcome.CACHE_EXACT, Outcome.CACHE_SEMANTIC)

Attributes = dict[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class _Open:
    """A request under way: the caller's span, if it named one, its own, and what it asks for."""

    parent: TraceContext | None
    own: TraceContext
    operation: str


class Otlp:
    """One span and a few measurements for each request that asks for inference, made once it has ended.

    `base_urls` say where each provider is. `random_bits(n)` is an integer of n random bits.
    """

    def __init__(self, base_urls: Mapping[str, str], random_bits: Callable[[int], int]) -> None:
        self._addresses = {name: _address(url) for name, url in base_urls.items()}
        self._random_bits = random_bits
        self._open: dict[str, _Open] = {}
        self._ids = _Ids()
        resource = _resource()
        self._traces = TracerProvider(resource=resource, id_generator=self._ids, shutdown_on_exit=False)
        self._traces.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._traces.get_tracer(_SCOPE)
        reader = PeriodicExportingMetricReader(OTLPMetricExporter())
        self._metrics = MeterProvider([reader], resource, shutdown_on_exit=False)
        meter = self._metrics.get_meter(_SCOPE)
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "GenAI operation duration.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._first_chunk = meter.create_histogram(
            "gen_ai.client.operation.time_to_first_chunk",
            "s",
            "Time to receive the first chunk.",
            explicit_bucket_boundaries_advisory=_SECONDS,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=_TOKENS,
        )

    def begin(self, request_id: str, parent: TraceContext | None, dialect: str) -> TraceContext | None:
        """The span of a request that has begun: of the caller's trace, or of a new one. None for no inference.

        The SDK's sampler decides now, since the provider is told; by default as the caller did.
        """
        operation = _OPERATIONS.get(dialect)
        if operation is None:
            return None
        trace_id = parent.trace_id if parent else f"{self._id(128):032x}"
        sampled = self._traces.sampler.should_sample(_under(parent), int(trace_id, 16), operation, SpanKind.CLIENT)
        flags = (parent.flags if parent else 0) & ~SAMPLED
        if sampled.decision is Decision.RECORD_AND_SAMPLE:
            flags |= SAMPLED
        own = TraceContext(trace_id, f"{self._id(64):016x}", flags)
        self._open[request_id] = _Open(parent, own, operation)
        if len(self._open) > MAX_OPEN_SPANS:  # the oldest, of which something went wrong
            del self._open[next(iter(self._open))]
        return own

    def record(self, record: UsageRecord) -> None:
        """End the request's span, and measure it."""
        request = self._open.pop(record.request_id, None)
        if request is None:
            return
        common = self._common(record, request.operation)
        self._span(record, request, common)
        self._measure(record, common)

    def close(self) -> None:
        """Export what is left, for at most OTLP_FLUSH_S: a collector that cannot be reached holds nothing up."""
        ends = (self._traces.shutdown, self._metrics.shutdown)
        threads = [threading.Thread(target=end, name="otlp-flush", daemon=True) for end in ends]
        for thread in threads:
            thread.start()
        deadline_s = time.monotonic() + OTLP_FLUSH_S
        for thread in threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def _id(self, bits: int) -> int:
        """Never zero, which would be no id."""
        return self._random_bits(bits) or 1

    def _common(self, record: UsageRecord, operation: str) -> Attributes:
        """What spans and measurements both have."""
        common: Attributes = {"gen_ai.operation.name": operation}
        if record.requested_model is not None:
            common["gen_ai.request.model"] = record.requested_model
        if record.provider is not None:
            common["gen_ai.provider.name"] = _PROVIDERS.get(record.provider, record.provider)
            common["server.address"], common["server.port"] = self._addresses[record.provider]
        if record.model is not None and record.attempts:
            common["gen_ai.response.model"] = record.model
        if record.outcome not in _ENDED_WELL:
            common["error.type"] = _error_type(record)
        return common

    def _span(self, record: UsageRecord, request: _Open, common: Attributes) -> None:
        start_ns = int(datetime.fromisoformat(record.ts).timestamp() * 1000) * 1_000_000
        self._ids.give(request.own)
        span = self._tracer.start_span(
            " ".join(filter(None, (request.operation, record.requested_model))),
            _under(request.parent),
            SpanKind.CLIENT,
            {**common, **_of_record(record)},
            start_time=start_ns,
        )
        if record.outcome not in _ENDED_WELL:
            span.set_status(Status(StatusCode.ERROR))
        span.end(start_ns + record.duration_ms * 1_000_000)

    def _measure(self, record: UsageRecord, common: Attributes) -> None:
        self._duration.record(record.duration_ms / 1000, common)
        of_answer = {name: value for name, value in common.items() if name != "error.type"}
        if record.stream and record.ttft_ms is not None:
            self._first_chunk.record(record.ttft_ms / 1000, of_answer)
        for kind, tokens in (("input", record.prompt_tokens), ("output", record.completion_tokens)):
            if tokens:
                self._tokens.record(tokens, {**of_answer, "gen_ai.token.type": kind})


class _Ids(IdGenerator):
    """Gives the SDK the ids that the provider was told, when the span is made."""

    def give(self, own: TraceContext) -> None:
        self._own = own

    def generate_trace_id(self) -> int:
        return int(self._own.trace_id, 16)

    def generate_span_id(self) -> int:
        return int(self._own.span_id, 16)


def _resource() -> Resource:
    """As OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say. Each worker is an instance: its counts are its own."""
    said = Resource.create()
    ours = {SERVICE_INSTANCE_ID: str(uuid4())}
    if str(said.attributes[SERVICE_NAME]).startswith("unknown_service"):
        ours[SERVICE_NAME] = "tollgate"
    return said.merge(Resource(ours))


def _under(parent: TraceContext | None) -> Context:
    """The SDK's context of what happens under a caller's span, or of what begins a trace."""
    if parent is None:
        return Context()
    of = SpanContext(int(parent.trace_id, 16), int(parent.span_id, 16), True, TraceFlags(parent.flags))
    return set_span_in_context(NonRecordingSpan(of), Context())


def _address(base_url: str) -> tuple[str, int]:
    url = urlsplit(base_url)
    return url.hostname or "", url.port or (443 if url.scheme == "https" else 80)


def _error_type(record: UsageRecord) -> str:
    """The status that the caller got, if it says so, else how an answer that had begun ended."""
    return str(record.status) if record.status >= 400 else record.outcome.value


def _of_record(record: UsageRecord) -> Attributes:
    """What only spans have: they may have as many values as there are requests."""
    attributes: Attributes = {
        "tollgate.request_id": record.request_id,
        "tollgate.outcome": record.outcome.value,
        "tollgate.status": record.status,
        "tollgate.attempts": record.attempts,
        "tollgate.cost_nanousd": record.cost_nanousd,
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
    }
    optional = {
        "gen_ai.request.stream": record.stream or None,
        "gen_ai.response.time_to_first_chunk": record.ttft_ms / 1000 if record.stream and record.ttft_ms else None,
        "gen_ai.usage.cache_read.input_tokens": record.cached_prompt_tokens or None,
        "gen_ai.usage.reasoning.output_tokens": record.reasoning_tokens or None,
        "tollgate.budget_id": record.budget_id,
        "tollgate.service": record.service,
        "tollgate.team": record.team,
    }
    return attributes | {name: value for name, value in optional.items() if value is not None}
