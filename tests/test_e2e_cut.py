"""The cut of a stream that crosses its budget, in a real Envoy over a real Valkey. The checker runs after each case."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from extproc.local.provider import Received, Script
from extproc.records import Outcome, UsageSource
from tests.checker import Checker
from tests.rig import DONE, Rig, Told, delta, event, eventually, running, streamed, usage, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOMAIN = "test.iam.gserviceaccount.com"
PROMPT = 9  # "user" and "hi", the message's frame and the answer's

# Every test's caller has a name, and so balances, of its own; its first word chooses its budgets.
BUDGETS = f"""\
  - {{scope: service, id: "tokens-*@{DOMAIN}", window: total, limit_tokens: 300}}
  - {{scope: service, id: "usd-*@{DOMAIN}", window: total, limit_usd: 0.003}}
  - {{scope: service, id: "soft-*@{DOMAIN}", window: total, limit_tokens: 50, mode: soft}}
  - {{scope: service, id: "shadow-*@{DOMAIN}", window: total, limit_tokens: 50, mode: shadow}}
  - {{scope: service, id: "many-*@{DOMAIN}", window: total, limit_tokens: 900}}
  - {{scope: service, id: "many-*@{DOMAIN}", window: month, limit_usd: 0.003}}
  - {{scope: service, id: "many-*@{DOMAIN}", window: day, limit_tokens: 250}}
  - {{scope: service, id: "many-*@{DOMAIN}", window: day, limit_tokens: 10, mode: shadow}}
  - {{scope: service, id: "minute-*@{DOMAIN}", window: minute, limit_tokens: 300}}
"""

TOKENS_LEFT = 300 - PROMPT
USD_LEFT = 297  # 0.003 USD less 9 tokens at 2.50 USD, at 10 USD a million
PAUSE_S = 0.01  # 100 tokens a second, as models write
LEAD = 240  # words that come ten at a time, to get near the limits sooner


def words(count: int, text: str = " word") -> list[bytes]:
    return [delta(text) for _ in range(count)]


def paced(events: list[bytes], **options: Any) -> Script:
    """A stream at a model's pace."""
    lead = [b"".join(events[i : i + 10]) for i in range(0, min(LEAD, len(events)), 10)]
    return Script(chunks=[*lead, *events[LEAD:]], pause_s=PAUSE_S, **options)


