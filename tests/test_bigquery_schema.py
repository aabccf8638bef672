"""`tollgate bigquery apply`, by Google's client against a stand-in."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from google.cloud import bigquery

from extproc.cli import main
from extproc.records import BudgetSnapshot, UsageRecord
from extproc.usage import bigquery_schema, views
from extproc.usage.bigquery_schema import TABLES
from tests.bigquery_server import FakeBigQuery

VIEWS = [view.name for view in views.load()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeBigQuery]:
    fake = FakeBigQuery().start()
    for name, value in {**fake.environment, "TOLLGATE_STATE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    yield fake
    fake.close()


def apply(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bigquery", "apply", *arguments])


def changed(fake: FakeBigQuery) -> list[str]:
    """What was asked for that is no question, since the last time."""
    asked = [one for one in fake.asked if not one.startswith("GET")]
    fake.asked.clear()
    return asked


def test_the_columns_are_the_records_fields() -> None:
    usage, snapshots = TABLES
    assert [*usage.columns] == [*(field.name for field in dataclasses.fields(UsageRecord)), "orphan"]
    assert [*snapshots.columns] == [field.name for field in dataclasses.fields(BudgetSnapshot)]
    money = {type_ for name, type_ in {**usage.columns, **snapshots.columns}.items() if "nanousd" in name}
    assert money == {"INTEGER"}  # INT64's older name, which BigQuery answers with


def test_everything_is_created_and_the_second_time_nothing(fake: FakeBigQuery) -> None:
    result = apply("--location", "EU")
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[:3] == [
        "create dataset my-project.llm in EU",
        "create table usage_log",
        "create table budget_snapshots",
    ]
    assert lines[3:] == [f"create view {name}" for name in VIEWS]
    assert fake.datasets["llm"]["location"] == "EU"
    usage = fake.tables["usage_log"]
    assert usage["timePartitioning"] == {"type": "DAY", "field": "ts"}
    assert usage["clustering"] == {"fields": ["service", "user", "model", "provider"]}
    assert fake.tables["budget_snapshots"]["timePartitioning"] == {"type": "DAY", "field": "ts"}
    fields = {field["name"]: field for field in usage["schema"]["fields"]}
    assert (fields["cost_nanousd"]["type"], fields["cost_nanousd"]["mode"]) == ("INTEGER", "NULLABLE")
    assert fields["ts"]["mode"] == "REQUIRED"
    view = fake.tables["usage"]["view"]
    assert "`my-project.llm.usage_log`" in view["query"]
    assert view["useLegacySql"] is False
    changed(fake)

    result = apply()
    assert (result.exit_code, result.output) == (0, "my-project.llm: nothing to do\n")
    assert changed(fake) == []


def test_a_dry_run_says_what_it_would_do_and_does_nothing(fake: FakeBigQuery) -> None:
    result = apply("--dry-run")
    assert result.exit_code == 0
    assert result.output.splitlines()[:2] == [
        "would create dataset my-project.llm in US",
        "would create table usage_log",
    ]
    assert len(result.output.splitlines()) == 3 + len(VIEWS)
    assert (changed(fake), fake.datasets, fake.tables) == ([], {}, {})


def test_missing_columns_are_added_and_changed_views_updated_and_nothing_else(fake: FakeBigQuery) -> None:
    apply()
    fake.drop_column("usage_log", "overhead_us")
    fake.drop_column("usage_log", "orphan")
    theirs = {"name": "theirs", "type": "STRING", "mode": "NULLABLE"}
    fake.tables["usage_log"]["schema"]["fields"].append(theirs)
    fake.tables["usage_log"]["description"] = "ours"
    fake.tables["latency"]["view"]["query"] = "SELECT 1"
    before = copy.deepcopy(fake.tables)
    changed(fake)

    wanted = ["add to table usage_log: overhead_us, orphan", "update view latency"]
    assert apply("--dry-run").output.splitlines() == [f"would {what}" for what in wanted]
    assert fake.tables == before
    assert apply().output.splitlines() == wanted
    assert changed(fake) == ["PATCH usage_log", "PATCH latency"]
    fields = fake.tables["usage_log"]["schema"]["fields"]
    assert fields[: len(fields) - 2] == before["usage_log"]["schema"]["fields"]
    assert [(one["name"], one["type"], one["mode"]) for one in fields[-2:]] == [
        ("overhead_us", "INTEGER", "NULLABLE"),
        ("orphan", "BOOLEAN", "NULLABLE"),
    ]
    assert fake.tables["usage_log"]["description"] == "ours"
    assert apply().output == "my-project.llm: nothing to do\n"


def test_what_is_otherwise_than_it_would_be_made_is_said_and_left(fake: FakeBigQuery) -> None:
    apply()
    usage = fake.tables["usage_log"]
    next(one for one in usage["schema"]["fields"] if one["name"] == "cost_nanousd")["type"] = "NUMERIC"
    del usage["timePartitioning"]
    del fake.tables["latency"]["view"]
    changed(fake)
    assert apply().output.splitlines() == [
        "left as it is: table usage_log: cost_nanousd is NUMERIC, not INTEGER",
        "left as it is: table usage_log: it is not partitioned by ts",
        "left as it is: view latency: a table has its name",
        "my-project.llm: nothing to do",
    ]
    assert changed(fake) == []


def test_what_fails_is_said_in_one_line(fake: FakeBigQuery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigquery_schema, "_RETRY", bigquery.DEFAULT_RETRY.with_timeout(0.1))
    with fake.away():
        result = apply()
    assert result.exit_code == 1
    assert result.output.startswith("Error: my-project.llm: ")
    assert len(result.output.splitlines()) == 1
    monkeypatch.setattr(fake, "_resource", lambda *_: (403, {"error": {"message": "Access Denied:\nno permission"}}))
    result = apply()
    assert (result.exit_code, result.output) == (1, "Error: my-project.llm: Access Denied: no permission\n")


@pytest.mark.parametrize("command", [["apply"], ["load", "-"]], ids=["apply", "load"])
def test_without_a_dataset_there_is_nothing_to_apply_to(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOLLGATE_USAGE_STORE", "duckdb")
    result = CliRunner().invoke(main, ["bigquery", *command])
    assert result.exit_code == 1
    assert result.output.startswith("Error: TOLLGATE_USAGE_STORE names no dataset")


def test_usage_says_where_it_went(fake: FakeBigQuery) -> None:
    result = CliRunner().invoke(main, ["usage"])
    assert (result.exit_code, result.output) == (
        1,
        "Error: usage goes to BigQuery: ask the view `my-project.llm.usage`\n",
    )
