"""The wire transport's HTTP/2 connection, in raw frames: conversations in every split, and every rule of RFC 9113."""

from __future__ import annotations

from typing import Any

import hpack
import pytest

from extproc.limits import (
    CONNECTION_WINDOW_BYTES,
    FLOOD_BURST,
    FLOOD_REFILL_PER_S,
    MAX_BLOCK_BYTES,
    MAX_CONCURRENT_STREAMS,
    MAX_CONTINUATIONS,
    MAX_FIELDS_DECODED_BYTES,
    MAX_SETTINGS,
    SETTINGS_FLOOD_COST,
    STREAM_WINDOW_BYTES,
)
from extproc.transports.wire import connection as module
from extproc.transports.wire import frames
from extproc.transports.wire.frames import (
    ACK,
    END_HEADERS,
    END_STREAM,
    MAX_WINDOW,
    PADDED,
    PRIORITIZED,
    Code,
    Setting,
    frame,
    rst_stream,
    settings,
    window_update,
)
from extproc.transports.wire.streams import Opened, Stream
from tests.wire_peer import (
    GREETING,
    PATH,
    REQUEST,
    SETTINGS_ACK,
    Frame,
    Peer,
    block,
    data,
    encoded,
    goaway,
    headers,
    resets,
)

PRIORITY_FIELDS = b"\0\0\0\0\x10"


def opened(peer: Peer, stream_id: int = 1) -> Stream:
    """Open a stream and return it."""
    peer.send(headers(stream_id))
    event = peer.events[-1]
    assert isinstance(event, Opened)
    return event.stream


def content(answer: list[Frame], stream_id: int = 1) -> bytes:
    return b"".join(f.payload for f in answer if f.kind == frames.DATA and f.stream_id == stream_id)


# --- Conversations ----------------------------------------------------------------------------------------------------


def test_the_server_greets_first() -> None:
    first = Peer().read()
    assert [f.kind for f in first] == [frames.SETTINGS, frames.WINDOW_UPDATE]
    said = dict(frames.SETTING.iter_unpack(first[0].payload))
    assert said[Setting.MAX_CONCURRENT_STREAMS] == MAX_CONCURRENT_STREAMS
    assert said[Setting.INITIAL_WINDOW_SIZE] == STREAM_WINDOW_BYTES
    assert int.from_bytes(first[1].payload, "big") == CONNECTION_WINDOW_BYTES - 65_535


def conversation() -> bytes:
    encoder = hpack.Encoder()  # with a table, and so with state between blocks
    first, second = (encoder.encode(list(REQUEST.items())) for _ in range(2))
    return b"".join(
        (
            GREETING,
            SETTINGS_ACK,
            headers(1, first),
            data(1, b"one"),
            frame(frames.PING, 0, 0, b"12345678"),
            frame(frames.HEADERS, PADDED | PRIORITIZED, 3, b"\x03" + PRIORITY_FIELDS + second[:4] + b"\0\0\0"),
            frame(frames.CONTINUATION, 0, 3, second[4:5]),
            frame(frames.CONTINUATION, 0, 3, b""),
            frame(frames.CONTINUATION, END_HEADERS, 3, second[5:]),
            data(3, b"\x05two\0\0\0\0\0", PADDED),
            frame(frames.PRIORITY, 0, 9, PRIORITY_FIELDS),
            frame(0xAA, 0xFF, 7, b"unknown"),
            data(1, b"", END_STREAM),
            data(3, b"", 0),
            window_update(3, 5),
            headers(3, encoded(("x-trailer", "1")), END_HEADERS | END_STREAM),
            headers(5, None, END_HEADERS | END_STREAM),
            headers(7),
            rst_stream(7, Code.CANCEL),
        )
    )


