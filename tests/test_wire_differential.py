"""Both transports, driven by grpcio's client: the same messages get the same answers and statuses from either."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from extproc.limits import MAX_MESSAGE_BYTES, MIB
from extproc.transports import End, Send, Session
from extproc.transports.grpc_aio import GrpcServer
from extproc.transports.wire.server import WireServer
from tests.rig import eventually
from tests.wire_peer import PATH

Server = GrpcServer | WireServer
SERVERS: dict[str, type[GrpcServer] | type[WireServer]] = {"grpc": GrpcServer, "wire": WireServer}
ROLE = (("x-tollgate-role", "gate"),)


class Scripted:
    """A session that does what each message says, so that a test's client decides everything."""

    def __init__(self, send: Send, end: End) -> None:
        self._send = send
        self._end = end
        self.done = False
        self.closed = 0
        self.fed: list[bytes] = []

    def feed(self, message: bytes) -> None:
        self.fed.append(message[:20])
        verb, _, rest = message.partition(b":")
        loop = asyncio.get_running_loop()
        match verb:
            case b"later":
                loop.call_soon(self._send, rest)
            case b"twice":
                self._send(rest)
                self._send(rest)
            case b"many":
                for _ in range(100):
                    self._send(rest)
            case b"reply":
                self._send(rest)
                self._end(None)
                self._send(b"after the end")
            case b"fail":
                self._end(rest.decode())
            case b"fail-later":
                loop.call_soon(self._end, rest.decode())
            case b"silent":
                pass
            case b"done":
                self.done = True
            case _:
                self._send(message)

    def close(self) -> None:
        self.closed += 1


@dataclass
class Running:
    """A server of either kind, a channel to it, and its sessions."""

    server: Server
    channel: grpc.aio.Channel
    sessions: list[Scripted]
    lacks: list[str] = field(default_factory=list)

    def call(self, metadata: Any = ROLE, path: str = PATH, **options: Any) -> Any:
        return self.channel.stream_stream(path, None, None)(metadata=metadata, **options)


@asynccontextmanager
async def running(kind: str, folder: Path) -> AsyncIterator[Running]:
    sessions: list[Scripted] = []
    lacks: list[str] = []

    def open_session(role: str, send: Send, end: End) -> Session | None:
        if role != "gate":
            return None
        sessions.append(Scripted(send, end))
        return sessions[-1]

    address = f"unix:{folder}/{kind}"
    server = SERVERS[kind](address, open_session, lambda: lacks[0] if lacks else None)
    await server.start()
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        yield Running(server, channel, sessions, lacks)
        await server.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="tg"))
    yield path
    shutil.rmtree(path)


