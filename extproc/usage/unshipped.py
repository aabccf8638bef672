"""Usage rows on their way around the usage store: as log lines, and set aside in a file. One form, which can be loaded.

A line is JSON with the row under `usage_row`, in the fields of the journal's own lines (extproc/usage/journal.py).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from extproc.limits import MAX_REJECTED_BYTES
from extproc.usage.journal import decode, encode
from extproc.usage.sinks import UsageRow

_log = logging.getLogger(__name__)


def log_line(row: UsageRow) -> bytes:
    """A structured log line as Cloud Logging takes them (`severity`, `message`), with its newline."""
    return _line({"severity": "WARNING", "message": "usage row not shipped"}, row)


def rows_in(file: BinaryIO) -> Iterator[UsageRow | str | None]:
    """What the lines of a log say: a row, why it cannot be read, or None for a line without one.

    Lines of ours, of `rejected.jsonl`, and entries of Cloud Logging, one a line (as a sink exports them) or as an array
    (as `gcloud logging read --format=json` prints them).
    """
    for number, (where, entry) in enumerate(_entries(file), 1):
        row = entry.get("usage_row") if isinstance(entry, dict) else None
        try:
            yield decode(orjson.dumps(row)) if isinstance(row, dict) else None
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            yield f"{where} {number}: no usage row: {reason}"


class Rejected:
    """`rejected.jsonl` in the journal's directory: what no usage store takes, for people to look at. Bounded.

    `count` is how many since the start. `out` is given the rows too, where the directory may go with the machine.
    Raises OSError.
    """

    def __init__(self, directory: Path, out: BinaryIO | None = None) -> None:
        self._path = directory / "rejected.jsonl"
        self._out = out
        self.count = 0

    def add_line(self, line: bytes) -> None:
        """A line of the journal that cannot be read."""
        self._add(line + b"\n")
        _log.error("a line of the usage journal cannot be read; it is kept in %s (%d)", self._path.name, self.count)

    def add(self, row: UsageRow, reason: str) -> None:
        """A row that the store rejected."""
        what = {"severity": "ERROR", "message": "usage row rejected by the usage store", "reason": reason}
        line = _line(what, row)
        self._add(line)
        if self._out is not None:
            self._out.write(line)
            self._out.flush()
        request_id = row.record.request_id
        _log.error("usage row %s is rejected and kept in %s (%d): %s", request_id, self._path.name, self.count, reason)

    def _add(self, line: bytes) -> None:
        if self._path.exists() and self._path.stat().st_size + len(line) > MAX_REJECTED_BYTES:
            self._path.replace(self._path.with_name("rejected-before.jsonl"))
        with self._path.open("ab") as file:
            file.write(line)
        self.count += 1


def _line(what: dict[str, str], row: UsageRow) -> bytes:
    return orjson.dumps(what | {"usage_row": orjson.Fragment(encode(row).rstrip())}, option=orjson.OPT_APPEND_NEWLINE)


def _entries(file: BinaryIO) -> Iterator[tuple[str, Any]]:
    """Each with what it is called. A text line that is no JSON is None."""
    first = next((line for line in file if line.strip()), b"")
    if first.lstrip().startswith(b"["):
        try:
            yield from (("entry", _payload(entry)) for entry in orjson.loads(first + file.read()))
        except orjson.JSONDecodeError as error:
            raise ValueError(f"the file is no JSON array: {error}") from error
        return
    for line in itertools.chain([first], file):
        try:
            yield "line", _payload(orjson.loads(line))
        except orjson.JSONDecodeError:
            yield "line", None


def _payload(entry: Any) -> Any:
    """What was logged, of an entry that Cloud Logging wraps it in."""
    return entry.get("jsonPayload", entry) if isinstance(entry, dict) else entry
