"""Several processors for one Envoy: one process a core, each on a socket of its own, started again when it dies.

Envoy spreads streams over the sockets and checks their health, so a worker that dies takes only its own streams along.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from math import ceil
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc import startup
from extproc.health import LIVE, HealthServer
from extproc.limits import MAX_WORKERS
from extproc.process import Child
from extproc.providers import PROVIDERS
from extproc.settings import Settings
from extproc.telemetry.metrics import SHARED_DIRECTORY
from extproc.telemetry.page import MetricsPage, shared

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # cgroup v2: "<quota> <period>", or "max <period>"
_CHECK_TIMEOUT_S = 1.0
_READY_POLL_S, _SHIP_AT_LAST_S = 0.2, 10.0  # rows of an earlier run are shipped even if no worker becomes ready
_BUDGETS_AFTER_S = 1.0  # what reads them is loaded while workers start, and not before they do
_MIN_BACKOFF_S, _MAX_BACKOFF_S = 0.1, 5.0
_STABLE_S = 10.0  # a child that has run so long starts again at once
_KILL_AFTER_S = 2.0  # beyond the drain
_FLUSH_KILL_AFTER_S = 1.0  # beyond the flush, which keeps its own time

_log = logging.getLogger(__name__)


def cpus(cpu_max: Path = _CPU_MAX) -> int:
    """Cores that this container may use: its CPU limit, or what the scheduler allows, whichever is less."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
    except (OSError, ValueError):
        return allowed
    return allowed if quota == "max" else max(1, min(allowed, ceil(int(quota) / int(period))))


