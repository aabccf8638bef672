"""The load generator, the same for all: HTTP/1.1 over kept-alive connections, with prebuilt requests and no tasks.

Every answer is checked: its status, its end, and the number of its words. Anything else raises Unanswered.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from bench.provider import WORD

_NO_TIME_WAIT = struct.pack("ii", 1, 0)  # SO_LINGER: a reset, so that 10,000 closed connections hold no ports
_PATIENCE_S = 60.0


class Unanswered(Exception):
    """A request failed. The message says how."""


@dataclass(slots=True)
class Answer:
    """One answer, as it came. Seconds of the monotonic clock; `words` holds each word's arrival."""

    begun: float = 0.0
    ended: float = 0.0
    status: int = 0
    words: array[float] = field(default_factory=lambda: array("d"))


class Connection(asyncio.Protocol):
    """One request at a time. `then` is called at its end, and raises nothing; `failed` with what went wrong."""

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        self.transport: asyncio.Transport
        self.answer = Answer()
        self.busy = False
        self._failed = failed
        self._then: Callable[[Connection], None]
        self._first: Callable[[], None] | None = None
        self._keep_words = False
        self._only_ok = True
        self._head = b""
        self._left: int | None = None  # of the body; -1 where it is chunked
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        raw = transport.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_TIME_WAIT)

    def ask(
        self,
        message: bytes,
        then: Callable[[Connection], None],
        *,
        words: bool = False,
        first: Callable[[], None] | None = None,
        only_ok: bool = True,
    ) -> None:
        """Send it. `words` keeps the arrival of each; `first` is called at the first of them."""
        self._then, self._keep_words, self._first, self._only_ok = then, words, first, only_ok
        self._head, self._left, self._tail, self.busy = b"", None, b"", True
        self.answer = Answer(time.perf_counter())
        self.transport.write(message)

    def close(self) -> None:
        self.busy = False
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._left is None:
            head, separator, data = (self._head + data).partition(b"\r\n\r\n")
            if not separator:
                self._head = head
                return
            self.answer.status = int(head[9:12])
            if self._only_ok and self.answer.status != 200:
                self._fail(f"answered {(head + data)[:600]!r}")
                return
            length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
            self._left = int(length) if length else -1
        if self._keep_words:
            self._note(data)
        if self._left >= 0:
            self._left -= len(data)
            if self._left <= 0:
                self._end()
            return
        self._tail = (self._tail + data)[-7:]
        if self._tail == b"\r\n0\r\n\r\n":
            self._end()

    def connection_lost(self, error: Exception | None) -> None:
        if self.busy:
            self._fail(f"the connection broke in the middle of an answer: {error}")

    def _note(self, data: bytes) -> None:
        """A word may come in two reads: the end of the one before is searched again, too short to hold a whole one."""
        count = (self._tail[-len(WORD) + 1 :] + data).count(WORD)
        if count:
            now = time.perf_counter()
            self.answer.words.extend([now] * count)
            if self._first is not None:
                self._first()
                self._first = None

    def _end(self) -> None:
        self.answer.ended, self.busy = time.perf_counter(), False
        self._then(self)

    def _fail(self, what: str) -> None:
        self.busy = False
        self._failed(Unanswered(what))
        self.transport.abort()


class Client:
    """Some connections to one port. As a context manager, it closes them."""

    def __init__(self, port: int, connections: int) -> None:
        self._port = port
        self._count = connections
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connections: list[Connection] = []

    async def __aenter__(self) -> Client:
        await self.grow(self._count)
        return self

    async def __aexit__(self, *_: object) -> None:
        for connection in self.connections:
            connection.close()
        if self._done.done() and not self._done.cancelled():
            self._done.exception()  # seen
        await asyncio.sleep(0)

    async def grow(self, count: int) -> list[Connection]:
        """Open more. Their addresses are spread over the loopback network, which has more ports than one address."""
        loop = asyncio.get_running_loop()
        new: list[Connection] = []
        for _ in range(count):
            local = (f"127.0.0.{2 + len(self.connections) % 32}", 0)
            _, connection = await loop.create_connection(
                lambda: Connection(self.fail), "127.0.0.1", self._port, local_addr=local
            )
            self.connections.append(connection)
            new.append(connection)
        return new

    def fail(self, error: Exception) -> None:
        if not self._done.done():
            self._done.set_exception(error)

    def finish(self) -> None:
        if not self._done.done():
            self._done.set_result(None)

    async def done(self, patience_s: float) -> None:
        """Until `finish`. Raises Unanswered where a request failed, or nothing came."""
        try:
            await asyncio.wait_for(asyncio.shield(self._done), patience_s)
        except TimeoutError:
            raise Unanswered(f"no end after {patience_s:.0f} s") from None


