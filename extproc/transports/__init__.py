"""How ext_proc messages come and go. A transport moves bytes; `session` does the rest, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"
ROLE = "x-tollgate-role"  # the metadata in which Envoy says which of the two filters calls


class Session(Protocol):
    """What a transport asks of `session.Session`."""

    @property
    def done(self) -> bool:
        """Whether Envoy may close the stream: the request is over."""

    def feed(self, message: bytes) -> None:
        """Take one message of Envoy's."""

    def close(self) -> None:
        """The stream is gone. Called once, and never from within `feed`."""


Send = Callable[[bytes], None]  # one message to Envoy
End = Callable[[str | None], None]  # the stream's last word: None, or why it fails
Open = Callable[[str, Send, End], Session | None]  # the session of a new stream, or None for an unknown role
