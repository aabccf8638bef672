from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pytest
import sqlglot
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import CollectorRegistry
from sqlglot import exp
from sqlglot.optimizer.qualify import qualify
from sqlglot.schema import MappingSchema

from dashboards import bigquery, prometheus
from dashboards.__main__ import SETS, files, main
from dashboards.bigquery import DATASET
from dashboards.panels import Board, Kind, Panel
from extproc.records import Balance, Budget, BudgetSnapshot, Mode, Outcome, Scope, Unit, Window
from extproc.telemetry.metrics import Metrics
from extproc.telemetry.page import _State
from extproc.usage import views
from extproc.usage.bigquery_schema import TABLES
from extproc.usage.sinks import UsageRow
from tests.usage_rows import usage_record
from tests.warehouse import sample_log, warehouse

FOLDER = Path(__file__).parents[1] / "dashboards"
GENERATED = {name: json.loads(text) for name, text in files().items()}
DASHBOARDS = pytest.mark.parametrize("name", GENERATED)


def panels(boards: Iterable[Board]) -> list[Any]:
    return [pytest.param(panel, id=f"{board.uid}-{panel.title}") for board in boards for panel in board.panels]


def visuals(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = GENERATED[name]["panels"]
    return found


# The files ------------------------------------------------------------------------------------------------------------


def test_the_committed_files_are_what_the_code_generates(tmp_path: Path) -> None:
    main(tmp_path)
    for folder in SETS:
        committed = {path.name: path.read_text() for path in (FOLDER / folder).iterdir()}
        assert committed == {path.name: path.read_text() for path in (tmp_path / folder).iterdir()}


@DASHBOARDS
def test_a_file_is_a_dashboard_of_grafanas_model(name: str) -> None:
    loaded = Dashboard.from_json(GENERATED[name])
    assert (loaded.uid, loaded.title) == (GENERATED[name]["uid"], GENERATED[name]["title"])
    assert loaded.timezone == "utc"
    assert len(loaded.panels or ()) == len(visuals(name))


def test_dashboards_have_uids_of_their_own() -> None:
    assert len({board["uid"] for board in GENERATED.values()}) == len(GENERATED)


@DASHBOARDS
def test_panels_have_ids_of_their_own_and_say_what_they_show(name: str) -> None:
    ids = [panel["id"] for panel in visuals(name)]
    assert len({*ids}) == len(ids)
    assert all(panel["title"] and panel["description"] for panel in visuals(name))


@DASHBOARDS
def test_panels_fill_the_grid_and_do_not_overlap(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for place in (panel["gridPos"] for panel in visuals(name)):
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert all(x < 24 for x, _ in cells)
        assert not cells & taken
        taken |= cells
    assert len(taken) == 24 * (1 + max(y for _, y in taken))


@DASHBOARDS
def test_every_query_goes_to_the_data_source_that_was_chosen(name: str) -> None:
    (variable,) = [found for found in GENERATED[name]["templating"]["list"] if found["type"] == "datasource"]
    plugin = {"bigquery": "grafana-bigquery-datasource", "prometheus": "prometheus"}[name.partition("/")[0]]
    assert variable["query"] == plugin
    chosen = {"type": plugin, "uid": f"${{{variable['name']}}}"}
    for panel in visuals(name):
        assert panel["datasource"] == chosen
        assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])
        assert [target["refId"] for target in panel["targets"]] == list("ABC"[: len(panel["targets"])])


# SQL ------------------------------------------------------------------------------------------------------------------

NOW = datetime.now(UTC)
FROM, TO = NOW - timedelta(days=7), NOW + timedelta(hours=6)
TIME_FILTER = re.compile(r"\$__timeFilter\((\w+)\)")
SQL_PANELS = pytest.mark.parametrize("panel", panels(bigquery.BOARDS))


def bigquery_sql(query: str, dataset: str = "p.d") -> str:
    """As Grafana's plugin sends it, at NOW: no test must see a day end between its rows and its query."""
    chosen = rf"\1 >= TIMESTAMP '{FROM.isoformat()}' AND \1 <= TIMESTAMP '{TO.isoformat()}'"
    sql = TIME_FILTER.sub(chosen, query).replace(DATASET, dataset)
    sql = sql.replace("CURRENT_TIMESTAMP()", f"TIMESTAMP '{NOW.isoformat()}'")
    assert "$" not in sql
    return sql


def run(db: duckdb.DuckDBPyConnection, query: str) -> tuple[list[tuple[str, str]], list[tuple[Any, ...]]]:
    """Names and types of the columns, and the rows; times as text."""
    sql = views.to_duckdb(re.sub(r"`p\.d\.(\w+)`", r"\1", bigquery_sql(query)))
    found = db.sql(sql)
    columns = [(name, str(type_)) for name, type_, *_ in found.description]
    shown = ", ".join(f'CAST("{name}" AS VARCHAR)' if "TIME" in type_ else f'"{name}"' for name, type_ in columns)
    return columns, db.execute(f"SELECT {shown} FROM ({sql})").fetchall()


