"""Running it: health, reloads, draining, who is who, and what ordinary mistakes are answered with."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.limits import MAX_REQUEST_BYTES
from extproc.local.issuer import CERTIFICATES_PATH, serve_certificates
from extproc.local.provider import Script
from extproc.local.valkey import free_port
from extproc.records import Outcome, UsageRecord, UsageSource
from extproc.tokens import counter
from extproc.usage.journal import encode
from extproc.usage.sinks import UsageRow
from tests.rig import AUDIENCE, DONE, POLICY, PROVIDER_KEY, Processor, Rig, Told, delta, eventually, running, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUDGETS = "  - {scope: global, window: total, limit_usd: 1000}\n"
RANKER = "ranker@test.iam.gserviceaccount.com"
FRONTEND = "frontend@test.iam.gserviceaccount.com"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(short_directory: Path) -> AsyncIterator[Rig]:
    """Whatever the tests do to it, nothing is held in the end, and the keys were not written down."""
    async with running(short_directory, budgets=BUDGETS) as rig:
        yield rig
        await rig.settled()
        assert PROVIDER_KEY not in rig.everything_written()


@pytest.fixture
def rig(gateway: Rig) -> Rig:
    gateway.answer(streamed(3))
    return gateway


async def health(rig: Rig) -> tuple[int, str | None]:
    """What /healthz says through Envoy: the status, and what is lacking."""
    async with httpx.AsyncClient(verify=False) as client:
        answer = await client.get(f"{rig.url}/healthz")
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    if answer.headers.get("x-request-id") is None or "error" in body:
        return answer.status_code, "the processor"
    assert body["ready"] is (answer.status_code == 200) is (body["lacking"] is None)
    return answer.status_code, body["lacking"]


async def becomes(rig: Rig, lacking: str | None) -> None:
    """Wait until /healthz names this, or nothing, as lacking."""
    said: list[Any] = []

    async def says() -> bool:
        said[:] = await health(rig)
        return said == ([200, None] if lacking is None else [503, lacking])

    try:
        await eventually(says, f"/healthz to say {lacking}")
    except AssertionError as error:
        raise AssertionError(f"{error}; it says {said}") from None


def health_port(processor: Processor) -> int:
    return int(re.findall(r"health on port (\d+)", processor.log)[-1])


async def grpc_health(processor: Processor, service: str = "") -> int:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{health_port(processor)}") as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service))
        status: int = answer.status
        return status


@asynccontextmanager
async def restarted(rig: Rig, lacking: str | None, **environment: str) -> AsyncIterator[Processor]:
    """The processor, started again with another environment, and at the end as it was."""
    (own,) = rig.processors
    await own.stop()
    other = replace(own, environment={**own.environment, **environment}, process=None)
    await other.start()
    try:
        await becomes(rig, lacking)
        yield other
    finally:
        await other.stop()
        await own.start()
        await becomes(rig, None)


# Health ---------------------------------------------------------------------------------------------------------------


async def test_health_follows_redis(rig: Rig) -> None:
    assert await health(rig) == (200, None)
    assert await grpc_health(rig.processors[0]) == SERVING
    rig.valkey.kill()
    await becomes(rig, "Redis cannot be used")
    assert await grpc_health(rig.processors[0]) == NOT_SERVING
    told = await rig.ask()
    assert (told.status, told.error and told.error["code"]) == (503, "service_unavailable")
    rig.valkey.start()
    await becomes(rig, None)
    assert await grpc_health(rig.processors[0]) == SERVING
    assert (await rig.ask(stream=True)).status == 200


async def test_health_follows_the_issuers_keys(rig: Rig) -> None:
    """Without any issuer's key nobody can be told from anybody. They are asked for again until they come."""
    port = free_port()
    url = f"http://127.0.0.1:{port}{CERTIFICATES_PATH}"
    without = {"TOLLGATE_ISSUER_KEYS": f"{rig.issuer.issuer}={url}"}
    async with restarted(rig, "no issuer's keys could be fetched", **without) as processor:
        assert await grpc_health(processor) == NOT_SERVING
        told = await rig.ask()
        assert told.status == 503
        server = await serve_certificates(rig.issuer, port=port)
        await becomes(rig, None)
        assert (await rig.ask(stream=True)).status == 200
        await server.close()
        assert (await rig.ask(stream=True)).status == 200, "kept for as long as they may be"