@pytest.mark.parametrize("step", [1, 2, 3, 5, 9, 10, 16, 1000, None])
def test_a_conversation_is_the_same_in_every_split(step: int | None) -> None:
    peer = Peer()
    answer = peer.send(conversation(), step)
    fields = tuple((name.encode(), value.encode()) for name, value in REQUEST.items())
    assert peer.told() == [
        ("opened", 1, fields),
        ("data", 1, b"one"),
        ("opened", 3, fields),
        ("data", 3, b"two"),
        ("ended", 1, None),
        ("ended", 3, None),
        ("opened", 5, fields),
        ("ended", 5, None),
        ("opened", 7, fields),
        ("reset", 7, None),
    ]
    assert [(f.kind, f.flags) for f in answer[2:]] == [(frames.SETTINGS, ACK), (frames.PING, ACK)]
    assert answer[-1].payload == b"12345678"
    assert peer.connection.acknowledged
    assert not peer.connection.over


def test_a_conversation_cut_in_two_at_every_byte() -> None:
    whole = Peer()
    stream = conversation()
    answer = whole.send(stream)
    for cut in range(1, len(stream)):
        peer = Peer()
        assert peer.send(stream[:cut]) + peer.send(stream[cut:]) == answer
        assert peer.told() == whole.told()


def test_a_response_and_its_trailers() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    peer.connection.respond(stream, b"\x88")
    assert peer.connection.send(stream, b"content")
    peer.connection.finish(stream, b"\x89")
    answer = peer.read()
    assert answer == [
        (frames.HEADERS, END_HEADERS, 1, b"\x20\x88"),  # the first block says that no table is used
        (frames.DATA, 0, 1, b"content"),
        (frames.HEADERS, END_HEADERS | END_STREAM, 1, b"\x89"),
        (frames.RST_STREAM, 0, 1, b"\0\0\0\0"),  # the rest of the request is not needed
    ]
    assert stream.closed


def test_no_reset_follows_trailers_once_the_client_has_ended() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    peer.send(data(1, b"", END_STREAM))
    peer.connection.finish(stream, b"\x88")
    assert [f.kind for f in peer.read()] == [frames.HEADERS]


def test_nothing_is_sent_on_a_stream_that_is_gone() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    peer.send(rst_stream(1, Code.CANCEL))
    peer.connection.respond(stream, b"\x88")
    assert peer.connection.send(stream, b"content")
    peer.connection.finish(stream, b"\x88")
    peer.connection.reset(stream, Code.CANCEL)
    assert peer.read() == []


# --- Errors of the connection -----------------------------------------------------------------------------------------

