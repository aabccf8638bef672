"""The client's side of the wire transport's tests, in raw frames: what a real client would never send, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import hpack

from extproc.transports.wire import frames
from extproc.transports.wire.connection import Connection
from extproc.transports.wire.frames import Code
from extproc.transports.wire.streams import Data, Ended, Opened, Reset, StreamEvent

PATH = "/envoy.service.ext_proc.v3.ExternalProcessor/Process"
REQUEST = {
    ":method": "POST",
    ":scheme": "http",
    ":path": PATH,
    ":authority": "extproc",
    "te": "trailers",
    "content-type": "application/grpc",
    "x-tollgate-role": "gate",
}
GREETING = frames.PREFACE + frames.settings({})
SETTINGS_ACK = frames.frame(frames.SETTINGS, frames.ACK, 0, b"")


class Frame(NamedTuple):
    """One frame of the server's."""

    kind: int
    flags: int
    stream_id: int
    payload: bytes


def block(**changes: str | None) -> bytes:
    """A good request's header block, with `changes`: None takes a field out. It leaves the table alone."""
    merged = {**REQUEST, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return encoded(*((name, value) for name, value in merged.items() if value is not None))


def encoded(*pairs: tuple[str, str]) -> bytes:
    """A header block of just these fields."""
    return hpack.Encoder().encode([hpack.NeverIndexedHeaderTuple(*pair) for pair in pairs])


def headers(stream_id: int, payload: bytes | None = None, flags: int = frames.END_HEADERS) -> bytes:
    return frames.frame(frames.HEADERS, flags, stream_id, block() if payload is None else payload)


def data(stream_id: int, payload: bytes, flags: int = 0) -> bytes:
    return frames.frame(frames.DATA, flags, stream_id, payload)


def message(payload: bytes) -> bytes:
    """A gRPC message with its prefix."""
    return b"\0" + len(payload).to_bytes(4, "big") + payload


def split(stream: bytes) -> list[Frame]:
    """All whole frames of what the server wrote. There must be nothing else."""
    found = []
    position = 0
    while position < len(stream):
        word, flags, stream_id = frames.HEAD.unpack_from(stream, position)
        end = position + frames.HEAD_BYTES + (word >> 8)
        assert end <= len(stream), "half a frame"
        found.append(Frame(word & 0xFF, flags, stream_id, stream[position + frames.HEAD_BYTES : end]))
        position = end
    return found


@dataclass
class Peer:
    """Drives a `Connection` and reads its answers. Time stands still unless a test moves it."""

    now_s: float = 0.0

    def __post_init__(self) -> None:
        self.connection = Connection(lambda: self.now_s)
        self.events: list[StreamEvent] = []
        self.fields = hpack.Decoder()

    def greet(self) -> Peer:
        self.send(GREETING + SETTINGS_ACK)
        return self

    def send(self, stream: bytes, pieces: int | None = None) -> list[Frame]:
        """Send bytes, in pieces of so many, and return what comes back."""
        step = pieces or max(1, len(stream))
        for start in range(0, len(stream), step):
            self.events += self.connection.receive(stream[start : start + step])
        return self.read()

    def read(self) -> list[Frame]:
        return split(self.connection.take())

    def told(self) -> list[tuple[str, int, object]]:
        """The events so far, as plain values; neighbouring data of a stream in one piece."""
        plain: list[tuple[str, int, object]] = []
        for event in self.events:
            stream_id = event.stream.id
            match event:
                case Opened():
                    plain.append(("opened", stream_id, event.fields))
                case Data() if plain and plain[-1][:2] == ("data", stream_id):
                    plain[-1] = ("data", stream_id, bytes(plain[-1][2]) + event.data)  # type: ignore[call-overload]
                case Data():
                    plain.append(("data", stream_id, event.data))
                case Ended():
                    plain.append(("ended", stream_id, None))
                case Reset():
                    plain.append(("reset", stream_id, None))
        return plain


def goaway(answer: list[Frame]) -> Code | None:
    """The code of the GOAWAY in an answer."""
    for frame in answer:
        if frame.kind == frames.GOAWAY:
            return Code(int.from_bytes(frame.payload[4:8], "big"))
    return None


def resets(answer: list[Frame]) -> dict[int, Code]:
    """The RST_STREAMs in an answer."""
    return {f.stream_id: Code(int.from_bytes(f.payload, "big")) for f in answer if f.kind == frames.RST_STREAM}


def status(frame: Frame) -> str | None:
    """The grpc-status in a block of ours, which needs no table."""
    fields = {str(name): str(value) for name, value in hpack.Decoder().decode(frame.payload)}
    return fields.get("grpc-status")
