"""A load generator that costs little itself: raw HTTP/1.1 over kept-alive connections, with whole requests prebuilt."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import cast


def request(port: int, token: str, body: bytes) -> bytes:
    """One POST /v1/chat/completions."""
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\nauthorization: Bearer %s\r\n"
        b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
    ) % (port, token.encode(), len(body), body)


@dataclass(frozen=True, slots=True)
class Load:
    """What a run of requests took: seconds of each, and of all together."""

    seconds: tuple[float, ...]
    elapsed_s: float


class _Client(asyncio.Protocol):
    """One connection with one request at a time; `done` resolves at the end of each answer."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self._head = b""
        self._left: int | None = None
        self._done: asyncio.Future[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def ask(self, message: bytes) -> asyncio.Future[None]:
        self._head, self._left = b"", None
        self._done = asyncio.get_running_loop().create_future()
        self.transport.write(message)
        return self._done

    def close(self) -> None:
        self._done.cancel()
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                self._finish(RuntimeError(f"not answered: {self._head[:400]!r}"))
                return
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self._left = int(length) if length else -1
        if self._left >= 0:
            self._left -= len(data)
            if self._left <= 0:
                self._finish(None)
        elif data.endswith(b"0\r\n\r\n"):
            self._finish(None)

    def connection_lost(self, _: Exception | None) -> None:
        self._finish(RuntimeError("the connection was closed"))

    def _finish(self, error: Exception | None) -> None:
        if not self._done.done():
            if error is None:
                self._done.set_result(None)
            else:
                self._done.set_exception(error)


async def run(port: int, message: bytes, *, requests: int, connections: int) -> Load:
    """Send `requests` over `connections`, each with one under way. Raises RuntimeError where one is not a 200."""
    loop = asyncio.get_running_loop()
    seconds: list[float] = []
    left = requests

    async def work() -> None:
        nonlocal left
        _, client = await loop.create_connection(_Client, "127.0.0.1", port)
        while left > 0:
            left -= 1
            begun = time.perf_counter()
            await client.ask(message)
            seconds.append(time.perf_counter() - begun)
        client.close()

    begun = time.perf_counter()
    await asyncio.gather(*(work() for _ in range(connections)))
    return Load(tuple(seconds), time.perf_counter() - begun)
