"""The issuers' public keys: fetched in the background, cached by their max-age, served stale for a bounded time."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import requests
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509 import load_pem_x509_certificate
from google.auth.crypt import RSAVerifier

from extproc.errors import Unavailable
from extproc.identity import Verifier
from extproc.limits import (
    KEYS_FETCH_TIMEOUT_S,
    KEYS_REFETCH_INTERVAL_S,
    MAX_KEY_SET_BYTES,
    MAX_KEYS_BACKOFF_S,
    MAX_KEYS_MAX_AGE_S,
    MIN_KEYS_MAX_AGE_S,
    MIN_RSA_BITS,
)

log = logging.getLogger(__name__)

_TICK_S = 1.0
_REFRESH_AT = 0.9  # of the max-age, which leaves time for attempts that fail before the keys are stale
_CHUNK_BYTES = 64 * 1024


class KeysUnusable(Exception):
    """The key server's answer is not a set of keys."""


@dataclass(frozen=True, slots=True)
class FetchedKeys:
    """What a key server answered: certificates or public keys as PEM by `kid`, and how long they are fresh."""

    pems: Mapping[str, str]
    max_age_s: int


@dataclass(slots=True)
class _IssuerKeys:
    """One issuer's keys. Times are the store's clock; `pems` tells which verifiers can be kept at a refresh."""

    issuer: str
    url: str
    pems: Mapping[str, str] = field(default_factory=dict)
    verifiers: Mapping[str, Verifier] = field(default_factory=dict)
    refresh_s: float = -math.inf
    unusable_s: float = -math.inf
    attempted_s: float = -math.inf
    failures: int = 0
    fetching: asyncio.Task[None] | None = None


class KeyStore:
    """`identity.KeySet` over HTTP. Used on one event loop; fetches run in threads, one at a time for each issuer."""

    def __init__(
        self,
        issuer_keys: Mapping[str, str],
        max_stale_s: int,
        *,
        clock_s: Callable[[], float] = time.monotonic,
        refetch_interval_s: float = KEYS_REFETCH_INTERVAL_S,
    ) -> None:
        """`issuer_keys` maps an issuer to the URL of its keys; `max_stale_s` counts from the end of their max-age."""
        self._issuers = {issuer: _IssuerKeys(issuer, url) for issuer, url in issuer_keys.items()}
        self._max_stale_s = max_stale_s
        self._clock_s = clock_s
        self._refetch_interval_s = refetch_interval_s
        self._background: asyncio.Task[None] | None = None

    def verifier(self, issuer: str, kid: str) -> Verifier | None:
        """See `identity.KeySet`."""
        keys = self._issuers.get(issuer)
        if keys is None:
            return None
        if self._clock_s() >= keys.unusable_s:
            raise Unavailable(
                "The issuer's public keys cannot be fetched, so that no token can be verified.",
                retry_after_s=KEYS_REFETCH_INTERVAL_S,
            )
        return keys.verifiers.get(kid)

    def ready(self) -> bool:
        """Whether any issuer's tokens can be verified: one that is down must not take the others' callers along."""
        now_s = self._clock_s()
        return any(now_s < keys.unusable_s for keys in self._issuers.values())

    def start(self) -> None:
        """Fetch all keys, and from then on whenever their time has come, until `close`."""
        self._background = asyncio.create_task(self._refresh_forever())

    async def close(self) -> None:
        """Stop fetching."""
        tasks = [self._background, *(keys.fetching for keys in self._issuers.values())]
        for task in filter(None, tasks):
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def refresh(self, issuer: str) -> None:
        """Fetch one issuer's keys for an unknown `kid`, unless that was tried a moment ago. Callers share a fetch."""
        keys = self._issuers.get(issuer)
        if keys is None:
            return
        if keys.fetching is None and self._clock_s() < keys.attempted_s + self._refetch_interval_s:
            return
        await self._fetch([keys])

    async def refresh_due(self) -> None:
        """Fetch the keys whose time has come. The background task does this every second."""
        now_s = self._clock_s()
        await self._fetch(keys for keys in self._issuers.values() if now_s >= keys.refresh_s)

    async def _refresh_forever(self) -> None:
        while True:
            await self.refresh_due()
            await asyncio.sleep(_TICK_S)

    async def _fetch(self, due: Iterable[_IssuerKeys]) -> None:
        for keys in (due := list(due)):
            keys.fetching = keys.fetching or asyncio.create_task(self._update(keys))
        # A caller that goes away must not end the fetch that others wait for.
        await asyncio.gather(*(asyncio.shield(keys.fetching) for keys in due if keys.fetching))

    async def _update(self, keys: _IssuerKeys) -> None:
        keys.attempted_s = self._clock_s()
        try:
            fetched = await asyncio.to_thread(fetch_keys, keys.url)
            verifiers = _verifiers(fetched.pems, keys)
        except Exception as error:  # whatever went wrong, the keys at hand stay in use and the next attempt comes
            keys.failures += 1
            keys.refresh_s = self._clock_s() + min(2**keys.failures, MAX_KEYS_BACKOFF_S)
            log.warning("keys of %s: attempt %d failed: %s", keys.issuer, keys.failures, error)
        else:
            keys.failures = 0
            keys.pems, keys.verifiers = fetched.pems, verifiers
            # From before the fetch: the answer may be as old as that.
            keys.refresh_s = keys.attempted_s + fetched.max_age_s * _REFRESH_AT
            keys.unusable_s = keys.attempted_s + fetched.max_age_s + self._max_stale_s
        finally:
            keys.fetching = None


