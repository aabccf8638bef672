"""What each budget has left, every minute, in the usage store."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import duckdb
import pytest

from extproc.errors import LedgerUnavailable
from extproc.records import Balance, Budget, BudgetSnapshot, Mode, Scope, Unit, Window
from extproc.usage import snapshots as snapshots_module
from extproc.usage.sinks import SinkUnavailable
from extproc.usage.sinks.duckdb import DuckDbSink
from extproc.usage.snapshots import Snapshots, snapshot

NOW_MS = 1_795_449_610_250  # 2026-11-23T16:00:10.250Z
DAY = Balance(
    Budget("service/ranker@x/day/usd", Unit.NANOUSD, 5 * 10**9, Window.DAY, "UTC", Mode.HARD),
    posted=10**9,
    pending=7,
    resets_at_ms=1_795_478_400_000,
)
TOTAL = Balance(
    Budget("global/*/total/tokens/soft", Unit.TOKENS, 100, Window.TOTAL, "UTC", Mode.SOFT),
    posted=99,
    pending=0,
    resets_at_ms=0,
)


class Sink:
    def __init__(self) -> None:
        self.batches: list[list[BudgetSnapshot]] = []
        self.away = False

    def write_snapshots(self, snapshots: Sequence[BudgetSnapshot]) -> None:
        if self.away:
            raise SinkUnavailable("away")
        self.batches.append([*snapshots])


def test_a_snapshot_says_what_the_balance_says() -> None:
    assert snapshot(DAY, NOW_MS) == BudgetSnapshot(
        ts="2026-11-23T16:00:10.250Z",
        budget_id="service/ranker@x/day/usd",
        scope=Scope.SERVICE,
        period=Window.DAY,
        unit=Unit.NANOUSD,
        mode=Mode.HARD,
        limit_amount=5 * 10**9,
        posted=10**9,
        pending=7,
        resets_at="2026-11-24T00:00:00.000Z",
    )
    assert snapshot(TOTAL, NOW_MS).resets_at is None


def test_one_is_taken_on_each_full_minute() -> None:
    sink = Sink()
    now_ms = NOW_MS
    read_at: list[int] = []
    waited: list[float] = []

    def stopped(seconds: float) -> bool:
        nonlocal now_ms
        waited.append(seconds)
        now_ms += round(seconds * 1000) + 5
        return len(waited) > 2

    def read(at_ms: int) -> list[Balance]:
        read_at.append(at_ms)
        return [DAY]

    Snapshots(read, sink, lambda: now_ms).run(stopped)
    assert waited == [49.75, 59.995, 59.995]
    assert [at_ms % 60_000 for at_ms in read_at] == [5, 5]
    assert [batch[0].ts for batch in sink.batches] == ["2026-11-23T16:01:00.005Z", "2026-11-23T16:02:00.005Z"]


def test_an_outage_leaves_some_out_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    sink = Sink()
    away = True

    def read(at_ms: int) -> list[Balance]:
        if away:
            raise LedgerUnavailable("Redis is away")
        return [DAY]

    snapshots = Snapshots(read, sink, lambda: NOW_MS)
    snapshots.take()
    snapshots.take()
    away, sink.away = False, True
    snapshots.take()
    assert [record.message for record in caplog.records] == ["no budget snapshots: Redis is away"]
    sink.away = False
    snapshots.take()
    assert len(sink.batches) == 1


def test_of_too_many_the_fullest_are_taken_and_of_none_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots_module, "MAX_SNAPSHOTS", 2)
    sink = Sink()
    idle = dataclasses.replace(DAY, posted=0, pending=0)
    Snapshots(lambda _: [idle, DAY, TOTAL], sink, lambda: NOW_MS).take()
    assert sink.batches == [[snapshot(TOTAL, NOW_MS), snapshot(DAY, NOW_MS)]]
    Snapshots(lambda _: [], sink, lambda: NOW_MS).take()
    assert len(sink.batches) == 1


def test_the_local_store_keeps_them(tmp_path: Path) -> None:
    path = tmp_path / "usage.duckdb"
    DuckDbSink(path).write_snapshots([snapshot(DAY, NOW_MS), snapshot(TOTAL, NOW_MS)])
    with duckdb.connect(path) as db:
        db.execute("SET TimeZone = 'UTC'")
        columns = [row[0] for row in db.execute("DESCRIBE budget_snapshots").fetchall()]
        assert columns == [field.name for field in dataclasses.fields(BudgetSnapshot)]
        query = "SELECT scope, mode, epoch_ms(ts), posted, epoch_ms(resets_at) FROM budget_snapshots ORDER BY posted"
        assert db.execute(query).fetchall() == [
            ("global", "soft", NOW_MS, 99, None),
            ("service", "hard", NOW_MS, 10**9, DAY.resets_at_ms),
        ]
