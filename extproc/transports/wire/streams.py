"""Streams, and what can happen to them."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from extproc.limits import STREAM_WINDOW_BYTES
from extproc.transports.wire.fields import Fields


class Stream:
    """One open stream. `owner` is free for whoever takes the events; the rest is the connection's."""

    __slots__ = (
        "answered",
        "closed",
        "content_left",
        "id",
        "outbox",
        "owner",
        "peer_ended",
        "queued_bytes",
        "receivable",
        "sendable",
        "trailers",
    )

    def __init__(self, stream_id: int, sendable: int, content_length: int) -> None:
        self.id = stream_id
        self.owner: Any = None
        self.sendable = sendable  # the peer's window; below zero after SETTINGS made it smaller (6.9.2)
        self.receivable = STREAM_WINDOW_BYTES  # our window
        self.content_left = content_length  # -1: not said
        self.peer_ended = False
        self.answered = False
        self.closed = False
        self.outbox: deque[memoryview] | None = None  # waits for windows
        self.queued_bytes = 0
        self.trailers: bytes | None = None  # to follow the outbox


class Opened(NamedTuple):
    """A request's fields have come, and are well-formed."""

    stream: Stream
    fields: Fields


class Data(NamedTuple):
    """Some of a request's content: any split of it, never empty."""

    stream: Stream
    data: bytes


class Ended(NamedTuple):
    """The client will send no more on this stream."""

    stream: Stream


class Reset(NamedTuple):
    """The stream is gone, by either side's error or the client's will. Nothing can be sent on it."""

    stream: Stream


StreamEvent = Opened | Data | Ended | Reset
