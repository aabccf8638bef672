"""Chains of providers end to end: what is asked in every dialect, what providers answer, and what must come of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from extproc.local.provider import Received, Script
from extproc.providers import PROVIDERS
from extproc.records import Outcome
from tests import voices
from tests.rig import Rig, Told, key_of
from tests.voices import CALLERS, FINISHED, JSON, MODELS

DOMAIN = "test.iam.gserviceaccount.com"
WORDS = ("The", " next", " one", " answers", ".")
TEXT = "".join(WORDS)
PROMPT, COMPLETION = 21, 17
FIRST_BYTE_S = 3
PAIRS = [("gpt", "openai", "anthropic"), ("claude", "anthropic", "openai")]

# USD for a million tokens, in and out: whose price it was shows in every row.
NANOUSD_PER_TOKEN = 1_000  # at one USD for a million tokens
PRICES = {"gpt-4o": (2, 10), "claude-sonnet-4-5": (3, 15), "gemini-2.5-flash": (1, 4)}


def priced_policy(models: str, budgets: str = "", teams: str = "{}") -> str:
    """Chains under budgets of tokens and money, with a price for every model."""
    prices = "\n".join(
        f"  {model}: {{input_usd_per_mtok: {prompt}, output_usd_per_mtok: {completion}}}"
        for model, (prompt, completion) in PRICES.items()
    )
    return f"""\
identity:
  audiences: [https://tollgate.test]
  issuers: [https://accounts.google.com]
  allow: ["*@{DOMAIN}"]
  teams: {teams}
models:
{models}
prices:
{prices}
budgets:
  - {{scope: service, id: "*", window: total, limit_usd: 5}}
  - {{scope: service, id: "*", window: total, limit_tokens: 200000}}
{budgets}"""


def never_left_out(config: dict[str, Any]) -> None:
    """Whole answers, too, must begin soon; and a provider that keeps failing is asked all the same."""
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    for route in manager["route_config"]["virtual_hosts"][0]["routes"]:
        if "per_try_timeout" in route.get("route", {}).get("retry_policy", {}):
            route["route"]["retry_policy"]["per_try_timeout"] = f"{FIRST_BYTE_S}s"
    for cluster in config["static_resources"]["clusters"]:
        cluster.pop("outlier_detection", None)


IMPATIENT = {"TOLLGATE_FIRST_BYTE_TIMEOUT_MS": str(FIRST_BYTE_S * 1000)}


def answering(provider: str, **how: Any) -> Callable[[Received], Script]:
    """Whole or streamed, as it is asked. Prompt and completion are the same figures for everybody."""

    def answer(request: Received) -> Script:
        if b'"stream":true' in request.body.replace(b": ", b":") or "stream" in request.target:
            return voices.streamed(provider, WORDS, PROMPT, COMPLETION, **how)
        return voices.whole(provider, TEXT, PROMPT, COMPLETION, **how)

    return answer


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


BEGUN = 4  # events, of which the last ones are text


ENDS = ("an error event", "an end", "a reset")


def dying(provider: str) -> Callable[[Received], Script]:
    def answer(request: Received) -> Script:
        asked = answering(provider)(request)
        if asked.whole:
            return Script(headers=JSON, chunks=[asked.chunks[0][:-40]], pause_s=0.1, fault="reset")
        begun = asked.chunks[:BEGUN]
        if local_part("an error event-") in request.body:
            return Script(chunks=[*begun, voices.error_event(provider)], pause_s=0.02)
        return Script(chunks=begun, pause_s=0.1, fault="reset" if local_part("a reset-") in request.body else None)

    return answer
