"""One provider fails and the next one answers, in whatever dialect the caller speaks: in a real Envoy, over two
processors, and with budgets.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from extproc.local.provider import Received, Script
from extproc.records import Outcome
from tests import voices
from tests.chains import (
    COMPLETION,
    DOMAIN,
    ENDS,
    IMPATIENT,
    PAIRS,
    PROMPT,
    TEXT,
    WORDS,
    answering,
    ask,
    ask_every_way,
    assert_answered,
    assert_own_headers_only,
    dying,
    local_part,
    never_left_out,
    priced_policy,
    seen_by,
    who,
)
from tests.checker import LEASE_TOKENS, Checker
from tests.rig import Rig, Told, eventually, running
from tests.voices import CALLERS, JSON

pytestmark = pytest.mark.asyncio(loop_scope="module")

LIMIT, RACERS = 700, 40  # tokens of a budget that many callers share


def policy(gpt: str = "openai/gpt-4o, anthropic/claude-sonnet-4-5") -> str:
    return priced_policy(
        teams=f"{{wholes: ['wholes-*@{DOMAIN}'], streams: ['streams-*@{DOMAIN}']}}",
        models=f"""\
  gpt: {{targets: [{gpt}]}}
  claude: {{targets: [anthropic/claude-sonnet-4-5, openai/gpt-4o]}}
  three: {{targets: [openai/gpt-4o, anthropic/claude-sonnet-4-5, gemini/gemini-2.5-flash]}}
  same: {{targets: [openai/gpt-4o, azure/gpt-4o]}}
  ejected: {{targets: [azure/gpt-4o, openai/gpt-4o]}}
  gpt-alone: {{targets: [openai/gpt-4o]}}
  claude-alone: {{targets: [anthropic/claude-sonnet-4-5]}}
  claude-dropping: {{targets: [anthropic/claude-sonnet-4-5], drop_unsupported: true}}
""",
        budgets=f"""\
  - {{scope: team, id: wholes, window: total, limit_tokens: {LIMIT}}}
  - {{scope: team, id: streams, window: total, limit_tokens: {LIMIT}}}
