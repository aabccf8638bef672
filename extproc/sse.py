"""Server-sent events, taken apart as they arrive (WHATWG HTML, 9.2.5 and 9.2.6).

Each event keeps its exact bytes, so that what is passed on is what the provider sent. Nothing is normalised.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from extproc.errors import StreamTooLarge
from extproc.limits import MAX_EVENT_BYTES

_BOM = b"\xef\xbb\xbf"

# A line's end, and the blank line that closes the block. The look-ahead keeps a CRLF from being read as both.
_BLOCK_END = re.compile(rb"(\r\n|\r(?!\n)|\n)(\r\n|\r|\n)")

# Bytes already searched that may yet begin a block's end: a line's last LF or CR, and the blank line's CR after it.
_OVERLAP_BYTES = 2


class SseEvent(NamedTuple):
    """One block of a stream. `data` is None where no field was `data`: comments, retries, stray blank lines. A block
    that is bare JSON counts as data.

    `raw` runs through the closing blank line; a blank line that closes nothing begins the next event's `raw`.
    """

    raw: bytes
    data: bytes | None
    name: bytes | None


class SseParser:
    """Bytes in, whole events out. Joined, the events' `raw` and the remainder are the input.

    `feed` raises StreamTooLarge at the first event above the bound, once the events before it have been returned.
    """

    __slots__ = ("_bom_possible", "_max_event_bytes", "_pending", "_scanned")

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._pending = bytearray()
        self._scanned = 0
        self._bom_possible = True

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """The events that this chunk completes."""
        if self._pending or self._bom_possible or chunk.find(b"\r") >= 0 or len(chunk) > self._max_event_bytes:
            self._pending += chunk
            return self._take_blocks()
        blocks = chunk.split(b"\n\n")
        if unfinished := blocks.pop():
            self._pending += unfinished
        return [_read_lf_block(block) for block in blocks]

    def finish(self) -> bytes:
        """What came after the last whole event, once. A browser would drop it; a proxy passes it on."""
        remainder = bytes(self._pending)
        self._pending.clear()
        return remainder

    def _take_blocks(self) -> list[SseEvent]:
        """The way for everything else: any line end, events spread over chunks, the start of the stream."""
        events: list[SseEvent] = []
        pending, start, searched = self._pending, 0, self._scanned
        while (end := _BLOCK_END.search(pending, searched)) and not _may_be_half_crlf(end):
            if end.end() - start > self._max_event_bytes:
                break
            events.append(self._read_block(bytes(memoryview(pending)[start : end.end()])))
            start = searched = end.end()
        del end  # a match keeps the buffer from being resized
        del pending[:start]
        self._scanned = max(0, len(pending) - _OVERLAP_BYTES)
        if not events and len(pending) > self._max_event_bytes:
            raise StreamTooLarge
        return events

    def _read_block(self, raw: bytes) -> SseEvent:
        if self._bom_possible:
            self._bom_possible = False
            return _read_block(raw, raw.removeprefix(_BOM))
        return _read_block(raw, raw)


def _may_be_half_crlf(end: re.Match[bytes]) -> bool:
    """A blank line's CR at the very end of what has come: its LF may follow, unless lines here end with CR."""
    return end[2] == b"\r" and end[1] != b"\r" and end.end() == end.endpos


def _read_lf_block(block: bytes) -> SseEvent:
    """A block without its blank line. Most are one line of data."""
    raw = block + b"\n\n"
    if block.startswith(b"data: ") and block.find(b"\n") < 0:
        return SseEvent(raw, block[6:], None)
    return _read_block(raw, block)


def _read_block(raw: bytes, block: bytes) -> SseEvent:
    data: list[bytes] = []
    name = None
    for line in block.splitlines():  # on bytes: at LF, CR and CRLF only
        field, _, value = line.partition(b":")
        if field == b"data":
            data.append(value.removeprefix(b" "))
        elif field == b"event":
            name = value.removeprefix(b" ")
    if not data and block.lstrip().startswith(b"{"):  # Google breaks a stream off with an error that is no event
        return SseEvent(raw, block.strip(), name)
    return SseEvent(raw, b"\n".join(data) if data else None, name)