def default_workers() -> int:
    """Half of the cores: an event costs Envoy, which has the other half, as much as it costs us."""
    return max(1, min(cpus() // 2, MAX_WORKERS))


def worker_socket(socket_path: Path, number: int) -> Path:
    """Where a worker listens: the first at the path itself, the others beside it (`extproc-1.sock`)."""
    return socket_path if number == 0 else socket_path.with_stem(f"{socket_path.stem}-{number}")


def run(settings: Settings, env: Mapping[str, str], count: int) -> None:
    """Run `count` workers until SIGTERM or SIGINT, and the shipper where the settings say so.

    The workers drain, and have the time that one processor has; then the shipper flushes.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_observed(settings, env, count))


async def _observed(settings: Settings, env: Mapping[str, str], count: int) -> None:
    """Run them, and serve what they count on one page."""
    if settings.metrics_port is None:
        await _run(settings, env, count)
        return
    directory = settings.state_dir.absolute() / "metrics"
    async with _page(settings, settings.metrics_port, directory, count):
        await _run(settings, {**env, "TOLLGATE_METRICS_PORT": "off", SHARED_DIRECTORY: str(directory)}, count)


@asynccontextmanager
async def _page(settings: Settings, port: int, directory: Path, count: int) -> AsyncIterator[None]:
    lacking = _lacking([worker_socket(settings.socket_path, number) for number in range(count)])
    page = MetricsPage(shared(directory), port, lacking, settings.state_dir / "journal")
    _log.info("metrics on port %d", page.port)
    watching = asyncio.create_task(_watch_budgets(page, settings))
    try:
        yield
    finally:
        watching.cancel()
        page.close()
        await asyncio.gather(watching, return_exceptions=True)


async def _watch_budgets(page: MetricsPage, settings: Settings) -> None:
    await asyncio.sleep(_BUDGETS_AFTER_S)
    from extproc.ledger import Ledger  # noqa: PLC0415

    ledger = Ledger(settings.redis_url, namespace=settings.namespace, timeout_ms=settings.ledger_timeout_ms)
    try:
        await page.watch(ledger.balances)
    finally:
        await ledger.close()


async def _run(settings: Settings, env: Mapping[str, str], count: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    sockets = [worker_socket(settings.socket_path, number) for number in range(count)]
    health = HealthServer(_lacking(sockets), _alive(sockets), settings.health_port, settings.health_host)
    health.start()
    drained = asyncio.Event()  # the shipper ships on until the workers have written their last rows
    workers = [asyncio.create_task(_worker(settings, env, path).keep(stop)) for path in sockets]
    others = [asyncio.create_task(_when_ended(workers, drained))]
    if settings.ship:
        others.append(asyncio.create_task(_ship(settings, env, sockets, drained)))
    _log.info("%d workers, health on port %d", count, health.port)
    startup.over()
    await asyncio.wait([*workers, *others], return_when=asyncio.FIRST_EXCEPTION)
    stop.set()
    health.close()
    await asyncio.gather(*workers, *others)


async def _when_ended(tasks: list[asyncio.Task[None]], event: asyncio.Event) -> None:
    await asyncio.wait(tasks)
    event.set()


def _worker(settings: Settings, env: Mapping[str, str], path: Path) -> _Kept:
    own = {
        "TOLLGATE_SOCKET": str(path),
        "TOLLGATE_HEALTH_PORT": "0",
        "TOLLGATE_SHIP": "0",
        "TOLLGATE_ENVOY_CONFIG": "",  # has been written, with every worker's socket; a worker knows its own only
    }
    grace_s = settings.drain_timeout_s + _KILL_AFTER_S
    return _Kept(f"worker {path.stem}", ("serve", "--workers", "1"), {**env, **own}, grace_s, path)


def _shipper(settings: Settings, env: Mapping[str, str]) -> _Kept:
    """It needs no provider's key."""
    keys = {provider.key_variable for provider in PROVIDERS.values()}
    without_keys = {name: value for name, value in env.items() if name not in keys}
    return _Kept("shipper", ("ship",), without_keys, settings.flush_timeout_s + _FLUSH_KILL_AFTER_S)


class _Kept:
    """One child's process, and the next one after it. `socket` is removed before each."""

    def __init__(
        self, name: str, command: tuple[str, ...], env: Mapping[str, str], grace_s: float, socket: Path | None = None
    ) -> None:
        self._name = name
        self._command = (sys.executable, "-m", "extproc", *command)
        self._env = env
        self._grace_s = grace_s
        self._socket = socket

    async def keep(self, stop: asyncio.Event) -> None:
        """Keep a process running until `stop`."""
        backoff_s = _MIN_BACKOFF_S
        stopping = asyncio.ensure_future(stop.wait())
        while not stop.is_set():
            if self._socket is not None:
                self._socket.unlink(missing_ok=True)
            started_s = time.monotonic()
            child = await Child.start(self._name, self._command, self._env)
            ended = asyncio.ensure_future(child.wait())
            await asyncio.wait((stopping, ended), return_when=asyncio.FIRST_COMPLETED)
            code = await child.stop(self._grace_s)
            if stop.is_set():
                return
            backoff_s = _MIN_BACKOFF_S if time.monotonic() - started_s > _STABLE_S else backoff_s
            _log.error("the %s ended with code %d; the next one starts in %.1f s", self._name, code, backoff_s)
            await asyncio.wait((stopping,), timeout=backoff_s)
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)


async def _ship(settings: Settings, env: Mapping[str, str], sockets: list[Path], drained: asyncio.Event) -> None:
    """Keep a shipper, once a worker is ready: a start is nothing but CPU, and before there is no new row to ship."""
    lacking, deadline_s = _lacking(sockets), time.monotonic() + _SHIP_AT_LAST_S
    while not drained.is_set() and time.monotonic() < deadline_s:
        if await asyncio.to_thread(lacking) is None:
            break
        await asyncio.sleep(_READY_POLL_S)
    await _shipper(settings, env).keep(drained)


def _lacking(sockets: list[Path]) -> Callable[[], str | None]:
    """Ready while any worker is: Envoy sends streams to those that are."""
    any_is_ready = _any(sockets, "")
    return lambda: None if any_is_ready() else "no worker is ready"


def _alive(sockets: list[Path]) -> Callable[[], bool]:
    """Alive while any worker is: one that ends is started again here."""
    return _any(sockets, LIVE)


def _any(sockets: list[Path], service: str) -> Callable[[], bool]:
    """Whether any worker says that it serves. Asks one after the other."""
    # Asked for from the start on: where nobody listens yet, it is tried again at once and not a second later.
    options = (("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 1000))
    stubs = [health_pb2_grpc.HealthStub(grpc.insecure_channel(f"unix:{path}", options)) for path in sockets]

    def serves(stub: health_pb2_grpc.HealthStub) -> bool:
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=_CHECK_TIMEOUT_S)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    return lambda: any(map(serves, stubs))
