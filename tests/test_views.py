from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import Any

import duckdb
import pytest
import sqlglot
from sqlglot import exp
from sqlglot.optimizer.qualify import qualify
from sqlglot.schema import MappingSchema

from extproc.records import BudgetSnapshot, Mode, Outcome, Scope, Unit, UsageRecord, Window
from extproc.usage import views
from extproc.usage.bigquery_schema import TABLES
from extproc.usage.sinks import UsageRow
from extproc.usage.views import View
from tests.usage_rows import usage_record
from tests.warehouse import sample_log, warehouse

NEWEST = datetime(2026, 11, 23, 23, 59, 59, 999_000, tzinfo=UTC)
LOG = sample_log(NEWEST)
NAMES = {
    "usage",
    "spend_daily",
    "budget_burn_down",
    "refusals_and_cuts",
    "latency",
    "failovers",
    "cache_savings",
    "aborted_streams",
}


def one_a_request(log: Iterable[UsageRow]) -> list[UsageRecord]:
    """What the view `usage` must hold, said again in Python."""
    kept: dict[str, UsageRow] = {}
    for row in log:
        earlier = kept.get(row.record.request_id)
        if earlier is None or (earlier.orphan and not row.orphan):
            kept[row.record.request_id] = row
    return [row.record for row in kept.values()]


REQUESTS = one_a_request(LOG)
Key = tuple[Any, ...]


def grouped(records: Iterable[UsageRecord], *names: str) -> dict[Key, list[UsageRecord]]:
    groups: dict[Key, list[UsageRecord]] = defaultdict(list)
    for record in records:
        groups[(record.ts[:10], *(getattr(record, name) for name in names))].append(record)
    return groups


def total(records: Iterable[UsageRecord], name: str) -> int:
    return sum(getattr(record, name) for record in records)


@pytest.fixture(scope="module")
def db() -> Iterable[duckdb.DuckDBPyConnection]:
    with warehouse(LOG) as opened:
        yield opened


def found(db: duckdb.DuckDBPyConnection, view: str, keys: int) -> dict[Key, Key]:
    """A view's rows: the first `keys` columns to the others. No key comes twice."""
    days = "* REPLACE (CAST(day AS VARCHAR) AS day)"
    rows = db.execute(f"SELECT {days} FROM {view}").fetchall()
    by_key = {row[:keys]: row[keys:] for row in rows}
    assert len(by_key) == len(rows)
    return by_key


class TestLoad:
    def test_has_every_view_after_those_it_reads(self) -> None:
        loaded = [view.name for view in views.load()]
        assert {*loaded} == NAMES
        assert len(loaded) == len(NAMES)
        assert loaded.index("usage") < loaded.index("spend_daily")

    @pytest.mark.parametrize("view", views.load(), ids=lambda view: view.name)
    def test_each_says_what_a_row_is(self, view: View) -> None:
        assert view.sql.startswith("-- ")
        assert view.summary
        assert "\n" not in view.summary

    def test_for_bigquery_names_every_table_in_full(self) -> None:
        sql = views.for_bigquery(View("x", "SELECT 1 FROM ${dataset}.usage JOIN ${dataset}.usage_log"), "my-p.d")
        assert sql == "SELECT 1 FROM `my-p.d.usage` JOIN `my-p.d.usage_log`"


@pytest.mark.parametrize("view", views.load(), ids=lambda view: view.name)
def test_every_column_is_there_in_bigquery(view: View, db: duckdb.DuckDBPyConnection) -> None:
    tables = {table.name: dict(table.columns) for table in TABLES}
    usage = {"usage": tables["usage_log"]}
    schema = MappingSchema({"p": {"d": tables | usage}}, dialect="bigquery")
    parsed = sqlglot.parse_one(views.for_bigquery(view, "p.d"), read="bigquery")
    qualified = qualify(parsed, schema=schema, dialect="bigquery", validate_qualify_columns=True)
    assert isinstance(qualified, exp.Query)
    named = [column for column in qualified.named_selects if column != "_"]
    assert named == [column for column, *_ in db.table(view.name).description]


