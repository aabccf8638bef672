"""Recorded answers through a whole gateway, many at once: providers that replay them, and callers that ask for them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

import httpx

from extproc.local.provider import Received, Script
from extproc.records import UsageRecord
from tests.recordings import Case
from tests.rig import Rig

AT_ONCE = 8
PAUSE_S = 0.0005  # so that Envoy reads a chunk before the next one comes, and does not join them
PIECES = 40
_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # its state goes on with it alone

# All that may reach a caller besides what Envoy itself says of the message.
PASSED_HEADERS = {
    *("cache-control", "content-type", "date", "openai-processing-ms", "retry-after", "retry-after-ms"),
    *("server-timing", "x-should-retry"),
}
ENVOYS_HEADERS = {"content-length", "transfer-encoding", "x-request-id", "server"}


class Run(Protocol):
    """One call: what a caller asks, of which provider, and what that answers."""

    @property
    def provider(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def request(self) -> Mapping[str, Any]: ...
    @property
    def script(self) -> Script: ...


@dataclass(frozen=True)
class Seen:
    """What came of a run, at all three ends of the gateway."""

    status: int
    headers: httpx.Headers
    body: bytes
    sent: Received
    record: UsageRecord


def shredded(body: bytes, seed: int, pieces: int = PIECES) -> list[bytes]:
    """The body in runs of single bytes, with longer chunks between them; small bodies byte by byte."""
    random = Random(seed)
    longest = 2 * len(body) // pieces
    chunks, at = [], 0
    while at < len(body):
        singles = min(random.randint(1, 8), len(body) - at) if len(body) > 200 else len(body)
        chunks += [body[i : i + 1] for i in range(at, at + singles)]
        at += singles
        size = random.randint(1, longest + 1)
        chunks += [body[at : at + size]] if at < len(body) else []
        at += size
    return chunks


def is_array(case: Case) -> bool:
    """Whether a stream was recorded as one JSON array."""
    return case.stream and case.status == 200 and case.body.lstrip().startswith(b"[")


def recorded_headers(case: Case) -> tuple[tuple[str, str], ...]:
    """As recorded, but for those of the transport. Some sources lack the content type, or give a stream JSON's."""
    framing = {"content-length", "transfer-encoding", "content-encoding", "content-type"}
    headers = [(name, value) for name, value in case.meta["response_headers"].items() if name not in framing]
    kind = case.meta["content_type"] or "application/json"
    if case.stream and not is_array(case) and not kind.startswith("text/event-stream"):
        kind = "text/event-stream"
    return (("content-type", kind), *headers)


def script(case: Case, chunks: Sequence[bytes], *, cut: bool) -> Script:
    """A case's answer. `cut`: the chunks come one after the other, and not at once."""
    return Script(
        status=case.status,
        headers=recorded_headers(case),
        chunks=chunks,
        pause_s=PAUSE_S if cut else 0,
        whole=not cut and not case.stream,
    )


class Replays:
    """All runs that were selected, by name, some at a time, while the tests wait for their own."""

    def __init__(self, rig: Rig, client: httpx.AsyncClient, runs: Mapping[str, Run]) -> None:
        self._rig = rig
        self._client = client
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._scripts: dict[str, Script] = {}
        self._received: dict[str, Received] = {}
        self._reading = asyncio.Lock()
        self._records: dict[str, UsageRecord] = {}
        self.request_ids: list[str] = []
        for provider in rig.providers:
            rig.answer(self._choose, provider=provider)
        self._tasks = {name: asyncio.create_task(self._replay(name, run)) for name, run in runs.items()}

    async def of(self, name: str) -> Seen:
        """What came of a run."""
        return await self._tasks[name]

    async def all_done(self) -> int:
        """Wait for all runs; how many there were."""
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        return len(self._tasks)

    async def check_posted(self) -> None:
        """Once all is done: each run has one row, and what was posted is what the rows say."""
        count = await self.all_done()
        balances = await self._rig.settled()
        records = self._rig.records()
        assert sum(balance.posted for balance in balances.values()) == sum(record.cost_nanousd for record in records)
        assert sorted(record.request_id for record in records) == sorted(self.request_ids)
        assert len(self.request_ids) == count

    async def cancel(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _choose(self, received: Received) -> Script:
        name = (received.header("tracestate") or "").partition("=")[2]
        self._received[name] = received
        return self._scripts[name]

    async def _replay(self, name: str, run: Run) -> Seen:
        async with self._slots:
            self._scripts[name] = run.script
            # One of the few headers that a provider gets says which run it is.
            headers = {"traceparent": _TRACE, "tracestate": f"replay={name}", "x-llm-provider": run.provider}
            request = self._client.build_request("POST", run.path, json=run.request, headers=headers)
            response = await self._client.send(request, stream=True)
            self.request_ids.append(response.headers["x-request-id"])
            body = b"".join([chunk async for chunk in response.aiter_raw()])
            record = await self._record(response.headers["x-request-id"])
            return Seen(response.status_code, response.headers, body, self._received[name], record)

    async def _record(self, request_id: str) -> UsageRecord:
        """One at a time reads them for all."""
        async with self._reading:
            if request_id not in self._records:
                await self._rig.record(request_id)
                self._records = {record.request_id: record for record in self._rig.records()}
        return self._records[request_id]