""",
    )


def tuned(config: dict[str, Any]) -> None:
    """Providers are left out in one chain only, and not for long."""
    azure = next(one for one in config["static_resources"]["clusters"] if one["name"] == "azure-if-well")
    failing = azure["outlier_detection"] | {"interval": "0.2s", "base_ejection_time": "1s"}
    never_left_out(config)
    azure["outlier_detection"] = failing


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    names = ("openai", "anthropic", "gemini", "azure")
    async with running(
        short_directory, policy=policy(), processors=2, environment=IMPATIENT, providers=names, tune=tuned
    ) as rig:
        for name in names:
            rig.answer(answering(name), name)
        yield rig


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def checked(rig: Rig, checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


# --- Before the first byte --------------------------------------------------------------------------------------------


FAULTS: dict[str, Callable[[str], Script]] = {
    "500": lambda provider: voices.failed(provider, 500),
    "bills and says 503": lambda provider: Script(
        status=503, headers=JSON, chunks=voices.whole(provider, TEXT, 900, 900).chunks, whole=True
    ),
    "429": lambda provider: voices.failed(provider, 429, retry_after="30"),
    "529": lambda provider: voices.failed(provider, 529),
    "resets": lambda _: Script(fault="drop"),
    "is silent": lambda _: Script(first_pause_s=30),
}


@pytest.mark.parametrize(("model", "first", "second"), PAIRS)
async def test_the_first_fails_and_the_second_answers(rig: Rig, model: str, first: str, second: str) -> None:
    def fail(request: Received) -> Script:
        return next(fault(first) for name, fault in FAULTS.items() if local_part(f"{model}-{name}-") in request.body)

    rig.answer(fail, first)
    rig.answer(answering(second), second)
    for case in await asyncio.gather(*(ask_every_way(rig, f"{model}-{name}", model) for name in FAULTS)):
        for dialect, stream, email, told in case:
            await assert_answered(rig, dialect, stream, email, told, by=second, after=1)
            (failed,) = seen_by(rig, first, email)
            assert_own_headers_only(first, failed)
    async with rig.down(first):
        for dialect, stream, email, told in await ask_every_way(rig, f"{model}-refuses", model):
            await assert_answered(rig, dialect, stream, email, told, by=second, after=1)
            assert not seen_by(rig, first, email)


async def test_the_third_answers(rig: Rig) -> None:
    rig.answer(voices.failed("openai", 500), "openai")
    rig.answer(voices.failed("anthropic", 529), "anthropic")
    rig.answer(answering("gemini"), "gemini")
    for dialect, stream, email, told in await ask_every_way(rig, "third", "three"):
        await assert_answered(rig, dialect, stream, email, told, by="gemini", after=2)
        for provider in ("openai", "anthropic"):
            (failed,) = seen_by(rig, provider, email)
            assert_own_headers_only(provider, failed)


async def test_a_chain_of_one_dialect(rig: Rig) -> None:
    rig.answer(voices.failed("openai", 500), "openai")
    rig.answer(answering("azure"), "azure")
    for dialect, stream, email, told in await ask_every_way(rig, "same", "same"):
        await assert_answered(rig, dialect, stream, email, told, by="azure", after=1)


LAST = [
    ("gpt", ("openai", "anthropic")),
    ("claude", ("anthropic", "openai")),
    ("three", ("openai", "anthropic", "gemini")),
]


@pytest.mark.parametrize(("model", "chain"), LAST, ids=[model for model, _ in LAST])
async def test_all_fail(rig: Rig, model: str, chain: tuple[str, ...]) -> None:
    """The caller gets the last one's own error, in its own shape; nothing is billed."""
    *others, last = chain
    for provider in others:
        rig.answer(voices.failed(provider, 500, "Not by the first."), provider)
    rig.answer(voices.failed(last, 429, "Not by the last.", retry_after="7"), last)
    for dialect, stream, email, told in await ask_every_way(rig, f"all-fail-{model}", model):
        assert (told.status, told.headers["retry-after"]) == (429, "7")
        with pytest.raises(CALLERS[dialect].error, match="Not by the last") as raised:
            CALLERS[dialect].hear(told, stream)
        assert type(raised.value).__name__ == "RateLimitError"
        record = await rig.record(told.request_id)
        assert (record.outcome, record.status, record.attempts) == (Outcome.UPSTREAM_ERROR, 429, len(chain))
        assert (record.provider, record.cost_nanousd, record.completion_tokens) == (last, 0, 0)
        assert all(len(seen_by(rig, provider, email)) == 1 for provider in chain)


# --- After the first byte ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "first", "second"), PAIRS)
async def test_dying_after_the_first_byte(rig: Rig, model: str, first: str, second: str) -> None:
    """Nobody else is asked: the answer is the caller's. A reset looks as if the caller had left (docs/failures.md)."""
    rig.answer(dying(first), first)
    rig.answer(answering(second), second)
    cases = await asyncio.gather(*(ask_every_way(rig, f"dies-{model}-{how}", model) for how in ENDS))
    for how, case in zip(ENDS, cases, strict=True):
        for dialect, stream, email, told in case:
            assert told.status == 200
            assert not seen_by(rig, second, email)
            record = await rig.record(told.request_id)
            assert (record.attempts, record.provider) == (1, first)
            assert record.prompt_tokens > 0
            assert record.completion_tokens > 0
            if not stream or how == "a reset":
                assert told.broken is not None
                assert record.outcome is Outcome.CLIENT_GONE
                continue
            assert told.broken is None
            assert record.outcome is Outcome.UPSTREAM_ERROR
            assert TEXT.startswith(text_of(told) or "nothing")
            with pytest.raises(CALLERS[dialect].error):
                CALLERS[dialect].hear(told, stream)


