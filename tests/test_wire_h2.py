"""The wire transport's connection against the `h2` library as the client: both must agree on every byte."""

from __future__ import annotations

import random

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.settings
import pytest

from extproc.limits import MAX_CONCURRENT_STREAMS, MAX_FIELDS_BYTES, STREAM_WINDOW_BYTES
from extproc.transports.wire.fields import encode
from extproc.transports.wire.frames import Code
from extproc.transports.wire.streams import Data, Ended, Opened, Reset, Stream
from tests.wire_peer import REQUEST, Peer

RESPONSE = encode(((b":status", b"200"), (b"content-type", b"application/grpc")))
TRAILERS = encode(((b"grpc-status", b"0"),))


class Pair:
    """A client by `h2`, and our connection. `step` is how many bytes pass at once."""

    def __init__(self, step: int | None = None, **settings: int) -> None:
        self.client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
        self.peer = Peer()
        self.step = step
        self.seen: list[h2.events.Event] = []
        self.streams: dict[int, Stream] = {}
        self.received: dict[int, bytearray] = {}
        self.gone: set[int] = set()
        self.ended: set[int] = set()
        self.client.initiate_connection()
        if settings:
            self.client.update_settings({getattr(h2.settings.SettingCodes, name): v for name, v in settings.items()})
        self.turn()

    def turn(self) -> list[h2.events.Event]:
        """Carry bytes until both are quiet."""
        new: list[h2.events.Event] = []
        while True:
            out = self.client.data_to_send()
            back = b""
            step = self.step or max(1, len(out))
            for start in range(0, len(out), step):
                self.peer.events += self.peer.connection.receive(out[start : start + step])
            for event in self.peer.events:
                match event:
                    case Opened(stream=stream):
                        self.streams[stream.id] = stream
                        self.received[stream.id] = bytearray()
                    case Data(stream=stream, data=data):
                        self.received[stream.id] += data
                    case Ended(stream=stream):
                        self.ended.add(stream.id)
                    case Reset(stream=stream):
                        self.gone.add(stream.id)
            self.peer.events.clear()
            back = self.peer.connection.take()
            if not out and not back:
                self.seen += new
                return new
            step = self.step or max(1, len(back))
            for start in range(0, len(back), step):
                new += self.client.receive_data(back[start : start + step])

    def open(self, **extra: str) -> Stream:
        stream_id = self.client.get_next_available_stream_id()
        self.client.send_headers(stream_id, [*REQUEST.items(), *extra.items()])
        self.turn()
        return self.streams[stream_id]

    def data(self, stream: Stream) -> bytes:
        return b"".join(
            event.data
            for event in self.seen
            if isinstance(event, h2.events.DataReceived) and event.stream_id == stream.id
        )

    def kinds(self, stream: Stream) -> list[str]:
        """What the client saw of a stream; data in one piece."""
        names: list[str] = []
        for event in self.seen:
            name = type(event).__name__
            if getattr(event, "stream_id", None) == stream.id and name != "WindowUpdated" and names[-1:] != [name]:
                names.append(name)
        return names


@pytest.mark.parametrize("step", [None, 1, 7])
def test_a_call(step: int | None) -> None:
    pair = Pair(step)
    stream = pair.open(grpc_timeout="1S")
    pair.client.send_data(stream.id, b"question")
    pair.turn()
    assert pair.received[stream.id] == b"question"
    connection = pair.peer.connection
    connection.respond(stream, RESPONSE)
    connection.send(stream, b"answer")
    pair.turn()
    pair.client.end_stream(stream.id)
    pair.turn()
    assert pair.ended == {stream.id}
    connection.finish(stream, TRAILERS)
    pair.turn()
    assert pair.data(stream) == b"answer"
    assert pair.kinds(stream) == ["ResponseReceived", "DataReceived", "TrailersReceived", "StreamEnded"]


def test_an_early_end_is_followed_by_a_reset_without_error() -> None:
    pair = Pair()
    stream = pair.open()
    pair.peer.connection.finish(stream, RESPONSE)
    events = pair.turn()
    reset = next(event for event in events if isinstance(event, h2.events.StreamReset))
    assert reset.error_code == h2.errors.ErrorCodes.NO_ERROR


def test_settings_are_acknowledged_both_ways() -> None:
    pair = Pair(INITIAL_WINDOW_SIZE=1000, MAX_FRAME_SIZE=20_000, HEADER_TABLE_SIZE=0)
    assert any(isinstance(event, h2.events.SettingsAcknowledged) for event in pair.seen)
    assert pair.peer.connection.acknowledged
    remote = pair.client.remote_settings
    assert remote.max_concurrent_streams == MAX_CONCURRENT_STREAMS
    assert remote.initial_window_size == STREAM_WINDOW_BYTES
    assert remote.max_header_list_size == MAX_FIELDS_BYTES
    stream = pair.open()
    pair.peer.connection.respond(stream, RESPONSE)  # with a table of no bytes, which the client insists on
    pair.turn()
    assert pair.kinds(stream) == ["ResponseReceived"]