async def test_health_follows_the_providers_key(rig: Rig) -> None:
    async with restarted(rig, "there is no provider's key", OPENAI_API_KEY="") as processor:
        assert await grpc_health(processor) == NOT_SERVING
        assert (await rig.ask()).status == 503


async def test_a_full_journal_stops_admission_until_there_is_room(rig: Rig) -> None:
    full = rig.processors[0].state_dir / "journal" / "usage-0-1-1.jsonl"
    row = encode(UsageRow(UsageRecord(**RECORD)))
    full.write_bytes(row * (2**20 // len(row) + 1))
    try:
        async with restarted(rig, "the usage journal is full", TOLLGATE_JOURNAL_MAX_MIB="1") as processor:
            before = len(rig.provider.received)
            told = await rig.ask()
            assert (told.status, told.error and told.error["code"]) == (503, "service_unavailable")
            assert told.error is not None
            assert "the usage journal is full" in told.error["message"]
            assert len(rig.provider.received) == before
            assert await grpc_health(processor) == NOT_SERVING
            full.unlink()  # as the shipper does
            await becomes(rig, None)
            assert (await rig.ask(stream=True)).status == 200
    finally:
        full.unlink(missing_ok=True)


RECORD: dict[str, Any] = {
    **{"request_id": "old", "ts": "2026-01-01T00:00:00.000+00:00", "service": None, "user": None, "team": None},
    **{"requested_model": None, "provider": None, "model": None, "route": None, "attempts": 0, "stream": False},
    **{"status": 404, "outcome": Outcome.REFUSED, "prompt_tokens": 0, "cached_prompt_tokens": 0},
    **{"completion_tokens": 0, "reasoning_tokens": 0, "usage_source": UsageSource.COUNTED, "cost_nanousd": 0},
    **{"price_version": None, "ttft_ms": None, "duration_ms": 0, "overhead_us": 0, "budget_id": None},
}


async def test_the_health_service_knows_the_server_only(rig: Rig) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await grpc_health(rig.processors[0], "envoy.service.ext_proc.v3.ExternalProcessor")
    assert refusal.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_asks_nobody_who_they_are_and_leaves_no_record(rig: Rig) -> None:
    before = len(rig.records())
    for method in ("GET", "HEAD", "POST"):
        async with httpx.AsyncClient(verify=False) as client:
            assert (await client.request(method, f"{rig.url}/healthz?from=probe")).status_code == 200
    assert len(rig.records()) == before


# The policy -----------------------------------------------------------------------------------------------------------


async def test_a_changed_budget_applies_to_the_next_request(rig: Rig) -> None:
    assert (await rig.ask(stream=True)).status == 200
    await rig.set_policy(POLICY + "  - {scope: service, id: ranker@*, window: day, limit_tokens: 1}\n")
    try:
        told = await rig.ask(stream=True)
        assert told.status == 429
        assert told.error is not None
        assert told.error["code"] == "insufficient_quota"
        assert (await rig.ask(FRONTEND, stream=True)).status == 200
        await rig.set_policy(POLICY + "  - {scope: service, id: ranker@*, window: day, limit_tokens: 100000}\n")
        assert (await rig.ask(stream=True)).status == 200
    finally:
        await rig.set_policy(POLICY + BUDGETS)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (POLICY + "  - {scope: service, id: '*', window: fortnight, limit_usd: 5}\n", "line 12: budgets[0].window"),
        (POLICY.replace("prices:", "prizes:") + "  []\n", "prizes"),
        ("identity: [", "not valid YAML"),
        ("", ""),
        (None, "the file cannot be read: No such file or directory"),
    ],
    ids=["value", "field", "syntax", "empty", "gone"],
)
async def test_a_broken_policy_is_refused_with_its_reason_and_the_old_one_stays(
    rig: Rig, broken: str | None, reason: str
) -> None:
    (processor,) = rig.processors
    refusals = processor.log.count("is refused")
    if broken is None:
        rig.policy_path.unlink()
    else:
        rig.policy_path.write_text(broken)
    await eventually(lambda: processor.log.count("is refused") > refusals, "the refusal in the log")
    assert reason in processor.log.rpartition("is refused")[2]
    assert await health(rig) == (200, None)
    assert (await rig.ask(stream=True)).status == 200
    # Put back as it was, it is the policy in force already, and nothing is said.
    rig.policy_path.write_text(POLICY + BUDGETS)
    assert (await rig.ask(stream=True)).status == 200


