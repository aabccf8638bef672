"""Providers' keys from Google's Secret Manager, fetched in threads, again and again. docs/settings.md says when.

A key that has come stays in use until a newer one has come whole, whatever happens to Secret Manager, to the permission
or to the version. No message, `repr` or log line here holds a value.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
from google.auth.exceptions import DefaultCredentialsError

from extproc.limits import (
    MAX_SECRET_BACKOFF_S,
    MIN_SECRET_BACKOFF_S,
    SECRET_FETCH_TIMEOUT_S,
    SECRET_REFETCH_INTERVAL_S,
    SECRETS_CLOSE_TIMEOUT_S,
)
from extproc.providers import PROVIDERS
from extproc.secrets import key_of
from extproc.settings import SettingsInvalid

if TYPE_CHECKING:
    from google.cloud.secretmanager_v1 import SecretManagerServiceClient

# ruff: noqa: PLC0415 - Google's client is loaded in a thread, while the processor starts, and only where it is used

log = logging.getLogger(__name__)

# What an operator can do something about, in our words: a server's own text may repeat what it was sent.
_REASONS = {
    grpc.StatusCode.PERMISSION_DENIED: "permission denied: roles/secretmanager.secretAccessor is needed",
    grpc.StatusCode.UNAUTHENTICATED: "the credentials were not accepted",
    grpc.StatusCode.NOT_FOUND: "there is no such version",
    grpc.StatusCode.FAILED_PRECONDITION: "the version is disabled or destroyed",
    grpc.StatusCode.UNAVAILABLE: "Secret Manager cannot be reached",
    grpc.StatusCode.DEADLINE_EXCEEDED: "Secret Manager does not answer in time",
}

_CHANNEL_OPTIONS = (
    ("grpc.initial_reconnect_backoff_ms", int(MIN_SECRET_BACKOFF_S * 1000)),
    ("grpc.min_reconnect_backoff_ms", int(MIN_SECRET_BACKOFF_S * 1000)),
    ("grpc.max_reconnect_backoff_ms", int(MAX_SECRET_BACKOFF_S * 1000)),  # gRPC's own is 2 minutes
)


class PayloadCorrupted(Exception):
    """The payload is not what was stored."""


@dataclass(slots=True)
class _Secret:
    """One secret and its thread's state. `version` is the full name of the one in use. Times are the clock's."""

    provider: str
    name: str
    version: str = ""
    refused_s: float = -math.inf  # when a refusal last had it fetched
    failures: int = 0
    wanted: threading.Event = field(default_factory=threading.Event)

    def __str__(self) -> str:
        return f"{PROVIDERS[self.provider].secret_variable} ({self.name})"


class SecretManager:
    """A `secrets.Source`. A thread for each secret: none of them waits for another, and nobody waits for them."""

    def __init__(
        self,
        versions: Mapping[str, str],
        *,
        refresh_s: float,
        endpoint: str | None = None,
        clock_s: Callable[[], float] = time.monotonic,
        refreshed: Callable[[str], object] = lambda _: None,
    ) -> None:
        """`versions` are the names by provider. `endpoint`, for tests, is spoken to in plain text.

        `refreshed` is told of each fetch, from a thread: `ok` or `failed`.
        """
        self._secrets = {provider: _Secret(provider, name) for provider, name in versions.items()}
        self._refresh_s = refresh_s
        self._endpoint = endpoint
        self._changed: Callable[[], object]
        self._clock_s = clock_s
        self._refreshed = refreshed
        self._keys: dict[str, str] = {}
        self._client: SecretManagerServiceClient | None = None
        self._connecting = threading.Lock()
        self._closed = False
        # Daemons: what a call hangs on must not hold up the end of the process.
        self._threads = [
            threading.Thread(target=self._keep, args=(secret,), name=f"secret-{secret.provider}", daemon=True)
            for secret in self._secrets.values()
        ]

    def __repr__(self) -> str:
        return f"SecretManager({', '.join(sorted(self._secrets))})"

    def read(self) -> Mapping[str, str]:
        """See `Source`: the keys that have come so far."""
        return self._keys.copy()

    def refused(self, provider: str) -> None:
        """The provider did not accept its key: fetch it at once, unless a refusal had it fetched just now."""
        secret, now_s = self._secrets[provider], self._clock_s()
        if now_s >= secret.refused_s + SECRET_REFETCH_INTERVAL_S:
            secret.refused_s = now_s
            secret.wanted.set()

    def start(self, changed: Callable[[], object]) -> None:
        """Fetch all keys, and from then on whenever their time has come, until `close`.

        `changed` is called from a thread, whenever there is a new key to `read`.
        """
        self._changed = changed
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Fetch no more. Calls under way are cancelled."""
        self._closed = True
        for secret in self._secrets.values():
            secret.wanted.set()
        if self._client is not None:
            self._client.transport.close()  # type: ignore[no-untyped-call]
        deadline_s = time.monotonic() + SECRETS_CLOSE_TIMEOUT_S
        for thread in self._threads:
            if thread.is_alive():
                thread.join(max(0.0, deadline_s - time.monotonic()))

    def _keep(self, secret: _Secret) -> None:
        while not self._closed:
            wait_s = self._refresh(secret)
            secret.wanted.wait(wait_s)
            secret.wanted.clear()

    def _refresh(self, secret: _Secret) -> float:
        """Fetch a secret, and say in how many seconds to fetch it again."""
        try:
            version, key = self._fetch(secret)
        except Exception as error:  # whatever went wrong, the key at hand stays in use and the next attempt comes
            if self._closed:
                return 0
            secret.failures += 1
            self._refreshed("failed")
            kept = "the old key stays in use" if secret.version else "there is no key yet"
            log.warning("secrets: %s: attempt %d failed, %s: %s", secret, secret.failures, kept, _why(error))
            return min(MIN_SECRET_BACKOFF_S * 2.0 ** min(secret.failures - 1, 16), MAX_SECRET_BACKOFF_S)
        secret.failures = 0
        self._refreshed("ok")
        if version != secret.version:
            secret.version = version
            log.info("secrets: %s: %s is in use", secret, version)
        if self._keys.get(secret.provider) != key:
            self._keys[secret.provider] = key
            self._changed()
        return self._refresh_s

    def _fetch(self, secret: _Secret) -> tuple[str, str]:
        """The version's full name and the key. Raises PayloadCorrupted, SettingsInvalid, or what Google's raises."""
        client = self._connected()
        # Without Google's own retries, which take a minute: these threads try again by themselves.
        answer = client.access_secret_version(name=secret.name, retry=None, timeout=SECRET_FETCH_TIMEOUT_S)
        payload = answer.payload
        if _crc32c(payload.data) != payload.data_crc32c:
            raise PayloadCorrupted("the payload's CRC-32C does not match")
        return answer.name, key_of(str(secret), payload.data)

    def _connected(self) -> SecretManagerServiceClient:
        with self._connecting:
            if self._client is None:
                self._client = _connect(self._endpoint)
            return self._client


