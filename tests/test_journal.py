from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson
import pytest

from extproc import ownedfile
from extproc.limits import KIB, MAX_JOURNAL_QUEUE, MAX_TOKENS, MIB
from extproc.records import Outcome, UsageRecord
from extproc.usage import journal as journal_module
from extproc.usage.journal import SEGMENTS, Journal, decode, encode
from extproc.usage.sinks import UsageRow
from tests.usage_rows import usage_record

FIELDS = [field.name for field in dataclasses.fields(UsageRecord)]


def clock() -> int:
    return 1_700_000_000_000


@contextmanager
def opened(directory: Path, max_bytes: int = MIB) -> Iterator[Journal]:
    journal = Journal(directory, max_bytes=max_bytes, clock=clock)
    try:
        yield journal
    finally:
        journal.close()


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob(SEGMENTS), key=lambda path: (len(path.name), path.name))


def stored(directory: Path) -> list[UsageRow]:
    return [decode(line) for path in segments(directory) for line in path.read_bytes().splitlines()]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


class TestLine:
    def test_has_exactly_the_fields_of_a_usage_record_in_their_order(self) -> None:
        line = encode(UsageRow(usage_record()))
        assert [*orjson.loads(line)] == FIELDS
        assert line.endswith(b"}\n")

    def test_of_an_orphan_says_so_after_the_fields(self) -> None:
        assert [*orjson.loads(encode(UsageRow(usage_record(), orphan=True)))] == [*FIELDS, "orphan"]

    @pytest.mark.parametrize("orphan", [False, True], ids=["record", "orphan"])
    @pytest.mark.parametrize(
        "record",
        [
            usage_record(),
            usage_record(service=None, user="a@b.c", ttft_ms=None, budget_id=None, outcome=Outcome.REFUSED),
            usage_record(requested_model='line\nbreak "quote" \x00 \u2028 ü 🙂'),
        ],
        ids=["plain", "nulls", "characters"],
    )
    def test_round_trip(self, record: UsageRecord, orphan: bool) -> None:
        row = UsageRow(record, orphan)
        line = encode(row)
        assert decode(line) == row
        assert line.count(b"\n") == 1

    def test_a_lone_surrogate_does_not_lose_the_record(self) -> None:
        assert decode(encode(UsageRow(usage_record(requested_model="a\ud800b")))).record.requested_model == "a?b"

    @pytest.mark.parametrize("figure", [2**53, 2**64, 10**30, -(10**30)])
    def test_a_figure_beyond_53_bits_does_not_lose_the_record(self, figure: int) -> None:
        row = decode(encode(UsageRow(usage_record(completion_tokens=figure, stream=False), orphan=True)))
        assert row.record.completion_tokens == (MAX_TOKENS if figure > 0 else -MAX_TOKENS)
        assert row.record.stream is False
        assert row.orphan

    @pytest.mark.parametrize(
        "line",
        [
            b"",
            b"\x00\x00",
            b"[]",
            b"{}",
            encode(UsageRow(usage_record()))[:-20],
            encode(UsageRow(usage_record(ts="yesterday"))),
            encode(UsageRow(usage_record())).replace(b'"ok"', b'"fine"'),
        ],
        ids=["empty", "zeros", "array", "no fields", "torn", "no time", "unknown outcome"],
    )
    def test_what_is_not_a_usage_row_is_a_value_error(self, line: bytes) -> None:
        with pytest.raises(ValueError):  # noqa: PT011 - its subclasses are the JSON parser's and the validator's
            decode(line)


