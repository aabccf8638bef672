"""The asyncio shell: sockets, timers, and the sessions on a connection's streams."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Protocol, cast

from extproc.limits import (
    HANDSHAKE_TIMEOUT_S,
    LINGER_S,
    MAX_ASSEMBLED_BYTES,
    MAX_CONNECTIONS,
    MAX_UNREAD_CONTROL_BYTES,
    WRITE_HIGH_WATER_BYTES,
)
from extproc.transports import Open, Session, probe
from extproc.transports.probe import Lacking
from extproc.transports.wire.connection import Connection
from extproc.transports.wire.frames import Code
from extproc.transports.wire.grpc import PREFIX, RESPONSE_BLOCK, Call, Failed, Messages, Method, Refusal, Status
from extproc.transports.wire.grpc import call as call_of
from extproc.transports.wire.grpc import trailers as trailers_of
from extproc.transports.wire.streams import Data, Ended, Opened, Stream, StreamEvent

_log = logging.getLogger(__name__)

_COPIED_BYTES = 16_384  # a longer message is not copied to stand in one piece with its prefix


class WireServer:
    """Serves `Process` and the health service, on `unix:/path` or `host:port`.

    `open_session(role, send, end)` makes the session of a stream, or None for an unknown role.
    """

    def __init__(self, address: str, open_session: Open, lacking: Lacking) -> None:
        self.open_streams = 0
        self.open_session = open_session
        self.lacking = lacking
        self.links: set[_Link] = set()
        self.assembled_bytes = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._address = address
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Take streams from now on. Raises OSError."""
        loop = asyncio.get_running_loop()
        if self._address.startswith("unix:"):
            self._server = await loop.create_unix_server(lambda: _Link(self), self._address.removeprefix("unix:"))
        else:
            host, _, port = self._address.rpartition(":")
            self._server = await loop.create_server(lambda: _Link(self), host.strip("[]"), int(port))

    async def idle(self, timeout_s: float) -> None:
        """Return when no stream is open, or when the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def close(self) -> None:
        """Take no new streams, and end those that are open with an error."""
        if self._server is not None:
            self._server.close()
        for link in tuple(self.links):
            link.shut_down()
        if lost := [link.lost for link in self.links]:
            await asyncio.wait(lost)  # each within LINGER_S

    def count(self, change: int) -> None:
        """One stream more or less."""
        self.open_streams += change
        if self.open_streams:
            self._idle.clear()
        else:
            self._idle.set()


class _Owner(Protocol):
    """Who answers a stream."""

    def data(self, data: bytes) -> None:
        """Some of the call's content."""

    def ended(self) -> None:
        """No more will come."""

    def gone(self) -> None:
        """The stream was reset."""

    def stop(self, status: Status, message: str) -> None:
        """End with an error."""


