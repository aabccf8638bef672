"""The target: what one attempt sends to its provider. Pure; asked once per attempt, by the upstream filter.

A retry arrives with the header changes of the attempt before it, so every header that is not wanted is removed and
every one that is ours is overwritten: a provider's key never reaches another provider.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from extproc import headers
from extproc.errors import ProtocolViolation
from extproc.events import Closed, Command, ContinueRequest, Event, Reply, RequestHeaders

API_PREFIX = "/v1"  # of the paths that the gateway serves; a provider's base URL has its own


@dataclass(frozen=True, slots=True)
class Targets:
    """What all attempts share: each provider's base URL, and the key that it has now."""

    base_urls: Mapping[str, str]
    key: Callable[[str], str | None]


class Attempt:
    """One attempt. It sees the request's headers, and no body."""

    __slots__ = ("_targets", "done")

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self.done = False

    def handle(self, event: Event) -> list[Command]:
        """Take the headers; return the one answer. Raises ProtocolViolation for whatever else Envoy may send."""
        if isinstance(event, Closed):
            return []
        if not isinstance(event, RequestHeaders) or self.done:
            raise ProtocolViolation(f"{type(event).__name__} at the target")
        self.done = True
        provider = event.provider
        if provider is None or provider not in self._targets.base_urls:
            raise ProtocolViolation(f"no such provider: {provider!r}")
        key = self._targets.key(provider)
        if key is None:
            return [Reply(503, details="no_provider_key")]
        sent = dict(event.headers)
        return [
            ContinueRequest(
                set_headers=(
                    (":path", provider_path(self._targets.base_urls[provider], sent.get(":path", ""))),
                    ("authorization", f"Bearer {key}"),
                    # Counting needs plain text; some providers compress unless told otherwise.
                    ("accept-encoding", "identity"),
                ),
                remove_headers=headers.to_remove(sent),
            )
        ]


def provider_path(base_url: str, path: str) -> str:
    """`/v1/chat/completions` below a base URL's own path. The query is the caller's, and is dropped."""
    return urlsplit(base_url).path + path.partition("?")[0].removeprefix(API_PREFIX)
