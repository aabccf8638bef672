"""The seam between the usage journal and a store of usage. A sink is one file; the shipper drives every one alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from extproc.records import UsageRecord


class SinkUnavailable(Exception):
    """The store cannot be reached or does not take the rows now. Nothing was written; the shipper tries again."""


@dataclass(frozen=True, slots=True)
class UsageRow:
    """One line of the journal. An orphan stands in for the record of a request whose processor died."""

    record: UsageRecord
    orphan: bool = False


class Sink(Protocol):
    """A store of usage rows that also remembers how far each segment of the journal has come.

    Rows and offset belong to one transaction, so that a crash neither loses nor doubles a row. A row replaces an
    orphan of the same request, and nothing else replaces anything. Every method raises SinkUnavailable.
    """

    def offset(self, segment: str) -> int:
        """How many bytes of the segment are stored; 0 for one never seen."""

    def write(self, segment: str, offset_after: int, rows: Sequence[UsageRow]) -> None:
        """Store the rows, and that the segment is stored up to `offset_after`."""

    def forget(self, segment: str) -> None:
        """The segment is gone for good: drop its offset."""
