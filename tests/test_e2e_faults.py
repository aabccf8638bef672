"""Valkey, the processor and Envoy killed, stopped and restarted, each in every phase of a request."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from redis import Redis

from extproc.ledger import load_scripts
from extproc.limits import MIB
from extproc.local.provider import Received, Script
from extproc.records import Outcome
from tests.checker import LEASE_TOKENS, Checker
from tests.faultproxy import FaultProxy
from tests.rig import DONE, PROVIDER_KEY, Processor, Rig, Told, eventually, running, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOMAIN = "test.iam.gserviceaccount.com"
PROMPT = 9
PAUSE_S = 0.005
HOLD_TTL_MS = 1_200  # how long a dead processor's holds stay
WAIT_S = 20.0  # for what must end by itself, within bounds that are much shorter

BUDGETS = """\
  - {scope: service, id: "*", window: total, limit_tokens: 200000}
  - {scope: service, id: "*", window: total, limit_usd: 50}
"""
ENVIRONMENT = {
    "TOLLGATE_HOLD_TTL_MS": str(HOLD_TTL_MS),
    "TOLLGATE_LEDGER_TIMEOUT_MS": "1000",
    "TOLLGATE_ADMISSION_TIMEOUT_MS": "2000",
    "TOLLGATE_DRAIN_TIMEOUT_S": "3",
}


def impatient(config: dict[str, Any]) -> None:
    """Shorten how long Envoy waits for a hung processor. It stays longer than the processor's own deadlines."""
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    gate = next(part for part in manager["http_filters"] if part["name"] == "gate")
    gate["typed_config"]["message_timeout"] = "2.5s"
    extproc = next(cluster for cluster in config["static_resources"]["clusters"] if cluster["name"] == "extproc")
    options = extproc["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"]
    pings = options["explicit_http_config"]["http2_protocol_options"]["connection_keepalive"]
    pings.update(interval="0.5s", timeout="2s")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def proxy(short_directory: Path) -> AsyncIterator[FaultProxy]:
    proxy = await FaultProxy(short_directory / "proxy", short_directory / "valkey" / "valkey.sock").start()
    yield proxy
    await proxy.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path, proxy: FaultProxy) -> AsyncIterator[Rig]:
    environment = ENVIRONMENT | {"REDIS_URL": proxy.url}
    async with running(short_directory, budgets=BUDGETS, environment=environment, tune=impatient) as rig:
        yield rig


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def checked(rig: Rig, checker: Checker, proxy: FaultProxy) -> AsyncIterator[None]:
    """Everything is up again before the checker looks, and works."""
    yield
    proxy.heal()
    await rig.ready()
    await checker.check()
    unprocessed = [
        request
        for request in rig.provider.received
        if request.header("authorization") != f"Bearer {PROVIDER_KEY}" or request.header("x-tollgate-internal-route")
    ]
    assert not unprocessed


@pytest.fixture
def processor(rig: Rig) -> Processor:
    return rig.processors[0]


def caller(name: str) -> str:
    return f"{name}@{DOMAIN}"


@asynccontextmanager
async def asking(rig: Rig, who: str, **fields: Any) -> AsyncIterator[asyncio.Task[Told]]:
    """A call under way, which must have come to some end by itself."""
    task = asyncio.create_task(rig.ask(who, **{"stream": True, **fields}))
    try:
        yield task
        await asyncio.wait_for(asyncio.gather(task, return_exceptions=True), WAIT_S)
    finally:
        task.cancel()


async def asked(rig: Rig, who: str, chunks: int = 0, task: asyncio.Task[Told] | None = None) -> Received:
    """What the provider was asked by this caller, once it has sent so many chunks. `task` is not to end before that."""
    found: list[Received] = []

    def there() -> bool:
        assert task is None or not task.done(), task.result()
        found[:] = [request for request, _ in rig.played if json.loads(request.body)["user"] == who]
        return bool(found) and found[0].chunks_sent >= chunks

    await eventually(there, f"{who} to reach the provider")
    return found[0]


def said(told: Told) -> int:
    return told.body.count(b" word")


def assert_broken(told: Told) -> None:
    """The stream has begun, and did not end as if it were whole."""
    assert told.status == 200
    assert told.broken is not None or told.error is not None
    assert DONE not in told.events


# Valkey ---------------------------------------------------------------------------------------------------------------


def valkeys(rig: Rig) -> Redis:
    """Past the proxy."""
    return Redis(unix_socket_path=str(rig.valkey.socket_path), decode_responses=True, socket_timeout=5)


