"""Protobuf to events and commands to protobuf: the only file that knows Envoy's messages."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from google.protobuf import text_format
from google.protobuf.message import DecodeError

from extproc.errors import ProtocolViolation
from extproc.events import (
    AwaitMore,
    Command,
    ContinueRequest,
    ContinueResponse,
    Crossing,
    DropTrailers,
    Event,
    ForwardChunk,
    ForwardRequest,
    Headers,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
)
from extproc.headers import ANSWERED_BY
from extproc.limits import MAX_CACHED_HEADERS
from extproc.pb import ext_proc_pb2 as pb

_FILTER = "envoy.filters.http.ext_proc"
_HOST_METADATA = "xds.upstream_host_metadata"
_NAMESPACE = "tollgate"  # of all our metadata
_ITINERARY = "itinerary"
_DETAILS = "tollgate:"  # by which envoy.yaml knows our replies from its own
_OVERWRITE = pb.HeaderValueOption(append_action=pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD).SerializeToString()
_CLEAR_BODY = pb.BodyMutation(clear_body=True).SerializeToString()

_SEND, _BUFFERED, _STREAMED = pb.ProcessingMode.SEND, pb.ProcessingMode.BUFFERED, pb.ProcessingMode.STREAMED


def _mode_override(modes: pb.ProcessingMode) -> bytes:
    return bytes(pb.ProcessingResponse(mode_override=modes).SerializeToString())


_MODES = {
    # What is not said would be sent.
    Crossing.REQUEST: _mode_override(
        pb.ProcessingMode(request_body_mode=_BUFFERED, response_header_mode=pb.ProcessingMode.SKIP)
    ),
    Crossing.BOTH: _mode_override(
        pb.ProcessingMode(
            request_body_mode=_BUFFERED,
            response_header_mode=_SEND,
            response_body_mode=_STREAMED,
            response_trailer_mode=_SEND,
        )
    ),
}

_UNCHANGED_CHUNK = pb.ProcessingResponse(
    response_body=pb.BodyResponse(response=pb.CommonResponse())
).SerializeToString()


def decode(data: bytes) -> Event:
    """One ProcessingRequest as an event. Raises ProtocolViolation for a message that is unknown or not asked for."""
    try:
        request = pb.ProcessingRequest.FromString(data)
    except DecodeError as error:
        raise ProtocolViolation("not a ProcessingRequest") from error
    kind = request.WhichOneof("request")
    decoder = _DECODERS.get(kind or "")
    if decoder is None:
        raise ProtocolViolation(f"unexpected message: {kind}")
    return decoder(request)


def encode(command: Command) -> bytes | None:
    """The ProcessingResponse that a command sends to Envoy, or None where it sends nothing."""
    encoder = _ENCODERS.get(type(command))
    return encoder(command) if encoder is not None else None


def _pairs(headers: pb.HeaderMap) -> Headers:
    return tuple([(h.key, (h.raw_value or h.value.encode()).decode("latin-1")) for h in headers.headers])


def _request_headers(request: pb.ProcessingRequest) -> Event:
    message = request.request_headers
    if _FILTER not in request.attributes:
        return RequestHeaders(_pairs(message.headers), message.end_of_stream)
    provider = _provider(request.attributes[_FILTER].fields[_HOST_METADATA].string_value)
    itinerary = request.metadata_context.filter_metadata[_NAMESPACE].fields[_ITINERARY].string_value or None
    return RequestHeaders(_pairs(message.headers), message.end_of_stream, provider, itinerary)


@lru_cache(maxsize=256)
def _provider(text: str) -> str | None:
    """The provider that an endpoint's metadata names. Envoy hands the metadata over as protobuf text."""
    try:
        metadata = text_format.Parse(text, pb.Metadata(), allow_unknown_field=True)
    except text_format.ParseError:
        return None
    return metadata.filter_metadata[_NAMESPACE].fields["provider"].string_value or None


def _request_body(request: pb.ProcessingRequest) -> Event:
    return RequestBody(request.request_body.body, request.request_body.end_of_stream)


def _response_headers(request: pb.ProcessingRequest) -> Event:
    return ResponseHeaders(_pairs(request.response_headers.headers), request.response_headers.end_of_stream)


def _response_body(request: pb.ProcessingRequest) -> Event:
    return ResponseBody(request.response_body.body, request.response_body.end_of_stream)


def _response_trailers(request: pb.ProcessingRequest) -> Event:
    return ResponseTrailers(tuple(h.key for h in request.response_trailers.trailers.headers))