def _connect(endpoint: str | None) -> SecretManagerServiceClient:
    from google.cloud.secretmanager_v1 import SecretManagerServiceClient
    from google.cloud.secretmanager_v1.services.secret_manager_service.transports import (
        SecretManagerServiceGrpcTransport,
    )

    # On DEBUG, which an environment variable of Google's sets, its transport logs whole answers.
    logging.getLogger(SecretManagerServiceGrpcTransport.__module__).setLevel(logging.INFO)
    if endpoint is None:
        channel = SecretManagerServiceGrpcTransport.create_channel(options=_CHANNEL_OPTIONS)
    else:
        channel = grpc.insecure_channel(endpoint, _CHANNEL_OPTIONS)
    return SecretManagerServiceClient(transport=SecretManagerServiceGrpcTransport(channel=channel))


def _crc32c(data: bytes) -> int:
    import google_crc32c

    value: int = google_crc32c.value(data)
    return value


def _why(error: Exception) -> str:
    """No text of anybody else's, but google-auth's on where it has looked for credentials."""
    code = getattr(error, "grpc_status_code", None)
    if code in _REASONS:
        return _REASONS[code]
    own = isinstance(error, DefaultCredentialsError | PayloadCorrupted | SettingsInvalid)
    return str(error) if own else type(error).__name__
