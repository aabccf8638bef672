"""The cheapest provider that can be written in Python, so that what is measured is the gateway."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import cast

import orjson

CHUNK = orjson.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "gpt-4o",
        "choices": [{"index": 0, "delta": {"content": " word"}, "logprobs": None, "finish_reason": None}],
        "usage": None,
    }
)
ANSWER = orjson.dumps(
    {
        "id": "chatcmpl-bench",
        "object": "chat.completion",
        "created": 1,
        "model": "gpt-4o",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello!"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    }
)


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_WHOLE = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (len(ANSWER), ANSWER)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
_EVENT = _chunked(b"data: " + CHUNK + b"\n\n")


def _tail(events: int) -> bytes:
    usage = {"prompt_tokens": 9, "completion_tokens": events, "total_tokens": 9 + events}
    closing = orjson.dumps({"id": "chatcmpl-bench", "object": "chat.completion.chunk", "choices": [], "usage": usage})
    return _chunked(b"data: " + closing + b"\n\n") + _chunked(b"data: [DONE]\n\n") + b"0\r\n\r\n"


@dataclass(slots=True)
class Pace:
    """How streams are sent: so many events, so far apart."""

    events: int = 100
    gap_s: float = 0.01


class Provider(asyncio.Protocol):
    """One connection. A body that says `"stream":true` gets events, any other the whole answer."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._buffer = b""
        self._transport: asyncio.Transport
        self._tasks: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        for task in self._tasks:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, separator, rest = self._buffer.partition(b"\r\n\r\n")
        if not separator:
            return
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
        if len(rest) < length:
            return
        self._buffer = rest[length:]
        if b'"stream":true' in rest:
            task = asyncio.ensure_future(self._stream())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._transport.write(_WHOLE)

    async def _stream(self) -> None:
        self._transport.write(_HEAD)
        for _ in range(self._pace.events):
            self._transport.write(_EVENT)
            if self._pace.gap_s:
                await asyncio.sleep(self._pace.gap_s)
        self._transport.write(_tail(self._pace.events))


@dataclass(slots=True)
class Server:
    """A running provider."""

    pace: Pace = field(default_factory=Pace)
    port: int = 0
    _server: asyncio.Server | None = None

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: Provider(self.pace), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        assert self._server is not None
        self._server.close()
