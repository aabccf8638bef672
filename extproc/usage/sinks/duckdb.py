"""The local usage store: one DuckDB file. DuckDB lets one process at a time open it, so every use opens and closes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
from pydantic import TypeAdapter

from extproc.limits import MAX_SHIP_BYTES
from extproc.records import BudgetSnapshot, UsageRecord
from extproc.usage import views
from extproc.usage.sinks import SinkUnavailable, UsageRow

_COLUMNS = {
    "request_id": "VARCHAR",
    "ts": "TIMESTAMPTZ",
    "service": "VARCHAR",
    "user": "VARCHAR",
    "team": "VARCHAR",
    "requested_model": "VARCHAR",
    "provider": "VARCHAR",
    "model": "VARCHAR",
    "route": "VARCHAR",
    "attempts": "BIGINT",
    "stream": "BOOLEAN",
    "status": "BIGINT",
    "outcome": "VARCHAR",
    "prompt_tokens": "BIGINT",
    "cached_prompt_tokens": "BIGINT",
    "completion_tokens": "BIGINT",
    "reasoning_tokens": "BIGINT",
    "usage_source": "VARCHAR",
    "cost_nanousd": "BIGINT",
    "price_version": "VARCHAR",
    "ttft_ms": "BIGINT",
    "duration_ms": "BIGINT",
    "overhead_us": "BIGINT",
    "budget_id": "VARCHAR",
    "cache_savings_nanousd": "BIGINT",
}
_TYPES = {**_COLUMNS, "orphan": "BOOLEAN"}
_SNAPSHOT_TYPES = {
    "ts": "TIMESTAMPTZ",
    "budget_id": "VARCHAR",
    "scope": "VARCHAR",
    "period": "VARCHAR",
    "unit": "VARCHAR",
    "mode": "VARCHAR",
    "limit_amount": "BIGINT",
    "posted": "BIGINT",
    "pending": "BIGINT",
    "resets_at": "TIMESTAMPTZ",
}


def _definition(types: dict[str, str]) -> str:
    return ", ".join(f'"{name}" {type_}' for name, type_ in types.items())


def _names(types: dict[str, str]) -> str:
    return ", ".join(f'"{name}"' for name in types)


_CREATE_USAGE = f"CREATE TABLE IF NOT EXISTS usage ({_definition(_TYPES)}, PRIMARY KEY (request_id))"
# What a store of an older version lacks. Their order is not this one's then: every statement names its columns.
_ADD_COLUMNS = [f'ALTER TABLE usage ADD COLUMN IF NOT EXISTS "{name}" {type_}' for name, type_ in _COLUMNS.items()]
_CREATE_SNAPSHOTS = f"CREATE TABLE IF NOT EXISTS budget_snapshots ({_definition(_SNAPSHOT_TYPES)})"
_CREATE_OFFSETS = "CREATE TABLE IF NOT EXISTS journal_offsets (segment VARCHAR PRIMARY KEY, bytes BIGINT)"
# One array a column: a thousand rows take 40 ms, where executemany takes 900.
_INSERT_USAGE = f"""
    INSERT INTO usage ({_names(_TYPES)}) SELECT {", ".join(f"unnest(?::{type_}[])" for type_ in _TYPES.values())}
    ON CONFLICT (request_id) DO UPDATE SET {", ".join(f'"{name}" = excluded."{name}"' for name in [*_TYPES][1:])}
    WHERE usage.orphan AND NOT excluded.orphan
"""
_INSERT_SNAPSHOTS = f"""
    INSERT INTO budget_snapshots ({_names(_SNAPSHOT_TYPES)})
    SELECT {", ".join(f"unnest(?::{type_}[])" for type_ in _SNAPSHOT_TYPES.values())}
"""
_SELECT_USAGE = f"""
    SELECT {", ".join("epoch_us(ts)" if name == "ts" else f'"{name}"' for name in _COLUMNS)}
    FROM usage ORDER BY ts DESC, request_id DESC LIMIT ?
"""  # noqa: S608 - the names are this module's own

_AS_TEXT = {
    "DATE": "CAST({} AS VARCHAR)",
    "TIMESTAMP WITH TIME ZONE": "strftime({}, '%Y-%m-%dT%H:%M:%S.%gZ')",
}

_OPEN_TIMEOUT_S = 5.0  # a batch takes a tenth of a second; a dead process holds nothing
_OPEN_RETRY_S = 0.02

_usage_record = TypeAdapter(UsageRecord)
_DEFAULTED = {field.name for field in dataclasses.fields(UsageRecord) if field.default is not dataclasses.MISSING}


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """What a query found: `rows` have a value for each of `columns`."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