FATAL: dict[str, tuple[bytes, Code]] = {
    "SETTINGS on a stream (6.5)": (frame(frames.SETTINGS, 0, 1, b""), Code.PROTOCOL_ERROR),
    "SETTINGS of a wrong length (6.5)": (frame(frames.SETTINGS, 0, 0, b"\0" * 5), Code.FRAME_SIZE_ERROR),
    "an acknowledgement with content (6.5)": (frame(frames.SETTINGS, ACK, 0, b"\0" * 6), Code.FRAME_SIZE_ERROR),
    "ENABLE_PUSH of 2 (6.5.2)": (settings({Setting.ENABLE_PUSH: 2}), Code.PROTOCOL_ERROR),
    "INITIAL_WINDOW_SIZE of 2^31 (6.5.2)": (
        settings({Setting.INITIAL_WINDOW_SIZE: 2**31}),
        Code.FLOW_CONTROL_ERROR,
    ),
    "MAX_FRAME_SIZE too small (6.5.2)": (settings({Setting.MAX_FRAME_SIZE: 16_383}), Code.PROTOCOL_ERROR),
    "MAX_FRAME_SIZE too large (6.5.2)": (settings({Setting.MAX_FRAME_SIZE: 2**24}), Code.PROTOCOL_ERROR),
    "too many settings": (
        frame(frames.SETTINGS, 0, 0, b"\0\x04\0\0\0\1" * (MAX_SETTINGS + 1)),
        Code.ENHANCE_YOUR_CALM,
    ),
    "DATA on stream 0 (6.1)": (data(0, b"x"), Code.PROTOCOL_ERROR),
    "DATA on an idle stream (5.1)": (data(1, b"x"), Code.PROTOCOL_ERROR),
    "DATA on a stream of ours (5.1)": (data(2, b"x"), Code.PROTOCOL_ERROR),
    "DATA, all padding and more (6.1)": (headers(1) + data(1, b"\x04xxx", PADDED), Code.PROTOCOL_ERROR),
    "DATA without the padding's length (6.1)": (headers(1) + data(1, b"", PADDED), Code.FRAME_SIZE_ERROR),
    "DATA after END_STREAM and our own end (5.1)": (
        headers(1, encoded((":method", "GET")), END_HEADERS) + headers(3) + rst_stream(3, Code.CANCEL) + data(3, b"x"),
        Code.STREAM_CLOSED,
    ),
    "HEADERS on stream 0 (6.2)": (headers(0), Code.PROTOCOL_ERROR),
    "HEADERS on an even stream (5.1.1)": (headers(2), Code.PROTOCOL_ERROR),
    "HEADERS on a lower stream (5.1.1)": (headers(5) + headers(3), Code.PROTOCOL_ERROR),
    "HEADERS on a stream that was reset (5.1)": (
        headers(1) + rst_stream(1, Code.CANCEL) + headers(1),
        Code.STREAM_CLOSED,
    ),
    "HEADERS, all padding and more (6.2)": (
        frame(frames.HEADERS, END_HEADERS | PADDED, 1, b"\x05\0"),
        Code.PROTOCOL_ERROR,
    ),
    "HEADERS too short for a priority (6.2)": (
        frame(frames.HEADERS, END_HEADERS | PRIORITIZED, 1, b"\0\0\0"),
        Code.FRAME_SIZE_ERROR,
    ),
    "HPACK: an index that is not there (4.3)": (headers(1, b"\xff\xff\x01"), Code.COMPRESSION_ERROR),
    "HPACK: half a field (4.3)": (headers(1, b"\x40\x05abc"), Code.COMPRESSION_ERROR),
    "HPACK: a table larger than allowed (4.3)": (headers(1, b"\x3f\xff\xff\x07"), Code.COMPRESSION_ERROR),
    "HPACK: a table's size after a field (4.3)": (headers(1, b"\x82\x20"), Code.COMPRESSION_ERROR),
    "a header bomb": (
        headers(1, hpack.Encoder().encode([("a", "b" * 4000)]) + b"\xbe" * (MAX_FIELDS_DECODED_BYTES // 4000 + 1)),
        Code.ENHANCE_YOUR_CALM,
    ),
    "PRIORITY on stream 0 (6.3)": (frame(frames.PRIORITY, 0, 0, PRIORITY_FIELDS), Code.PROTOCOL_ERROR),
    "PRIORITY of a wrong length (6.3)": (frame(frames.PRIORITY, 0, 1, b"\0\0\0\0"), Code.FRAME_SIZE_ERROR),
    "RST_STREAM on stream 0 (6.4)": (rst_stream(0, Code.CANCEL), Code.PROTOCOL_ERROR),
    "RST_STREAM on an idle stream (6.4)": (rst_stream(1, Code.CANCEL), Code.PROTOCOL_ERROR),
    "RST_STREAM of a wrong length (6.4)": (
        headers(1) + frame(frames.RST_STREAM, 0, 1, b"\0\0\0"),
        Code.FRAME_SIZE_ERROR,
    ),
    "PUSH_PROMISE (8.4)": (headers(1) + frame(frames.PUSH_PROMISE, END_HEADERS, 1, b"\0\0\0\2"), Code.PROTOCOL_ERROR),
    "PING on a stream (6.7)": (frame(frames.PING, 0, 1, b"\0" * 8), Code.PROTOCOL_ERROR),
    "PING of a wrong length (6.7)": (frame(frames.PING, 0, 0, b"\0" * 7), Code.FRAME_SIZE_ERROR),
    "GOAWAY on a stream (6.8)": (frame(frames.GOAWAY, 0, 1, b"\0" * 8), Code.PROTOCOL_ERROR),
    "GOAWAY too short (6.8)": (frame(frames.GOAWAY, 0, 0, b"\0" * 7), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE by nothing (6.9)": (window_update(0, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE of a wrong length (6.9)": (frame(frames.WINDOW_UPDATE, 0, 0, b"\0\0\1"), Code.FRAME_SIZE_ERROR),
    "WINDOW_UPDATE on an idle stream (5.1)": (window_update(1, 1), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE over 2^31-1 (6.9.1)": (window_update(0, MAX_WINDOW), Code.FLOW_CONTROL_ERROR),
    "SETTINGS that make a window too large (6.9.2)": (
        headers(1) + window_update(1, MAX_WINDOW - 65_535) + settings({Setting.INITIAL_WINDOW_SIZE: 65_536}),
        Code.FLOW_CONTROL_ERROR,
    ),
    "CONTINUATION of nothing (6.10)": (frame(frames.CONTINUATION, END_HEADERS, 1, b""), Code.PROTOCOL_ERROR),
    "CONTINUATION on another stream (6.10)": (
        headers(1, b"", 0) + frame(frames.CONTINUATION, END_HEADERS, 3, block()),
        Code.PROTOCOL_ERROR,
    ),
    "a frame within a header block (6.10)": (headers(1, b"", 0) + data(1, b"x"), Code.PROTOCOL_ERROR),
    "an unknown frame within a header block (6.10)": (headers(1, b"", 0) + frame(0xAA, 0, 1, b""), Code.PROTOCOL_ERROR),
    "a frame over the limit (4.2)": (frame(0xAA, 0, 0, b"\0" * 16_385), Code.FRAME_SIZE_ERROR),
    "CONTINUATION: too many": (
        headers(1, b"", 0) + frame(frames.CONTINUATION, 0, 1, b"") * (MAX_CONTINUATIONS + 1),
        Code.ENHANCE_YOUR_CALM,
    ),
    "CONTINUATION: too long": (
        headers(1, b"", 0) + frame(frames.CONTINUATION, 0, 1, b"\0" * 16_384) * (MAX_BLOCK_BYTES // 16_384 + 1),
        Code.ENHANCE_YOUR_CALM,
    ),
}


@pytest.mark.parametrize("step", [None, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", FATAL)
def test_errors_of_the_connection(name: str, step: int | None) -> None:
    stream, code = FATAL[name]
    if step == 1 and len(stream) > 2000:
        step = 999
    peer = Peer().greet()
    answer = peer.send(stream, step)
    assert goaway(answer) == code
    assert answer[-1].kind == frames.GOAWAY
    assert peer.connection.over
    opened_ids = {e.stream.id for e in peer.events if isinstance(e, Opened)}
    assert {stream_id for kind, stream_id, _ in peer.told() if kind == "reset"} == opened_ids
    assert peer.send(headers(9)) == []  # nothing is taken any more


def test_data_over_the_connections_window() -> None:
    peer = Peer().greet()
    opened(peer)
    peer.connection._receivable = 3  # a correct client never gets there: the window is opened in time
    peer.send(data(1, b"four"))
    assert peer.connection.over


PREFACES: dict[str, bytes] = {
    "HTTP/1.1": b"GET / HTTP/1.1\r\n\r\n",
    "one byte": b"X",
    "a wrong end": frames.PREFACE[:-1] + b"X",
    "not SETTINGS first": frames.PREFACE + frame(frames.PING, 0, 0, b"\0" * 8),
    "an acknowledgement first": frames.PREFACE + SETTINGS_ACK,
}


@pytest.mark.parametrize("name", PREFACES)
@pytest.mark.parametrize("step", [None, 1])
def test_a_wrong_preface(name: str, step: int | None) -> None:
    peer = Peer()
    assert goaway(peer.send(PREFACES[name], step)) == Code.PROTOCOL_ERROR
    assert peer.connection.over


# --- Errors of a stream -----------------------------------------------------------------------------------------------

OPEN = headers(1)
STREAM: dict[str, tuple[bytes, Code]] = {
    "DATA after END_STREAM (5.1)": (OPEN + data(1, b"", END_STREAM) + data(1, b"x"), Code.STREAM_CLOSED),
    "HEADERS after END_STREAM (5.1)": (
        OPEN + data(1, b"", END_STREAM) + headers(1, None, END_HEADERS | END_STREAM),
        Code.STREAM_CLOSED,
    ),
    "WINDOW_UPDATE by nothing (6.9)": (OPEN + window_update(1, 0), Code.PROTOCOL_ERROR),
    "WINDOW_UPDATE over 2^31-1 (6.9.1)": (OPEN + window_update(1, MAX_WINDOW), Code.FLOW_CONTROL_ERROR),
    "trailers without END_STREAM (8.1)": (OPEN + headers(1, encoded(("a", "b"))), Code.PROTOCOL_ERROR),
    "trailers with a pseudo-header (8.1)": (
        OPEN + headers(1, encoded((":path", "/")), END_HEADERS | END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "a name with capitals (8.2.1)": (headers(1, block(X_Big="1")), Code.PROTOCOL_ERROR),
    "a name with a space (8.2.1)": (headers(1, block(**{"a b": "1"})), Code.PROTOCOL_ERROR),
    "a value with a line end (8.2.1)": (headers(1, block(x="a\r\nb")), Code.PROTOCOL_ERROR),
    "a value with a zero byte (8.2.1)": (headers(1, block(x="a\0b")), Code.PROTOCOL_ERROR),
    "a value with a space before it (8.2.1)": (headers(1, block(x=" a")), Code.PROTOCOL_ERROR),
    "connection (8.2.2)": (headers(1, block(connection="close")), Code.PROTOCOL_ERROR),
    "transfer-encoding (8.2.2)": (headers(1, block(transfer_encoding="chunked")), Code.PROTOCOL_ERROR),
    "te other than trailers (8.2.2)": (headers(1, block(te="gzip")), Code.PROTOCOL_ERROR),
    "no method (8.3.1)": (headers(1, block(**{":method": None})), Code.PROTOCOL_ERROR),
    "no scheme (8.3.1)": (headers(1, block(**{":scheme": None})), Code.PROTOCOL_ERROR),
    "no path (8.3.1)": (headers(1, block(**{":path": None})), Code.PROTOCOL_ERROR),
    "an empty path (8.3.1)": (headers(1, block(**{":path": ""})), Code.PROTOCOL_ERROR),
    "an unknown pseudo-header (8.3)": (headers(1, encoded((":odd", "1"), (":method", "GET"))), Code.PROTOCOL_ERROR),
    "a response's pseudo-header (8.3)": (headers(1, encoded((":status", "200"))), Code.PROTOCOL_ERROR),
    "a pseudo-header twice (8.3)": (
        headers(1, encoded((":method", "GET"), (":method", "GET"), (":scheme", "http"), (":path", "/"))),
        Code.PROTOCOL_ERROR,
    ),
    "a pseudo-header after a field (8.3)": (
        headers(1, encoded((":method", "GET"), (":scheme", "http"), ("a", "b"), (":path", "/"))),
        Code.PROTOCOL_ERROR,
    ),
    "CONNECT with a path (8.5)": (headers(1, block(**{":method": "CONNECT"})), Code.PROTOCOL_ERROR),
    "content-length that is no number (8.1.1)": (headers(1, block(content_length="+1")), Code.PROTOCOL_ERROR),
    "more content than content-length (8.1.1)": (
        headers(1, block(content_length="2")) + data(1, b"xxx"),
        Code.PROTOCOL_ERROR,
    ),
    "less content than content-length (8.1.1)": (
        headers(1, block(content_length="4")) + data(1, b"xxx", END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
    "no content, with a content-length (8.1.1)": (
        headers(1, block(content_length="4"), END_HEADERS | END_STREAM),
        Code.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize("step", [None, 1], ids=["whole", "bytes"])
@pytest.mark.parametrize("name", STREAM)
def test_errors_of_a_stream(name: str, step: int | None) -> None:
    stream, code = STREAM[name]
    peer = Peer().greet()
    answer = peer.send(stream, step)
    assert resets(answer) == {1: code}
    assert goaway(answer) is None
    told = peer.told()
    assert not told or told[-1] == ("reset", 1, None)
    peer.events.clear()
    assert peer.send(data(1, b"late") + window_update(1, 1) + rst_stream(1, Code.CANCEL)) == []  # was under way
    peer.send(headers(3))  # and the connection goes on
    assert [kind for kind, _, _ in peer.told()] == ["opened"]


def test_data_over_a_streams_window() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    stream.receivable = 3
    assert resets(peer.send(data(1, b"four"))) == {1: Code.FLOW_CONTROL_ERROR}


def test_too_many_streams_are_refused() -> None:
    peer = Peer().greet()
    ids = range(1, 2 * MAX_CONCURRENT_STREAMS, 2)
    assert peer.send(b"".join(map(headers, ids))) == []
    extra = ids[-1] + 2
    assert resets(peer.send(headers(extra))) == {extra: Code.REFUSED_STREAM}
    peer.send(rst_stream(1, Code.CANCEL))
    assert peer.send(headers(extra + 2)) == []


def test_a_refused_streams_block_still_changes_the_table() -> None:
    peer = Peer().greet()
    encoder = hpack.Encoder()
    fields = [(":method", "GET"), (":scheme", "http"), ("x-new", "1")]
    peer.send(headers(1, encoder.encode(fields)))  # no path: malformed
    peer.send(headers(3, encoder.encode([(":method", "POST"), (":scheme", "http"), (":path", PATH), ("x-new", "1")])))
    event = peer.events[-1]
    assert isinstance(event, Opened)
    assert dict(event.fields)[b"x-new"] == b"1"


# --- Flow control -----------------------------------------------------------------------------------------------------


def test_our_windows_are_opened_in_time() -> None:
    """A client that honours them, with a message much larger than both, is never stuck and never over."""
    peer = Peer()
    connection_room, stream_room = 65_535, STREAM_WINDOW_BYTES
    left = 3 * CONNECTION_WINDOW_BYTES
    answer = peer.send(GREETING + SETTINGS_ACK + headers(1))
    while left:
        for update in answer:
            if update.kind == frames.WINDOW_UPDATE and update.stream_id == 0:
                connection_room += int.from_bytes(update.payload, "big")
            elif update.kind == frames.WINDOW_UPDATE:
                stream_room += int.from_bytes(update.payload, "big")
        size = min(left, 16_384, connection_room, stream_room)
        assert size > 0, "stuck"
        assert connection_room <= CONNECTION_WINDOW_BYTES
        assert stream_room <= STREAM_WINDOW_BYTES
        answer = peer.send(data(1, b"x" * size))
        peer.events.clear()
        left, connection_room, stream_room = left - size, connection_room - size, stream_room - size
    assert not peer.connection.over


def test_padding_counts_for_the_window() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    peer.send(data(1, b"\x0ax" + b"\0" * 10, PADDED))
    assert stream.receivable == STREAM_WINDOW_BYTES - 12


def test_the_peers_windows_hold_content_back() -> None:
    peer = Peer()
    peer.send(frames.PREFACE + settings({Setting.INITIAL_WINDOW_SIZE: 10}))
    stream = opened(peer)
    connection = peer.connection
    connection.respond(stream, b"\x88")
    connection.send(stream, b"0123456789abcdef")
    connection.send(stream, b"ghij")
    connection.finish(stream, b"\x89")
    assert content(peer.read()) == b"0123456789"
    assert content(peer.send(window_update(1, 1))) == b"a"
    assert peer.send(settings({Setting.INITIAL_WINDOW_SIZE: 2})) == [(frames.SETTINGS, ACK, 0, b"")]
    assert stream.sendable == -8
    assert peer.send(window_update(1, 8)) == []
    assert content(peer.send(window_update(1, 2))) == b"bc"
    assert content(peer.send(settings({Setting.INITIAL_WINDOW_SIZE: 4}))) == b"de"
    last = peer.send(window_update(1, 100))
    assert content(last) == b"fghij"
    assert [(f.kind, f.flags) for f in last[-2:]] == [
        (frames.HEADERS, END_HEADERS | END_STREAM),
        (frames.RST_STREAM, 0),
    ]


def test_frames_are_as_large_as_the_peer_takes() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    peer.connection.send(stream, b"x" * 40_000)
    assert [len(f.payload) for f in peer.read()] == [16_384, 16_384, 7_232]
    peer.send(settings({Setting.MAX_FRAME_SIZE: 20_000}))
    peer.connection.send(stream, b"x" * 25_000)
    assert [len(f.payload) for f in peer.read()] == [20_000, 5_000]


def test_streams_take_turns_on_the_connections_window() -> None:
    peer = Peer().greet()
    streams = [opened(peer, stream_id) for stream_id in (1, 3, 5)]
    for stream in streams:
        peer.connection.send(stream, b"x" * 60_000)
    got = {stream.id: len(content(peer_read, stream.id)) for peer_read in [peer.read()] for stream in streams}
    assert sum(got.values()) == 65_535
    before = dict(got)
    for _ in range(3):
        answer = peer.send(window_update(0, 16_384))
        for stream in streams:
            got[stream.id] += len(content(answer, stream.id))
    assert got[3] > before[3]
    assert got[5] > before[5]
    answer = peer.send(window_update(0, 200_000))
    for stream in streams:
        got[stream.id] += len(content(answer, stream.id))
    assert set(got.values()) == {60_000}


def test_an_error_does_not_wait_behind_content() -> None:
    peer = Peer()
    peer.send(frames.PREFACE + settings({Setting.INITIAL_WINDOW_SIZE: 0}))
    stream = opened(peer)
    peer.connection.send(stream, b"waits")
    peer.connection.finish(stream, b"\x88", at_once=True)
    assert [f.kind for f in peer.read()] == [frames.HEADERS, frames.RST_STREAM]
    assert peer.send(window_update(0, 100)) == []


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STREAM_QUEUED_BYTES", 100)
    monkeypatch.setattr(module, "MAX_QUEUED_BYTES", 150)
    peer = Peer()
    peer.send(frames.PREFACE + settings({Setting.INITIAL_WINDOW_SIZE: 0}))
    one, two, three = (opened(peer, stream_id) for stream_id in (1, 3, 5))
    send = peer.connection.send
    assert send(one, b"x" * 100)
    assert not send(one, b"x")
    assert send(two, b"x" * 50)
    assert not send(three, b"x")
    peer.connection.reset(one, Code.CANCEL)  # what it held is free again
    assert send(three, b"x" * 100)
    peer.send(window_update(3, 50))
    assert send(two, b"x" * 50)


def test_content_waits_while_the_transport_is_full() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    peer.connection.pause()
    peer.connection.send(stream, b"content")
    assert peer.read() == []
    assert [f.kind for f in peer.send(frame(frames.PING, 0, 0, b"\0" * 8) + window_update(0, 1))] == [frames.PING]
    peer.connection.resume()
    assert content(peer.read()) == b"content"


# --- Ends -------------------------------------------------------------------------------------------------------------


def test_a_drained_connection_ends_with_its_last_stream() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    peer.connection.drain()
    peer.connection.drain()
    assert [f.payload[:8] for f in peer.read()] == [b"\0\0\0\1\0\0\0\0"]
    assert resets(peer.send(headers(3))) == {3: Code.REFUSED_STREAM}
    peer.connection.respond(stream, b"\x88")
    assert not peer.connection.over
    peer.connection.finish(stream, b"\x88")
    assert peer.connection.over


def test_a_client_that_goes_away_gets_its_answers() -> None:
    peer = Peer().greet()
    stream = opened(peer)
    peer.send(frame(frames.GOAWAY, 0, 0, b"\0" * 8 + b"bye"))
    assert not peer.connection.over
    peer.connection.finish(stream, b"\x88")
    assert peer.connection.over


def test_giving_up_resets_all() -> None:
    peer = Peer().greet()
    opened(peer, 1)
    opened(peer, 3)
    assert [event.stream.id for event in peer.connection.give_up(Code.NO_ERROR, "lost")] == [1, 3]
    assert peer.connection.give_up(Code.NO_ERROR, "lost") == []


# --- Floods -----------------------------------------------------------------------------------------------------------


def _resets(stream_id: int) -> bytes:
    return headers(stream_id) + rst_stream(stream_id, Code.CANCEL)


FLOODS: dict[str, tuple[Any, int]] = {
    "PING": (lambda n: frame(frames.PING, 0, 0, b"\0" * 8), 1),
    "SETTINGS": (lambda n: settings({}), SETTINGS_FLOOD_COST),
    "acknowledgements": (lambda n: SETTINGS_ACK, 1),
    "PRIORITY": (lambda n: frame(frames.PRIORITY, 0, 1, PRIORITY_FIELDS), 1),
    "unknown frames": (lambda n: frame(0xAA, 0, 0, b""), 1),
    "empty DATA": (lambda n: data(1, b""), 1),
    "DATA with nothing but padding": (lambda n: data(1, b"\x01\0", PADDED), 1),
    "rapid reset": (lambda n: _resets(2 * n + 3), 1),
    "resets of ended streams": (lambda n: rst_stream(1, Code.CANCEL), 1),
    "errors that make us reset": (lambda n: headers(2 * n + 3) + window_update(2 * n + 3, 0), 1),
    "malformed requests": (lambda n: headers(2 * n + 3, encoded((":method", "GET"))), 1),
}


@pytest.mark.parametrize("name", FLOODS)
def test_floods_end_the_connection(name: str) -> None:
    make, cost = FLOODS[name]
    peer = Peer().greet()
    opened(peer)
    allowed = FLOOD_BURST // cost
    for start in range(0, allowed - 200 // cost, 500):
        assert goaway(peer.send(b"".join(map(make, range(start, min(start + 500, allowed - 200 // cost)))))) is None
    peer.now_s += 1  # the budget refills with time
    more = FLOOD_REFILL_PER_S // cost
    assert goaway(peer.send(b"".join(map(make, range(allowed, allowed + more // 2))))) is None
    answer = peer.send(b"".join(map(make, range(allowed + more, allowed + 3 * more))))
    assert goaway(answer) == Code.ENHANCE_YOUR_CALM


def test_resets_of_answered_streams_are_no_flood() -> None:
    """Envoy ends every stream by resetting it."""
    peer = Peer().greet()
    for number in range(FLOOD_BURST + 1000):
        stream = opened(peer, 2 * number + 1)
        peer.connection.respond(stream, b"\x88")
        peer.send(rst_stream(stream.id, Code.CANCEL))
        peer.events.clear()
    assert not peer.connection.over
