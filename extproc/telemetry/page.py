"""`/metrics`: one page for the whole gateway, served on loopback by the one process that stands for it.

What processors count is read at each request: this process's own, or every worker's, added up. The state of the gateway
and its budgets are this process's to say, since each worker would say them again.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from extproc.errors import LedgerUnavailable
from extproc.limits import MAX_BUDGET_SERIES
from extproc.records import Balance

_INTERVAL_S = 5.0  # between looks at the balances: oftener than a page is read

Balances = Callable[[int], Awaitable[tuple[Balance, ...]]]

_log = logging.getLogger(__name__)


class MetricsPage:
    """Serves `/metrics` from its making on; `watch` keeps the budgets' figures new."""

    def __init__(
        self, registry: CollectorRegistry, port: int, lacking: Callable[[], str | None], journal: Path
    ) -> None:
        """`lacking` is what the gateway lacks to be ready, if anything. Raises OSError where the port is taken."""
        self._state = _State(lacking, journal)
        registry.register(self._state)
        try:
            self._server, _ = start_http_server(port, "127.0.0.1", registry)
        except OSError as error:
            raise OSError(f"TOLLGATE_METRICS_PORT {port} cannot be listened on: it may be taken") from error
        self.port = int(self._server.server_port)

    async def watch(self, balances: Balances) -> None:
        """Read the balances again and again, until cancelled. While they cannot be read, none are shown."""
        while True:
            try:
                self._state.balances = await balances(time.time_ns() // 1_000_000)
            except LedgerUnavailable as error:
                self._state.balances = ()
                _log.warning("budgets are missing from /metrics: %s", error)
            await asyncio.sleep(_INTERVAL_S)

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()


def shared(directory: Path) -> CollectorRegistry:
    """What workers count in `directory`, added up. Empties it: what is there is of workers long gone."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))  # type: ignore[no-untyped-call]
    return registry


class _State(Collector):
    """What is so now, and is nobody's count."""

    def __init__(self, lacking: Callable[[], str | None], journal: Path) -> None:
        self._lacking = lacking
        self._journal = journal
        self.balances: tuple[Balance, ...] = ()

    def collect(self) -> Iterator[GaugeMetricFamily]:
        ready = self._lacking() is None
        yield GaugeMetricFamily("tollgate_ready", "Whether the gateway takes requests.", float(ready))
        from extproc.usage.journal import stored_bytes  # noqa: PLC0415 - a tenth of a second, of which a start has no need

        journal_bytes = stored_bytes(self._journal)
        yield GaugeMetricFamily("tollgate_journal_bytes", "Usage rows on disk, not shipped yet.", float(journal_bytes))
        yield from _budgets(self.balances)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Asked when the collector is registered, when nothing can be said yet."""
        yield from ()


def _budgets(balances: tuple[Balance, ...]) -> Iterator[GaugeMetricFamily]:
    """The budgets that are used most, if there are too many for all."""
    shown = sorted(balances, key=_share, reverse=True)[:MAX_BUDGET_SERIES]
    labels = ("budget", "unit")
    limit = GaugeMetricFamily("tollgate_budget_limit", "The limit, in the budget's unit.", labels=labels)
    posted = GaugeMetricFamily("tollgate_budget_posted", "What was used in this window.", labels=labels)
    pending = GaugeMetricFamily("tollgate_budget_pending", "What is held for open requests.", labels=labels)
    resets = GaugeMetricFamily("tollgate_budget_resets_at_seconds", "The window's end, Unix time.", labels=("budget",))
    for balance in shown:
        budget = balance.budget
        of = (budget.id, budget.unit.value)
        limit.add_metric(of, budget.limit)
        posted.add_metric(of, balance.posted)
        pending.add_metric(of, balance.pending)
        if balance.resets_at_ms:
            resets.add_metric((budget.id,), balance.resets_at_ms / 1000)
    yield from (limit, posted, pending, resets)


def _share(balance: Balance) -> float:
    return (balance.posted + balance.pending) / max(balance.budget.limit, 1)
