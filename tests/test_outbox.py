"""Rows of settled requests stay in Redis until a usage store has them: on one Valkey, and on three in a cluster."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import pytest

from extproc import limits
from extproc.errors import LedgerUnavailable
from extproc.instance import instance_of
from extproc.local.valkey import LocalValkey
from extproc.records import NOTHING, Settlement, UsageRecord
from extproc.usage.adopting import Adopter
from extproc.usage.journal import encode
from extproc.usage.outbox import Acknowledgements
from extproc.usage.sinks import UsageRow
from tests.clusters import start_cluster
from tests.rig import eventually
from tests.test_ledger import NOON_MS, Bench, budget, held, namespaces, opened, tokens
from tests.usage_rows import usage_record

DEAD_MS = 60_000

Open = Callable[[str], Awaitable[Bench]]


@pytest.fixture(scope="module", params=["valkey", "cluster"])
def url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("redis")
    with ExitStack() as stack:
        if request.param == "cluster":
            yield start_cluster(directory, stack)[0].url.replace("redis://", "redis+cluster://")
        else:
            yield stack.enter_context(LocalValkey(directory)).url


@pytest.fixture
async def instances(url: str) -> AsyncIterator[Open]:
    """Makes instances that share one namespace, and one clock, which stands at noon."""
    namespace = next(namespaces)
    async with AsyncExitStack() as stack:

        async def instance(name: str) -> Bench:
            opening = opened(url, namespace=namespace, instance=name, timeout_ms=5_000)
            bench = await stack.enter_async_context(opening)
            await bench.set_clock(NOON_MS)
            return bench

        yield instance


def row(request_id: str) -> str:
    return encode(UsageRow(usage_record(request_id))).decode()


async def settle(bench: Bench, *request_ids: str) -> None:
    for request_id in request_ids:
        hold = await held(bench, request_id, budget(limit=100_000))
        await bench.ledger.settle(Settlement(request_id, hold.windows, tokens(10), row(request_id)))


async def kept(bench: Bench) -> dict[str, str]:
    """What is in an instance's outbox."""
    found = await bench.store.hgetall(bench.ledger.outbox)
    return {key.decode().rpartition(":")[2]: value.decode() for key, value in found.items()}


# The ledger -----------------------------------------------------------------------------------------------------------


async def test_a_settled_request_s_row_is_kept_until_it_is_stored(instances: Open) -> None:
    a = await instances("a")
    await settle(a, "r", "s")
    assert await kept(a) == {"r": row("r"), "s": row("s")}
    assert await a.ledger.stored(["r", "never heard of"]) == 1
    assert await kept(a) == {"s": row("s")}
    assert await a.ledger.stored(["s"]) == 1
    assert await a.ledger.stored(["s"]) == 0
    assert await kept(a) == {}


async def test_more_rows_than_one_script_takes_are_dropped(instances: Open) -> None:
    a = await instances("a")
    many = [f"r{number}" for number in range(2 * limits.SWEEP_BATCH + 1)]
    await settle(a, *many)
    assert await a.ledger.stored(many) == len(many)
    assert await kept(a) == {}


async def test_a_repeated_settlement_puts_no_row_back(instances: Open) -> None:
    a = await instances("a")
    await settle(a, "r")
    await a.ledger.stored(["r"])
    assert not await a.ledger.settle(Settlement("r", (), tokens(10), row("r")))
    assert await kept(a) == {}


async def test_a_row_that_was_stored_before_its_settlement_is_not_kept(instances: Open) -> None:
    a = await instances("a")
    hold = await held(a, "r", budget())
    await a.ledger.stored(["r"])
    assert await a.ledger.settle(Settlement("r", hold.windows, tokens(10), row("r")))
    assert await kept(a) == {}
    assert await a.figures(hold.windows[0]) == (10, 0)


async def test_a_late_settlement_keeps_its_row_though_the_orphan_s_was_stored(
    instances: Open,
) -> None:
    a = await instances("a")
    hold = await held(a, "r", budget())
    await a.set_clock(NOON_MS + DEAD_MS)
    await a.ledger.sweep()
    await a.ledger.stored(["r"])
    assert await a.ledger.settle(Settlement("r", hold.windows, tokens(10), row("r")))
    assert await kept(a) == {"r": row("r")}


async def test_a_settlement_without_a_row_or_an_instance_keeps_nothing(instances: Open) -> None:
    a, nobody = await instances("a"), await instances("")
    await a.ledger.settle(Settlement("r", (), NOTHING))
    await settle(nobody, "s")
    assert await kept(a) == await kept(nobody) == {}


