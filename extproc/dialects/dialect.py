"""The seam between the gateway and an API's form: what the gate asks of every dialect, and what a translation needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from extproc.errors import ProviderError, TollgateError
from extproc.form import Answer as WholeAnswer
from extproc.form import Feature, Request, StreamEvent
from extproc.records import Answer, Call, Piece


@dataclass(frozen=True, slots=True)
class Address:
    """What the path of a call says besides its dialect. Gemini names the model and the kind of answer there.

    `array`: the stream is to come as one JSON array (Gemini without `alt=sse`), not as server-sent events.
    """

    model: str | None = None
    stream: bool = False
    array: bool = False


NO_ADDRESS = Address()


class Dialect(Protocol):
    """One API, as the gate sees it: checks, meters, refuses. Pure: bytes and values in, bytes and values out."""

    name: str

    def read_call(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Call:
        """Check a parsed request. Raises BadRequest, naming the field in `param`."""

    def upstream_body(self, call: Call, raw: bytes, model: str, cap: int | None) -> bytes:
        """The body for a provider of this dialect: its own model name, the clamped cap, usage reporting forced.

        `raw` is the body as it came: what need not change in it stays byte for byte (see `fields.spliced`).
        """

    def piece_reader(self) -> Callable[[bytes], Piece]:
        """For one stream: what the data of each event says. What is not understood is an empty Piece, no exception."""

    def read_answer(self, body: bytes) -> Answer:
        """What a whole answer says. Raises ValueError where it is not an answer of this dialect."""

    def render_error(self, error: TollgateError) -> bytes:
        """A JSON error body that the dialect's official client reads."""

    def render_error_event(self, error: TollgateError) -> bytes:
        """The same as one event of a stream, its closing blank line included."""


@dataclass(frozen=True, slots=True)
class Seed:
    """What a writer cannot know from the provider's answer. `request` is what the caller asked.

    `array`: a stream is to be written as one JSON array, see `Address`.
    """

    request_id: str
    created_s: int
    request: Request
    array: bool = False


class StreamReader(Protocol):
    """A provider's stream into the canonical form. One for each stream."""

    def read(self, data: bytes) -> Sequence[StreamEvent]:
        """What the data of one event says. What is not understood says nothing; nothing is raised."""

    def finish(self) -> Sequence[StreamEvent]:
        """The provider's stream has ended: `Done`, if all has come and the dialect has no closing event."""


class StreamWriter(Protocol):
    """The canonical form into a caller's stream. One for each stream."""

    def write(self, event: StreamEvent) -> bytes:
        """The bytes of whole events, or none."""


class ChatDialect(Dialect, Protocol):
    """A dialect of chat: to and from the canonical form.

    `cannot` are the features that a request of this dialect has no words for. `fields` names each feature as a caller
    of this dialect knows it, for a refusal. `calls_come_whole`: a stream has a tool's call in one piece, so that a
    translated one is not seen until it has ended.
    """

    cannot: frozenset[Feature]
    fields: Mapping[Feature, str]
    calls_come_whole: bool

    def read_request(self, body: Mapping[str, Any], address: Address = NO_ADDRESS) -> Request:
        """A request that `read_call` has accepted. Raises BadRequest for what cannot be read, naming the field."""

    def write_request(self, request: Request, model: str, cap: int | None) -> bytes:
        """The body for a provider. Asks for nothing in `cannot`. `cap` bounds each choice's output tokens."""

    def read_whole(self, body: bytes, seed: Seed) -> WholeAnswer:
        """A provider's whole answer. Raises ValueError where it is none."""

    def write_whole(self, answer: WholeAnswer, seed: Seed) -> bytes:
        """The body for a caller."""

    def read_error(self, status: int, body: bytes) -> ProviderError:
        """A provider's error. Any bytes: what is not of this dialect is an error without details."""

    def stream_reader(self, seed: Seed) -> StreamReader:
        """A reader for one stream."""

    def stream_writer(self, seed: Seed) -> StreamWriter:
        """A writer for one stream."""