def open_hold(rig: Rig) -> dict[str, str]:
    """The one open hold that there is, or nothing."""
    with valkeys(rig) as redis:
        holds = (redis.hgetall(key) for key in redis.scan_iter(match="*:hold:*", count=10_000))
        return next((hold for hold in holds if hold.get("state") == "open"), {})


async def test_valkey_is_killed_before_the_hold(rig: Rig) -> None:
    connections, before = rig.provider.connections, len(rig.played)
    rig.valkey.kill()
    try:
        for number in range(3):  # the first finds out; the others may be told at once
            told = await asyncio.wait_for(rig.ask(caller(f"redis-down-{number}"), stream=number % 2 == 0), WAIT_S)
            assert told.status == 503
            assert told.error is not None
            assert told.error["code"] == "service_unavailable"
            assert (await rig.record(told.request_id)).outcome is Outcome.REFUSED
    finally:
        rig.valkey.start()
    assert (rig.provider.connections, len(rig.played)) == (connections, before)


@pytest.mark.parametrize("processor_dies_too", [False, True], ids=["alone", "and then the processor"])
async def test_valkey_is_killed_mid_stream(rig: Rig, processor: Processor, processor_dies_too: bool) -> None:
    who = caller(f"redis-dies-{processor_dies_too:d}")
    rig.answer(streamed(1_000, prompt=PROMPT, pause_s=PAUSE_S))
    async with asking(rig, who) as task:
        await asked(rig, who, chunks=110, task=task)
        await eventually(lambda: int(open_hold(rig)["tokens"]) > PROMPT + 200, "the first extension")
        held = int(open_hold(rig)["tokens"])
        rig.valkey.kill()
        try:
            told = await asyncio.wait_for(task, WAIT_S)
            assert_broken(told)
            assert told.error is not None
            assert told.error["code"] == "service_unavailable"
            assert said(told) == held - PROMPT  # what was granted is used up, and no more
            assert (await asked(rig, who)).ended in ("", "gone")

            journal = processor.state_dir / "settlements"
            await eventually(
                lambda: any(told.request_id in path.read_text() for path in journal.glob("*.jsonl")), "the settlement"
            )
            if processor_dies_too:
                await processor.stop(signal.SIGKILL)
                await processor.start()
        finally:
            rig.valkey.start()
    await rig.ready()
    record = await rig.record(told.request_id)
    assert record.outcome is Outcome.CUT or not processor_dies_too
    assert said(told) <= record.completion_tokens <= said(told) + LEASE_TOKENS

    async def replayed() -> bool:  # over what the hold's expiry may have posted in the meantime
        return await rig.posted_tokens(who) == PROMPT + record.completion_tokens

    await eventually(replayed, "the journaled settlement to be posted")


async def test_valkey_hangs(rig: Rig, processor: Processor) -> None:
    assert processor.process is not None
    memory_before, before = resident_bytes(processor.process.pid), len(rig.played)
    at_once = asyncio.Semaphore(60)

    async def ask(number: int) -> Told:
        async with at_once:
            return await rig.ask(caller(f"redis-hangs-{number % 10}"), stream=True)

    os.kill(rig.valkey.pid, signal.SIGSTOP)
    try:
        told = await asyncio.wait_for(asyncio.gather(*(ask(number) for number in range(300))), 3 * WAIT_S)
    finally:
        os.kill(rig.valkey.pid, signal.SIGCONT)
    assert {answer.status for answer in told} == {503}
    assert len(rig.played) == before
    assert resident_bytes(processor.process.pid) - memory_before < 32 * MIB
    await rig.ready()
    rig.answer(streamed(3, prompt=PROMPT))
    assert (await rig.ask(caller("redis-hangs-0"), stream=True)).status == 200
    await rig.settled()
    assert await rig.posted_tokens(caller("redis-hangs-0")) == PROMPT + 3


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


async def test_scripts_are_lost(rig: Rig) -> None:
    who = caller("redis-flush")
    rig.answer(streamed(400, prompt=PROMPT, pause_s=PAUSE_S))
    with valkeys(rig) as redis:
        async with asking(rig, who) as task:
            while not task.done():
                redis.script_flush()
                await asyncio.sleep(0.05)
        told = await task
    assert (told.status, told.broken, told.events[-1]) == (200, None, DONE)
    await rig.record(told.request_id)
    assert await rig.posted_tokens(who) == PROMPT + 400