async def test_an_outbox_is_bounded_and_what_is_beyond_is_posted_all_the_same(
    instances: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_OUTBOX_ROWS", 2)
    a = await instances("a")
    await settle(a, "r", "s", "t")
    assert set(await kept(a)) == {"r", "s"}
    hold = await held(a, "u", budget(limit=100_000))
    assert await a.figures(hold.windows[0]) == (30, 100)


async def test_a_dead_instance_s_rows_wait_for_days_and_not_for_ever(instances: Open) -> None:
    a = await instances("a")
    await settle(a, "r")
    waits_ms = await a.store.pttl(a.ledger.outbox)
    assert 0 < waits_ms <= limits.OUTBOX_RETENTION_S * 1_000


async def test_a_dead_instance_s_outbox_is_one_adopter_s(instances: Open) -> None:
    a, b = await instances("a"), await instances("b")
    await a.ledger.adopt("in a")
    await settle(a, "r")
    assert await b.ledger.adopt("first") == ()
    await b.set_clock(NOON_MS + DEAD_MS - 1)
    assert await b.ledger.adopt("first") == ()
    await b.set_clock(NOON_MS + DEAD_MS)
    assert await b.ledger.adopt("first") == (a.ledger.outbox,)
    assert await b.ledger.adopt("second") == ()
    await b.set_clock(NOON_MS + DEAD_MS + 30_000)
    assert await b.ledger.adopt("first") == (a.ledger.outbox,)
    await b.set_clock(NOON_MS + 2 * DEAD_MS + 30_000)  # the first died too
    assert await b.ledger.adopt("second") == (a.ledger.outbox,)
    assert await b.ledger.adopt("first") == ()


async def test_an_instance_that_died_before_its_first_sign_of_life_is_adopted(
    instances: Open,
) -> None:
    a, b = await instances("a"), await instances("b")
    await settle(a, "r")
    await b.set_clock(NOON_MS + DEAD_MS)
    assert await b.ledger.adopt("b") == (a.ledger.outbox,)


async def test_one_that_comes_back_is_not_adopted_any_more(instances: Open) -> None:
    a, b = await instances("a"), await instances("b")
    await settle(a, "r")
    await b.set_clock(NOON_MS + DEAD_MS)
    assert await b.ledger.adopt("b") == (a.ledger.outbox,)
    await a.ledger.adopt("a")
    assert await b.ledger.adopt("b") == ()
    assert set(await kept(a)) == {"r"}


async def test_whoever_stores_a_dead_instance_s_row_drops_it_and_then_the_instance(
    instances: Open,
) -> None:
    a, b = await instances("a"), await instances("b")
    await settle(a, "r")
    await b.ledger.adopt("b")
    assert await b.ledger.stored(["r"]) == 0  # it lives, and has to store it itself
    await b.set_clock(NOON_MS + DEAD_MS)
    await b.ledger.adopt("b")
    assert await b.ledger.stored(["r"]) == 1
    assert await b.ledger.adopt("b") == ()
    assert await b.store.zrange(b.key("outboxes"), 0, -1) == [b.ledger.outbox.encode()]
    assert await b.store.hgetall(b.key("adopters")) == {}


async def test_rows_come_in_parts_until_the_end(instances: Open) -> None:
    a = await instances("a")
    many = {f"r{number}" for number in range(3 * limits.SWEEP_BATCH)}
    await settle(a, *many)
    found: list[bytes] = []
    cursor, rounds = 0, 0
    while rounds == 0 or cursor:
        cursor, rows = await a.ledger.rows(a.ledger.outbox, cursor)
        found.extend(rows)
        rounds += 1
    assert rounds > 1
    assert {line.decode() for line in found} == {row(one) for one in many}


# Adoption -------------------------------------------------------------------------------------------------------------


class Journal:
    """Remembers what was written, as long as it has room."""

    def __init__(self, room: int = 10_000) -> None:
        self.records: list[UsageRecord] = []
        self.left = room

    def write(self, record: UsageRecord) -> None:
        self.records.append(record)
        self.left -= 1

    @property
    def ids(self) -> list[str]:
        return sorted(record.request_id for record in self.records)


def adopter(bench: Bench, journal: Journal, name: str = "adopter") -> Adopter:
    return Adopter(bench.ledger, name, journal.write, lambda: journal.left > 0, interval_s=0.01)


async def test_a_dead_instance_s_rows_are_copied_once_and_stay_until_they_are_stored(
    instances: Open,
) -> None:
    a, b = await instances("a"), await instances("b")
    await settle(a, "r", "s")
    journal = Journal()
    adopting = adopter(b, journal)
    await adopting.adopt()
    assert journal.ids == []
    await b.set_clock(NOON_MS + DEAD_MS)
    await adopting.adopt()
    await adopting.adopt()
    assert journal.ids == ["r", "s"]
    assert journal.records[0] == usage_record(journal.records[0].request_id)
    assert set(await kept(a)) == {"r", "s"}


async def test_an_adopter_that_dies_is_followed_by_another(instances: Open) -> None:
    a, b = await instances("a"), await instances("b")
    await settle(a, "r")
    await b.set_clock(NOON_MS + DEAD_MS)
    first, second = Journal(), Journal()
    await adopter(b, first, "first").adopt()
    following = adopter(b, second, "second")
    await following.adopt()
    assert (first.ids, second.ids) == (["r"], [])
    await b.set_clock(NOON_MS + 2 * DEAD_MS)
    await following.adopt()
    assert second.ids == ["r"]


async def test_rows_that_find_no_room_stay_and_are_copied_later(instances: Open) -> None:
    a, b = await instances("a"), await instances("b")
    await settle(a, *(f"r{number:03}" for number in range(3 * limits.SWEEP_BATCH)))
    await b.set_clock(NOON_MS + DEAD_MS)
    journal = Journal(room=1)
    adopting = adopter(b, journal)
    await adopting.adopt()
    assert 0 < len(journal.records) < 3 * limits.SWEEP_BATCH
    journal.left = 10_000
    await adopting.adopt()
    assert sorted(set(journal.ids)) == [f"r{number:03}" for number in range(3 * limits.SWEEP_BATCH)]


async def test_a_worker_that_starts_again_copies_what_its_predecessor_only_settled(
    instances: Open,
) -> None:
    a = await instances("a")
    await settle(a, "r")
    journal = Journal()
    adopting = adopter(a, journal)
    await adopting.adopt()
    await settle(a, "s")  # of this process, which writes it itself
    await adopting.adopt()
    assert journal.ids == ["r"]


async def test_a_row_that_cannot_be_read_keeps_no_other(instances: Open, caplog: pytest.LogCaptureFixture) -> None:
    a = await instances("a")
    await a.ledger.settle(Settlement("bad", (), NOTHING, "nonsense"))
    await settle(a, "r")
    journal = Journal()
    await adopter(a, journal).adopt()
    assert journal.ids == ["r"]
    assert "cannot be read" in caplog.text


async def test_it_adopts_in_the_background_and_outlives_the_ledgers_failures(
    instances: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await instances("a"), await instances("b")
    await settle(a, "r")
    await b.set_clock(NOON_MS + DEAD_MS)
    adopt, failures = b.ledger.adopt, iter([LedgerUnavailable("down")] * 2)

    async def fails_first(name: str) -> object:
        if (failure := next(failures, None)) is not None:
            raise failure
        return await adopt(name)

    monkeypatch.setattr(b.ledger, "adopt", fails_first)
    journal = Journal()
    adopting = adopter(b, journal)
    adopting.start()
    await eventually(lambda: journal.ids == ["r"], "the adoption")
    await adopting.close()


# Acknowledgements -----------------------------------------------------------------------------------------------------


class Ledger:
    """Takes acknowledgements while it is up."""

    def __init__(self) -> None:
        self.up = True
        self.told: list[str] = []
        self.asked = threading.Event()
        self.closed = False

    async def stored(self, request_ids: Sequence[str]) -> int:
        self.asked.set()
        if not self.up:
            raise LedgerUnavailable("down")
        self.told.extend(request_ids)
        return len(request_ids)

    async def close(self) -> None:
        self.closed = True


def telling(ledger: Ledger) -> tuple[Acknowledgements, threading.Thread]:
    acknowledgements = Acknowledgements(lambda: ledger)
    return acknowledgements, threading.Thread(target=acknowledgements.run)


async def test_what_is_stored_is_told_in_order() -> None:
    ledger = Ledger()
    acknowledgements, thread = telling(ledger)
    thread.start()
    acknowledgements.stored(["a", "b"])
    await eventually(lambda: ledger.told == ["a", "b"], "the first")
    acknowledgements.stored(["c"])
    acknowledgements.end()
    thread.join()
    assert (ledger.told, ledger.closed) == (["a", "b", "c"], True)


def test_what_redis_does_not_take_is_told_again() -> None:
    ledger = Ledger()
    ledger.up = False
    acknowledgements, thread = telling(ledger)
    acknowledgements.stored(["a", "b"])
    thread.start()
    assert ledger.asked.wait(10)
    ledger.up = True
    acknowledgements.stored(["c"])
    acknowledgements.end()
    thread.join()
    assert ledger.told == ["a", "b", "c"]


def test_its_end_waits_for_no_ledger() -> None:
    ledger = Ledger()
    ledger.up = False
    acknowledgements, thread = telling(ledger)
    acknowledgements.stored(["a"])
    acknowledgements.end()
    thread.start()
    thread.join()
    assert (ledger.told, ledger.closed) == ([], True)


def test_only_the_latest_wait_where_redis_is_away_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.usage.outbox.MAX_OUTBOX_ROWS", 2)
    ledger = Ledger()
    acknowledgements, thread = telling(ledger)
    acknowledgements.stored(["a", "b", "c"])
    acknowledgements.end()
    thread.start()
    thread.join()
    assert ledger.told == ["b", "c"]


# The instance ---------------------------------------------------------------------------------------------------------


def test_an_instance_is_as_old_as_its_disk(tmp_path: Path) -> None:
    first = instance_of(tmp_path / "a")
    assert first
    assert instance_of(tmp_path / "a") == first
    assert instance_of(tmp_path / "b") != first


def test_processes_that_start_together_are_one_instance(tmp_path: Path) -> None:
    names: list[str] = []
    threads = [threading.Thread(target=lambda: names.append(instance_of(tmp_path))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(names) == 8
    assert len(set(names)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["instance"]
