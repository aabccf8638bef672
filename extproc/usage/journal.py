"""The usage journal: one JSON line a request, on disk before any usage store sees it.

Each processor writes segments of its own into a directory that several may share, and owns its current one until it
starts the next (extproc/ownedfile.py). A line counts only with its newline: a crash may tear the last one.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from pydantic import TypeAdapter

from extproc import ownedfile
from extproc.limits import MAX_JOURNAL_BATCH, MAX_JOURNAL_QUEUE, MAX_SEGMENT_BYTES, MAX_TOKENS
from extproc.records import Outcome, UsageRecord
from extproc.usage.sinks import UsageRow

SEGMENTS = "usage-*.jsonl"

_SYNC_INTERVAL_S = 0.1
_GATHER_S = 0.01  # between two writes: under load one write, and one turn of the writer's thread, serves many records
_RETRY_S = 0.5  # how long a disk that refused a write is left alone
_REFUSALS_SHARE = 2  # they may fill one part in this many; the rest is for requests that cost something
_SEGMENTS_PER_JOURNAL = 16  # a shipped segment is deleted whole: small parts keep the measured size near the unshipped

_log = logging.getLogger(__name__)
_usage_record = TypeAdapter(UsageRecord)


def encode(row: UsageRow) -> bytes:
    """One line: UsageRecord's fields in their order, and `"orphan": true` after them for an orphan."""
    try:
        return _line(row.record, row.orphan)
    except TypeError:  # a lone surrogate from the caller's JSON, or a figure beyond 53 bits from a provider
        return _line(_storable(row.record), row.orphan)


def decode(line: bytes) -> UsageRow:
    """The inverse of `encode`. Raises ValueError for a line that is not a usage row."""
    values = orjson.loads(line)
    orphan = isinstance(values, dict) and values.pop("orphan", False)
    record = _usage_record.validate_python(values)
    datetime.fromisoformat(record.ts)
    return UsageRow(record, orphan is True)


def _line(record: UsageRecord, orphan: bool) -> bytes:
    values: Any = {**dataclasses.asdict(record), "orphan": True} if orphan else record
    return orjson.dumps(values, option=orjson.OPT_STRICT_INTEGER | orjson.OPT_APPEND_NEWLINE)


def _storable(record: UsageRecord) -> UsageRecord:
    values = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    for name, value in values.items():
        if isinstance(value, str):
            values[name] = value.encode("utf-8", "replace").decode()
        elif isinstance(value, int):
            values[name] = max(-MAX_TOKENS, min(value, MAX_TOKENS))
    return dataclasses.replace(record, **values)


