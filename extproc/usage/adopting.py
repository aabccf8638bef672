"""Rows of instances that died with their disks: copied from their outboxes in Redis into this one's usage journal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from extproc.errors import LedgerUnavailable
from extproc.records import UsageRecord
from extproc.usage.journal import decode

_log = logging.getLogger(__name__)


class AdoptingLedger(Protocol):
    """What this module asks of `ledger.Ledger`."""

    @property
    def outbox(self) -> str:
        """This instance's own."""

    async def adopt(self, adopter: str) -> tuple[str, ...]:
        """Say that this instance is alive; return the dead ones' outboxes that are `adopter`'s."""

    async def rows(self, outbox: str, cursor: int) -> tuple[int, tuple[bytes, ...]]:
        """Some of an outbox's rows from `cursor` on, and the next cursor: 0 at the end."""


class Adopter:
    """Copies dead instances' outboxes, each once, and at the start its own: a worker may have died between settlement
    and journal.

    Nothing is taken out of an outbox here: that is done when a usage store has the rows, so that an adopter may die
    too. What it copied is written as orphans, which give way to the rows themselves where those did arrive.
    """

    def __init__(
        self,
        ledger: AdoptingLedger,
        name: str,
        write: Callable[[UsageRecord], None],
        room: Callable[[], bool],
        interval_s: float,
    ) -> None:
        """`name` is no other adopter's. While there is no `room` in the journal, the rows stay where they are."""
        self._ledger = ledger
        self._name = name
        self._write = write
        self._room = room
        self._interval_s = interval_s
        self._cursors: dict[str, int | None] = {ledger.outbox: 0}  # None: copied
        self._adopting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Adopt in the background, until `close`."""
        self._adopting = asyncio.create_task(self._adopt_forever())

    async def close(self) -> None:
        """Stop adopting."""
        if self._adopting is not None:
            self._adopting.cancel()

    async def _adopt_forever(self) -> None:
        while True:
            try:
                await self.adopt()
            except LedgerUnavailable as error:
                _log.info("adoption: %s", error)
            except Exception:  # whatever it is, the next round comes
                _log.exception("adoption failed")
            await asyncio.sleep(self._interval_s)

    async def adopt(self) -> None:
        """One round, which is this instance's sign of life too. Raises LedgerUnavailable."""
        outboxes = (self._ledger.outbox, *await self._ledger.adopt(self._name))
        self._cursors = {outbox: self._cursors.get(outbox, 0) for outbox in outboxes}
        for outbox in outboxes:
            await self._copy(outbox)

    async def _copy(self, outbox: str) -> None:
        while (cursor := self._cursors[outbox]) is not None and self._room():
            following, rows = await self._ledger.rows(outbox, cursor)
            for row in rows:
                self._write_row(row)
            self._cursors[outbox] = following or None

    def _write_row(self, row: bytes) -> None:
        try:
            self._write(decode(row).record)
        except ValueError:
            _log.exception("a row in an outbox cannot be read")
