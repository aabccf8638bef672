"""The ledger against real servers: Valkey, Redis where it is installed, and a cluster of three Valkeys."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.asyncio.cluster import RedisCluster as AsyncRedisCluster
from redis.crc import key_slot

from extproc import limits
from extproc.budget import window_at
from extproc.errors import LedgerRefused, LedgerUnavailable
from extproc.ledger import Ledger, load_scripts
from extproc.local.valkey import LocalValkey, free_port
from extproc.records import (
    NOTHING,
    Amount,
    Balance,
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
from tests.clusters import start_cluster

REDIS = shutil.which("redis-server")
DAY_MS = 86_400_000
NOON_MS = 4_102_444_800_000 + DAY_MS // 2  # of 1 January 2100: ahead, since Redis itself forgets keys by its own clock

# Stands in for Redis's TIME, so that a test can move the one clock that counts.
TEST_CLOCK = """
local function now_ms()
  return tonumber(redis.call('GET', string.match(KEYS[1], '^{.-}') .. ':test-clock'))
end
"""

namespaces = (f"test{number}" for number in itertools.count())


@pytest.fixture(
    scope="module",
    params=[
        "valkey",
        pytest.param("redis", marks=pytest.mark.skipif(REDIS is None, reason="redis-server is not installed")),
        "cluster",
    ],
)
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("redis")
    with ExitStack() as stack:
        if request.param == "cluster":
            yield start_cluster(directory, stack)[0].url.replace("redis://", "redis+cluster://")
        else:
            binary = Path(REDIS) if request.param == "redis" and REDIS else None
            yield stack.enter_context(LocalValkey(directory, binary=binary)).url


class Bench:
    """A ledger in a namespace of its own, and a second client to look at what it left in Redis."""

    def __init__(self, url: str, namespace: str | None = None, **options: Any) -> None:
        self.url = url
        self.namespace = namespace or next(namespaces)
        self.ledger = Ledger(url, namespace=self.namespace, **options)
        self.store: Any = (
            AsyncRedisCluster.from_url(url.replace("+cluster", "")) if "+cluster" in url else AsyncRedis.from_url(url)
        )

    def key(self, name: str) -> str:
        return f"{{{self.namespace}}}:{name}"

    async def set_clock(self, now_ms: int) -> None:
        """From here on, this is the time of Redis for the ledger's scripts."""
        self.ledger._scripts = load_scripts(TEST_CLOCK)
        await self.store.set(self.key("test-clock"), now_ms)

    async def keys(self) -> set[str]:
        return {key.decode() async for key in self.store.scan_iter(self.key("*"))}

    async def figures(self, window: BudgetWindow) -> tuple[int, int]:
        """Posted and pending."""
        found = await self.store.hmget(self.key(f"window:{window.budget.id}:{window.start_ms}"), "posted", "pending")
        return int(found[0] or 0), int(found[1] or 0)

    async def close(self) -> None:
        await self.ledger.close()
        await self.store.aclose()


@asynccontextmanager
async def opened(url: str, **options: Any) -> AsyncIterator[Bench]:
    bench = Bench(url, **options)
    try:
        yield bench
    finally:
        await bench.close()


@pytest.fixture
async def bench(url: str) -> AsyncIterator[Bench]:
    async with opened(url, timeout_ms=5_000) as bench:
        yield bench


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LocalValkey]:
    """A server of the test's own, to break."""
    with LocalValkey(tmp_path) as server:
        yield server


def budget(
    name: str = "a",
    limit: int = 1_000,
    *,
    unit: Unit = Unit.TOKENS,
    mode: Mode = Mode.HARD,
    window: Window = Window.DAY,
    tz: str = "UTC",
) -> Budget:
    return Budget(f"service/{name}/{window}/{unit}/{mode}", unit, limit, window, tz, mode)


def tokens(figure: int) -> Amount:
    return Amount(0, figure)


def ask(request_id: str, *under: Budget, want: int = 100, least: int = 1, note: bytes = b"") -> HoldAsk:
    return HoldAsk(request_id, under, tokens(want), tokens(least), note=note)


async def held(bench: Bench, request_id: str, *under: Budget, want: int = 100, note: bytes = b"") -> Hold:
    hold = await bench.ledger.hold(ask(request_id, *under, want=want, note=note))
    assert isinstance(hold, Hold)
    return hold


# Holding --------------------------------------------------------------------------------------------------------------


async def test_a_hold_is_pending_under_every_budget_in_its_unit(bench: Bench) -> None:
    budgets = (budget("a"), budget("b", unit=Unit.NANOUSD), budget("c", window=Window.TOTAL))
    hold = await bench.ledger.hold(HoldAsk("r", budgets, Amount(70, 9), Amount(1, 1)))
    assert isinstance(hold, Hold)
    assert hold.held == Amount(70, 9)
    assert hold.over == ()
    assert tuple(window.budget for window in hold.windows) == budgets
    assert [await bench.figures(window) for window in hold.windows] == [(0, 9), (0, 70), (0, 9)]


async def test_a_request_under_no_budget_holds_what_it_asks_and_can_be_settled(bench: Bench) -> None:
    hold = await held(bench, "r", want=7)
    assert (hold.held, hold.windows) == (tokens(7), ())
    assert (await bench.ledger.extend("r", (), tokens(1), tokens(50))).held == tokens(50)
    assert await bench.ledger.settle(Settlement("r", (), tokens(7)))


