"""What is counted of a record, and that callers cannot make time series without end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

from extproc.errors import LedgerUnavailable
from extproc.limits import MAX_CALLER_SERIES, MAX_MODEL_SERIES, METRICS_FILE_BYTES
from extproc.records import Balance, Budget, Mode, Outcome, Unit, UsageRecord, Window
from extproc.telemetry.metrics import Metrics
from extproc.telemetry.page import MetricsPage
from tests.rig import eventually
from tests.usage_rows import usage_record

OK = usage_record(
    "r",
    service="s",
    team=None,
    user=None,
    provider="openai",
    model="gpt-4o",
    requested_model="best",
    attempts=2,
    outcome=Outcome.OK,
    status=200,
    prompt_tokens=10,
    cached_prompt_tokens=4,
    completion_tokens=7,
    reasoning_tokens=3,
    cost_nanousd=1_000,
    cache_savings_nanousd=50,
    ttft_ms=200,
    duration_ms=1_500,
    overhead_us=300,
)
OF = {"provider": "openai", "model": "gpt-4o"}


def counted(*records: UsageRecord) -> CollectorRegistry:
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    for record in records:
        metrics.record(record)
    return registry


def series(registry: CollectorRegistry, name: str) -> list[dict[str, str]]:
    return [sample.labels for family in registry.collect() for sample in family.samples if sample.name == name]


@pytest.mark.parametrize(
    ("name", "labels", "value"),
    [
        ("requests_total", {**OF, "outcome": "ok", "status": "200"}, 1),
        ("cost_nanousd_total", {**OF, "service": "s", "team": "", "user": ""}, 1_000),
        ("tokens_total", {**OF, "type": "input"}, 10),
        ("tokens_total", {**OF, "type": "cached_input"}, 4),
        ("tokens_total", {**OF, "type": "output"}, 7),
        ("tokens_total", {**OF, "type": "reasoning"}, 3),
        ("cache_savings_nanousd_total", OF, 50),
        ("attempts_total", OF, 2),
        ("failovers_total", {"requested_model": "best", "provider": "openai"}, 1),
        ("request_duration_seconds_sum", OF, 1.5),
        ("time_to_first_token_seconds_sum", OF, 0.2),
        ("overhead_seconds_sum", {}, 0.0003),
        ("aborted_cost_nanousd_total", {"outcome": "ok", "model": "gpt-4o"}, None),
        ("ledger_unavailable_total", {}, 0),
        ("open_streams", {}, 0),
    ],
)
def test_what_a_record_counts(name: str, labels: dict[str, str], value: float | None) -> None:
    assert counted(OK).get_sample_value(f"tollgate_{name}", labels) == value


@pytest.mark.parametrize("outcome", [Outcome.CUT, Outcome.CLIENT_GONE, Outcome.UPSTREAM_ERROR])
def test_the_cost_of_what_did_not_end_well(outcome: Outcome) -> None:
    labels = {"outcome": outcome.value, "model": "gpt-4o"}
    assert (
        counted(replace(OK, outcome=outcome)).get_sample_value("tollgate_aborted_cost_nanousd_total", labels) == 1_000
    )


def test_a_refusal_is_a_request_and_nothing_else() -> None:
    refused = replace(
        OK, outcome=Outcome.REFUSED, status=401, provider=None, model=None, requested_model=None, attempts=0
    )
    registry = counted(replace(refused, prompt_tokens=0, completion_tokens=0, cost_nanousd=0, cache_savings_nanousd=0))
    assert series(registry, "tollgate_requests_total") == [
        {"provider": "", "model": "", "outcome": "refused", "status": "401"}
    ]
    for name in ("cost_nanousd_total", "tokens_total", "request_duration_seconds_count", "attempts_total"):
        assert series(registry, f"tollgate_{name}") == []


def test_made_up_names_are_other_beyond_the_bound() -> None:
    over = 5
    records = [
        replace(OK, model=f"m{n}", requested_model=f"m{n}", service=f"s{n}", user=f"u{n}")
        for n in range(MAX_CALLER_SERIES + over)
    ]
    registry = counted(*records)
    assert len(series(registry, "tollgate_cost_nanousd_total")) == MAX_CALLER_SERIES + 1
    other = {"service": "other", "team": "other", "user": "other", "model": "other", "provider": "openai"}
    assert registry.get_sample_value("tollgate_cost_nanousd_total", other) == over * 1_000
    for name in ("requests_total", "attempts_total", "failovers_total", "request_duration_seconds_count"):
        assert len(series(registry, f"tollgate_{name}")) == MAX_MODEL_SERIES + 1
    summed = sum(
        sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "tollgate_requests_total"
    )
    assert summed == len(records)


def balance(name: str, posted: int, resets_at_ms: int = 86_400_000) -> Balance:
    return Balance(Budget(name, Unit.TOKENS, 100, Window.DAY, "UTC", Mode.HARD), posted, 3, resets_at_ms)


async def test_the_page_shows_balances_while_redis_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.telemetry.page._INTERVAL_S", 0.01)
    monkeypatch.setattr("extproc.telemetry.page.MAX_BUDGET_SERIES", 2)
    lacking: str | None = None
    answers: tuple[Balance, ...] | None = (balance("low", 1), balance("high", 90), balance("total", 50, 0))

    async def balances(now_ms: int) -> tuple[Balance, ...]:
        assert now_ms > 0
        if answers is None:
            raise LedgerUnavailable("Redis is away")
        return answers

    registry = CollectorRegistry()
    (tmp_path / "usage-1-1-1.jsonl").write_bytes(b"x" * 40)
    page = MetricsPage(registry, 0, lambda: lacking, tmp_path)
    watching = asyncio.create_task(page.watch(balances))
    try:
        high, unit = {"budget": "high"}, {"unit": "tokens"}
        await eventually(lambda: registry.get_sample_value("tollgate_budget_posted", high | unit) == 90, "balances")
        assert registry.get_sample_value("tollgate_budget_limit", high | unit) == 100
        assert registry.get_sample_value("tollgate_budget_pending", high | unit) == 3
        assert series(registry, "tollgate_budget_resets_at_seconds") == [high]  # a total never does
        assert registry.get_sample_value("tollgate_budget_limit", {"budget": "low"} | unit) is None
        async with httpx.AsyncClient() as client:
            text = (await client.get(f"http://127.0.0.1:{page.port}/metrics")).text
        assert "tollgate_ready 1.0" in text
        assert "tollgate_journal_bytes 40.0" in text
        answers, lacking = None, "it is shutting down"
        await eventually(lambda: not series(registry, "tollgate_budget_posted"), "the balances to go")
        assert registry.get_sample_value("tollgate_ready") == 0
        with pytest.raises(OSError, match=f"^TOLLGATE_METRICS_PORT {page.port} cannot be listened on"):
            MetricsPage(CollectorRegistry(), page.port, lambda: None, tmp_path)
    finally:
        watching.cancel()
        page.close()


def test_the_exporter_is_not_loaded_without_its_setting() -> None:
    """redis-py loads the SDK where it finds it; what exports is loaded by us alone."""
    script = "import sys, extproc.serve, extproc.workers; sys.exit('opentelemetry.exporter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_disk_that_fills_up_does_not_kill_who_counts(tmp_path: Path) -> None:
    """The files are mapped: where they have no blocks of their own, writing to them on a full disk is a SIGBUS."""
    count = (
        "from prometheus_client import CollectorRegistry\n"
        "from extproc.telemetry.metrics import Metrics, share\n"
        "share('w')\n"
        "Metrics(CollectorRegistry())\n"
    )
    environment = {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", count], env=environment, check=True, timeout=60)
    files = {path.name: path.stat() for path in tmp_path.iterdir()}
    assert set(files) == {"counter_w.db", "gauge_sum_w.db", "histogram_w.db"}
    assert all(file.st_blocks * 512 >= file.st_size == METRICS_FILE_BYTES for file in files.values())