class Journal:
    """The append-only journal of one processor. Raises OSError where the directory cannot be written at the start.

    `max_bytes` bounds what the directory holds, all processors' segments together; the shipper deletes what the usage
    store has. `clock` gives Unix milliseconds, for the segments' names.
    """

    def __init__(self, directory: Path, *, max_bytes: int, clock: Callable[[], int]) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._segment_bytes = min(MAX_SEGMENT_BYTES, max_bytes // _SEGMENTS_PER_JOURNAL)
        self._prefix = f"usage-{clock()}-{os.getpid()}"
        self._number = 0
        directory.mkdir(parents=True, exist_ok=True)
        self._fd = self._open_segment()
        self._written = 0  # bytes in the current segment
        self._dirty = False
        self._synced_at = self._wrote_at = time.monotonic()
        self._stored = stored_bytes(directory)
        self._refused = False  # the disk took neither a write nor a sync
        self._said_full = False
        self._queue: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._writer = threading.Thread(target=self._run, name="usage-journal", daemon=True)
        self._writer.start()

    @property
    def full(self) -> bool:
        """Whether new requests must be refused: nothing more of what they cost could be kept."""
        return self._holds_over(1)

    @property
    def roomy(self) -> bool:
        """Whether what costs nothing, or can wait elsewhere, is taken."""
        return not self._holds_over(_REFUSALS_SHARE)

    def _holds_over(self, share: int) -> bool:
        queued = self._queue.qsize() >= MAX_JOURNAL_QUEUE // share
        return self._refused or self._stored > self._max_bytes // share or queued

    def append(self, record: UsageRecord) -> bytes:
        """Hand a record to the writer; never waits. Returns its line.

        What an admitted request cost is always taken; while the journal is full, no new ones are admitted. Refusals are
        left out from half of `max_bytes` on: they cost nothing, and whoever has no token can cause them without end,
        which must not fill the journal and so refuse everyone.
        """
        if record.outcome is Outcome.REFUSED and not self.roomy:
            return b""
        line = encode(UsageRow(record))
        self._queue.put(line)
        return line

    def append_orphan(self, record: UsageRecord) -> None:
        """The same for a request whose processor died: its own record, should there be one, takes precedence."""
        self._queue.put(encode(UsageRow(record, orphan=True)))

    def close(self) -> None:
        """Write and sync what was appended, and end. What a refusing disk does not take now is lost, and logged."""
        self._closing.set()
        self._queue.put(b"")  # wakes the writer
        self._writer.join()
        os.close(self._fd)

    # The writer's thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            closing = self._closing.is_set()  # asked before the queue: what was appended before `close` is then in it
            lines = self._take()
            self._write(b"".join(lines))
            if time.monotonic() - self._synced_at >= _SYNC_INTERVAL_S:
                self._sync()
            if closing and not lines:
                self._sync()
                return

    def _take(self) -> list[bytes]:
        lines = []
        try:
            lines.append(self._queue.get(timeout=0 if self._closing.is_set() else _SYNC_INTERVAL_S))
            self._closing.wait(max(0.0, self._wrote_at + _GATHER_S - time.monotonic()))
            while len(lines) < MAX_JOURNAL_BATCH:
                lines.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return lines

    def _write(self, data: bytes) -> None:
        """Written at once rather than at the next sync: what the kernel has survives a kill of this process."""
        left = memoryview(data)
        while left:
            try:
                count = os.write(self._fd, left)
            except OSError:
                self._refused = True
                self._say_when_full()
                if self._closing.wait(_RETRY_S):
                    _log.exception("usage journal: %d bytes of usage records are lost", len(left))
                    return
                continue
            left = left[count:]
            self._written += count
            self._dirty = True
            self._wrote_at = time.monotonic()

    def _sync(self) -> None:
        """Make what was written durable, start another segment where it is time, and measure the directory."""
        try:
            if self._dirty:
                os.fdatasync(self._fd)
                self._dirty = False
            self._stored = stored_bytes(self._directory)
            if self._rotation_due():
                self._rotate()
            self._refused = False
        except OSError:
            self._refused = True
        self._synced_at = time.monotonic()
        self._say_when_full()

    def _rotation_due(self) -> bool:
        if not os.fstat(self._fd).st_nlink:  # deleted under us: what is written to it now is lost
            return True
        # A full journal rotates too, or a segment that is shipped but still open would keep it full for good.
        return self._written > 0 and (self._written >= self._segment_bytes or self._stored > self._max_bytes)

    def _rotate(self) -> None:
        fd = self._open_segment()
        os.close(self._fd)
        self._fd = fd
        self._written = 0

    def _open_segment(self) -> int:
        while True:
            self._number += 1
            fd = ownedfile.create(self._directory / f"{self._prefix}-{self._number}.jsonl")
            if fd is not None:
                return fd

    def _say_when_full(self) -> None:
        full = self.full
        if full is not self._said_full:
            self._said_full = full
            _log.warning("usage journal: %s", "full, new requests are refused" if full else "takes records again")


def stored_bytes(directory: Path) -> int:
    """What the segments in a journal's directory hold: all processors'."""
    total = 0
    for path in directory.glob(SEGMENTS):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # shipped meanwhile
            continue
    return total