def test_a_column_that_is_not_there_is_found() -> None:
    schema = MappingSchema({"p": {"d": {"usage_log": {"ts": "TIMESTAMP"}}}}, dialect="bigquery")
    parsed = sqlglot.parse_one("SELECT nothing FROM `p.d.usage_log`", read="bigquery")
    with pytest.raises(sqlglot.errors.OptimizeError):
        qualify(parsed, schema=schema, dialect="bigquery", validate_qualify_columns=True)


def test_views_that_are_filtered_by_time_read_few_partitions() -> None:
    """BigQuery moves a filter below a window only where it is on a column of its PARTITION BY."""
    (usage,) = [view for view in views.load() if view.name == "usage"]
    (window,) = sqlglot.parse_one(views.for_bigquery(usage, "p.d"), read="bigquery").find_all(exp.Window)
    assert "ts" in [column.name for column in window.args["partition_by"]]


def test_usage_has_one_row_a_request(db: duckdb.DuckDBPyConnection) -> None:
    names = [field.name for field in dataclasses.fields(UsageRecord)]
    columns = ", ".join(f'CAST("{name}" AS VARCHAR)' if name == "ts" else f'"{name}"' for name in names)
    rows = {row[0]: dict(zip(names, row, strict=True)) for row in db.execute(f"SELECT {columns} FROM usage").fetchall()}
    assert db.execute("SELECT COUNT(*) FROM usage").fetchone() == (len(REQUESTS),)
    expected = {record.request_id: dataclasses.asdict(record) for record in REQUESTS}
    for row in (*rows.values(), *expected.values()):
        row["ts"] = datetime.fromisoformat(row["ts"])
    assert rows == expected


def test_of_two_own_rows_the_one_that_ended_first_counts() -> None:
    rows = [UsageRow(usage_record(duration_ms=ms, cost_nanousd=ms)) for ms in (30, 10, 20)]
    orphan = UsageRow(usage_record(duration_ms=1, cost_nanousd=1), orphan=True)
    with warehouse([orphan, *rows]) as db:
        assert db.execute("SELECT cost_nanousd, orphan FROM usage").fetchall() == [(10, False)]


def test_spend_daily(db: duckdb.DuckDBPyConnection) -> None:
    tokens = ("prompt_tokens", "cached_prompt_tokens", "completion_tokens", "reasoning_tokens")
    expected = {
        key: (
            len(group),
            *(total(group, name) for name in (*tokens, "cost_nanousd")),
            pytest.approx(total(group, "cost_nanousd") / 1e9),
        )
        for key, group in grouped(REQUESTS, "service", "team", "user", "model").items()
    }
    assert found(db, "spend_daily", 5) == expected
    assert {key[0] for key in expected} == {f"2026-11-{day}" for day in range(19, 24)}
    assert {key[2] for key in expected} == {"search", None}


def test_costs_add_up_to_the_nano(db: duckdb.DuckDBPyConnection) -> None:
    spent = total(REQUESTS, "cost_nanousd")
    assert spent > 2**53  # where a FLOAT64 would lose some
    assert db.execute("SELECT SUM(cost_nanousd) FROM spend_daily").fetchone() == (spent,)


def test_a_cost_under_a_cent_is_exact() -> None:
    with warehouse([UsageRow(usage_record(cost_nanousd=1)), UsageRow(usage_record("r2", cost_nanousd=122))]) as db:
        assert db.execute("SELECT cost_nanousd, usd FROM spend_daily").fetchall() == [(123, pytest.approx(1.23e-7))]


@pytest.mark.parametrize(("ts", "day"), [("2026-11-23T23:59:59.999Z", 23), ("2026-11-24T01:00:00+01:00", 24)])
def test_days_are_utc(ts: str, day: int) -> None:
    with warehouse([UsageRow(usage_record(ts=ts))]) as db:
        assert [key[0] for key in found(db, "spend_daily", 5)] == [f"2026-11-{day}"]


