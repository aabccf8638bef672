"""A Secret Manager that Google's own client speaks to in tests: versions, permissions, outages, corrupted payloads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import google_crc32c
import grpc
from google.cloud.secretmanager_v1.types import AccessSecretVersionRequest, AccessSecretVersionResponse, SecretPayload

_METHOD = "/google.cloud.secretmanager.v1.SecretManagerService/AccessSecretVersion"
_NUMBER = "123456"  # answers name the project by its number


@dataclass
class SecretManagerServer:
    """Secrets by their names in any project. `error` is every answer; while `answering` is clear there is none."""

    secrets: dict[str, list[bytes | None]] = field(default_factory=dict)  # None: disabled or destroyed
    error: grpc.StatusCode | None = None
    corrupted: bool = False
    asked: list[str] = field(default_factory=list)
    answering: threading.Event = field(default_factory=threading.Event)
    port: int = 0

    def __post_init__(self) -> None:
        self.answering.set()
        self._server: grpc.Server | None = None

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def add(self, secret: str, value: bytes | str | None) -> None:
        """A new version, which is the latest from now on."""
        data = value.encode() if isinstance(value, str) else value
        self.secrets.setdefault(secret, []).append(data)

    def start(self, port: int = 0) -> SecretManagerServer:
        """Listen, at another server's port if there is one."""
        handler = grpc.unary_unary_rpc_method_handler(
            self._access,
            request_deserializer=AccessSecretVersionRequest.deserialize,
            response_serializer=AccessSecretVersionResponse.serialize,
        )
        service, _, method = _METHOD[1:].rpartition("/")
        self._server = grpc.server(
            ThreadPoolExecutor(8),
            handlers=[grpc.method_handlers_generic_handler(service, {method: handler})],
            options=[("grpc.so_reuseport", 0)],
        )
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()
        return self

    def stop(self) -> None:
        """Refuse connections, and break those there are."""
        self.answering.set()
        if self._server is not None:
            self._server.stop(None).wait()
            self._server = None

    def _access(
        self, request: AccessSecretVersionRequest, context: grpc.ServicerContext
    ) -> AccessSecretVersionResponse:
        self.asked.append(request.name)
        self.answering.wait(30)
        _, _, _, secret, _, version = request.name.split("/")
        versions = self.secrets.get(secret, [])
        number = len(versions) if version == "latest" else int(version)
        if self.error is not None:  # with a text that must not get into a log
            context.abort(self.error, f"canary-{self.error.name}")
        if not 0 < number <= len(versions):
            context.abort(grpc.StatusCode.NOT_FOUND, f"Secret Version [{request.name}] not found.")
        data = versions[number - 1]
        if data is None:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"Secret Version [{request.name}] is in DISABLED state.")
        checksum = google_crc32c.value(data) ^ self.corrupted
        name = f"projects/{_NUMBER}/secrets/{secret}/versions/{number}"
        return AccessSecretVersionResponse(name=name, payload=SecretPayload(data=data, data_crc32c=checksum))
