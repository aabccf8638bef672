"""A usage store on DuckDB as BigQuery has it: the log, with all that it may hold, the snapshots, the views."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import duckdb

from extproc.records import BudgetSnapshot, Outcome, UsageSource
from extproc.usage import views
from extproc.usage.bigquery_schema import TABLES
from extproc.usage.sinks import UsageRow
from tests.usage_rows import usage_record

_TYPES = {"STRING": "VARCHAR", "INTEGER": "BIGINT", "BOOLEAN": "BOOLEAN", "TIMESTAMP": "TIMESTAMPTZ"}
_MODELS = (("openai", "gpt-4o"), ("anthropic", "claude-sonnet-4-6"), ("gemini", "gemini-3-flash"))


def warehouse(rows: Iterable[UsageRow] = (), snapshots: Iterable[BudgetSnapshot] = ()) -> duckdb.DuckDBPyConnection:
    """A database with both tables and every view."""
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'")
    for table in TABLES:
        columns = ", ".join(f'"{name}" {_TYPES[type_]}' for name, type_ in table.columns.items())
        db.execute(f"CREATE TABLE {table.name} ({columns})")
    _fill(db, "usage_log", [dataclasses.asdict(row.record) | {"orphan": row.orphan} for row in rows])
    _fill(db, "budget_snapshots", [dataclasses.asdict(snapshot) for snapshot in snapshots])
    for view in views.load():
        db.execute(f'CREATE VIEW "{view.name}" AS {views.for_duckdb(view)}')
    return db


def _fill(db: duckdb.DuckDBPyConnection, name: str, rows: Sequence[dict[str, Any]]) -> None:
    """All at once, as JSON: DuckDB takes several milliseconds for a row by itself."""
    (table,) = (one for one in TABLES if one.name == name)
    shape = [{column: _TYPES[type_] for column, type_ in table.columns.items()}]
    values = "SELECT UNNEST(from_json(?::JSON, ?), recursive := TRUE)"
    db.execute(f'INSERT INTO "{name}" BY NAME {values}', [json.dumps(rows), json.dumps(shape)])


def sample_log(newest: datetime, count: int = 300) -> list[UsageRow]:
    """Requests of five days, of every kind, and what a log holds besides: rows sent twice, orphans."""
    chance = random.Random(5)
    requests = [_request(chance, f"r{number}", newest) for number in range(count)]
    orphans = [
        UsageRow(dataclasses.replace(row.record, cost_nanousd=1, completion_tokens=1, duration_ms=2), orphan=True)
        for row in chance.sample(requests, count // 5)
    ]
    with_own_row = requests[count // 10 :]
    log = [*with_own_row, *orphans, *chance.sample(with_own_row, count // 6), *orphans[: len(orphans) // 2]]
    chance.shuffle(log)
    return log


def _request(chance: random.Random, request_id: str, newest: datetime) -> UsageRow:
    provider, model = chance.choice(_MODELS)
    outcome = chance.choice(
        [Outcome.OK] * 6 + [Outcome.CUT, Outcome.REFUSED, Outcome.CLIENT_GONE, Outcome.UPSTREAM_ERROR]
    )
    refused = outcome is Outcome.REFUSED
    service = chance.choice(["ranker@p.example", "batch@p.example", None])
    cached = chance.choice([0, 0, 700])
    record = usage_record(
        request_id,
        ts=(newest - timedelta(seconds=chance.randrange(5 * 86_400))).isoformat(),
        service=service,
        user=chance.choice(["alice@example.com", None]) if service else "bob@example.com",
        team=chance.choice(["search", None]),
        requested_model=chance.choice(["gpt-4o", "claude-sonnet-4-6"]),
        provider=None if refused else provider,
        model=None if refused else model,
        attempts=0 if refused else chance.choice([1, 1, 1, 2, 3]),
        stream=chance.random() < 0.7,
        status=chance.choice([401, 429]) if refused else 200,
        outcome=outcome,
        cached_prompt_tokens=0 if refused else cached,
        completion_tokens=0 if refused else chance.randrange(1_000),
        reasoning_tokens=chance.randrange(10),
        usage_source=UsageSource.PROVIDER,
        cost_nanousd=0 if refused else chance.choice([1, 999, 2_750_001, 12_345_678_901, 2**53 + 1]),
        ttft_ms=chance.choice([None, chance.randrange(2_000)]),
        duration_ms=chance.randrange(60_000),
        overhead_us=chance.randrange(5_000),
        budget_id=chance.choice(["global/*/day/usd", None]),
        cache_savings_nanousd=0 if refused else chance.choice([0, 333, -7]),
    )
    return UsageRow(record)
