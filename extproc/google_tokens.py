"""Vertex AI's keys: access tokens of Google's, which live for an hour and are fetched ahead, in a thread of their own.

A request never waits for one. While no new one can be had, the last serves until it expires.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from datetime import UTC
from math import inf
from typing import Any

import google.auth
from google.auth.credentials import Credentials
from google.auth.exceptions import DefaultCredentialsError
from google.auth.transport.requests import Request

from extproc.limits import (
    GOOGLE_TOKEN_AHEAD_S,
    GOOGLE_TOKEN_FETCH_TIMEOUT_S,
    MAX_GOOGLE_TOKEN_BACKOFF_S,
    MAX_GOOGLE_TOKEN_WAIT_S,
    MIN_GOOGLE_TOKEN_WAIT_S,
)

log = logging.getLogger(__name__)

_SCOPES = ("https://www.googleapis.com/auth/cloud-platform",)


class GoogleTokens:
    """`Secrets` for the providers on Vertex AI, with the credentials that google-auth finds where it runs."""

    def __init__(self, providers: Collection[str], clock_s: Callable[[], float] = time.time) -> None:
        """`providers` are those whose key is such a token. `clock_s` is the wall clock, which tokens expire by."""
        self._providers = frozenset(providers)
        self._clock_s = clock_s
        self._credentials: Credentials | None = None
        self._token: str | None = None
        self._expires_s = -inf
        self._values: tuple[str, ...] = ()
        self._failures = 0
        self._closed = threading.Event()
        # A daemon: a token server that does not answer must not hold up the end of the process.
        self._thread = threading.Thread(target=self._refresh_forever, name="google-tokens", daemon=True)

    def __repr__(self) -> str:
        return f"GoogleTokens({', '.join(sorted(self._providers))})"

    def key(self, provider: str) -> str | None:
        """See `Secrets`. None also while there is no token that has not expired."""
        return self._token if provider in self._providers and self._clock_s() < self._expires_s else None

    def values(self) -> tuple[str, ...]:
        """See `Secrets`: the token in use and the one before it."""
        return self._values

    def start(self) -> None:
        """Fetch the first token, and each one after it ahead of its time, until `close`. Nothing without providers."""
        if self._providers:
            self._thread.start()

    def close(self) -> None:
        """Fetch no more. A fetch under way is left to itself."""
        self._closed.set()

    def refresh(self) -> float:
        """Fetch a token, and say in how many seconds to fetch the next. Blocks; never raises for what Google does."""
        try:
            self._fetch()
        except Exception as error:  # google-auth's, requests', and what a kind of credentials raises of its own
            self._failures += 1
            # No more than the kind: an error of a token server may hold what it was sent, and what it would answer.
            why = str(error) if isinstance(error, DefaultCredentialsError) else type(error).__name__
            log.warning("google: no new access token, attempt %d: %s", self._failures, why)
            return float(min(MIN_GOOGLE_TOKEN_WAIT_S * 2 ** min(self._failures - 1, 16), MAX_GOOGLE_TOKEN_BACKOFF_S))
        self._failures = 0
        ahead_s = self._expires_s - GOOGLE_TOKEN_AHEAD_S - self._clock_s()
        return float(min(max(ahead_s, MIN_GOOGLE_TOKEN_WAIT_S), MAX_GOOGLE_TOKEN_WAIT_S))

    def _fetch(self) -> None:
        if self._credentials is None:
            self._credentials, _ = google.auth.default(scopes=_SCOPES)
        self._credentials.refresh(_BoundedRequest())  # type: ignore[no-untyped-call]
        token, expiry = self._credentials.token, self._credentials.expiry
        if token != self._token:
            self._values = tuple(filter(None, (token, self._token)))
        self._token = token
        # google-auth's expiry is in UTC and does not say so. Without one a token is good until it is refused.
        self._expires_s = inf if expiry is None else expiry.replace(tzinfo=UTC).timestamp()

    def _refresh_forever(self) -> None:
        while not self._closed.wait(self.refresh()):
            pass


class _BoundedRequest(Request):
    """google-auth's transport, whose own timeout is two minutes for each attempt."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return super().__call__(*args, **{**options, "timeout": GOOGLE_TOKEN_FETCH_TIMEOUT_S})  # type: ignore[no-untyped-call]
