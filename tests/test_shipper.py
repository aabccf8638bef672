from __future__ import annotations

import errno
import fcntl
import io
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import pytest

from extproc.limits import MAX_SHIP_BYTES, MIB
from extproc.usage.journal import Journal, encode
from extproc.usage.shipper import AlreadyShipping, Shipper
from extproc.usage.sinks import Sink, SinkUnavailable, UsageRow
from extproc.usage.sinks.duckdb import DuckDbSink, read_usage
from tests.plain_sink import PlainSink
from tests.usage_rows import usage_record


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[PlainSink]:
    with closing(PlainSink(tmp_path / "plain.sqlite")) as sink:
        yield sink


@pytest.fixture
def shipper(directory: Path, sink: PlainSink) -> Iterator[Shipper]:
    with closing(Shipper(directory, sink)) as shipper:
        yield shipper


def write_segment(directory: Path, name: str, data: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    path = directory / f"usage-{name}.jsonl"
    path.write_bytes(data)
    return path


def lines(*ids: str) -> bytes:
    return b"".join(encode(UsageRow(usage_record(each))) for each in ids)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != "shipper.lock")


def test_ships_a_dead_writers_segment_and_deletes_it(directory: Path, shipper: Shipper, sink: PlainSink) -> None:
    write_segment(directory, "1-1-1", lines("a", "b", "c"))
    assert shipper.ship_once() == 3
    assert sink.ids() == ["a", "b", "c"]
    assert files(directory) == []
    assert sink.segments() == []
    assert shipper.ship_once() == 0


def test_ships_a_living_writers_segment_and_keeps_it(directory: Path, shipper: Shipper, sink: PlainSink) -> None:
    journal = Journal(directory, max_bytes=MIB, clock=lambda: 1)
    journal.append(usage_record("a"))
    while shipper.ship_once() == 0:
        pass
    assert len(files(directory)) == 1
    journal.append(usage_record("b"))
    journal.close()
    assert shipper.ship_once() == 1
    assert sink.ids() == ["a", "b"]
    assert files(directory) == []


def test_ships_what_a_living_writer_has_rotated(directory: Path, shipper: Shipper, sink: PlainSink) -> None:
    journal = Journal(directory, max_bytes=1024, clock=lambda: 1)
    for each in "abcd":
        journal.append(usage_record(each))
    while len(sink.ids()) < 4 or journal.full:
        shipper.ship_once()
    assert len(files(directory)) == 1
    journal.close()
    assert sorted(sink.ids()) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("torn", [1, 100, -1], ids=["one byte", "some", "all but the newline"])
def test_a_torn_last_line_is_left_out(directory: Path, shipper: Shipper, sink: PlainSink, torn: int) -> None:
    write_segment(directory, "1-1-1", lines("a", "b") + lines("torn")[:torn])
    assert shipper.ship_once() == 2
    assert sink.ids() == ["a", "b"]
    assert files(directory) == []


def test_a_line_that_cannot_be_read_is_set_aside(directory: Path, shipper: Shipper, sink: PlainSink) -> None:
    write_segment(directory, "1-1-1", lines("a") + b'{"request_id": "b"}\n' + lines("c"))
    assert shipper.ship_once() == 2
    assert sink.ids() == ["a", "c"]
    assert files(directory) == ["rejected.jsonl"]
    assert (directory / "rejected.jsonl").read_bytes() == b'{"request_id": "b"}\n'


def test_a_megabyte_without_a_newline_does_not_hold_up_the_rest(
    directory: Path, shipper: Shipper, sink: PlainSink
) -> None:
    """What a power failure may leave of a segment."""
    write_segment(directory, "1-1-1", lines("a") + bytes(3 * MAX_SHIP_BYTES) + b"\n" + lines("b"))
    shipper.ship_once()
    assert sink.ids() == ["a", "b"]
    assert files(directory) == ["rejected.jsonl"]


def test_a_segment_larger_than_a_batch_is_shipped_whole(directory: Path, shipper: Shipper, sink: PlainSink) -> None:
    ids = [f"r{number}" for number in range(5000)]
    path = write_segment(directory, "1-1-1", lines(*ids))
    assert path.stat().st_size > 2 * MAX_SHIP_BYTES
    assert shipper.ship_once() == 5000
    assert sink.ids() == ids


def test_of_two_shippers_one_ships(directory: Path, sink: PlainSink) -> None:
    first = Shipper(directory, sink)
    with pytest.raises(AlreadyShipping):
        Shipper(directory, sink)
    first.close()
    Shipper(directory, sink).close()


