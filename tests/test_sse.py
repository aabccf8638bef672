"""The event parser against a reader of whole texts, at every boundary the network may choose."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from extproc.errors import StreamTooLarge
from extproc.sse import SseEvent, SseParser
from tests.each import each_case
from tests.recordings import COLLECTION, SUBSET, Case, cases


def streams(root: Path) -> tuple[Case, ...]:
    return tuple(case for case in cases(root) if "event-stream" in (case.meta["content_type"] or ""))


STREAMS = streams(COLLECTION) or streams(SUBSET)
SMALL_STREAMS = tuple(case for case in streams(SUBSET) if len(case.body) < 5_000)

BOM = b"\xef\xbb\xbf"

Told = list[tuple[bytes, bytes | None]]


def read_whole(text: bytes) -> Told:
    """Data and name of every event in a whole text, line by line as the standard tells it. No state, no chunks."""
    events: Told = []
    data: list[bytes] = []
    name = None
    for line, end in re.findall(rb"([^\r\n]*)(\r\n|\r|\n|\Z)", text.removeprefix(BOM)):
        if not end:
            break  # what is not closed is not dispatched
        if not line:
            if data:
                events.append((b"\n".join(data), name))
            data, name = [], None
            continue
        field, _, value = line.partition(b":")
        if value.startswith(b" "):
            value = value[1:]
        if field == b"data":
            data.append(value)
        if field == b"event":
            name = value
    return events


def parse(chunks: Iterable[bytes]) -> tuple[list[SseEvent], bytes]:
    parser = SseParser()
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    return events, parser.finish()


def told(events: Iterable[SseEvent]) -> Told:
    return [(event.data, event.name) for event in events if event.data is not None]


def check(chunks: list[bytes]) -> None:
    """Nothing lost, nothing changed, and the same events as in the whole text, at a stream's start and later."""
    check_from_start(chunks)
    check_from_start([b":\n\n", *chunks])


def check_from_start(chunks: list[bytes]) -> None:
    text = b"".join(chunks)
    events, remainder = parse(chunks)
    assert b"".join(event.raw for event in events) + remainder == text
    # A blank line's CR at the very end waits for its LF, so that the last event may still be in the remainder.
    rest = read_whole(remainder) if text != remainder else read_whole(text)
    assert told(events) + rest == read_whole(text)


def each_byte(text: bytes) -> list[bytes]:
    return [text[i : i + 1] for i in range(len(text))]


# --- The format -------------------------------------------------------------------------------------------------------

FORMAT = {
    "one event": (b"data: a\n\n", [(b"a", None)]),
    "no space after the colon": (b"data:a\n\n", [(b"a", None)]),
    "only one space goes": (b"data:  a\n\n", [(b" a", None)]),
    "several lines of data": (b"data: a\ndata:b\ndata: \n\n", [(b"a\nb\n", None)]),
    "data without a colon": (b"data\n\n", [(b"", None)]),
    "empty data": (b"data:\n\n", [(b"", None)]),
    "name": (b"event: ping\ndata: {}\n\n", [(b"{}", b"ping")]),
    "name after the data": (b"data: {}\nevent:ping\n\n", [(b"{}", b"ping")]),
    "name without data": (b"event: ping\n\n", []),
    "a name lasts for one event": (b"event: x\ndata: 1\n\ndata: 2\n\n", [(b"1", b"x"), (b"2", None)]),
    "comment": (b": hello\n\n", []),
    "comment within an event": (b": hello\ndata: a\n\n", [(b"a", None)]),
    "other fields": (b"id: 7\nretry: 10\ndata: a\nerror: no\n\n", [(b"a", None)]),
    "a space before the field is part of it": (b" data: a\n\n", []),
    "field names have a case": (b"Data: a\n\n", []),
    "CRLF": (b"data: a\r\n\r\ndata: b\r\n\r\n", [(b"a", None), (b"b", None)]),
    "CR": (b"data: a\r\rdata: b\r\r", [(b"a", None), (b"b", None)]),
    "LF, then CRLF": (b"data: a\n\r\ndata: b\r\n\n", [(b"a", None), (b"b", None)]),
    "CR, then CRLF": (b"data: a\r\r\ndata: b\n\n", [(b"a", None), (b"b", None)]),
    "CR within data ends a line": (b"data: a\rdata: b\n\n", [(b"a\nb", None)]),
    "more blank lines than needed": (b"\n\n\ndata: a\n\n\n\n\ndata: b\n\n\n", [(b"a", None), (b"b", None)]),
    "byte order mark": (BOM + b"data: a\n\n", [(b"a", None)]),
    "byte order mark, later": (b"data: a\n\n" + BOM + b"data: b\n\n", [(b"a", None)]),
    "two byte order marks": (BOM + BOM + b"data: a\n\n", []),
    "split line ends are no line ends in text": (rb'data: "a\n\ndata: b"' + b"\n\n", [(rb'"a\n\ndata: b"', None)]),
    "other separators of Python's": (b"data: a\x0b\x0c\x1c\x85b\n\n", [(b"a\x0b\x0c\x1c\x85b", None)]),
    "UTF-8": ("data: 😀 ж\n\n".encode(), [("😀 ж".encode(), None)]),
    "not UTF-8": (b"data: \xff\xfe\n\n", [(b"\xff\xfe", None)]),
    "unfinished": (b"data: a\n\ndata: b\n", [(b"a", None)]),
    "nothing": (b"", []),
}