# Draining -------------------------------------------------------------------------------------------------------------


async def test_sigterm_lets_streams_end_refuses_new_requests_and_exits_well(rig: Rig) -> None:
    (processor,) = rig.processors
    rig.answer(streamed(30, pause_s=0.03))
    under_way = asyncio.create_task(rig.ask(stream=True))
    before = len(rig.played)
    await eventually(lambda: len(rig.played) > before and rig.played[-1][0].chunks_sent > 2, "the stream to begin")
    drains = processor.log.count("draining")  # it has been restarted before
    processor.send(signal.SIGTERM)
    await eventually(lambda: processor.log.count("draining") > drains, "the processor to drain")
    refused = await rig.ask()
    assert refused.status == 503
    told = await under_way
    assert (told.status, told.broken, told.events[-1]) == (200, None, DONE)
    assert processor.process is not None
    assert await processor.process.wait() == 0
    assert (await rig.ask()).status == 503, "nothing passes without a processor"
    assert (await rig.record(told.request_id)).outcome is Outcome.OK
    await processor.start()
    await becomes(rig, None)


# Who is who -----------------------------------------------------------------------------------------------------------


async def principal(rig: Rig, told: Told) -> tuple[str | None, str | None, str | None]:
    record = await rig.record(told.request_id)
    return record.service, record.user, record.team


@pytest.mark.parametrize(
    ("email", "user", "expected"),
    [
        (RANKER, None, (RANKER, None, "search")),
        (RANKER.upper(), None, (RANKER, None, "search")),
        (FRONTEND, None, (FRONTEND, None, None)),
        (FRONTEND, "Ada@People.Example", (FRONTEND, "ada@people.example", None)),
        (FRONTEND, "customer-17", (FRONTEND, "customer-17", None)),
        ("Ada@people.example", None, (None, "ada@people.example", None)),
    ],
    ids=["service", "capitals", "delegate", "for an address", "for an id", "person"],
)
async def test_the_record_says_who_it_was(
    rig: Rig, email: str, user: str | None, expected: tuple[str | None, str | None, str | None]
) -> None:
    told = await rig.ask(email, stream=True, headers={} if user is None else {"x-tollgate-user": user})
    assert told.status == 200, told.body
    assert await principal(rig, told) == expected


@pytest.mark.parametrize("email", [RANKER, "ada@people.example"])
async def test_only_a_delegate_acts_for_users(rig: Rig, email: str) -> None:
    told = await rig.ask(email, headers={"x-tollgate-user": "eve@people.example"})
    assert (told.status, told.error and told.error["code"]) == (403, "caller_not_allowed")


@pytest.mark.parametrize("user", ["", "a" * 321], ids=["empty", "long"])
async def test_a_delegate_names_a_user_that_can_be_one(rig: Rig, user: str) -> None:
    told = await rig.ask(FRONTEND, headers={"x-tollgate-user": user})
    assert told.status == 400
    assert told.error is not None
    assert told.error["param"] == "x-tollgate-user"


async def test_several_audiences(rig: Rig) -> None:
    await rig.set_policy(
        POLICY.replace("[https://tollgate.test]", "[https://other.test, https://tollgate.test]") + BUDGETS
    )
    try:
        for audience, status in (("https://other.test", 200), (AUDIENCE, 200), ("https://third.test", 401)):
            token = rig.token(aud=audience)
            async with rig.client(verify=False, headers={"authorization": f"Bearer {token}"}) as client:
                answer = await client.post("/v1/chat/completions", json=CALL)
            assert answer.status_code == status
    finally:
        await rig.set_policy(POLICY + BUDGETS)


CALL = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], "stream": True}


