"""Rows into BigQuery, by Google's client against a stand-in: whatever fails, each request is there once."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from google.auth.exceptions import DefaultCredentialsError
from google.cloud import bigquery

from extproc.limits import MAX_INSERT_ID_CHARS, MAX_INSERT_ROWS, MAX_REJECTED_BYTES, MIB, MISSING_COLUMN_S
from extproc.records import BudgetSnapshot, Mode, Scope, Unit, UsageRecord, Window
from extproc.usage.journal import Journal, encode
from extproc.usage.loading import load
from extproc.usage.shipper import Shipper
from extproc.usage.sinks import SinkUnavailable, UsageRow
from extproc.usage.sinks import bigquery as bigquery_sink
from extproc.usage.sinks.bigquery import BigQuerySink, connect
from extproc.usage.sinks.positions import Positions
from extproc.usage.unshipped import Rejected, log_line, rows_in
from tests.bigquery_server import DATASET, FakeBigQuery, Fault
from tests.usage_rows import usage_record

SEGMENT = "usage-1-1-1.jsonl"
SNAPSHOT = BudgetSnapshot(
    ts="2026-11-23T16:00:00.012Z",
    budget_id="global/*/day/usd",
    scope=Scope.GLOBAL,
    period=Window.DAY,
    unit=Unit.NANOUSD,
    mode=Mode.HARD,
    limit_amount=5 * 10**9,
    posted=10**9,
    pending=1,
    resets_at="2026-11-24T00:00:00.000Z",
)


class Bench:
    """A sink with its parts, and a clock that stands still."""

    def __init__(self, directory: Path, fake: FakeBigQuery) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.fake = fake
        self.now_s = 0.0
        self.aside: list[tuple[str, str]] = []
        self.sink = self.another()

    def another(self) -> BigQuerySink:
        """As after a restart."""
        (self.directory / SEGMENT).touch()
        positions = Positions(self.directory / "positions.json")
        return BigQuerySink(DATASET, self.connect, positions, self.set_aside, lambda: self.now_s)

    def connect(self) -> bigquery.Client:
        return connect(DATASET, self.fake.url)

    def set_aside(self, row: UsageRow, reason: str) -> None:
        self.aside.append((row.record.request_id, reason))

    def write(self, *rows: UsageRow | UsageRecord, end: int = 1) -> None:
        self.sink.write(SEGMENT, end, [row if isinstance(row, UsageRow) else UsageRow(row) for row in rows])


@pytest.fixture
def fake() -> Iterator[FakeBigQuery]:
    fake = FakeBigQuery().start()
    fake.create_tables()
    yield fake
    fake.close()


@pytest.fixture
def bench(tmp_path: Path, fake: FakeBigQuery) -> Bench:
    return Bench(tmp_path / "journal", fake)


def faults(fake: FakeBigQuery, *queue: Fault | None) -> None:
    """One for each insertAll, then none."""
    waiting = list(queue)
    fake.fault = lambda: waiting.pop(0) if waiting else None


def records(*ids: str) -> list[UsageRecord]:
    return [usage_record(each) for each in ids]


# What is sent ---------------------------------------------------------------------------------------------------------


def test_a_row_has_the_records_fields_and_whether_it_is_an_orphan(bench: Bench, fake: FakeBigQuery) -> None:
    record = usage_record(service=None, cost_nanousd=2**53 - 1, requested_model='ü 🙂 \x00 "')
    bench.write(record)
    assert fake.rows["usage_log"] == [{**dataclasses.asdict(record), "orphan": False}]
    assert bench.sink.offset(SEGMENT) == 1


def test_an_orphan_and_the_own_row_both_arrive_and_the_view_takes_the_own_one(bench: Bench, fake: FakeBigQuery) -> None:
    bench.write(UsageRow(usage_record(cost_nanousd=1), orphan=True), usage_record(cost_nanousd=2))
    assert fake.ids() == ["r1", "r1"]
    assert fake.usage() == {"r1": 2}


def test_the_row_id_is_the_request_id_or_a_hash_of_one_that_is_too_long(bench: Bench, fake: FakeBigQuery) -> None:
    long = "x" * (MAX_INSERT_ID_CHARS + 1)
    bench.write(*records("a", long, long + "y"))
    ids = [row["insertId"] for row in fake.inserts[0]]
    assert ids[0] == "a"
    assert len({*ids}) == 3
    assert all(len(each) <= MAX_INSERT_ID_CHARS for each in ids)


def test_no_more_rows_a_request_than_google_recommends(bench: Bench, fake: FakeBigQuery) -> None:
    bench.write(*records(*(f"r{number}" for number in range(MAX_INSERT_ROWS + 1))))
    assert [len(rows) for rows in fake.inserts] == [MAX_INSERT_ROWS, 1]


def test_no_more_bytes_a_request_than_bigquery_takes(bench: Bench, fake: FakeBigQuery) -> None:
    rows = [usage_record(str(number), requested_model="🙂" * 85_000) for number in range(12)]  # a megabyte each in JSON
    bench.write(*rows)
    assert len(fake.ids()) == 12
    assert fake.largest_bytes <= 10**7, "it was never asked for too much"


def test_snapshots_have_one_id_a_budget_and_minute(bench: Bench, fake: FakeBigQuery) -> None:
    bench.sink.write_snapshots([SNAPSHOT])
    bench.another().write_snapshots([dataclasses.replace(SNAPSHOT, ts="2026-11-23T16:00:59.900Z")])
    later = dataclasses.replace(SNAPSHOT, ts="2026-11-23T16:01:00.000Z", resets_at=None)
    bench.sink.write_snapshots([later])
    assert fake.rows["budget_snapshots"] == [dataclasses.asdict(SNAPSHOT), dataclasses.asdict(later)]


# What fails -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 502, 503])
def test_what_is_refused_as_a_whole_is_for_the_shipper_to_try_again(
    bench: Bench, fake: FakeBigQuery, status: int
) -> None:
    asked: list[int] = []

    def refuse() -> Fault:
        asked.append(status)
        return Fault(status)

    fake.fault = refuse
    with pytest.raises(SinkUnavailable, match=r"my-project\.llm\.usage_log"):
        bench.write(*records("a"))
    assert len(asked) == 1, "nobody else retries"
    assert bench.sink.offset(SEGMENT) == 0
    assert bench.aside == []


def test_a_missing_table_says_what_to_do(bench: Bench, fake: FakeBigQuery) -> None:
    fake.tables.clear()
    with pytest.raises(SinkUnavailable, match=r"Not found: Table usage_log.*tollgate bigquery apply"):
        bench.write(*records("a"))


def test_a_server_that_is_away(bench: Bench, fake: FakeBigQuery) -> None:
    bench.write(*records("a"))
    with fake.away(), pytest.raises(SinkUnavailable) as raised:
        bench.write(*records("b"))
    assert "\n" not in str(raised.value)
    bench.write(*records("b"))
    assert fake.ids() == ["a", "b"]


def test_missing_credentials_are_an_outage(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bigquery.Client:
        raise DefaultCredentialsError("there are none")  # type: ignore[no-untyped-call]

    monkeypatch.setattr(bench, "connect", refuse)
    with pytest.raises(SinkUnavailable, match="there are none"):
        bench.another().write(SEGMENT, 1, [UsageRow(usage_record())])


def test_a_reply_that_is_lost_doubles_nothing(bench: Bench, fake: FakeBigQuery) -> None:
    faults(fake, Fault(lost=True))
    with pytest.raises(SinkUnavailable):
        bench.write(*records("a", "b"))
    bench.write(*records("a", "b"))
    assert fake.ids() == ["a", "b"]


def test_an_answer_that_is_too_slow_doubles_nothing(
    bench: Bench, fake: FakeBigQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults(fake, Fault(delay_s=0.5))
    with monkeypatch.context() as patch:
        patch.setattr(bigquery_sink, "INSERT_TIMEOUT_S", 0.1)
        with pytest.raises(SinkUnavailable):
            bench.write(*records("a", "b"))
    bench.write(*records("a", "b"))
    eventually(lambda: len(fake.inserts) == 2, "the first call's rows")
    assert fake.ids() == ["a", "b"]


@pytest.mark.parametrize("stops", [0, 1], ids=["skipping", "stopping"])
def test_a_row_that_is_rejected_is_set_aside_and_holds_up_no_other(
    bench: Bench, fake: FakeBigQuery, stops: int
) -> None:
    fake.stops = stops
    bench.write(usage_record("a"), usage_record("b", cost_nanousd=2**70), usage_record("c"), end=7)
    assert fake.ids() == ["a", "c"]
    assert bench.aside == [("b", "invalid: Cannot convert value to INTEGER")]
    assert len(fake.inserts) == 1 + stops, "what was stopped is sent again, and nothing else"
    assert bench.sink.offset(SEGMENT) == 7


def test_nothing_is_set_aside_before_the_whole_batch_was_answered(bench: Bench, fake: FakeBigQuery) -> None:
    fake.stops = 1
    faults(fake, None, Fault(503))
    with pytest.raises(SinkUnavailable):
        bench.write(usage_record("a"), usage_record("b", cost_nanousd=2**70))
    assert bench.aside == []
    bench.write(usage_record("a"), usage_record("b", cost_nanousd=2**70))
    assert [request_id for request_id, _ in bench.aside] == ["b"]


def test_rows_that_are_stopped_and_never_tried_wait(bench: Bench, fake: FakeBigQuery) -> None:
    def stop(table: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"index": index, "errors": [{"reason": "stopped"}]} for index in range(len(request["rows"]))]

    fake._insert = stop  # type: ignore[method-assign]
    with pytest.raises(SinkUnavailable, match="stopped"):
        bench.write(*records("a", "b"))


def test_too_much_for_one_request_is_sent_in_parts(bench: Bench, fake: FakeBigQuery) -> None:
    fake.max_bytes = 2_000
    bench.write(*records("a", "b", "c"), usage_record("large", requested_model="x" * 2_000), *records("d"))
    assert fake.ids() == ["a", "b", "c", "d"]
    ((request_id, reason),) = bench.aside
    assert request_id == "large"
    assert "exceeds the limit" in reason


# Schema drift ---------------------------------------------------------------------------------------------------------


def test_columns_that_the_table_lacks_are_left_out_and_tried_again_later(
    bench: Bench, fake: FakeBigQuery, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [dict(one) for one in fake.tables["usage_log"]["schema"]["fields"]]
    fake.drop_column("usage_log", "cache_savings_nanousd")
    fake.drop_column("usage_log", "overhead_us")
    bench.write(*records("a", "b"))
    assert fake.ids() == ["a", "b"]
    assert bench.aside == []
    assert "lacks cache_savings_nanousd" in caplog.text
    assert "lacks overhead_us" in caplog.text
    sent = len(fake.inserts)
    bench.write(*records("c"))
    assert len(fake.inserts) == sent + 1, "known by now"
    fake.tables["usage_log"]["schema"]["fields"] = whole
    bench.now_s += MISSING_COLUMN_S
    bench.write(*records("d"))
    assert fake.rows["usage_log"][-1]["overhead_us"] == 480
    assert "overhead_us" not in fake.rows["usage_log"][-2]


@pytest.mark.parametrize("column", ["cost_nanousd", "request_id", "ts"])
def test_a_row_says_nothing_without_some_columns(bench: Bench, fake: FakeBigQuery, column: str) -> None:
    fake.drop_column("usage_log", column)
    bench.write(*records("a"))
    assert bench.aside == [("a", f"invalid: no such field: {column}.")]


def test_a_column_of_somebody_elses_is_left_alone(bench: Bench, fake: FakeBigQuery) -> None:
    fake.tables["usage_log"]["schema"]["fields"].append({"name": "theirs", "type": "STRING", "mode": "NULLABLE"})
    bench.write(*records("a"))
    assert fake.ids() == ["a"]


# Where it has come to -------------------------------------------------------------------------------------------------


def test_positions_survive_and_are_forgotten_with_their_segment(tmp_path: Path) -> None:
    path = tmp_path / "positions.json"
    for name in ("a", "b"):
        (tmp_path / name).touch()
        Positions(path).put(name, 5)
    positions = Positions(path)
    positions.put("a", 3)
    assert (positions.get("a"), positions.get("b"), positions.get("c")) == (5, 5, 0)
    positions.drop("b")
    assert Positions(path).get("b") == 0
    (tmp_path / "a").unlink()
    assert Positions(path).get("a") == 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": null}'])
def test_positions_that_cannot_be_read_count_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "a").touch()
    path = tmp_path / "positions.json"
    path.write_text(text)
    positions = Positions(path)
    assert positions.get("a") == 0
    positions.put("a", 1)
    assert Positions(path).get("a") == 1


# The shipper over it --------------------------------------------------------------------------------------------------


def segment(directory: Path, name: str, *ids: str) -> None:
    directory.mkdir(exist_ok=True)
    data = b"".join(encode(UsageRow(record)) for record in records(*ids))
    (directory / f"usage-{name}.jsonl").write_bytes(data)


def test_an_outage_of_an_hour_loses_nothing_and_is_waited_for_patiently(bench: Bench, fake: FakeBigQuery) -> None:
    pauses: list[float] = []
    written: list[str] = []

    def stopped(seconds: float) -> bool:
        bench.now_s += seconds
        if bench.now_s < 3600:
            pauses.append(seconds)
            written.append(f"r{len(written):04}")
            segment(bench.directory, f"{len(written):04}-1-1", written[-1])
        elif fake._server is None:
            fake.start()
        return bench.now_s > 3700

    fake.close()
    with closing(Shipper(bench.directory, bench.another(), jitter=lambda: 1.0)) as shipper:
        shipper.run(stopped)
    assert fake.ids() == written
    assert pauses[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0]
    assert len(written) < 140
    assert not [*bench.directory.glob("usage-*.jsonl")]


def test_batches_are_cut_where_their_offset_is_kept(bench: Bench, fake: FakeBigQuery) -> None:
    """So that a crash repeats one of them at most."""
    ids = [f"r{number:04}" for number in range(2 * MAX_INSERT_ROWS + 1)]
    segment(bench.directory, "1-1-1", *ids)
    stored: list[str] = []
    faults(fake, None, Fault(lost=True))
    with closing(Shipper(bench.directory, bench.sink, stored=stored.extend)) as shipper:
        with pytest.raises(SinkUnavailable):
            shipper.ship_once()
        assert stored == ids[:MAX_INSERT_ROWS]
        shipper.ship_once()
    assert [len(rows) for rows in fake.inserts] == [MAX_INSERT_ROWS] * 3 + [1]
    assert fake.ids() == stored == ids


def test_a_crash_between_the_answer_and_the_offset_repeats_one_batch(
    bench: Bench, fake: FakeBigQuery, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.forgets = True  # the restart took longer than BigQuery remembers ids
    ids = [f"r{number:04}" for number in range(2 * MAX_INSERT_ROWS)]
    segment(bench.directory, "1-1-1", *ids)

    def crash(self: Positions, segment: str, end: int) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch, closing(Shipper(bench.directory, bench.sink)) as shipper:
        patch.setattr(Positions, "put", crash)
        with pytest.raises(RuntimeError):
            shipper.ship_once()
    with closing(Shipper(bench.directory, bench.another())) as shipper:
        shipper.ship_once()
    assert len(fake.ids()) == len(ids) + MAX_INSERT_ROWS
    assert sorted(fake.usage()) == ids


def test_what_is_rejected_is_kept_with_its_reason_counted_and_can_be_loaded(bench: Bench, fake: FakeBigQuery) -> None:
    rejected = Rejected(bench.directory)
    fake.drop_column("usage_log", "cost_nanousd")
    segment(bench.directory, "1-1-1", "a", "b")
    sink = BigQuerySink(DATASET, bench.connect, Positions(bench.directory / "positions.json"), rejected.add)
    with closing(Shipper(bench.directory, sink, rejected=rejected)) as shipper:
        shipper.ship_once()
    assert rejected.count == 2
    fake.create_tables()
    kept = (bench.directory / "rejected.jsonl").read_bytes()
    assert json.loads(kept.splitlines()[0])["reason"] == "invalid: no such field: cost_nanousd."
    loaded = load(io.BytesIO(kept), DATASET, bench.connect)
    assert (loaded.rows, loaded.problems) == (2, [])
    assert fake.ids() == ["a", "b"]


def test_what_is_rejected_outlives_a_disk_in_memory_as_a_log_line(tmp_path: Path) -> None:
    out = io.BytesIO()
    Rejected(tmp_path, out).add(UsageRow(usage_record("a")), "why")
    assert out.getvalue() == (tmp_path / "rejected.jsonl").read_bytes()
    assert [json.loads(out.getvalue())[name] for name in ("severity", "reason")] == ["ERROR", "why"]


def test_what_is_rejected_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.usage.unshipped.MAX_REJECTED_BYTES", 2_000)
    assert MAX_REJECTED_BYTES > 2_000
    rejected = Rejected(tmp_path)
    for number in range(20):
        rejected.add(UsageRow(usage_record(f"r{number}")), "why")
    assert rejected.count == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rejected-before.jsonl", "rejected.jsonl"]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4_000
    assert b'"r19"' in (tmp_path / "rejected.jsonl").read_bytes()


# Log lines ------------------------------------------------------------------------------------------------------------


def logged(kind: str, row: UsageRow) -> bytes:
    """Our line as it is, or as Cloud Logging gives it back: wrapped, and with every number a double."""
    line = log_line(row)
    if kind == "plain":
        return b"2026-11-23 not of ours\n\n" + line
    payload = json.loads(line, parse_int=float)
    payload.pop("severity")
    entry = {"insertId": "1", "severity": "WARNING", "jsonPayload": payload, "timestamp": "2026-11-23T16:00:00Z"}
    other = {"insertId": "2", "textPayload": "not of ours"}
    if kind == "exported":
        return b"".join(json.dumps(one).encode() + b"\n" for one in (other, entry))
    return json.dumps([other, entry], indent=2).encode()


@pytest.mark.parametrize("orphan", [False, True], ids=["own", "orphan"])
@pytest.mark.parametrize("kind", ["plain", "exported", "printed"])
def test_a_log_line_is_read_as_the_row_that_it_was(kind: str, orphan: bool) -> None:
    row = UsageRow(usage_record(cost_nanousd=2**53 - 1, service=None), orphan)
    found = [*rows_in(io.BytesIO(logged(kind, row)))]
    assert [one for one in found if one is not None] == [row]


def test_a_log_line_is_what_cloud_logging_takes() -> None:
    line = log_line(UsageRow(usage_record()))
    assert line.endswith(b"}\n")
    entry = json.loads(line)
    assert entry == {
        "severity": "WARNING",
        "message": "usage row not shipped",
        "usage_row": dataclasses.asdict(usage_record()),
    }


def test_what_cannot_be_loaded_is_said_by_line(bench: Bench, fake: FakeBigQuery) -> None:
    good, bad = log_line(UsageRow(usage_record("a"))), log_line(UsageRow(usage_record("b", ts="1800-01-01T00:00:00Z")))
    lines = good + b"{}\n" + b'{"usage_row": {"request_id": "x"}}\n' + bad
    loaded = load(io.BytesIO(lines), DATASET, bench.connect)
    assert (loaded.rows, loaded.without) == (1, 1)
    assert loaded.problems[0].startswith("line 3: no usage row: ")
    assert loaded.problems[1] == "b: invalid: Cannot convert value to TIMESTAMP"
    assert fake.ids() == ["a"]


# The process ----------------------------------------------------------------------------------------------------------


class Process:
    """`tollgate` with a state directory of its own, and no Redis."""

    def __init__(self, state_dir: Path, fake: FakeBigQuery) -> None:
        self.env = {
            "PATH": os.environ["PATH"],
            "TOLLGATE_STATE_DIR": str(state_dir),
            "TOLLGATE_FLUSH_TIMEOUT_S": "1",
            "REDIS_URL": f"unix://{state_dir}/none.sock",
            **fake.environment,
        }

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "extproc", *arguments]
        return subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def eventually(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_what_a_sigterm_leaves_unshipped_goes_out_as_log_lines_which_can_be_loaded(
    tmp_path: Path, fake: FakeBigQuery
) -> None:
    directory = tmp_path / "journal"
    tollgate = Process(tmp_path, fake)
    segment(directory, "1-1-1", "a", "b")
    process = tollgate.start("ship")
    eventually(lambda: fake.ids() == ["a", "b"], "the first rows")
    fake.close()
    journal = Journal(directory, max_bytes=MIB, clock=lambda: 1)
    ids = [f"r{number}" for number in range(700)]
    for each in ids:
        journal.append(usage_record(each))
    journal.append_orphan(usage_record("r0", cost_nanousd=1))
    journal.close()
    process.send_signal(signal.SIGTERM)
    out, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    assert [json.loads(line)["usage_row"]["request_id"] for line in out.splitlines()] == [*ids, "r0"]
    assert b"701 usage rows went out as log lines" in log

    fake.start()
    (tmp_path / "out.jsonl").write_bytes(log + out)
    loading = tollgate.start("bigquery", "load", str(tmp_path / "out.jsonl"))
    said, _ = loading.communicate(timeout=20)
    assert loading.returncode == 0
    assert said.startswith(b"701 rows loaded")
    # They count as handed over: a shipper that finds the same disk sends none of them, and deletes the segments.
    again = tollgate.start("ship")
    eventually(lambda: not [*directory.glob("usage-*.jsonl")], "the segments' deletion")
    again.send_signal(signal.SIGTERM)
    assert again.communicate(timeout=20)[0] == b""
    assert fake.usage() == {each: usage_record().cost_nanousd for each in ("a", "b", *ids)}


def test_a_sigterm_while_a_call_hangs_hands_over_and_what_arrives_all_the_same_is_counted_once(
    tmp_path: Path, bench: Bench, fake: FakeBigQuery
) -> None:
    asked: list[float] = []
    answer = threading.Event()

    def hang() -> None:
        asked.append(time.monotonic())
        answer.wait(20)

    fake.fault = hang
    segment(tmp_path / "journal", "2-1-1", "a", "b")
    process = Process(tmp_path, fake).start("ship")
    eventually(lambda: bool(asked), "the call")
    process.send_signal(signal.SIGTERM)
    out, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    answer.set()
    eventually(lambda: fake.ids() == ["a", "b"], "the rows of the call that hung")
    fake.fault, fake.forgets = lambda: None, True
    assert load(io.BytesIO(out), DATASET, bench.connect).rows == 2
    assert fake.ids() == ["a", "a", "b", "b"]
    assert sorted(fake.usage()) == ["a", "b"]


def test_a_shipper_that_is_killed_at_any_moment_loses_and_doubles_nothing(tmp_path: Path, fake: FakeBigQuery) -> None:
    directory = tmp_path / "journal"
    tollgate = Process(tmp_path, fake)
    tollgate.env["TOLLGATE_FLUSH_TIMEOUT_S"] = "20"  # it ends before
    journal = Journal(directory, max_bytes=MIB, clock=lambda: 1)
    written: list[str] = []
    for life in range(2):
        before = len(fake.ids())
        process = tollgate.start("ship")
        while len(fake.ids()) <= before + life:
            written.append(f"r{len(written):05}")
            journal.append(usage_record(written[-1]))
            time.sleep(0.001)
        process.kill()
        process.communicate(timeout=20)
    journal.close()
    last = tollgate.start("ship")
    assert last.stderr is not None
    assert b"shipping" in last.stderr.readline()
    last.send_signal(signal.SIGTERM)  # the flush is enough
    out, log = last.communicate(timeout=20)
    assert (last.returncode, out) == (0, b""), log
    assert sorted(fake.usage()) == written
    assert fake.ids() == written, "within the minute, which ids are remembered for"
