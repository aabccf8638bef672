"""The reference transport, called by a real gRPC client: no end but the right one looks like consent."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2

from extproc import envoy
from extproc.events import ContinueRequest, ForwardChunk
from extproc.exchange import Exchange
from extproc.gate import Clock
from extproc.limits import MAX_MESSAGE_BYTES, MAX_REQUEST_BYTES
from extproc.pb import ext_proc_pb2 as pb
from extproc.records import Amount, Hold, Outcome, Settlement, UsageRecord
from extproc.session import Services, Session
from extproc.transports import ROLE, SERVICE, End, Send
from extproc.transports.grpc_aio import GrpcServer
from tests.exchanges import Callers, answer, body, figures, gate, request_headers, response_headers
from tests.rig import eventually

METHOD = f"/{SERVICE}/Process"
OK, CANCELLED, INTERNAL = grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL


class Script:
    """A session that does what a message says, and echoes any other."""

    def __init__(self, send: Send, end: End) -> None:
        self.send, self.end = send, end
        self.heard: list[bytes] = []
        self.closed = 0
        self.done = False

    def feed(self, message: bytes) -> None:
        self.heard.append(message)
        match message:
            case b"raise":
                raise RuntimeError("a bug")
            case b"fail":
                self.send(b"lost")
                self.end("a reason")
            case b"reply":
                self.send(b"first")
                self.send(b"reply")
                self.end(None)
            case b"twice":
                self.end(None)
                self.end("another")
            case b"silence":
                pass
            case _:
                self.send(message)

    def close(self) -> None:
        self.closed += 1


class Gateway:
    """A server, the sessions that it opened, and what they wrote."""

    def __init__(self, directory: Path) -> None:
        self.address = f"unix:{directory}/s"
        self.scripts: list[Script] = []
        self.records: list[UsageRecord] = []
        self.settled: list[Any] = []
        self.holds: list[asyncio.Future[Any]] = []
        self.lacking: str | None = None
        self.server = GrpcServer(self.address, self.open, lambda: self.lacking)

    def open(self, role: str, send: Send, end: End) -> Session | None:
        match role:
            case "script":
                self.scripts.append(Script(send, end))
                return cast(Session, self.scripts[-1])
            case "gate":
                exchange = Exchange(gate(Callers(), Clock(lambda: 1, lambda: 1)))
                services = Services(
                    ledger=cast(Any, self),
                    settle=self.settle,
                    learn=lambda *_: None,
                    write=self.records.append,
                    refresh_keys=lambda _: self.hold(None),
                    refresh_secret=lambda _: None,
                    count=lambda *_: self.hold(None),
                )
                return Session(exchange, services, send, end)
            case "broken":
                raise RuntimeError("no session")
        return None

    def settle(self, settlement: Settlement, record: UsageRecord | None) -> None:
        self.settled.append(settlement)
        self.records.extend(filter(None, [record]))

    def hold(self, _: Any) -> asyncio.Future[Any]:
        self.holds.append(asyncio.get_running_loop().create_future())
        return self.holds[-1]


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    before = asyncio.all_tasks() | {asyncio.current_task()}
    with tempfile.TemporaryDirectory(prefix="tg") as directory:  # pytest's own are too long for a socket's path
        gateway = Gateway(Path(directory))
        await gateway.server.start()
        yield gateway
        await gateway.server.close()
    mine = {asyncio.current_task()}
    await eventually(lambda: not asyncio.all_tasks() - before - mine, "all tasks to end", 5)


Call = grpc.aio.StreamStreamCall[bytes, bytes]


@asynccontextmanager
async def calling(gateway: Gateway, role: str | None = "script") -> AsyncIterator[Call]:
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    async with grpc.aio.insecure_channel(gateway.address, options) as channel:
        yield call_of(channel, role)


def call_of(channel: Any, role: str | None) -> Call:
    metadata = [(ROLE, role)] if role is not None else []
    call: Call = channel.stream_stream(METHOD)(metadata=metadata, timeout=10)
    return call


async def ended(call: Call) -> grpc.StatusCode:
    """How the server ended the call. The client hears of it once it has read every message."""
    while await call.read() is not grpc.aio.EOF:  # type: ignore[attr-defined]
        pass
    code: grpc.StatusCode = await call.code()
    return code


async def closed(gateway: Gateway) -> None:
    """The stream is over for the server, and its session has been told once."""
    await eventually(lambda: gateway.server.open_streams == 0, "the stream to end", 10)
    assert [script.closed for script in gateway.scripts] == [1] * len(gateway.scripts)


# Messages -------------------------------------------------------------------------------------------------------------


async def test_messages_come_in_order_and_answers_go_out_in_order(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        sent = [b"%d" % number for number in range(50)]
        for message in sent:
            await call.write(message)
        assert [await call.read() for _ in sent] == sent
        gateway.scripts[0].done = True
        await call.done_writing()
        assert await call.code() == OK
    assert gateway.scripts[0].heard == sent
    await closed(gateway)


async def test_a_session_may_speak_unasked(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        await call.write(b"silence")
        await eventually(lambda: gateway.scripts and gateway.scripts[0].heard, "the message")
        gateway.scripts[0].send(b"a")
        gateway.scripts[0].send(b"b")
        assert [await call.read(), await call.read()] == [b"a", b"b"]
        gateway.scripts[0].end(None)
        assert await call.code() == OK
    await closed(gateway)


async def test_the_largest_request_comes_through(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        message = b"x" * MAX_REQUEST_BYTES
        await call.write(message)
        assert await call.read() == message
        call.cancel()
    await closed(gateway)


# Ends -----------------------------------------------------------------------------------------------------------------


async def test_a_reply_is_written_before_the_good_end(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        await call.write(b"reply")
        assert [message async for message in call] == [b"first", b"reply"]
        assert await call.code() == OK
    await closed(gateway)


async def test_only_the_first_end_counts(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        await call.write(b"twice")
        assert await call.code() == OK
    await closed(gateway)


async def test_a_failure_says_why(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        await call.write(b"fail")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await ended(call)
        assert (raised.value.code(), raised.value.details()) == (INTERNAL, "a reason")
    await closed(gateway)


async def test_a_bug_in_the_session_is_no_good_end(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        await call.write(b"raise")
        assert await call.code() == grpc.StatusCode.UNKNOWN
    await closed(gateway)


@pytest.mark.parametrize("role", ["router", "", None])
async def test_an_unknown_role_is_no_good_end(gateway: Gateway, role: str | None) -> None:
    async with calling(gateway, role) as call:
        assert await call.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert gateway.server.open_streams == 0


async def test_a_session_that_cannot_be_opened_is_no_good_end(gateway: Gateway) -> None:
    async with calling(gateway, "broken") as call:
        assert await call.code() == grpc.StatusCode.UNKNOWN
    assert gateway.server.open_streams == 0


@pytest.mark.parametrize("message", [None, b"silence", b"echo"], ids=["no message", "unanswered", "answered"])
async def test_a_half_close_before_the_end_of_the_request_is_no_good_end(
    gateway: Gateway, message: bytes | None
) -> None:
    async with calling(gateway) as call:
        if message is not None:
            await call.write(message)
            assert message == b"silence" or await call.read() == message
        await call.done_writing()
        assert await call.code() == CANCELLED
    await closed(gateway)


@pytest.mark.parametrize("message", [b"silence", b"echo"], ids=["unanswered", "answered"])
async def test_a_cancelled_call_closes_its_session(gateway: Gateway, message: bytes) -> None:
    async with calling(gateway) as call:
        await call.write(message)
        await eventually(lambda: gateway.scripts and gateway.scripts[0].heard, "the message")
        call.cancel()
        assert await call.code() == CANCELLED
        await closed(gateway)


async def test_a_write_after_the_peer_went_is_no_complaint(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    async with calling(gateway) as call:
        await call.write(b"silence")
        await eventually(lambda: gateway.scripts and gateway.scripts[0].heard, "the message")
        call.cancel()
        gateway.scripts[0].send(b"late")
        await closed(gateway)
    assert caplog.text == ""


async def test_a_peer_that_dies_closes_all_its_sessions(gateway: Gateway) -> None:
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        calls = [call_of(channel, "script") for _ in range(20)]
        for call in calls:
            await call.write(b"silence")
        await eventually(lambda: gateway.server.open_streams == 20, "the streams")
    await closed(gateway)
    assert len(gateway.scripts) == 20


async def test_a_shutdown_in_the_middle_is_no_good_end(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        await call.write(b"echo")
        assert await call.read() == b"echo"
        await gateway.server.close()
        assert await call.code() != OK
    await closed(gateway)


# Draining -------------------------------------------------------------------------------------------------------------


async def test_idle_waits_for_the_last_stream(gateway: Gateway) -> None:
    await gateway.server.idle(0)  # none yet
    async with calling(gateway) as first, calling(gateway) as second:
        for call in (first, second):
            await call.write(b"echo")
            await call.read()
        idle = asyncio.ensure_future(gateway.server.idle(30))
        await first.write(b"reply")
        assert await ended(first) == OK
        await eventually(lambda: gateway.server.open_streams == 1, "the first stream to end")
        assert not idle.done()
        await second.write(b"reply")
        assert await ended(second) == OK
        await idle
    await closed(gateway)


async def test_idle_ends_with_its_time(gateway: Gateway) -> None:
    async with calling(gateway) as call:
        await call.write(b"echo")
        await call.read()
        await gateway.server.idle(0.01)
        assert gateway.server.open_streams == 1
        call.cancel()
    await closed(gateway)


# Health ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lacking", [None, "Redis cannot be used"])
async def test_the_same_socket_answers_probes(gateway: Gateway, lacking: str | None) -> None:
    gateway.lacking = lacking
    states = health_pb2.HealthCheckResponse
    async with grpc.aio.insecure_channel(gateway.address) as channel:
        check: Callable[[bytes], Awaitable[bytes]] = cast(Any, channel).unary_unary("/grpc.health.v1.Health/Check")
        found = states.FromString(await check(b""))
        assert found.status == (states.NOT_SERVING if lacking else states.SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await check(health_pb2.HealthCheckRequest(service="x").SerializeToString())
    assert raised.value.code() == grpc.StatusCode.NOT_FOUND


# With the gate --------------------------------------------------------------------------------------------------------


def headers_of(pairs: tuple[tuple[str, str], ...]) -> pb.HttpHeaders:
    values = [pb.HeaderValue(key=name, raw_value=value.encode("latin-1")) for name, value in pairs]
    return pb.HttpHeaders(headers=pb.HeaderMap(headers=values))


REQUEST = pb.ProcessingRequest(request_headers=headers_of(request_headers())).SerializeToString()
BODY = pb.ProcessingRequest(request_body=pb.HttpBody(body=body(), end_of_stream=True)).SerializeToString()
RESPONSE = pb.ProcessingRequest(
    response_headers=headers_of(response_headers(200, ("content-type", "application/json")))
).SerializeToString()
ANSWER = pb.ProcessingRequest(
    response_body=pb.HttpBody(body=answer(usage=figures(9, 4)), end_of_stream=True)
).SerializeToString()


async def admitted(gateway: Gateway, call: Call) -> None:
    await call.write(REQUEST)
    assert await call.read() == envoy.encode(ContinueRequest())
    await call.write(BODY)
    await eventually(lambda: gateway.holds, "the hold to be asked for")


async def granted(gateway: Gateway, call: Call) -> None:
    await admitted(gateway, call)
    gateway.holds[0].set_result(Hold("id", (), Amount(10**9, 10**6)))
    sent = pb.ProcessingResponse.FromString(cast(bytes, await call.read()))
    assert sent.HasField("request_body")


async def test_a_whole_exchange_ends_well(gateway: Gateway) -> None:
    async with calling(gateway, "gate") as call:
        await granted(gateway, call)
        await call.write(RESPONSE)
        assert await call.read()
        await call.write(ANSWER)
        assert await call.read() == envoy.encode(ForwardChunk())
        await call.done_writing()
        assert await call.code() == OK
    assert [record.outcome for record in gateway.records] == [Outcome.OK]
    assert len(gateway.settled) == 1


async def test_a_refusal_ends_well(gateway: Gateway) -> None:
    refused = pb.ProcessingRequest(request_headers=headers_of(request_headers(path="/"))).SerializeToString()
    async with calling(gateway, "gate") as call:
        await call.write(refused)
        answers = [pb.ProcessingResponse.FromString(message) async for message in call]
        assert [answer.immediate_response.status.code for answer in answers] == [404]
        assert await call.code() == OK


@pytest.mark.parametrize(
    "message", [b"\xff\xff", b"", REQUEST, ANSWER], ids=["garbage", "empty", "headers again", "an answer"]
)
async def test_what_was_not_asked_for_is_no_good_end(gateway: Gateway, message: bytes) -> None:
    async with calling(gateway, "gate") as call:
        await call.write(REQUEST)
        assert await call.read()
        await call.write(message)
        assert await call.code() == INTERNAL
    await closed(gateway)
    assert len(gateway.records) == 1


@pytest.mark.parametrize("phase", ["headers", "holding", "sent", "answering"])
@pytest.mark.parametrize("how", ["half-close", "cancel"])
async def test_a_stream_that_ends_early_is_accounted_for(gateway: Gateway, phase: str, how: str) -> None:
    async with calling(gateway, "gate") as call:
        if phase == "headers":
            await call.write(REQUEST)
            await call.read()
        elif phase == "holding":
            await admitted(gateway, call)
        else:
            await granted(gateway, call)
        if phase == "answering":
            await call.write(RESPONSE)
            await call.read()
        if how == "cancel":
            call.cancel()
        else:
            await call.done_writing()
        assert await call.code() == CANCELLED
        await closed(gateway)
    assert [record.outcome for record in gateway.records] == [Outcome.CLIENT_GONE]
    assert len(gateway.settled) == (phase in ("sent", "answering"))
