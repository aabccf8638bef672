"""The splitter of JSON arrays against a reader of whole texts, at every boundary the network may choose."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.errors import StreamTooLarge
from extproc.jsonarray import JsonArrayParser, last_element
from extproc.sse import SseEvent
from tests.each import each_case
from tests.recordings import Case, protocol_cases

ARRAYS = tuple(case for case in protocol_cases("gemini", stream=True) if case.body.lstrip().startswith(b"["))
SMALL = tuple(case for case in ARRAYS if len(case.body) < 3_000)


def parse(chunks: Iterable[bytes]) -> tuple[list[SseEvent], bytes]:
    parser = JsonArrayParser()
    events = [event for chunk in chunks for event in parser.feed(chunk)]
    return events, parser.finish()


def each_byte(text: bytes) -> list[bytes]:
    return [text[i : i + 1] for i in range(len(text))]


def data(chunks: Iterable[bytes]) -> list[bytes | None]:
    return [event.data for event in parse(chunks)[0]]


FORMAT: dict[str, tuple[bytes, list[bytes]]] = {
    "one element": (b'[{"a":1}]', [b'{"a":1}']),
    "as Gemini writes them": (b'[{\n "a": 1\n}\n,\n{\n "a": 2\n}\n]\n', [b'{\n "a": 1\n}', b'{\n "a": 2\n}']),
    "CRLF": (b"[{}\r\n,\r\n{}\r\n]", [b"{}", b"{}"]),
    "no elements": (b"[]", []),
    "nothing": (b"", []),
    "nested": (b'[{"a":[{"b":[[]]},{}]},{}]', [b'{"a":[{"b":[[]]},{}]}', b"{}"]),
    "brackets in strings": (rb'[{"a":"}]{[","b":"]"},{}]', [rb'{"a":"}]{[","b":"]"}', b"{}"]),
    "quotes in strings": (rb'[{"a":"\"}]\\"},{"\\\"":1}]', [rb'{"a":"\"}]\\"}', rb'{"\\\"":1}']),
    "UTF-8": ('[{"ж":"😀"}]'.encode(), ['{"ж":"😀"}'.encode()]),
    "byte order mark": (b"\xef\xbb\xbf[{}]", [b"{}"]),
    "what is no object is not an element": (b'[1,"{}",null,{"a":1},true]', [b'{"a":1}']),
    "an object by itself": (b'{"error":{"code":500}}\n', [b'{"error":{"code":500}}']),
    "after the array's end": (b'[{}]{"error":[]}', [b"{}", b'{"error":[]}']),
    "cut off": (b'[{"a":1},{"a":"', [b'{"a":1}']),
    "cut off at a backslash": (rb'[{"a":1},{"a":"' + b"\\", [b'{"a":1}']),
    "more closed than opened": (b"]}}[{}]", [b"{}"]),
}


@pytest.mark.parametrize(("text", "expected"), FORMAT.values(), ids=FORMAT)
def test_format(text: bytes, expected: list[bytes]) -> None:
    for at in range(len(text) + 1):
        for chunks in ([text[:at], text[at:]], [text[:at], b"", *each_byte(text[at:])]):
            events, remainder = parse(chunks)
            assert [event.data for event in events] == expected
            assert b"".join(event.raw for event in events) + remainder == text


def test_raw_is_the_exact_bytes() -> None:
    events, remainder = parse([b'[{"a":1}\n,\n{}\n]\n'])
    assert [event.raw for event in events] == [b'[{"a":1}', b"\n,\n{}"]
    assert [event.name for event in events] == [None, None]
    assert remainder == b"\n]\n"


def test_finish_gives_the_remainder_once() -> None:
    parser = JsonArrayParser()
    parser.feed(b"[{},{")
    assert (parser.finish(), parser.finish()) == (b",{", b"")


def test_an_element_is_not_delayed() -> None:
    parser = JsonArrayParser()
    for text in (b'[{"a":"b"}', b",{}", b'\n, {"c":[1]}'):
        *early, last = each_byte(text)
        assert [event for byte in early for event in parser.feed(byte)] == []
        assert [event.raw for event in parser.feed(last)] == [text]


@pytest.mark.parametrize("size", [1, 3, 64], ids="chunks of {}".format)
def test_an_element_of_the_bound_passes_and_one_byte_more_does_not(size: int) -> None:
    def feed(length: int) -> list[SseEvent]:
        text = b'[{"":"' + b"x" * (length - 8) + b'"}'
        parser = JsonArrayParser(max_event_bytes=40)
        return [event for i in range(0, length, size) for event in parser.feed(text[i : i + size])]

    assert len(feed(40)) == 1
    with pytest.raises(StreamTooLarge):
        feed(41)


@pytest.mark.parametrize("end", [b'"}', b""], ids=["closed", "unfinished"])
def test_elements_before_one_that_is_too_large_are_not_lost(end: bytes) -> None:
    parser = JsonArrayParser(max_event_bytes=20)
    assert len(parser.feed(b'[{"a":1},{"b":2},{"":"' + b"x" * 30 + end)) == 2
    with pytest.raises(StreamTooLarge):
        parser.feed(b",{}")


def test_what_lies_between_elements_is_bounded() -> None:
    parser = JsonArrayParser(max_event_bytes=20)
    assert len(parser.feed(b"[{}]" + b" [" * 10)) == 1
    with pytest.raises(StreamTooLarge):
        parser.feed(b" ")


def test_no_byte_is_searched_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    searched = 0

    class CountingPattern:
        def search(self, buffer: bytearray, start: int) -> None:
            nonlocal searched
            searched += max(0, len(buffer) - start)

    monkeypatch.setattr("extproc.jsonarray._OUTSIDE_STRING", CountingPattern())
    parser = JsonArrayParser()
    for byte in each_byte(b"x" * 5_000):
        parser.feed(byte)
    assert searched == 5_000


@each_case(ARRAYS)
def test_recorded(case: Case) -> None:
    for chunks in ([case.body], case.recorded_chunks(), case.random_chunks(len(case.body)), each_byte(case.body)):
        events, remainder = parse(chunks)
        assert b"".join(event.raw for event in events) + remainder == case.body
        assert [json.loads(event.data or b"") for event in events] == json.loads(case.body)
        assert remainder.strip() == b"]"


@each_case(SMALL)
def test_recorded_at_every_split_point(case: Case) -> None:
    expected = data([case.body])
    for at in range(len(case.body)):
        assert data([case.body[:at], case.body[at:]]) == expected, at


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3), max_size=5), st.data())
def test_any_array_in_any_chunks(elements: list[dict[str, Any]], draw: st.DataObject) -> None:
    indent = draw.draw(st.sampled_from([None, 1]))
    text = json.dumps(elements, indent=indent, ensure_ascii=draw.draw(st.booleans())).encode("utf-8", "surrogatepass")
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    chunks = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    events, remainder = parse(chunks)
    assert [json.loads((event.data or b"").decode("utf-8", "surrogatepass")) for event in events] == elements
    assert b"".join(event.raw for event in events) + remainder == text


@given(st.lists(st.lists(st.sampled_from(list(b'{}[]",\\a'))).map(bytes), max_size=8))
def test_any_bytes_in_any_chunks(chunks: list[bytes]) -> None:
    text = b"".join(chunks)
    events, remainder = parse(chunks)
    assert b"".join(event.raw for event in events) + remainder == text
    assert (events, remainder) == parse([text])


@pytest.mark.parametrize("sent", [b"", b"[{}", b"[{}\n,\n{}"], ids=["nothing", "one", "two"])
def test_a_last_element_leaves_legal_json(sent: bytes) -> None:
    assert json.loads(sent + last_element(b'{"error":1}', first=not sent))[-1] == {"error": 1}
