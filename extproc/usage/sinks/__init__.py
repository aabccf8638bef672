"""The seam between the usage journal and a store of usage. A sink is one file; the shipper drives every one alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from extproc.records import BudgetSnapshot, UsageRecord


class SinkUnavailable(Exception):
    """The store cannot be reached or does not take the rows now. The offset has not moved; the shipper tries again."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One line of the journal. An orphan stands in for the record of a request whose processor died."""

    record: UsageRecord
    orphan: bool = False


class Sink(Protocol):
    """A store of usage rows that also remembers how far each segment of the journal has come.

    Rows and offset belong to one transaction where the store has any, so that a crash neither loses nor doubles a row.
    Where it has none the offset comes after the rows: a crash repeats one batch, which the store must be able to tell.
    A row takes the place of an orphan of the same request, and nothing else of anything. Every method raises
    SinkUnavailable, and OSError where the offset is kept on this machine's disk.

    `batch_rows` is the most that one `write` takes; `interval_s` how often the journal is looked at.
    """

    batch_rows: int
    interval_s: float

    def offset(self, segment: str) -> int:
        """How many bytes of the segment are stored; 0 for one never seen."""

    def write(self, segment: str, offset_after: int, rows: Sequence[UsageRow]) -> None:
        """Store the rows, which may be none, and that the segment is stored up to `offset_after`."""

    def forget(self, segment: str) -> None:
        """The segment is gone for good: drop its offset."""


class SnapshotSink(Protocol):
    """A store of budget snapshots."""

    def write_snapshots(self, snapshots: Sequence[BudgetSnapshot]) -> None:
        """Store them. Raises SinkUnavailable; then they may be lost."""
