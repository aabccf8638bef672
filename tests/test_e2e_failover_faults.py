"""Chains whose headers wait for the first event, and processors that die under an attempt: in a real Envoy."""

from __future__ import annotations

import asyncio
import signal
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
from tests.checker import Checker
from tests.rig import Rig, Told, eventually, running
from tests.voices import CALLERS

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODELS = """\
  gpt: {targets: [openai/gpt-4o, anthropic/claude-sonnet-4-5]}
  claude: {targets: [anthropic/claude-sonnet-4-5, openai/gpt-4o]}
"""


def waiting(config: dict[str, Any]) -> None:
    """Every chain waits for the first event."""
    never_left_out(config)
    clusters = {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}
    for name in ("openai,anthropic", "anthropic,openai"):
        clusters[name]["typed_extension_protocol_options"] = clusters["waiting"]["typed_extension_protocol_options"]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    environment = {**IMPATIENT, "TOLLGATE_HOLD_TTL_MS": "2000"}
    names = ("openai", "anthropic")
    async with running(
        short_directory,
        policy=priced_policy(MODELS),
        processors=2,
        environment=environment,
        providers=names,
        tune=waiting,
    ) as rig:
        yield rig


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def checked(rig: Rig, checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


# --- The headers wait for the first event -----------------------------------------------------------------------------

FAULTS: dict[str, Callable[[str], Script]] = {
    "headers and a reset": lambda _: Script(chunks=[b": well\n\n"], pause_s=0.1, fault="reset"),
    "headers and silence": lambda _: Script(fault="hang"),
    "half an event and a reset": lambda provider: Script(
        chunks=[voices.streamed(provider, WORDS, 1, 1).chunks[0][:-9]], pause_s=0.1, fault="reset"
    ),
    "an error event": lambda provider: Script(chunks=[voices.error_event(provider)]),
    "half an error event": lambda provider: Script(
        chunks=[voices.error_event(provider)[:30], voices.error_event(provider)[30:]], pause_s=0.1
    ),
}


@pytest.mark.parametrize(("model", "first", "second"), PAIRS)
async def test_the_first_dies_before_its_first_event_and_the_second_answers(
    rig: Rig, model: str, first: str, second: str
) -> None:
    def fail(request: Received) -> Script:
        return next(fault(first) for name, fault in FAULTS.items() if local_part(f"{model}-{name}-") in request.body)

    rig.answer(fail, first)
    rig.answer(answering(second), second)
    callers = [(dialect, who(f"{model}-{name}-{dialect}")) for name in FAULTS for dialect in CALLERS]
    told = await asyncio.gather(*(ask(rig, dialect, email, model, stream=True) for dialect, email in callers))
    for (dialect, email), one in zip(callers, told, strict=True):
        await assert_answered(rig, dialect, True, email, one, by=second, after=1)
        (failed,) = seen_by(rig, first, email)
        assert_own_headers_only(first, failed)


@pytest.mark.parametrize(("model", "first", "second"), PAIRS)
async def test_what_fails_at_once_fails_over_as_elsewhere(rig: Rig, model: str, first: str, second: str) -> None:
    rig.answer(voices.failed(first, 529), first)
    rig.answer(answering(second), second)
    for dialect, stream, email, told in await ask_every_way(rig, f"529-{model}", model):
        await assert_answered(rig, dialect, stream, email, told, by=second, after=1)
    for provider in (first, second):
        rig.answer(answering(provider), provider)
    for dialect, stream, email, told in await ask_every_way(rig, f"well-{model}", model):
        await assert_answered(rig, dialect, stream, email, told, by=first, after=0)


@pytest.mark.parametrize(("model", "first", "second"), PAIRS)
async def test_dying_after_the_first_event(rig: Rig, model: str, first: str, second: str) -> None:
    """Nobody else is asked: the answer is the caller's."""
    rig.answer(dying(first), first)
    rig.answer(answering(second), second)
    callers = [(dialect, how, who(f"dies-{model}-{how}-{dialect}")) for how in ENDS for dialect in CALLERS]
    told = await asyncio.gather(*(ask(rig, dialect, email, model, stream=True) for dialect, _, email in callers))
    for (dialect, how, email), one in zip(callers, told, strict=True):
        assert one.status == 200
        assert not seen_by(rig, second, email)
        record = await rig.record(one.request_id)
        assert (record.attempts, record.provider) == (1, first)
        assert record.completion_tokens > 0
        assert record.outcome is (Outcome.CLIENT_GONE if how == "a reset" else Outcome.UPSTREAM_ERROR)
        assert (one.broken is not None) is (how == "a reset")
        if one.broken is None:
            with pytest.raises(CALLERS[dialect].error):
                CALLERS[dialect].hear(one, True)


async def test_all_begin_with_an_error(rig: Rig) -> None:
    """It is an answer's status by then, in the caller's own shape, and costs nothing."""
    for provider in ("openai", "anthropic"):
        rig.answer(Script(chunks=[voices.error_event(provider, f"Not by {provider}.")]), provider)
    for dialect in CALLERS:
        told = await ask(rig, dialect, who(f"all-begin-{dialect}"), "gpt", stream=True)
        assert told.status >= 500
        with pytest.raises(CALLERS[dialect].error, match="Not by anthropic"):
            CALLERS[dialect].hear(told, True)
        record = await rig.record(told.request_id)
        assert (record.outcome, record.attempts, record.provider) == (Outcome.UPSTREAM_ERROR, 2, "anthropic")
        assert record.cost_nanousd == 0


# --- A processor is killed --------------------------------------------------------------------------------------------

STREAMS = 8


async def test_a_processor_is_killed_under_attempts(rig: Rig) -> None:
    """Before the answers, and in their midst. What the other one serves alone goes on; the rest breaks."""
    rig.answer(voices.failed("openai", 500), "openai")
    slow = voices.streamed("anthropic", WORDS * 20, PROMPT, COMPLETION, pause_s=0.03)
    late = voices.streamed("anthropic", WORDS, PROMPT, COMPLETION, first_pause_s=1.5)
    rig.answer(lambda request: late if b"late-" in request.body else slow, "anthropic")
    callers = [
        (dialect, who(f"{kind}-{dialect}-{number}"))
        for kind in ("late", "slow")
        for dialect in CALLERS
        for number in range(STREAMS // 2)
    ]
    tasks = [asyncio.create_task(ask(rig, dialect, email, "gpt", stream=True)) for dialect, email in callers]
    await eventually(lambda: all(_is_under_way(rig, email) for _, email in callers), "all to be under way")
    victim = rig.processors[0]
    await victim.stop(signal.SIGKILL)
    told = await asyncio.gather(*tasks)
    await victim.start()
    await rig.ready()
    kept = 0
    for (dialect, email), one in zip(callers, told, strict=True):
        record = await rig.row_of(email)
        if _is_whole(dialect, one):
            kept += 1
            assert (record.outcome, record.provider, record.attempts) == (Outcome.OK, "anthropic", 2)
            assert (record.prompt_tokens, record.completion_tokens) == (PROMPT, COMPLETION)
        else:
            assert one.status == 503 or one.broken is not None
            assert record.outcome in (Outcome.UPSTREAM_ERROR, Outcome.CLIENT_GONE)
            # An expired hold's row was written before anybody was asked.
            assert record.attempts == (0 if record.status == 0 else 2)
    assert 0 < kept < len(callers)


def _is_under_way(rig: Rig, email: str) -> bool:
    """Its second attempt has been made; of a slow one, something has come."""
    return any(request.chunks_sent > 3 or b"late-" in request.body for request in seen_by(rig, "anthropic", email))


def _is_whole(dialect: str, told: Told) -> bool:
    if told.status != 200 or told.broken is not None:
        return False
    return CALLERS[dialect].hear(told, True).text in (TEXT, TEXT * 20)
