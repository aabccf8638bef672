"""Settlements that the ledger did not take, kept on disk until it does: what a request cost outlives Redis and us."""

from __future__ import annotations

import logging
import os
import queue
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import orjson
from pydantic import TypeAdapter

from extproc import ownedfile
from extproc.records import Settlement

_ALL_DONE = b""

_log = logging.getLogger(__name__)
_settlement = TypeAdapter(Settlement)


class SettlementLog:
    """The open settlements of one processor, and of dead ones whose files it found at its start.

    One may come out again after a crash; posting it is idempotent by its id. `clock` gives Unix milliseconds, for the
    file's name. Raises OSError where the directory cannot be written at the start.
    """

    def __init__(self, directory: Path, *, clock: Callable[[], int]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"settlements-{clock()}-{os.getpid()}.jsonl"
        fd = ownedfile.create(path)
        if fd is None:
            raise FileExistsError(f"{path} exists: two settlement logs in one millisecond")
        self._fd = fd
        self._open: dict[str, Settlement] = {}
        self._adopt(path)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._disk = ThreadPoolExecutor(max_workers=1, thread_name_prefix="settlement-log")

    def pending(self) -> tuple[Settlement, ...]:
        """What is still to be posted, oldest first."""
        return tuple(self._open.values())

    def add(self, settlement: Settlement) -> None:
        """Keep it; never waits. Where the disk refuses, that is logged, and it is kept in memory only."""
        self._open[settlement.request_id] = settlement
        self._put(_added(settlement))

    def done(self, request_id: str) -> None:
        """The ledger has it. When it has all, the file is emptied. An unknown id changes nothing."""
        if self._open.pop(request_id, None) is not None:
            self._put(orjson.dumps({"done": request_id}) if self._open else _ALL_DONE)

    def close(self) -> None:
        """Write what is still to be written, and leave the file to the next processor."""
        self._disk.shutdown()
        os.close(self._fd)

    def _put(self, line: bytes) -> None:
        self._lines.put(line)
        self._disk.submit(self._write)

    def _write(self) -> None:
        """Everything that waits, with one sync: thousands of streams may end in the moment in which Redis goes."""
        lines: list[bytes] = []
        try:
            while not self._lines.empty():
                lines.append(self._lines.get_nowait())
                if lines[-1] is _ALL_DONE:
                    lines.clear()
                    os.ftruncate(self._fd, 0)
            _append(self._fd, lines)
        except OSError:
            _log.exception("settlement log: %d lines could not be written", len(lines))

    def _adopt(self, own: Path) -> None:
        for path in sorted(own.parent.glob("settlements-*.jsonl")):
            if path != own:
                self._adopt_file(path)

    def _adopt_file(self, path: Path) -> None:
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # another starting processor was faster
            return
        try:
            if not ownedfile.take(fd) or os.fstat(fd).st_nlink == 0:
                return
            found = _read(path.read_bytes())
            _append(self._fd, map(_added, found.values()))
            self._open.update(found)
            path.unlink()
        finally:
            os.close(fd)


def _added(settlement: Settlement) -> bytes:
    return orjson.dumps({"add": settlement})


def _append(fd: int, lines: Iterable[bytes]) -> None:
    """Each line begins with a newline too, so that one that a crash or a full disk tore spoils no other."""
    left = memoryview(b"".join(b"\n" + line + b"\n" for line in lines))
    while left:
        left = left[os.write(fd, left) :]
    os.fdatasync(fd)


def _read(data: bytes) -> dict[str, Settlement]:
    """The settlements that were added and not done, by id."""
    found: dict[str, Settlement] = {}
    for line in filter(None, data.split(b"\n")):
        try:
            entry = orjson.loads(line)
            if "done" in entry:
                found.pop(entry["done"], None)
            else:
                settlement = _settlement.validate_python(entry["add"])
                found[settlement.request_id] = settlement
        except (ValueError, TypeError, KeyError):
            _log.warning("settlement log: a torn line is skipped")
    return found
