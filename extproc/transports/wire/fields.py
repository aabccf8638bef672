"""Header blocks: HPACK (RFC 7541) by the `hpack` library, and what a request's fields must be (RFC 9113, section 8)."""

from __future__ import annotations

import re
from functools import lru_cache

import hpack
from hpack.struct import NeverIndexedHeaderTuple

from extproc.limits import MAX_CACHED_BLOCKS, MAX_FIELDS_DECODED_BYTES
from extproc.transports.wire.frames import Code

Fields = tuple[tuple[bytes, bytes], ...]

_FIELD_OVERHEAD_BYTES = 32  # as SETTINGS_MAX_HEADER_LIST_SIZE counts (6.5.2)
_NAME = re.compile(rb"[!-9;-@\[-~]+").fullmatch  # visible ASCII, no capitals, no colon (8.2.1)
_VALUE = re.compile(rb"(?:[^\x00\r\n \t](?:[^\x00\r\n]*[^\x00\r\n \t])?)?").fullmatch
_REQUEST_PSEUDO = frozenset((b":method", b":scheme", b":authority", b":path"))
_OF_CONNECTIONS = frozenset((b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"))


class BadBlock(Exception):
    """The connection's HPACK state is lost, and the connection with it."""

    def __init__(self, code: Code, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Malformed(Exception):
    """Fields that a request may not have: an error of its stream (8.1.1)."""


class BlockDecoder:
    """Decodes one connection's header blocks, in the order they came.

    A client's requests differ little, so soon its blocks refer to the table and change it no more. What such a block
    decodes to depends on the table alone: it is remembered until the table changes.
    """

    def __init__(self) -> None:
        self._decoder = hpack.Decoder(max_header_list_size=MAX_FIELDS_DECODED_BYTES)
        self._known: dict[bytes, Fields] = {}

    def decode(self, block: bytes) -> Fields:
        """The block's fields. Raises BadBlock."""
        known = self._known.get(block)
        if known is not None:
            return known
        size, length, first = self._table()
        try:
            fields = tuple((bytes(name), bytes(value)) for name, value in self._decoder.decode(block, raw=True))
        except hpack.OversizedHeaderListError as error:
            raise BadBlock(Code.ENHANCE_YOUR_CALM, "the header list is far too large") from error
        except hpack.HPACKError as error:
            raise BadBlock(Code.COMPRESSION_ERROR, "the header block cannot be decoded") from error
        size_now, length_now, first_now = self._table()
        if size_now != size or length_now != length or first_now is not first or len(self._known) >= MAX_CACHED_BLOCKS:
            self._known.clear()
        else:
            self._known[block] = fields
        return fields

    def _table(self) -> tuple[int, int, object]:
        """Differs after every change of the table: entries, each an object of its own, come in at its front."""
        entries = self._decoder.header_table.dynamic_entries
        return self._decoder.header_table_size, len(entries), entries[0] if entries else None


def encode(fields: Fields) -> bytes:
    """A block that neither uses nor changes the table, so it may be sent on any connection, at any time."""
    return hpack.Encoder().encode([NeverIndexedHeaderTuple(name, value) for name, value in fields])


def size_bytes(fields: Fields) -> int:
    """The size of a field section as SETTINGS_MAX_HEADER_LIST_SIZE counts it."""
    return sum(len(name) + len(value) + _FIELD_OVERHEAD_BYTES for name, value in fields)


@lru_cache(maxsize=MAX_CACHED_BLOCKS)
def check_request(fields: Fields) -> int:
    """Check a request's fields (8.2, 8.3). Returns its content-length, -1 without one. Raises Malformed."""
    pseudo: dict[bytes, bytes] = {}
    count = 0
    for name, value in fields:
        if not name.startswith(b":"):
            break
        if name not in _REQUEST_PSEUDO or name in pseudo or not _VALUE(value):
            raise Malformed(f"pseudo-header field {name!r}")
        pseudo[name] = value
        count += 1
    if pseudo.get(b":method") == b"CONNECT":
        if b":scheme" in pseudo or b":path" in pseudo or not pseudo.get(b":authority"):
            raise Malformed("CONNECT has an authority, and neither a scheme nor a path")
    elif not (pseudo.get(b":method") and pseudo.get(b":scheme") and pseudo.get(b":path")):
        raise Malformed("a request has a method, a scheme and a path")
    check_regular(fields[count:])
    return _content_length(fields)


def check_regular(fields: Fields) -> None:
    """Check fields that must not be pseudo-headers, such as trailers. Raises Malformed."""
    for name, value in fields:
        if not _NAME(name) or not _VALUE(value):
            raise Malformed(f"field {name!r}")
        if name in _OF_CONNECTIONS or (name == b"te" and value.lower() != b"trailers"):
            raise Malformed(f"field {name!r} is of HTTP/1 connections")


def _content_length(fields: Fields) -> int:
    values = {value for name, value in fields if name == b"content-length"}
    if not values:
        return -1
    value = values.pop()
    if values or not value.isdigit() or len(value) > 18:
        raise Malformed("content-length")
    return int(value)
