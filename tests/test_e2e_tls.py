"""The provider over TLS: verified by name and authority before it is told anything, over connections that are kept."""

from __future__ import annotations

import asyncio
import datetime
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import pytest_asyncio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RequestReceived,
    ResponseReceived,
    StreamEnded,
    TrailersReceived,
)

from extproc.local.provider import Script
from extproc.records import Outcome
from tests.checker import Checker
from tests.rig import DONE, PROVIDER_KEY, Rig, delta, running, streamed, usage

pytestmark = pytest.mark.asyncio(loop_scope="module")

NAME = "localhost"
ANSWER = b'{"choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":9,"completion_tokens":1}}'


class Authority:
    """A certificate authority of its own."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._sign(self._name, self._key, x509.BasicConstraints(ca=True, path_length=0))
        self.path = directory / f"{name}.pem"
        self.path.write_bytes(certificate.public_bytes(Encoding.PEM))

    def certify(self, context: ssl.SSLContext, name: str) -> None:
        """Have `context` show a certificate for `name` from now on."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "provider")])
        certificate = self._sign(subject, key, x509.SubjectAlternativeName([x509.DNSName(name)]))
        path = self._directory / "server.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
        context.load_cert_chain(path)

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(extension, critical=True)
            .sign(self._key, hashes.SHA256())
        )


@dataclass
class Gateway:
    rig: Rig
    context: ssl.SSLContext
    authority: Authority


@pytest.fixture(scope="module")
def authority(short_directory: Path) -> Authority:
    return Authority(short_directory, "ca")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(short_directory: Path, authority: Authority) -> AsyncIterator[Gateway]:
    """A gateway that trusts `authority` alone, and a provider whose certificate a test may change."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.certify(context, NAME)
    directory = short_directory / "1"
    directory.mkdir()
    async with running(
        directory,
        base_url=lambda provider: f"https://{NAME}:{provider.port}/v1",
        places={"trusted_ca": authority.path},
        tls=context,
    ) as rig:
        checker = Checker(rig)
        yield Gateway(rig, context, authority)
        await checker.check()


@pytest.mark.parametrize(
    ("issuer", "name"),
    [("stranger", NAME), ("ca", "api.openai.com"), ("ca", "localhost.evil.example"), ("ca", "*.localhost")],
    ids=["unknown authority", "another's name", "name as a prefix", "wildcard below the name"],
)
async def test_a_provider_that_is_not_who_it_should_be_is_told_nothing(
    gateway: Gateway, short_directory: Path, issuer: str, name: str
) -> None:
    """These come first: a connection that was once verified is kept."""
    rig = gateway.rig
    authority = gateway.authority if issuer == "ca" else Authority(short_directory, issuer)
    authority.certify(gateway.context, name)
    rig.answer(Script(headers=(("content-type", "application/json"),), chunks=(ANSWER,), whole=True))
    told = await rig.ask()
    assert told.status == 503
    assert told.headers["content-type"] == "application/json"
    assert told.error is not None
    assert set(told.error) == {"message", "type", "param", "code"}
    assert told.error["code"] == "service_unavailable"
    assert NAME.encode() not in told.body, "nothing about how the provider is reached"
    assert rig.provider.received == []
    record = await rig.record(told.request_id)
    assert (record.outcome, record.cost_nanousd) == (Outcome.UPSTREAM_ERROR, 0)


async def test_a_provider_that_is_who_it_should_be_answers_over_few_connections(gateway: Gateway) -> None:
    rig = gateway.rig
    gateway.authority.certify(gateway.context, NAME)
    before = rig.provider.connections
    for i in range(20):
        stream = bool(i % 2)
        rig.answer(streamed(3) if stream else Script(headers=(("content-type", "application/json"),), chunks=(ANSWER,)))
        told = await rig.ask(stream=stream)
        assert (told.status, told.broken) == (200, None)
    assert rig.provider.connections - before <= 3
    assert {request.header("authorization") for request in rig.provider.received} == {f"Bearer {PROVIDER_KEY}"}
    assert {request.header("host") for request in rig.provider.received} == {NAME}


# HTTP/2 ---------------------------------------------------------------------------------------------------------------


@dataclass
class Call:
    """A request as an HTTP/2 provider saw it."""

    headers: list[tuple[str, str]]
    body: bytearray = field(default_factory=bytearray)
    trailers: list[tuple[str, str]] = field(default_factory=list)


class Http2Provider:
    """Answers every request with the same events, and with trailers."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.connections = 0
        self.chunks = [delta("hi"), delta("", finish="stop"), usage(9, 1), DONE]

    async def converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        connection = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        connection.initiate_connection()
        open_calls: dict[int, Call] = {}
        while True:
            writer.write(connection.data_to_send())
            data = await reader.read(65536)
            if not data:
                break
            for event in connection.receive_data(data):
                self._take(connection, event, open_calls)
        writer.close()

    def _take(self, connection: H2Connection, event: Event, open_calls: dict[int, Call]) -> None:
        match event:
            case RequestReceived(stream_id=int(stream), headers=headers):
                open_calls[stream] = Call([(str(name), str(value)) for name, value in headers or ()])
            case DataReceived(stream_id=int(stream), data=data):
                open_calls[stream].body += data or b""
                connection.acknowledge_received_data(event.flow_controlled_length or 0, stream)
            case TrailersReceived(stream_id=int(stream), headers=headers):
                open_calls[stream].trailers = [(str(name), str(value)) for name, value in headers or ()]
            case StreamEnded(stream_id=int(stream)):
                self.calls.append(open_calls.pop(stream))
                connection.send_headers(stream, [(":status", "200"), ("content-type", "text/event-stream")])
                for chunk in self.chunks:
                    connection.send_data(stream, chunk)
                trailers = [("x-secret", PROVIDER_KEY), ("grpc-status", "0")]
                connection.send_headers(stream, trailers, end_stream=True)
            case ConnectionTerminated():
                open_calls.clear()