class TestJournal:
    def test_close_has_written_every_record_in_order(self, tmp_path: Path) -> None:
        records = [usage_record(f"r{number}") for number in range(3000)]
        with opened(tmp_path, max_bytes=64 * MIB) as journal:
            for record in records:
                journal.append(record)
        assert stored(tmp_path) == [UsageRow(record) for record in records]

    def test_close_has_written_what_came_just_after_the_writer_had_found_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        journal = Journal(tmp_path, max_bytes=MIB, clock=clock)
        take = journal._take
        found_nothing = threading.Event()
        closing = threading.Event()

        def take_and_stand_still() -> list[bytes]:
            lines = take()
            if not found_nothing.is_set():
                found_nothing.set()
                closing.wait()
            return lines

        monkeypatch.setattr(journal, "_take", take_and_stand_still)
        found_nothing.wait()
        journal.append(usage_record())
        closer = threading.Thread(target=journal.close)
        closer.start()
        wait_until(journal._closing.is_set)
        closing.set()
        closer.join()
        assert stored(tmp_path) == [UsageRow(usage_record())]

    def test_an_orphan_is_marked(self, tmp_path: Path) -> None:
        with opened(tmp_path) as journal:
            journal.append_orphan(usage_record())
        assert stored(tmp_path) == [UsageRow(usage_record(), orphan=True)]

    def test_a_record_reaches_the_disk_without_a_close(self, tmp_path: Path) -> None:
        with opened(tmp_path) as journal:
            journal.append(usage_record())
            wait_until(lambda: stored(tmp_path) == [UsageRow(usage_record())])

    def test_several_journals_share_a_directory(self, tmp_path: Path) -> None:
        with opened(tmp_path) as one, opened(tmp_path) as other:
            one.append(usage_record("one"))
            other.append(usage_record("other"))
        assert {row.record.request_id for row in stored(tmp_path)} == {"one", "other"}
        assert len(segments(tmp_path)) == 2

    def test_names_say_start_process_and_number(self, tmp_path: Path) -> None:
        with opened(tmp_path):
            assert [path.name for path in segments(tmp_path)] == [f"usage-1700000000000-{os.getpid()}-1.jsonl"]

    def test_rotates_and_lets_go_of_the_old_segment(self, tmp_path: Path) -> None:
        with opened(tmp_path, max_bytes=16 * KIB) as journal:
            journal.append(usage_record("first"))
            journal.append(usage_record("second"))
            wait_until(lambda: len(segments(tmp_path)) == 2)
            journal.append(usage_record("third"))
            old, current = segments(tmp_path)
            assert owned(current)
            wait_until(lambda: not owned(old))
        assert [row.record.request_id for row in stored(tmp_path)] == ["first", "second", "third"]

    def test_an_idle_journal_does_not_rotate(self, tmp_path: Path) -> None:
        with opened(tmp_path, max_bytes=0) as journal:
            journal._sync()
            journal._sync()
        assert len(segments(tmp_path)) == 1

    def test_a_directory_that_cannot_be_written_is_an_error_at_the_start(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OSError, match="file"):
            Journal(tmp_path / "file", max_bytes=MIB, clock=clock)


