"""The usage store in BigQuery: rows streamed by insertAll, each under an id by which BigQuery drops a repeat.

It drops repeats for about a minute, as far as it can. What comes twice all the same is settled by the view `usage`,
which has one row a request. docs/decisions/0012 says why this API.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import requests
from google.api_core.exceptions import GoogleAPICallError, GoogleAPIError, NotFound, RetryError
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.cloud import bigquery

from extproc.limits import (
    INSERT_TIMEOUT_S,
    MAX_INSERT_BYTES,
    MAX_INSERT_ID_CHARS,
    MAX_INSERT_ROWS,
    MISSING_COLUMN_S,
)
from extproc.records import BudgetSnapshot
from extproc.settings import Dataset
from extproc.usage.sinks import SinkUnavailable, UsageRow
from extproc.usage.sinks.positions import Positions

USAGE_TABLE = "usage_log"
SNAPSHOTS_TABLE = "budget_snapshots"

# A row without one of these says nothing: where the table lacks it, it is the wrong table.
_ESSENTIAL = frozenset({"request_id", "ts", "cost_nanousd", "budget_id", "posted", "limit_amount"})
# Reasons of BigQuery's for not having tried a row, or not to the end.
_UNTRIED = frozenset({"stopped", "timeout", "backendError", "internalError", "quotaExceeded", "rateLimitExceeded"})
_NO_SUCH_FIELD = re.compile(r"no such field(?:: ?(\w+))?", re.IGNORECASE)
_ADDRESS = re.compile(r"^[A-Z]+ https?://\S+: ")
_TOO_LARGE = 413
_REFUSED_WHOLE = (400, _TOO_LARGE)
_ROW_OVERHEAD_BYTES = 40 + MAX_INSERT_ID_CHARS  # `{"json": …, "insertId": …}, `

FAILURES = (GoogleAPIError, GoogleAuthError, requests.RequestException)  # what Google's client raises

SetAside = Callable[[UsageRow, str], None]

_log = logging.getLogger(__name__)


def connect(dataset: Dataset, endpoint: str | None) -> bigquery.Client:
    """A client with the default credentials of where this runs, or with none for a server of the tests'."""
    if endpoint is None:
        return bigquery.Client(project=dataset.project)
    anonymous = AnonymousCredentials()  # type: ignore[no-untyped-call]
    return bigquery.Client(dataset.project, credentials=anonymous, client_options={"api_endpoint": endpoint})


def one_line(error: Exception) -> str:
    """What went wrong, without the address and the lines of detail that Google's exceptions add."""
    if isinstance(error, RetryError) and error.cause is not None:
        error = error.cause
    message = error.message if isinstance(error, GoogleAPICallError) else str(error)
    said = _ADDRESS.sub("", str(message or type(error).__name__))
    return " ".join(said.split())[:300]