async def test_what_is_left_is_granted_where_more_was_asked(bench: Bench) -> None:
    await held(bench, "first", budget(limit=150), want=100)
    assert (await held(bench, "second", budget(limit=150), want=100)).held == tokens(50)
    refused = await bench.ledger.hold(ask("third", budget(limit=150)))
    assert isinstance(refused, HoldRefusal)
    assert (refused.budget, refused.posted, refused.pending) == (budget(limit=150), 0, 150)
    assert refused.resets_at_ms - DAY_MS <= refused.now_ms < refused.resets_at_ms


@pytest.mark.parametrize(("least", "granted"), [(50, True), (51, False)], ids=["just-enough", "one-too-few"])
async def test_less_than_the_least_is_refused(bench: Bench, least: int, granted: bool) -> None:
    answer = await bench.ledger.hold(ask("r", budget(limit=50), want=100, least=least))
    assert isinstance(answer, Hold) is granted


async def test_each_unit_is_granted_by_its_own_budgets(bench: Bench) -> None:
    budgets = (budget("t", 30), budget("u", 500, unit=Unit.NANOUSD), budget("v", 40))
    hold = await bench.ledger.hold(HoldAsk("r", budgets, Amount(900, 90), Amount(1, 1)))
    assert isinstance(hold, Hold)
    assert hold.held == Amount(500, 30)
    assert [await bench.figures(window) for window in hold.windows] == [(0, 30), (0, 500), (0, 30)]


async def test_one_budget_that_refuses_leaves_all_others_untouched(bench: Bench) -> None:
    await held(bench, "r", budget("full", 100), want=100)
    before = await bench.keys()
    refused = await bench.ledger.hold(ask("s", budget("roomy"), budget("full", 100), budget("spent", 0)))
    assert isinstance(refused, HoldRefusal)
    assert refused.budget.id == budget("full").id
    assert await bench.keys() == before


@pytest.mark.parametrize(("mode", "over"), [(Mode.SOFT, True), (Mode.SHADOW, False)], ids=["soft", "shadow"])
async def test_soft_tells_and_shadow_counts_and_neither_refuses(bench: Bench, mode: Mode, over: bool) -> None:
    watched = budget("w", 100, mode=mode)
    first = await held(bench, "first", watched, want=100)
    second = await held(bench, "second", watched, want=100)
    assert (first.over, second.over) == ((), (watched.id,) if over else ())
    assert second.held == tokens(100)
    assert await bench.figures(second.windows[0]) == (0, 200)
    assert await bench.ledger.hold(ask("second", watched)) == second
    assert (await bench.ledger.extend("second", second.windows, NOTHING, tokens(900))).limited_by is None


async def test_a_repeated_hold_is_the_same_hold(bench: Bench) -> None:
    hold = await held(bench, "r", budget("a"), budget("b", unit=Unit.NANOUSD))
    assert await bench.ledger.hold(ask("r", budget("a"), budget("b", unit=Unit.NANOUSD), want=900)) == hold
    assert await bench.figures(hold.windows[0]) == (0, 100)


