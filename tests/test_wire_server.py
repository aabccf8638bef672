"""The wire transport's shell: sockets, writes, timers and bounds, in raw frames where a real client would not do."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
import uvloop

from extproc.local.valkey import free_port
from extproc.transports import End, Send, Session
from extproc.transports.wire import frames
from extproc.transports.wire import server as module
from extproc.transports.wire.frames import END_HEADERS, END_STREAM, Code, Setting
from extproc.transports.wire.server import WireServer
from tests.rig import eventually
from tests.wire_peer import (
    GREETING,
    SETTINGS_ACK,
    Frame,
    block,
    data,
    goaway,
    headers,
    message,
    resets,
    split,
    status,
)


class Echo:
    """Answers every message with itself; says that it is done when asked."""

    __slots__ = ("closed", "done", "end", "send", "server")

    def __init__(self, send: Send, end: End) -> None:
        self.send = send
        self.end = end
        self.done = False
        self.closed = False

    def feed(self, message: bytes) -> None:
        if message == b"raise":
            raise RuntimeError("as asked")
        if message == b"done":
            self.done = True
        elif message != b"silent":
            self.send(message)

    def close(self) -> None:
        assert not self.closed
        self.closed = True


class Client:
    """A raw connection to the server."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.seen: list[Frame] = []
        self._rest = b""

    async def until(self, kind: int, stream_id: int | None = None, flags: int = 0) -> Frame:
        """Read until such a frame has come."""
        while True:
            for frame in self.seen:
                if frame.kind == kind and stream_id in (None, frame.stream_id) and frame.flags & flags == flags:
                    return frame
            await self._read()

    async def to_end(self) -> list[Frame]:
        while not self.reader.at_eof():
            await self._read()
        return self.seen

    async def _read(self) -> None:
        more = await asyncio.wait_for(self.reader.read(1 << 20), 10)
        self._rest += more
        whole = 0
        while len(self._rest) - whole >= 9:
            end = whole + 9 + int.from_bytes(self._rest[whole : whole + 3], "big")
            if end > len(self._rest):
                break
            whole = end
        self.seen += split(self._rest[:whole])
        self._rest = self._rest[whole:]
        assert more or self.reader.at_eof()


class Running:
    def __init__(self, server: WireServer, address: str, sessions: list[Echo]) -> None:
        self.server = server
        self.address = address
        self.sessions = sessions
        self.clients: list[Client] = []

    async def connect(self, greeting: bytes = GREETING + SETTINGS_ACK) -> Client:
        if self.address.startswith("unix:"):
            reader, writer = await asyncio.open_unix_connection(self.address.removeprefix("unix:"), limit=1 << 24)
        else:
            host, _, port = self.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
        client = Client(reader, writer)
        self.clients.append(client)
        writer.write(greeting)
        return client


@asynccontextmanager
async def running(address: str) -> AsyncIterator[Running]:
    sessions: list[Echo] = []

    def open_session(role: str, send: Send, end: End) -> Session:
        sessions.append(Echo(send, end))
        return sessions[-1]

    server = WireServer(address, open_session, lambda: None)
    await server.start()
    run = Running(server, address, sessions)
    try:
        yield run
    finally:
        for client in run.clients:
            client.writer.close()
        await server.close()
        assert server.open_streams == 0
        assert server.assembled_bytes == 0
        assert not server.links
        assert all(session.closed for session in sessions)


@pytest.fixture
def address() -> Iterator[str]:
    folder = tempfile.mkdtemp(prefix="tg")
    yield f"unix:{folder}/s"
    shutil.rmtree(folder)


async def test_tcp() -> None:
    async with running(f"127.0.0.1:{free_port()}") as run:
        client = await run.connect()
        client.writer.write(headers(1) + data(1, message(b"hello")))
        assert (await client.until(frames.DATA)).payload == message(b"hello")


