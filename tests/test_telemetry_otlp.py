"""Spans and measurements by OpenTelemetry's conventions, as a collector reads them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
import pytest_asyncio

from extproc.local.http import Request, Response, serve
from extproc.records import Outcome
from extproc.telemetry.otlp import Otlp
from extproc.tracing import TraceContext
from tests.otlp_collector import Collector, attributes
from tests.test_telemetry_metrics import OK

CALLERS = TraceContext("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7", 1)
BASE_URLS = {"openai": "https://api.openai.com/v1", "gemini": "http://g:81/x", "vertex-anthropic": "https://v/y"}


@pytest_asyncio.fixture
async def collector(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Collector]:
    collector = Collector()
    await collector.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    await collector.close()


def otlp() -> Otlp:
    numbers = itertools.count(1)
    return Otlp(BASE_URLS, lambda _: next(numbers))


async def exported(collector: Collector, otlp: Otlp) -> list[tuple[Any, dict[str, Any]]]:
    await asyncio.to_thread(otlp.close)
    return [(span, attributes(span)) for span in collector.spans]


async def test_a_span_is_what_the_record_says(collector: Collector) -> None:
    telling = otlp()
    own = telling.begin("r", CALLERS, "openai-chat")
    assert own == TraceContext(CALLERS.trace_id, f"{1:016x}", 1)
    record = replace(OK, request_id="r", stream=True, ts="2026-11-23T12:00:00.250+00:00", budget_id="b", team="t")
    telling.record(record)
    ((span, said),) = await exported(collector, telling)
    assert (span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()) == (
        CALLERS.trace_id,
        own.span_id,
        CALLERS.span_id,
    )
    assert span.name == "chat best"
    assert span.start_time_unix_nano == 1_795_435_200_250_000_000
    assert span.end_time_unix_nano == span.start_time_unix_nano + 1_500_000_000
    assert span.status.code == span.status.STATUS_CODE_UNSET
    assert said == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "best",
        "gen_ai.request.stream": True,
        "gen_ai.response.model": "gpt-4o",
        "gen_ai.response.time_to_first_chunk": 0.2,
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 7,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.reasoning.output_tokens": 3,
        "server.address": "api.openai.com",
        "server.port": 443,
        "tollgate.request_id": "r",
        "tollgate.outcome": "ok",
        "tollgate.status": 200,
        "tollgate.attempts": 2,
        "tollgate.cost_nanousd": 1_000,
        "tollgate.budget_id": "b",
        "tollgate.service": "s",
        "tollgate.team": "t",
    }
    points = collector.points("gen_ai.client.token.usage")
    assert {attributes(point)["gen_ai.token.type"]: point.sum for point in points} == {"input": 10, "output": 7}
    (first,) = collector.points("gen_ai.client.operation.time_to_first_chunk")
    assert (first.sum, attributes(first)["gen_ai.response.model"]) == (0.2, "gpt-4o")


@pytest.mark.parametrize(
    ("outcome", "status", "error"),
    [
        (Outcome.REFUSED, 429, "429"),
        (Outcome.UPSTREAM_ERROR, 502, "502"),
        (Outcome.UPSTREAM_ERROR, 200, "upstream_error"),
        (Outcome.CUT, 200, "cut"),
        (Outcome.CLIENT_GONE, 200, "client_gone"),
    ],
)
async def test_what_did_not_end_well_is_an_error(
    collector: Collector, outcome: Outcome, status: int, error: str
) -> None:
    telling = otlp()
    telling.begin("r", None, "openai-chat")
    telling.record(replace(OK, request_id="r", outcome=outcome, status=status))
    ((span, said),) = await exported(collector, telling)
    assert said["error.type"] == error
    assert span.status.code == span.status.STATUS_CODE_ERROR
    assert span.parent_span_id == b""
    (point,) = collector.points("gen_ai.client.operation.duration")
    assert attributes(point)["error.type"] == error


@pytest.mark.parametrize(
    ("dialect", "provider", "expected"),
    [
        ("anthropic-messages", "vertex-anthropic", ("chat", "gcp.vertex_ai", 443)),
        ("gemini-generate", "gemini", ("generate_content", "gcp.gemini", 81)),
        ("openai-embeddings", "openai", ("embeddings", "openai", 443)),
        ("openai-completions", "openai", ("text_completion", "openai", 443)),
    ],
)
async def test_the_conventions_names(
    collector: Collector, dialect: str, provider: str, expected: tuple[str, str, int]
) -> None:
    telling = otlp()
    telling.begin("r", None, dialect)
    telling.record(replace(OK, request_id="r", provider=provider))
    ((span, said),) = await exported(collector, telling)
    assert span.name == f"{expected[0]} best"
    assert (said["gen_ai.operation.name"], said["gen_ai.provider.name"], said["server.port"]) == expected


async def test_what_is_no_inference_and_what_never_began_has_no_span(collector: Collector) -> None:
    telling = otlp()
    assert telling.begin("r", CALLERS, "anthropic-count-tokens") is None
    telling.record(replace(OK, request_id="r"))
    assert await exported(collector, telling) == []
    assert collector.points("gen_ai.client.operation.duration") == []


async def test_the_sdks_sampler_decides(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    telling = otlp()
    new, followed = telling.begin("1", None, "openai-chat"), telling.begin("2", CALLERS, "openai-chat")
    assert new is not None
    assert followed is not None
    assert (new.flags, followed.flags) == (0, 1)
    for name in ("1", "2"):
        telling.record(replace(OK, request_id=name))
    ((span, _),) = await exported(collector, telling)
    assert span.trace_id.hex() == CALLERS.trace_id
    assert {resource["service.name"] for resource in collector.resources} == {"mine"}
    (point,) = collector.points("gen_ai.client.operation.duration")
    assert point.count == 2  # whatever is sampled


async def test_requests_that_never_end_are_forgotten(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.telemetry.otlp.MAX_OPEN_SPANS", 2)
    telling = otlp()
    for name in ("1", "2", "3"):
        telling.begin(name, None, "openai-chat")
    for name in ("1", "2", "3"):
        telling.record(replace(OK, request_id=name))
    assert {said["tollgate.request_id"] for _, said in await exported(collector, telling)} == {"2", "3"}


async def test_a_collector_that_does_not_answer_holds_nothing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    never = asyncio.Event()

    async def silent(_: Request) -> Response:
        await never.wait()
        return Response(200)

    server = await serve(silent)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.port}")
    telling = otlp()
    telling.begin("r", None, "openai-chat")
    telling.record(replace(OK, request_id="r"))
    await asyncio.to_thread(telling.close)  # returns while both exports still wait
    assert not never.is_set()
    await server.close()