_DECODERS: dict[str, Callable[[pb.ProcessingRequest], Event]] = {
    "request_headers": _request_headers,
    "request_body": _request_body,
    "response_headers": _response_headers,
    "response_body": _response_body,
    "response_trailers": _response_trailers,
}


# Every request has several of these messages. Put together from parts that repeat from one request to the next they
# cost an eighth of what the protobuf library takes, which makes an object of each header. A message's field on the wire
# is a tag (number and kind), a length, and so many bytes: https://protobuf.dev/programming-guides/encoding.


def _field(number: int, payload: bytes) -> bytes:
    """A field that is text, bytes or a message. Its number is at most 15."""
    length = len(payload)
    if length < 0x80:
        return bytes((number << 3 | 2, length)) + payload
    head = bytearray((number << 3 | 2,))
    while length >= 0x80:
        head.append(length & 0x7F | 0x80)
        length >>= 7
    head.append(length)
    return bytes(head) + payload


@lru_cache(maxsize=MAX_CACHED_HEADERS)
def _set_header(name: str, value: str) -> bytes:
    """One of HeaderMutation's `set_headers`: overwritten where it is there, else added."""
    header = _field(1, name.encode()) + _field(3, value.encode("latin-1"))
    return _field(1, _field(1, header) + _OVERWRITE)


@lru_cache(maxsize=MAX_CACHED_HEADERS)
def _remove_headers(names: tuple[str, ...]) -> bytes:
    return b"".join([_field(2, name.encode()) for name in names])


def _mutation(set_headers: Headers = (), remove_headers: tuple[str, ...] = ()) -> bytes:
    """A HeaderMutation."""
    return b"".join([_set_header(name, value) for name, value in set_headers]) + _remove_headers(remove_headers)


def _headers_response(command: ContinueRequest | ContinueResponse) -> bytes:
    """A HeadersResponse, its CommonResponse in it."""
    return _field(1, _field(2, _mutation(command.set_headers, command.remove_headers)))


def _continue_request(command: ContinueRequest) -> bytes:
    return _field(1, _headers_response(command)) + _MODES.get(command.crossing, b"")


def _continue_response(command: ContinueResponse) -> bytes:
    return _field(2, _headers_response(command))


def _forward_request(command: ForwardRequest) -> bytes:
    mutation = _mutation(command.set_headers, command.remove_headers)
    common = _field(2, mutation) + _field(3, _field(1, command.body))
    response = _field(3, _field(1, common))
    return response if command.itinerary is None else response + _metadata(command.itinerary)


def _metadata(itinerary: str) -> bytes:
    """`dynamic_metadata`, a Struct of Structs: a map's entry has a key and a Value, of text (3) or a Struct (5)."""
    ours = _field(1, _field(1, _ITINERARY.encode()) + _field(2, _field(3, itinerary.encode())))
    return _field(8, _field(1, _field(1, _NAMESPACE.encode()) + _field(2, _field(5, ours))))


def _forward_chunk(command: ForwardChunk) -> bytes:
    if command.body is None:
        return _UNCHANGED_CHUNK
    # An empty replacement is said as such (`clear_body`): an empty field would leave the original in place.
    mutation = _field(1, command.body) if command.body else _CLEAR_BODY
    return _field(4, _field(1, _field(3, mutation)))


def _await_more(command: AwaitMore) -> bytes:
    response = pb.ProcessingResponse()
    response.override_message_timeout.FromMilliseconds(command.timeout_ms)
    return response.SerializeToString()


def _drop_trailers(command: DropTrailers) -> bytes:
    return _field(6, _field(1, _remove_headers(command.names)))


# The routes say in every answer who gave it, and a reply that takes an answer's place does not pass the filter that
# takes this out again (envoy.yaml, `hygiene`).
_OURS = (ANSWERED_BY,)


def _reply(command: Reply) -> bytes:
    response = pb.ImmediateResponse(
        status=pb.HttpStatus(code=command.status),
        headers=pb.HeaderMutation.FromString(_mutation(command.headers, _OURS)),
        body=command.body,
        details=f"{_DETAILS}{command.details}",
    )
    return pb.ProcessingResponse(immediate_response=response).SerializeToString()


_ENCODERS: dict[type[Command], Callable[[Any], bytes]] = {
    ContinueRequest: _continue_request,
    ForwardRequest: _forward_request,
    ContinueResponse: _continue_response,
    ForwardChunk: _forward_chunk,
    AwaitMore: _await_more,
    DropTrailers: _drop_trailers,
    Reply: _reply,
}
