"""A JSON array, taken apart as it arrives: how Gemini streams where nobody asked for server-sent events.

Each element keeps its exact bytes and what stands before it, so that what is passed on is what the provider sent.
"""

from __future__ import annotations

import re

from extproc.errors import StreamTooLarge
from extproc.limits import MAX_EVENT_BYTES
from extproc.sse import SseEvent

# What may begin or end something, or change how the next byte is read: all else is passed over.
_OUTSIDE_STRING = re.compile(rb'["{}\[\]]')
_INSIDE_STRING = re.compile(rb'["\\]')


class JsonArrayParser:
    """Bytes in, whole elements out. Joined, the events' `raw` and the remainder are the input.

    An element is an object, and an event without a name. Its `raw` begins where the one before it ended, with the comma
    or the array's bracket. An object outside any array, such as an error's body, is an element too.
    `feed` raises StreamTooLarge at the first element above the bound, once the elements before it have been returned.
    """

    __slots__ = ("_depth", "_in_string", "_max_event_bytes", "_pending", "_scanned", "_start")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._pending = bytearray()
        self._scanned = 0  # how far `_pending` has been read: beyond its end, where it ends with a backslash
        self._start = 0  # where the element begins
        self._depth = 0  # of the brackets in it; 0 outside
        self._in_string = False

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """The elements that this chunk completes."""
        self._pending += chunk
        events: list[SseEvent] = []
        while (end := self._find_end()) is not None and end <= self._max_event_bytes:
            events.append(self._take(end))
        if not events and len(self._pending) > self._max_event_bytes:
            raise StreamTooLarge
        return events

    def finish(self) -> bytes:
        """What came after the last whole element, once: the array's closing bracket, or an element that was cut off."""
        remainder = bytes(self._pending)
        self._pending.clear()
        self._scanned = 0
        return remainder

    def _find_end(self) -> int | None:
        """The end of the next element, or None where it has not come yet."""
        pending, scanned = self._pending, self._scanned
        while found := (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(pending, scanned):
            scanned = found.end()
            match found[0]:
                case b'"':
                    self._in_string = not self._in_string
                case b"\\":
                    scanned += 1
                case b"}" | b"]" if self._depth:
                    self._depth -= 1
                    if not self._depth:
                        self._scanned = scanned
                        return scanned
                case b"{" | b"[" as bracket if self._depth or bracket == b"{":
                    if not self._depth:
                        self._start = scanned - 1
                    self._depth += 1
        self._scanned = max(scanned, len(pending))
        return None

    def _take(self, end: int) -> SseEvent:
        raw = bytes(memoryview(self._pending)[:end])
        del self._pending[:end]
        self._scanned = 0
        return SseEvent(raw, raw[self._start :], None)


def last_element(element: bytes, *, first: bool) -> bytes:
    """An element after which the array ends, wherever its provider was: what was sent of it becomes legal JSON."""
    return (b"[" if first else b",\r\n") + element + b"]"