async def test_a_repeated_hold_keeps_the_window_that_was_fixed(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    hold = await held(bench, "r", budget())
    await bench.set_clock(NOON_MS + DAY_MS)
    assert await bench.ledger.hold(ask("r", budget())) == hold


async def test_an_id_that_was_settled_cannot_hold_again(bench: Bench) -> None:
    hold = await held(bench, "r", budget())
    await bench.ledger.settle(Settlement("r", hold.windows, tokens(10)))
    with pytest.raises(LedgerUnavailable, match="already settled"):
        await bench.ledger.hold(ask("r", budget()))
    assert await bench.figures(hold.windows[0]) == (10, 0)


async def test_an_id_given_up_before_its_hold_arrived_cannot_hold(bench: Bench) -> None:
    assert await bench.ledger.settle(Settlement("r", (), NOTHING))
    with pytest.raises(LedgerUnavailable, match="already settled"):
        await bench.ledger.hold(ask("r", budget()))


async def test_figures_near_the_bounds_stay_exact(bench: Bench) -> None:
    dear = budget("a", limits.MAX_NANOUSD, unit=Unit.NANOUSD, window=Window.TOTAL)
    many = budget("b", limits.MAX_TOKENS, window=Window.TOTAL)
    most = Amount(limits.MAX_NANOUSD - 1, limits.MAX_TOKENS)
    hold = await bench.ledger.hold(HoldAsk("r", (dear, many), most, NOTHING))
    assert isinstance(hold, Hold)
    assert hold.held == most
    assert [await bench.figures(window) for window in hold.windows] == [
        (0, limits.MAX_NANOUSD - 1),
        (0, limits.MAX_TOKENS),
    ]
    await bench.ledger.settle(Settlement("r", hold.windows, Amount(limits.MAX_NANOUSD - 1, 0)))
    last = await bench.ledger.hold(HoldAsk("s", (dear,), Amount(9, 0), NOTHING))
    assert isinstance(last, Hold)
    assert last.held == Amount(1, 0)


@pytest.mark.parametrize("bad", [-1, 2**53, "1.5", "x", "inf", "nan"], ids=str)
async def test_an_amount_that_is_no_whole_number_fails_before_anything_is_written(bench: Bench, bad: Any) -> None:
    hold = await held(bench, "open", budget("open"))
    before = await bench.keys()
    for future in (
        bench.ledger.hold(HoldAsk("r", (budget(),), tokens(bad), NOTHING)),
        bench.ledger.hold(HoldAsk("r", (budget(),), NOTHING, NOTHING, used=tokens(bad))),
        bench.ledger.settle(Settlement("open", hold.windows, tokens(bad))),
        bench.ledger.extend("open", hold.windows, tokens(bad), tokens(900)),
        bench.ledger.extend("open", hold.windows, NOTHING, tokens(bad)),
    ):
        with pytest.raises(LedgerRefused):
            await future
    assert await bench.keys() == before
    assert await bench.figures(hold.windows[0]) == (0, 100)


async def test_racers_for_the_last_of_a_budget_never_pass_the_limit(bench: Bench) -> None:
    limited = budget(limit=505)
    async with opened(bench.url, namespace=bench.namespace, timeout_ms=10_000) as other:
        racers = [
            ledger.hold(ask(f"{name}{number}", limited, want=10, least=1))
            for number in range(150)
            for name, ledger in (("x", bench.ledger), ("y", other.ledger))
        ]
        answers = await asyncio.gather(*racers)
    granted = [answer.held.tokens for answer in answers if isinstance(answer, Hold)]
    assert sorted(granted) == [5] + [10] * 50
    assert sum(isinstance(answer, HoldRefusal) for answer in answers) == 300 - 51


# Extending ------------------------------------------------------------------------------------------------------------


async def test_an_extension_raises_the_hold_to_its_target_once(bench: Bench) -> None:
    hold = await held(bench, "r", budget())
    for _ in range(2):
        lease = await bench.ledger.extend("r", hold.windows, tokens(90), tokens(200))
        assert (lease.held, lease.gone, lease.limited_by) == (tokens(200), False, None)
        assert await bench.figures(hold.windows[0]) == (0, 200)


async def test_an_extension_never_lowers_what_is_held_or_used(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    hold = await held(bench, "r", budget())
    await bench.ledger.extend("r", hold.windows, tokens(90), tokens(200))
    assert (await bench.ledger.extend("r", hold.windows, tokens(10), tokens(20))).held == tokens(200)
    await bench.set_clock(NOON_MS + 60_000)
    (orphan,) = await bench.ledger.sweep()
    assert orphan.posted == tokens(90)


async def test_an_extension_gives_what_is_left_and_names_the_budget(bench: Bench) -> None:
    roomy, tight = budget("roomy"), budget("tight", 150)
    hold = await held(bench, "r", roomy, tight)
    lease = await bench.ledger.extend("r", hold.windows, tokens(90), tokens(200))
    assert lease.held == tokens(150)
    assert lease.limited_by is not None
    assert (lease.limited_by.budget, lease.limited_by.posted, lease.limited_by.pending) == (tight, 0, 150)
    assert lease.limited_by.resets_at_ms == hold.windows[1].end_ms
    assert [await bench.figures(window) for window in hold.windows] == [(0, 150), (0, 150)]
    assert (await bench.ledger.extend("r", hold.windows, tokens(150), tokens(300))).held == tokens(150)


@pytest.mark.parametrize(
    ("used", "named"),
    [(Amount(200, 40), "money"), (Amount(40, 200), "tokens")],
    ids=["money-ends-first", "tokens-end-first"],
)
async def test_where_both_units_are_short_the_one_that_ends_first_is_named(
    bench: Bench, used: Amount, named: str
) -> None:
    budgets = (budget("tokens", 150), budget("money", 150, unit=Unit.NANOUSD))
    hold = await bench.ledger.hold(HoldAsk("r", budgets, Amount(100, 100), Amount(1, 1)))
    assert isinstance(hold, Hold)
    lease = await bench.ledger.extend("r", hold.windows, used, Amount(900, 900))
    assert lease.held == Amount(150, 150)
    assert lease.limited_by is not None
    assert lease.limited_by.budget.id.startswith(f"service/{named}/")


async def test_an_extension_past_an_overrun_budget_gives_nothing(bench: Bench) -> None:
    limited = budget(limit=200)
    hold = await held(bench, "r", limited)
    other = await held(bench, "s", limited, want=50)
    await bench.ledger.settle(Settlement("s", other.windows, tokens(500)))
    assert (await bench.ledger.extend("r", hold.windows, tokens(100), tokens(200))).held == tokens(100)


async def test_an_extension_without_an_open_hold_is_gone(bench: Bench) -> None:
    hold = await held(bench, "r", budget())
    await bench.ledger.settle(Settlement("r", hold.windows, tokens(10)))
    for request_id in ("r", "never held"):
        lease = await bench.ledger.extend(request_id, hold.windows, tokens(20), tokens(300))
        assert (lease.gone, lease.held) == (True, NOTHING)
    assert await bench.figures(hold.windows[0]) == (10, 0)


# Settling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("actual", [0, 40, 100, 5_000], ids=["nothing", "less", "all", "above-hold-and-limit"])
async def test_a_settlement_posts_the_actual_and_releases_the_rest_once(bench: Bench, actual: int) -> None:
    hold = await held(bench, "r", budget("a"), budget("b"))
    settlement = Settlement("r", hold.windows, tokens(actual))
    assert [await bench.ledger.settle(settlement), await bench.ledger.settle(settlement)] == [True, False]
    assert [await bench.figures(window) for window in hold.windows] == [(actual, 0), (actual, 0)]
    assert await bench.store.hgetall(bench.key("hold:r")) == {b"state": b"settled"}
    assert 0 < await bench.store.pttl(bench.key("hold:r")) <= limits.SETTLED_RETENTION_S * 1_000
    assert await bench.store.zcard(bench.key("due")) == 0


async def test_a_settlement_without_its_hold_posts_to_the_windows_it_brings(bench: Bench) -> None:
    windows = tuple(window_at(limited, time.time_ns() // 10**6) for limited in (budget("a"), budget("b")))
    settlement = Settlement("lost", windows, tokens(40))
    assert [await bench.ledger.settle(settlement), await bench.ledger.settle(settlement)] == [True, False]
    assert [await bench.figures(window) for window in windows] == [(40, 0), (40, 0)]
    assert {balance.budget for balance in await bench.ledger.balances()} == {budget("a"), budget("b")}


async def test_a_settlement_of_a_window_long_over_leaves_nothing_behind(bench: Bench) -> None:
    window = window_at(budget(), time.time_ns() // 10**6 - 10 * DAY_MS)
    assert await bench.ledger.settle(Settlement("late", (window,), tokens(40)))
    await bench.ledger.sweep()
    assert await bench.keys() == {bench.key("hold:late")}


@pytest.mark.parametrize("window", [Window.DAY, Window.TOTAL])
async def test_a_request_that_came_to_nothing_leaves_only_its_marker(bench: Bench, window: Window) -> None:
    hold = await held(bench, "r", budget("a", window=window), budget("b", window=window, unit=Unit.NANOUSD))
    await bench.ledger.extend("r", hold.windows, tokens(0), Amount(50, 200))
    await bench.ledger.settle(Settlement("r", hold.windows, NOTHING))
    await bench.ledger.settle(Settlement("never held", hold.windows, NOTHING))
    assert await bench.keys() == {bench.key("hold:r"), bench.key("hold:never held")}
    assert await bench.ledger.balances() == ()


@pytest.mark.parametrize("actual", [0, 40], ids=["nothing", "something"])
async def test_an_expired_hold_without_a_checkpoint_leaves_no_window_and_can_be_settled(
    bench: Bench, actual: int
) -> None:
    await bench.set_clock(NOON_MS)
    hold = await held(bench, "r", budget())
    await bench.set_clock(NOON_MS + 60_000)
    await bench.ledger.sweep()
    await bench.ledger.forget(["r"])
    assert await bench.keys() == {bench.key("hold:r"), bench.key("test-clock")}
    await bench.ledger.settle(Settlement("r", hold.windows, tokens(actual)))
    assert await bench.figures(hold.windows[0]) == (actual, 0)
    assert [balance.posted for balance in await bench.ledger.balances()] == [actual] * bool(actual)


async def test_a_checkpoint_that_a_late_settlement_takes_back_leaves_no_window(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    hold = await held(bench, "r", budget())
    await bench.ledger.extend("r", hold.windows, tokens(30), tokens(130))
    await bench.set_clock(NOON_MS + 60_000)
    await bench.ledger.sweep()
    await bench.ledger.settle(Settlement("r", hold.windows, NOTHING))
    assert await bench.keys() == {bench.key("hold:r"), bench.key("test-clock")}


async def test_a_hold_of_nothing_keeps_its_window_when_another_leaves_it(bench: Bench) -> None:
    small = await held(bench, "small", budget(), want=0)
    other = await held(bench, "other", budget())
    await bench.ledger.settle(Settlement("other", other.windows, NOTHING))
    assert (await bench.ledger.hold(ask("small", budget()))) == small
    await bench.ledger.extend("small", small.windows, NOTHING, tokens(50))
    assert await bench.figures(small.windows[0]) == (0, 50)
    await bench.ledger.settle(Settlement("small", small.windows, tokens(60)))
    assert await bench.figures(small.windows[0]) == (60, 0)


# Expiry ---------------------------------------------------------------------------------------------------------------


async def test_an_expired_hold_posts_its_checkpoint_and_is_an_orphan_until_forgotten(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    hold = await held(bench, "r", budget("a"), budget("u", unit=Unit.NANOUSD), note=b'{"a": "\xff \x00"}')
    await bench.ledger.extend("r", hold.windows, Amount(7, 30), Amount(20, 200))
    await bench.set_clock(NOON_MS + 59_999)
    assert await bench.ledger.sweep() == ()
    await bench.set_clock(NOON_MS + 60_000)
    orphans = (Orphan("r", Amount(7, 30), b'{"a": "\xff \x00"}'),)
    assert [await bench.ledger.sweep(), await bench.ledger.sweep()] == [orphans, orphans]
    assert [await bench.figures(window) for window in hold.windows] == [(30, 0), (7, 0)]
    await bench.ledger.forget(["r"])
    assert await bench.ledger.sweep() == ()
    with pytest.raises(LedgerUnavailable, match="already expired"):
        await bench.ledger.hold(ask("r", budget("a")))
    assert (await bench.ledger.extend("r", hold.windows, tokens(50), tokens(300))).gone


async def test_an_expired_hold_is_remembered_longer_than_a_settled_one(bench: Bench) -> None:
    """Its settlement may wait on a disk for days. Were the id forgotten, it would be posted next to the checkpoint."""
    await bench.set_clock(NOON_MS)
    await held(bench, "r", budget())
    await bench.set_clock(NOON_MS + 60_000)
    await bench.ledger.sweep()
    remembered_ms = await bench.store.pttl(bench.key("hold:r"))
    assert limits.SETTLED_RETENTION_S * 1_000 < remembered_ms <= limits.WINDOW_RETENTION_S * 1_000


async def test_a_hold_that_nothing_extended_posts_its_first_checkpoint(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    hold = await bench.ledger.hold(HoldAsk("r", (budget(),), tokens(100), tokens(1), used=Amount(7, 30)))
    assert isinstance(hold, Hold)
    await bench.set_clock(NOON_MS + 60_000)
    assert await bench.ledger.sweep() == (Orphan("r", Amount(7, 30), b""),)
    assert await bench.figures(hold.windows[0]) == (30, 0)


async def test_an_extension_keeps_a_hold_from_expiring(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    hold = await held(bench, "r", budget())
    await bench.set_clock(NOON_MS + 50_000)
    await bench.ledger.extend("r", hold.windows, NOTHING, NOTHING)
    await bench.set_clock(NOON_MS + 100_000)
    assert await bench.ledger.sweep() == ()
    assert await bench.figures(hold.windows[0]) == (0, 100)


@pytest.mark.parametrize("forgotten", [False, True], ids=["before-its-record", "after-its-record"])
@pytest.mark.parametrize("actual", [10, 30, 80], ids=["less", "equal", "more"])
async def test_a_late_settlement_takes_the_checkpoint_s_place(bench: Bench, actual: int, forgotten: bool) -> None:
    await bench.set_clock(NOON_MS)
    hold = await held(bench, "r", budget())
    await bench.ledger.extend("r", hold.windows, tokens(30), tokens(130))
    await bench.set_clock(NOON_MS + 60_000)
    await bench.ledger.sweep()
    if forgotten:
        await bench.ledger.forget(["r"])
    settlement = Settlement("r", hold.windows, tokens(actual))
    assert [await bench.ledger.settle(settlement), await bench.ledger.settle(settlement)] == [True, False]
    assert await bench.figures(hold.windows[0]) == (actual, 0)
    assert await bench.ledger.sweep() == ()


async def test_a_dead_processor_s_holds_refuse_nobody(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    limited = budget(limit=limits.SWEEP_BATCH)
    for number in range(limits.SWEEP_BATCH):
        await held(bench, f"dead{number}", limited, want=1)
    assert isinstance(await bench.ledger.hold(ask("refused", limited)), HoldRefusal)
    await bench.set_clock(NOON_MS + 60_000)
    assert (await held(bench, "alive", limited)).held == tokens(100)


async def test_a_sweep_takes_every_expired_hold_however_many(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    count = 2 * limits.SWEEP_BATCH + 1
    holds = await asyncio.gather(*(held(bench, f"r{number}", budget(limit=count), want=1) for number in range(count)))
    await bench.set_clock(NOON_MS + 60_000)
    orphans = await bench.ledger.sweep()
    assert {orphan.request_id for orphan in orphans} == {hold.request_id for hold in holds}
    await bench.ledger.forget(orphan.request_id for orphan in orphans)
    assert await bench.ledger.sweep() == ()


# Windows and clocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "off_ms", [-DAY_MS, -1, 0, DAY_MS], ids=["a-day-behind", "a-millisecond-behind", "right", "a-day-ahead"]
)
async def test_redis_s_clock_decides_the_window_whatever_the_processor_s_says(url: str, off_ms: int) -> None:
    midnight = NOON_MS + DAY_MS // 2
    async with opened(url, timeout_ms=5_000, wall_ms=lambda: midnight + off_ms) as bench:
        await bench.set_clock(midnight)
        for request_id in ("first", "second"):
            hold = await held(bench, request_id, budget(), budget(window=Window.MINUTE))
            assert hold.windows == tuple(window_at(window.budget, midnight) for window in hold.windows)
        windows = [key for key in await bench.keys() if ":window:" in key]
        assert len(windows) == 2


async def test_the_offset_is_remembered_after_one_correction(url: str) -> None:
    async with opened(url, timeout_ms=5_000, wall_ms=lambda: NOON_MS + DAY_MS) as bench:
        await bench.set_clock(NOON_MS)
        sent = spy_on_pipelines(bench.ledger)
        await held(bench, "first", budget())
        await held(bench, "second", budget())
        assert len(sent) == 3


async def test_a_hold_stays_in_its_window_when_the_window_turns(bench: Bench) -> None:
    midnight = NOON_MS + DAY_MS // 2
    await bench.set_clock(midnight - 1)
    old = await held(bench, "r", budget(limit=100))
    assert isinstance(await bench.ledger.hold(ask("refused", budget(limit=100))), HoldRefusal)
    await bench.set_clock(midnight)
    new = await held(bench, "s", budget(limit=100))
    assert (old.windows[0].end_ms, new.windows[0].start_ms) == (midnight, midnight)
    await bench.ledger.extend("r", old.windows, tokens(50), tokens(100))
    await bench.ledger.settle(Settlement("r", old.windows, tokens(60)))
    assert (await bench.figures(old.windows[0]), await bench.figures(new.windows[0])) == ((60, 0), (0, 100))


async def test_a_window_s_expiry_is_fixed_and_nothing_renews_it(bench: Bench) -> None:
    limited = budget(limit=100)
    window = window_at(limited, time.time_ns() // 10**6)
    key = bench.key(f"window:{limited.id}:{window.start_ms}")
    refused = await bench.ledger.hold(ask("refused", limited, want=300, least=200))
    assert isinstance(refused, HoldRefusal)
    assert await bench.store.exists(key) == 0
    hold = await held(bench, "r", limited)
    expected = window.end_ms + limits.WINDOW_RETENTION_S * 1_000
    assert await bench.store.pexpiretime(key) == expected
    assert isinstance(await bench.ledger.hold(ask("refused", limited)), HoldRefusal)
    await bench.ledger.extend("r", hold.windows, tokens(1), tokens(200))
    await bench.ledger.settle(Settlement("r", hold.windows, tokens(1)))
    await held(bench, "s", budget(limit=500))
    assert await bench.store.pexpiretime(key) == expected


async def test_a_total_never_expires(bench: Bench) -> None:
    total = budget(window=Window.TOTAL)
    await held(bench, "r", total)
    assert await bench.store.pttl(bench.key(f"window:{total.id}:0")) == -1


# Reports --------------------------------------------------------------------------------------------------------------


async def test_balances_are_every_window_or_those_open_at_a_time(bench: Bench) -> None:
    await bench.set_clock(NOON_MS)
    day, total = budget(tz="Europe/Zurich"), budget(window=Window.TOTAL, unit=Unit.NANOUSD, mode=Mode.SOFT)
    hold = await held(bench, "r", day, total)
    await bench.ledger.settle(Settlement("r", hold.windows, Amount(5, 30)))
    await bench.set_clock(NOON_MS + DAY_MS)
    await held(bench, "s", day)
    end_ms = hold.windows[0].end_ms
    old, new = Balance(day, 30, 0, end_ms), Balance(day, 0, 100, end_ms + DAY_MS)
    ever = Balance(total, 5, 0, 0)
    assert await bench.ledger.balances() == (old, new, ever)
    assert await bench.ledger.balances(NOON_MS) == (old, ever)
    assert await bench.ledger.balances(NOON_MS + DAY_MS) == (new, ever)


async def test_a_balance_shows_the_policy_s_newest_limit(bench: Bench) -> None:
    await held(bench, "r", budget(limit=500))
    await held(bench, "s", budget(limit=900))
    assert [(balance.budget.limit, balance.pending) for balance in await bench.ledger.balances()] == [(900, 200)]


async def test_a_factor_moves_smoothly_from_its_start_and_stays_in_bounds(bench: Bench) -> None:
    assert await bench.ledger.factors() == {}
    await bench.ledger.learn("claude", 1_000, 1_200, start=1.1)
    assert await bench.ledger.factors() == {"claude": 1.11}
    for _ in range(60):
        await bench.ledger.learn("claude", 1_000, 1_200)
        await bench.ledger.learn("high", 10, 10_000)
        await bench.ledger.learn("low", 10_000, 10)
    factors = await bench.ledger.factors()
    assert factors["claude"] == pytest.approx(1.2, abs=0.001)
    assert limits.MAX_FACTOR - 0.01 < factors["high"] <= limits.MAX_FACTOR
    assert limits.MIN_FACTOR <= factors["low"] < limits.MIN_FACTOR + 0.01
    with pytest.raises(LedgerUnavailable, match="nothing was counted"):
        await bench.ledger.learn("claude", 0, 10)


# The client -----------------------------------------------------------------------------------------------------------


def spy_on_pipelines(ledger: Ledger) -> list[int]:
    """The number of commands of each pipeline that is sent, scripts that are loaded included."""
    sizes: list[int] = []
    execute = ledger._backend.execute

    async def counted(commands: Any) -> list[Any]:
        sizes.append(len(commands))
        return await execute(commands)

    ledger._backend.execute = counted  # type: ignore[method-assign]
    return sizes


async def test_commands_of_one_turn_share_one_pipeline(bench: Bench) -> None:
    await bench.ledger.factors()
    sizes = spy_on_pipelines(bench.ledger)
    holds = await asyncio.gather(*(held(bench, f"r{number}", budget(limit=10_000)) for number in range(50)))
    assert sizes == [50]
    extended = [bench.ledger.extend(hold.request_id, hold.windows, tokens(1), tokens(2)) for hold in holds]
    settled = [bench.ledger.settle(Settlement(hold.request_id, hold.windows, tokens(1))) for hold in holds]
    assert not any(lease.gone for lease in await asyncio.gather(*extended))
    assert all(await asyncio.gather(*settled))
    assert sizes == [50, 100]


async def test_a_pipeline_is_bounded_and_the_rest_goes_in_the_next(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_PIPELINE", 4)
    monkeypatch.setattr(limits, "MAX_LEDGER_CONNECTIONS", 2)
    await bench.ledger.factors()
    sizes = spy_on_pipelines(bench.ledger)
    await asyncio.gather(*(held(bench, f"r{number}", budget(limit=10_000)) for number in range(18)))
    assert sizes == [4, 4, 4, 4, 2]


async def test_above_the_queue_s_bound_a_command_fails_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_LEDGER_QUEUE", 3)
    futures = [bench.ledger.hold(ask(f"r{number}", budget())) for number in range(4)]
    assert [future.done() for future in futures] == [False, False, False, True]
    with pytest.raises(LedgerUnavailable, match="too many"):
        await futures[3]
    assert all(isinstance(hold, Hold) for hold in await asyncio.gather(*futures[:3]))


async def test_a_hold_cancelled_in_its_turn_is_never_made(bench: Bench) -> None:
    bench.ledger.hold(ask("gone", budget())).cancel()
    hold = await held(bench, "r", budget())
    assert await bench.figures(hold.windows[0]) == (0, 100)


async def test_scripts_that_redis_forgot_are_loaded_again(bench: Bench) -> None:
    await held(bench, "r0", budget())
    await bench.store.script_flush()
    holds = await asyncio.gather(*(held(bench, f"r{number}", budget()) for number in range(1, 5)))
    assert await bench.figures(holds[0].windows[0]) == (0, 500)


async def test_closed_it_finishes_what_was_issued_and_takes_nothing_more(bench: Bench) -> None:
    issued = bench.ledger.hold(ask("r", budget()))
    await bench.ledger.close()
    assert isinstance(await issued, Hold)
    with pytest.raises(LedgerUnavailable, match="closed"):
        await bench.ledger.hold(ask("s", budget()))


@pytest.mark.parametrize("namespace", ["", "a}b", "{a"], ids=["empty", "closing", "opening"])
def test_a_namespace_that_would_break_the_hash_tag_is_refused(namespace: str) -> None:
    with pytest.raises(ValueError, match="namespace"):
        Ledger("redis://127.0.0.1:1", namespace=namespace)


# Faults ---------------------------------------------------------------------------------------------------------------


class LossyProxy:
    """A relay in front of the server that can lose the reply to what it has passed on.

    It closes the connection then, or, `silent`, keeps it open. `upstream` may change, for new connections.
    """

    def __init__(self, upstream: Path, path: Path) -> None:
        self.url = f"unix://{path}"
        self.upstream = upstream
        self.replies_to_lose = 0
        self.silent = False
        self.lost = 0
        self._path = path

    async def __aenter__(self) -> LossyProxy:
        self._server = await asyncio.start_unix_server(self._relay, self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_unix_connection(self.upstream)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, replies: bool) -> None:
            while data := await source.read(65_536):
                if replies and self.replies_to_lose:
                    self.replies_to_lose -= 1
                    self.lost += 1
                    if self.silent:
                        continue
                    break
                sink.write(data)
            up_writer.close()
            writer.close()

        await asyncio.gather(pump(reader, up_writer, False), pump(up_reader, writer, True))


@asynccontextmanager
async def behind_a_proxy(server: LocalValkey) -> AsyncIterator[tuple[Bench, LossyProxy]]:
    async with AsyncExitStack() as stack:
        path = server.data_dir / "lossy.sock"
        proxy = await stack.enter_async_context(LossyProxy(server.socket_path, path))
        yield await stack.enter_async_context(opened(proxy.url, timeout_ms=5_000)), proxy


async def test_a_reply_that_was_lost_is_asked_for_again_and_debited_once(server: LocalValkey) -> None:
    async with behind_a_proxy(server) as (bench, proxy):
        await bench.ledger.factors()
        proxy.replies_to_lose = 1
        hold = await held(bench, "r", budget())
        assert await bench.figures(hold.windows[0]) == (0, 100)
        proxy.replies_to_lose = 1
        lease = await bench.ledger.extend("r", hold.windows, tokens(50), tokens(150))
        assert lease.held == tokens(150)
        assert await bench.figures(hold.windows[0]) == (0, 150)
        proxy.replies_to_lose = 1
        assert await bench.ledger.settle(Settlement("r", hold.windows, tokens(60))) is False
        assert await bench.figures(hold.windows[0]) == (60, 0)
        assert proxy.lost == 3


async def test_a_reply_that_never_comes_is_asked_for_again_within_the_deadline(server: LocalValkey) -> None:
    async with behind_a_proxy(server) as (bench, proxy):
        bench.ledger._attempt_s = 0.3
        await bench.ledger.factors()
        proxy.silent = True
        proxy.replies_to_lose = 1
        hold = await held(bench, "r", budget())
        assert (proxy.lost, await bench.figures(hold.windows[0])) == (1, (0, 100))


async def test_a_failover_behind_one_address_is_followed(server: LocalValkey, tmp_path: Path) -> None:
    with LocalValkey(tmp_path / "promoted") as promoted, Redis.from_url(server.url) as demoted:
        async with behind_a_proxy(server) as (bench, proxy):
            await held(bench, "r", budget())
            demoted.replicaof("127.0.0.1", str(free_port()))
            proxy.upstream = promoted.socket_path
            await held(bench, "s", budget())
            with Redis.from_url(promoted.url) as store:
                assert store.exists(bench.key("hold:s"))


async def test_replies_that_stay_lost_are_an_outage(server: LocalValkey) -> None:
    async with behind_a_proxy(server) as (bench, proxy):
        await bench.ledger.factors()
        proxy.replies_to_lose = 100
        with pytest.raises(LedgerUnavailable):
            await bench.ledger.hold(ask("r", budget()))
        assert proxy.lost == limits.MAX_LEDGER_SENDS
        proxy.replies_to_lose = 0
        hold = await held(bench, "r", budget())
        assert await bench.figures(hold.windows[0]) == (0, 100)


async def test_a_killed_redis_is_an_outage_until_it_is_back(server: LocalValkey) -> None:
    async with opened(server.url, timeout_ms=5_000) as bench:
        # Several connections, so that several are stale afterwards.
        await asyncio.gather(*(held(bench, f"r{number}", budget(limit=10**6)) for number in range(1_500)))
        server.kill()
        for check in (bench.ledger.hold(ask("s", budget())), bench.ledger.check(), bench.ledger.sweep()):
            with pytest.raises(LedgerUnavailable) as outage:
                await check
            assert not isinstance(outage.value, LedgerRefused)
        server.start()
        hold = await held(bench, "s", budget())
        assert await bench.figures(hold.windows[0]) == (0, 100)
        late = Settlement("r0", hold.windows, tokens(40))
        assert [await bench.ledger.settle(late), await bench.ledger.settle(late)] == [True, False]
        assert await bench.figures(hold.windows[0]) == (40, 100)


async def test_a_redis_that_hangs_fails_every_command_by_its_deadline(server: LocalValkey) -> None:
    async with opened(server.url, timeout_ms=200) as bench:
        hold = await held(bench, "open", budget())
        os.kill(server.pid, signal.SIGSTOP)
        try:
            asked = [bench.ledger.hold(ask(f"r{number}", budget())) for number in range(2_000)]
            answers = await asyncio.gather(*asked, return_exceptions=True)
        finally:
            os.kill(server.pid, signal.SIGCONT)
        assert {str(answer) for answer in answers} == {"Redis did not answer in time"}
        bench.ledger._timeout_s = 5
        assert (await bench.ledger.extend("open", hold.windows, tokens(1), tokens(2))).held == tokens(100)


async def test_a_connection_whose_end_is_not_confirmed_holds_up_nothing(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over TLS, when the other end hangs: asyncio waits half a minute for it, connection after connection."""

    async def hang(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with opened(url, timeout_ms=400) as bench:
        await held(bench, "r", budget())
        with monkeypatch.context() as patch:
            patch.setattr(asyncio.StreamWriter, "wait_closed", hang)
            async with asyncio.timeout(5):
                await bench.ledger._backend.renew(bench.ledger._backend.generation)
                await bench.ledger.check()
                await bench.ledger.close()


async def test_a_replica_is_no_place_to_hold_until_it_is_promoted(server: LocalValkey) -> None:
    async with opened(server.url, timeout_ms=5_000) as bench:
        await held(bench, "r", budget())
        await bench.store.replicaof("127.0.0.1", free_port())
        with pytest.raises(LedgerUnavailable, match="ReadOnly") as replica:
            await bench.ledger.hold(ask("s", budget()))
        assert not isinstance(replica.value, LedgerRefused)
        await bench.store.replicaof("NO", "ONE")
        assert (await held(bench, "s", budget())).held == tokens(100)


async def test_without_memory_nothing_is_held_and_what_is_held_can_still_be_settled(server: LocalValkey) -> None:
    async with opened(server.url, timeout_ms=5_000) as bench:
        hold = await held(bench, "r", budget())
        await bench.store.config_set("maxmemory", 1)
        before = await bench.keys()
        with pytest.raises(LedgerUnavailable, match="OutOfMemory"):
            await bench.ledger.hold(ask("s", budget("other"), budget()))
        with pytest.raises(LedgerUnavailable, match="OutOfMemory"):
            await bench.ledger.extend("r", hold.windows, tokens(50), tokens(500))
        assert await bench.keys() == before
        assert await bench.figures(hold.windows[0]) == (0, 100)
        assert await bench.ledger.settle(Settlement("r", hold.windows, tokens(60)))
        assert await bench.ledger.sweep() == ()
        assert await bench.figures(hold.windows[0]) == (60, 0)


async def test_check_passes_on_a_redis_that_keeps_everything(bench: Bench) -> None:
    await bench.ledger.check()


async def test_check_refuses_a_redis_that_may_evict(server: LocalValkey) -> None:
    async with opened(server.url, timeout_ms=5_000) as bench:
        await bench.store.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(LedgerUnavailable, match="allkeys-lru, not noeviction"):
            await bench.ledger.check()


# The cluster ----------------------------------------------------------------------------------------------------------


async def test_a_slot_that_moves_to_another_node_is_followed(tmp_path: Path) -> None:
    with ExitStack() as stack:
        nodes = start_cluster(tmp_path, stack)
        clients = [stack.enter_context(Redis.from_url(node.url)) for node in nodes]
        async with opened(nodes[0].url.replace("redis://", "redis+cluster://"), timeout_ms=10_000) as bench:
            await bench.ledger.factors()
            slot = key_slot(bench.key("due").encode())
            source = slot * 3 // 16_384
            target = (source + 1) % 3
            target_id = clients[target].execute_command("CLUSTER MYID")
            for client in (clients[target], clients[source], clients[(source + 2) % 3]):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", target_id)
            hold = await held(bench, "r", budget())
            assert await bench.figures(hold.windows[0]) == (0, 100)
