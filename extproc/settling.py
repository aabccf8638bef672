"""Settlements that must arrive: handed to the ledger at once, and kept on disk and tried again where it is away."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Protocol

from extproc.errors import LedgerRefused, LedgerUnavailable
from extproc.limits import MAX_NANOUSD, MAX_TOKENS
from extproc.records import Amount, Settlement
from extproc.settlements import SettlementLog

_RETRY_S = 1.0

_log = logging.getLogger(__name__)


class SettlingLedger(Protocol):
    """What this module asks of `ledger.Ledger`."""

    def settle(self, settlement: Settlement) -> asyncio.Future[bool]:
        """Post once; the future raises LedgerUnavailable, LedgerRefused where Redis itself answered with an error."""


class Settler:
    """Posts every settlement once, however long Redis is away. Settlements of dead processes are in the log too."""

    def __init__(self, ledger: SettlingLedger, log: SettlementLog) -> None:
        self._ledger = ledger
        self._log = log
        self._under_way: set[asyncio.Future[bool]] = set()
        self._refused: set[str] = set()  # ids that were logged as such
        self._retrying: asyncio.Task[None] | None = None

    def settle(self, settlement: Settlement) -> None:
        """Post now; never waits. Figures beyond what the ledger can count are posted as the most that it can."""
        settlement = _countable(settlement)
        future = self._ledger.settle(settlement)
        self._under_way.add(future)

        def answered(done: asyncio.Future[bool]) -> None:
            self._under_way.discard(done)
            if (reason := "cancelled" if done.cancelled() else done.exception()) is not None:
                _log.warning("settlement of %s waits for the ledger: %s", settlement.request_id, reason)
                self._log.add(settlement)

        future.add_done_callback(answered)

    def start(self) -> None:
        """Try again every second what the ledger has not taken, until `close`."""
        self._retrying = asyncio.create_task(self._retry_forever())

    async def close(self) -> None:
        """Wait for what is under way (the ledger's deadline bounds it). What it does not take stays on disk."""
        if self._retrying is not None:
            self._retrying.cancel()
        while self._under_way:
            await asyncio.wait(self._under_way)
        self._log.close()

    async def _retry_forever(self) -> None:
        while True:
            await self.retry()
            await asyncio.sleep(_RETRY_S)

    async def retry(self) -> None:
        """One round over what is open; ends where the ledger is away. One that it refuses stays, and stops no other."""
        for settlement in self._log.pending():
            try:
                await self._ledger.settle(settlement)
            except LedgerRefused as error:
                if settlement.request_id not in self._refused:
                    self._refused.add(settlement.request_id)
                    _log.error("settlement of %s is refused and stays on disk: %s", settlement.request_id, error)
            except LedgerUnavailable:
                return
            else:
                self._refused.discard(settlement.request_id)
                self._log.done(settlement.request_id)


def _countable(settlement: Settlement) -> Settlement:
    """Usage is a fact: refused as too much, it would not count at all."""
    actual = settlement.actual
    counted = Amount(min(actual.nanousd, MAX_NANOUSD), min(actual.tokens, MAX_TOKENS))
    if counted == actual:
        return settlement
    _log.error("settlement of %s: %s is more than can be counted, posted as %s", settlement.request_id, actual, counted)
    return dataclasses.replace(settlement, actual=counted)
