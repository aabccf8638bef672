"""Header blocks: what is remembered of them, and when it is forgotten."""

from __future__ import annotations

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.limits import MAX_CACHED_BLOCKS
from extproc.transports.wire.fields import BadBlock, BlockDecoder, check_request, encode, size_bytes


def test_a_block_that_refers_to_the_table_follows_its_changes() -> None:
    """The same bytes mean something else once the table has changed."""
    encoder = hpack.Encoder()
    decoder = BlockDecoder()
    assert decoder.decode(encoder.encode([("a", "1")])) == ((b"a", b"1"),)
    same = b"\xbe"  # the newest entry
    assert decoder.decode(same) == ((b"a", b"1"),)
    assert decoder.decode(same) == ((b"a", b"1"),)
    assert decoder.decode(encoder.encode([("a", "2")])) == ((b"a", b"2"),)
    assert decoder.decode(same) == ((b"a", b"2"),)
    assert decoder.decode(b"\x20\x3f\xe1\x1f") == ()  # the table emptied, and as large as it was
    with pytest.raises(BadBlock):
        decoder.decode(same)


def test_a_full_table_changes_without_growing() -> None:
    """A new entry drives the only other one out: as many as before, and other ones."""
    encoder, decoder = hpack.Encoder(), BlockDecoder()
    for value in ("1" * 4000, "2" * 4000, "3" * 4000):
        fields = ((b"a", value.encode()),)
        assert decoder.decode(encoder.encode([("a", value)])) == fields
        assert [decoder.decode(b"\xbe") for _ in range(2)] == [fields, fields]


@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["1", "2", "x" * 2000])), max_size=3), max_size=30
    )
)
def test_remembering_changes_nothing(requests: list[list[tuple[str, str]]]) -> None:
    encoder, plain, remembering = hpack.Encoder(), hpack.Decoder(), BlockDecoder()
    for fields in requests:
        block = encoder.encode(fields)
        expected = tuple((bytes(name), bytes(value)) for name, value in plain.decode(block, raw=True))
        assert remembering.decode(block) == expected


def test_what_is_remembered_is_bounded() -> None:
    decoder = BlockDecoder()
    for number in range(3 * MAX_CACHED_BLOCKS):
        decoder.decode(encode(((b"x-id", str(number).encode()),)))
        assert len(decoder._known) <= MAX_CACHED_BLOCKS


@given(st.binary(max_size=60))
def test_any_bytes_decode_or_are_refused(block: bytes) -> None:
    try:
        fields = BlockDecoder().decode(block)
    except BadBlock:
        return
    size_bytes(fields)


def test_our_own_blocks_leave_the_peers_table_alone() -> None:
    decoder = hpack.Decoder()
    decoder.decode(encode(((b":status", b"200"), (b"grpc-status", b"0"), (b"grpc-message", b"a message"))))
    assert not decoder.header_table.dynamic_entries


@pytest.mark.parametrize(
    ("extra", "length"),
    [
        ((), -1),
        (((b"content-length", b"12"),), 12),
        (((b"content-length", b"12"), (b"content-length", b"12")), 12),
        (((b"content-length", b"0"),), 0),
    ],
)
def test_content_length(extra: tuple[tuple[bytes, bytes], ...], length: int) -> None:
    assert check_request(((b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/"), *extra)) == length


def test_a_proper_connect_is_well_formed() -> None:
    assert check_request(((b":method", b"CONNECT"), (b":authority", b"a:1"))) == -1