async def test_one_read_is_one_write(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes it fast: the answers to all streams that one read carries leave together."""
    writes: list[bytes] = []

    class Transport(asyncio.Transport):
        def write(self, data: bytes | bytearray | memoryview) -> None:
            writes.append(bytes(data))

        def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
            pass

    server = WireServer(address, lambda role, send, end: Echo(send, end), lambda: None)
    link = module._Link(server)
    link.connection_made(Transport())
    link.data_received(GREETING + SETTINGS_ACK)
    writes.clear()
    link.data_received(b"".join(headers(i) + data(i, message(b"x")) for i in range(1, 101, 2)))
    assert len(writes) == 1
    assert len([f for f in split(writes[0]) if f.kind == frames.DATA]) == 50
    sessions = [stream.owner._session for stream in link.connection.streams()]
    for session in sessions:
        session.send(b"later")
    await asyncio.sleep(0)
    assert len(writes) == 2
    link.connection_lost(None)
    assert server.open_streams == 0


async def test_a_deadline_ends_the_call_at_the_server_too(address: str) -> None:
    async with running(address) as run:
        client = await run.connect()
        client.writer.write(headers(1, block(grpc_timeout="20m")) + data(1, message(b"silent")))
        assert status(await client.until(frames.HEADERS, 1, END_STREAM)) == "4"
        await eventually(lambda: run.sessions[0].closed, "the session's close")


async def test_a_session_that_raises_ends_its_own_call_only(address: str) -> None:
    async with running(address) as run:
        client = await run.connect()
        client.writer.write(headers(1) + headers(3) + data(1, message(b"raise")) + data(3, message(b"fine")))
        assert status(await client.until(frames.HEADERS, 1, END_STREAM)) == "13"
        assert (await client.until(frames.DATA, 3)).payload == message(b"fine")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (message(b"half")[:-1], "13"),
        (b"\1" + message(b"compressed")[1:], "13"),
        (message(b"done"), "0"),
        (b"", "1"),
    ],
    ids=["half a message", "a compressed message", "done", "too early"],
)
async def test_half_closes(address: str, content: bytes, expected: str) -> None:
    async with running(address) as run:
        client = await run.connect()
        client.writer.write(headers(1) + data(1, content, END_STREAM))
        assert status(await client.until(frames.HEADERS, 1, END_STREAM)) == expected


async def test_a_clean_end_waits_for_the_answers_before_it(address: str) -> None:
    async with running(address) as run:
        client = await run.connect(frames.PREFACE + frames.settings({Setting.INITIAL_WINDOW_SIZE: 0}) + SETTINGS_ACK)
        client.writer.write(headers(1) + data(1, message(b"answer") + message(b"done"), END_STREAM))
        await client.until(frames.HEADERS)
        client.writer.write(frames.window_update(1, 1000))
        assert status(await client.until(frames.HEADERS, 1, END_STREAM)) == "0"
        assert [f.payload for f in client.seen if f.kind == frames.DATA] == [message(b"answer")]


async def test_two_messages_to_a_unary_call(address: str) -> None:
    async with running(address) as run:
        client = await run.connect()
        path = "/grpc.health.v1.Health/Check"
        client.writer.write(headers(1, block(**{":path": path})) + data(1, message(b"") * 2, END_STREAM))
        client.writer.write(headers(3, block(**{":path": path}), END_HEADERS | END_STREAM))
        assert status(await client.until(frames.HEADERS, 1, END_STREAM)) == "13"
        assert status(await client.until(frames.HEADERS, 3, END_STREAM)) == "13"


async def test_a_connection_error_is_told_before_the_close(address: str) -> None:
    async with running(address) as run:
        client = await run.connect()
        client.writer.write(headers(1) + data(1, message(b"silent")) + frames.frame(frames.PING, 0, 0, b""))
        client.writer.write(b"\0" * 100_000)  # unread input would turn the close into a reset
        assert goaway(await client.to_end()) == Code.FRAME_SIZE_ERROR
        client.writer.close()
        await eventually(lambda: run.sessions[0].closed, "the session's close")


async def test_a_lost_connection_closes_its_sessions(address: str) -> None:
    async with running(address) as run:
        client = await run.connect()
        client.writer.write(headers(1) + headers(3) + data(3, message(b"x")))
        await client.until(frames.DATA)
        client.writer.transport.abort()
        await run.server.idle(5)
        assert [session.closed for session in run.sessions] == [True, True]
        run.sessions[0].send(b"late")  # harmless
        run.sessions[0].end("late")


@pytest.mark.parametrize("greeting", [b"", frames.PREFACE[:5], GREETING], ids=["silent", "half", "no acknowledgement"])
async def test_a_handshake_that_never_ends(address: str, greeting: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HANDSHAKE_TIMEOUT_S", 0.05)
    async with running(address) as run:
        client = await run.connect(greeting)
        assert goaway(await client.to_end()) == Code.SETTINGS_TIMEOUT


async def test_too_many_connections(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 1)
    async with running(address) as run:
        first = await run.connect()
        await first.until(frames.SETTINGS)
        second = await run.connect(b"")
        assert await second.to_end() == []


async def test_parts_of_messages_are_bounded_together(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ASSEMBLED_BYTES", 1000)
    async with running(address) as run:
        client = await run.connect()
        half = message(b"x" * 1000)[:600]
        client.writer.write(headers(1) + data(1, half) + headers(3) + data(3, half))
        assert status(await client.until(frames.HEADERS, 3, END_STREAM)) == "8"
        client.writer.write(data(1, message(b"x" * 1000)[600:]))
        await client.until(frames.DATA, 1)
        assert run.server.assembled_bytes == 0


async def test_answers_that_are_not_read_are_bounded(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.transports.wire.connection.MAX_STREAM_QUEUED_BYTES", 1000)
    async with running(address) as run:
        client = await run.connect(frames.PREFACE + frames.settings({Setting.INITIAL_WINDOW_SIZE: 0}) + SETTINGS_ACK)
        client.writer.write(headers(1) + data(1, message(b"x" * 400) * 3))
        assert status(await client.until(frames.HEADERS, 1, END_STREAM)) == "8"
        await eventually(lambda: run.sessions[0].closed, "the session's close")


async def test_a_peer_that_only_writes_is_cut_off(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers outside flow control would otherwise pile up in memory."""
    monkeypatch.setattr(module, "WRITE_HIGH_WATER_BYTES", 0)
    monkeypatch.setattr(module, "MAX_UNREAD_CONTROL_BYTES", 10_000)
    monkeypatch.setattr("extproc.transports.wire.floods.FLOOD_BURST", 10**9)
    async with running(address) as run:
        client = await run.connect()
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]

        async def write() -> None:
            for _ in range(2000):
                client.writer.write(frames.frame(frames.PING, 0, 0, b"\0" * 8) * 1000)
                await client.writer.drain()

        with pytest.raises(OSError, match=r"reset|Broken|lost"):
            await write()
        await eventually(lambda: not run.server.links, "the connection's end")


