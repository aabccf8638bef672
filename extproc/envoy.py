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
from extproc.pb import ext_proc_pb2 as pb

_FILTER = "envoy.filters.http.ext_proc"
_HOST_METADATA = "xds.upstream_host_metadata"
_NAMESPACE = "tollgate"  # of all our metadata
_ITINERARY = "itinerary"
_DETAILS = "tollgate:"  # by which envoy.yaml knows our replies from its own
_OVERWRITE = pb.HeaderValueOption.OVERWRITE_IF_EXISTS_OR_ADD

_SEND, _BUFFERED, _STREAMED = pb.ProcessingMode.SEND, pb.ProcessingMode.BUFFERED, pb.ProcessingMode.STREAMED
_MODES = {
    # What is not said would be sent.
    Crossing.REQUEST: pb.ProcessingMode(request_body_mode=_BUFFERED, response_header_mode=pb.ProcessingMode.SKIP),
    Crossing.BOTH: pb.ProcessingMode(
        request_body_mode=_BUFFERED,
        response_header_mode=_SEND,
        response_body_mode=_STREAMED,
        response_trailer_mode=_SEND,
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
    return tuple((h.key, (h.raw_value or h.value.encode()).decode("latin-1")) for h in headers.headers)


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


def _mutation(set_headers: Headers = (), remove_headers: tuple[str, ...] = ()) -> pb.HeaderMutation:
    options = [
        pb.HeaderValueOption(
            header=pb.HeaderValue(key=name, raw_value=value.encode("latin-1")), append_action=_OVERWRITE
        )
        for name, value in set_headers
    ]
    return pb.HeaderMutation(set_headers=options, remove_headers=remove_headers)


def _headers_response(command: ContinueRequest | ContinueResponse) -> pb.HeadersResponse:
    mutation = _mutation(command.set_headers, command.remove_headers)
    return pb.HeadersResponse(response=pb.CommonResponse(header_mutation=mutation))


def _continue_request(command: ContinueRequest) -> bytes:
    mode = _MODES.get(command.crossing)
    return pb.ProcessingResponse(request_headers=_headers_response(command), mode_override=mode).SerializeToString()


def _continue_response(command: ContinueResponse) -> bytes:
    return pb.ProcessingResponse(response_headers=_headers_response(command)).SerializeToString()


def _forward_request(command: ForwardRequest) -> bytes:
    common = pb.CommonResponse(
        header_mutation=_mutation(command.set_headers, command.remove_headers),
        body_mutation=pb.BodyMutation(body=command.body),
    )
    response = pb.ProcessingResponse(request_body=pb.BodyResponse(response=common))
    if command.itinerary is not None:
        response.dynamic_metadata[_NAMESPACE] = {_ITINERARY: command.itinerary}
    return response.SerializeToString()


def _forward_chunk(command: ForwardChunk) -> bytes:
    if command.body is None:
        return _UNCHANGED_CHUNK
    # An empty replacement is said as such: an empty field would leave the original in place.
    mutation = pb.BodyMutation(body=command.body) if command.body else pb.BodyMutation(clear_body=True)
    common = pb.CommonResponse(body_mutation=mutation)
    return pb.ProcessingResponse(response_body=pb.BodyResponse(response=common)).SerializeToString()


def _await_more(command: AwaitMore) -> bytes:
    response = pb.ProcessingResponse()
    response.override_message_timeout.FromMilliseconds(command.timeout_ms)
    return response.SerializeToString()


def _drop_trailers(command: DropTrailers) -> bytes:
    response = pb.TrailersResponse(header_mutation=_mutation(remove_headers=command.names))
    return pb.ProcessingResponse(response_trailers=response).SerializeToString()


# The routes say in every answer who gave it, and a reply that takes an answer's place does not pass the filter that
# takes this out again (envoy.yaml, `hygiene`).
_OURS = (ANSWERED_BY,)


def _reply(command: Reply) -> bytes:
    response = pb.ImmediateResponse(
        status=pb.HttpStatus(code=command.status),
        headers=_mutation(command.headers, _OURS),
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
