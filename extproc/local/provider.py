"""A scripted provider: answers requests with scripts, at any pace, cut into any chunks, and with any fault.

The local stack uses it to replay recorded answers where there is no provider's key; the tests use its faults.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import h11

from extproc.local.http import read_request


@dataclass(frozen=True, slots=True)
class Script:
    """One answer. `chunks` go out as they are, `pause_s` apart; `fault` says what happens after the last of them.

    Faults: "reset" closes the connection hard, "close" without the closing chunk, "hang" leaves it open and silent;
    "drop" closes it hard instead of any answer.
    """

    status: int = 200
    headers: tuple[tuple[str, str], ...] = (("content-type", "text/event-stream"),)
    chunks: Sequence[bytes] = ()
    pause_s: float = 0.0
    first_pause_s: float = 0.0
    fault: str | None = None
    whole: bool = False  # with content-length instead of chunks
    trailers: tuple[tuple[str, str], ...] = ()  # after the closing chunk


@dataclass(slots=True)
class Received:
    """One request as the provider saw it, and what became of its answer."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    chunks_sent: int = 0
    ended: str = ""  # "whole", "gone" (the gateway closed first) or the fault
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def header(self, name: str) -> str | None:
        """The value of a header, or None."""
        return dict(self.headers).get(name)


class ScriptedProvider:
    """An HTTP/1.1 server on loopback. `choose` gives the script for each request."""

    def __init__(self, choose: Callable[[Received], Script]) -> None:
        self.received: list[Received] = []
        self.connections = 0
        self.port = 0
        self._choose = choose
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self, tls: ssl.SSLContext | None = None, port: int = 0) -> None:
        """Listen; `port` is known afterwards. Raises OSError."""
        self._server = await asyncio.start_server(self._on_connection, "127.0.0.1", port, ssl=tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        if self._server is not None:
            self._server.close()
        for task in tuple(self._open):
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.create_task(self._converse(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while (asked := await read_request(h11.Connection(h11.SERVER), reader)) is not None:
                request = Received(asked.method, asked.target, asked.headers, asked.body)
                self.received.append(request)
                script = self._choose(request)
                try:
                    await _play(script, request, reader, writer)
                finally:
                    request.ended = request.ended or "gone"
                    request.done.set()
                if script.fault is not None:
                    return
        except OSError:
            pass  # the gateway closed first, as a cut does
        finally:
            writer.close()


async def _play(script: Script, request: Received, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    length = sum(map(len, script.chunks)) if script.whole else None
    framing = ("transfer-encoding", "chunked") if length is None else ("content-length", str(length))
    lines = [f"HTTP/1.1 {script.status} Scripted", *(f"{name}: {value}" for name, value in (*script.headers, framing))]
    gone = asyncio.ensure_future(reader.read(1))  # a client that waits for its answer sends nothing but its end
    try:
        if script.first_pause_s:
            await asyncio.wait((gone,), timeout=script.first_pause_s)
        if gone.done():
            return
        if script.fault == "drop":
            await _end(script, request, writer, gone)
            return
        writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n")
        for chunk in script.chunks:
            if gone.done():
                return
            writer.write(chunk if script.whole else b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await writer.drain()
            request.chunks_sent += 1
            if script.pause_s:
                await asyncio.wait((gone,), timeout=script.pause_s)
        await _end(script, request, writer, gone)
    finally:
        gone.cancel()
        with suppress(asyncio.CancelledError, OSError):
            await gone


async def _end(script: Script, request: Received, writer: asyncio.StreamWriter, gone: asyncio.Future[bytes]) -> None:
    request.ended = script.fault or "whole"
    match script.fault:
        case "reset" | "drop":
            writer.transport.abort()
        case "hang":
            await gone
        case None if not script.whole:
            lines = ("0", *(f"{name}: {value}" for name, value in script.trailers), "", "")
            writer.write("\r\n".join(lines).encode("latin-1"))
            await writer.drain()