def owned(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    try:
        return not ownedfile.take(fd)
    finally:
        os.close(fd)


class TestFull:
    def test_an_empty_journal_is_not_full(self, tmp_path: Path) -> None:
        with opened(tmp_path) as journal:
            assert not journal.full

    def test_until_what_is_not_shipped_is_shipped(self, tmp_path: Path) -> None:
        """Every segment is closed when it fills the journal, so that the shipper can make room."""
        with opened(tmp_path, max_bytes=KIB) as journal:
            for number in range(4):
                journal.append(usage_record(f"r{number}"))
            wait_until(lambda: journal.full)
            wait_until(lambda: len(segments(tmp_path)) > 1)
            for path in segments(tmp_path)[:-1]:
                path.unlink()
            wait_until(lambda: not journal.full)

    def test_by_another_processors_segments(self, tmp_path: Path) -> None:
        (tmp_path / "usage-1-1-1.jsonl").write_bytes(bytes(2 * KIB))
        with opened(tmp_path, max_bytes=KIB) as journal:
            assert journal.full

    def test_lets_go_of_a_segment_that_is_not_full_itself(self, tmp_path: Path) -> None:
        """Open segments of many processors, all shipped, could otherwise fill the journal with nothing to delete."""
        (tmp_path / "usage-1-1-1.jsonl").write_bytes(bytes(MIB))
        with opened(tmp_path, max_bytes=MIB) as journal:
            journal.append(usage_record())
            wait_until(lambda: [owned(path) for path in segments(tmp_path)] == [False, False, True])

    def test_of_records_that_the_writer_has_not_come_to(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with opened(tmp_path, max_bytes=64 * MIB) as journal:
            with monkeypatch.context() as patch, stuck_disk(patch) as release:
                for _ in range(MAX_JOURNAL_QUEUE + 2000):
                    journal.append(usage_record())
                assert journal.full
                release()
            wait_until(lambda: not journal.full)
        assert len(stored(tmp_path)) == MAX_JOURNAL_QUEUE + 2000

    def test_keeps_spending_and_leaves_refusals_out(self, tmp_path: Path) -> None:
        with opened(tmp_path, max_bytes=0) as journal:
            journal.append(usage_record("kept"))
            wait_until(lambda: journal.full)
            journal.append(usage_record("left out", outcome=Outcome.REFUSED, cost_nanousd=0))
            journal.append(usage_record("spent"))
            journal.append_orphan(usage_record("orphan"))
        assert [row.record.request_id for row in stored(tmp_path)] == ["kept", "spent", "orphan"]

    def test_refusals_leave_the_other_half_to_admitted_requests(self, tmp_path: Path) -> None:
        refused = usage_record("refused", outcome=Outcome.REFUSED, cost_nanousd=0)
        appended = 0
        with opened(tmp_path, max_bytes=64 * KIB) as journal:

            def half_full() -> bool:
                nonlocal appended
                appended += 1
                journal.append(refused)
                return journal._stored > 32 * KIB

            wait_until(half_full)
            for _ in range(200):
                journal.append(refused)
            journal.append(usage_record("admitted"))
            assert not journal.full
        ids = [row.record.request_id for row in stored(tmp_path)]
        assert ids.count("admitted") == 1
        assert ids.count("refused") <= appended

    def test_while_the_disk_refuses_and_loses_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(journal_module, "_RETRY_S", 0.01)
        real_write = os.write
        refuse = True

        def write(fd: int, data: memoryview) -> int:
            """A disk that fills in the middle of a line."""
            if refuse:
                if len(data) > 100:
                    return real_write(fd, data[: len(data) - 100])
                raise OSError(errno.ENOSPC, "No space left on device")
            return real_write(fd, data)

        with opened(tmp_path) as journal:
            monkeypatch.setattr(os, "write", write)
            journal.append(usage_record("one"))
            wait_until(lambda: journal.full)
            journal.append(usage_record("two"))
            refuse = False
            wait_until(lambda: not journal.full)
        assert [row.record.request_id for row in stored(tmp_path)] == ["one", "two"]

    def test_when_its_directory_is_deleted_under_it(self, tmp_path: Path) -> None:
        directory = tmp_path / "journal"
        with opened(directory) as journal:
            for path in segments(directory):
                path.unlink()
            directory.rmdir()
            wait_until(lambda: journal.full)
            directory.mkdir()
            wait_until(lambda: not journal.full)
            journal.append(usage_record())
        assert stored(directory) == [UsageRow(usage_record())]

    def test_close_does_not_wait_for_a_disk_that_refuses(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def write(fd: int, data: memoryview) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        journal = Journal(tmp_path, max_bytes=MIB, clock=clock)
        monkeypatch.setattr(os, "write", write)
        journal.append(usage_record())
        journal.close()
        assert "are lost" in caplog.text


@contextmanager
def stuck_disk(patch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """A disk that takes a write and does not return, until released."""
    real_write = os.write
    released = threading.Event()

    def write(fd: int, data: memoryview) -> int:
        released.wait()
        return real_write(fd, data)

    patch.setattr(os, "write", write)
    try:
        yield released.set
    finally:
        released.set()


WRITER = """
import itertools, sys
from pathlib import Path
from extproc.usage.journal import Journal
from tests.usage_rows import usage_record
journal = Journal(Path(sys.argv[1]), max_bytes=1 << 30, clock=lambda: 1)
print("started", flush=True)
for number in itertools.count():
    journal.append(usage_record(str(number)))
"""


def test_a_killed_writer_leaves_every_line_that_was_there_and_no_gap(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        path = segments(tmp_path)[0]
        wait_until(lambda: path.stat().st_size > 100 * KIB)
        assert owned(path)
        before = path.read_bytes()
        writer.kill()
    data = path.read_bytes()
    assert data.startswith(before)
    assert not owned(path)
    lines = data[: data.rfind(b"\n") + 1].splitlines()
    assert [decode(line).record.request_id for line in lines] == [str(number) for number in range(len(lines))]
