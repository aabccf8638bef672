"""How far each segment of a journal has come, for a store that keeps no offsets: a small file beside the journal."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import orjson

_log = logging.getLogger(__name__)


class Positions:
    """Bytes by segment, replaced as a whole. One that cannot be read counts as none: then rows are sent again.

    Raises OSError. May be used from several threads: what one has moved on, another does not move back.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        # Of segments that are still there: a crash between a deletion and its `drop` must not leave an entry for good.
        self._bytes = {name: end for name, end in _read(path).items() if (path.parent / name).exists()}

    def get(self, segment: str) -> int:
        """0 for a segment never seen."""
        with self._lock:
            return self._bytes.get(segment, 0)

    def put(self, segment: str, end: int) -> None:
        """Durable when it returns."""
        with self._lock:
            self._replace(self._bytes | {segment: max(end, self._bytes.get(segment, 0))})

    def drop(self, segment: str) -> None:
        with self._lock:
            self._replace({name: end for name, end in self._bytes.items() if name != segment})

    def _replace(self, positions: dict[str, int]) -> None:
        if positions == self._bytes:
            return
        fresh = self._path.with_suffix(".new")
        with fresh.open("wb") as file:
            file.write(orjson.dumps(positions))
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._path)
        _sync_directory(self._path.parent)
        self._bytes = positions


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _read(path: Path) -> dict[str, int]:
    try:
        found = orjson.loads(path.read_bytes())
        return {str(name): int(end) for name, end in found.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError):
        _log.warning("%s cannot be read: the journal is shipped again from its beginning", path)
        return {}
