"""One provider fails and the next one answers, in whatever dialect the caller speaks: in a real Envoy, over two
processors, and with budgets.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from extproc.local.provider import Received, Script
from extproc.providers import PROVIDERS
from extproc.records import Outcome
from tests import voices
from tests.checker import Checker
from tests.rig import Rig, Told, key_of, running
from tests.voices import CALLERS, FINISHED, JSON, MODELS

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOMAIN = "test.iam.gserviceaccount.com"
WORDS = ("The", " next", " one", " answers", ".")
TEXT = "".join(WORDS)
BUSY = ("busy", "0")  # names in a race's team
FIT, RACERS = 10, 40

# USD for a million tokens, in and out: whose price it was shows in every row.
NANOUSD_PER_TOKEN = 1_000  # at one USD for a million tokens
PRICES = {"gpt-4o": (2, 10), "claude-sonnet-4-5": (3, 15), "gemini-2.5-flash": (1, 4)}


def policy(gpt: str = "openai/gpt-4o, anthropic/claude-sonnet-4-5") -> str:
    prices = "\n".join(
        f"  {model}: {{input_usd_per_mtok: {prompt}, output_usd_per_mtok: {completion}}}"
        for model, (prompt, completion) in PRICES.items()
    )
    return f"""\
identity:
  audiences: [https://tollgate.test]
  issuers: [https://accounts.google.com]
  allow: ["*@{DOMAIN}"]
  teams:
    wholes: [wholes-*@{DOMAIN}]
    streams: [streams-*@{DOMAIN}]
models:
  gpt: {{targets: [{gpt}]}}
  claude: {{targets: [anthropic/claude-sonnet-4-5, openai/gpt-4o]}}
  three: {{targets: [openai/gpt-4o, anthropic/claude-sonnet-4-5, gemini/gemini-2.5-flash]}}
  same: {{targets: [openai/gpt-4o, azure/gpt-4o]}}
  ejected: {{targets: [azure/gpt-4o, openai/gpt-4o]}}
  gpt-alone: {{targets: [openai/gpt-4o]}}
  claude-alone: {{targets: [anthropic/claude-sonnet-4-5]}}
  claude-dropping: {{targets: [anthropic/claude-sonnet-4-5], drop_unsupported: true}}
prices:
{prices}
budgets:
  - {{scope: service, id: "*", window: total, limit_usd: 5}}
  - {{scope: service, id: "*", window: total, limit_tokens: 200000}}
  - {{scope: team, id: wholes, window: total, limit_tokens: {FIT * 70}}}
  - {{scope: team, id: streams, window: total, limit_tokens: {FIT * 70}}}
"""


def tuned(config: dict[str, Any]) -> None:
    """Providers are left out in one chain only, and not for long; whole answers, too, must begin soon."""
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        if "per_try_timeout" in route.get("route", {}).get("retry_policy", {}):
            route["route"]["retry_policy"]["per_try_timeout"] = "2s"
    for cluster in config["static_resources"]["clusters"]:
        if cluster["name"] == "azure-if-well":
            cluster["outlier_detection"] |= {"interval": "0.2s", "base_ejection_time": "1s"}
        else:
            cluster.pop("outlier_detection", None)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    environment = {"TOLLGATE_FIRST_BYTE_TIMEOUT_MS": "2000"}
    names = ("openai", "anthropic", "gemini", "azure")
    async with running(
        short_directory, policy=policy(), processors=2, environment=environment, providers=names, tune=tuned
    ) as rig:
        for name in names:
            rig.answer(answering(name), name)
        yield rig


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def checked(rig: Rig, checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


# --- What is asked, and what is answered ------------------------------------------------------------------------------


def answering(provider: str, **how: Any) -> Callable[[Received], Script]:
    """Whole or streamed, as it is asked. Prompt and completion are the same figures for everybody."""

    def answer(request: Received) -> Script:
        if b'"stream":true' in request.body.replace(b": ", b":") or "stream" in request.target:
            return voices.streamed(provider, WORDS, PROMPT, COMPLETION, **how)
        return voices.whole(provider, TEXT, PROMPT, COMPLETION, **how)

    return answer


PROMPT, COMPLETION = 21, 17


def who(name: str) -> str:
    return f"{name}@{DOMAIN}".replace(" ", "-")


def local_part(name: str) -> bytes:
    return name.replace(" ", "-").encode()


async def ask(
    rig: Rig,
    dialect: str,
    email: str,
    model: str,
    *,
    stream: bool,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Told:
    caller = CALLERS[dialect]
    fields = caller.fields(f"From {email}: hello", stream) | {"model": model} | more
    return await rig.ask(email, path=caller.path, headers=headers, **fields)


WAYS = [(dialect, stream) for dialect in CALLERS for stream in (True, False)]


async def ask_every_way(rig: Rig, case: str, model: str, **more: Any) -> list[tuple[str, bool, str, Told]]:
    """In each dialect, streamed and whole, all at once: (dialect, stream, the caller, what it was told)."""
    callers = [who(f"{case}-{dialect}-{'stream' if stream else 'whole'}") for dialect, stream in WAYS]
    told = await asyncio.gather(
        *(
            ask(rig, dialect, name, model, stream=stream, **more)
            for (dialect, stream), name in zip(WAYS, callers, strict=True)
        )
    )
    return [(dialect, stream, name, one) for (dialect, stream), name, one in zip(WAYS, callers, told, strict=True)]


def seen_by(rig: Rig, provider: str, email: str) -> list[Received]:
    return [request for request in rig.providers[provider].received if email.encode() in request.body]


async def assert_answered(rig: Rig, dialect: str, stream: bool, email: str, told: Told, *, by: str, after: int) -> None:
    """The caller noticed nothing, and is billed what the provider that answered bills."""
    assert (told.status, told.broken) == (200, None), told.body
    heard = CALLERS[dialect].hear(told, stream)
    assert heard == voices.Heard(TEXT, PROMPT, COMPLETION, FINISHED[dialect])
    record = await rig.record(told.request_id)
    prompt_usd, completion_usd = PRICES[MODELS[by]]
    assert (record.outcome, record.status, record.attempts) == (Outcome.OK, 200, after + 1)
    assert (record.provider, record.model, record.service) == (by, MODELS[by], email)
    assert (record.prompt_tokens, record.completion_tokens) == (PROMPT, COMPLETION)
    assert record.cost_nanousd == (PROMPT * prompt_usd + COMPLETION * completion_usd) * NANOUSD_PER_TOKEN
    (request,) = seen_by(rig, by, email)
    assert_own_headers_only(by, request)


KEPT = {"host", "accept", "accept-encoding", "content-type", "content-length"}


def assert_own_headers_only(provider: str, request: Received) -> None:
    """Nothing of the caller's, of the gateway's or of another attempt's."""
    known = PROVIDERS[provider]
    own = dict((*known.auth_headers(key_of(provider)), *known.headers))
    headers = dict(request.headers)
    assert len(headers) == len(request.headers), "a header came twice"
    assert {name: headers.get(name) for name in own} == own
    assert headers.keys() - own.keys() <= KEPT
    assert int(headers["content-length"]) == len(request.body)
    assert b"tollgate" not in request.body


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


@pytest.mark.parametrize(
    ("model", "first", "second"), [("gpt", "openai", "anthropic"), ("claude", "anthropic", "openai")]
)
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

BEGUN = 4  # events, of which the last ones are text


def dying(provider: str, how: str) -> Callable[[Received], Script]:
    def answer(request: Received) -> Script:
        asked = answering(provider)(request)
        if asked.whole:  # half of it; a length that is announced and not reached
            half = asked.chunks[0][:-40]
            return Script(headers=JSON, chunks=[half], pause_s=0.1, fault="reset")
        begun = asked.chunks[:BEGUN]
        if how == "an error event":
            return Script(chunks=[*begun, voices.error_event(provider)], pause_s=0.02)
        return Script(chunks=begun, pause_s=0.1, fault="reset" if how == "a reset" else None)

    return answer


@pytest.mark.parametrize(
    ("model", "first", "second"), [("gpt", "openai", "anthropic"), ("claude", "anthropic", "openai")]
)
async def test_dying_after_the_first_byte(rig: Rig, model: str, first: str, second: str) -> None:
    """Nobody else is asked: the answer is the caller's. A reset looks as if the caller had left (docs/failures.md)."""
    rig.answer(answering(second), second)
    for how in ("an error event", "an end", "a reset"):
        rig.answer(dying(first, how), first)
        for dialect, stream, email, told in await ask_every_way(rig, f"dies-{model}-{how}", model):
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