async def test_closing_tells_every_call_and_waits_for_no_peer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINGER_S", 0.05)
    async with running(address) as run:
        client = await run.connect()
        client.writer.write(headers(1) + data(1, message(b"x")))
        await client.until(frames.DATA)
        await run.server.close()
        seen = await client.to_end()
        assert goaway(seen) == Code.NO_ERROR
        assert status(seen[-2]) == "14"
        assert resets(seen) == {1: Code.NO_ERROR}


def test_ten_thousand_streams_at_once(address: str) -> None:
    """Over five connections: each stream costs little while it is open, and nothing once it is gone."""

    async def main() -> None:
        async with running(address) as run:
            room = frames.window_update(0, 2**30)
            clients = [await run.connect(GREETING + SETTINGS_ACK + room) for _ in range(5)]
            ids = range(1, 4001, 2)
            tracemalloc.start()
            before, _ = tracemalloc.get_traced_memory()
            opening = b"".join(headers(i) for i in ids)
            for client in clients:
                client.writer.write(opening)
            await eventually(lambda: run.server.open_streams == 10_000, "all streams")
            after, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            assert (after - before) / 10_000 < 4096
            for turn in range(3):
                chunk = message(b"turn %d" % turn)
                sent = b"".join(data(i, chunk) for i in ids)
                for client in clients:
                    client.seen.clear()
                    client.writer.write(sent)
                for client in clients:
                    await client.until(frames.DATA, ids[-1])
                    answered = {f.stream_id: f.payload for f in client.seen if f.kind == frames.DATA}
                    assert answered == dict.fromkeys(ids, chunk)
            for client in clients:
                client.writer.write(b"".join(frames.rst_stream(i, Code.CANCEL) for i in ids))
            await run.server.idle(10)
            assert all(session.closed for session in run.sessions)

    uvloop.run(main())
