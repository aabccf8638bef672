"""Tells the ledger which rows the usage store has, so that no outbox keeps them any longer."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from extproc.errors import LedgerUnavailable
from extproc.limits import MAX_OUTBOX_ROWS, MAX_PIPELINE

_INTERVAL_S = 0.2
_RETRY_S = 1.0

_log = logging.getLogger(__name__)


class AcknowledgedLedger(Protocol):
    """What this module asks of `ledger.Ledger`."""

    async def stored(self, request_ids: Sequence[str]) -> int:
        """Drop the rows. Raises LedgerUnavailable."""

    async def close(self) -> None:
        """Disconnect."""


class Acknowledgements:
    """Keeps what is to be told while Redis is away, the latest of it. A row whose acknowledgement is lost stays in its
    outbox, and comes twice when another instance adopts that: usage stores keep one row a request.

    The shipper waits for its store in a thread of its own, and so must not wait for Redis: `run` is another thread's.
    """

    def __init__(self, connect: Callable[[], AcknowledgedLedger]) -> None:
        """`connect` is called in the thread of `run`, inside its event loop."""
        self._connect = connect
        self._ids: deque[str] = deque(maxlen=MAX_OUTBOX_ROWS)
        self._ended = threading.Event()

    def stored(self, request_ids: Sequence[str]) -> None:
        """The usage store has these requests' rows. Never waits."""
        self._ids.extend(request_ids)

    def end(self) -> None:
        """Nothing more is stored: `run` tells what is left, once, and returns."""
        self._ended.set()

    def run(self) -> None:
        """Tell the ledger, until `end`."""
        asyncio.run(self._run())

    async def _run(self) -> None:
        ledger = self._connect()
        try:
            while True:
                ended = self._ended.is_set()  # before looking: what comes after it was stored is not waited for
                told = await self._tell_all(ledger)
                if ended:
                    return
                await asyncio.sleep(_INTERVAL_S if told else _RETRY_S)
        finally:
            await ledger.close()

    async def _tell_all(self, ledger: AcknowledgedLedger) -> bool:
        while self._ids:
            batch = [self._ids.popleft() for _ in range(min(len(self._ids), MAX_PIPELINE))]
            try:
                await ledger.stored(batch)
            except LedgerUnavailable as error:
                _log.info("rows that are stored stay in the outbox: %s", error)
                self._ids.extendleft(reversed(batch[: MAX_OUTBOX_ROWS - len(self._ids)]))
                return False
        return True