@pytest.mark.parametrize(
    ("provider", "status"), [("openai", 200), ("anthropic", 400), ("gemini", 400), ("nobody", 400), ("OpenAI", 400)]
)
async def test_a_caller_may_force_a_provider_that_has_a_key(rig: Rig, provider: str, status: int) -> None:
    before = len(rig.provider.received)
    told = await rig.ask(stream=True, headers={"x-llm-provider": provider})
    assert told.status == status, told.body
    assert len(rig.provider.received) - before == (status == 200)
    record = await rig.record(told.request_id)
    assert record.provider == ("openai" if status == 200 else None)


# Large prompts, ordinary mistakes -------------------------------------------------------------------------------------


async def test_a_large_prompt_is_counted_and_passed_on(rig: Rig) -> None:
    """The provider says nothing of usage, so that the record holds the gateway's own count."""
    text = "The quick brown fox jumps over the lazy dog, and nobody knows why. " * 16_000
    assert len(text) > 2**20
    rig.answer(Script(chunks=[delta(" word"), delta("", finish="stop"), DONE]))
    told = await rig.ask(stream=True, messages=[{"role": "user", "content": text}])
    assert told.status == 200, told.body
    assert json.loads(rig.provider.received[-1].body)["messages"][0]["content"] == text
    record = await rig.record(told.request_id)
    tokens = counter("o200k_base")(text)
    assert record.usage_source is UsageSource.COUNTED
    assert tokens <= record.prompt_tokens <= tokens * 1.01 + 16
    assert record.cost_nanousd > 0


@pytest.mark.parametrize(
    ("request_line", "headers", "status", "code"),
    [
        ("POST /v1/files", {}, 404, "unknown_url"),
        ("GET /v1/files", {}, 404, "unknown_url"),
        ("GET /", {}, 404, "unknown_url"),
        ("GET /v1/chat/completions", {}, 405, "method_not_allowed"),
        ("PUT /v1/chat/completions", {}, 405, "method_not_allowed"),
        ("DELETE /v1/chat/completions", {}, 405, "method_not_allowed"),
        ("POST /v1/chat/completions", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST /v1/chat/completions", {"content-type": "application/json; charset=latin-1"}, 415, None),
        ("POST /v1/chat/completions", {"content-type": "multipart/form-data; boundary=x"}, 415, None),
        ("POST /v1/chat/completions", {"content-encoding": "gzip"}, 415, "unsupported_media_type"),
        ("POST /v1/chat/completions", {"authorization": "Bearer nothing"}, 401, "invalid_api_key"),
    ],
)
async def test_a_mistake_is_answered_in_openais_shape_and_recorded(
    rig: Rig, request_line: str, headers: dict[str, str], status: int, code: str | None
) -> None:
    before = len(rig.provider.received)
    async with rig.client(verify=False, headers={"content-type": "application/json", **headers}) as client:
        answer = await client.request(*request_line.split(), content=json.dumps(CALL))
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers.get("allow") == ("POST" if status == 405 else None)
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert code in (None, error["code"])
    record = await rig.record(answer.headers["x-request-id"])
    assert (record.status, record.outcome, record.cost_nanousd) == (status, Outcome.REFUSED, 0)
    assert len(rig.provider.received) == before


async def test_a_body_above_the_limit_is_answered_in_openais_shape_and_recorded(rig: Rig) -> None:
    """Announced, it is refused before it is sent; else as soon as it is too much."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {rig.token()}\r\n"
    writer.write(f"{head}content-type: application/json\r\ncontent-length: {MAX_REQUEST_BYTES + 1}\r\n\r\n".encode())
    answer = (await asyncio.wait_for(reader.read(), 10)).decode()
    writer.close()
    assert answer.startswith("HTTP/1.1 413 ")
    ids = re.findall(r"x-request-id: (\S+)", answer)
    bodies = [json.loads(answer.partition("\r\n\r\n")[2])]

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(33):
            yield b" " * 2**20

    async with rig.client(verify=False, headers={"content-type": "application/json"}) as client:
        chunked = await client.post("/v1/chat/completions", content=chunks())
    assert chunked.status_code == 413
    ids.append(chunked.headers["x-request-id"])
    bodies.append(chunked.json())
    assert {body["error"]["code"] for body in bodies} == {"request_too_large"}
    for request_id in ids:
        record = await rig.record(request_id)
        assert (record.status, record.outcome) == (413, Outcome.REFUSED)
