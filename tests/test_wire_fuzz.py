"""Whatever bytes come, the connection ends with a code of RFC 9113 or goes on; it never raises, or loses a stream."""

from __future__ import annotations

import hpack
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.transports.wire import frames
from extproc.transports.wire.frames import END_HEADERS, END_STREAM, PADDED, PRIORITIZED, Code, Setting
from extproc.transports.wire.grpc import Call, Failed, Messages, Refusal, call
from extproc.transports.wire.streams import Data, Opened
from tests.wire_peer import (
    GREETING,
    REQUEST,
    SETTINGS_ACK,
    Peer,
    block,
    data,
    encoded,
    goaway,
    headers,
    message,
    resets,
)

ANSWER = b"\0\0\0\0\x06answer"


class Served(Peer):
    """Answers what it is asked, as the server does, and checks what must hold for every stream."""

    def serve(self, stream: bytes, step: int | None = None) -> None:
        answer = self.send(stream, step)
        for event in self.events:
            if isinstance(event, Opened):
                taken = call(event.fields)
                event.stream.owner = Messages(taken.encoded) if isinstance(taken, Call) else None
                if isinstance(taken, Refusal):
                    self.connection.finish(event.stream, taken.block)
            elif isinstance(event, Data) and event.stream.owner is not None:
                try:
                    for one in event.stream.owner.feed(event.data):
                        assert isinstance(one, bytes)
                        self.connection.respond(event.stream, b"\x88")
                        self.connection.send(event.stream, ANSWER)
                except Failed:
                    self.connection.finish(event.stream, b"\x88", at_once=True)
        answer += self.read()
        if self.connection.over:
            assert goaway(answer) is not None
            assert not self.connection.streams()
        for code in resets(answer).values():
            assert code in Code
        told = self.told()
        for stream_id in {stream_id for _, stream_id, _ in told}:
            own = [kind for kind, i, _ in told if i == stream_id]
            assert own[0] == "opened"
            assert own.count("opened") == 1
            assert own.count("ended") <= 1
            assert "reset" not in own[:-1]


def conversation() -> bytes:
    encoder = hpack.Encoder()
    parts = [GREETING, SETTINGS_ACK]
    for stream_id in (1, 3, 5):
        parts += [
            headers(stream_id, encoder.encode(list(REQUEST.items()))),
            data(stream_id, message(b"one") + message(b"two")[:3]),
            data(stream_id, message(b"two")[3:]),
            frames.window_update(stream_id, 100),
        ]
    parts += [
        frames.frame(frames.PING, 0, 0, b"12345678"),
        frames.settings({Setting.INITIAL_WINDOW_SIZE: 1000, Setting.MAX_FRAME_SIZE: 20_000}),
        data(1, b"", END_STREAM),
        frames.rst_stream(3, Code.CANCEL),
        headers(5, encoded(("x-trailer", "1")), END_HEADERS | END_STREAM),
    ]
    return b"".join(parts)


VALID = conversation()

KINDS = st.sampled_from([*range(11), 0xAA])
FLAGS = st.sampled_from([0, END_STREAM, END_HEADERS, END_HEADERS | END_STREAM, PADDED, PRIORITIZED, 0xFF])
IDS = st.sampled_from([0, 1, 2, 3, 5, 7, 2**31 - 1])
PAYLOADS = st.one_of(
    st.binary(max_size=20),
    st.sampled_from([block(), block(te=None), message(b"x"), b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\4\0\0\0\1"]),
)
FRAMES = st.builds(frames.frame, KINDS, FLAGS, IDS, PAYLOADS)


@given(st.binary(max_size=300), st.integers(1, 300))
@settings(max_examples=300)
def test_any_bytes_after_the_preface(noise: bytes, step: int) -> None:
    Served().serve(GREETING + noise, step)


@given(st.lists(FRAMES, max_size=12), st.integers(1, 300))
@settings(max_examples=500)
def test_any_frames(sent: list[bytes], step: int) -> None:
    Served().serve(GREETING + b"".join(sent), step)


@given(
    st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255), st.sampled_from(["set", "cut", "insert"])),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 300),
)
@settings(max_examples=500)
def test_a_mutated_conversation(changes: list[tuple[int, int, str]], step: int) -> None:
    stream = bytearray(VALID)
    for position, value, how in changes:
        at = min(position, len(stream) - 1)
        if how == "set":
            stream[at] = value
        elif how == "cut":
            del stream[at : at + value % 20]
        else:
            stream[at:at] = bytes([value])
    Served().serve(bytes(stream), step)


@given(st.binary(max_size=100))
def test_any_first_bytes(noise: bytes) -> None:
    peer = Served()
    peer.serve(noise)
    assert peer.connection.over != frames.PREFACE.startswith(noise[:24])
