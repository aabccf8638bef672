"""The processor: builds every part from the settings, wires them, runs them, and takes them down in order."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import random
import signal
import time
from collections.abc import Callable
from datetime import UTC, datetime
from secrets import token_hex
from typing import TYPE_CHECKING

import uvloop
from prometheus_client import CollectorRegistry

from extproc import tokens
from extproc.counting import PromptCounter
from extproc.errors import LedgerUnavailable
from extproc.exchange import Exchange
from extproc.gate import Clock, Gate
from extproc.google_tokens import GoogleTokens
from extproc.health import HealthServer
from extproc.identity import Identity
from extproc.instance import instance_of
from extproc.keys import KeyStore
from extproc.ledger import Ledger
from extproc.limits import MIB
from extproc.metering import starting_factor
from extproc.policy import parse_policy
from extproc.policy_file import PolicyFile
from extproc.pricing import PriceBook
from extproc.providers import PROVIDERS
from extproc.records import IdentityRules, Policy, Settlement, Target, UsageRecord
from extproc.redaction import Redactor
from extproc.secret_manager import SecretManager
from extproc.secrets import FirstOf, SecretStore
from extproc.session import Services, Session
from extproc.settings import Settings
from extproc.settlements import SettlementLog
from extproc.settling import Settler
from extproc.startup import Startup
from extproc.sweeping import Sweeper
from extproc.target import Attempt, Targets
from extproc.telemetry.metrics import Metrics, share, shared_directory
from extproc.telemetry.page import MetricsPage
from extproc.transports import End, Send
from extproc.transports.grpc_aio import GrpcServer
from extproc.transports.wire.server import WireServer
from extproc.usage.adopting import Adopter
from extproc.usage.journal import Journal

if TYPE_CHECKING:
    from extproc.telemetry.otlp import Otlp

_TURN_TIMEOUT_S = 2.0  # longer than anything that the event loop does at once
_KEYS_POLLS = 50  # of what else a start waits for: a second in all
_REACHABLE_S = 0.05  # for which it is known which providers have a key
_WATCH_S = 1.0  # how often Redis and the learned factors are looked at

_TRANSPORTS: dict[str, type[GrpcServer] | type[WireServer]] = {"grpc": GrpcServer, "wire": WireServer}

_log = logging.getLogger(__name__)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Processor:
    """All parts of one processor, and what it lacks to be ready."""

    def __init__(self, settings: Settings, startup: Startup) -> None:
        """Raises SettingsInvalid, PolicyInvalid or OSError where it cannot start."""
        self._startup = startup
        self._started = False
        self._settings = settings
        self._draining = False
        self._factors: dict[str, float] = {}
        self._ledger_lacks: str | None = "Redis was not reached yet"
        self._tasks: set[asyncio.Task[None]] = set()
        self._reachable: frozenset[str] = frozenset()
        self._reachable_until_s = 0.0

        self._secret_manager = SecretManager(
            settings.secret_versions,
            refresh_s=settings.secrets_refresh_s,
            endpoint=settings.secret_manager_endpoint,
            refreshed=self._count_refresh,
        )
        elsewhere = PROVIDERS.keys() - settings.secret_versions.keys()
        self._secrets = SecretStore.of(settings.secrets_dir, os.environ, elsewhere, self._secret_manager)
        on_vertex = [name for name in elsewhere & settings.base_urls.keys() if PROVIDERS[name].publisher is not None]
        self._google = GoogleTokens([name for name in on_vertex if self._secrets.key(name) is None])
        self._all_secrets = FirstOf(self._secrets, self._google)
        self._redactor = Redactor(self._all_secrets.values)
        self._keys = KeyStore(settings.issuer_keys, settings.keys_max_stale_s)
        self._ledger = Ledger(
            settings.redis_url,
            namespace=settings.namespace,
            timeout_ms=settings.ledger_timeout_ms,
            hold_ttl_ms=settings.hold_ttl_ms,
            instance=instance_of(settings.state_dir),
        )
        self._journal = Journal(
            settings.state_dir / "journal", max_bytes=settings.journal_max_mib * MIB, clock=_wall_ms
        )
        self._settler = Settler(self._ledger, SettlementLog(settings.state_dir / "settlements", clock=_wall_ms))
        self._sweeper = Sweeper(self._ledger, self._journal.append_orphan, settings.hold_ttl_ms / 4000)
        self._adopter = Adopter(
            self._ledger,
            token_hex(8),
            self._journal.append_orphan,
            lambda: self._journal.roomy,
            settings.hold_ttl_ms / 4000,
        )
        self._counting = PromptCounter(settings.admission_timeout_ms / 1000)
        self._targets = Targets(settings.base_urls, self._all_secrets.key, _wall_ms)
        self._services = Services(
            ledger=self._ledger,
            settle=self._settle,
            learn=self._learn,
            write=self._append,
            refresh_keys=lambda issuer: asyncio.ensure_future(self._keys.refresh(issuer)),
            refresh_secret=self._refresh_secret,
            count=self._counting.count,
        )
        self._registry = CollectorRegistry()
        self._metrics = _metrics(settings, self._registry)
        self._otlp = _otlp(settings)
        self._page = _page(settings, self._registry, self.lacking)
        self._policy_file = PolicyFile(settings.policy_path, parse_policy, self._use)
        self._use(self._policy_file.policy)
        self._server = _TRANSPORTS[settings.transport](f"unix:{settings.socket_path}", self._open, self.lacking)
        self._health = HealthServer(self.lacking, self._turns, settings.health_port, settings.health_host)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop`, then drain."""
        loop = asyncio.get_running_loop()
        self._secret_manager.start(lambda: loop.call_soon_threadsafe(self._secrets.reread))
        tokens.counter("o200k_base")  # a third of a second: before the first request, not in it
        self._startup.done("tokenizers")
        self._gate.prices.price(Target("openai", "gpt-4o"), None)  # the catalogue: a tenth of a second, likewise
        self._startup.done("prices")
        self._keys.start()
        self._secrets.start()
        self._google.start()
        self._settler.start()
        self._sweeper.start()
        self._adopter.start()
        self._policy_file.start()
        watching = [asyncio.create_task(self._watch())]
        if self._page is not None:
            watching.append(asyncio.create_task(self._page.watch(self._ledger.balances)))
        self._loop = asyncio.get_running_loop()
        self._health.start()
        self._settings.socket_path.parent.mkdir(parents=True, exist_ok=True)
        await self._server.start()
        rest = asyncio.create_task(asyncio.to_thread(tokens.counter, "cl100k_base"))  # of models before gpt-4o
        _log.info("serving on %s, health on port %d", self._settings.socket_path, self._health.port)
        await stop.wait()
        await rest
        await self._drain()
        for task in watching:
            task.cancel()
        await self._close()

    def lacking(self) -> str | None:
        """What the gateway lacks to take requests, in a few words, or None. Also called from the health thread."""
        if self._draining:
            return "it is shutting down"
        if self._ledger_lacks is not None:
            return self._ledger_lacks
        if not self._keys.ready():
            return "no issuer's keys could be fetched"
        if (lacks := self._key_lacking()) is not None:
            return lacks
        if self._journal.full:
            return "the usage journal is full"
        return None

    def _turns(self) -> bool:
        """Whether the event loop does. Called from the health thread."""

        async def turn() -> bool:
            return True

        try:
            return asyncio.run_coroutine_threadsafe(turn(), self._loop).result(_TURN_TIMEOUT_S)
        except TimeoutError:
            return False

    def _key_lacking(self) -> str | None:
        for name in self._settings.secret_versions:
            if self._secrets.key(name) is None:
                return f"the key of {name} has not come from Secret Manager"
        return None if self._providers() else "there is no provider's key"

    def _use(self, policy: Policy) -> None:
        settings = self._settings
        self._gate = Gate(
            policy=policy,
            identity=Identity(self._with_own_issuers(policy.identity), self._keys, time.time),
            prices=PriceBook(policy.prices, lambda: datetime.now(UTC)),
            providers=self._providers,
            counter=tokens.counter,
            factor=self._factor,
            redact=self._redactor.redact,
            unready=self.lacking,
            clock=Clock(time.monotonic_ns, _wall_ms),
            lease_tokens=settings.lease_tokens,
            heartbeat_ms=settings.hold_ttl_ms // 3,
            first_byte_timeout_ms=settings.first_byte_timeout_ms,
            admission_timeout_ms=settings.admission_timeout_ms,
            begin_span=self._otlp.begin if self._otlp is not None else None,
        )
        _log.info("policy %s is in use", policy.version)

    def _with_own_issuers(self, rules: IdentityRules) -> IdentityRules:
        """The policy's issuers, and those that TOLLGATE_ISSUER_KEYS adds (the local stack's development issuer)."""
        own = tuple(issuer for issuer in self._settings.added_issuers if issuer not in rules.issuers)
        return dataclasses.replace(rules, issuers=rules.issuers + own)

    def _providers(self) -> frozenset[str]:
        """Those that have a place and a key, as of a moment ago: every request asks, and keys hardly ever change."""
        now_s = time.monotonic()
        if now_s >= self._reachable_until_s:
            self._reachable_until_s = now_s + _REACHABLE_S
            names = self._settings.base_urls
            self._reachable = frozenset(name for name in names if self._all_secrets.key(name) is not None)
        return self._reachable

    def _open(self, role: str, send: Send, end: End) -> Session | None:
        if role == "gate":
            return Session(Exchange(self._gate), self._services, send, end)
        if role in ("target", "target-first-event"):
            attempt = Attempt(self._targets, patient=role == "target-first-event")
            return Session(attempt, self._services, send, end)
        return None

    def _settle(self, settlement: Settlement, record: UsageRecord | None) -> None:
        """Post the settlement whatever becomes of its row, which is encoded once for the journal and the ledger."""
        row = b""
        try:
            if record is not None:
                row = self._append(record)
        finally:
            self._settler.settle(Settlement(settlement.request_id, settlement.windows, settlement.actual, row.decode()))

    def _count_refresh(self, result: str) -> None:
        if self._metrics is not None:
            self._metrics.secrets_refreshed(result)

    def _append(self, record: UsageRecord) -> bytes:
        """A request's row, for the journal, and for whoever only counts."""
        row = self._journal.append(record)
        if self._metrics is not None:
            self._metrics.record(record)
        if self._otlp is not None:
            self._otlp.record(record)
        return row

    def _refresh_secret(self, provider: str) -> None:
        if provider in self._settings.secret_versions:
            self._secret_manager.refused(provider)
        else:
            self._secrets.refused()

    def _factor(self, target: Target) -> float:
        return self._factors.get(f"{target.provider}/{target.model}") or starting_factor(target)

    def _learn(self, target: Target, counted: int, billed: int) -> None:
        async def learn() -> None:
            try:
                name = f"{target.provider}/{target.model}"
                await self._ledger.learn(name, counted, billed, starting_factor(target))
            except LedgerUnavailable as error:
                _log.info("a factor was not learned: %s", error)

        task = asyncio.create_task(learn())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _has_started(self) -> None:
        self._started = True
        self._startup.done("Redis")
        for _ in range(_KEYS_POLLS):
            if self.lacking() is None:
                self._startup.done("keys")
                break
            await asyncio.sleep(_WATCH_S / _KEYS_POLLS)
        _log.info("%s", self._startup.finish())

    async def _watch(self) -> None:
        while True:
            try:
                await self._ledger.check()
                self._factors = await self._ledger.factors()
                self._ledger_lacks = None
                if not self._started:
                    await self._has_started()
            except LedgerUnavailable as error:
                self._ledger_lacks = "Redis cannot be used"
                self._startup.wait()
                _log.warning("redis: %s", error)
            if self._metrics is not None:
                self._metrics.watch(self._server.open_streams, ledger=self._ledger_lacks is None)
            await asyncio.sleep(_WATCH_S)

    async def _drain(self) -> None:
        """New requests are refused; those under way go on, until the deadline ends them with an error."""
        self._draining = True
        _log.info("draining %d requests", self._server.open_streams)
        await self._server.idle(self._settings.drain_timeout_s)

    async def _close(self) -> None:
        await self._server.close()
        self._health.close()
        await self._policy_file.close()
        await self._sweeper.close()
        await self._adopter.close()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._settler.close()
        await self._ledger.close()
        await self._keys.close()
        self._secret_manager.close()
        await self._secrets.close()
        self._google.close()
        self._counting.close()
        self._journal.close()
        if self._otlp is not None:
            self._otlp.close()
        if self._page is not None:
            self._page.close()


def _metrics(settings: Settings, registry: CollectorRegistry) -> Metrics | None:
    """Counts where a page shows it: this process's own, or the one of whoever runs it beside others."""
    if shared_directory() is not None:
        share(settings.socket_path.stem)
    elif settings.metrics_port is None:
        return None
    return Metrics(registry)


def _page(settings: Settings, registry: CollectorRegistry, lacking: Callable[[], str | None]) -> MetricsPage | None:
    if settings.metrics_port is None:
        return None
    page = MetricsPage(registry, settings.metrics_port, lacking, settings.state_dir / "journal")
    _log.info("metrics on port %d", page.port)
    return page


def _otlp(settings: Settings) -> Otlp | None:
    if settings.otlp_endpoint is None:
        return None
    from extproc.telemetry.otlp import Otlp  # noqa: PLC0415 (a third of a second, for those who want it)

    return Otlp(settings.base_urls, random.SystemRandom().getrandbits)


def main(settings: Settings) -> None:
    """Run one processor until SIGTERM or SIGINT. Raises what `Processor` raises."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    uvloop.run(_main(settings))


async def _main(settings: Settings) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    startup = Startup()
    startup.done("imports")
    processor = Processor(settings, startup)
    startup.done("parts")
    await processor.run(stop)
