"""Settlements reach the ledger once, however long it is away and whoever dies meanwhile."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from extproc.errors import LedgerRefused, LedgerUnavailable
from extproc.limits import MAX_NANOUSD, MAX_TOKENS
from extproc.records import Amount, Settlement
from extproc.settlements import SettlementLog
from extproc.settling import Settler
from tests.rig import eventually

A, B, C = (Settlement(name, (), Amount(number, number)) for number, name in enumerate("abc", 1))


class Ledger:
    """Takes settlements once by their id, while it is `up`. `hangs`: answers only when told to."""

    def __init__(self) -> None:
        self.up = True
        self.refuses: list[Settlement] = []
        self.posted: list[Settlement] = []
        self.asked = 0
        self.hanging: list[asyncio.Future[bool]] | None = None

    def settle(self, settlement: Settlement) -> asyncio.Future[bool]:
        self.asked += 1
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self.hanging is not None:
            self.hanging.append(future)
        elif self.up and settlement in self.refuses:
            future.set_exception(LedgerRefused("not a whole number"))
        elif self.up:
            new = settlement not in self.posted
            self.posted += [settlement] if new else []
            future.set_result(new)
        else:
            future.set_exception(LedgerUnavailable("down"))
        return future


@pytest.fixture
def log(tmp_path: Path) -> SettlementLog:
    return SettlementLog(tmp_path, clock=lambda: 1)


async def settled(settler: Settler, *settlements: Settlement) -> None:
    for settlement in settlements:
        settler.settle(settlement)
    await asyncio.sleep(0)  # the futures' callbacks


async def test_a_settlement_is_posted_at_once_and_not_kept(log: SettlementLog) -> None:
    ledger = Ledger()
    settler = Settler(ledger, log)
    await settled(settler, A)
    assert (ledger.posted, log.pending()) == ([A], ())
    await settler.close()


async def test_what_the_ledger_does_not_take_is_kept_and_posted_once_when_it_is_back(log: SettlementLog) -> None:
    ledger = Ledger()
    settler = Settler(ledger, log)
    ledger.up = False
    await settled(settler, A, B)
    assert log.pending() == (A, B)
    await settler.retry()
    assert ledger.asked == 3  # ends at the first that is not taken
    assert log.pending() == (A, B)
    ledger.up = True
    await settler.retry()
    assert (ledger.posted, log.pending()) == ([A, B], ())
    await settler.close()


async def test_one_that_the_ledger_refuses_stays_and_stops_no_other(
    log: SettlementLog, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger()
    settler = Settler(ledger, log)
    ledger.refuses = [A]
    for settlement in (A, B, C):
        log.add(settlement)
    await settler.retry()
    await settler.retry()
    assert (ledger.posted, log.pending()) == ([B, C], (A,))
    assert caplog.text.count("is refused") == 1
    ledger.refuses = []
    await settler.retry()
    assert (ledger.posted, log.pending()) == ([B, C, A], ())
    await settler.close()


@pytest.mark.parametrize("up", [True, False], ids=["at-once", "from-disk"])
@pytest.mark.parametrize(
    ("actual", "posted"),
    [
        (Amount(MAX_NANOUSD, MAX_TOKENS), Amount(MAX_NANOUSD, MAX_TOKENS)),
        (Amount(MAX_NANOUSD + 1, 5), Amount(MAX_NANOUSD, 5)),
        (Amount(5, 10**30), Amount(5, MAX_TOKENS)),
    ],
    ids=["the-most", "money", "tokens"],
)
async def test_more_than_can_be_counted_is_posted_as_the_most_that_can(
    log: SettlementLog, caplog: pytest.LogCaptureFixture, actual: Amount, posted: Amount, up: bool
) -> None:
    ledger = Ledger()
    ledger.up = up
    settler = Settler(ledger, log)
    await settled(settler, Settlement("r", (), actual))
    ledger.up = True
    await settler.retry()
    assert ledger.posted == [Settlement("r", (), posted)]
    assert ("more than can be counted" in caplog.text) is (actual != posted)
    await settler.close()


async def test_one_whose_answer_was_lost_changes_nothing_when_posted_again(log: SettlementLog) -> None:
    ledger = Ledger()
    settler = Settler(ledger, log)
    ledger.posted.append(A)
    log.add(A)
    await settler.retry()
    assert (ledger.posted, log.pending()) == ([A], ())
    await settler.close()


async def test_a_cancelled_settlement_is_kept(log: SettlementLog) -> None:
    ledger = Ledger()
    ledger.hanging = []
    settler = Settler(ledger, log)
    settler.settle(A)
    ledger.hanging[0].cancel()
    await asyncio.sleep(0)
    assert log.pending() == (A,)
    await settler.close()


async def test_it_tries_again_in_the_background(log: SettlementLog) -> None:
    ledger = Ledger()
    settler = Settler(ledger, log)
    log.add(A)
    log.add(B)
    settler.start()
    await eventually(lambda: not log.pending(), "the next try")
    assert ledger.posted == [A, B]
    await settler.close()


async def test_closing_waits_for_what_is_under_way_and_leaves_the_rest_to_the_next(
    log: SettlementLog, tmp_path: Path
) -> None:
    ledger = Ledger()
    ledger.hanging = []
    settler = Settler(ledger, log)
    for settlement in (A, B):
        settler.settle(settlement)
    closing = asyncio.create_task(settler.close())
    await asyncio.sleep(0)
    assert not closing.done()
    taken, refused = ledger.hanging
    taken.set_result(True)
    refused.set_exception(LedgerUnavailable("too late"))
    await closing
    following = SettlementLog(tmp_path, clock=lambda: 2)
    assert following.pending() == (B,)
    following.close()


async def test_closing_in_the_middle_of_a_retry_loses_nothing(log: SettlementLog, tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.hanging = []
    settler = Settler(ledger, log)
    log.add(C)
    settler.start()
    await eventually(lambda: ledger.hanging, "the next try")
    await settler.close()
    await asyncio.sleep(0)
    following = SettlementLog(tmp_path, clock=lambda: 2)
    assert following.pending() == (C,)
    following.close()