async def test_valkey_is_restarted_mid_stream(rig: Rig) -> None:
    """Its append-only file has the balances; the lease in hand bridges the time."""
    who = caller("redis-restart")
    rig.answer(streamed(400, prompt=PROMPT, pause_s=0.01))
    async with asking(rig, who) as task:
        await asked(rig, who, chunks=110, task=task)
        rig.valkey.kill()
        rig.valkey.start()
        told = await task
    assert (told.status, told.broken, told.events[-1]) == (200, None, DONE)
    await rig.record(told.request_id)
    assert await rig.posted_tokens(who) == PROMPT + 400


async def test_valkey_is_read_only_as_after_a_failover(rig: Rig) -> None:
    who = caller("redis-readonly")
    before = len(rig.played)
    rig.answer(streamed(3, prompt=PROMPT))
    with valkeys(rig) as redis:
        redis.replicaof("127.0.0.1", "1")
        try:
            told = await rig.ask(who, stream=True)
            assert told.status == 503
            assert len(rig.played) == before
        finally:
            redis.replicaof("NO", "ONE")
    await rig.ready()
    assert (await rig.ask(who, stream=True)).status == 200


# The processor is killed ----------------------------------------------------------------------------------------------


async def test_the_processor_is_killed_before_it_answers_the_headers(rig: Rig, processor: Processor) -> None:
    who = caller("killed-headers")
    before = len(rig.played)
    processor.send(signal.SIGSTOP)
    async with asking(rig, who) as task:

        async def waits() -> bool:
            return "cluster.extproc.upstream_rq_active: 0" not in await rig.admin("/stats?filter=rq_active")

        await eventually(waits, "Envoy to wait for the processor")
        await processor.stop(signal.SIGKILL)
    told = await task
    assert told.status == 503
    assert len(rig.played) == before
    await processor.start()


async def test_the_processor_is_killed_while_it_holds(rig: Rig, processor: Processor, proxy: FaultProxy) -> None:
    who = caller("killed-holding")
    before = len(rig.played)
    proxy.hold_back(load_scripts()["hold"].sha.encode())
    async with asking(rig, who) as task:
        await eventually(lambda: open_hold(rig), "the hold")
        await processor.stop(signal.SIGKILL)
    told = await task
    assert told.status == 503
    assert len(rig.played) == before
    proxy.heal()
    await processor.start()
    await assert_orphaned(rig, who, told)
    assert await rig.posted_tokens(who) == PROMPT  # the checkpoint: it might have been sent


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_the_processor_is_killed_after_it_forwarded(rig: Rig, processor: Processor, stream: bool) -> None:
    who = caller(f"killed-forwarded{stream:d}")
    rig.answer(Script(first_pause_s=WAIT_S))
    async with asking(rig, who, stream=stream, max_tokens=50) as task:
        request = await asked(rig, who, task=task)
        await processor.stop(signal.SIGKILL)
    told = await task
    assert told.status == 503
    await asyncio.wait_for(request.done.wait(), WAIT_S)
    assert request.ended == "gone"
    await processor.start()
    await assert_orphaned(rig, who, told)
    assert await rig.posted_tokens(who) >= PROMPT


async def test_the_processor_is_killed_mid_stream(rig: Rig, processor: Processor) -> None:
    who = caller("killed-streaming")
    rig.answer(streamed(2_000, prompt=PROMPT, pause_s=PAUSE_S))
    async with asking(rig, who) as task:
        request = await asked(rig, who, chunks=150, task=task)
        await processor.stop(signal.SIGKILL)
    told = await task
    assert_broken(told)
    await asyncio.wait_for(request.done.wait(), WAIT_S)
    assert request.ended == "gone"
    assert said(told) <= request.chunks_sent
    await processor.start()
    await assert_orphaned(rig, who, told)
    posted = await rig.posted_tokens(who) - PROMPT
    assert said(told) - LEASE_TOKENS <= posted <= request.chunks_sent


async def assert_orphaned(rig: Rig, who: str, told: Told) -> None:
    """The hold of a dead processor expires, and a row says what its checkpoint posted."""
    row = await rig.row_of(who)
    assert row.request_id == told.request_id
    assert (row.outcome, row.service, row.model) == (Outcome.UPSTREAM_ERROR, who, "gpt-4o")
    assert await rig.posted_tokens(who) == row.prompt_tokens + row.completion_tokens


# The processor drains, hangs, or is not there -------------------------------------------------------------------------