class BigQuerySink:
    """Tables `usage_log` and `budget_snapshots` of a dataset, which `tollgate bigquery apply` has made.

    BigQuery has no transaction with our offset: it is kept in `positions` once the rows were acknowledged. `connect` is
    called when it is first needed, so that a missing credential is an outage like any other. `set_aside` is given each
    row that BigQuery will never take, with its reason, before the offset passes it. `clock` gives seconds.
    """

    batch_rows = MAX_INSERT_ROWS
    interval_s = 1.0

    def __init__(
        self,
        dataset: Dataset,
        connect: Callable[[], bigquery.Client],
        positions: Positions,
        set_aside: SetAside,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._positions = positions
        self._inserts = UsageInserts(dataset, connect, set_aside, clock)
        self._snapshots = _Table(dataset, SNAPSHOTS_TABLE, connect, clock)

    def offset(self, segment: str) -> int:
        return self._positions.get(segment)

    def write(self, segment: str, offset_after: int, rows: Sequence[UsageRow]) -> None:
        self._inserts.insert(rows)
        self._positions.put(segment, offset_after)

    def forget(self, segment: str) -> None:
        self._positions.drop(segment)

    def write_snapshots(self, snapshots: Sequence[BudgetSnapshot]) -> None:
        rejected = self._snapshots.insert([_snapshot_row(snapshot) for snapshot in snapshots])
        for row, reason in rejected.items():
            _log.warning("BigQuery rejected the budget snapshot %s: %s", snapshots[row].budget_id, reason)


class UsageInserts:
    """Rows into `usage_log`, without any journal: for `tollgate bigquery load` too."""

    def __init__(
        self,
        dataset: Dataset,
        connect: Callable[[], bigquery.Client],
        set_aside: SetAside,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._table = _Table(dataset, USAGE_TABLE, connect, clock)
        self._set_aside = set_aside

    def insert(self, rows: Sequence[UsageRow]) -> None:
        """Raises SinkUnavailable; then some are stored, none is set aside, and all should be sent again."""
        for place, reason in sorted(self._table.insert([_usage_row(row) for row in rows]).items()):
            self._set_aside(rows[place], reason)


class _Row(NamedTuple):
    row_id: str
    values: Mapping[str, Any]


def _usage_row(row: UsageRow) -> _Row:
    # An orphan and the request's own row have ids of their own: both may arrive, and the view takes the own one.
    row_id = f"{row.record.request_id}{'/orphan' if row.orphan else ''}"
    return _Row(_bounded(row_id), {**dataclasses.asdict(row.record), "orphan": row.orphan})


def _snapshot_row(snapshot: BudgetSnapshot) -> _Row:
    """One a budget and minute, whichever of several instances took it."""
    minute = snapshot.ts[: len("2026-11-23T16:00")]
    return _Row(_bounded(f"{snapshot.budget_id}@{minute}"), dataclasses.asdict(snapshot))


def _bounded(row_id: str) -> str:
    return row_id if len(row_id) <= MAX_INSERT_ID_CHARS else hashlib.sha256(row_id.encode()).hexdigest()


class _Table:
    """One table, and the columns that it was found to lack."""

    def __init__(
        self, dataset: Dataset, name: str, connect: Callable[[], bigquery.Client], clock: Callable[[], float]
    ) -> None:
        self._name = f"{dataset}.{name}"
        self._reference = bigquery.DatasetReference(dataset.project, dataset.name).table(name)
        self._connect = connect
        self._client: bigquery.Client | None = None
        self._clock = clock
        self._missing: set[str] = set()
        self._missing_until = 0.0

    def insert(self, rows: Sequence[_Row]) -> dict[int, str]:
        """Reasons by place in `rows` of those that BigQuery will never take. Raises SinkUnavailable."""
        if self._missing and self._clock() >= self._missing_until:
            self._missing.clear()
        rejected: dict[int, str] = {}
        for batch in _batches(rows):
            rejected |= self._send(rows, batch)
        return rejected

    def _send(self, rows: Sequence[_Row], places: Sequence[int]) -> dict[int, str]:
        """Those that were not tried are sent again, as long as that leads on: each time fewer rows, or columns."""
        rejected: dict[int, str] = {}
        while places:
            try:
                errors = self._call([rows[place] for place in places])
            except _RefusedWhole as refused:
                if len(places) > 1:
                    half = len(places) // 2
                    return rejected | self._send(rows, places[:half]) | self._send(rows, places[half:])
                if refused.code != _TOO_LARGE:
                    raise SinkUnavailable(str(refused)) from refused
                return rejected | {places[0]: str(refused)}
            found = {places[index]: _reasons(errors[index]) for index in errors}
            drift = self._leave_out(column for reasons in found.values() for column in reasons.missing)
            again = [place for place in places if place in found and (found[place].untried or found[place].missing)]
            rejected |= {place: found[place].text for place in found if place not in again}
            if len(again) == len(places) and not drift:
                raise SinkUnavailable(f"{self._name}: {found[again[0]].text}")
            places = again
        return rejected

    def _call(self, rows: Sequence[_Row]) -> dict[int, list[dict[str, Any]]]:
        """One request: errors by the row's index. Retried by nobody but the shipper."""
        values = [{name: value for name, value in row.values.items() if name not in self._missing} for row in rows]
        try:
            if self._client is None:
                self._client = self._connect()
            errors = self._client.insert_rows_json(
                self._reference,
                values,
                row_ids=[row.row_id for row in rows],
                skip_invalid_rows=True,
                retry=None,  # type: ignore[arg-type]  # documented: none
                timeout=INSERT_TIMEOUT_S,
            )
        except FAILURES as error:
            hint = " (`tollgate bigquery apply` creates it)" if isinstance(error, NotFound) else ""
            text = f"{self._name}: {one_line(error)}{hint}"
            if isinstance(error, GoogleAPICallError) and error.code in _REFUSED_WHOLE:
                raise _RefusedWhole(text, int(error.code)) from error
            raise SinkUnavailable(text) from error
        return {error["index"]: error["errors"] for error in errors}

    def _leave_out(self, columns: Iterable[str]) -> bool:
        """Whether any of these columns is newly known to be missing. A row without it is better than none."""
        missing = set(columns) - self._missing
        if missing:
            self._missing |= missing
            self._missing_until = self._clock() + MISSING_COLUMN_S
            names = ", ".join(sorted(missing))
            _log.warning("%s lacks %s: left out of its rows. `tollgate bigquery apply` adds it", self._name, names)
        return bool(missing)


class _RefusedWhole(Exception):
    """A request that was refused as a whole, maybe because of its size."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


@dataclasses.dataclass(frozen=True, slots=True)
class _Reasons:
    """Why a row was not stored: columns that the table lacks, something that passes, or itself."""

    missing: tuple[str, ...]
    untried: bool
    text: str


def _reasons(errors: Collection[Mapping[str, Any]]) -> _Reasons:
    """BigQuery names one missing column a row and request, in `location`, and in the message since about 2020."""
    missing = tuple(filter(None, map(_missing_column, errors)))
    untried = all(error.get("reason") in _UNTRIED for error in errors)
    text = "; ".join(f"{error.get('reason')}: {error.get('message') or error.get('location')}" for error in errors)
    return _Reasons(missing if len(missing) == len(errors) else (), untried, " ".join(text.split())[:500])


def _missing_column(error: Mapping[str, Any]) -> str | None:
    match = _NO_SUCH_FIELD.match(str(error.get("message", "")))
    name = (error.get("location") or match[1]) if match else None
    return name if name and name not in _ESSENTIAL else None


def _batches(rows: Sequence[_Row]) -> Iterator[list[int]]:
    """Places in `rows`, as many as one request may carry."""
    batch: list[int] = []
    total = 0
    for place, row in enumerate(rows):
        size = len(json.dumps(row.values)) + _ROW_OVERHEAD_BYTES
        if batch and (len(batch) == MAX_INSERT_ROWS or total + size > MAX_INSERT_BYTES):
            yield batch
            batch, total = [], 0
        batch.append(place)
        total += size
    if batch:
        yield batch
