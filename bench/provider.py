"""The provider that all gateways are measured against: as cheap as Python can be, in a process of its own.

`python -m bench.provider` prints its port. What an answer looks like is written in the prompt, which every gateway
passes on: see `pace`. At Anthropic's path it is one of Anthropic's, and a model called FAILS is answered 500. Events
leave on a schedule that does not shift when one is late, and how late the latest was
is told at `GET /lateness`, so that a slow provider is not taken for a slow gateway.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple, cast

import orjson
import uvloop

WORD = b" word"  # one token in both of OpenAI's vocabularies
_PACE = re.compile(rb"\[(\d+) events of (\d+) tokens, (\d+) us apart\]")
_STREAM = re.compile(rb'"stream":\s*true')
_LENGTH = re.compile(rb"\r\ncontent-length:\s*(\d+)", re.IGNORECASE)
FAILS = "fails"
_FAILS = re.compile(rb'"model":\s*"%s"' % FAILS.encode())
_EDGE_BYTES = 4096  # where a large body's pace and options are looked for

_COMMON = {"id": "chatcmpl-bench", "created": 1, "model": "gpt-4o"}
WHOLE_ANSWER = orjson.dumps(
    {
        **_COMMON,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello!"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
    }
)


def pace(events: int, gap_us: int, tokens: int = 1) -> str:
    """What a prompt says to have its answer streamed like this."""
    return f"[{events} events of {tokens} tokens, {gap_us} us apart]"


def _json(body: bytes, status: bytes = b"200 OK") -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def _chunk(event: bytes) -> bytes:
    data = _sse(event)
    return b"%x\r\n%s\r\n" % (len(data), data)


_WHOLE = _json(WHOLE_ANSWER)
_FAILURE = _json(
    orjson.dumps({"error": {"message": "It fails.", "type": "server_error"}}), b"500 Internal Server Error"
)
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def _sse(event: bytes) -> bytes:
    return b"data: " + event + b"\n\n"


def stream_event(tokens: int) -> bytes:
    """One event with so many words."""
    return _sse(_delta({"content": (WORD * tokens).decode()}, None))


def _delta(delta: dict[str, str], finish: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return orjson.dumps({**_COMMON, "object": "chat.completion.chunk", "choices": [choice], "usage": None})


@lru_cache
def _event(tokens: int) -> bytes:
    return _chunk(_delta({"content": (WORD * tokens).decode()}, None))


@lru_cache
def _end(tokens: int) -> bytes:
    usage = {"prompt_tokens": 9, "completion_tokens": tokens, "total_tokens": 9 + tokens}
    closing = {**_COMMON, "object": "chat.completion.chunk", "choices": [], "usage": usage}
    return _chunk(_delta({}, "stop")) + _chunk(orjson.dumps(closing)) + _chunk(b"[DONE]") + b"0\r\n\r\n"


# Anthropic's ----------------------------------------------------------------------------------------------------------

_MESSAGE = {"id": "msg_bench", "type": "message", "role": "assistant", "model": "claude-haiku-4-5"}
_CLAUDES_WHOLE = _json(
    orjson.dumps(
        {
            **_MESSAGE,
            "content": [{"type": "text", "text": "Hello!"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 9, "output_tokens": 2},
        }
    )
)


def _claudes(kind: str, **fields: object) -> bytes:
    data = b"event: %s\n%s" % (kind.encode(), _sse(orjson.dumps({"type": kind, **fields})))
    return b"%x\r\n%s\r\n" % (len(data), data)


_NOTHING_YET: dict[str, object] = {
    **_MESSAGE,
    "content": [],
    "stop_reason": None,
    "usage": {"input_tokens": 9, "output_tokens": 1},
}
_CLAUDES_HEAD = (
    _HEAD
    + _claudes("message_start", message=_NOTHING_YET)
    + _claudes("content_block_start", index=0, content_block={"type": "text", "text": ""})
)


@lru_cache
def _claudes_event(tokens: int) -> bytes:
    text = (WORD * tokens).decode()
    return _claudes("content_block_delta", index=0, delta={"type": "text_delta", "text": text})


@lru_cache
def _claudes_end(tokens: int) -> bytes:
    ended = {"stop_reason": "end_turn", "stop_sequence": None}
    return (
        _claudes("content_block_stop", index=0)
        + _claudes("message_delta", delta=ended, usage={"output_tokens": tokens})
        + _claudes("message_stop")
        + b"0\r\n\r\n"
    )


class Dialect(NamedTuple):
    """How an answer is written."""

    whole: bytes
    head: bytes  # with all that comes before the first word
    event: Callable[[int], bytes]
    end: Callable[[int], bytes]


_OPENAI = Dialect(_WHOLE, _HEAD, _event, _end)
_ANTHROPIC = Dialect(_CLAUDES_WHOLE, _CLAUDES_HEAD, _claudes_event, _claudes_end)


class Provider(asyncio.Protocol):
    """One connection, with one request at a time."""

    worst_late_s = 0.0  # of all connections

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._received = bytearray()
        self._left: int | None = None  # of the body; -1 where it is chunked
        self._timer: asyncio.TimerHandle | None = None
        self._begun_s = 0.0
        self._sent = 0
        self._events = self._tokens = 0
        self._gap_s = 0.0
        self._dialect = _OPENAI

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, _: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._left is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return
            length = _LENGTH.search(self._received, 0, end)
            chunked = length is None and self._received.startswith(b"POST")
            self._left = -1 if chunked else end + 4 + (int(length[1]) if length else 0)
        if self._left < 0 and not self._received.endswith(b"0\r\n\r\n"):
            return
        if len(self._received) >= self._left:
            request, self._received, self._left = self._received, bytearray(), None
            self._answer(request)

    def _answer(self, request: bytearray) -> None:
        if request.startswith(b"GET"):
            self._transport.write(_json(b"%.3f" % (Provider.worst_late_s * 1000)))
            Provider.worst_late_s = 0.0
            return
        edges = request if len(request) < 2 * _EDGE_BYTES else request[:_EDGE_BYTES] + request[-_EDGE_BYTES:]
        if _FAILS.search(edges) is not None:
            self._transport.write(_FAILURE)
            return
        self._dialect = _ANTHROPIC if b"/messages" in edges[: edges.find(b"\r\n")] else _OPENAI
        if _STREAM.search(edges) is None:
            self._transport.write(self._dialect.whole)
            return
        asked = _PACE.search(edges)
        assert asked is not None, "a stream without its pace"
        self._events, self._tokens, gap_us = (int(figure) for figure in asked.groups())
        self._gap_s, self._sent, self._begun_s = gap_us / 1e6, 0, self._loop.time()
        self._transport.write(self._dialect.head)
        self._next()

    def _next(self) -> None:
        due_s = self._begun_s + self._sent * self._gap_s
        Provider.worst_late_s = max(Provider.worst_late_s, self._loop.time() - due_s)
        self._transport.write(self._dialect.event(self._tokens))
        self._sent += 1
        if self._sent == self._events:
            self._transport.write(self._dialect.end(self._events * self._tokens))
        else:
            self._timer = self._loop.call_at(due_s + self._gap_s, self._next)


async def _serve() -> None:
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve())
