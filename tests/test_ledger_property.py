"""The ledger against a model of it in plain Python, over random interleavings of everything that can happen to it."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from redis import Redis
from redis.exceptions import ConnectionError, NoScriptError

from extproc.budget import window_at
from extproc.errors import LedgerUnavailable
from extproc.ledger import Ledger, load_scripts
from extproc.local.valkey import LocalValkey
from extproc.records import (
    NOTHING,
    Amount,
    Budget,
    BudgetWindow,
    Hold,
    HoldAsk,
    HoldRefusal,
    Mode,
    Orphan,
    Settlement,
    Unit,
    Window,
)
from tests.test_ledger import DAY_MS, NOON_MS, TEST_CLOCK

TTL_MS = 60_000
BUDGETS = (
    Budget("day", Unit.TOKENS, 100, Window.DAY, "UTC", Mode.HARD),
    Budget("zone", Unit.TOKENS, 160, Window.DAY, "Asia/Tokyo", Mode.HARD),
    Budget("total", Unit.NANOUSD, 400, Window.TOTAL, "UTC", Mode.HARD),
    Budget("soft", Unit.TOKENS, 50, Window.HOUR, "UTC", Mode.SOFT),
    Budget("shadow", Unit.NANOUSD, 50, Window.MINUTE, "UTC", Mode.SHADOW),
)
figures = st.integers(0, 60)
amounts = st.builds(Amount, figures, figures)


@dataclass
class Request:
    """What the model knows of a request. `held` counts while it is open, `used` until it is settled."""

    windows: tuple[BudgetWindow, ...]
    held: Amount
    used: Amount
    due_ms: int
    over: tuple[str, ...]
    note: bytes
    state: str = "open"


@dataclass
class Model:
    """The ledger as its description has it: no Lua, no Redis, and sums taken from the requests each time."""

    now_ms: int = NOON_MS
    requests: dict[str, Request] = field(default_factory=dict)
    posted: dict[BudgetWindow, int] = field(default_factory=dict)
    orphans: dict[str, Orphan] = field(default_factory=dict)

    def pending(self, window: BudgetWindow) -> int:
        unit = window.budget.unit
        return sum(
            request.held.of(unit)
            for request in self.requests.values()
            if request.state == "open" and window in request.windows
        )

    def left(self, window: BudgetWindow) -> int:
        return window.budget.limit - self.posted.get(window, 0) - self.pending(window)

    def room(self, windows: tuple[BudgetWindow, ...], unit: Unit) -> int:
        lefts = [self.left(window) for window in windows if is_hard(window, unit)]
        return max(0, min(lefts, default=10**9))

    def post(self, windows: tuple[BudgetWindow, ...], amount: Amount, sign: int = 1) -> None:
        for window in windows:
            self.posted[window] = self.posted.get(window, 0) + sign * amount.of(window.budget.unit)

    def expire(self) -> None:
        for request_id, request in self.requests.items():
            if request.state == "open" and request.due_ms <= self.now_ms:
                self.post(request.windows, request.used)
                request.state = "expired"
                self.orphans[request_id] = Orphan(request_id, request.used, request.note)

    def hold(self, ask: HoldAsk) -> Hold | HoldRefusal | None:
        """None where the id is closed."""
        known = self.requests.get(ask.request_id)
        if known is not None:
            return Hold(ask.request_id, known.windows, known.held, known.over) if known.state == "open" else None
        self.expire()
        windows = tuple(window_at(budget, self.now_ms) for budget in ask.budgets)
        for window in windows:
            if is_hard(window) and self.left(window) < ask.least.of(window.budget.unit):
                return self.refusal(window)
        over = tuple(
            window.budget.id for window in windows if window.budget.mode is Mode.SOFT and self.left(window) <= 0
        )
        held = Amount(
            min(ask.ask.nanousd, self.room(windows, Unit.NANOUSD)), min(ask.ask.tokens, self.room(windows, Unit.TOKENS))
        )
        self.requests[ask.request_id] = Request(windows, held, ask.used, self.now_ms + TTL_MS, over, ask.note)
        return Hold(ask.request_id, windows, held, over)

    def refusal(self, window: BudgetWindow) -> HoldRefusal:
        return HoldRefusal(window.budget, self.posted.get(window, 0), self.pending(window), window.end_ms, self.now_ms)

    def extend(self, request_id: str, used: Amount, target: Amount) -> Amount | None:
        """None where there is no open hold."""
        request = self.requests.get(request_id)
        if request is None or request.state != "open":
            return None
        raised = {
            unit: request.held.of(unit)
            + min(max(0, target.of(unit) - request.held.of(unit)), self.room(request.windows, unit))
            for unit in Unit
        }
        request.held = Amount(raised[Unit.NANOUSD], raised[Unit.TOKENS])
        request.used = Amount(max(request.used.nanousd, used.nanousd), max(request.used.tokens, used.tokens))
        request.due_ms = self.now_ms + TTL_MS
        return request.held

    def settle(self, settlement: Settlement) -> bool:
        request = self.requests.get(settlement.request_id)
        if request is None:
            request = Request(settlement.windows, NOTHING, NOTHING, 0, (), b"", "lost")
            self.requests[settlement.request_id] = request
        if request.state == "settled":
            return False
        if request.state == "expired":
            self.post(request.windows, request.used, -1)
        self.post(request.windows, settlement.actual)
        request.state = "settled"
        self.orphans.pop(settlement.request_id, None)
        return True


def is_hard(window: BudgetWindow, unit: Unit | None = None) -> bool:
    return window.budget.mode is Mode.HARD and unit in (None, window.budget.unit)


class LedgerMachine(RuleBasedStateMachine):
    """Does everything twice, to the ledger and to the model, and compares answers and balances."""

    url: ClassVar[str]
    store: ClassVar[Redis]
    namespaces: ClassVar = itertools.count()
    ids: ClassVar = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.namespace = f"property{next(self.namespaces)}"
        self.wall_ms = self.model.now_ms
        self.numbers = itertools.count()
        self.losing_reply = False
        self.runner = asyncio.Runner()
        self.runner.run(self.start_client())
        self.set_clock()

    async def start_client(self) -> None:
        self.ledger = Ledger(
            self.url, namespace=self.namespace, timeout_ms=10_000, hold_ttl_ms=TTL_MS, wall_ms=lambda: self.wall_ms
        )
        self.ledger._scripts = load_scripts(TEST_CLOCK)
        execute = self.ledger._backend.execute

        async def lossy(commands: Any) -> list[Any]:
            replies = await execute(commands)
            if self.losing_reply and not isinstance(replies[-1], NoScriptError):
                self.losing_reply = False
                raise ConnectionError("the reply was lost")
            return replies

        self.ledger._backend.execute = lossy  # type: ignore[method-assign]

    def set_clock(self) -> None:
        self.store.set(f"{{{self.namespace}}}:test-clock", self.model.now_ms)

    def ask(self, operation: str, *args: Any) -> Any:
        async def call() -> Any:
            return await getattr(self.ledger, operation)(*args)

        try:
            return self.runner.run(call())
        finally:
            self.losing_reply = False

    @initialize(target=ids)
    def one_id(self) -> str:
        return "never held"

    @rule(
        target=ids,
        budgets=st.lists(st.sampled_from(BUDGETS), unique=True).map(tuple),
        want=amounts,
        least=st.integers(0, 20),
        used=amounts,
        lose=st.booleans(),
    )
    def hold(self, budgets: tuple[Budget, ...], want: Amount, least: int, used: Amount, lose: bool) -> str:
        request_id = f"r{next(self.numbers)}"
        self.losing_reply = lose
        asked = HoldAsk(request_id, budgets, want, Amount(least, least), used, note=request_id.encode())
        granted = self.ask("hold", asked)
        assert granted == self.model.hold(asked)
        if isinstance(granted, Hold):
            for window in granted.windows:
                assert not is_hard(window) or not granted.held.of(window.budget.unit) or self.model.left(window) >= 0
        return request_id

    @rule(request_id=ids, budgets=st.lists(st.sampled_from(BUDGETS), unique=True).map(tuple), want=amounts)
    def hold_again(self, request_id: str, budgets: tuple[Budget, ...], want: Amount) -> None:
        asked = HoldAsk(request_id, budgets, want, NOTHING)
        expected = self.model.hold(asked)
        if expected is None:
            with pytest.raises(LedgerUnavailable, match="already"):
                self.ask("hold", asked)
        else:
            assert self.ask("hold", asked) == expected

    @rule(request_id=ids, used=amounts, more=amounts, factor=st.sampled_from((1, 3)), lose=st.booleans())
    def extend(self, request_id: str, used: Amount, more: Amount, factor: int, lose: bool) -> None:
        self.losing_reply = lose
        wanted = Amount(more.nanousd * factor, more.tokens * factor)
        lease = self.ask("extend", request_id, self.windows(request_id), used, wanted)
        held = self.model.extend(request_id, used, wanted)
        assert (lease.gone, lease.held) == (held is None, held or NOTHING)
        short = held is not None and (held.nanousd < wanted.nanousd or held.tokens < wanted.tokens)
        assert (lease.limited_by is not None) is short
        if lease.limited_by is not None:
            window = next(w for w in self.windows(request_id) if w.budget == lease.limited_by.budget)
            assert lease.limited_by == self.model.refusal(window)
            assert self.model.left(window) <= 0

    @rule(request_id=ids, actual=amounts, lose=st.booleans())
    def settle(self, request_id: str, actual: Amount, lose: bool) -> None:
        self.losing_reply = lose
        settlement = Settlement(request_id, self.windows(request_id), actual)
        did = self.model.settle(settlement)
        assert self.ask("settle", settlement) is (did and not lose)

    @rule(passed_ms=st.sampled_from((1, TTL_MS // 2, TTL_MS, 3_600_000, DAY_MS)))
    def time_passes(self, passed_ms: int) -> None:
        self.model.now_ms += passed_ms
        self.set_clock()

    @rule(off_ms=st.sampled_from((-DAY_MS, -1, 0, 1, DAY_MS)))
    def the_processor_s_clock_is_set(self, off_ms: int) -> None:
        self.wall_ms = self.model.now_ms + off_ms

    @rule()
    def sweep(self) -> None:
        self.model.expire()
        orphans = self.ask("sweep")
        assert {orphan.request_id: orphan for orphan in orphans} == self.model.orphans

    @rule(request_id=ids)
    def forget(self, request_id: str) -> None:
        self.model.orphans.pop(request_id, None)
        self.ask("forget", [request_id])

    @rule()
    def the_processor_crashes(self) -> None:
        """Its holds stay open, and nothing of the client is left but what is in Redis."""
        self.runner.run(self.ledger.close())
        self.runner.run(self.start_client())

    @rule()
    def redis_forgets_the_scripts(self) -> None:
        self.store.script_flush()

    @invariant()
    def balances_are_the_model_s(self) -> None:
        found = {
            (balance.budget, balance.resets_at_ms): (balance.posted, balance.pending)
            for balance in self.ask("balances")
        }
        expected = {
            (window.budget, window.end_ms): (self.model.posted.get(window, 0), self.model.pending(window))
            for request in self.model.requests.values()
            for window in request.windows
            if request.state == "open" or self.model.posted.get(window, 0)
        }
        assert found == expected

    def windows(self, request_id: str) -> tuple[BudgetWindow, ...]:
        known = self.model.requests.get(request_id)
        return known.windows if known else tuple(window_at(budget, self.model.now_ms) for budget in BUDGETS)

    def teardown(self) -> None:
        self.runner.run(self.ledger.close())
        self.runner.close()


def test_the_ledger_does_what_its_model_does() -> None:
    # The server is not a fixture's: the machine is made anew for every example, and finds it on its class.
    with tempfile.TemporaryDirectory() as directory, LocalValkey(Path(directory)) as server:
        LedgerMachine.url = server.url
        with Redis.from_url(server.url) as LedgerMachine.store:
            run_state_machine_as_test(
                LedgerMachine,
                settings=settings(
                    max_examples=60,
                    stateful_step_count=40,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=[HealthCheck.too_slow],
                ),
            )
