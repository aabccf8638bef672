"""What the gateway says of itself, with the real Envoy: one page for all workers, and a collector's spans."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from extproc.records import Outcome, UsageRecord
from extproc.tracing import parse
from tests import voices
from tests.chains import WORDS, answering, ask, never_left_out, priced_policy, seen_by, who
from tests.otlp_collector import Collector, attributes
from tests.rig import Rig, eventually, running, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = """\
  gpt: {targets: [openai/gpt-4o, anthropic/claude-sonnet-4-5]}
  claude: {targets: [anthropic/claude-sonnet-4-5]}
"""
TIGHT = """\
  - {scope: service, id: "tight@test.iam.gserviceaccount.com", window: day, limit_tokens: 60}
"""

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
STATE = "congo=t61rcWkgMzE,rojo=00f067aa0ba902b7"

_END = ("outcome", "status", "provider", "model")

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def collector() -> AsyncIterator[Collector]:
    collector = Collector()
    await collector.start()
    yield collector
    await collector.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path, collector: Collector) -> AsyncIterator[Rig]:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "x-tenant=blue",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "OTEL_METRIC_EXPORT_INTERVAL": "300",
    }
    async with running(
        short_directory,
        policy=priced_policy(MODELS, TIGHT),
        workers_each=2,
        environment=environment,
        providers=("openai", "anthropic"),
        tune=never_left_out,
    ) as rig:
        for name in ("openai", "anthropic"):
            rig.answer(answering(name), name)
        yield rig


async def page(rig: Rig) -> Samples:
    """Every sample of /metrics, by its name and labels."""
    (port,) = re.findall(r"metrics on port (\d+)", rig.processors[0].log)
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"http://127.0.0.1:{port}/metrics")).text
    families = text_string_to_metric_families(text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def total(samples: Samples, name: str, **labels: str) -> float:
    return sum(value for (of, has), value in samples.items() if of == name and labels.items() <= dict(has).items())


def expected(rows: list[UsageRecord]) -> dict[str, float]:
    return {
        "tollgate_requests_total": len(rows),
        "tollgate_overhead_seconds_count": len(rows),
        "tollgate_cost_nanousd_total": sum(row.cost_nanousd for row in rows),
        "tollgate_tokens_total": sum(row.prompt_tokens + row.completion_tokens for row in rows),
        "tollgate_attempts_total": sum(row.attempts for row in rows),
        "tollgate_failovers_total": sum(row.attempts > 1 for row in rows),
        "tollgate_request_duration_seconds_count": sum(row.attempts > 0 for row in rows),
        "tollgate_time_to_first_token_seconds_count": sum(
            bool(row.attempts) and row.ttft_ms is not None for row in rows
        ),
        "tollgate_aborted_cost_nanousd_total": sum(
            row.cost_nanousd for row in rows if row.outcome not in (Outcome.OK, Outcome.REFUSED)
        ),
    }


async def assert_page_is_the_rows(rig: Rig, count: int) -> Samples:
    """Once `count` rows are written, the page's sums are theirs."""
    await eventually(lambda: len(rig.records()) == count, f"{count} rows")
    samples = await page(rig)
    rows = rig.records()
    assert {name: total(samples, name) for name in expected(rows)} == expected(rows)
    by_end = Counter((row.outcome.value, str(row.status), row.provider or "", row.model or "") for row in rows)
    assert by_end == {
        end: total(samples, "tollgate_requests_total", **dict(zip(_END, end, strict=True))) for end in by_end
    }
    return samples


