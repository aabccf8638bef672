"""`tollgate bigquery load`: rows that went out as log lines into the usage store, under the ids they always had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from google.cloud import bigquery

from extproc.limits import MAX_INSERT_ROWS
from extproc.settings import Dataset
from extproc.usage.sinks import UsageRow
from extproc.usage.sinks.bigquery import UsageInserts
from extproc.usage.unshipped import rows_in


@dataclass(slots=True)
class Loaded:
    """What became of a file's lines. `without` counts those that hold no row, `problems` say what was not stored."""

    rows: int = 0
    without: int = 0
    problems: list[str] = field(default_factory=list)


def load(file: BinaryIO, dataset: Dataset, connect: Callable[[], bigquery.Client]) -> Loaded:
    """Raises SinkUnavailable, after which it may be called again, and ValueError for an array that is none."""
    loaded = Loaded()

    def set_aside(row: UsageRow, reason: str) -> None:
        loaded.rows -= 1
        loaded.problems.append(f"{row.record.request_id}: {reason}")

    inserts = UsageInserts(dataset, connect, set_aside)
    batch: list[UsageRow] = []
    for found in rows_in(file):
        if isinstance(found, str):
            loaded.problems.append(found)
        elif found is None:
            loaded.without += 1
        else:
            batch.append(found)
        if len(batch) == MAX_INSERT_ROWS:
            inserts.insert(batch)
            loaded.rows += len(batch)
            batch.clear()
    inserts.insert(batch)
    loaded.rows += len(batch)
    return loaded
