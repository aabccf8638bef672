"""The process `tollgate ship`: the usage journal into the usage store, and what the budgets have left with it."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import BinaryIO, Protocol

from extproc.instance import instance_of
from extproc.ledger import Ledger
from extproc.settings import Dataset, Settings
from extproc.usage.outbox import Acknowledgements
from extproc.usage.shipper import Shipper
from extproc.usage.sinks import Sink, SnapshotSink
from extproc.usage.snapshots import Snapshots, read_balances
from extproc.usage.unshipped import Rejected

_ENDS = {signal.SIGTERM, signal.SIGINT}
_CHECK_S = 0.5
_ACKNOWLEDGING_S = 0.5  # at the end: what Redis is not told comes twice, and is stored once
_SHIPPING_SHARE = 2 / 3  # of the flush; the rest is for writing out what the store has not taken

_log = logging.getLogger(__name__)


class _Store(Sink, SnapshotSink, Protocol):
    """Both halves of a usage store."""


def main(settings: Settings, out: BinaryIO) -> None:
    """Ship until SIGTERM, then flush. Raises AlreadyShipping, SinkUnavailable or OSError where it cannot start.

    A store that is not on this machine has TOLLGATE_FLUSH_TIMEOUT_S: what it has not taken goes to `out` as log lines,
    and so does what it rejects at any time, because the journal's disk may go with the machine.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Blocked and asked for, rather than handled: before there are threads, which inherit it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
    directory = settings.state_dir / "journal"
    directory.mkdir(parents=True, exist_ok=True)
    remote = settings.dataset is not None
    rejected = Rejected(directory, out if remote else None)
    sink = _store(settings, rejected)
    acknowledgements = Acknowledgements(lambda: _ledger(settings))
    shipper = Shipper(directory, sink, rejected=rejected, stored=acknowledgements.stored)
    snapshots = Snapshots(lambda now_ms: read_balances(settings, now_ms), sink)

    _log.info("shipping %s to %s", directory, settings.usage_store)
    stop, abandoned = threading.Event(), threading.Event()
    shipping = _start(lambda: shipper.run(stop.wait, abandoned.wait if remote else lambda _: True))
    _start(lambda: snapshots.run(stop.wait))
    acknowledging = _start(acknowledgements.run)
    while shipping.is_alive() and signal.sigtimedwait(_ENDS, _CHECK_S) is None:
        pass
    if not shipping.is_alive():
        sys.exit("tollgate: the shipper ended by itself")  # its traceback is above
    ends_s = time.monotonic() + settings.flush_timeout_s * _SHIPPING_SHARE
    stop.set()
    shipping.join(max(0.0, ends_s - time.monotonic()) if remote else None)
    abandoned.set()
    if remote and (left := shipper.hand_over(out)):
        _log.warning("%d usage rows went out as log lines: `tollgate bigquery load` takes them", left)
    acknowledgements.end()
    acknowledging.join(_ACKNOWLEDGING_S)
    if not shipping.is_alive():
        shipper.close()


def _start(target: Callable[[], None]) -> threading.Thread:
    """A daemon: a call to a store that does not answer must not keep the process from ending."""
    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread


def _ledger(settings: Settings) -> Ledger:
    return Ledger(
        settings.redis_url,
        namespace=settings.namespace,
        timeout_ms=settings.ledger_timeout_ms,
        hold_ttl_ms=settings.hold_ttl_ms,
        instance=instance_of(settings.state_dir),
    )


def _store(settings: Settings, rejected: Rejected) -> _Store:
    if (dataset := settings.dataset) is not None:
        return _bigquery(dataset, settings, rejected)
    from extproc.usage.sinks.duckdb import DuckDbSink  # noqa: PLC0415 - a container does not have it

    settings.usage_db_path.parent.mkdir(parents=True, exist_ok=True)
    return DuckDbSink(settings.usage_db_path)


def _bigquery(dataset: Dataset, settings: Settings, rejected: Rejected) -> _Store:
    from extproc.usage.sinks.bigquery import BigQuerySink, connect  # noqa: PLC0415 - half a second, for those who use it
    from extproc.usage.sinks.positions import Positions  # noqa: PLC0415

    positions = Positions(settings.state_dir / "journal" / "positions.json")
    return BigQuerySink(dataset, lambda: connect(dataset, settings.bigquery_endpoint), positions, rejected.add)