def caller(name: str) -> str:
    return f"{name}@{DOMAIN}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    async with running(short_directory, budgets=BUDGETS) as rig:
        yield rig


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def checked(checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


@pytest_asyncio.fixture(scope="module", loop_scope="module", autouse=True)
async def spent_minute(rig: Rig) -> tuple[str, float]:
    """A caller that used its minute up, and when the minute ends: at the start, so that the others fill the wait."""
    if (left_s := 60 - time.time() % 60) < 5:
        await asyncio.sleep(left_s)
    who = caller("minute-turn")
    ends_s = (time.time() // 60 + 1) * 60
    rig.answer(paced(words(400)))
    assert_cut(await rig.ask(who, stream=True), f"service/{who}/minute/tokens", TOKENS_LEFT)
    refused = await rig.ask(who, stream=True)
    assert refused.status == 429
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert "it resets at" in refused_message(refused)
    return who, ends_s


def refused_message(told: Told) -> str:
    assert told.error is not None
    return str(told.error["message"])


def assert_cut(told: Told, budget_id: str, left: int) -> None:
    """The provider's first events, as many as were left, one error event that names the budget, and no clean end."""
    assert told.status == 200
    assert told.events[:-1] == words(left)
    assert told.error is not None
    assert told.error["type"] == told.error["code"] == "insufficient_quota"
    assert budget_id in told.error["message"]
    assert told.broken is not None


async def last_request(rig: Rig) -> Received:
    """What the provider was asked last, once it has noticed the end."""
    request, _ = rig.played[-1]
    await request.done.wait()
    return request


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
@pytest.mark.parametrize(("budget", "left"), [("tokens", TOKENS_LEFT), ("usd", USD_LEFT)])
async def test_a_stream_that_crosses_its_limit_is_cut(rig: Rig, budget: str, left: int, http2: bool) -> None:
    who = caller(f"{budget}-plain{http2:d}")
    script = paced(words(1000))
    rig.answer(script)
    told = await rig.ask(who, stream=True, http2=http2)

    assert_cut(told, f"service/{who}/total/{budget}", left)
    request = await last_request(rig)
    assert request.ended == "gone"
    events_sent = b"".join(script.chunks[: request.chunks_sent]).count(b"\n\n")
    assert events_sent - left < 20

    record = await rig.record(told.request_id)
    assert (record.outcome, record.usage_source) == (Outcome.CUT, UsageSource.COUNTED)
    assert record.budget_id == f"service/{who}/total/{budget}"
    assert left <= record.completion_tokens <= events_sent
    balance = (await rig.settled())[record.budget_id]
    one_lease = 100 if budget == "tokens" else 100 * 10_000
    assert abs(balance.posted - balance.budget.limit) < one_lease

    refused = await rig.ask(who, stream=True, http2=http2)
    assert refused.status == 429
    assert record.budget_id in refused_message(refused)
    assert "retry-after" not in refused.headers  # a total never resets
    assert rig.played[-1][0] is request


async def test_all_choices_together_are_counted(rig: Rig) -> None:
    who = caller("tokens-choices")
    rig.answer(paced([delta(" word", index=i % 3) for i in range(600)]))
    told = await rig.ask(who, stream=True, n=3)
    assert told.events[:-1] == [delta(" word", index=i % 3) for i in range(TOKENS_LEFT)]
    assert told.error is not None
    assert (await rig.record(told.request_id)).outcome is Outcome.CUT


def tool_delta(arguments: str, name: str | None = None) -> bytes:
    function = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
    call = {"index": 0, **({"id": "call_1", "type": "function"} if name else {}), "function": function}
    choice = {"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}
    return event({"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "gpt-4o", "choices": [choice]})


async def test_a_tool_calls_arguments_are_counted(rig: Rig) -> None:
    who = caller("tokens-tools")
    events = [tool_delta("", name="find"), *(tool_delta(" word") for _ in range(600))]
    rig.answer(paced(events))
    told = await rig.ask(who, stream=True)
    assert told.events[:-1] == events[:TOKENS_LEFT]  # the function's name is one token
    assert told.error is not None
    assert (await rig.record(told.request_id)).outcome is Outcome.CUT


async def test_of_several_budgets_the_tightest_cuts_and_is_named(rig: Rig) -> None:
    who = caller("many-all")
    rig.answer(paced(words(500)))
    told = await rig.ask(who, stream=True)
    assert_cut(told, f"service/{who}/day/tokens", 250 - PROMPT)
    record = await rig.record(told.request_id)
    posted = {name: balance.posted for name, balance in (await rig.settled()).items() if who in name}
    tokens = record.prompt_tokens + record.completion_tokens
    assert posted == {
        f"service/{who}/total/tokens": tokens,
        f"service/{who}/day/tokens": tokens,
        f"service/{who}/day/tokens/shadow": tokens,
        f"service/{who}/month/usd": record.cost_nanousd,
    }


@pytest.mark.parametrize("mode", ["soft", "shadow"])
async def test_soft_and_shadow_budgets_never_cut(rig: Rig, mode: str) -> None:
    who = caller(f"{mode}-all")
    script = streamed(80, prompt=PROMPT, pause_s=0.001)
    rig.answer(script)
    for over in (False, True):
        told = await rig.ask(who, stream=True)
        assert (told.status, told.broken, told.events[-1]) == (200, None, DONE)
        assert told.events == [chunk for chunk in script.chunks if chunk != usage(PROMPT, 80)]
        assert (told.headers.get("x-tollgate-budget") is not None) == (over and mode == "soft")
        await rig.record(told.request_id)
        await rig.settled()
    assert (await rig.balances())[f"service/{who}/total/tokens/{mode}"].posted == 2 * (80 + PROMPT)


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_provider_that_never_pauses_is_shown_up_to_the_limit(rig: Rig, checker: Checker, http2: bool) -> None:
    who = caller(f"tokens-fast{http2:d}")
    # What lies in the system's buffers when the provider's connection closes was emitted, and never arrived.
    checker.unseen[who] = 4_000
    rig.answer(Script(chunks=words(4_000)))
    told = await rig.ask(who, stream=True, http2=http2)
    assert_cut(told, f"service/{who}/total/tokens", TOKENS_LEFT)
    record = await rig.record(told.request_id)
    assert TOKENS_LEFT <= record.completion_tokens <= 4_000


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
async def test_a_provider_that_goes_silent_does_not_hold_the_cut_up(rig: Rig, http2: bool) -> None:
    who = caller(f"tokens-silent{http2:d}")
    rig.answer(paced(words(TOKENS_LEFT + 1), fault="hang"))
    told = await rig.ask(who, stream=True, http2=http2)
    assert_cut(told, f"service/{who}/total/tokens", TOKENS_LEFT)
    request = await last_request(rig)
    assert request.ended == "hang"
    assert (await rig.record(told.request_id)).completion_tokens == TOKENS_LEFT + 1


async def test_an_answer_that_ends_exactly_at_the_limit_is_whole(rig: Rig) -> None:
    who = caller("tokens-exact")
    rig.answer(streamed(TOKENS_LEFT, prompt=PROMPT))
    told = await rig.ask(who, stream=True)
    assert (told.broken, told.events[-1]) == (None, DONE)
    assert (await rig.record(told.request_id)).outcome is Outcome.OK
    assert (await rig.settled())[f"service/{who}/total/tokens"].posted == 300


async def test_a_whole_answer_that_could_cost_more_than_is_left_is_refused(rig: Rig) -> None:
    who = caller("tokens-whole")
    rig.answer(whole("word", prompt=PROMPT, completion=1))
    connections, asked = rig.provider.connections, len(rig.played)
    for cap in (None, TOKENS_LEFT + 1):
        told = await rig.ask(who, max_tokens=cap)
        assert told.status == 429
        assert f"service/{who}/total/tokens" in refused_message(told)
    assert (rig.provider.connections, len(rig.played)) == (connections, asked)

    assert (await rig.ask(who, max_tokens=TOKENS_LEFT)).status == 200
    assert len(rig.played) == asked + 1


async def test_a_stream_whose_thoughts_are_hidden_is_held_for_its_whole_cap(rig: Rig) -> None:
    who = caller("tokens-thinker")
    name = f"service/{who}/total/tokens"
    refused = await rig.ask(who, stream=True, model="o3-mini")  # may think 100,000 tokens
    assert refused.status == 429

    rig.answer(Script(chunks=[*words(5), delta("", finish="stop"), usage(PROMPT, 150), DONE], pause_s=0.05))
    asking = asyncio.create_task(rig.ask(who, stream=True, model="o3-mini", max_completion_tokens=200))

    async def held() -> bool:
        balance = (await rig.balances()).get(name)
        return balance is not None and balance.pending == PROMPT + 200

    await eventually(held, "the whole cap to be held")
    told = await asking
    assert (told.broken, told.events[-1]) == (None, DONE)
    request = await last_request(rig)
    assert json.loads(request.body)["max_completion_tokens"] == 200
    await rig.record(told.request_id)
    assert (await rig.settled())[name].posted == PROMPT + 150


async def test_a_spent_minute_is_over_when_it_turns(rig: Rig, spent_minute: tuple[str, float]) -> None:
    """The last of this file: what is left of the minute is waited for, on the real clock."""
    who, ends_s = spent_minute
    rig.answer(streamed(5, prompt=PROMPT))
    if time.time() < ends_s - 2:
        assert (await rig.ask(who, stream=True)).status == 429  # no refusal has renewed it, nor does this one
    await asyncio.sleep(max(0.0, ends_s - time.time()))

    async def admitted() -> bool:
        return (await rig.ask(who, stream=True)).status == 200

    await eventually(admitted, "the next minute")
    assert time.time() < ends_s + 60