async def test_a_drain_lets_live_streams_end_and_refuses_new_requests(rig: Rig, processor: Processor) -> None:
    who = caller("drain-short")
    rig.answer(streamed(200, prompt=PROMPT, pause_s=PAUSE_S))
    async with asking(rig, who) as task:
        await asked(rig, who, chunks=20, task=task)
        before = len(rig.played)
        processor.send(signal.SIGTERM)
        await eventually(lambda: "draining" in processor.log.splitlines()[-1], "the drain")
        refused = await rig.ask(caller("drain-new"), stream=True)
        assert refused.status == 503
        assert refused.error is not None
        assert "shutting down" in refused.error["message"]
    told = await task
    assert (told.status, told.broken, told.events[-1]) == (200, None, DONE)
    assert await processor.stop() == 0
    assert (await rig.ask(caller("drain-after"), stream=True)).status == 503
    assert len(rig.played) == before
    assert (await rig.record(told.request_id)).outcome is Outcome.OK
    await processor.start()


async def test_a_stream_that_outlasts_the_drain_breaks_and_is_settled(rig: Rig, processor: Processor) -> None:
    who = caller("drain-long")
    rig.answer(streamed(5_000, prompt=PROMPT, pause_s=PAUSE_S))
    async with asking(rig, who) as task:
        request = await asked(rig, who, chunks=20, task=task)
        assert await processor.stop(signal.SIGTERM) == 0
    told = await task
    assert_broken(told)
    await asyncio.wait_for(request.done.wait(), WAIT_S)
    assert request.ended == "gone"
    await processor.start()
    row = await rig.row_of(who)
    assert said(told) <= row.completion_tokens <= request.chunks_sent
    assert await rig.posted_tokens(who) == PROMPT + row.completion_tokens


async def test_the_processor_hangs(rig: Rig, processor: Processor, checker: Checker) -> None:
    who = caller("hangs-streaming")
    rig.answer(streamed(5_000, prompt=PROMPT, pause_s=PAUSE_S))
    async with asking(rig, who) as streaming:
        request = await asked(rig, who, chunks=20, task=streaming)
        before, seen = len(rig.played), request.chunks_sent
        processor.send(signal.SIGSTOP)
        try:
            async with asking(rig, caller("hangs-new")) as new:
                pass
            refused = await new
            assert refused.status in (503, 504)  # by the ping that is not answered, or the message
            assert refused.error is not None
            told = await asyncio.wait_for(streaming, WAIT_S)
        finally:
            processor.send(signal.SIGCONT)
    assert_broken(told)
    await asyncio.wait_for(request.done.wait(), WAIT_S)
    assert request.ended == "gone"
    assert len(rig.played) == before
    checker.unseen[who] = request.chunks_sent - seen  # while it hung
    row = await rig.row_of(who)
    assert said(told) <= row.completion_tokens <= request.chunks_sent


@pytest.mark.parametrize("socket_is_left", [True, False], ids=["refused", "missing"])
async def test_nothing_passes_before_there_is_a_processor(rig: Rig, processor: Processor, socket_is_left: bool) -> None:
    before = len(rig.played)
    await rig.kill_envoy()
    await processor.stop(signal.SIGKILL)
    if not socket_is_left:
        processor.socket.unlink()
    await rig.start_envoy()

    async def listens() -> bool:
        try:
            told = await rig.ask(caller("no-processor"), stream=True)
        except httpx.ConnectError:
            return False
        assert told.status == 503
        return True

    await eventually(listens, "Envoy to listen")
    for stream in (True, False):
        assert (await rig.ask(caller("no-processor"), stream=stream)).status == 503
    assert len(rig.played) == before
    await processor.start()


# Envoy ----------------------------------------------------------------------------------------------------------------


async def test_envoy_is_killed_mid_stream(rig: Rig) -> None:
    who = caller("envoy-killed")
    rig.answer(streamed(5_000, prompt=PROMPT, pause_s=PAUSE_S))
    async with asking(rig, who) as task:
        request = await asked(rig, who, chunks=150, task=task)
        await rig.kill_envoy()
    told = await task
    assert_broken(told)
    await asyncio.wait_for(request.done.wait(), WAIT_S)
    row = await rig.row_of(who)
    assert row.outcome is Outcome.CLIENT_GONE
    assert said(told) <= row.completion_tokens <= request.chunks_sent
    assert await rig.posted_tokens(who) == PROMPT + row.completion_tokens
    await rig.start_envoy()
