"""Many callers and one budget, over two processors; and a Valkey whose replies are late or lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from extproc.ledger import load_scripts
from extproc.records import Outcome
from tests.checker import LEASE_TOKENS, Checker
from tests.faultproxy import FaultProxy
from tests.rig import DONE, POLICY, Rig, Told, eventually, running, streamed, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOMAIN = "test.iam.gserviceaccount.com"
PROMPT = 9
CALLERS, FIT = 200, 20
WHOLE = 50  # output tokens of a whole answer, and its cap
LEAST = PROMPT + 1  # what a stream's hold must have
PRESSED = FIT * (PROMPT + 60) + PROMPT + 20  # the last answer does not fit whole

# Every caller of a race is a service of its own; what they share is their team's budget.
RACES = (
    POLICY.replace(
        "{search: [ranker@test.iam.gserviceaccount.com]}",
        f"""
    full: [full-*@{DOMAIN}]
    light: [light-*@{DOMAIN}]
    streams: [streams-*@{DOMAIN}]
    pressed: [pressed-*@{DOMAIN}]""",
    )
    + f"""\
  - {{scope: team, id: full, window: total, limit_tokens: {FIT * (PROMPT + WHOLE)}}}
  - {{scope: team, id: light, window: total, limit_tokens: {FIT * (PROMPT + WHOLE)}}}
  - {{scope: team, id: streams, window: total, limit_tokens: {FIT * (PROMPT + 60)}}}
  - {{scope: team, id: pressed, window: total, limit_tokens: {PRESSED}}}
  - {{scope: service, id: "lone-*@{DOMAIN}", window: total, limit_tokens: 1000}}