async def converse(call: Any, messages: list[bytes], *, half_close: bool) -> tuple[list[bytes], grpc.StatusCode, str]:
    """Send all, then read to the end."""
    try:
        for message in messages:
            await call.write(message)
        if half_close:
            await call.done_writing()
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, asyncio.CancelledError):
        pass  # the server ended it before
    answers = []
    try:
        while (answer := await call.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            answers.append(answer)
    except grpc.aio.AioRpcError:
        pass
    except asyncio.CancelledError:  # how the client tells of a status CANCELLED
        pass
    return answers, await call.code(), await call.details()


Code = grpc.StatusCode
EARLY = "closed before the end of the request"
LARGE = b"x" * (32 * MIB)
CONVERSATIONS: dict[str, tuple[list[bytes], bool, list[bytes], Code, str]] = {
    "echo": ([b"a", b"b", b"done"], True, [b"a", b"b"], Code.OK, ""),
    "an empty message": ([b"", b"done"], True, [b""], Code.OK, ""),
    "two answers to one": ([b"twice:a", b"done"], True, [b"a", b"a"], Code.OK, ""),
    "an answer between two reads": ([b"later:a", b"silent", b"reply:b"], False, [b"a", b"b"], Code.OK, ""),
    "a last word": ([b"reply:a"], False, [b"a"], Code.OK, ""),
    "a failure": ([b"a", b"fail:why"], False, [b"a"], Code.INTERNAL, "why"),
    "a failure at once": ([b"fail:why"], False, [], Code.INTERNAL, "why"),
    "a failure later": (["fail-later:50% é\n".encode()], False, [], Code.INTERNAL, "50% é\n"),
    "closed too early": ([b"a"], True, [b"a"], Code.CANCELLED, EARLY),
    "nothing said": ([], True, [], Code.CANCELLED, EARLY),
    "32 MiB": ([LARGE, b"done"], True, [LARGE], Code.OK, ""),
    "the largest": ([b"y" * MAX_MESSAGE_BYTES, b"done"], True, [b"y" * MAX_MESSAGE_BYTES], Code.OK, ""),
    "a hundred answers": ([b"many:" + b"z" * 50_000, b"done"], True, [b"z" * 50_000] * 100, Code.OK, ""),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("kind", SERVERS)
async def test_conversations(kind: str, name: str, folder: Path) -> None:
    messages, half_close, answers, code, details = CONVERSATIONS[name]
    if name in ("a failure", "closed too early"):
        await _step_by_step(kind, name, folder)
        return
    async with running(kind, folder) as run:
        got = await converse(run.call(), messages, half_close=half_close)
        assert got[1:] == (code, details)
        assert got[0] == answers
        await eventually(lambda: run.server.open_streams == 0, "the stream's end")
        assert [session.closed for session in run.sessions] == [1]


async def _step_by_step(kind: str, name: str, folder: Path) -> None:
    """An error does not wait for answers under way, so a client that wants them reads them first."""
    messages, half_close, answers, code, details = CONVERSATIONS[name]
    async with running(kind, folder) as run:
        call = run.call()
        await call.write(messages[0])
        assert [await call.read()] == answers
        got = await converse(call, messages[1:], half_close=half_close)
        assert got == ([], code, details)
        await eventually(lambda: [session.closed for session in run.sessions] == [1], "the session's close")


@pytest.mark.parametrize("kind", SERVERS)
async def test_too_large_a_message(kind: str, folder: Path) -> None:
    async with running(kind, folder) as run:
        answers, code, _ = await converse(run.call(), [b"x" * (MAX_MESSAGE_BYTES + 1)], half_close=True)
        assert (answers, code) == ([], Code.RESOURCE_EXHAUSTED)
        assert run.sessions[0].fed == []


@pytest.mark.parametrize(
    ("metadata", "path", "code"),
    [
        ((("x-tollgate-role", "other"),), PATH, Code.INVALID_ARGUMENT),
        ((), PATH, Code.INVALID_ARGUMENT),
        (ROLE, "/envoy.service.ext_proc.v3.ExternalProcessor/Other", Code.UNIMPLEMENTED),
        (ROLE, "/grpc.health.v1.Health/Watch", Code.UNIMPLEMENTED),
        (ROLE, "/other", Code.UNIMPLEMENTED),
    ],
)
@pytest.mark.parametrize("kind", SERVERS)
async def test_calls_that_are_refused(kind: str, metadata: Any, path: str, code: Code, folder: Path) -> None:
    async with running(kind, folder) as run:
        assert await run.call(metadata, path).code() == code
        assert run.sessions == []


@pytest.mark.parametrize("kind", SERVERS)
async def test_a_deadline(kind: str, folder: Path) -> None:
    async with running(kind, folder) as run:
        call = run.call(timeout=0.2)
        await call.write(b"silent")
        assert await call.code() == Code.DEADLINE_EXCEEDED
        await eventually(lambda: [session.closed for session in run.sessions] == [1], "the session's close")


@pytest.mark.parametrize("kind", SERVERS)
async def test_a_cancelled_call(kind: str, folder: Path) -> None:
    async with running(kind, folder) as run:
        call = run.call()
        await call.write(b"a")
        assert await call.read() == b"a"
        assert run.server.open_streams == 1
        call.cancel()
        await eventually(lambda: [session.closed for session in run.sessions] == [1], "the session's close")
        await run.server.idle(5)
        assert run.server.open_streams == 0


@pytest.mark.parametrize("kind", SERVERS)
async def test_many_calls_at_once(kind: str, folder: Path) -> None:
    async with running(kind, folder) as run:

        async def one(number: int) -> None:
            call = run.call()
            for turn in range(5):
                message = b"%d %d " % (number, turn) * (1 + number % 40 * 50)
                await call.write(message)
                assert await call.read() == message
            assert await converse(call, [b"done"], half_close=True) == ([], Code.OK, "")

        await asyncio.gather(*(one(number) for number in range(200)))
        await eventually(lambda: run.server.open_streams == 0, "all streams' end")
        assert {session.closed for session in run.sessions} == {1}


@pytest.mark.parametrize("kind", SERVERS)
async def test_clients_that_do_not_read_do_not_hold_up_others(kind: str, folder: Path) -> None:
    async with running(kind, folder) as run:
        slow = [run.call() for _ in range(4)]
        for call in slow:
            await call.write(b"many:" + b"s" * 20_000)
        assert await converse(run.call(), [b"quick", b"done"], half_close=True) == ([b"quick"], Code.OK, "")
        for call in slow:
            answers, code, _ = await converse(call, [b"done"], half_close=True)
            assert (answers, code) == ([b"s" * 20_000] * 100, Code.OK)


@pytest.mark.parametrize("kind", SERVERS)
async def test_closing_ends_open_calls_with_an_error(kind: str, folder: Path) -> None:
    async with running(kind, folder) as run:
        calls = [run.call() for _ in range(3)]
        for call in calls:
            await call.write(b"a")
            await call.read()
        await run.server.idle(0.01)
        assert run.server.open_streams == 3
        await run.server.close()
        for call in calls:
            assert await call.code() in (Code.UNAVAILABLE, Code.CANCELLED)
        await eventually(lambda: [session.closed for session in run.sessions] == [1, 1, 1], "all sessions' close")


@pytest.mark.parametrize("kind", SERVERS)
async def test_health(kind: str, folder: Path) -> None:
    async with running(kind, folder) as run:
        check: Callable[[bytes], Any] = run.channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        assert await check(b"") == b"\x08\x01"
        run.lacks.append("Redis")
        assert await check(b"") == b"\x08\x02"
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await check(b"\x0a\x05other")
        assert failed.value.code() == Code.NOT_FOUND
