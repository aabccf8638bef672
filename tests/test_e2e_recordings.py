"""Every recorded answer through a whole gateway: what the caller receives, and what is written down and posted for it.

What is expected is worked out here from the recordings, by other means than the gateway's: lines instead of its parser,
the collection's own figures instead of its reading of `usage`, genai-prices' own sum instead of its rates.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import ROUND_CEILING
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import genai_prices
import httpx
import pytest
import pytest_asyncio

from extproc.local.provider import Received, Script
from extproc.records import Outcome, UsageRecord, UsageSource
from tests.recordings import Case, chat_cases
from tests.rig import PROVIDER_KEY, Rig, running

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUDGETS = "  - {scope: global, window: total, limit_usd: 1000000}\n"
CEILING_INPUT, CEILING_OUTPUT = 10_000, 30_000  # nano-USD a token, by the rig's policy
SEARCH_NANOUSD = 10_000_000  # OpenAI's price: 10 USD for a thousand
SEARCHING = {"openai/chat-stream-gpt-4o-mini-search-preview-2025-03-01", "openrouter/chat-stream-deepseek-chat-01"}

CAPS = {"max_tokens", "max_completion_tokens"}

AT_ONCE = 8
PAUSE_S = 0.0005  # so that Envoy reads a chunk before the next one comes, and does not join them
PIECES = 40

# All that may reach a caller besides what Envoy itself says of the message.
PASSED_HEADERS = {"cache-control", "content-type", "date", "openai-processing-ms", "retry-after", "retry-after-ms"}
ENVOYS_HEADERS = {"content-length", "transfer-encoding", "x-request-id", "server"}

# The provider says 401 or 403 of the gateway's own key, which is no fault of the caller's.
REPLACED = {401: 502, 403: 502}


@dataclass(frozen=True)
class Replay:
    """One run of a case: cut by `seed`, or as recorded, for a caller that asks for usage or does not."""

    case: Case
    seed: int | None
    wants_usage: bool

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
        case = self.case
        chunks = case.recorded_chunks() if self.seed is None else shredded(case.body, self.seed)
        return Script(
            status=case.status,
            headers=recorded_headers(case),
            chunks=chunks,
            pause_s=0 if self.seed is None else PAUSE_S,
            whole=self.seed is None and not case.stream,
        )


@dataclass(frozen=True)
class Seen:
    """What came of a run, at all three ends of the gateway."""

    status: int
    headers: httpx.Headers
    body: bytes
    sent: Received
    record: UsageRecord


def runs(case: Case) -> list[Replay]:
    if case.stream:
        return [Replay(case, None, False), Replay(case, 1, True), Replay(case, 2, False)]
    return [Replay(case, None, False), Replay(case, 1, False)]


def shredded(body: bytes, seed: int) -> list[bytes]:
    """The body in runs of single bytes, with longer chunks between them; small bodies byte by byte."""
    random = Random(seed)
    longest = 2 * len(body) // PIECES
    chunks, at = [], 0
    while at < len(body):
        singles = min(random.randint(1, 8), len(body) - at) if len(body) > 200 else len(body)
        chunks += [body[i : i + 1] for i in range(at, at + singles)]
        at += singles
        size = random.randint(1, longest + 1)
        chunks += [body[at : at + size]] if at < len(body) else []
        at += size
    return chunks


def recorded_headers(case: Case) -> tuple[tuple[str, str], ...]:
    """As recorded, but for those of the transport. Three sources lack the content type, one gives a stream JSON's."""
    framing = {"content-length", "transfer-encoding", "content-encoding", "content-type"}
    headers = [(name, value) for name, value in case.meta["response_headers"].items() if name not in framing]
    kind = case.meta["content_type"] or "application/json"
    if case.stream and not kind.startswith("text/event-stream"):
        kind = "text/event-stream"
    return (("content-type", kind), *headers)


class Replays:
    """All runs of the cases that were selected, some at a time, while the tests wait for their own."""

    def __init__(self, rig: Rig, client: httpx.AsyncClient, selected: list[Case]) -> None:
        self._rig = rig
        self._client = client
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._scripts: dict[str, Script] = {}
        self._received: dict[str, Received] = {}
        self.request_ids: list[str] = []
        rig.answer(self._choose)
        self._tasks = {
            f"{case.name}/{number}": asyncio.create_task(self._replay(f"{case.name}/{number}", run))
            for case in selected
            for number, run in enumerate(runs(case))
        }

    async def of(self, case: Case) -> list[tuple[Replay, Seen]]:
        """What came of a case."""
        return [(run, await self._tasks[f"{case.name}/{number}"]) for number, run in enumerate(runs(case))]

    async def all_done(self) -> int:
        """Wait for all runs; how many there were."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        return len(self._tasks)

    async def cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _choose(self, received: Received) -> Script:
        name = (received.header("tracestate") or "").partition("=")[2]
        self._received[name] = received
        return self._scripts[name]

    async def _replay(self, name: str, run: Replay) -> Seen:
        async with self._slots:
            self._scripts[name] = run.script
            marked = {"tracestate": f"replay={name}"}  # one of the few headers that a provider gets
            request = self._client.build_request("POST", "/v1/chat/completions", json=run.request, headers=marked)
            response = await self._client.send(request, stream=True)
            self.request_ids.append(response.headers["x-request-id"])
            body = b"".join([chunk async for chunk in response.aiter_raw()])
            record = await self._rig.record(response.headers["x-request-id"])
            return Seen(response.status_code, response.headers, body, self._received[name], record)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    async with running(short_directory, budgets=BUDGETS) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replays(rig: Rig, request: pytest.FixtureRequest) -> AsyncIterator[Replays]:
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    selected = [call.params["case"] for call in calls if call is not None]
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
async def test_a_recorded_answer(rig: Rig, replays: Replays, case: Case) -> None:
    for run, seen in await replays.of(case):
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


def check_record(run: Replay, seen: Seen) -> None:
    case, record = run.case, seen.record
    failed = "error" in case.meta or case.status != 200 or not case.complete
    assert record.outcome == (Outcome.UPSTREAM_ERROR if failed else Outcome.OK)
    assert (record.status, record.stream) == (seen.status, run.request["stream"])
    assert (record.requested_model, record.model) == (run.request["model"], run.request["model"])
    assert (record.provider, record.route, record.attempts) == ("openai", "*", 1)
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
    count = await replays.all_done()
    balances = await rig.settled()
    records = rig.records()
    assert sum(balance.posted for balance in balances.values()) == sum(record.cost_nanousd for record in records)
    assert sorted(record.request_id for record in records) == sorted(replays.request_ids)
    assert len(replays.request_ids) == count == len(rig.provider.received)
