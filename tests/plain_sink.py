"""A usage store for tests that shows what the real one would hide."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from extproc.usage.sinks import UsageRow


class PlainSink:
    """A store without a key: a row that comes twice is there twice. Another sink behind the same seam, on SQLite."""

    batch_rows = 500
    interval_s = 0.2

    def __init__(self, path: Path) -> None:
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("CREATE TABLE IF NOT EXISTS usage (request_id)")
        self._db.execute("CREATE TABLE IF NOT EXISTS offsets (segment PRIMARY KEY, bytes)")

    def offset(self, segment: str) -> int:
        row = self._db.execute("SELECT bytes FROM offsets WHERE segment = ?", [segment]).fetchone()
        return row[0] if row else 0

    def write(self, segment: str, offset_after: int, rows: Sequence[UsageRow]) -> None:
        with self._db:
            self._db.execute("BEGIN")
            self._db.executemany("INSERT INTO usage VALUES (?)", [[row.record.request_id] for row in rows])
            self._db.execute("INSERT OR REPLACE INTO offsets VALUES (?, ?)", [segment, offset_after])

    def forget(self, segment: str) -> None:
        self._db.execute("DELETE FROM offsets WHERE segment = ?", [segment])

    def ids(self) -> list[str]:
        return [row[0] for row in self._db.execute("SELECT request_id FROM usage ORDER BY rowid")]

    def segments(self) -> list[str]:
        return [row[0] for row in self._db.execute("SELECT segment FROM offsets")]

    def close(self) -> None:
        self._db.close()
