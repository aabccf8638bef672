"""A small HTTP/1.1 server for the local stack and the tests, on loopback only: h11 on asyncio streams."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from ipaddress import ip_address

import h11

from extproc.limits import MAX_REQUEST_BYTES

log = logging.getLogger(__name__)

_READ_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Request:
    """One request, whole. Header names are in lower case."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class Response:
    """One answer, whole. `content-length` is added."""

    status: int
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


Handler = Callable[[Request], Awaitable[Response]]


async def serve(handler: Handler, host: str = "127.0.0.1", port: int = 0) -> Server:
    """Listen on a loopback address; port 0 takes a free one. Raises ValueError for any other address, or OSError."""
    if not ip_address(host).is_loopback:
        raise ValueError(f"{host} is not a loopback address")
    server = Server(handler)
    await server.listen(host, port)
    return server


class Server:
    """A running server; made by `serve`."""

    def __init__(self, handler: Handler) -> None:
        self.port = 0
        self._handler = handler
        self._listener: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def listen(self, host: str, port: int) -> None:
        """Take connections from now on; `port` is known afterwards."""
        self._listener = await asyncio.start_server(self._on_connection, host, port)
        self.port = self._listener.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening, and end every connection."""
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._converse(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER)
        try:
            while request := await read_request(connection, reader):
                writer.write(_render(connection, await self._answer(request)))
                await writer.drain()
                if connection.our_state is not h11.DONE:
                    break
                connection.start_next_cycle()
        except (OSError, h11.ProtocolError):
            pass  # the client went away, or does not speak HTTP
        finally:
            writer.close()

    async def _answer(self, request: Request) -> Response:
        try:
            return await self._handler(request)
        except Exception:
            log.exception("the handler of %s %s failed", request.method, request.target)
            return Response(500)


async def read_request(connection: h11.Connection, reader: asyncio.StreamReader) -> Request | None:
    """The connection's next request, or None at its end."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_READ_BYTES))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_REQUEST_BYTES:
                return None
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            return Request(head.method.decode(), head.target.decode(), _decoded(head), bytes(body))
        else:
            return None


def _decoded(head: h11.Request) -> tuple[tuple[str, str], ...]:
    return tuple((name.decode(), value.decode("latin-1")) for name, value in head.headers)


def _render(connection: h11.Connection, response: Response) -> bytes:
    headers = [*response.headers, ("content-length", str(len(response.body)))]
    events = (h11.Response(status_code=response.status, headers=headers), h11.Data(response.body), h11.EndOfMessage())
    return b"".join(connection.send(event) or b"" for event in events)
