"""The ledger's client: holds, extends and settles budget in Redis, through the scripts in `lua/`.

Commands issued in one turn of the event loop share one pipeline. Every command has a deadline from when it was issued,
and all are safe to repeat by request id, so that one whose reply was lost is sent again. Nothing of redis-py leaves
this module: whatever goes wrong is LedgerUnavailable, after which nothing is known about the operation. Where Redis
itself answered with an error it is LedgerRefused.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import resources
from typing import Any, Protocol

import hiredis
import orjson
from redis import exceptions as redis_errors
from redis.asyncio.cluster import RedisCluster
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AskError,
    ClusterDownError,
    NoScriptError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)

from extproc import limits
from extproc.budget import window_at
from extproc.errors import LedgerRefused, LedgerUnavailable
from extproc.records import (
    NOTHING,
    Amount,
    Balance,
    Budget,
    BudgetWindow,
    Hold,
    HoldAsk,
    HoldRefusal,
    Lease,
    Mode,
    Orphan,
    Settlement,
    Unit,
    Window,
)

_OPERATIONS = ("hold", "extend", "settle", "stored", "adopt", "expire", "learn")
_PPM = 1_000_000

# Strings, bytes and integers: the words of one command.
_Args = tuple[Any, ...]

_FAILURES = (RedisError, RedisClusterException, OSError, TimeoutError)

# Nothing is known about a command that ended in one of these, so it may be sent again.
_LOST = (redis_errors.ConnectionError, redis_errors.TimeoutError, RedisClusterException, OSError, TimeoutError)

# This node cannot answer, another one or the same one later can: after a failover, or while slots move.
_WRONG_NODE = (ReadOnlyError, AskError, ClusterDownError, TryAgainError)

# What may be sent again as it is.
_REPEATABLE = (NoScriptError, *_WRONG_NODE, *_LOST)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


class Ledger:
    """Balances, holds and learned factors. One object a process, used from one event loop."""

    def __init__(
        self,
        url: str,
        *,
        namespace: str = "tollgate",
        timeout_ms: int = 1_000,
        hold_ttl_ms: int = 60_000,
        instance: str = "",
        wall_ms: Callable[[], int] = _wall_ms,
    ) -> None:
        """`url` is settings.redis_url. `wall_ms` only guesses the window of a hold: Redis's own clock decides.

        A hold that is neither extended nor settled for `hold_ttl_ms` expires. The rows that come with settlements are
        kept in the outbox of `instance`; without one they are not. Connects when it is first used.
        """
        if not re.fullmatch(r"[^{}]+", namespace):
            raise ValueError("a namespace is one character or more, without braces")
        self._prefix = f"{{{namespace}}}:"
        self._due, self._orphans, self._index, self._factors, self._outboxes, self._outbox = (
            self._prefix + name for name in ("due", "orphans", "windows", "factors", "outboxes", f"outbox:{instance}")
        )
        self._adopters = self._prefix + "adopters"
        self._instance = instance
        self._timeout_s = timeout_ms / 1_000
        # Half of the deadline for one attempt leaves time for another, on another connection.
        self._attempt_s = self._timeout_s / 2
        self._hold_ttl_ms = hold_ttl_ms
        self._wall_ms = wall_ms
        self._offset_ms = 0
        self._backend: _Backend = _Cluster(url, self._due, self._attempt_s) if "+cluster:" in url else _Node(url)
        self._scripts = load_scripts()
        self._scripts_known = False
        self._queue: deque[_Command] = deque()
        self._flush_due = False
        self._running: set[asyncio.Task[None]] = set()
        self._closing = False

    def hold(self, ask: HoldAsk) -> asyncio.Future[Hold | HoldRefusal]:
        """Hold under every budget of `ask`, or none. Grants what is left where that is less, but not under `least`.

        Repeated with the id of an open hold it returns that one. The future raises LedgerUnavailable, also for an id
        that is settled or expired; whoever gives up on it should settle the id with NOTHING, since the hold may
        still have been made.
        """
        return self._issue(*self._holding(ask, self._wall_ms() + self._offset_ms))

    def extend(
        self, request_id: str, windows: tuple[BudgetWindow, ...], used: Amount, target: Amount
    ) -> asyncio.Future[Lease]:
        """Record what was used so far, and hold `target` in all, as far as every hard budget allows.

        `windows` are the hold's. The future raises LedgerUnavailable.
        """
        keys = (self._hold_key(request_id), self._due, *map(self._window_key, windows))
        figures = (used.nanousd, used.tokens, target.nanousd, target.tokens, self._hold_ttl_ms)
        return self._issue(self._script("extend", keys, figures, windows), partial(_read_lease, windows))

    def settle(self, settlement: Settlement) -> asyncio.Future[bool]:
        """Post what the request cost and release its hold. False where that was done before, or in a lost attempt.

        Works without the hold too: then it posts to the settlement's windows. Its row stays in the outbox until it is
        `stored`. The future raises LedgerUnavailable.
        """
        held = (self._hold_key(settlement.request_id), self._due, self._orphans, self._index)
        keys = (*held, self._outboxes, self._outbox, *map(self._window_key, settlement.windows))
        figures = (settlement.actual.nanousd, settlement.actual.tokens, settlement.row if self._instance else "")
        return self._issue(self._script("settle", keys, figures, settlement.windows), bool)

    async def sweep(self) -> tuple[Orphan, ...]:
        """Post the checkpoints of all holds that expired, and return every orphan that is not forgotten yet."""
        expire = self._script("expire", (self._due, self._orphans, self._index))
        while await self._issue(expire, int) == limits.SWEEP_BATCH:
            pass
        orphans: dict[bytes, bytes] = await self._issue(("HGETALL", self._orphans), dict)
        prefix = len(self._hold_key(""))
        return tuple(_orphan(key.decode()[prefix:], text) for key, text in orphans.items())

    async def forget(self, request_ids: Iterable[str]) -> None:
        """Drop orphans, once their usage records are written."""
        keys = [self._hold_key(request_id) for request_id in request_ids]
        for start in range(0, len(keys), limits.MAX_PIPELINE):
            await self._issue(("HDEL", self._orphans, *keys[start : start + limits.MAX_PIPELINE]), int)

    async def stored(self, request_ids: Sequence[str]) -> int:
        """Drop these requests' rows, which a usage store has, from the outbox or a dead instance's. Returns how many.

        Raises LedgerUnavailable.
        """
        keys = [self._hold_key(request_id) for request_id in request_ids]
        batches = [keys[start : start + limits.SWEEP_BATCH] for start in range(0, len(keys), limits.SWEEP_BATCH)]
        own = (self._outboxes, self._outbox)
        scripts = (self._script("stored", (*own, *batch), (self._hold_ttl_ms,)) for batch in batches)
        return sum(await asyncio.gather(*(self._issue(script, int) for script in scripts)))

    @property
    def outbox(self) -> str:
        """The key of this instance's outbox."""
        return self._outbox

    async def adopt(self, adopter: str) -> tuple[str, ...]:
        """Say that this instance is alive. The outboxes of dead ones that `adopter` is to copy: nobody else does.

        An instance is dead when it was not heard of for as long as a hold lasts. Raises LedgerUnavailable.
        """
        keys = (self._outboxes, self._adopters, self._outbox)
        claimed: list[bytes] = await self._issue(self._script("adopt", keys, (adopter, self._hold_ttl_ms)), list)
        return tuple(outbox.decode() for outbox in claimed)

    async def rows(self, outbox: str, cursor: int) -> tuple[int, tuple[bytes, ...]]:
        """About a hundred of an outbox's rows from `cursor` on, and the next cursor: 0 at the end.

        A row that is there all the while comes once at least. Raises LedgerUnavailable.
        """
        following, pairs = await self._issue(("HSCAN", outbox, cursor, "COUNT", limits.SWEEP_BATCH), tuple)
        return int(following), tuple(pairs[1::2])

    async def balances(self, now_ms: int | None = None) -> tuple[Balance, ...]:
        """Every budget window that Redis has, closed ones of the last days too; with `now_ms` those that it is in."""
        keys: list[bytes] = await self._issue(("ZRANGE", self._index, 0, -1), list)
        found: list[tuple[BudgetWindow, Balance]] = []
        for start in range(0, len(keys), limits.MAX_PIPELINE):
            part = keys[start : start + limits.MAX_PIPELINE]
            commands = (("HMGET", key, "window", "posted", "pending") for key in part)
            replies = await asyncio.gather(*(self._issue(command, list) for command in commands))
            found.extend(_balance(*reply) for reply in replies if reply[0] is not None)
        shown = (balance for window, balance in found if now_ms is None or _holds(window, now_ms))
        return tuple(sorted(shown, key=lambda balance: (balance.budget.id, balance.resets_at_ms)))

    async def learn(self, model: str, counted: int, billed: int, start: float = 1.0) -> None:
        """Move a model's shared factor towards billed ÷ counted of one answer, from `start` where there is none yet.

        A repeat after a lost reply moves it a little further, which does no harm. Raises LedgerUnavailable.
        """
        await self._issue(self._script("learn", (self._factors,), (model, counted, billed, round(start * _PPM))), int)

    async def factors(self) -> dict[str, float]:
        """Learned factor (billed ÷ counted) by model. Raises LedgerUnavailable."""
        stored: dict[bytes, bytes] = await self._issue(("HGETALL", self._factors), dict)
        return {model.decode(): int(ppm) / _PPM for model, ppm in stored.items()}

    async def check(self) -> None:
        """Raises LedgerUnavailable where Redis does not answer, or may evict: then balances would be forgotten."""
        # Not CONFIG GET, which managed Redis forbids.
        memory: str = await self._issue(("INFO", "memory"), _text)
        policy = next((line[17:] for line in memory.splitlines() if line.startswith("maxmemory_policy:")), "not known")
        if policy != "noeviction":
            raise LedgerUnavailable(f"Redis may evict balances: its maxmemory-policy is {policy}, not noeviction")

    async def close(self) -> None:
        """Take no more commands, wait for those under way (their deadlines bound it), and disconnect."""
        self._closing = True
        while self._running or self._queue:
            await asyncio.sleep(0)
            if self._running:
                await asyncio.wait(self._running)
        await self._backend.close()

    def _hold_key(self, request_id: str) -> str:
        return f"{self._prefix}hold:{request_id}"

    def _window_key(self, window: BudgetWindow) -> str:
        return f"{self._prefix}window:{window.budget.id}:{window.start_ms}"

    def _all_keys(self, request_id: str, windows: tuple[BudgetWindow, ...]) -> tuple[str, ...]:
        return (self._hold_key(request_id), self._due, self._orphans, self._index, *map(self._window_key, windows))

    def _script(
        self, name: str, keys: Sequence[str], figures: Sequence[object] = (), windows: Sequence[BudgetWindow] = ()
    ) -> _Args:
        return ("EVALSHA", self._scripts[name].sha, len(keys), *keys, *figures, *map(orjson.dumps, windows))

    def _holding(self, ask: HoldAsk, now_ms: int) -> tuple[_Args, Callable[[Any], Hold | HoldRefusal]]:
        windows = tuple(window_at(budget, now_ms) for budget in ask.budgets)
        keys = self._all_keys(ask.request_id, windows)
        amounts = (figure for amount in (ask.ask, ask.least, ask.used) for figure in (amount.nanousd, amount.tokens))
        figures = (*amounts, self._hold_ttl_ms, ask.note)
        return self._script("hold", keys, figures, windows), partial(self._read_hold, ask, windows)

    def _read_hold(self, ask: HoldAsk, windows: tuple[BudgetWindow, ...], reply: list[Any]) -> Hold | HoldRefusal:
        match reply:
            case [b"HELD", nanousd, tokens, over]:
                return _hold(ask, windows, Amount(nanousd, tokens), over)
            case [b"REPEATED", nanousd, tokens, over, stored]:
                held_in = tuple(_window(text) for text in stored if text is not None)
                return _hold(ask, held_in, Amount(nanousd, tokens), over)
            case [b"REFUSED", place, posted, pending, now_ms]:
                return _refusal(windows[place - 1], posted, pending, now_ms)
            case [b"CLOCK", now_ms]:
                self._offset_ms = now_ms - self._wall_ms()
                raise _SendInstead(*self._holding(ask, now_ms))
            case _:
                raise LedgerUnavailable("Redis answered a hold with what is no answer to it")

    def _issue(self, args: _Args, read: Callable[[Any], Any]) -> asyncio.Future[Any]:
        """Queue one command. Its future gets what `read` makes of the reply, or LedgerUnavailable at the deadline."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        if self._closing:
            future.set_exception(LedgerUnavailable("the ledger is closed"))
        elif len(self._queue) >= limits.MAX_LEDGER_QUEUE:
            future.set_exception(LedgerUnavailable("too many commands wait for Redis"))
        else:
            timer = loop.call_later(self._timeout_s, _fail, future, "Redis did not answer in time")
            self._enqueue(_Command(args, read, future, timer))
        return future

    def _enqueue(self, command: _Command) -> None:
        self._queue.append(command)
        if not self._flush_due:
            self._flush_due = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_due = False
        while self._queue and len(self._running) < limits.MAX_LEDGER_CONNECTIONS:
            batch = self._next_batch()
            if batch:
                task = asyncio.get_running_loop().create_task(self._run(batch))
                self._running.add(task)
                task.add_done_callback(self._ran)

    def _next_batch(self) -> list[_Command]:
        batch: list[_Command] = []
        while self._queue and len(batch) < limits.MAX_PIPELINE:
            command = self._queue.popleft()
            # One that nobody waits for any more is not sent: a hold that timed out must not be made now.
            if not command.future.done():
                batch.append(command)
        return batch

    def _ran(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._flush()

    async def _run(self, batch: list[_Command]) -> None:
        generation = self._backend.generation
        for command in batch:
            command.sends += 1
        try:
            async with asyncio.timeout(self._attempt_s):
                replies = await self._send(batch)
        except _FAILURES as error:
            replies = [error] * len(batch)
        if any(isinstance(reply, (*_WRONG_NODE, *_LOST)) for reply in replies):
            await self._backend.renew(generation)
        for command, reply in zip(batch, replies, strict=True):
            self._answer(command, reply)

    async def _send(self, batch: list[_Command]) -> list[Any]:
        """One pipeline, with the scripts in front where Redis may not know them."""
        loads = () if self._scripts_known else tuple(self._scripts.values())
        commands = [*(("SCRIPT", "LOAD", script.source) for script in loads), *(command.args for command in batch)]
        replies = await self._backend.execute(commands)
        self._scripts_known = True
        return replies[len(loads) :]

    def _answer(self, command: _Command, reply: Any) -> None:
        if command.future.done():
            return
        if isinstance(reply, NoScriptError):
            self._scripts_known = False
        if isinstance(reply, Exception):
            again = isinstance(reply, _REPEATABLE)
            self._retry_or_fail(command, reply) if again else command.fail(reply)
            return
        try:
            command.succeed(command.read(reply))
        except _SendInstead as instead:
            command.args, command.read = instead.command
            self._retry_or_fail(command, instead)
        except (LedgerUnavailable, ValueError, TypeError, KeyError, IndexError) as error:
            command.fail(error)

    def _retry_or_fail(self, command: _Command, error: Exception) -> None:
        if command.sends < limits.MAX_LEDGER_SENDS:
            self._enqueue(command)
        else:
            command.fail(error)


@dataclass(slots=True, eq=False)
class _Command:
    """One command under way. Its future is done at the latest when its timer rings."""

    args: _Args
    read: Callable[[Any], Any]
    future: asyncio.Future[Any]
    timer: asyncio.TimerHandle
    sends: int = 0

    def succeed(self, result: object) -> None:
        self.timer.cancel()
        self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        self.timer.cancel()
        own = isinstance(error, ResponseError) and not isinstance(error, _REPEATABLE)
        _fail(self.future, f"{type(error).__name__}: {error}", LedgerRefused if own else LedgerUnavailable)


class _SendInstead(Exception):
    """A reply that says to send another command in the place of this one."""

    def __init__(self, args: _Args, read: Callable[[Any], Any]) -> None:
        super().__init__("the window turned while the hold was under way")
        self.command = (args, read)


@dataclass(frozen=True, slots=True)
class _Script:
    """A Lua script as Redis gets it."""

    source: str
    sha: str


def load_scripts(clock: str | None = None) -> Mapping[str, _Script]:
    """The ledger's operations by name. `clock` replaces the Lua that reads Redis's clock, for tests that move time."""
    lua = resources.files("extproc") / "lua"
    bounds = (
        f"local SWEEP_BATCH = {limits.SWEEP_BATCH}\n"
        f"local SETTLED_RETENTION_MS = {limits.SETTLED_RETENTION_S * 1_000}\n"
        f"local WINDOW_RETENTION_MS = {limits.WINDOW_RETENTION_S * 1_000}\n"
        f"local MAX_OUTBOX_ROWS = {limits.MAX_OUTBOX_ROWS}\n"
        f"local MAX_DEAD_OUTBOXES = {limits.MAX_DEAD_OUTBOXES}\n"
        f"local OUTBOX_RETENTION_MS = {limits.OUTBOX_RETENTION_S * 1_000}\n"
        f"local MIN_FACTOR_PPM = {round(limits.MIN_FACTOR * _PPM)}\n"
        f"local MAX_FACTOR_PPM = {round(limits.MAX_FACTOR * _PPM)}\n"
    )
    shared = bounds + (clock or (lua / "clock.lua").read_text()) + (lua / "common.lua").read_text()
    scripts = {}
    for name in _OPERATIONS:
        # The first line says how Redis may run the script, and has to stay the first.
        head, body = (lua / f"{name}.lua").read_text().split("\n", 1)
        source = f"{head}\n{shared}{body}"
        scripts[name] = _Script(source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())
    return scripts


class _Backend(Protocol):
    """The Redis that has the ledger's slot: the only part that knows whether it is one node or a cluster."""

    generation: int

    async def execute(self, commands: Sequence[_Args]) -> list[Any]:
        """Send one pipeline. A command's own error is in its place in the list; the pipeline's is raised."""

    async def renew(self, generation: int) -> None:
        """Forget connections and topology that failed. Does nothing where that was done since `generation`."""

    async def close(self) -> None:
        """Disconnect."""


