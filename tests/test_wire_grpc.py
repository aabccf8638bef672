"""gRPC's framing: calls by their fields, messages in every split, statuses."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import hpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.limits import MAX_FIELDS_BYTES, MAX_MESSAGE_BYTES, MAX_STATUS_MESSAGE_BYTES
from extproc.transports.wire.grpc import Call, Failed, Messages, Method, Refusal, Status, call, trailers
from tests.wire_peer import REQUEST, message


def fields(**changes: str | None) -> tuple[tuple[bytes, bytes], ...]:
    merged = {**REQUEST, **{name.replace("_", "-"): value for name, value in changes.items()}}
    return tuple((name.encode(), value.encode()) for name, value in merged.items() if value is not None)


def decoded(block: bytes) -> dict[str, str]:
    return {str(name): str(value) for name, value in hpack.Decoder().decode(block)}


def refusal(**changes: str | None) -> dict[str, str]:
    refused = call(fields(**changes))
    assert isinstance(refused, Refusal)
    return decoded(refused.block)


TAKEN: dict[str, tuple[dict[str, str | None], Call]] = {
    "process": ({}, Call(Method.PROCESS, "gate", None, False)),
    "no role": ({"x_tollgate_role": None}, Call(Method.PROCESS, "", None, False)),
    "health": ({":path": "/grpc.health.v1.Health/Check"}, Call(Method.CHECK, "gate", None, False)),
    "content-type with a codec": (
        {"content_type": "application/grpc+proto"},
        Call(Method.PROCESS, "gate", None, False),
    ),
    "content-type with a parameter": (
        {"content_type": "application/grpc;a=b"},
        Call(Method.PROCESS, "gate", None, False),
    ),
    "hours": ({"grpc_timeout": "2H"}, Call(Method.PROCESS, "gate", 7200.0, False)),
    "milliseconds": ({"grpc_timeout": "99999999m"}, Call(Method.PROCESS, "gate", 99_999.999, False)),
    "nanoseconds": ({"grpc_timeout": "0n"}, Call(Method.PROCESS, "gate", 0.0, False)),
    "identity": ({"grpc_encoding": "identity"}, Call(Method.PROCESS, "gate", None, False)),
    "gzip": ({"grpc_encoding": "gzip"}, Call(Method.PROCESS, "gate", None, True)),
}


@pytest.mark.parametrize("name", TAKEN)
def test_calls_that_are_taken(name: str) -> None:
    changes, expected = TAKEN[name]
    taken = call(fields(**changes))
    assert isinstance(taken, Call)
    assert (taken.method, taken.role, taken.encoded) == (expected.method, expected.role, expected.encoded)
    assert taken.timeout_s == pytest.approx(expected.timeout_s) if expected.timeout_s else True


REFUSED: dict[str, tuple[dict[str, str | None], dict[str, str]]] = {
    "GET": ({":method": "GET"}, {":status": "405", "allow": "POST"}),
    "JSON": ({"content_type": "application/json"}, {":status": "415"}),
    "no content-type": ({"content_type": None}, {":status": "415"}),
    "gRPC-Web": ({"content_type": "application/grpc-web"}, {":status": "415"}),
    "another service": ({":path": "/a.B/C"}, {":status": "200", "grpc-status": "12"}),
    "another method": ({":path": "/grpc.health.v1.Health/Watch"}, {":status": "200", "grpc-status": "12"}),
    "no te": ({"te": None}, {":status": "200", "grpc-status": "2"}),
    "a timeout without a unit": ({"grpc_timeout": "1"}, {":status": "200", "grpc-status": "13"}),
    "a timeout with nine digits": ({"grpc_timeout": "123456789m"}, {":status": "200", "grpc-status": "13"}),
    "a negative timeout": ({"grpc_timeout": "-1S"}, {":status": "200", "grpc-status": "13"}),
    "metadata too large": ({"x": "y" * MAX_FIELDS_BYTES}, {":status": "200", "grpc-status": "8"}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_calls_that_are_refused(name: str) -> None:
    changes, expected = REFUSED[name]
    answer = refusal(**changes)
    assert {key: answer.get(key) for key in expected} == expected


def test_what_is_not_implemented_says_which_encodings_are_taken() -> None:
    assert refusal(**{":path": "/a.B/C"})["grpc-accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("text", "encoded"),
    [("plain text", "plain%20text"), ("50%", "50%25"), ("a\nb", "a%0Ab"), ("é", "%C3%A9"), ("~!", "~!")],
)
def test_messages_of_statuses_are_percent_encoded(text: str, encoded: str) -> None:
    assert decoded(trailers(Status.INTERNAL, text)) == {"grpc-status": "13", "grpc-message": encoded}


def test_messages_of_statuses_are_bounded() -> None:
    assert len(trailers(Status.INTERNAL, "x" * 100_000)) < MAX_STATUS_MESSAGE_BYTES + 100


def test_trailers_alone_begin_the_response_too() -> None:
    assert decoded(trailers(Status.OK, alone=True)) == {
        ":status": "200",
        "content-type": "application/grpc",
        "grpc-status": "0",
    }


def read(messages: Messages, pieces: Iterable[bytes]) -> list[bytes]:
    return [found for piece in pieces for found in messages.feed(piece)]


STREAM = message(b"one") + message(b"") + message(b"three" * 100) + message(b"x")
WHOLE = [b"one", b"", b"three" * 100, b"x"]


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6, 7, 8, 100, 10_000])
def test_messages_in_every_split(step: int) -> None:
    messages = Messages(encoded=False)
    assert read(messages, (STREAM[i : i + step] for i in range(0, len(STREAM), step))) == WHOLE
    assert messages.held_bytes == 0


@given(st.lists(st.binary(max_size=30), max_size=8), st.lists(st.integers(0, 200), max_size=6))
def test_messages_in_any_split(sent: list[bytes], cuts: list[int]) -> None:
    stream = b"".join(map(message, sent))
    points = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in pairwise(points)]
    assert read(Messages(encoded=False), pieces) == sent


def test_half_a_message_is_held() -> None:
    messages = Messages(encoded=False)
    assert read(messages, [message(b"abcdef")[:8]]) == []
    assert messages.held_bytes == 8


BROKEN: dict[str, tuple[bytes, bool, Status]] = {
    "compressed, as announced": (b"\1\0\0\0\1x", True, Status.UNIMPLEMENTED),
    "compressed, unannounced": (b"\1\0\0\0\1x", False, Status.INTERNAL),
    "a flag that is not there": (b"\2\0\0\0\1x", True, Status.INTERNAL),
    "too large": (b"\0" + (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"), False, Status.RESOURCE_EXHAUSTED),
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("step", [1, 100])
def test_messages_that_are_refused(name: str, step: int) -> None:
    stream, encoded, status = BROKEN[name]
    stream = message(b"good") + stream
    messages = Messages(encoded)
    found: list[bytes] = []

    def feed() -> None:
        for start in range(0, len(stream), step):
            for one in messages.feed(stream[start : start + step]):
                found.append(one)

    with pytest.raises(Failed) as failed:
        feed()
    assert failed.value.status is status
    assert found == [b"good"]