def test_a_large_answer_waits_for_the_clients_windows() -> None:
    pair = Pair(INITIAL_WINDOW_SIZE=1000)
    stream = pair.open()
    answer = random.Random(1).randbytes(300_000)
    pair.peer.connection.respond(stream, RESPONSE)
    pair.peer.connection.send(stream, answer)
    pair.peer.connection.finish(stream, TRAILERS)
    acknowledged = 0
    for _ in range(1000):
        pair.turn()
        got = len(pair.data(stream))
        if got == len(answer):
            break
        assert got > acknowledged, "stuck"
        pair.client.acknowledge_received_data(got - acknowledged, stream.id)
        acknowledged = got
    assert pair.data(stream) == answer
    pair.turn()
    assert "StreamEnded" in pair.kinds(stream)


def test_a_large_question_is_let_through() -> None:
    pair = Pair()
    stream = pair.open()
    question = random.Random(2).randbytes(40 * 1024 * 1024)
    sent = 0
    while sent < len(question):
        room = min(pair.client.local_flow_control_window(stream.id), pair.client.max_outbound_frame_size)
        assert room > 0, "stuck"
        pair.client.send_data(stream.id, question[sent : sent + room])
        sent += room
        pair.turn()
    pair.turn()
    assert pair.received[stream.id] == question


def test_windows_that_become_negative() -> None:
    pair = Pair()
    stream = pair.open()
    connection = pair.peer.connection
    connection.respond(stream, RESPONSE)
    connection.send(stream, b"x" * 60_000)
    pair.turn()
    pair.client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 100})
    pair.turn()
    assert stream.sendable == 100 - 60_000
    connection.send(stream, b"y" * 10)
    assert pair.turn() == []
    pair.client.increment_flow_control_window(60_000 - 100 + 10, stream.id)
    pair.client.increment_flow_control_window(60_010)
    pair.turn()
    assert pair.data(stream).endswith(b"y" * 10)


def test_long_fields_come_in_continuations() -> None:
    pair = Pair(step=1000)
    stream_id = pair.client.get_next_available_stream_id()
    pair.client.send_headers(stream_id, [*REQUEST.items(), ("x-long", "".join(map(chr, range(48, 91))).lower() * 700)])
    pair.turn()
    assert stream_id in pair.streams


def test_resets_pings_and_goodbyes() -> None:
    pair = Pair()
    first, second = pair.open(), pair.open()
    pair.client.reset_stream(first.id, h2.errors.ErrorCodes.CANCEL)
    pair.client.ping(b"12345678")
    events = pair.turn()
    assert pair.gone == {first.id}
    assert [event.ping_data for event in events if isinstance(event, h2.events.PingAckReceived)] == [b"12345678"]
    pair.peer.connection.finish(second, RESPONSE)
    pair.turn()
    pair.peer.connection.drain()  # `h2` takes no answers after it, though a client must
    events = pair.turn()
    gone = next(event for event in events if isinstance(event, h2.events.ConnectionTerminated))
    assert (gone.error_code, gone.last_stream_id) == (h2.errors.ErrorCodes.NO_ERROR, second.id)
    assert pair.peer.connection.over


def test_trailers_end_a_request() -> None:
    pair = Pair()
    stream = pair.open()
    pair.client.send_headers(stream.id, [("x-trailer", "1")], end_stream=True)
    pair.turn()
    assert pair.ended == {stream.id}


def test_giving_up_names_the_code() -> None:
    pair = Pair()
    pair.open()
    pair.peer.connection.give_up(Code.INTERNAL_ERROR, "why")
    gone = next(event for event in pair.turn() if isinstance(event, h2.events.ConnectionTerminated))
    assert (gone.error_code, gone.additional_data) == (h2.errors.ErrorCodes.INTERNAL_ERROR, b"why")


def test_many_calls_at_random() -> None:
    """A thousand calls in a random order of questions, answers, ends and resets, in random pieces."""
    chance = random.Random(3)
    pair = Pair(step=333)
    open_streams: list[Stream] = []
    asked: dict[int, bytes] = {}
    answered: dict[int, bytes] = {}
    for _ in range(3000):
        action = chance.random()
        if action < 0.3 or not open_streams:
            stream = pair.open()
            pair.peer.connection.respond(stream, RESPONSE)
            open_streams.append(stream)
            asked[stream.id] = answered[stream.id] = b""
            continue
        stream = chance.choice(open_streams)
        some = chance.randbytes(chance.randrange(1, 50))
        if action < 0.55:
            pair.client.send_data(stream.id, some, pad_length=chance.choice([None, 0, 9]))
            asked[stream.id] += some
        elif action < 0.8:
            pair.peer.connection.send(stream, some)
            answered[stream.id] += some
        elif action < 0.9:
            pair.peer.connection.finish(stream, TRAILERS)
            open_streams.remove(stream)
        else:
            pair.turn()
            pair.client.reset_stream(stream.id)
            open_streams.remove(stream)
        pair.turn()
    assert {i: pair.received[i] for i in asked} == asked
    got = dict.fromkeys(answered, b"")
    for event in pair.seen:
        if isinstance(event, h2.events.DataReceived):
            got[event.stream_id] += event.data
    assert got == answered
    assert not pair.peer.connection.over
