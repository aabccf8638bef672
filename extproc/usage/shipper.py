"""Ships the usage journal into a usage store: every row once, whatever is killed and when."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from extproc import ownedfile
from extproc.limits import MAX_SHIP_BACKOFF_S, MAX_SHIP_BYTES
from extproc.usage.journal import SEGMENTS, decode
from extproc.usage.sinks import Sink, SinkUnavailable, UsageRow
from extproc.usage.unshipped import Rejected, log_line

_log = logging.getLogger(__name__)


class AlreadyShipping(Exception):
    """Another process ships this journal."""


class Shipper:
    """The one process that ships a journal's directory. Raises AlreadyShipping, or OSError, at the start.

    `stored` is called with the request ids of each batch that the store acknowledged, or that went out as log lines.
    Must not raise. `jitter` is from 0 to 1.
    """

    def __init__(
        self,
        directory: Path,
        sink: Sink,
        *,
        rejected: Rejected | None = None,
        stored: Callable[[Sequence[str]], None] = lambda ids: None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._sink = sink
        self._rejected = rejected or Rejected(directory)
        self._stored = stored
        self._jitter = jitter
        self._offsets: dict[str, int] = {}
        self._failing = False
        self._handing_over = False
        self._lock = os.open(directory / "shipper.lock", os.O_CREAT | os.O_RDWR, 0o600)
        if not ownedfile.take(self._lock):
            os.close(self._lock)
            raise AlreadyShipping(f"the usage journal in {directory} is being shipped by another process")

    def run(self, stopped: Callable[[float], bool], abandoned: Callable[[float], bool] = lambda seconds: True) -> None:
        """Ship until `stopped`, which waits for so many seconds, says so; then what is there, and end.

        A store that does not take the rows is tried again, at growing intervals, and so is a disk; after the stop until
        `abandoned`, which waits likewise.
        """
        failures = 0
        while not stopped(self._pause_s(failures)):
            failures = 0 if self._try() else failures + 1
        failures = 0
        while not self._try():
            failures += 1
            if abandoned(self._pause_s(failures)):
                return

    def ship_once(self) -> int:
        """Ship what the journal holds now, and delete the segments that are stored and have no writer. Rows shipped."""
        return sum(self._ship(path) for path in sorted(self._directory.glob(SEGMENTS)))

    def hand_over(self, out: BinaryIO) -> int:
        """Write what the store has not acknowledged to `out` as log lines, which count as stored. Rows written.

        The last thing that is done, also while `run` waits in another thread for a store that does not answer: what
        that one still gets through has then gone both ways, under the same ids.
        """
        self._handing_over = True
        return sum(self._hand_over(path, out) for path in sorted(self._directory.glob(SEGMENTS)))

    def close(self) -> None:
        """Let another process ship."""
        os.close(self._lock)

    def _try(self) -> bool:
        try:
            self.ship_once()
        except (SinkUnavailable, OSError) as error:
            if not self._failing:
                _log.error("usage records wait in the journal: %s", error)
            self._failing = True
            return False
        if self._failing:
            _log.info("the usage store takes records again")
        self._failing = False
        return True

    def _pause_s(self, failures: int) -> float:
        if failures == 0:
            return self._sink.interval_s
        longest_s = min(self._sink.interval_s * 2.0 ** min(failures, 16), MAX_SHIP_BACKOFF_S)
        return longest_s * (1 + self._jitter()) / 2

    def _ship(self, path: Path) -> int:
        fd = os.open(path, os.O_RDONLY)
        try:
            ended = ownedfile.take(fd)  # asked before reading: whoever has ended writes no more
            shipped = self._ship_lines(fd, path.name)
            if ended and not self._handing_over:
                self._delete(path)
        finally:
            os.close(fd)
        return shipped

    def _ship_lines(self, fd: int, segment: str) -> int:
        shipped = 0
        offset = self._offsets.pop(segment, None)  # unknown until the last write is known to have arrived
        if offset is None:
            offset = self._sink.offset(segment)
        for data in self._batches(fd, offset):
            if self._handing_over:
                return shipped
            rows = self._rows(data)
            offset += len(data)
            self._sink.write(segment, offset, rows)
            self._stored([row.record.request_id for row in rows])
            shipped += len(rows)
        self._offsets[segment] = offset
        return shipped

    def _batches(self, fd: int, offset: int) -> Iterator[bytes]:
        """Whole lines from `offset` on, until there are no more."""
        while data := _whole_lines(os.pread(fd, MAX_SHIP_BYTES, offset)):
            data = _first_lines(data, self._sink.batch_rows)
            yield data
            offset += len(data)

    def _hand_over(self, path: Path, out: BinaryIO) -> int:
        written = 0
        with suppress(FileNotFoundError), path.open("rb", buffering=0) as segment:  # shipped and deleted meanwhile
            offset = self._sink.offset(path.name)
            for data in self._batches(segment.fileno(), offset):
                rows = self._rows(data)
                out.write(b"".join(map(log_line, rows)))
                out.flush()
                offset += len(data)
                with suppress(SinkUnavailable, OSError):  # of a full disk, too: what is said twice has the same ids
                    self._sink.write(path.name, offset, ())
                self._stored([row.record.request_id for row in rows])
                written += len(rows)
        return written

    def _delete(self, path: Path) -> None:
        """The file first: a store that has forgotten a segment that is still there would be sent it again."""
        path.unlink()
        self._sink.forget(path.name)
        del self._offsets[path.name]

    def _rows(self, data: bytes) -> list[UsageRow]:
        """A line that cannot be read is set aside for people to look at, and must not hold up the rest."""
        rows: list[UsageRow] = []
        for line in filter(None, data.split(b"\n")):
            try:
                rows.append(decode(line))
            except ValueError:
                self._rejected.add_line(line)
        return rows


def _whole_lines(data: bytes) -> bytes:
    """Up to the last newline. A full read without one is no line of ours, and is taken so that it can be set aside."""
    end = data.rfind(b"\n") + 1
    return data if end == 0 and len(data) == MAX_SHIP_BYTES else data[:end]


def _first_lines(data: bytes, count: int) -> bytes:
    parts = data.split(b"\n", count)
    return data if len(parts) <= count else data[: len(data) - len(parts[count])]