async def ask_in_every_way(rig: Rig) -> int:
    """Requests of every outcome. How many there were."""
    rig.answer(answering("openai"))
    plain = [
        ask(rig, dialect, who("plain"), model, stream=stream)
        for dialect in ("openai", "anthropic")
        for model in ("gpt", "claude")
        for stream in (True, False)
    ]
    told = [*await asyncio.gather(*plain), await rig.ask("plain@test.iam.gserviceaccount.com", model="unknown")]
    assert [one.status for one in told] == [200] * 8 + [400]

    rig.answer(voices.failed("openai", 500))
    assert (await ask(rig, "openai", who("plain"), "gpt", stream=True)).status == 200
    rig.answer(streamed(200, pause_s=0.001))
    cut = await ask(rig, "openai", who("tight"), "gpt", stream=True)
    assert cut.broken is not None
    assert (await ask(rig, "openai", who("tight"), "gpt", stream=True)).status == 429
    rig.answer(streamed(3, pause_s=30))
    body = {"model": "gpt", "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    async with rig.client(who("plain")) as client, client.stream("POST", "/v1/chat/completions", json=body) as answer:
        await anext(answer.aiter_raw())
    rig.answer(answering("openai"))
    return len(told) + 4


async def test_the_page_adds_up_all_workers_and_a_dead_ones_counts_stay(rig: Rig) -> None:
    count = await ask_in_every_way(rig)
    samples = await assert_page_is_the_rows(rig, count)
    assert {row.outcome for row in rig.records()} >= {Outcome.OK, Outcome.CUT, Outcome.REFUSED, Outcome.CLIENT_GONE}

    assert samples["tollgate_ready", ()] == 1
    assert samples["tollgate_journal_bytes", ()] > 0
    assert samples["tollgate_ledger_unavailable_total", ()] == 0
    names = {name for name, _ in samples}
    assert not {name for name in names if not name.startswith("tollgate_")}

    assert rig.processors[0].process is not None
    first = sorted(_workers(rig))[0]
    os.kill(first, signal.SIGKILL)
    await eventually(lambda: rig.processors[0].log.count("serving on") == 3, "another worker")
    assert await assert_page_is_the_rows(rig, count)
    await rig.ready()
    told = await asyncio.gather(*(ask(rig, "openai", who("plain"), "gpt", stream=True) for _ in range(8)))
    assert all(one.status == 200 for one in told)
    await assert_page_is_the_rows(rig, count + 8)


def _workers(rig: Rig) -> set[int]:
    process = rig.processors[0].process
    assert process is not None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return {int(pid) for pid in children if b"--workers\x001" in Path(f"/proc/{pid}/cmdline").read_bytes()[:200]}


async def test_budgets_are_on_the_page_once(rig: Rig) -> None:
    tight = {"budget": f"service/{who('tight')}/day/tokens", "unit": "tokens"}

    async def used() -> bool:
        return total(await page(rig), "tollgate_budget_posted", **tight) >= 60

    await eventually(used, "the budget's figures")
    samples = await page(rig)
    assert total(samples, "tollgate_budget_limit", **tight) == 60
    assert total(samples, "tollgate_budget_pending", **tight) == 0
    assert total(samples, "tollgate_budget_resets_at_seconds", budget=tight["budget"]) > 0


async def spans_of(rig: Rig, collector: Collector, name: str) -> list[tuple[Any, dict[str, Any]]]:
    """Every span of a caller, and its attributes."""
    found: list[tuple[Any, dict[str, Any]]] = []

    def exported() -> bool:
        spans = [(span, attributes(span)) for span in collector.spans]
        found[:] = [one for one in spans if one[1].get("tollgate.service") == who(name)]
        return bool(found)

    await eventually(exported, f"the spans of {name}")
    return found


@pytest.mark.parametrize("model", ["gpt", "claude"], ids=["native", "translated"])
async def test_a_trace_goes_on_under_the_gateways_span(rig: Rig, collector: Collector, model: str) -> None:
    name = f"traced-{model}"
    headers = {"traceparent": TRACEPARENT, "tracestate": STATE}
    told = await ask(rig, "openai", who(name), model, stream=True, headers=headers)
    provider = "openai" if model == "gpt" else "anthropic"
    (request,) = seen_by(rig, provider, who(name))
    ((span, said),) = await spans_of(rig, collector, name)
    sent = parse(request.header("traceparent"))
    assert sent is not None
    assert (sent.trace_id, sent.span_id, sent.flags) == (TRACE, span.span_id.hex(), 1)
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    assert request.header("tracestate") == STATE

    row = await rig.record(told.request_id)
    assert span.name == f"chat {model}"
    assert span.kind == span.SPAN_KIND_CLIENT
    assert span.end_time_unix_nano - span.start_time_unix_nano == row.duration_ms * 1_000_000
    assert said["server.port"] == rig.providers[provider].port
    assert {key: said[key] for key in said if key.startswith(("gen_ai.provider", "gen_ai.usage", "tollgate."))} == {
        "gen_ai.provider.name": provider,
        "gen_ai.usage.input_tokens": row.prompt_tokens,
        "gen_ai.usage.output_tokens": row.completion_tokens,
        "tollgate.request_id": row.request_id,
        "tollgate.outcome": "ok",
        "tollgate.status": 200,
        "tollgate.attempts": 1,
        "tollgate.cost_nanousd": row.cost_nanousd,
        "tollgate.budget_id": row.budget_id,
        "tollgate.service": who(name),
    }
    assert not any(word in str(said) for word in WORDS[1:4])


async def test_every_attempt_of_a_failover_is_under_the_same_span(rig: Rig, collector: Collector) -> None:
    rig.answer(voices.failed("openai", 500))
    await ask(rig, "openai", who("traced-twice"), "gpt", stream=False, headers={"traceparent": TRACEPARENT})
    rig.answer(answering("openai"))
    ((span, said),) = await spans_of(rig, collector, "traced-twice")
    sent = {name: seen_by(rig, name, who("traced-twice"))[0].header("traceparent") for name in ("openai", "anthropic")}
    assert sent == dict.fromkeys(("openai", "anthropic"), f"00-{TRACE}-{span.span_id.hex()}-01")
    assert (said["gen_ai.provider.name"], said["tollgate.attempts"]) == ("anthropic", 2)


@pytest.mark.parametrize("traceparent", [None, TRACEPARENT.upper(), f"00-{'0' * 32}-{SPAN}-01"])
async def test_what_is_no_trace_begins_another(rig: Rig, collector: Collector, traceparent: str | None) -> None:
    name = f"untraced-{abs(hash(traceparent)) % 10_000}"
    headers = {"tracestate": STATE} | ({"traceparent": traceparent} if traceparent else {})
    await ask(rig, "openai", who(name), "gpt", stream=False, headers=headers)
    (request,) = seen_by(rig, "openai", who(name))
    ((span, _),) = await spans_of(rig, collector, name)
    assert request.header("traceparent") == f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01"
    assert span.trace_id.hex() != TRACE
    assert span.parent_span_id == b""
    assert request.header("tracestate") is None


async def test_a_caller_that_is_not_sampled_stays_so(rig: Rig, collector: Collector) -> None:
    headers = {"traceparent": f"00-{TRACE}-{SPAN}-00"}
    await ask(rig, "openai", who("unsampled"), "gpt", stream=False, headers=headers)
    (request,) = seen_by(rig, "openai", who("unsampled"))
    sent = parse(request.header("traceparent"))
    assert sent is not None
    assert (sent.trace_id, sent.flags) == (TRACE, 0)
    await ask(rig, "openai", who("sampled"), "gpt", stream=False)
    await spans_of(rig, collector, "sampled")
    assert sent.span_id not in {span.span_id.hex() for span in collector.spans}


async def test_measurements_are_by_the_conventions(rig: Rig, collector: Collector) -> None:
    await eventually(lambda: collector.points("gen_ai.client.operation.time_to_first_chunk"), "measurements")
    tokens = collector.points("gen_ai.client.token.usage")
    assert {attributes(point)["gen_ai.token.type"] for point in tokens} == {"input", "output"}
    assert list(tokens[0].explicit_bounds) == [4**power for power in range(14)]
    for point in collector.points("gen_ai.client.operation.duration"):
        said = attributes(point)
        assert said["gen_ai.operation.name"] == "chat"
        assert list(point.explicit_bounds)[::13] == [0.01, 81.92]
    assert {one["service.name"] for one in collector.resources} == {"tollgate"}
    assert len({one["service.instance.id"] for one in collector.resources}) >= 2
    assert all(one["x-tenant"] == "blue" for one in collector.headers)


async def test_without_a_collector_only_a_callers_own_trace_goes_on(tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("t")
    async with running(directory, environment={"TOLLGATE_METRICS_PORT": "off"}) as rig:
        rig.answer(streamed(3))
        sent = {"traceparent": TRACEPARENT, "tracestate": STATE}
        for headers, seen in (
            ({}, {}),
            (sent, sent),
            ({"tracestate": STATE}, {}),
            ({"traceparent": TRACEPARENT + "-x", "tracestate": STATE}, {}),
        ):
            assert (await rig.ask(headers=headers, stream=True)).status == 200
            request = rig.provider.received[-1]
            assert {name: value for name, value in request.headers if name in sent} == seen
        log = rig.processors[0].log
        assert "metrics on port" not in log