@asynccontextmanager
async def listening(provider: Http2Provider, authority: Authority) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["h2", "http/1.1"])
    authority.certify(context, NAME)
    server = await asyncio.start_server(provider.converse, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()


async def call_over_http2(rig: Rig, requests: int, trailers: list[tuple[str, str]]) -> list[dict[str, object]]:
    """So many requests at once, over one connection; each answer's headers, body and trailers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    connection = H2Connection(H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], "stream": True}).encode()
    answers: dict[int, dict[str, object]] = {}
    for _ in range(requests):
        stream = connection.get_next_available_stream_id()
        answers[stream] = {"body": b"", "trailers": None}
        head = [
            *((":method", "POST"), (":path", "/v1/chat/completions"), (":scheme", "http"), (":authority", "gateway")),
            *(("authorization", f"Bearer {rig.token()}"), ("content-type", "application/json")),
        ]
        connection.send_headers(stream, head)
        connection.send_data(stream, body)
        connection.send_headers(stream, trailers, end_stream=True)
    ended = 0
    while ended < requests:
        writer.write(connection.data_to_send())
        for event in connection.receive_data(await asyncio.wait_for(reader.read(65536), 10)):
            if isinstance(event, ResponseReceived):
                answers[event.stream_id or 0]["headers"] = dict(event.headers or ())
            elif isinstance(event, DataReceived):
                answer = answers[event.stream_id or 0]
                answer["body"] = bytes(answer["body"]) + (event.data or b"")  # type: ignore[call-overload]
                connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            elif isinstance(event, TrailersReceived):
                answers[event.stream_id or 0]["trailers"] = event.headers
            ended += isinstance(event, StreamEnded)
    writer.close()
    return list(answers.values())


async def test_http2_is_spoken_where_alpn_agrees_on_it_and_trailers_go_nowhere(
    authority: Authority, short_directory: Path
) -> None:
    """Both ways at once: 16 requests over one connection to the gateway, and over one from it to the provider."""
    directory = short_directory / "2"
    directory.mkdir()
    provider = Http2Provider()
    async with (
        listening(provider, authority) as port,
        running(
            directory, base_url=lambda _: f"https://{NAME}:{port}/v1", places={"trusted_ca": authority.path}
        ) as rig,
    ):
        trailers = [("authorization", "Bearer x"), ("x-tollgate-internal-route", "x"), ("x-anything", "1")]
        answers = await call_over_http2(rig, 16, trailers)
        assert provider.connections == 1
        assert len(provider.calls) == 16
        for call in provider.calls:
            assert dict(call.headers) == {
                ":method": "POST",
                ":path": "/v1/chat/completions",
                ":scheme": "https",
                ":authority": NAME,
                "authorization": f"Bearer {PROVIDER_KEY}",
                "content-type": "application/json",
                "content-length": str(len(call.body)),
                "accept-encoding": "identity",
            }
            assert call.trailers == []
        for answer in answers:
            assert answer["body"] == b"".join((*provider.chunks[:2], DONE))
            assert answer["trailers"] is None
            assert PROVIDER_KEY not in str(answer["headers"])
        await rig.settled()