class _Link(asyncio.Protocol):
    """One connection. All that one read brings about, and all that happens in one turn of the loop, is one write."""

    def __init__(self, server: WireServer) -> None:
        self.server = server
        self.loop = asyncio.get_running_loop()
        self.connection = Connection(self.loop.time)
        self.lost: asyncio.Future[None] = self.loop.create_future()
        self._transport: asyncio.Transport
        self._ended: list[_Processing] = []  # calls whose sessions are yet to be closed
        self._flushes = False  # a flush will come
        self._paused = False
        self._unread_bytes = 0
        self._ending = False
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_HIGH_WATER_BYTES)
        self.server.links.add(self)
        if len(self.server.links) > MAX_CONNECTIONS:
            self._transport.abort()
            return
        self._timer = self.loop.call_later(HANDSHAKE_TIMEOUT_S, self._check_handshake)
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._flushes = True
        for event in self.connection.receive(data):
            self._handle(event)
        self._flush()

    def eof_received(self) -> None:
        """The transport closes itself."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._ending = True  # nothing can be written any more
        if self._timer is not None:
            self._timer.cancel()
        for event in self.connection.give_up(Code.NO_ERROR, "lost"):
            self._handle(event)
        self._close_ended()
        self.server.links.discard(self)
        self.lost.set_result(None)

    def pause_writing(self) -> None:
        self._paused = True
        self.connection.pause()

    def resume_writing(self) -> None:
        self._paused = False
        self._unread_bytes = 0
        self.connection.resume()
        self._flush()

    def flush_soon(self) -> None:
        """Write what was sent, at the end of this turn of the loop."""
        if not self._flushes:
            self._flushes = True
            self.loop.call_soon(self._flush)

    def close_session(self, processing: _Processing) -> None:
        """Close a call's session once what it is doing is done."""
        self._ended.append(processing)
        self.flush_soon()

    def shut_down(self) -> None:
        """End every call with an error, and then the connection."""
        self.connection.drain()
        for stream in self.connection.streams():
            if stream.owner is not None:
                stream.owner.stop(Status.UNAVAILABLE, "the processor is shutting down")
        self._flush()
        if not self._ending:  # answers still wait for the peer's windows
            self.loop.call_later(LINGER_S, self._transport.abort)

    def _handle(self, event: StreamEvent) -> None:
        owner: _Owner | None = event.stream.owner
        if owner is not None and isinstance(event, Data):  # nearly every one
            owner.data(event.data)
        elif isinstance(event, Opened):
            self._open(event.stream, event)
        elif owner is None:
            return  # refused
        elif isinstance(event, Ended):
            owner.ended()
        else:
            owner.gone()

    def _open(self, stream: Stream, event: Opened) -> None:
        call = call_of(event.fields)
        if isinstance(call, Refusal):
            self.connection.finish(stream, call.block)
        elif call.method is Method.CHECK:
            stream.owner = _Checking(self, stream, call)
        else:
            stream.owner = _Processing(self, stream, call)

    def _flush(self) -> None:
        self._close_ended()
        self._flushes = False
        data = self.connection.take()
        if data and not self._ending:
            if self._paused:
                self._unread_bytes += len(data)
                if self._unread_bytes > MAX_UNREAD_CONTROL_BYTES:
                    self._transport.abort()
                    return
            self._transport.write(data)
        if self.connection.over and not self._ending:
            self._end()

    def _close_ended(self) -> None:
        while self._ended:
            self._ended.pop().close()

    def _end(self) -> None:
        """Our last bytes are written. Closed at once, with input unread, the socket would take them from the peer."""
        self._ending = True
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_later(LINGER_S, self._transport.abort)
        with suppress(OSError):
            self._transport.write_eof()

    def _check_handshake(self) -> None:
        if not self.connection.acknowledged:
            for event in self.connection.give_up(Code.SETTINGS_TIMEOUT, "no acknowledgement of SETTINGS"):
                self._handle(event)
            self._flush()