def test_refusals_and_cuts(db: duckdb.DuckDBPyConnection) -> None:
    stopped = [record for record in REQUESTS if record.outcome in (Outcome.REFUSED, Outcome.CUT)]
    names = ("budget_id", "service", "team", "user", "outcome", "status")
    assert found(db, "refusals_and_cuts", 7) == {
        key: (len(group), total(group, "cost_nanousd"), pytest.approx(total(group, "cost_nanousd") / 1e9))
        for key, group in grouped(stopped, *names).items()
    }


def percentile(values: list[int], percent: int) -> int | None:
    """The least value that at least so many percent are not above."""
    return sorted(values)[max(0, ceil(len(values) * percent / 100) - 1)] if values else None


def test_latency(db: duckdb.DuckDBPyConnection) -> None:
    whole = [record for record in REQUESTS if record.outcome is Outcome.OK]
    expected = {}
    for key, group in grouped(whole, "provider", "model").items():
        figures: list[list[int]] = [[], [], []]
        for record in group:
            for values, value in zip(figures, (record.duration_ms, record.ttft_ms, record.overhead_us), strict=True):
                values.extend([] if value is None else [value])
        expected[key] = (len(group), *(percentile(values, p) for values in figures for p in (50, 95, 99)))
    assert found(db, "latency", 3) == expected


def test_latency_where_no_answer_had_a_first_event() -> None:
    with warehouse([UsageRow(usage_record(ttft_ms=None))]) as db:
        assert db.execute("SELECT duration_p50_ms, ttft_p50_ms FROM latency").fetchall() == [(1543, None)]


def test_failovers(db: duckdb.DuckDBPyConnection) -> None:
    sent = [record for record in REQUESTS if record.attempts]
    of_all = {key: len(group) for key, group in grouped(sent, "requested_model").items()}
    answered = [
        record
        for record in sent
        if record.attempts > 1 and record.outcome in (Outcome.OK, Outcome.CUT, Outcome.CLIENT_GONE)
    ]
    assert found(db, "failovers", 4) == {
        key: (len(group), pytest.approx(len(group) / of_all[key[:2]]))
        for key, group in grouped(answered, "requested_model", "provider", "model").items()
    }


def test_cache_savings(db: duckdb.DuckDBPyConnection) -> None:
    sent = grouped([record for record in REQUESTS if record.attempts], "provider", "model")
    names = ("prompt_tokens", "cached_prompt_tokens", "cache_savings_nanousd")
    assert found(db, "cache_savings", 3) == {
        key: (
            len(group),
            *(total(group, name) for name in names),
            pytest.approx(total(group, "cache_savings_nanousd") / 1e9),
        )
        for key, group in sent.items()
        if total(group, "cached_prompt_tokens") or total(group, "cache_savings_nanousd")
    }


def test_a_model_that_cached_nothing_saved_nothing() -> None:
    with warehouse([UsageRow(usage_record(cached_prompt_tokens=0))]) as db:
        assert found(db, "cache_savings", 3) == {}


def test_aborted_streams(db: duckdb.DuckDBPyConnection) -> None:
    ends = (Outcome.CUT, Outcome.CLIENT_GONE, Outcome.UPSTREAM_ERROR)
    aborted = [record for record in REQUESTS if record.stream and record.outcome in ends]
    assert found(db, "aborted_streams", 6) == {
        key: (
            len(group),
            total(group, "completion_tokens"),
            total(group, "cost_nanousd"),
            pytest.approx(total(group, "cost_nanousd") / 1e9),
        )
        for key, group in grouped(aborted, "outcome", "service", "team", "user", "model").items()
    }


# Burn-down looks at now: its rows are laid around it. ----------------------------------------------------------------