class FailingSink(PlainSink):
    """Fails at its `fails_at`th operation: before it is done, or after it, as when the answer is lost."""

    fails_at = 0
    after = False

    def _operation(self, do: Callable[[], None]) -> None:
        self.fails_at -= 1
        if self.fails_at == 0 and not self.after:
            raise SinkUnavailable("before")
        do()
        if self.fails_at == 0:
            raise SinkUnavailable("after")

    def write(self, segment: str, offset_after: int, rows: Sequence[UsageRow]) -> None:
        self._operation(lambda: PlainSink.write(self, segment, offset_after, rows))

    def forget(self, segment: str) -> None:
        self._operation(lambda: PlainSink.forget(self, segment))


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("fails_at", [1, 2, 3, 4])
def test_no_row_is_lost_or_doubled_where_the_store_fails(
    tmp_path: Path, directory: Path, fails_at: int, after: bool
) -> None:
    write_segment(directory, "1-1-1", lines("a", "b"))
    write_segment(directory, "2-1-1", lines("c", "d"))
    sink = FailingSink(tmp_path / "plain.sqlite")
    sink.fails_at, sink.after = fails_at, after
    with closing(sink), closing(Shipper(directory, sink)) as shipper:
        with pytest.raises(SinkUnavailable):
            shipper.ship_once()
        shipper.ship_once()
        assert sink.ids() == ["a", "b", "c", "d"]
        assert files(directory) == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_no_row_is_lost_or_doubled_where_the_store_fails_in_a_segment_that_grows(
    tmp_path: Path, directory: Path, after: bool
) -> None:
    path = write_segment(directory, "1-1-1", lines("a"))
    sink = FailingSink(tmp_path / "plain.sqlite")
    sink.fails_at, sink.after = 2, after
    with closing(sink), closing(Shipper(directory, sink)) as shipper, path.open("ab") as segment:
        fcntl.flock(segment, fcntl.LOCK_EX)
        shipper.ship_once()
        segment.write(lines("b"))
        segment.flush()
        with pytest.raises(SinkUnavailable):
            shipper.ship_once()
        shipper.ship_once()
        assert sink.ids() == ["a", "b"]
        assert files(directory) == [path.name]


def test_run_tries_again_and_ships_what_is_there_before_it_ends(tmp_path: Path, directory: Path) -> None:
    write_segment(directory, "1-1-1", lines("a"))
    sink = FailingSink(tmp_path / "plain.sqlite")
    sink.fails_at = 1
    answers = iter([False, False, True])

    def stopped(seconds: float) -> bool:
        answer = next(answers)
        if answer:
            write_segment(directory, "2-1-1", lines("b"))
        return answer

    with closing(sink), closing(Shipper(directory, sink)) as shipper:
        shipper.run(stopped)
        assert sink.ids() == ["a", "b"]


# Kills --------------------------------------------------------------------------------------------------------------

SHIP = """
import os, signal, sys
from pathlib import Path
from extproc.usage.shipper import Shipper
from extproc.usage.sinks.duckdb import DuckDbSink
from tests.plain_sink import PlainSink

kind, directory, store, point = sys.argv[1:]
points = 0

def here():
    global points
    points += 1
    if points == int(point):
        os.kill(os.getpid(), signal.SIGKILL)

class Killed(DuckDbSink if kind == "duckdb" else PlainSink):
    def write(self, *arguments):
        here()
        super().write(*arguments)
        here()

    def forget(self, segment):
        here()
        super().forget(segment)
        here()

shipper = Shipper(Path(directory), Killed(Path(store)))
print("shipping", flush=True)
while True:
    shipper.ship_once()
    if int(point):
        break
"""


def shipping(kind: str, directory: Path, store: Path, point: int = 0) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-c", SHIP, kind, str(directory), str(store), str(point)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE)


def finish(kind: str, directory: Path, store: Path) -> list[str]:
    """Ship what a killed shipper left. The ids that the store then has."""
    sink: Sink = DuckDbSink(store) if kind == "duckdb" else PlainSink(store)
    with closing(Shipper(directory, sink)) as shipper:
        shipper.ship_once()
    assert files(directory) == []
    if isinstance(sink, PlainSink):
        with closing(sink):
            return sink.ids()
    return [record.request_id for record in read_usage(store, last=1_000_000)]


@pytest.mark.parametrize("kind", ["plain", "duckdb"])
@pytest.mark.parametrize("point", [1, 2, 3, 4, 5], ids=lambda point: f"at point {point}")
def test_no_row_is_lost_or_doubled_by_a_kill_between_two_steps(
    tmp_path: Path, directory: Path, kind: str, point: int
) -> None:
    store = tmp_path / "store"
    write_segment(directory, "1-1-1", lines("a", "b"))
    write_segment(directory, "2-1-1", lines("c", "d"))
    with shipping(kind, directory, store, point) as process:
        assert process.wait() == -signal.SIGKILL
    assert finish(kind, directory, store) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("kind", ["plain", "duckdb"])
