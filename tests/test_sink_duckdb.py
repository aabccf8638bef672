from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from extproc.records import Outcome, UsageRecord
from extproc.usage.sinks import SinkUnavailable, UsageRow
from extproc.usage.sinks import duckdb as duckdb_sink
from extproc.usage.sinks.duckdb import DuckDbSink, read_usage
from tests.usage_rows import usage_record

SEGMENT = "usage-1-1-1.jsonl"
REAL = UsageRow(usage_record(cost_nanousd=2))
ORPHAN = UsageRow(usage_record(cost_nanousd=1, outcome=Outcome.CUT), orphan=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.duckdb"


def all_usage(path: Path) -> list[UsageRecord]:
    return read_usage(path, last=1_000_000)


def test_the_columns_are_the_fields_of_a_usage_record_and_whether_it_is_an_orphan(path: Path) -> None:
    DuckDbSink(path)
    with duckdb.connect(path) as db:
        columns = {row[0]: row[1] for row in db.execute("DESCRIBE usage").fetchall()}
    assert [*columns] == [*(field.name for field in dataclasses.fields(UsageRecord)), "orphan"]
    assert columns["ts"] == "TIMESTAMP WITH TIME ZONE"
    assert columns["cost_nanousd"] == "BIGINT"


@pytest.mark.parametrize(
    "record",
    [
        usage_record(),
        usage_record(service=None, user="a@b.c", ttft_ms=None, budget_id=None, outcome=Outcome.REFUSED, stream=False),
        usage_record(requested_model='line\nbreak "quote" \x00 \u2028 ü 🙂'),
        usage_record(cost_nanousd=2**53 - 1, completion_tokens=-(2**53) + 1),
    ],
    ids=["plain", "nulls", "characters", "figures"],
)
def test_round_trip(path: Path, record: UsageRecord) -> None:
    DuckDbSink(path).write(SEGMENT, 1, [UsageRow(record)])
    assert all_usage(path) == [record]


@pytest.mark.parametrize(
    ("ts", "read"),
    [
        ("2026-11-23T16:00:00.123456+00:00", "2026-11-23T16:00:00.123Z"),
        ("2026-11-23T16:00:00+02:00", "2026-11-23T14:00:00.000Z"),
        ("2026-11-23T16:00:00", "2026-11-23T16:00:00.000Z"),
    ],
    ids=["microseconds", "offset", "no offset"],
)
def test_times_are_read_in_utc_with_milliseconds(path: Path, ts: str, read: str) -> None:
    DuckDbSink(path).write(SEGMENT, 1, [UsageRow(usage_record(ts=ts))])
    assert [record.ts for record in all_usage(path)] == [read]


@pytest.mark.parametrize("batches", ["one batch", "a batch each"])
@pytest.mark.parametrize(
    ("rows", "cost"),
    [
        ([REAL, REAL], 2),
        ([REAL, UsageRow(usage_record(cost_nanousd=3))], 2),
        ([ORPHAN, REAL], 2),
        ([REAL, ORPHAN], 2),
        ([ORPHAN, ORPHAN], 1),
        ([ORPHAN, REAL, ORPHAN, REAL], 2),
    ],
    ids=["repeat", "second of an id", "orphan first", "orphan last", "orphan repeated", "all"],
)
def test_a_request_has_one_row_and_only_an_orphan_is_replaced(
    path: Path, rows: list[UsageRow], cost: int, batches: str
) -> None:
    sink = DuckDbSink(path)
    for batch in [rows] if batches == "one batch" else [[row] for row in rows]:
        sink.write(SEGMENT, 1, batch)
    assert [record.cost_nanousd for record in all_usage(path)] == [cost]


def test_an_offset_is_kept_until_it_is_forgotten(path: Path) -> None:
    sink = DuckDbSink(path)
    assert sink.offset(SEGMENT) == 0
    sink.write(SEGMENT, 100, [REAL])
    sink.write(SEGMENT, 200, [])
    assert DuckDbSink(path).offset(SEGMENT) == 200
    assert sink.offset("usage-1-1-2.jsonl") == 0
    sink.forget(SEGMENT)
    assert sink.offset(SEGMENT) == 0


def test_rows_and_offset_are_stored_together_or_not_at_all(path: Path) -> None:
    sink = DuckDbSink(path)
    with pytest.raises(SinkUnavailable):
        sink.write(SEGMENT, 2**64, [REAL])
    assert all_usage(path) == []
    assert sink.offset(SEGMENT) == 0


def test_the_newest_records_are_read_oldest_first(path: Path) -> None:
    days = ["2026-11-23", "2026-11-21", "2026-11-24", "2026-11-22"]
    rows = [UsageRow(usage_record(day, ts=f"{day}T00:00:00Z")) for day in days]
    DuckDbSink(path).write(SEGMENT, 1, rows)
    assert [record.request_id for record in read_usage(path, last=3)] == ["2026-11-22", "2026-11-23", "2026-11-24"]


def test_no_store_to_read_is_said(path: Path) -> None:
    with pytest.raises(SinkUnavailable, match="there is no usage store"):
        read_usage(path, last=1)
    assert not path.exists()


def test_what_is_not_a_store_is_said_in_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duckdb_sink, "_OPEN_TIMEOUT_S", 0)
    path.write_text("something else\n" * 1000)
    with pytest.raises(SinkUnavailable, match=r"usage\.duckdb.*not a valid DuckDB") as caught:
        DuckDbSink(path)
    assert "\n" not in str(caught.value)


OTHER = """
import sys, duckdb
with duckdb.connect(sys.argv[1]):
    print("open", flush=True)
    sys.stdin.read()
"""


def test_waits_while_another_process_has_the_file_open(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = DuckDbSink(path)
    with subprocess.Popen(
        [sys.executable, "-c", OTHER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        other.stdout.readline()
        monkeypatch.setattr(duckdb_sink, "_OPEN_TIMEOUT_S", 0)
        with pytest.raises(SinkUnavailable, match="lock"):
            sink.write(SEGMENT, 1, [REAL])
        with pytest.raises(SinkUnavailable, match="lock"):
            all_usage(path)
        monkeypatch.setattr(duckdb_sink, "_OPEN_TIMEOUT_S", 30)
        other.stdin.close()  # it ends now, while the next line already waits
        sink.write(SEGMENT, 1, [REAL])
    assert all_usage(path) == [REAL.record]


def test_a_store_of_before_a_column_gets_it_and_keeps_its_rows(path: Path) -> None:
    DuckDbSink(path).write(SEGMENT, 100, [REAL])
    with duckdb.connect(path) as db:
        db.execute("ALTER TABLE usage DROP COLUMN cache_savings_nanousd")
        db.execute("DROP TABLE budget_snapshots")
    sink = DuckDbSink(path)
    later = usage_record("later", ts="2026-11-24T00:00:00.000Z", cache_savings_nanousd=5)
    sink.write(SEGMENT, 200, [UsageRow(later), UsageRow(usage_record(cost_nanousd=9))])
    assert all_usage(path) == [REAL.record, later]
    assert sink.offset(SEGMENT) == 200