def text_of(told: Told) -> str:
    said = []
    for line in told.body.splitlines():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            said += [choice["delta"].get("content") or "" for choice in event.get("choices") or ()]
            said += [event["delta"].get("text", "")] if event.get("type") == "content_block_delta" else []
    return "".join(said)


async def test_headers_and_then_a_reset(rig: Rig) -> None:
    """The headers have gone on by then; a chain that waits for the first event asks the next provider instead."""

    def die(request: Received) -> Script:
        if answering("openai")(request).whole:
            return Script(headers=JSON, chunks=[b" "], pause_s=0.1, fault="reset")
        return Script(chunks=[b": well\n\n"], pause_s=0.1, fault="reset")

    rig.answer(die, "openai")
    for _, _, email, told in await ask_every_way(rig, "headers-only", "gpt"):
        assert told.broken is not None or told.status >= 500
        assert not seen_by(rig, "anthropic", email)
        record = await rig.record(told.request_id)
        assert record.outcome is not Outcome.OK
        assert (record.attempts, record.provider) == (1, "openai")


# --- Which targets are asked -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "first", "second"), PAIRS)
async def test_the_caller_may_force_one(rig: Rig, model: str, first: str, second: str) -> None:
    for provider in (first, second):
        rig.answer(answering(provider), provider)
    headers = {"x-llm-provider": second}
    for dialect, stream, email, told in await ask_every_way(rig, f"forced-{model}", model, headers=headers):
        await assert_answered(rig, dialect, stream, email, told, by=second, after=0)
        assert not seen_by(rig, first, email)


async def test_a_target_that_cannot_is_left_out(rig: Rig) -> None:
    rig.answer(voices.failed("openai", 500), "openai")
    rig.answer(answering("gemini"), "gemini")
    for stream in (True, False):
        email = who(f"seeded-{stream:d}")
        told = await ask(rig, "openai", email, "three", stream=stream, seed=7)
        await assert_answered(rig, "openai", stream, email, told, by="gemini", after=1)
        assert not seen_by(rig, "anthropic", email)
        (request,) = seen_by(rig, "gemini", email)
        assert json.loads(request.body)["generationConfig"]["seed"] == 7


CANNOT = [("openai", "claude-alone", "seed", 7), ("anthropic", "gpt-alone", "top_k", 5)]


@pytest.mark.parametrize(("dialect", "model", "field", "value"), CANNOT, ids=[dialect for dialect, *_ in CANNOT])
async def test_what_no_target_can_is_refused(rig: Rig, dialect: str, model: str, field: str, value: int) -> None:
    asked = len(rig.played)
    more: Any = {field: value}
    for stream in (True, False):
        told = await ask(rig, dialect, who(f"cannot-{field}"), model, stream=stream, **more)
        with pytest.raises(CALLERS[dialect].error, match=f"'{field}' is not supported") as raised:
            CALLERS[dialect].hear(told, stream)
        assert type(raised.value).__name__ == "BadRequestError"
        assert (await rig.record(told.request_id)).outcome is Outcome.REFUSED
    assert len(rig.played) == asked


async def test_what_no_target_can_is_dropped_where_the_policy_says_so(rig: Rig) -> None:
    rig.answer(answering("anthropic"), "anthropic")
    for stream in (True, False):
        email = who(f"dropped-{stream:d}")
        told = await ask(rig, "openai", email, "claude-dropping", stream=stream, seed=7)
        await assert_answered(rig, "openai", stream, email, told, by="anthropic", after=0)
        assert b"seed" not in seen_by(rig, "anthropic", email)[0].body


async def test_a_reload_redirects_a_model(rig: Rig) -> None:
    """For the next request on; a stream that is under way goes on where it is."""
    rig.answer(voices.streamed("openai", WORDS * 25, PROMPT, COMPLETION, pause_s=0.02), "openai")
    rig.answer(answering("anthropic"), "anthropic")
    email = who("under-way")
    under_way = asyncio.create_task(ask(rig, "openai", email, "gpt", stream=True))
    await eventually(lambda: any(request.chunks_sent > 3 for request in seen_by(rig, "openai", email)), "the stream")
    await rig.set_policy(policy("anthropic/claude-sonnet-4-5, openai/gpt-4o"))
    for dialect, stream, name, told in await ask_every_way(rig, "redirected", "gpt"):
        await assert_answered(rig, dialect, stream, name, told, by="anthropic", after=0)
    told = await under_way
    assert CALLERS["openai"].hear(told, True).text == TEXT * 25
    assert (await rig.record(told.request_id)).provider == "openai"
    await rig.set_policy(policy())


