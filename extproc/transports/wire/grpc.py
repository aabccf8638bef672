"""gRPC over HTTP/2, as PROTOCOL-HTTP2.md of the gRPC project has it: calls, length-prefixed messages, statuses."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from functools import lru_cache
from struct import Struct

from extproc.limits import MAX_CACHED_BLOCKS, MAX_FIELDS_BYTES, MAX_MESSAGE_BYTES, MAX_STATUS_MESSAGE_BYTES
from extproc.transports import ROLE, SERVICE, probe
from extproc.transports.wire.fields import Fields, encode, size_bytes

PREFIX = Struct(">BI")  # whether it is compressed, and the message's length

_CONTENT_TYPE = re.compile(rb"application/grpc(?:[+;].*)?", re.DOTALL).fullmatch  # not application/grpc-web
_TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])").fullmatch
_UNIT_S = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
_RESPONSE: Fields = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_ACCEPTED = (b"grpc-accept-encoding", b"identity")

RESPONSE_BLOCK = encode(_RESPONSE)


class Status(IntEnum):
    """The statuses that this server gives."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


class Failed(Exception):
    """A call that ends with a status other than OK."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


class Method(Enum):
    """What can be called, by its path."""

    PROCESS = f"/{SERVICE}/Process"
    CHECK = f"/{probe.SERVICE}/Check"


_METHODS = {method.value.encode(): method for method in Method}


@dataclass(frozen=True, slots=True)
class Call:
    """A call that can be taken. `encoded`: its messages may be compressed, which nothing here can undo."""

    method: Method
    role: str
    timeout_s: float | None
    encoded: bool


@dataclass(frozen=True, slots=True)
class Refusal:
    """A call that cannot be taken, and the whole answer: one header block."""

    block: bytes


@lru_cache(maxsize=MAX_CACHED_BLOCKS)
def call(fields: Fields) -> Call | Refusal:
    """What a request's fields ask for."""
    values = dict(fields)
    if values[b":method"] != b"POST":
        return Refusal(encode(((b":status", b"405"), (b"allow", b"POST"))))
    if not _CONTENT_TYPE(values.get(b"content-type", b"")):
        return Refusal(encode(((b":status", b"415"),)))
    try:
        return _call(fields, values)
    except Failed as failed:
        return Refusal(trailers(failed.status, str(failed), alone=True))


def _call(fields: Fields, values: dict[bytes, bytes]) -> Call:
    if size_bytes(fields) > MAX_FIELDS_BYTES:
        raise Failed(Status.RESOURCE_EXHAUSTED, "the metadata is too large")
    method = _METHODS.get(values[b":path"])
    if method is None:
        raise Failed(Status.UNIMPLEMENTED, "no such method")
    if values.get(b"te") != b"trailers":
        raise Failed(Status.UNKNOWN, "te must be trailers")
    return Call(
        method=method,
        role=values.get(ROLE.encode(), b"").decode("latin-1"),
        timeout_s=_timeout_s(values.get(b"grpc-timeout")),
        encoded=values.get(b"grpc-encoding", b"identity") != b"identity",
    )


def _timeout_s(text: bytes | None) -> float | None:
    if text is None:
        return None
    match = _TIMEOUT(text)
    if match is None:
        raise Failed(Status.INTERNAL, "grpc-timeout cannot be read")
    return int(match[1]) * _UNIT_S[match[2]]


@lru_cache(maxsize=MAX_CACHED_BLOCKS)
def trailers(status: Status, message: str = "", *, alone: bool = False) -> bytes:
    """The block that ends a call; `alone`, it also begins it ("Trailers-Only")."""
    fields = _RESPONSE if alone else ()
    fields += ((b"grpc-status", str(int(status)).encode()),)
    if message:
        fields += ((b"grpc-message", _percent_encoded(message)),)
    if status is Status.UNIMPLEMENTED:
        fields += (_ACCEPTED,)
    return encode(fields)


def _percent_encoded(message: str) -> bytes:
    data = message.encode()[:MAX_STATUS_MESSAGE_BYTES]
    return b"".join(b"%c" % byte if 0x20 < byte < 0x7F and byte != 0x25 else b"%%%02X" % byte for byte in data)


class Messages:
    """The messages in one direction of a call, from its content in any split."""

    __slots__ = ("_encoded", "_rest")

    def __init__(self, encoded: bool) -> None:
        self._encoded = encoded
        self._rest: bytearray | None = None

    @property
    def held_bytes(self) -> int:
        """What has come of a message that is not whole yet."""
        return len(self._rest) if self._rest is not None else 0

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Take more content; give the messages that it completes. Raises Failed, after those before the error."""
        if self._rest is None:
            if len(data) >= PREFIX.size:
                compressed, length = PREFIX.unpack_from(data)
                if length == len(data) - PREFIX.size and not compressed:
                    return (data[PREFIX.size :],)  # the common case: a frame is a message
            self._rest = bytearray()
        self._rest += data
        return self._split(self._rest)

    def _split(self, rest: bytearray) -> Iterator[bytes]:
        while len(rest) >= PREFIX.size:
            compressed, length = PREFIX.unpack_from(rest)
            if compressed:
                self._refuse_compressed(compressed)
            if length > MAX_MESSAGE_BYTES:
                raise Failed(Status.RESOURCE_EXHAUSTED, f"a message of {length} bytes is larger than allowed")
            end = PREFIX.size + length
            if len(rest) < end:
                return
            with memoryview(rest) as view:
                message = bytes(view[PREFIX.size : end])
            del rest[:end]
            yield message
        if not rest:
            self._rest = None

    def _refuse_compressed(self, flag: int) -> None:
        if flag == 1 and self._encoded:
            raise Failed(Status.UNIMPLEMENTED, "messages must not be compressed")
        raise Failed(Status.INTERNAL, "a message is compressed, and no grpc-encoding says how")
