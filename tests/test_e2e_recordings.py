"""Every recorded answer through a whole gateway: what the caller receives, and what is written down and posted for it.

What is expected is worked out here from the recordings, by other means than the gateway's: lines instead of its parser,
the collection's own figures instead of its reading of `usage`, genai-prices' own sum instead of its rates.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import ROUND_CEILING
from functools import cached_property
from pathlib import Path
from typing import Any

import genai_prices
import pytest
import pytest_asyncio

from extproc.local.provider import Script
from extproc.records import Outcome, UsageRecord, UsageSource
from tests.conformance import Conforms
from tests.recordings import Case, chat_cases
from tests.replays import ENVOYS_HEADERS, PASSED_HEADERS, Replays, Seen, recorded_headers, script, shredded
from tests.rig import CHAT_PATH, PROVIDER_KEY, Rig, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUDGETS = "  - {scope: global, window: total, limit_usd: 1000000}\n"
CEILING_INPUT, CEILING_OUTPUT = 10_000, 30_000  # nano-USD a token, by the rig's policy
SEARCH_NANOUSD = 10_000_000  # OpenAI's price: 10 USD for a thousand
SEARCHING = {"openai/chat-stream-gpt-4o-mini-search-preview-2025-03-01", "openrouter/chat-stream-deepseek-chat-01"}

CAPS = {"max_tokens", "max_completion_tokens"}

# The provider says 401 or 403 of the gateway's own key, which is no fault of the caller's.
REPLACED = {401: 502, 403: 502}


@dataclass(frozen=True)
class Replay:
    """One run of a case: cut by `seed`, or as recorded, for a caller that asks for usage or does not."""

    case: Case
    seed: int | None
    wants_usage: bool
    provider = "openai"
    path = CHAT_PATH

    @cached_property
    def request(self) -> dict[str, Any]:
        """The recorded request, made whole where the source lacks it or Azure has its model in the path.

        Without OpenRouter's `provider` and `plugins`, which the gateway refuses: its policy says where a call goes.
        """
        minimal = {"model": self.case.model, "messages": [{"role": "user", "content": "Say something."}]}
        request = {**minimal, "stream": self.case.stream, **(self.case.request or {})}
        request = {name: value for name, value in request.items() if name not in ("provider", "plugins")}
        request["messages"] = request["messages"] or minimal["messages"]
        if request["stream"]:
            request["stream_options"] = {**request.get("stream_options", {}), "include_usage": self.wants_usage}
        return request

    @property
    def script(self) -> Script:
        chunks = self.case.recorded_chunks() if self.seed is None else shredded(self.case.body, self.seed)
        return script(self.case, chunks, cut=self.seed is not None)


def runs(case: Case) -> list[Replay]:
    if case.stream:
        return [Replay(case, None, False), Replay(case, 1, True), Replay(case, 2, False)]
    return [Replay(case, None, False), Replay(case, 1, False)]


def named_runs(case: Case) -> dict[str, Replay]:
    return {f"{case.name}/{number}": run for number, run in enumerate(runs(case))}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    async with running(short_directory, budgets=BUDGETS) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replays(rig: Rig, request: pytest.FixtureRequest) -> AsyncIterator[Replays]:
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    selected = {name: run for call in calls if call for name, run in named_runs(call.params["case"]).items()}
    async with rig.client() as client:
        replays = Replays(rig, client, selected)
        yield replays
        await replays.cancel()


# What must come of it -------------------------------------------------------------------------------------------------


def blocks(body: bytes) -> list[bytes]:
    """The body's events, their blank lines included; last what follows the last blank line, perhaps nothing."""
    blocks = [b""]
    for line in body.splitlines(keepends=True):
        blocks[-1] += line
        if not line.strip(b"\r\n"):
            blocks.append(b"")
    return blocks


def only_usage(block: bytes) -> bool:
    match = re.match(rb"data: ?(\{.*\})\s*$", block)
    event = json.loads(match[1]) if match else {}
    return bool(event.get("usage")) and not event.get("choices") and "error" not in event


def expected_body(run: Replay) -> bytes:
    if not run.case.stream:
        return run.case.body
    *events, rest = blocks(run.case.body)
    closing = [event for event in [*events, rest] if only_usage(event)]
    assert len(closing) == ("usage-only-final-chunk" in run.case.features)
    hidden = () if run.wants_usage else closing
    seen = b"".join(event for event in [*events, rest] if event not in hidden)
    if run.case.complete or "error" in run.case.meta:
        return seen
    return seen.removesuffix(rest)