def snapshots(
    posted: Callable[[int], int],
    *,
    minutes: range = range(-90, 1),
    resets_in_minutes: int | None = 600,
    limit: int = 1_000,
    pending: int = 0,
) -> list[BudgetSnapshot]:
    now = datetime.now(UTC)
    resets = None if resets_in_minutes is None else (now + timedelta(minutes=resets_in_minutes)).isoformat()
    return [
        BudgetSnapshot(
            ts=(now + timedelta(minutes=minute)).isoformat(),
            budget_id="b",
            scope=Scope.GLOBAL,
            period=Window.DAY,
            unit=Unit.TOKENS,
            mode=Mode.HARD,
            limit_amount=limit,
            posted=posted(minute),
            pending=pending,
            resets_at=resets,
        )
        for minute in minutes
    ]


def burn_down(rows: list[BudgetSnapshot]) -> list[tuple[Any, ...]]:
    """posted, pending, left, speed an hour, minutes until it is gone."""
    minutes = "date_diff('microsecond', ts, exhausted_at) / 60e6"
    with warehouse(snapshots=rows) as db:
        columns = f"posted, pending, left_amount, speed_per_hour, {minutes}"
        return db.execute(f"SELECT {columns} FROM budget_burn_down ORDER BY budget_id").fetchall()


def near(value: float) -> Any:
    return pytest.approx(value, rel=1e-4)


class TestBurnDown:
    def test_says_when_it_will_be_gone_at_the_speed_of_the_last_hour(self) -> None:
        rows = snapshots(lambda minute: 0 if minute < -60 else 120 + minute * 2)
        assert burn_down(rows) == [(120, 0, 880, near(120), near(440))]

    def test_what_is_held_is_not_left(self) -> None:
        rows = snapshots(lambda minute: 120 + minute * 2 if minute >= -60 else 0, pending=280)
        assert burn_down(rows) == [(120, 280, 600, near(120), near(300))]

    def test_nothing_is_said_where_it_resets_before(self) -> None:
        rows = snapshots(lambda minute: 120 + minute if minute >= -60 else 0, resets_in_minutes=600)
        assert burn_down(rows) == [(120, 0, 880, near(60), None)]

    def test_a_total_never_resets(self) -> None:
        rows = snapshots(lambda minute: 120 + minute if minute >= -60 else 0, resets_in_minutes=None)
        assert burn_down(rows) == [(120, 0, 880, near(60), near(880))]

    def test_a_total_that_lasts_for_ages_has_no_date(self) -> None:
        rows = snapshots(lambda minute: 120 + minute, resets_in_minutes=None, limit=2**53)
        assert burn_down(rows) == [(120, 0, 2**53 - 120, near(60), None)]

    def test_nothing_spent_lasts(self) -> None:
        assert burn_down(snapshots(lambda minute: 120)) == [(120, 0, 880, 0, None)]

    def test_used_up_is_gone_now(self) -> None:
        assert burn_down(snapshots(lambda minute: 1_005)) == [(1_005, 0, -5, 0, 0)]

    def test_a_period_that_has_just_begun_is_measured_from_its_own_first_row(self) -> None:
        before = snapshots(lambda minute: 990, minutes=range(-90, -30), resets_in_minutes=-30)
        rows = snapshots(lambda minute: 60 + minute * 2, minutes=range(-30, 1))
        assert burn_down([*before, *rows]) == [(60, 0, 940, near(120), near(470))]

    def test_one_look_has_no_speed(self) -> None:
        assert burn_down(snapshots(lambda minute: 60, minutes=range(1))) == [(60, 0, 940, None, None)]

    def test_a_period_that_is_over_is_left_out(self) -> None:
        assert burn_down(snapshots(lambda minute: 60, resets_in_minutes=-1)) == []

    def test_a_snapshot_that_came_twice_changes_nothing(self) -> None:
        rows = snapshots(lambda minute: 0 if minute < -60 else 120 + minute * 2)
        assert burn_down([*rows, *rows]) == burn_down(rows)

    def test_each_budget_on_its_own(self) -> None:
        rows = snapshots(lambda minute: 120 + minute * 2, minutes=range(-60, 1))
        other = [dataclasses.replace(row, budget_id="c", posted=7) for row in rows]
        assert burn_down([*rows, *other]) == [(120, 0, 880, near(120), near(440)), (7, 0, 993, 0, None)]