def looks() -> Iterator[BudgetSnapshot]:
    """A budget that will be gone in five hours, an hour before it resets, and one that lasts."""
    for minute in range(-60, 1):
        ts = (NOW + timedelta(minutes=minute)).isoformat()
        resets = (NOW + timedelta(hours=6)).isoformat()
        usd = ("service/a/day/usd", Scope.SERVICE, Window.DAY, Unit.NANOUSD, Mode.HARD, 10 * 10**9)
        tokens = ("global/*/total/tokens", Scope.GLOBAL, Window.TOTAL, Unit.TOKENS, Mode.SOFT, 1_000)
        spent = 4 * 10**9 + (60 + minute) * 10**9 // 60
        yield BudgetSnapshot(ts, *usd, posted=spent, pending=0, resets_at=resets)
        yield BudgetSnapshot(ts, *tokens, posted=100, pending=50, resets_at=None)


@pytest.fixture(scope="module")
def db() -> Iterator[duckdb.DuckDBPyConnection]:
    today = UsageRow(usage_record("today", ts=NOW.isoformat()))
    with warehouse([*sample_log(NOW), today], looks()) as opened:
        yield opened


@SQL_PANELS
def test_every_panels_sql_runs_and_has_the_columns_that_it_draws(panel: Panel, db: duckdb.DuckDBPyConnection) -> None:
    for query in panel.queries:
        columns, rows = run(db, query)
        assert rows
        types = dict(columns)
        if panel.kind.over_time:
            assert types["time"] == "TIMESTAMP WITH TIME ZONE"
            named = types.get("name") == "VARCHAR"
            assert named == bool(panel.legend)
            assert len(types) > 1 + named
            times = [row[[*types].index("time")] for row in rows]
            assert all(earlier <= later for earlier, later in pairwise(times))  # what the plugin asks of a series
        else:
            assert {column for column, _ in panel.columns} <= types.keys()


@SQL_PANELS
def test_every_column_is_there_in_bigquery(panel: Panel) -> None:
    schema: dict[str, dict[str, str]] = {table.name: dict(table.columns) for table in TABLES}
    schema["usage"] = schema["usage_log"]
    (burn_down,) = [view for view in views.load() if view.name == "budget_burn_down"]
    parsed = sqlglot.parse_one(views.for_bigquery(burn_down, "p.d"), read="bigquery")
    assert isinstance(parsed, exp.Query)
    schema["budget_burn_down"] = dict.fromkeys(parsed.named_selects, "STRING")
    known = MappingSchema({"p": {"d": schema}}, dialect="bigquery")
    for query in panel.queries:
        sql = sqlglot.parse_one(bigquery_sql(query), read="bigquery")
        qualify(sql, schema=known, dialect="bigquery", validate_qualify_columns=True)


@SQL_PANELS
def test_whatever_reads_the_log_reads_the_chosen_days_alone(panel: Panel) -> None:
    for query in panel.queries:
        assert "usage_log" not in query  # may hold a request twice
        for table in ("usage", "budget_snapshots"):
            if f"{DATASET}.{table}`" in query:
                assert re.search(
                    r"WHERE (\$__timeFilter\(ts\)|ts >= TIMESTAMP_TRUNC\(CURRENT_TIMESTAMP\(\), DAY\))", query
                )


def panel_of(board: Board, title: str) -> Panel:
    (found,) = [panel for panel in board.panels if panel.title == title]
    return found


