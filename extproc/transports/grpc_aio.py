"""The reference transport: grpcio's asyncio server on a Unix socket or a TCP port."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

import grpc

from extproc.limits import LINGER_S, MAX_MESSAGE_BYTES
from extproc.transports import ROLE, SERVICE, Open, Session, probe
from extproc.transports.probe import Lacking


class GrpcServer:
    """Serves `Process` and the health service, on `unix:/path` or `host:port`.

    `open_session(role, send, end)` makes the session of a stream, or None for an unknown role.
    """

    def __init__(self, address: str, open_session: Open, lacking: Lacking) -> None:
        self.open_streams = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = open_session
        self._lacking = lacking
        self._server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
                ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                ("grpc.http2.max_ping_strikes", 0),  # Envoy pings every second to see a hang
            ]
        )
        process = grpc.stream_stream_rpc_method_handler(self._process)  # bytes in, bytes out
        check = grpc.unary_unary_rpc_method_handler(self._check)
        self._server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, {"Process": process}),
                grpc.method_handlers_generic_handler(probe.SERVICE, {"Check": check}),
            )
        )
        self._server.add_insecure_port(address)

    async def start(self) -> None:
        """Take streams from now on."""
        await self._server.start()

    async def idle(self, timeout_s: float) -> None:
        """Return when no stream is open, or when the time is over."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)

    async def close(self) -> None:
        """Take no new streams, and end those that are open with an error."""
        await self._server.stop(0)
        await self.idle(LINGER_S)  # the calls' tasks see that only now, and their sessions settle as they end

    async def _check(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        answer = probe.check(request, self._lacking)
        if answer is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "only the server as a whole is known")
        return answer

    async def _process(self, _: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        role = dict(context.invocation_metadata() or ()).get(ROLE, "")
        stream = _Stream(context)
        session = self._open(str(role), stream.send, stream.end)
        if session is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "unknown role")
            return
        self.open_streams += 1
        self._idle.clear()
        try:
            await stream.run(session)
        finally:
            session.close()
            self.open_streams -= 1
            if not self.open_streams:
                self._idle.set()


class _Stream:
    """One call: reads in order, and writes what the session sends, also between two reads."""

    def __init__(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        self._context = context
        self._outbox: deque[bytes] = deque()
        self._flushing: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()

    def send(self, message: bytes) -> None:
        if self._ended.done():
            return
        self._outbox.append(message)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.ensure_future(self._flush())
            self._flushing.add_done_callback(_seen)

    def end(self, reason: str | None) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)

    async def run(self, session: Session) -> None:
        """Until Envoy closes the stream, or the session ends it. Returns only where the end is a clean one."""
        reading = asyncio.ensure_future(self._read(session))
        try:
            await asyncio.wait((reading, self._ended), return_when=asyncio.FIRST_COMPLETED)
            failure = self._failure(reading, session)
            if failure is None and self._flushing is not None:
                await self._flushing
        finally:
            reading.cancel()
            self._outbox.clear()
            if self._flushing is not None:  # gRPC takes no status while a write is under way
                await asyncio.wait((self._flushing,))
        if failure is not None:
            await self._context.abort(*failure)

    def _failure(self, reading: asyncio.Future[None], session: Session) -> tuple[grpc.StatusCode, str] | None:
        """Why the end is not a good one, or None."""
        if self._ended.done():
            reason = self._ended.result()
            return None if reason is None else (grpc.StatusCode.INTERNAL, reason)
        reading.result()
        return None if session.done else (grpc.StatusCode.CANCELLED, "closed before the end of the request")

    async def _read(self, session: Session) -> None:
        while (message := await self._context.read()) is not grpc.aio.EOF:  # type: ignore[attr-defined]
            session.feed(message)

    async def _flush(self) -> None:
        """One writer at a time: gRPC takes one write after the other."""
        while self._outbox:
            await self._context.write(self._outbox.popleft())


def _seen(flushing: asyncio.Task[None]) -> None:
    """A write fails where Envoy has reset the stream, which ends `run` too: not worth asyncio's complaint."""
    if not flushing.cancelled():
        flushing.exception()