def fetch_keys(url: str) -> FetchedKeys:
    """Get a key set in the form of Google's `oauth2/v1/certs`. Blocks, for `KEYS_FETCH_TIMEOUT_S` at most.

    Raises KeysUnusable, or what `requests` raises. Redirects are not followed: keys come from where settings say.
    """
    deadline_s = time.monotonic() + KEYS_FETCH_TIMEOUT_S
    # A small compressed answer could expand beyond all bounds.
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    with requests.get(
        url, headers=headers, timeout=KEYS_FETCH_TIMEOUT_S, allow_redirects=False, stream=True
    ) as response:
        if response.status_code != 200:
            raise KeysUnusable(f"the key server answered {response.status_code}")
        body = bytearray()
        while chunk := response.raw.read1(_CHUNK_BYTES, decode_content=False):
            body += chunk
            if len(body) > MAX_KEY_SET_BYTES:
                raise KeysUnusable(f"the key set is larger than {MAX_KEY_SET_BYTES} bytes")
            if time.monotonic() > deadline_s:
                raise KeysUnusable(f"the key server took longer than {KEYS_FETCH_TIMEOUT_S} s")
        max_age_s = fresh_for_s(response.headers.get("cache-control", ""), response.headers.get("age", ""))
    return FetchedKeys(_pems(bytes(body)), max_age_s)


def fresh_for_s(cache_control: str, age: str) -> int:
    """How long an answer stays fresh (RFC 9111, 4.2), within our own bounds."""
    max_age = re.search(r"(?:^|[\s,])max-age=(\d{1,9})(?:$|[\s,])", cache_control.lower())
    age_s = int(age) if re.fullmatch(r"[0-9]{1,9}", age) else 0
    fresh_s = int(max_age[1]) - age_s if max_age else 0
    return min(max(fresh_s, MIN_KEYS_MAX_AGE_S), MAX_KEYS_MAX_AGE_S)


def _pems(body: bytes) -> Mapping[str, str]:
    try:
        pems = json.loads(body)
    except ValueError:
        pems = None
    if not isinstance(pems, dict) or not all(isinstance(pem, str) for pem in pems.values()):
        raise KeysUnusable("the key set is not a JSON object of PEM texts by key id")
    return pems


def _verifiers(pems: Mapping[str, str], old: _IssuerKeys) -> Mapping[str, Verifier]:
    """A verifier for each usable key; a key that has not changed keeps its own, and so the tokens verified with it."""
    verifiers: dict[str, Verifier] = {}
    for kid, pem in pems.items():
        if kid in old.verifiers and old.pems[kid] == pem:
            verifiers[kid] = old.verifiers[kid]
            continue
        try:
            verifiers[kid] = RSAVerifier(_public_key(pem.encode()))  # type: ignore[no-untyped-call]
        except ValueError as error:
            log.warning("keys of %s: one key is not used: %s", old.issuer, error)
    if not verifiers:
        raise KeysUnusable("the key set has no usable key")
    return verifiers


def _public_key(pem: bytes) -> RSAPublicKey:
    is_certificate = b"-----BEGIN CERTIFICATE-----" in pem
    key = load_pem_x509_certificate(pem).public_key() if is_certificate else load_pem_public_key(pem)
    if not isinstance(key, RSAPublicKey) or key.key_size < MIN_RSA_BITS:
        raise ValueError(f"not an RSA key of at least {MIN_RSA_BITS} bits")
    return key