class _Processing:
    """One call of `Process`: what goes between a stream and its session."""

    __slots__ = ("_closed", "_held_bytes", "_link", "_messages", "_over", "_session", "_stream", "_timer")

    def __init__(self, link: _Link, stream: Stream, call: Call) -> None:
        self._link = link
        self._stream = stream
        self._messages = Messages(call.encoded)
        self._held_bytes = 0
        self._over = False  # nothing more is taken or sent
        self._closed = True
        self._timer: asyncio.TimerHandle | None = None
        self._session: Session | None = link.server.open_session(call.role, self.send, self.end)
        if self._session is None:
            self.stop(Status.INVALID_ARGUMENT, "unknown role")
            return
        self._closed = False
        link.server.count(1)
        if call.timeout_s is not None and not self._over:
            self._timer = link.loop.call_later(call.timeout_s, self._expire)

    def send(self, message: bytes) -> None:
        """One message of the session's."""
        if self._over:
            return
        connection, stream = self._link.connection, self._stream
        if not stream.answered:
            connection.respond(stream, RESPONSE_BLOCK)
        length = len(message)
        prefix = PREFIX.pack(0, length)
        if length <= _COPIED_BYTES:
            taken = connection.send(stream, prefix + message)
        else:
            taken = connection.send(stream, prefix) and connection.send(stream, message)
        if not taken:
            self.stop(Status.RESOURCE_EXHAUSTED, "too many answers wait to be read")
        self._link.flush_soon()

    def end(self, reason: str | None) -> None:
        """The session's last word."""
        if self._over:
            return
        if reason is not None:
            self.stop(Status.INTERNAL, reason)
            return
        self._link.connection.finish(self._stream, trailers_of(Status.OK, alone=not self._stream.answered))
        self._finished()

    def data(self, data: bytes) -> None:
        if self._over or self._session is None:
            return
        try:
            for message in self._messages.feed(data):
                self._session.feed(message)
                if self._over:
                    return
        except Failed as failed:
            self.stop(failed.status, str(failed))
        except Exception:
            _log.exception("a message could not be processed")
            self.stop(Status.INTERNAL, "internal error")
        if self._messages.held_bytes != self._held_bytes:
            self._account()

    def ended(self) -> None:
        if self._over or self._session is None:
            return
        if self._messages.held_bytes:
            self.stop(Status.INTERNAL, "the call ends within a message")
        elif self._session.done:
            self.end(None)
        else:
            # Envoy lets the request pass after a clean close, whoever closed first.
            self.stop(Status.CANCELLED, "closed before the end of the request")

    def gone(self) -> None:
        self._finished()

    def stop(self, status: Status, message: str) -> None:
        if not self._over:
            block = trailers_of(status, message, alone=not self._stream.answered)
            self._link.connection.finish(self._stream, block, at_once=True)
            self._finished()

    def close(self) -> None:
        """Close the session: once, and never from within it."""
        if not self._closed and self._session is not None:
            self._closed = True
            self._link.server.count(-1)
            self._session.close()

    def _finished(self) -> None:
        self._over = True
        self._link.server.assembled_bytes -= self._held_bytes
        self._held_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._link.close_session(self)

    def _expire(self) -> None:
        self.stop(Status.DEADLINE_EXCEEDED, "the call's deadline has passed")

    def _account(self) -> None:
        """Parts of messages are bounded over all calls: as many as can be open, each with a large one, are too much."""
        if self._over:
            return
        held_bytes = self._messages.held_bytes
        self._link.server.assembled_bytes += held_bytes - self._held_bytes
        self._held_bytes = held_bytes
        if self._link.server.assembled_bytes > MAX_ASSEMBLED_BYTES:
            self.stop(Status.RESOURCE_EXHAUSTED, "too many large messages at once")


class _Checking:
    """One call of the health service's `Check`."""

    __slots__ = ("_link", "_messages", "_request", "_stream")

    def __init__(self, link: _Link, stream: Stream, call: Call) -> None:
        self._link = link
        self._stream = stream
        self._messages = Messages(call.encoded)
        self._request: bytes | None = None

    def data(self, data: bytes) -> None:
        try:
            for message in self._messages.feed(data):
                if self._request is not None:
                    raise Failed(Status.INTERNAL, "more than one message")
                self._request = message
        except Failed as failed:
            self.stop(failed.status, str(failed))

    def ended(self) -> None:
        if self._request is None or self._messages.held_bytes:
            self.stop(Status.INTERNAL, "no message")
            return
        answer = probe.check(self._request, self._link.server.lacking)
        if answer is None:
            self.stop(Status.NOT_FOUND, "only the server as a whole is known")
            return
        connection = self._link.connection
        connection.respond(self._stream, RESPONSE_BLOCK)
        connection.send(self._stream, PREFIX.pack(0, len(answer)) + answer)
        connection.finish(self._stream, trailers_of(Status.OK))

    def gone(self) -> None:
        """Nothing was kept."""

    def stop(self, status: Status, message: str) -> None:
        block = trailers_of(status, message, alone=not self._stream.answered)
        self._link.connection.finish(self._stream, block, at_once=True)