async def test_one_that_keeps_failing_is_left_out_for_a_while(rig: Rig) -> None:
    """Who answered is in the record, and not who should have."""
    rig.answer(voices.failed("azure", 500), "azure")
    rig.answer(answering("openai"), "openai")
    for number in range(6):
        email = who(f"ejected-{number}")
        told = await ask(rig, "openai", email, "ejected", stream=True)
        await assert_answered(rig, "openai", True, email, told, by="openai", after=int(number < 5))
        assert len(seen_by(rig, "azure", email)) == (number < 5)
    rig.answer(answering("azure"), "azure")

    async def is_back() -> bool:
        told = await ask(rig, "openai", who("recovered"), "ejected", stream=True)
        return (await rig.record(told.request_id)).provider == "azure"

    await eventually(is_back, "the first to be asked again")
    assert len(seen_by(rig, "azure", who("recovered"))) == 1


# --- Money, and processors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["streams", "wholes"])
async def test_a_race_for_a_budget_over_a_provider_that_fails(rig: Rig, stream: bool) -> None:
    """Whoever is let through is answered by the second, and together they do not overrun what is left."""
    team = "streams" if stream else "wholes"
    rig.answer(voices.failed("openai", 500), "openai")
    rig.answer(answering("anthropic"), "anthropic")
    callers = [(dialect, who(f"{team}-{dialect}-{number}")) for dialect in CALLERS for number in range(RACERS // 2)]
    told = await asyncio.gather(*(ask(rig, dialect, name, "gpt", stream=stream) for dialect, name in callers))
    statuses = Counter(one.status for one in told)
    assert statuses.keys() == {200, 429}
    for (dialect, name), one in zip(callers, told, strict=True):
        if one.status == 200 and b"insufficient_quota" not in one.body:  # some streams are cut
            await assert_answered(rig, dialect, stream, name, one, by="anthropic", after=1)
    posted = (await rig.settled())[f"team/{team}/total/tokens"].posted
    assert LIMIT / 4 < posted <= LIMIT + (LEASE_TOKENS * statuses[200] if stream else 0)


async def test_both_processors_served(rig: Rig) -> None:
    """An attempt goes to whichever has less to do: often not where the gate of its call is."""
    clusters = await rig.admin("/clusters")
    figures = (line.split("::") for line in clusters.splitlines() if line.startswith("extproc::"))
    totals = [int(figure[-1]) for figure in figures if figure[-2] == "rq_total"]
    assert len(totals) == len(rig.processors)
    assert min(totals) > sum(totals) / 4


async def test_no_body_crosses_to_the_target_where_nothing_is_translated(rig: Rig) -> None:
    """Nor does an answer: counted by what Envoy sends to the targets of each chain."""
    for provider in ("openai", "anthropic"):
        rig.answer(answering(provider), provider)

    async def crossed(model: str, dialect: str, chain: str) -> int:
        name = f"cluster.{chain}.ext_proc.stream_msgs_sent"
        before = int((await rig.admin(f"/stats?filter={name}")).split()[-1])
        told = await ask(rig, dialect, who(f"crossing-{model}-{dialect}"), model, stream=True)
        assert told.status == 200
        return int((await rig.admin(f"/stats?filter={name}")).split()[-1]) - before

    assert await crossed("gpt", "openai", "openai,anthropic") == 1  # the request's headers
    assert await crossed("claude", "anthropic", "anthropic,openai") == 1
    assert await crossed("gpt", "anthropic", "openai,anthropic") > 3  # and both bodies