class TestFigures:
    def test_service_a_spent_50_dollars_today(self) -> None:
        now, yesterday = NOW.isoformat(), (NOW - timedelta(days=1)).isoformat()
        rows = [
            UsageRow(usage_record("a1", ts=now, service="a", cost_nanousd=49_999_999_999)),
            UsageRow(usage_record("a2", ts=now, service="a", cost_nanousd=1)),
            UsageRow(usage_record("a2", ts=now, service="a", cost_nanousd=1)),
            UsageRow(usage_record("b1", ts=now, service="b", cost_nanousd=250_000_000)),
            UsageRow(usage_record("b2", ts=yesterday, service="b", cost_nanousd=10**12)),
            UsageRow(usage_record("p1", ts=now, service=None, user="alice", cost_nanousd=10**9)),
        ]
        with warehouse(rows) as db:
            by_service = panel_of(bigquery.SPEND, "Spent today, by service")
            assert run(db, by_service.queries[0])[1] == [("a", 50.0), ("b", 0.25)]
            assert run(db, panel_of(bigquery.SPEND, "Spent today").queries[0])[1] == [(51.25,)]

    def test_nothing_spent_today_is_nothing(self) -> None:
        with warehouse() as db:
            assert run(db, panel_of(bigquery.SPEND, "Spent today").queries[0])[1] == [(0.0,)]

    def test_streams_that_were_paid_for_in_vain(self) -> None:
        ends = [Outcome.CUT, Outcome.CLIENT_GONE, Outcome.UPSTREAM_ERROR, Outcome.OK]
        rows = [
            UsageRow(
                usage_record(end, ts=NOW.isoformat(), service="a", model="m", outcome=end, cost_nanousd=10**9 * cost)
            )
            for cost, end in enumerate(ends, start=1)
        ]
        with warehouse(rows) as db:
            found = run(db, panel_of(bigquery.SPEND, "Paid for streams that did not end well").queries[0])[1]
        assert found == [
            ("upstream_error", "a", "m", 3.0, 1),
            ("client_gone", "a", "m", 2.0, 1),
            ("cut", "a", "m", 1.0, 1),
        ]

    def test_burn_down_goes_on_to_where_the_budget_will_be_gone(self, db: duckdb.DuckDBPyConnection) -> None:
        past, ahead = panel_of(bigquery.BUDGETS, "Burn-down").queries
        used = [row[2] for row in run(db, past)[1] if row[1] == "service/a/day/usd"]
        assert (used[0], used[-1]) == (pytest.approx(0.4), pytest.approx(0.5))
        (now, name, now_used), (gone, gone_name, gone_used) = run(db, ahead)[1]
        assert name == gone_name == "service/a/day/usd ahead"
        assert (now_used, gone_used) == (pytest.approx(0.5), 1)
        assert datetime.fromisoformat(gone) - datetime.fromisoformat(now) == timedelta(hours=5)

    def test_budgets_now(self, db: duckdb.DuckDBPyConnection) -> None:
        usd, tokens = run(db, panel_of(bigquery.BUDGETS, "Budgets now").queries[0])[1]
        assert usd[:5] == ("service/a/day/usd", "hard", 0.5, 5.0, None)
        assert datetime.fromisoformat(usd[5]) - NOW < timedelta(hours=5, seconds=1)
        assert tokens == ("global/*/total/tokens", "soft", 0.15, None, 850, None, None)

    def test_errors_by_provider(self) -> None:
        failed = [Outcome.UPSTREAM_ERROR, Outcome.OK, Outcome.OK, Outcome.CUT]
        rows = [
            UsageRow(usage_record(f"r{place}", ts=NOW.isoformat(), outcome=outcome))
            for place, outcome in enumerate(failed)
        ]
        with warehouse(rows) as db:
            ((_, name, share),) = run(db, panel_of(bigquery.RELIABILITY, "Errors, by provider").queries[0])[1]
        assert (name, share) == ("openai", 0.25)


# PromQL: no parser of it is at hand, so that names, labels and brackets are checked. ----------------------------------

PROMQL_PANELS = pytest.mark.parametrize("panel", panels(prometheus.BOARDS))
PROMETHEUS_OWN_LABELS = {"instance", "le"}


def exported() -> dict[str, set[str]]:
    """The labels of every series that /metrics has, by its name."""
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    metrics.watch(0, ledger=False)
    metrics.secrets_refreshed("ok")
    metrics.record(
        usage_record(attempts=2, cached_prompt_tokens=1, cache_savings_nanousd=1, outcome=Outcome.CUT, ttft_ms=1)
    )
    state = _State(lambda: None, FOLDER)
    state.balances = (
        Balance(Budget("b", Unit.TOKENS, 1, Window.DAY, "UTC", Mode.HARD), posted=0, pending=0, resets_at_ms=1),
    )
    families = [*registry.collect(), *state.collect()]
    return {sample.name: {*sample.labels} for family in families for sample in family.samples}


@PROMQL_PANELS
def test_every_metric_and_label_is_exported(panel: Panel) -> None:
    known = exported()
    for expression in panel.queries:
        names = re.findall(r"\btollgate_\w+", expression)
        assert names
        assert {*names} <= known.keys()
        labels = set(re.findall(r'(\w+)(?:=~|!=|=)"', expression))
        for group in re.findall(r"by \(([^)]+)\)", expression):
            labels |= {name.strip() for name in group.split(",")}
        for name in names:
            assert labels <= known[name] | PROMETHEUS_OWN_LABELS
        made = {*re.findall(r'label_replace\(.*?\), "(\w+)"', expression)}
        assert {*re.findall(r"{{(\w+)}}", panel.legend)} <= labels | made | {"budget"}


@PROMQL_PANELS
def test_brackets_are_closed_and_counters_are_read_by_what_they_gain(panel: Panel) -> None:
    closing = {")": "(", "]": "[", "}": "{"}
    for expression in panel.queries:
        open_: list[str] = []
        for character in re.sub(r'"[^"]*"', "", expression):
            if character in closing.values():
                open_.append(character)
            elif character in closing:
                assert open_.pop() == closing[character]
        assert not open_
        for counter in re.finditer(r"tollgate_\w+_(?:total|bucket|count)", expression):
            assert re.search(r"\b(rate|increase)\($", expression[: counter.start()])
            assert re.match(r"({[^}]*})?\[", expression[counter.end() :])
        if panel.kind is Kind.STAT:
            assert "$__rate_interval" not in expression  # of one moment
