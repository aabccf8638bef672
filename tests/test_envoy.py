"""Envoy's messages and the gate's events: the trimmed protos are Envoy's on the wire, and nothing else is taken."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

import pytest
from envoy_data_plane.envoy.config.core import v3 as core
from envoy_data_plane.envoy.extensions.filters.http.ext_proc import v3 as filters
from envoy_data_plane.envoy.service.ext_proc import v3 as service
from envoy_data_plane.envoy.type import v3 as types
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from extproc import envoy
from extproc.errors import ProtocolViolation
from extproc.events import (
    Command,
    ContinueRequest,
    ContinueResponse,
    DropTrailers,
    Event,
    ForwardChunk,
    ForwardRequest,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    SetTimer,
)
from extproc.pb import ext_proc_pb2 as pb
from extproc.transports import SERVICE

# The messages ---------------------------------------------------------------------------------------------------------

ENVOYS: dict[str, Any] = {
    "ProcessingRequest": service.ProcessingRequest,
    "ProcessingResponse": service.ProcessingResponse,
    "HttpHeaders": service.HttpHeaders,
    "HttpBody": service.HttpBody,
    "HttpTrailers": service.HttpTrailers,
    "HeadersResponse": service.HeadersResponse,
    "BodyResponse": service.BodyResponse,
    "TrailersResponse": service.TrailersResponse,
    "CommonResponse": service.CommonResponse,
    "ImmediateResponse": service.ImmediateResponse,
    "HeaderMutation": service.HeaderMutation,
    "BodyMutation": service.BodyMutation,
    "HeaderMap": core.HeaderMap,
    "HeaderValue": core.HeaderValue,
    "HeaderValueOption": core.HeaderValueOption,
    "HttpStatus": types.HttpStatus,
    "ProcessingMode": filters.ProcessingMode,
    "Metadata": core.Metadata,
}

ENUMS = {
    "CommonResponse.ResponseStatus": service.CommonResponseResponseStatus,
    "HeaderValueOption.HeaderAppendAction": core.HeaderValueOptionHeaderAppendAction,
    "ProcessingMode.HeaderSendMode": filters.ProcessingModeHeaderSendMode,
    "ProcessingMode.BodySendMode": filters.ProcessingModeBodySendMode,
}

_KINDS = {
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_ENUM: "enum",
    FieldDescriptor.TYPE_UINT32: "enum",  # HttpStatus.code: a number here, an enum of all status codes there
    FieldDescriptor.TYPE_MESSAGE: "message",
}


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def test_every_message_is_compared_with_envoys() -> None:
    assert set(pb.DESCRIPTOR.message_types_by_name) == set(ENVOYS)
    enums = {f"{name}.{enum}" for name, message in _messages().items() for enum in message.enum_types_by_name}
    assert enums == set(ENUMS)


def _messages() -> dict[str, Descriptor]:
    return dict(pb.DESCRIPTOR.message_types_by_name)


@pytest.mark.parametrize("name", ENVOYS)
def test_fields_have_envoys_numbers_and_types(name: str) -> None:
    theirs = {field.name: field.metadata["betterproto"] for field in dataclasses.fields(ENVOYS[name])}
    for field in _messages()[name].fields:
        their = theirs[field.name]
        assert their.number == field.number
        assert their.proto_type == ("map" if _is_map(field) else _KINDS[field.type])
        assert their.repeated == (field.is_repeated and not _is_map(field))
        assert their.group == (field.containing_oneof.name if field.containing_oneof else None)


@pytest.mark.parametrize("name", ENUMS)
def test_enums_have_envoys_values(name: str) -> None:
    message, _, enum = name.partition(".")
    ours = {value.name: value.number for value in _messages()[message].enum_types_by_name[enum].values}
    assert ours.items() <= {value.name: value.value for value in ENUMS[name]}.items()


def test_the_service_has_envoys_name() -> None:
    class Server(service.ExternalProcessorBase):
        def process(self, messages: Any) -> Any:
            raise NotImplementedError

    assert list(Server().__mapping__()) == [f"/{SERVICE}/Process"]
    assert pb.DESCRIPTOR.services_by_name["ExternalProcessor"].full_name == SERVICE


def _filled(descriptor: Descriptor, choose: int) -> Message:
    """One message with every field set, and of each oneof the member that `choose` falls on."""
    message: Message = getattr(pb, descriptor.name)()
    chosen = {oneof.fields[choose % len(oneof.fields)].name for oneof in descriptor.oneofs}
    for field in descriptor.fields:
        if field.containing_oneof is None or field.name in chosen:
            _fill(message, field, choose)
    return message


def _fill_googles(message: Any, name: str) -> None:
    """The well-known types that are fields here."""
    if name == "Struct":
        message["tollgate"] = {"itinerary": "text"}
    else:
        message.FromMilliseconds(3_500)


def _fill(message: Message, field: FieldDescriptor, choose: int) -> None:
    name, here = field.name, getattr(message, field.name)
    if _is_map(field):
        here["key"].fields["provider"].string_value = "openai"
    elif field.message_type is not None and field.is_repeated:
        here.add().CopyFrom(_filled(field.message_type, choose))
    elif field.message_type is not None and field.message_type.name in ("Struct", "Duration"):
        _fill_googles(here, field.message_type.name)
    elif field.message_type is not None:
        here.CopyFrom(_filled(field.message_type, choose))
    elif field.is_repeated:
        here.append("some")
    else:
        value: Any = {"string": "text", "bytes": b"\x00\xff", "bool": True}.get(_KINDS[field.type], 1)
        setattr(message, name, 200 if field.type == FieldDescriptor.TYPE_UINT32 else value)


@pytest.mark.parametrize("choose", range(7))
@pytest.mark.parametrize("name", ENVOYS)
def test_envoy_reads_and_writes_the_same_bytes(name: str, choose: int) -> None:
    ours = _filled(_messages()[name], choose)
    theirs = ENVOYS[name].parse(ours.SerializeToString())
    for field, value in ours.ListFields():
        if field.message_type is None:
            assert getattr(theirs, field.name) == value
        else:
            assert getattr(theirs, field.name)
    assert type(ours).FromString(bytes(theirs)) == ours


# Envoy's messages as events -------------------------------------------------------------------------------------------


def _headers(*pairs: tuple[str, bytes]) -> Any:
    return core.HeaderMap(headers=[core.HeaderValue(key=name, raw_value=value) for name, value in pairs])


def _http_headers(*pairs: tuple[str, bytes], end: bool = False) -> Any:
    return service.HttpHeaders(headers=_headers(*pairs), end_of_stream=end)


DECODED: dict[str, tuple[Any, Event]] = {
    "request headers": (
        service.ProcessingRequest(request_headers=_http_headers((":path", b"/v1"), ("x", b"a"), ("x", b"b"))),
        RequestHeaders(((":path", "/v1"), ("x", "a"), ("x", "b")), False),
    ),
    "request headers without a body": (
        service.ProcessingRequest(request_headers=_http_headers(end=True)),
        RequestHeaders((), True),
    ),
    "any octets": (
        service.ProcessingRequest(request_headers=_http_headers(("x", "ü\xff".encode("latin-1")))),
        RequestHeaders((("x", "ü\xff"),), False),
    ),
    "a value as text": (
        service.ProcessingRequest(
            response_headers=service.HttpHeaders(
                headers=core.HeaderMap(headers=[core.HeaderValue(key=":status", value="200")])
            )
        ),
        ResponseHeaders(((":status", "200"),), False),
    ),
    "a request body": (
        service.ProcessingRequest(request_body=service.HttpBody(body=b"\x00{}", end_of_stream=True)),
        RequestBody(b"\x00{}", True),
    ),
    "response headers": (
        service.ProcessingRequest(response_headers=_http_headers((":status", b"204"), end=True)),
        ResponseHeaders(((":status", "204"),), True),
    ),
    "a chunk": (
        service.ProcessingRequest(response_body=service.HttpBody(body=b"data: 1")),
        ResponseBody(b"data: 1", False),
    ),
    "an empty last chunk": (
        service.ProcessingRequest(response_body=service.HttpBody(end_of_stream=True)),
        ResponseBody(b"", True),
    ),
    "trailers": (
        service.ProcessingRequest(
            response_trailers=service.HttpTrailers(trailers=_headers(("grpc-status", b"0"), ("x", b"")))
        ),
        ResponseTrailers(("grpc-status", "x")),
    ),
    "fields that are not read": (
        service.ProcessingRequest(
            response_body=service.HttpBody(body=b"1"),
            metadata_context=core.Metadata(),
            observability_mode=True,
            protocol_config=service.ProtocolConfiguration(send_body_without_waiting_for_header_response=True),
        ),
        ResponseBody(b"1", False),
    ),
}


@pytest.mark.parametrize(("message", "event"), DECODED.values(), ids=DECODED)
def test_decode(message: Any, event: Event) -> None:
    assert envoy.decode(bytes(message)) == event


REFUSED = {
    "nothing": b"",
    "garbage": b"\xff\xff\xff\xff",
    "half a message": bytes(service.ProcessingRequest(request_body=service.HttpBody(body=b"x" * 50)))[:20],
    "request trailers": bytes(service.ProcessingRequest(request_trailers=service.HttpTrailers())),
    "a message of the future": b"\xda\x07\x00",
    "attributes alone": b"\x4a\x05\x0a\x01a\x12\x00",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_what_was_not_asked_for_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        envoy.decode(data)


@given(st.binary(max_size=200))
def test_garbage_is_an_event_or_refused(data: bytes) -> None:
    with suppress(ProtocolViolation):
        envoy.decode(data)


# As a real Envoy 1.40 sends it.
METADATA = (
    'filter_metadata {\n  key: "tollgate"\n  value {\n    fields {\n      key: "provider"\n      value {\n        \
string_value: "openai"\n      }\n    }\n  }\n}\n'
)

PROVIDERS: dict[str, tuple[str, str | None]] = {
    "named": (METADATA, "openai"),
    "with other metadata": ('filter_metadata { key: "envoy.lb" value { } }\n' + METADATA, "openai"),
    "with fields that are not known": (METADATA + 'typed_filter_metadata { key: "x" value { } }', "openai"),
    "empty": ("", None),
    "nothing of ours": ('filter_metadata { key: "envoy.lb" value { } }', None),
    "no text": (
        'filter_metadata { key: "tollgate" value { fields { key: "provider" value { number_value: 1 } } } }',
        None,
    ),
    "garbage": ("{{{", None),
}


@pytest.mark.parametrize(("text", "provider"), PROVIDERS.values(), ids=PROVIDERS)
def test_the_provider_is_read_from_the_endpoints_metadata(text: str, provider: str | None) -> None:
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
    message.attributes["envoy.filters.http.ext_proc"].fields["xds.upstream_host_metadata"].string_value = text
    assert envoy.decode(message.SerializeToString()) == RequestHeaders((), False, provider)


def test_attributes_of_another_filter_name_no_provider() -> None:
    message = pb.ProcessingRequest(request_headers=pb.HttpHeaders())
    message.attributes["another"].fields["xds.upstream_host_metadata"].string_value = METADATA
    assert envoy.decode(message.SerializeToString()) == RequestHeaders((), False, None)


# Commands as Envoy reads them -----------------------------------------------------------------------------------------


def told(command: Command) -> Any:
    """What Envoy makes of it."""
    data = envoy.encode(command)
    assert data is not None
    return service.ProcessingResponse.parse(data)


def set_headers(mutation: Any) -> list[tuple[str, bytes]]:
    overwrite = core.HeaderValueOptionHeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
    assert all(option.append_action == overwrite for option in mutation.set_headers)
    assert all(not option.header.value for option in mutation.set_headers)
    return [(option.header.key, option.header.raw_value) for option in mutation.set_headers]


@pytest.mark.parametrize(
    ("kind", "field"), [(ContinueRequest, "request_headers"), (ContinueResponse, "response_headers")], ids=str
)
def test_headers_are_continued_with_changes(kind: Any, field: str) -> None:
    response = getattr(told(kind((("a", "ü"), ("b", "")), ("c", "d"))), field).response
    assert set_headers(response.header_mutation) == [("a", b"\xfc"), ("b", b"")]
    assert response.header_mutation.remove_headers == ["c", "d"]
    assert response.status == service.CommonResponseResponseStatus.CONTINUE
    assert getattr(told(kind()), field).response.body_mutation is None


def test_a_request_is_sent_with_its_new_body() -> None:
    response = told(ForwardRequest(b"{}", (("content-length", "2"),), ("authorization",))).request_body.response
    assert response.body_mutation.body == b"{}"
    assert set_headers(response.header_mutation) == [("content-length", b"2")]
    assert response.header_mutation.remove_headers == ["authorization"]


def test_chunks() -> None:
    unchanged = told(ForwardChunk()).response_body
    assert unchanged is not None
    assert unchanged.response.body_mutation is None
    assert told(ForwardChunk(b"data: 1")).response_body.response.body_mutation.body == b"data: 1"
    emptied = told(ForwardChunk(b"")).response_body.response.body_mutation
    assert (emptied.clear_body, emptied.body) == (True, None)


@pytest.mark.parametrize("length", [0, 1, 127, 128, 16_383, 16_384, 2_097_152])
def test_texts_of_any_length(length: int) -> None:
    text = "a" * length
    response = told(ForwardRequest(text.encode(), ((text, text),), (text,), itinerary=text))
    common = response.request_body.response
    assert (common.body_mutation.body, set_headers(common.header_mutation)) == (text.encode(), [(text, text.encode())])
    assert common.header_mutation.remove_headers == [text]
    metadata = pb.ProcessingResponse.FromString(bytes(response)).dynamic_metadata
    assert metadata.fields["tollgate"].struct_value.fields["itinerary"].string_value == text


def test_trailers_are_dropped() -> None:
    assert told(DropTrailers(("a", "b"))).response_trailers.header_mutation.remove_headers == ["a", "b"]


def test_a_reply() -> None:
    reply = told(Reply(429, (("retry-after", "3"),), b"{}", "insufficient_quota")).immediate_response
    assert (reply.status.code, reply.body) == (429, b"{}")
    assert set_headers(reply.headers) == [("retry-after", b"3")]
    assert reply.details == "tollgate:insufficient_quota"


def test_what_is_not_envoys_says_nothing_to_it() -> None:
    assert envoy.encode(SetTimer(5)) is None
