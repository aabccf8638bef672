"""Ships the usage journal into a usage store: every row once, whatever is killed and when."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from extproc import ownedfile
from extproc.journal import SEGMENTS, decode
from extproc.limits import MAX_SHIP_BYTES
from extproc.sinks import Sink, SinkUnavailable, UsageRow

_INTERVAL_S = 0.2

_log = logging.getLogger(__name__)


class AlreadyShipping(Exception):
    """Another process ships this journal."""


class Shipper:
    """The one process that ships a journal's directory. Raises AlreadyShipping, or OSError, at the start."""

    def __init__(self, directory: Path, sink: Sink) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._sink = sink
        self._offsets: dict[str, int] = {}
        self._lock = os.open(directory / "shipper.lock", os.O_CREAT | os.O_RDWR, 0o600)
        if not ownedfile.take(self._lock):
            os.close(self._lock)
            raise AlreadyShipping(f"the usage journal in {directory} is being shipped by another process")

    def run(self, stopped: Callable[[float], bool]) -> None:
        """Ship until `stopped`, which waits for so many seconds, says so; then what is there, and end.

        A store that does not take the rows is tried again, and so is a disk.
        """
        stopping = failing = False
        while not stopping:
            stopping = stopped(_INTERVAL_S)
            try:
                self.ship_once()
                failing = False
            except (SinkUnavailable, OSError) as error:
                if not failing:
                    _log.error("usage records wait in the journal: %s", error)
                failing = True

    def ship_once(self) -> int:
        """Ship what the journal holds now, and delete the segments that are stored and have no writer. Rows shipped."""
        return sum(self._ship(path) for path in sorted(self._directory.glob(SEGMENTS)))

    def close(self) -> None:
        """Let another process ship."""
        os.close(self._lock)

    def _ship(self, path: Path) -> int:
        fd = os.open(path, os.O_RDONLY)
        try:
            ended = ownedfile.take(fd)  # asked before reading: whoever has ended writes no more
            shipped = self._ship_lines(fd, path.name)
            if ended:
                self._delete(path)
        finally:
            os.close(fd)
        return shipped

    def _ship_lines(self, fd: int, segment: str) -> int:
        shipped = 0
        offset = self._offsets.pop(segment, None)  # unknown until the last write is known to have arrived
        if offset is None:
            offset = self._sink.offset(segment)
        while data := _whole_lines(os.pread(fd, MAX_SHIP_BYTES, offset)):
            rows = self._rows(data)
            offset += len(data)
            self._sink.write(segment, offset, rows)
            shipped += len(rows)
        self._offsets[segment] = offset
        return shipped

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
                _log.error("a line of the usage journal cannot be read; it is kept in rejected.jsonl")
                with (self._directory / "rejected.jsonl").open("ab") as rejected:
                    rejected.write(line + b"\n")
        return rows


def _whole_lines(data: bytes) -> bytes:
    """Up to the last newline. A full read without one is no line of ours, and is taken so that it can be set aside."""
    end = data.rfind(b"\n") + 1
    return data if end == 0 and len(data) == MAX_SHIP_BYTES else data[:end]