class DuckDbSink:
    """Tables `usage` (UsageRecord's columns, and `orphan`) and `budget_snapshots`. Tables and columns are created where
    they are missing; all here raises SinkUnavailable.
    """

    batch_rows = MAX_SHIP_BYTES  # no bound of its own: a transaction takes what is read at once
    interval_s = 0.2

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._transaction() as db:
            for statement in (_CREATE_USAGE, *_ADD_COLUMNS, _CREATE_SNAPSHOTS, _CREATE_OFFSETS):
                db.execute(statement)

    def offset(self, segment: str) -> int:
        with self._transaction() as db:
            row = db.execute("SELECT bytes FROM journal_offsets WHERE segment = ?", [segment]).fetchone()
        return int(row[0]) if row else 0

    def write(self, segment: str, offset_after: int, rows: Sequence[UsageRow]) -> None:
        columns = _columns(_one_a_request(rows))
        with self._transaction() as db:
            db.execute(_INSERT_USAGE, columns)
            db.execute("INSERT OR REPLACE INTO journal_offsets VALUES (?, ?)", [segment, offset_after])

    def forget(self, segment: str) -> None:
        with self._transaction() as db:
            db.execute("DELETE FROM journal_offsets WHERE segment = ?", [segment])

    def write_snapshots(self, snapshots: Sequence[BudgetSnapshot]) -> None:
        columns = [[_moment(getattr(row, name), type_) for row in snapshots] for name, type_ in _SNAPSHOT_TYPES.items()]
        with self._transaction() as db:
            db.execute(_INSERT_SNAPSHOTS, columns)

    @contextmanager
    def _transaction(self) -> Iterator[duckdb.DuckDBPyConnection]:
        with _open(self._path, read_only=False) as db:
            db.begin()
            yield db
            db.commit()


def read_usage(path: Path, last: int | None = None) -> list[UsageRecord]:
    """The newest `last` records or all, oldest first, `ts` in UTC with milliseconds. Raises SinkUnavailable."""
    if not path.exists():
        raise SinkUnavailable(f"there is no usage store at {path}")
    with _open(path, read_only=True) as db:
        rows = db.execute(_SELECT_USAGE, [last]).fetchall()
    return [_record(row) for row in reversed(rows)]


def read_view(path: Path, name: str, days: int) -> Rows:
    """A view's rows of the last `days` days (UTC, today included), oldest first, as `tollgate report` shows them.

    Days and times come as text. Raises SinkUnavailable, and KeyError for a view that there is not.
    """
    every = {view.name: view for view in views.load()}
    with _open(path, read_only=True) as db:
        # Temporary names come before the file's own, so that its table must be named in full. It plays the log.
        (file,) = db.execute("SELECT current_database()").fetchone() or ("",)
        db.execute(f'CREATE TEMP VIEW usage_log AS SELECT * FROM "{file}".main.usage')  # noqa: S608 - likewise
        for view in every.values():
            db.execute(f'CREATE TEMP VIEW "{view.name}" AS {views.for_duckdb(view)}')
        columns = [(column, str(type_)) for column, type_, *_ in db.table(every[name].name).description]
        found = db.execute(_select_recent(name, columns), [days]).fetchall()
    return Rows(tuple(column for column, _ in columns), tuple(found))


def _select_recent(view: str, columns: Sequence[tuple[str, str]]) -> str:
    names = [name for name, _ in columns]
    when = "day" if "day" in names else "ts"
    order = ", ".join(f'"{name}"' for name in (when, *names) if name in names)
    shown = ", ".join(f"{_AS_TEXT.get(type_, '{}')} AS {{}}".format(*[f'"{name}"'] * 2) for name, type_ in columns)
    recent = f"CAST({when} AS DATE) > current_date - CAST(? AS INTEGER)"
    return f'SELECT {shown} FROM "{view}" WHERE {recent} ORDER BY {order}'  # noqa: S608 - names of our own files


@contextmanager
def _open(path: Path, *, read_only: bool) -> Iterator[duckdb.DuckDBPyConnection]:
    """An open file, to this process alone. What DuckDB raises until it is closed becomes SinkUnavailable."""
    try:
        with _connect(path, read_only) as db:
            db.execute("SET TimeZone = 'UTC'")
            yield db
    except duckdb.Error as error:
        raise SinkUnavailable(f"usage store {path}: {str(error).splitlines()[0]}") from error


def _connect(path: Path, read_only: bool) -> duckdb.DuckDBPyConnection:
    deadline = time.monotonic() + _OPEN_TIMEOUT_S
    while True:
        try:
            return duckdb.connect(path, read_only=read_only)
        except duckdb.IOException:  # another process has it open
            if time.monotonic() > deadline:
                raise
            time.sleep(_OPEN_RETRY_S)


def _one_a_request(rows: Sequence[UsageRow]) -> list[UsageRow]:
    """The same rule within a batch, because one statement may touch a row only once."""
    kept: dict[str, UsageRow] = {}
    for row in rows:
        earlier = kept.get(row.record.request_id)
        if earlier is None or (earlier.orphan and not row.orphan):
            kept[row.record.request_id] = row
    return list(kept.values())


def _columns(rows: Sequence[UsageRow]) -> list[list[Any]]:
    """One list for each of `_TYPES`."""
    values = [[_moment(getattr(row.record, name), type_) for row in rows] for name, type_ in _COLUMNS.items()]
    return [*values, [row.orphan for row in rows]]


def _moment(value: Any, type_: str) -> Any:
    return datetime.fromisoformat(value) if value is not None and type_ == "TIMESTAMPTZ" else value


def _record(row: tuple[Any, ...]) -> UsageRecord:
    pairs = zip(_COLUMNS, row, strict=True)
    # Null in the rows of before a column was added.
    values = {name: value for name, value in pairs if value is not None or name not in _DEFAULTED}
    ts = datetime.fromtimestamp(values["ts"] / 1e6, UTC)
    return _usage_record.validate_python(values | {"ts": ts.isoformat(timespec="milliseconds").replace("+00:00", "Z")})
