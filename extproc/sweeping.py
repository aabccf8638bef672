"""Requests whose processor died: their holds expire, their last checkpoint is posted, and a record is written here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import orjson
from pydantic import TypeAdapter

from extproc.errors import LedgerUnavailable
from extproc.records import Orphan, UsageRecord

_log = logging.getLogger(__name__)
_record = TypeAdapter(UsageRecord)


class SweptLedger(Protocol):
    """What this module asks of `ledger.Ledger`."""

    async def sweep(self) -> tuple[Orphan, ...]:
        """Post expired holds; return every orphan that is not forgotten."""

    async def forget(self, request_ids: Iterable[str]) -> None:
        """Drop orphans."""


class Sweeper:
    """Sweeps every `interval_s`. An orphan is forgotten a round after its record was handed over, when that is on disk.

    Several processors may write the same orphan's record; the usage store keeps one by its request id.
    """

    def __init__(self, ledger: SweptLedger, write: Callable[[UsageRecord], None], interval_s: float) -> None:
        self._ledger = ledger
        self._write = write
        self._interval_s = interval_s
        self._written: set[str] = set()
        self._sweeping: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Sweep in the background, until `close`."""
        self._sweeping = asyncio.create_task(self._sweep_forever())

    async def close(self) -> None:
        """Stop sweeping."""
        if self._sweeping is not None:
            self._sweeping.cancel()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            try:
                await self.sweep()
            except LedgerUnavailable as error:
                _log.info("sweep: %s", error)
            except Exception:  # whatever it is, the next round comes
                _log.exception("sweep failed")

    async def sweep(self) -> None:
        """One round. Raises LedgerUnavailable."""
        orphans = await self._ledger.sweep()
        await self._ledger.forget(self._written)
        self._written, known = set(), self._written
        for orphan in orphans:
            if orphan.request_id not in known:
                self._write_record(orphan)
                self._written.add(orphan.request_id)

    def _write_record(self, orphan: Orphan) -> None:
        """Its cost is posted already: a note that cannot be read must not keep the others from being swept."""
        try:
            self._write(orphan_record(orphan))
        except (ValueError, TypeError, KeyError):
            _log.exception("the note of %s cannot be read; posted: %s", orphan.request_id, orphan.posted)


def orphan_record(orphan: Orphan) -> UsageRecord:
    """The record that was noted with the hold, with what the last checkpoint posted."""
    noted = orjson.loads(orphan.note)
    noted["cost_nanousd"] = orphan.posted.nanousd
    noted["completion_tokens"] = max(0, orphan.posted.tokens - noted["prompt_tokens"])
    return _record.validate_python(noted)
