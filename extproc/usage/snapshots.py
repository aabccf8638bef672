"""Every minute what each budget has left goes into the usage store, so that burn-down can be drawn there."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from extproc.errors import LedgerUnavailable
from extproc.ledger import Ledger
from extproc.limits import MAX_SNAPSHOTS
from extproc.records import Balance, BudgetSnapshot, Scope
from extproc.settings import Settings
from extproc.usage.sinks import SinkUnavailable, SnapshotSink

_INTERVAL_MS = 60_000

_log = logging.getLogger(__name__)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Snapshots:
    """Takes one on each full minute, as every instance does: so that a store that knows ids keeps one of them.

    `read` gives the balances of the windows that a time (Unix milliseconds) is in, or raises LedgerUnavailable. A
    snapshot that cannot be taken or stored is left out.
    """

    def __init__(
        self, read: Callable[[int], Sequence[Balance]], sink: SnapshotSink, wall_ms: Callable[[], int] = _wall_ms
    ) -> None:
        self._read = read
        self._sink = sink
        self._wall_ms = wall_ms
        self._failing = False

    def run(self, stopped: Callable[[float], bool]) -> None:
        """Take them until `stopped`, which waits for so many seconds, says so."""
        while not stopped((_INTERVAL_MS - self._wall_ms() % _INTERVAL_MS) / 1000):
            self.take()

    def take(self) -> None:
        """Take one now."""
        now_ms = self._wall_ms()
        try:
            fullest = sorted(self._read(now_ms), key=_share_used, reverse=True)[:MAX_SNAPSHOTS]
            if fullest:
                self._sink.write_snapshots([snapshot(balance, now_ms) for balance in fullest])
            self._failing = False
        except (LedgerUnavailable, SinkUnavailable) as error:
            if not self._failing:
                _log.warning("no budget snapshots: %s", error)
            self._failing = True


def snapshot(balance: Balance, now_ms: int) -> BudgetSnapshot:
    """What a balance is at a time, as the usage stores have it."""
    budget = balance.budget
    return BudgetSnapshot(
        ts=_text(now_ms),
        budget_id=budget.id,
        scope=Scope(budget.id.partition("/")[0]),
        period=budget.window,
        unit=budget.unit,
        mode=budget.mode,
        limit_amount=budget.limit,
        posted=balance.posted,
        pending=balance.pending,
        resets_at=_text(balance.resets_at_ms) if balance.resets_at_ms else None,
    )


def read_balances(settings: Settings, now_ms: int) -> tuple[Balance, ...]:
    """The balances now, over a connection of its own. Raises LedgerUnavailable; ValueError for a bad address."""

    async def read() -> tuple[Balance, ...]:
        ledger = Ledger(settings.redis_url, namespace=settings.namespace, timeout_ms=settings.ledger_timeout_ms)
        try:
            return await ledger.balances(now_ms)
        finally:
            await ledger.close()

    return asyncio.run(read())


def _share_used(balance: Balance) -> float:
    return (balance.posted + balance.pending) / max(balance.budget.limit, 1)


def _text(unix_ms: int) -> str:
    moment = datetime.fromtimestamp(unix_ms / 1000, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