"""
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(short_directory: Path) -> AsyncIterator[FaultProxy]:
    proxy = await FaultProxy(short_directory / "proxy", short_directory / "valkey" / "valkey.sock").start()
    yield proxy
    await proxy.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path, proxy: FaultProxy) -> AsyncIterator[Rig]:
    # Longer than the default second: 200 callers on a busy machine must not be told that the ledger is away.
    environment = {"REDIS_URL": proxy.url, "TOLLGATE_LEDGER_TIMEOUT_MS": "2500"}
    async with running(short_directory, policy=RACES, processors=2, environment=environment) as rig:
        yield rig


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def checked(rig: Rig, checker: Checker, proxy: FaultProxy) -> AsyncIterator[None]:
    yield
    proxy.heal()
    await checker.check()
    await rig.ready()


async def race(rig: Rig, team: str, *, stream: bool) -> list[Told]:
    """All callers at once. Each is told the answer or a 429, and nothing else."""
    fields = {"stream": True} if stream else {"max_tokens": WHOLE}
    told = await asyncio.gather(*(rig.ask(f"{team}-{i}@{DOMAIN}", **fields) for i in range(CALLERS)))
    assert Counter(answer.status for answer in told).keys() == {200, 429}, Counter(answer.body for answer in told)
    for answer in told:
        assert answer.status == 200 or f"team/{team}/total/tokens" in (answer.error or {})["message"]
    return told


def admitted(told: list[Told]) -> int:
    return sum(answer.status == 200 for answer in told)


async def test_as_many_whole_answers_as_fit_are_admitted(rig: Rig) -> None:
    rig.answer(whole("word", prompt=PROMPT, completion=WHOLE))
    asked = len(rig.played)
    told = await race(rig, "full", stream=False)
    assert admitted(told) == FIT == len(rig.played) - asked
    assert (await rig.settled())["team/full/total/tokens"].posted == FIT * (PROMPT + WHOLE)

    # Both processors took part, so that it was Redis and not one of them that counted.
    journals = [list((processor.state_dir / "journal").glob("usage-*")) for processor in rig.processors]
    assert all(any(segment.stat().st_size for segment in journal) for journal in journals)


async def test_what_was_held_and_not_used_can_be_used(rig: Rig) -> None:
    used = PROMPT + 5
    rig.answer(whole("word", prompt=PROMPT, completion=5))
    told = await race(rig, "light", stream=False)
    assert admitted(told) >= FIT
    name = "team/light/total/tokens"
    posted = (await rig.settled())[name].posted
    assert posted == admitted(told) * used
    limit = FIT * (PROMPT + WHOLE)

    # Nobody is refused for what others once held: every call that fits is let through, and none that does not.
    while limit - posted >= PROMPT + WHOLE:
        assert (await rig.ask(f"light-more@{DOMAIN}", max_tokens=WHOLE)).status == 200
        posted += used
        await rig.settled()
    assert (await rig.ask(f"light-more@{DOMAIN}", max_tokens=WHOLE)).status == 429


async def test_streams_do_not_exceed_the_limit_by_more_than_a_lease_each(rig: Rig) -> None:
    name, limit = "team/streams/total/tokens", FIT * (PROMPT + 60)
    rig.answer(streamed(60, prompt=PROMPT, pause_s=0.005))
    told = await race(rig, "streams", stream=True)
    posted = (await rig.settled())[name].posted
    assert admitted(told) * LEAST <= posted <= limit + LEASE_TOKENS * admitted(told)

    left = limit - posted
    assert left > LEAST  # leases reach further than these answers
    assert (await rig.ask(f"streams-more@{DOMAIN}", max_tokens=left - PROMPT)).status == 200


async def test_streams_under_pressure_use_the_budget_up(rig: Rig) -> None:
    """Whoever is refused comes again, until nothing is left: refusals end when what was held is free again."""
    name, limit = "team/pressed/total/tokens", PRESSED
    rig.answer(streamed(60, prompt=PROMPT, pause_s=0.005))
    spent = asyncio.Event()

    async def come_until_admitted(who: str) -> Told | None:
        while not spent.is_set():
            if (told := await rig.ask(who, stream=True)).status == 200:
                return told
            await asyncio.sleep(0.1)
        return None

    async def used_up() -> bool:
        balance = (await rig.balances()).get(name)
        return balance is not None and balance.posted > limit - LEAST

    async def watch() -> None:
        await eventually(used_up, "the budget to be used up")
        spent.set()

    _, *results = await asyncio.gather(watch(), *(come_until_admitted(f"pressed-{i}@{DOMAIN}") for i in range(30)))
    answers = [told for told in results if told is not None]
    posted = (await rig.settled())[name].posted
    assert limit - LEAST < posted <= limit + LEASE_TOKENS * len(answers)
    assert any(told.broken for told in answers)


# Replies that are lost ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("operation", ["hold", "extend", "settle"])
async def test_a_reply_that_was_lost_changes_nothing(rig: Rig, proxy: FaultProxy, operation: str, times: int) -> None:
    """The script ran, and nobody heard of it: it is sent again, and debits once."""
    who = f"lone-{operation}{times}@{DOMAIN}"
    lost = proxy.lost
    proxy.lose(load_scripts()[operation].sha.encode(), times)
    rig.answer(streamed(250, prompt=PROMPT, pause_s=0.001))
    told = await rig.ask(who, stream=True)
    assert (told.status, told.broken, told.events[-1]) == (200, None, DONE)
    await rig.record(told.request_id)
    assert (await rig.settled())[f"service/{who}/total/tokens"].posted == PROMPT + 250
    await eventually(lambda: proxy.lost == lost + times, "as many replies to be lost")


async def test_a_hold_that_is_not_answered_in_time_is_refused_and_given_back(rig: Rig, proxy: FaultProxy) -> None:
    who = f"lone-late@{DOMAIN}"
    asked = len(rig.played)
    proxy.replies.clear()
    told = await rig.ask(who, stream=True)
    assert told.status == 503
    assert told.error is not None
    assert len(rig.played) == asked
    proxy.heal()
    assert (await rig.record(told.request_id)).outcome is Outcome.REFUSED
    balance = (await rig.settled()).get(f"service/{who}/total/tokens")
    assert balance is None or balance.posted == 0


async def test_a_slow_valkey_is_asked_ahead_of_need(rig: Rig, proxy: FaultProxy) -> None:
    """A stream asks for its next lease while one is still left, and so stands still for no reply."""
    who = f"lone-slow@{DOMAIN}"
    proxy.latency_s = 0.05
    rig.answer(streamed(400, prompt=PROMPT, pause_s=0.001))
    told = await rig.ask(who, stream=True)
    assert (told.status, told.broken, told.events[-1]) == (200, None, DONE)


async def test_connections_that_break_are_made_again(rig: Rig, proxy: FaultProxy) -> None:
    who = f"lone-cut@{DOMAIN}"
    rig.answer(streamed(400, prompt=PROMPT, pause_s=0.002))
    asking = asyncio.create_task(rig.ask(who, stream=True))
    while not asking.done():
        proxy.cut()
        await asyncio.sleep(0.1)
    told = await asking
    assert (told.status, told.broken, told.events[-1]) == (200, None, DONE)
    await rig.record(told.request_id)
    assert (await rig.settled())[f"service/{who}/total/tokens"].posted == PROMPT + 400