@dataclass(frozen=True, slots=True)
class Load:
    """What a run of requests took: seconds of each, sorted, and of all together."""

    seconds: list[float]
    elapsed_s: float


async def requests(port: int, message: bytes, *, connections: int, seconds: float) -> Load:
    """For so long, over so many connections, each with one request under way."""
    taken: list[float] = []
    stop = 0.0
    running = connections

    def next_one(connection: Connection) -> None:
        nonlocal running
        answer = connection.answer
        taken.append(answer.ended - answer.begun)
        if answer.ended < stop:
            connection.ask(message, next_one)
        else:
            running -= 1
            if not running:
                client.finish()

    async with Client(port, connections) as client:
        begun = time.perf_counter()
        stop = begun + seconds
        for connection in client.connections:
            connection.ask(message, next_one)
        await client.done(seconds + _PATIENCE_S)
        return Load(sorted(taken), time.perf_counter() - begun)


async def ask(port: int, message: bytes, *, only_ok: bool = True, patience_s: float = _PATIENCE_S) -> Answer:
    """One request on a connection of its own."""
    async with Client(port, 1) as client:
        client.connections[0].ask(message, lambda _: client.finish(), words=True, only_ok=only_ok)
        await client.done(patience_s)
        return client.connections[0].answer


async def streams(
    port: int, message: bytes, *, count: int, words: int, expected_s: float, in_turn: int = 1
) -> list[Answer]:
    """So many streams at once, their beginnings spread over 20 ms; on each connection `in_turn`, one by one.

    `expected_s` is how long one takes where nobody is slow. Raises Unanswered where one has too many words or too few.
    """
    loop = asyncio.get_running_loop()
    answers: list[Answer] = []

    def ended(connection: Connection) -> None:
        if len(connection.answer.words) != words:
            client.fail(Unanswered(f"{len(connection.answer.words)} of {words} words"))
        answers.append(connection.answer)
        if len(answers) == count * in_turn:
            client.finish()
        elif len(answers) + count <= count * in_turn:
            connection.ask(message, ended, words=True)

    async with Client(port, count) as client:
        for number, connection in enumerate(client.connections):
            loop.call_later(0.02 * number / count, partial(connection.ask, message, ended, words=True))
        await client.done(expected_s * in_turn * 10 + _PATIENCE_S)
    return answers


async def open_streams(client: Client, message: bytes, *, count: int, seconds: float, at_once: int = 32) -> int:
    """Open streams that stay open, until there are `count` or time is over. Returns how many have got a first word."""
    opened = 0
    stop = time.perf_counter() + seconds
    while opened < count and time.perf_counter() < stop:
        opened += await _open_batch(client, message, min(at_once, count - opened))
    return opened


async def _open_batch(client: Client, message: bytes, count: int) -> int:
    begun: list[None] = []
    all_begun = asyncio.Event()

    def first() -> None:
        begun.append(None)
        if len(begun) == count:
            all_begun.set()

    for connection in await client.grow(count):
        connection.ask(message, lambda _: client.fail(Unanswered("an idle stream ended")), words=True, first=first)
    waits = asyncio.ensure_future(all_begun.wait())
    failure = asyncio.ensure_future(client.done(_PATIENCE_S))
    try:
        await asyncio.wait((waits, failure), return_when=asyncio.FIRST_COMPLETED)
        if not all_begun.is_set():
            failure.result()
    finally:
        waits.cancel()
        failure.cancel()
    return count