# Without redis-py's own retries: the ledger's are bounded by each command's deadline. Without its socket timeouts
# too: they cost a task a write and a timer a reply, and each pipeline has a timeout around the whole of it.
_CLIENT: dict[str, Any] = {
    "max_connections": limits.MAX_LEDGER_CONNECTIONS,
    "retry": Retry(NoBackoff(), 0),
    "socket_timeout": None,
    "socket_connect_timeout": None,
    "protocol": 3,
}


async def _exchange(connection: AbstractConnection, commands: Sequence[_Args]) -> list[Any]:
    """One write, then the replies in order. redis-py's own pipelines cost three times as much a command.

    A connection that fails, or is given up in the middle, has disconnected itself, and connects again when it is used.
    """
    await connection.send_packed_command(b"".join(map(hiredis.pack_command, commands)), check_health=False)
    replies: list[Any] = []
    for _ in commands:
        try:
            replies.append(await connection.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


class _Node:
    """One Redis, over TCP, TLS or a Unix socket."""

    def __init__(self, url: str) -> None:
        self.generation = 0
        self._pool = ConnectionPool.from_url(url, **_CLIENT)
        self._free: list[AbstractConnection] = []

    async def execute(self, commands: Sequence[_Args]) -> list[Any]:
        connection = self._free.pop() if self._free else self._pool.make_connection()  # type: ignore[no-untyped-call]
        try:
            return await _exchange(connection, commands)
        finally:
            self._free.append(connection)

    async def renew(self, generation: int) -> None:
        if generation == self.generation:
            self.generation += 1
            await self._disconnect()

    async def close(self) -> None:
        await self._disconnect()

    async def _disconnect(self) -> None:
        while self._free:
            await self._free.pop().disconnect(nowait=True)  # over TLS, one that hangs is waited for for half a minute


class _Cluster:
    """The node of a Redis Cluster that owns the ledger's one slot.

    redis-py's ClusterPipeline refuses scripts and splits by slot; all of the ledger is one slot, and so one node's.
    After a failure the topology is read again, from whichever node answers.
    """

    def __init__(self, url: str, key: str, disconnect_s: float) -> None:
        self.generation = 0
        self._key = key
        # This timeout is for the end of a connection too, and for nothing that happens often.
        options = {**_CLIENT, "socket_connect_timeout": disconnect_s}
        self._cluster = RedisCluster.from_url(url.replace("+cluster:", ":", 1), **options)

    async def execute(self, commands: Sequence[_Args]) -> list[Any]:
        await self._cluster.initialize()
        node = self._cluster.get_node_from_key(self._key)
        if node is None:
            raise ConnectionError("no node of the cluster has the ledger's slot")
        connection = node.acquire_connection()
        try:
            return await _exchange(connection, commands)
        finally:
            node.release(connection)

    async def renew(self, generation: int) -> None:
        if generation == self.generation:
            self.generation += 1
            await self.close()

    async def close(self) -> None:
        with suppress(*_FAILURES):  # of nodes that hang: the connections are gone all the same
            await self._cluster.aclose()


def _fail(future: asyncio.Future[Any], why: str, kind: type[LedgerUnavailable] = LedgerUnavailable) -> None:
    if not future.done():
        future.set_exception(kind(why))


def _hold(ask: HoldAsk, windows: tuple[BudgetWindow, ...], held: Amount, over: bytes) -> Hold:
    return Hold(ask.request_id, windows, held, tuple(orjson.loads(over)) if over else ())


def _read_lease(windows: tuple[BudgetWindow, ...], reply: list[Any]) -> Lease:
    match reply:
        case [b"HELD", nanousd, tokens]:
            return Lease(Amount(nanousd, tokens))
        case [b"LIMITED", nanousd, tokens, place, posted, pending, now_ms]:
            limited_by = _refusal(windows[place - 1], posted, pending, now_ms)
            return Lease(Amount(nanousd, tokens), limited_by=limited_by)
        case [b"GONE"]:
            return Lease(NOTHING, gone=True)
        case _:
            raise LedgerUnavailable("Redis answered an extension with what is no answer to it")


def _refusal(window: BudgetWindow, posted: int, pending: int, now_ms: int) -> HoldRefusal:
    return HoldRefusal(window.budget, posted, pending, window.end_ms, now_ms)


def _window(text: bytes) -> BudgetWindow:
    stored = orjson.loads(text)
    budget = stored["budget"]
    return BudgetWindow(
        Budget(
            budget["id"],
            Unit(budget["unit"]),
            budget["limit"],
            Window(budget["window"]),
            budget["tz"],
            Mode(budget["mode"]),
        ),
        stored["start_ms"],
        stored["end_ms"],
    )


def _balance(text: bytes, posted: bytes | None, pending: bytes | None) -> tuple[BudgetWindow, Balance]:
    window = _window(text)
    return window, Balance(window.budget, int(posted or 0), int(pending or 0), window.end_ms)


def _text(reply: bytes | str) -> str:
    """A verbatim string of RESP3, which hiredis has decoded, or a plain one."""
    return reply if isinstance(reply, str) else reply.decode()


def _holds(window: BudgetWindow, now_ms: int) -> bool:
    return not window.end_ms or window.start_ms <= now_ms < window.end_ms


def _orphan(request_id: str, text: bytes) -> Orphan:
    nanousd, tokens, note = text.split(b" ", 2)
    return Orphan(request_id, Amount(int(nanousd), int(tokens)), note)