def price_nanousd(case: Case, record: UsageRecord) -> int:
    searched = SEARCH_NANOUSD if case.name in SEARCHING else 0
    usage = genai_prices.Usage(
        input_tokens=record.prompt_tokens,
        output_tokens=record.completion_tokens,
        cache_read_tokens=record.cached_prompt_tokens,
        input_audio_tokens=case.usage.get("audio_in", 0),
        output_audio_tokens=case.usage.get("audio_out", 0),
    )
    try:
        price = genai_prices.calc_price(usage, str(record.model), provider_id="openai")
    except LookupError:
        return record.prompt_tokens * CEILING_INPUT + record.completion_tokens * CEILING_OUTPUT + searched
    return int((price.total_price * 10**9).to_integral_value(ROUND_CEILING)) + searched


# The tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", chat_cases(), ids=lambda case: case.name)
async def test_a_recorded_answer(replays: Replays, conforms: Conforms, case: Case) -> None:
    with conforms(case, "native"):
        for name, run in named_runs(case).items():
            seen = await replays.of(name)
            check_request(run, seen)
            check_answer(run, seen)
            check_record(run, seen)


def check_request(run: Replay, seen: Seen) -> None:
    """The provider gets what the caller sent, but for a cap where the hold needs one, and usage always asked for."""
    sent = json.loads(seen.sent.body)
    if run.request["stream"]:
        assert sent.pop("stream_options") == {**run.request["stream_options"], "include_usage": True}
    assert {name: sent[name] for name in sent if name not in CAPS} == {
        name: value for name, value in run.request.items() if name not in {*CAPS, "stream_options"}
    }
    assert seen.sent.header("authorization") == f"Bearer {PROVIDER_KEY}"


def check_answer(run: Replay, seen: Seen) -> None:
    case = run.case
    assert seen.status == REPLACED.get(case.status, case.status)
    assert set(seen.headers) <= PASSED_HEADERS | ENVOYS_HEADERS
    if case.status in REPLACED:
        assert json.loads(seen.body)["error"]["type"] == "upstream_error"
        return
    assert seen.headers["content-type"] == recorded_headers(case)[0][1]
    expected = expected_body(run)
    if case.stream and not case.complete and "error" not in case.meta:
        assert seen.body.startswith(expected)
        error = seen.body.removeprefix(expected)
        assert json.loads(error.removeprefix(b"data: "))["error"]["message"]
    else:
        assert seen.body == expected


def attempts(case: Case) -> int:
    """Envoy tries once more where the provider failed, or asks for a short wait."""
    wait_s = dict(recorded_headers(case)).get("retry-after")
    return 2 if case.status >= 500 or wait_s in ("0", "1", "2") else 1


def check_record(run: Replay, seen: Seen) -> None:
    case, record = run.case, seen.record
    failed = "error" in case.meta or case.status != 200 or not case.complete
    assert record.outcome == (Outcome.UPSTREAM_ERROR if failed else Outcome.OK)
    assert (record.status, record.stream) == (seen.status, run.request["stream"])
    assert (record.requested_model, record.model) == (run.request["model"], run.request["model"])
    assert (record.provider, record.route, record.attempts) == ("openai", "*", attempts(case))
    tokens = (record.prompt_tokens, record.completion_tokens)
    if case.status != 200:
        assert (tokens, record.cost_nanousd) == ((0, 0), 0)
        return
    assert record.usage_source == (UsageSource.COUNTED if case.billed is None else UsageSource.PROVIDER)
    if case.billed is not None:
        assert tokens == case.billed
        assert record.cached_prompt_tokens == min(case.usage.get("cached", 0), record.prompt_tokens)  # xAI has more
        left_out = record.completion_tokens - case.usage["output"]  # Gemini's thoughts have no name of their own
        assert record.reasoning_tokens == max(case.usage.get("reasoning", 0), left_out)
    assert record.cost_nanousd == price_nanousd(case, record)


async def test_what_was_posted_is_what_the_rows_say(rig: Rig, replays: Replays) -> None:
    await replays.check_posted()
    assert len(rig.provider.received) == sum(record.attempts for record in rig.records())
