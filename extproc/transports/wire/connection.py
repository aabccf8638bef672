"""One HTTP/2 connection, the server's side (RFC 9113): bytes in, events out; answers in, bytes out. No I/O, no gRPC.

`receive` never raises: an error of a stream resets it, an error of the connection ends it with GOAWAY, both with the
code that the RFC names; section numbers stand beside the checks. Windows are granted again as data is read, since
whoever takes the events bounds what is kept of it.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable

from extproc.limits import (
    CONNECTION_WINDOW_BYTES,
    MAX_BLOCK_BYTES,
    MAX_CONCURRENT_STREAMS,
    MAX_CONTINUATIONS,
    MAX_FIELDS_BYTES,
    MAX_QUEUED_BYTES,
    MAX_REMEMBERED_STREAMS,
    MAX_SETTINGS,
    MAX_STREAM_QUEUED_BYTES,
    SETTINGS_FLOOD_COST,
    STREAM_WINDOW_BYTES,
)
from extproc.transports.wire import frames
from extproc.transports.wire.fields import (
    BadBlock,
    BlockDecoder,
    Fields,
    Malformed,
    check_regular,
    check_request,
)
from extproc.transports.wire.floods import FloodBudget
from extproc.transports.wire.frames import (
    ACK,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    HEAD,
    HEAD_BYTES,
    MAX_MAX_FRAME_BYTES,
    MAX_STREAM_ID,
    MAX_WINDOW,
    MIN_MAX_FRAME_BYTES,
    PADDED,
    PREFACE,
    PRIORITIZED,
    SETTING,
    WORD,
    Code,
    Setting,
)
from extproc.transports.wire.streams import Data, Ended, Opened, Reset, Stream, StreamEvent

_MAX_FRAME_BYTES = MIN_MAX_FRAME_BYTES  # ours is the default; larger frames would only delay other streams
_ANY = -1
_EMPTY_TABLE = b"\x20"  # "I use no dynamic table": valid whatever the peer's SETTINGS say (RFC 7541, 4.2)

_PREAMBLE = frames.settings(
    {
        Setting.MAX_CONCURRENT_STREAMS: MAX_CONCURRENT_STREAMS,
        Setting.INITIAL_WINDOW_SIZE: STREAM_WINDOW_BYTES,
        Setting.MAX_HEADER_LIST_SIZE: MAX_FIELDS_BYTES,
    }
) + frames.window_update(0, CONNECTION_WINDOW_BYTES - DEFAULT_WINDOW)


class _Fatal(Exception):
    """An error of the connection (5.4.1)."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Connection:
    """The protocol's state. After each call `take()` has the bytes to write; with `over` true, write them and close."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now` gives seconds; only the flood budget reads it."""
        self.over = False
        self.acknowledged = False  # the peer has seen our SETTINGS
        self._out: list[bytes | memoryview] = [_PREAMBLE]
        self._events: list[StreamEvent] = []
        self._flood = FloodBudget(now)
        self._decoder = BlockDecoder()
        self._streams: dict[int, Stream] = {}
        # Streams that ended, the latest ones. True: by our doing, so frames sent before the peer knew are no error.
        self._ended: OrderedDict[int, bool] = OrderedDict()
        self._last_id = 0
        self._draining = False

        self._rest = bytearray()  # a part of a frame
        self._wanted = 0  # how much of it there must be before it is worth looking again
        self._greeted = False
        self._greeting_bytes = len(PREFACE)  # before the first frame
        self._only = frames.SETTINGS  # the one type that may come next: SETTINGS first (3.4), CONTINUATION (6.10)
        self._block = bytearray()
        self._block_stream_id = 0
        self._block_ends = False
        self._continuations = 0

        self._receivable = CONNECTION_WINDOW_BYTES
        self._sendable = DEFAULT_WINDOW
        self._initial_sendable = DEFAULT_WINDOW
        self._max_frame_bytes = MIN_MAX_FRAME_BYTES
        self._paused = False
        self._queued_bytes = 0
        self._ready: OrderedDict[Stream, None] = OrderedDict()  # have data and a window; take turns
        self._table_announced = False

    # --- What the shell calls -----------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[StreamEvent]:
        """Take what was read, in any split."""
        self._events = events = list[StreamEvent]()
        if not self.over:
            try:
                self._read(data)
            except (_Fatal, BadBlock) as error:
                self._fail(error.code, str(error))
        return events

    def take(self) -> bytes:
        """All bytes to write so far, once."""
        data = b"".join(self._out)
        self._out.clear()
        return data

    def respond(self, stream: Stream, block: bytes) -> None:
        """Send the response's header block."""
        if not stream.closed:
            stream.answered = True
            self._send_block(stream.id, END_HEADERS, block)

    def send(self, stream: Stream, data: bytes) -> bool:
        """Send content, now or when the windows let it through. False where too much waits already."""
        length = len(data)
        if stream.closed or stream.trailers is not None:
            return True
        if (
            stream.outbox is None
            and length <= stream.sendable
            and length <= self._sendable
            and length <= self._max_frame_bytes
            and not self._paused
        ):
            stream.sendable -= length
            self._sendable -= length
            self._out += (HEAD.pack(length << 8, 0, stream.id), data)
            return True
        return self._queue(stream, data)

    def finish(self, stream: Stream, block: bytes, *, at_once: bool = False) -> None:
        """End the response with a block of trailers, after the content that waits, or `at_once` in place of it."""
        if stream.closed or (stream.trailers is not None and not at_once):
            return
        if stream.outbox and not at_once:
            stream.trailers = block
            return
        stream.answered = True
        self._send_block(stream.id, END_HEADERS | END_STREAM, block)
        if not stream.peer_ended:
            self._out.append(frames.rst_stream(stream.id, Code.NO_ERROR))  # the rest of the request is not needed (8.1)
        self._forget(stream, ours=not stream.peer_ended)

    def reset(self, stream: Stream, code: Code) -> None:
        """Give the stream up."""
        if not stream.closed:
            self._out.append(frames.rst_stream(stream.id, code))
            self._forget(stream, ours=True)

    def pause(self) -> None:
        """The transport's buffer is full: keep content back."""
        self._paused = True

    def resume(self) -> None:
        """The transport has room again."""
        self._paused = False
        self._flush()

    def drain(self) -> None:
        """Take no new streams; `over` once those that are open have ended (6.8)."""
        if not self._draining and not self.over:
            self._draining = True
            self._out.append(frames.goaway(self._last_id, Code.NO_ERROR, "closing"))
            self.over = not self._streams

    def streams(self) -> tuple[Stream, ...]:
        """Those that are open."""
        return tuple(self._streams.values())

    def give_up(self, code: Code, reason: str) -> list[StreamEvent]:
        """End the connection, with every stream."""
        self._events = events = list[StreamEvent]()
        if not self.over:
            self._fail(code, reason)
        return events

    # --- Reading ------------------------------------------------------------------------------------------------

    def _read(self, data: bytes) -> None:
        if self._rest:
            self._rest += data
            if len(self._rest) < self._wanted:
                return
            data = bytes(self._rest)
            self._rest.clear()
        if not self._greeted and not self._greet(data):
            self._keep(data, len(PREFACE))
            return
        position, size = self._greeting_bytes, len(data)
        self._greeting_bytes = 0
        wanted = HEAD_BYTES
        unpack = HEAD.unpack_from
        while size - position >= HEAD_BYTES:
            word, flags, stream_id = unpack(data, position)
            length = word >> 8
            if length > _MAX_FRAME_BYTES:
                raise _Fatal(Code.FRAME_SIZE_ERROR, "a frame is too large (4.2)")
            end = position + HEAD_BYTES + length
            if end > size:
                wanted = HEAD_BYTES + length
                break
            kind = word & 0xFF
            if self._only not in (_ANY, kind):
                raise _Fatal(Code.PROTOCOL_ERROR, "a frame out of order (3.4, 6.10)")
            handler = _HANDLERS.get(kind)
            if handler is None:
                self._spend()  # unknown types are ignored (4.1)
            else:
                handler(self, flags, stream_id & MAX_STREAM_ID, data[position + HEAD_BYTES : end])
                if self.over:
                    return
            position = end
        if position < size:
            self._keep(data[position:] if position else data, wanted)

    def _greet(self, data: bytes) -> bool:
        """Whether the client's preface is whole (3.4)."""
        if not PREFACE.startswith(data[: len(PREFACE)]):
            raise _Fatal(Code.PROTOCOL_ERROR, "not HTTP/2 (3.4)")
        self._greeted = len(data) >= len(PREFACE)
        return self._greeted

    def _keep(self, rest: bytes, wanted: int) -> None:
        self._rest += rest
        self._wanted = wanted

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        length = len(payload)
        self._receivable -= length
        if self._receivable < CONNECTION_WINDOW_BYTES // 2:
            if self._receivable < 0:
                raise _Fatal(Code.FLOW_CONTROL_ERROR, "more data than the connection's window (6.9.1)")
            self._out.append(frames.window_update(0, CONNECTION_WINDOW_BYTES - self._receivable))
            self._receivable = CONNECTION_WINDOW_BYTES
        stream = self._streams.get(stream_id)
        if stream is None:
            self._on_ended(stream_id)
            return
        if flags & PADDED:
            payload = _unpadded(payload)
        if stream.peer_ended:
            self._stream_error(stream, Code.STREAM_CLOSED)
        elif self._grant(stream, length, bool(flags & END_STREAM)):
            self._on_content(stream, payload, bool(flags & END_STREAM))

    def _grant(self, stream: Stream, length: int, ends: bool) -> bool:
        """Take data from the stream's window, and open it again. False where there was more than it lets through."""
        stream.receivable -= length
        if stream.receivable < STREAM_WINDOW_BYTES // 2:
            if stream.receivable < 0:
                self._stream_error(stream, Code.FLOW_CONTROL_ERROR)
                return False
            if not ends:
                self._out.append(frames.window_update(stream.id, STREAM_WINDOW_BYTES - stream.receivable))
                stream.receivable = STREAM_WINDOW_BYTES
        return True

    def _on_content(self, stream: Stream, payload: bytes, ends: bool) -> None:
        if stream.content_left >= 0:
            stream.content_left -= len(payload)
            if stream.content_left < 0:
                self._stream_error(stream, Code.PROTOCOL_ERROR)  # more than content-length says (8.1.1)
                return
        if payload:
            self._events.append(Data(stream, payload))
        elif not ends:
            self._spend()
        if ends:
            self._peer_ends(stream)

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id & 1:
            raise _Fatal(Code.PROTOCOL_ERROR, "a client's streams have odd numbers (5.1.1)")
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & PRIORITIZED:
            if len(payload) < 5:
                raise _Fatal(Code.FRAME_SIZE_ERROR, "HEADERS are too short (6.2)")
            payload = payload[5:]
        if flags & END_HEADERS:
            self._on_block(stream_id, bool(flags & END_STREAM), payload)
            return
        self._only = frames.CONTINUATION
        self._block += payload
        self._block_stream_id = stream_id
        self._block_ends = bool(flags & END_STREAM)
        self._continuations = 0

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._only != frames.CONTINUATION or stream_id != self._block_stream_id:
            raise _Fatal(Code.PROTOCOL_ERROR, "CONTINUATION of nothing (6.10)")
        self._continuations += 1
        self._block += payload
        if len(self._block) > MAX_BLOCK_BYTES or self._continuations > MAX_CONTINUATIONS:
            raise _Fatal(Code.ENHANCE_YOUR_CALM, "a header block is too long")
        if flags & END_HEADERS:
            block = bytes(self._block)
            self._block.clear()
            self._only = _ANY
            self._on_block(stream_id, self._block_ends, block)

    def _on_block(self, stream_id: int, ends: bool, block: bytes) -> None:
        fields = self._decoder.decode(block)  # whatever the stream's state: the table must follow (4.3)
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._on_trailers(stream, ends, fields)
        elif stream_id <= self._last_id:
            self._on_ended(stream_id)
        else:
            self._open(stream_id, ends, fields)

    def _open(self, stream_id: int, ends: bool, fields: Fields) -> None:
        if self._draining or len(self._streams) >= MAX_CONCURRENT_STREAMS:
            self._refuse(stream_id, Code.REFUSED_STREAM)  # tells that a retry is safe (5.1.2, 8.7)
            return
        try:
            content_length = check_request(fields)
        except Malformed:
            self._refuse(stream_id, Code.PROTOCOL_ERROR)
            return
        self._last_id = stream_id
        stream = self._streams[stream_id] = Stream(stream_id, self._initial_sendable, content_length)
        self._events.append(Opened(stream, fields))
        if ends:
            self._peer_ends(stream)

    def _refuse(self, stream_id: int, code: Code) -> None:
        if not self._draining:
            self._last_id = stream_id
        self._out.append(frames.rst_stream(stream_id, code))
        self._remember(stream_id, ours=True)
        self._spend()

    def _on_trailers(self, stream: Stream, ends: bool, fields: Fields) -> None:
        if stream.peer_ended:
            self._stream_error(stream, Code.STREAM_CLOSED)
            return
        try:
            check_regular(fields)
        except Malformed:
            ends = False
        if ends:
            self._peer_ends(stream)
        else:
            self._stream_error(stream, Code.PROTOCOL_ERROR)

    def _peer_ends(self, stream: Stream) -> None:
        stream.peer_ended = True
        if stream.content_left > 0:
            self._stream_error(stream, Code.PROTOCOL_ERROR)  # less than content-length says (8.1.1)
        else:
            self._events.append(Ended(stream))

    def _on_ended(self, stream_id: int) -> None:
        """HEADERS or DATA for a stream that is not open (5.1)."""
        ours = self._ended.get(stream_id)
        if ours is False:
            raise _Fatal(Code.STREAM_CLOSED, "a frame on a stream that its sender had ended (5.1)")
        if ours is None:
            raise _Fatal(Code.PROTOCOL_ERROR, "a frame on a stream that was never opened (5.1, 5.1.1)")

    def _on_priority(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id == 0:
            raise _Fatal(Code.PROTOCOL_ERROR, "PRIORITY without a stream (6.3)")
        if len(payload) != 5:
            raise _Fatal(Code.FRAME_SIZE_ERROR, "PRIORITY has 5 bytes (6.3)")
        self._spend()  # deprecated, and ignored (5.3.2)

    def _on_rst_stream(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _Fatal(Code.FRAME_SIZE_ERROR, "RST_STREAM has 4 bytes (6.4)")
        self._require_used(stream_id)
        stream = self._streams.get(stream_id)
        if stream is None or not stream.answered:
            self._spend()
        if stream is not None:
            self._forget(stream, ours=False)
            self._events.append(Reset(stream))

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise _Fatal(Code.PROTOCOL_ERROR, "SETTINGS are the connection's (6.5)")
        if len(payload) % SETTING.size or (flags & ACK and payload):
            raise _Fatal(Code.FRAME_SIZE_ERROR, "SETTINGS have 6 bytes each, an acknowledgement none (6.5)")
        if flags & ACK:
            if self._only == frames.SETTINGS:
                raise _Fatal(Code.PROTOCOL_ERROR, "an acknowledgement is no preface (3.4)")
            self.acknowledged = True
            self._spend()
            return
        self._only = _ANY
        self._spend(SETTINGS_FLOOD_COST)
        if len(payload) > MAX_SETTINGS * SETTING.size:  # each may change every stream
            raise _Fatal(Code.ENHANCE_YOUR_CALM, "too many settings")
        for name, value in SETTING.iter_unpack(payload):
            self._apply(name, value)
        self._out.append(frames.frame(frames.SETTINGS, ACK, 0, b""))
        self._flush()

    def _apply(self, name: int, value: int) -> None:
        """One of the peer's settings (6.5.2). Unknown ones are ignored; the table's size too: see _EMPTY_TABLE."""
        if name == Setting.ENABLE_PUSH and value > 1:
            raise _Fatal(Code.PROTOCOL_ERROR, "ENABLE_PUSH is 0 or 1 (6.5.2)")
        if name == Setting.MAX_FRAME_SIZE:
            if not MIN_MAX_FRAME_BYTES <= value <= MAX_MAX_FRAME_BYTES:
                raise _Fatal(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range (6.5.2)")
            self._max_frame_bytes = value
        if name == Setting.INITIAL_WINDOW_SIZE:
            if value > MAX_WINDOW:
                raise _Fatal(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE is out of range (6.5.2)")
            change = value - self._initial_sendable
            self._initial_sendable = value
            for stream in self._streams.values():
                if not self._widen(stream, change):
                    raise _Fatal(Code.FLOW_CONTROL_ERROR, "a stream's window is too large (6.9.2)")

    def _on_push_promise(self, flags: int, stream_id: int, payload: bytes) -> None:
        raise _Fatal(Code.PROTOCOL_ERROR, "a client does not push (8.4)")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise _Fatal(Code.PROTOCOL_ERROR, "PING is the connection's (6.7)")
        if len(payload) != 8:
            raise _Fatal(Code.FRAME_SIZE_ERROR, "PING has 8 bytes (6.7)")
        self._spend()
        if not flags & ACK:
            self._out.append(frames.frame(frames.PING, ACK, 0, payload))

    def _on_goaway(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise _Fatal(Code.PROTOCOL_ERROR, "GOAWAY is the connection's (6.8)")
        if len(payload) < 8:
            raise _Fatal(Code.FRAME_SIZE_ERROR, "GOAWAY has 8 bytes or more (6.8)")
        self.drain()

    def _on_window_update(self, flags: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise _Fatal(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE has 4 bytes (6.9)")
        increment = WORD.unpack(payload)[0] & MAX_WINDOW
        if stream_id == 0:
            if increment == 0:
                raise _Fatal(Code.PROTOCOL_ERROR, "WINDOW_UPDATE by nothing (6.9)")
            self._sendable += increment
            if self._sendable > MAX_WINDOW:
                raise _Fatal(Code.FLOW_CONTROL_ERROR, "the connection's window is too large (6.9.1)")
            self._flush()
            return
        self._require_used(stream_id)
        stream = self._streams.get(stream_id)
        if stream is None:
            self._spend()
        elif increment == 0:
            self._stream_error(stream, Code.PROTOCOL_ERROR)
        elif self._widen(stream, increment):
            self._flush()
        else:
            self._stream_error(stream, Code.FLOW_CONTROL_ERROR)

    def _require_used(self, stream_id: int) -> None:
        """An idle stream takes HEADERS and PRIORITY only (5.1); ours, with even numbers, are never opened."""
        if not stream_id & 1 or (stream_id > self._last_id and stream_id not in self._ended):
            raise _Fatal(Code.PROTOCOL_ERROR, "a frame on a stream that was never opened (5.1)")

    # --- Writing ------------------------------------------------------------------------------------------------

    def _send_block(self, stream_id: int, flags: int, block: bytes) -> None:
        if not self._table_announced:
            self._table_announced = True
            block = _EMPTY_TABLE + block
        self._out += (HEAD.pack(len(block) << 8 | frames.HEADERS, flags, stream_id), block)

    def _queue(self, stream: Stream, data: bytes) -> bool:
        length = len(data)
        if stream.queued_bytes + length > MAX_STREAM_QUEUED_BYTES or self._queued_bytes + length > MAX_QUEUED_BYTES:
            return False
        if stream.outbox is None:
            stream.outbox = deque()
        stream.outbox.append(memoryview(data))
        stream.queued_bytes += length
        self._queued_bytes += length
        if stream.sendable > 0:
            self._ready[stream] = None
            self._flush()
        return True

    def _widen(self, stream: Stream, change: int) -> bool:
        """Change the stream's window. False where it became too large."""
        stream.sendable += change
        if stream.sendable > 0 and stream.outbox:
            self._ready[stream] = None
        else:
            self._ready.pop(stream, None)
        return stream.sendable <= MAX_WINDOW

    def _flush(self) -> None:
        """Send what the windows let through: a frame of each stream in turn."""
        ready = self._ready
        while ready and self._sendable > 0 and not self._paused:
            stream, _ = ready.popitem(last=False)
            self._send_some(stream)
            if not stream.outbox:
                stream.outbox = None
                if stream.trailers is not None:
                    self.finish(stream, stream.trailers, at_once=True)
            elif stream.sendable > 0:
                ready[stream] = None

    def _send_some(self, stream: Stream) -> None:
        outbox = stream.outbox or deque()  # not empty, or it would not be ready
        data = outbox.popleft()
        room = min(self._sendable, stream.sendable, self._max_frame_bytes)
        if len(data) > room:
            outbox.appendleft(data[room:])
            data = data[:room]
        length = len(data)
        stream.sendable -= length
        self._sendable -= length
        stream.queued_bytes -= length
        self._queued_bytes -= length
        self._out += (HEAD.pack(length << 8, 0, stream.id), data)

    # --- Endings ------------------------------------------------------------------------------------------------

    def _stream_error(self, stream: Stream, code: Code) -> None:
        self.reset(stream, code)
        self._events.append(Reset(stream))
        self._spend()

    def _spend(self, cost: int = 1) -> None:
        if not self._flood.spend(cost):
            raise _Fatal(Code.ENHANCE_YOUR_CALM, "too many frames that carry nothing (10.5)")

    def _forget(self, stream: Stream, *, ours: bool) -> None:
        stream.closed = True
        stream.outbox = None
        self._queued_bytes -= stream.queued_bytes
        self._ready.pop(stream, None)
        del self._streams[stream.id]
        self._remember(stream.id, ours=ours)
        if self._draining and not self._streams:
            self.over = True

    def _remember(self, stream_id: int, *, ours: bool) -> None:
        self._ended[stream_id] = ours
        if len(self._ended) > MAX_REMEMBERED_STREAMS:
            self._ended.popitem(last=False)

    def _fail(self, code: Code, reason: str) -> None:
        self._out.append(frames.goaway(self._last_id, code, reason))
        self.over = True
        for stream in list(self._streams.values()):
            self._forget(stream, ours=False)
            self._events.append(Reset(stream))


def _unpadded(payload: bytes) -> bytes:
    if not payload:
        raise _Fatal(Code.FRAME_SIZE_ERROR, "no room for the length of the padding (6.1, 6.2)")
    if payload[0] >= len(payload):
        raise _Fatal(Code.PROTOCOL_ERROR, "more padding than frame (6.1, 6.2)")
    return payload[1 : len(payload) - payload[0]]


_HANDLERS: dict[int, Callable[[Connection, int, int, bytes], None]] = {
    frames.DATA: Connection._on_data,
    frames.HEADERS: Connection._on_headers,
    frames.PRIORITY: Connection._on_priority,
    frames.RST_STREAM: Connection._on_rst_stream,
    frames.SETTINGS: Connection._on_settings,
    frames.PUSH_PROMISE: Connection._on_push_promise,
    frames.PING: Connection._on_ping,
    frames.GOAWAY: Connection._on_goaway,
    frames.WINDOW_UPDATE: Connection._on_window_update,
    frames.CONTINUATION: Connection._on_continuation,
}