def test_no_row_is_lost_or_doubled_by_kills_at_any_moment(tmp_path: Path, directory: Path, kind: str) -> None:
    """A journal that is written and rotated all the while, and a shipper that is killed after ever so short a life."""
    store = tmp_path / "store"
    moments = random.Random(1)
    written: list[str] = []
    journal = Journal(directory, max_bytes=MIB // 4, clock=lambda: 1)
    for _ in range(6):
        with shipping(kind, directory, store) as process:
            assert process.stdout is not None
            process.stdout.readline()
            for _ in range(moments.randrange(5, 30)):
                for _ in range(20):
                    written.append(f"r{len(written):06}")
                    journal.append(usage_record(written[-1]))
                time.sleep(0.01)
            process.kill()
    journal.close()
    assert sorted(finish(kind, directory, store)) == written


# The end ------------------------------------------------------------------------------------------------------------


def handed(out: io.BytesIO) -> list[str]:
    return [json.loads(line)["usage_row"]["request_id"] for line in out.getvalue().splitlines()]


def test_what_is_handed_over_is_what_was_not_stored_and_counts_as_stored(
    directory: Path, sink: PlainSink, shipper: Shipper
) -> None:
    path = write_segment(directory, "1-1-1", lines("a") + b"unreadable\n" + lines("b") + lines("torn")[:-1])
    write_segment(directory, "2-1-1", b"")
    sink.write(path.name, len(lines("a")), [])
    stored: list[str] = []
    shipper._stored = stored.extend
    out = io.BytesIO()
    assert shipper.hand_over(out) == 1
    assert handed(out) == stored == ["b"]
    assert (directory / "rejected.jsonl").read_bytes() == b"unreadable\n"
    assert shipper.hand_over(io.BytesIO()) == 0
    assert sink.ids() == []


def test_a_full_disk_does_not_keep_rows_from_being_handed_over(tmp_path: Path, directory: Path) -> None:
    class Full(PlainSink):
        def write(self, segment: str, offset_after: int, rows: Sequence[UsageRow]) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    ids = [f"r{number}" for number in range(1500)]
    write_segment(directory, "1-1-1", lines(*ids))
    write_segment(directory, "2-1-1", lines("s"))
    out = io.BytesIO()
    with closing(Full(tmp_path / "full.sqlite")) as sink, closing(Shipper(directory, sink)) as shipper:
        assert shipper.hand_over(out) == 1501
    assert handed(out) == [*ids, "s"]


def test_more_than_a_batch_is_handed_over(directory: Path, shipper: Shipper) -> None:
    ids = [f"r{number}" for number in range(5000)]
    write_segment(directory, "1-1-1", lines(*ids))
    out = io.BytesIO()
    assert shipper.hand_over(out) == 5000
    assert handed(out) == ids


def test_a_shipper_that_still_runs_while_it_is_handed_over_sends_no_more_and_deletes_nothing(
    tmp_path: Path, directory: Path
) -> None:
    ids = [f"r{number}" for number in range(1500)]
    path = write_segment(directory, "1-1-1", lines(*ids))
    out = io.BytesIO()

    class Slow(PlainSink):
        def write(self, segment: str, offset_after: int, rows: Sequence[UsageRow]) -> None:
            super().write(segment, offset_after, rows)
            if rows:  # the first batch arrives after all
                both.hand_over(out)

    with closing(Slow(tmp_path / "slow.sqlite")) as sink, closing(Shipper(directory, sink)) as both:
        assert both.ship_once() == 500
        assert sink.ids() + handed(out) == ids
        assert path.exists()


def test_after_the_stop_a_failing_store_is_tried_again_until_it_is_abandoned(tmp_path: Path, directory: Path) -> None:
    write_segment(directory, "1-1-1", lines("a"))
    sink = FailingSink(tmp_path / "plain.sqlite")
    sink.fails_at = 1
    waits: list[float] = []

    def abandoned(seconds: float) -> bool:
        waits.append(seconds)
        return False

    with closing(sink), closing(Shipper(directory, sink, jitter=lambda: 0.0)) as shipper:
        shipper.run(lambda _: True, abandoned)
        assert (sink.ids(), waits) == (["a"], [sink.interval_s])
        write_segment(directory, "2-1-1", lines("b"))
        sink.fails_at = 1
        shipper.run(lambda _: True, lambda _: True)
        assert sink.ids() == ["a"]