@pytest.mark.parametrize(("text", "expected"), FORMAT.values(), ids=FORMAT)
def test_format(text: bytes, expected: Told) -> None:
    assert told(parse([text])[0]) == expected
    assert told(parse(each_byte(text))[0]) == expected
    check([text])
    for at in range(len(text)):
        check([text[:at], text[at:]])
        check([text[:at], b"", *each_byte(text[at:])])


def test_raw_is_the_exact_bytes() -> None:
    events, remainder = parse([b": hi\n\nevent: a\ndata:x\r\n\r\ndata: y\n\nda"])
    assert [event.raw for event in events] == [b": hi\n\n", b"event: a\ndata:x\r\n\r\n", b"data: y\n\n"]
    assert [event.data for event in events] == [None, b"x", b"y"]
    assert remainder == b"da"


def test_finish_gives_the_remainder_once() -> None:
    parser = SseParser()
    parser.feed(b"data: [DONE]")
    assert (parser.finish(), parser.finish()) == (b"data: [DONE]", b"")


# --- When an event is handed out --------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"\r\n\r\n"], ids=["LF", "CR", "CRLF"])
def test_an_event_is_not_delayed(end: bytes) -> None:
    parser = SseParser()
    for i in range(3):
        text = b"data: %d" % i + end
        *early, last = each_byte(text)
        assert [event for byte in early for event in parser.feed(byte)] == []
        assert parser.feed(last) == [SseEvent(text, b"%d" % i, None)]


def test_no_event_ends_within_a_crlf() -> None:
    parser = SseParser()
    assert parser.feed(b"data: a\r\n\r") == []
    assert parser.feed(b"\ndata: b") == [SseEvent(b"data: a\r\n\r\n", b"a", None)]


# --- Bounds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 64], ids="chunks of {}".format)
def test_an_event_of_the_bound_passes_and_one_byte_more_does_not(size: int) -> None:
    def feed(length: int) -> list[SseEvent]:
        text = b"data: " + b"x" * (length - 8) + b"\n\n"
        parser = SseParser(max_event_bytes=40)
        return [event for i in range(0, length, size) for event in parser.feed(text[i : i + size])]

    assert len(feed(40)) == 1
    with pytest.raises(StreamTooLarge):
        feed(41)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b""], ids=["LF", "CRLF", "unfinished"])
def test_events_before_one_that_is_too_large_are_not_lost(end: bytes) -> None:
    parser = SseParser(max_event_bytes=20)
    parser.feed(b"data: 0\n\n")
    text = b"data: a\n\ndata: b\n\ndata: " + b"x" * 30 + end
    assert told(parser.feed(text)) == [(b"a", None), (b"b", None)]
    with pytest.raises(StreamTooLarge):
        parser.feed(b"data: c\n\n")


def test_many_small_events_in_one_chunk_are_not_too_large() -> None:
    text = b"data: a\n\n" * 100
    parser = SseParser(max_event_bytes=20)
    assert len(parser.feed(text)) + len(parser.feed(text)) == 200


def test_no_byte_is_searched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = 0

    class CountingPattern:
        def search(self, buffer: bytearray, start: int) -> None:
            nonlocal searched
            searched += len(buffer) - start

    monkeypatch.setattr("extproc.sse._BLOCK_END", CountingPattern())
    parser = SseParser()
    text = b"data: " + b"x" * 5_000
    for byte in each_byte(text):
        parser.feed(byte)
    assert searched <= 3 * len(text)  # each byte, and the two before it that may begin a block's end


# --- Recorded streams -------------------------------------------------------------------------------------------------


@each_case(STREAMS)
def test_recorded_stream(case: Case) -> None:
    check([case.body])
    check(case.recorded_chunks())
    check(case.random_chunks(seed=len(case.body)))
    check_from_start(each_byte(case.body))


@each_case(SMALL_STREAMS)
def test_recorded_stream_at_every_split_point(case: Case) -> None:
    expected = read_whole(case.body)
    for at in range(len(case.body)):
        events, _ = parse([case.body[:at], case.body[at:]])
        assert told(events) == expected, at


# --- Anything ---------------------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [
        b"\r",
        b"\n",
        b"\r\n",
        b"\n\n",
        b"data",
        b":",
        b" ",
        b"data: ",
        b"event: e",
        b": c",
        BOM,
        b"x",
        "é".encode(),
        b"\x00",
    ]
)


@given(st.lists(st.lists(PIECES, max_size=8).map(b"".join), max_size=12))
@example([b"data: a\r", b"\r", b"\ndata: b\r\n\r", b"\n"])
@example([b"data: a\r\n", b"\r", b"data: b\n\n"])
@example([b"\xef", b"\xbb", b"\xbfdata: a\n\n"])
def test_any_text_in_any_chunks(chunks: list[bytes]) -> None:
    check(chunks)
    check(each_byte(b"".join(chunks)))


def test_bare_json_is_read_like_data() -> None:
    """Google's servers break a stream off with an error that is no event: it must not pass unseen."""
    error = b'{\n  "error": {"code": 429}\n}'
    (event,) = SseParser().feed(error + b"\n\n")
    assert (event.raw, event.data) == (error + b"\n\n", error)
