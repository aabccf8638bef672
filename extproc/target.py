"""The target: what one attempt sends to its provider, and the provider's answer back. Pure; one for each attempt.

A retry arrives with the header changes of the attempt before it, and with the body as the gate sent it. So the path,
the length and the key are set anew each time, and every header that is not wanted is removed: a provider's key never
reaches another provider. Any worker may serve any attempt: all that is known of the call is its itinerary.

    ASKED ─► DONE (nothing to change but headers)
      └────► BODY ─► DONE (the provider speaks the caller's dialect)
               └───► SENT ─► STREAMING | WHOLE | FAILING | PASSING ─► DONE
                       └───► WAITING ───┘ (where the chain wants the headers to wait for the first event)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import orjson

from extproc import headers
from extproc.dialects import CHAT, DIALECTS
from extproc.dialects.dialect import Dialect, Seed
from extproc.dialects.fields import parse, renamed, spliced
from extproc.errors import ProtocolViolation, ProviderError, StreamTooLarge, TollgateError
from extproc.events import (
    AwaitMore,
    Closed,
    Command,
    ContinueRequest,
    ContinueResponse,
    Crossing,
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
)
from extproc.form import NO_REQUEST, Failed
from extproc.itinerary import Itinerary, Leg
from extproc.jsonarray import JsonArrayParser
from extproc.limits import FIRST_EVENT_WAIT_MS, MAX_ANSWER_BYTES, MAX_ERROR_BYTES
from extproc.providers import PROVIDERS, Provider, upstream_path
from extproc.sse import SseParser
from extproc.translation import Translation, chat_of

_JSON = ("content-type", "application/json")
_SSE = ("content-type", "text/event-stream; charset=utf-8")
_LOST = (headers.FLAGS, "UPE")  # Envoy's flag for a provider that broke the protocol


@dataclass(frozen=True, slots=True)
class Targets:
    """What all attempts share: each provider's base URL, the key that it has now, and the time of day."""

    base_urls: Mapping[str, str]
    key: Callable[[str], str | None]
    wall_ms: Callable[[], int]


class State(Enum):
    """Where an attempt stands."""

    __hash__ = object.__hash__  # Enum's own is a Python function, and every event looks its state up

    ASKED = auto()
    BODY = auto()
    SENT = auto()
    STREAMING = auto()
    WHOLE = auto()
    FAILING = auto()
    PASSING = auto()
    WAITING = auto()
    DONE = auto()


class Attempt:
    """One attempt. Feed it events in the order in which they happen.

    `patient`: everything comes here, and a stream's headers wait for its first event, so that a provider that sends
    headers and then nothing, or an error, fails over like one that sends an error's status.
    """

    __slots__ = (
        "_begins",
        "_caller",
        "_dialect",
        "_early",
        "_failure",
        "_first",
        "_held",
        "_itinerary",
        "_leg",
        "_patient",
        "_provider",
        "_state",
        "_status",
        "_targets",
        "_translation",
    )

    def __init__(self, targets: Targets, *, patient: bool = False) -> None:
        self._targets = targets
        self._patient = patient
        self._state = State.ASKED
        self._begins = State.DONE  # what follows the wait for the first event
        self._first: SseParser | JsonArrayParser  # … which it finds
        self._early: list[ResponseBody] = []  # chunks that came before the headers went on
        self._failure: ProviderError | None = None  # what the first event said instead of an answer
        self._status = 0
        self._held = bytearray()
        self._itinerary: Itinerary
        self._leg: Leg
        self._provider: Provider
        self._dialect: str  # in which this provider is asked
        self._caller: Dialect
        self._translation: Translation

    @property
    def state(self) -> State:
        """Where the attempt stands."""
        return self._state

    @property
    def done(self) -> bool:
        """Whether nothing more of this attempt is to come here."""
        return self._state is State.DONE

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what the shell must do. Raises ProtocolViolation for what Envoy may not send now."""
        if isinstance(event, Closed):
            return []
        step = TRANSITIONS.get((self._state, type(event)))
        if step is None:
            raise ProtocolViolation(f"{type(event).__name__} at the target in {self._state.name}")
        return step(self, event)

    # --- The request --------------------------------------------------------------------------------------------------

    def _on_request_headers(self, event: RequestHeaders) -> list[Command]:
        sent = dict(event.headers)
        self._provider, self._itinerary = provider, itinerary = _whereto(event)
        number = itinerary.leg(provider.name, int(sent.get(headers.ATTEMPTS) or 1))
        if number is None:  # a chain of envoy.yaml's that has more providers than the policy gives this model
            return self._reply(503, "not_a_target")
        key = self._targets.key(provider.name)
        if key is None:
            return self._reply(503, "no_provider_key")
        self._leg = itinerary.legs[number]
        self._caller = DIALECTS[itinerary.dialect]
        native = itinerary.dialect in provider.paths
        self._dialect = itinerary.dialect if native else _foreign(provider)
        crossing = self._crossing(native, itinerary.written and number == 0)
        self._state = State.DONE if crossing is Crossing.NOTHING else State.BODY
        return [
            ContinueRequest(
                set_headers=self._headers(key, sent if native else {}),
                remove_headers=headers.to_remove(sent, self._dialect if native else None),
                crossing=crossing,
            )
        ]

    def _crossing(self, native: bool, written: bool) -> Crossing:
        if self._patient or not native:
            return Crossing.BOTH
        return Crossing.NOTHING if written else Crossing.REQUEST

    def _headers(self, key: str, callers: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
        itinerary, provider = self._itinerary, self._provider
        base_url, model = self._targets.base_urls[provider.name], self._leg.target.model
        sse = not (itinerary.address.array and self._dialect == itinerary.dialect)
        return (
            (":path", upstream_path(provider, self._dialect, model, base_url, stream=itinerary.stream, sse=sse)),
            *provider.auth_headers(key),
            # A caller of the same dialect may want another version of it than translations are made for.
            *((name, callers.get(name, value)) for name, value in provider.headers),
            _JSON,
            ("content-length", str(itinerary.body_bytes)),
            # Counting needs plain text; some providers compress unless told otherwise.
            ("accept-encoding", "identity"),
        )

    def _on_request_body(self, event: RequestBody) -> list[Command]:
        try:
            body = self._native_body(event.body) if self._is_native() else self._translated_body(event.body)
        except TollgateError as error:  # the gate has read the same, so that hardly anything is left to find
            return self._reply(error.status, error.code, self._caller.render_error(error))
        body = renamed(body, self._provider.renames)
        if self._provider.body_fields:
            changes: dict[str, object] = dict(self._provider.body_fields)
            if self._provider.model_in_path(self._dialect):
                changes["model"] = None
            body = spliced(body, changes)
        self._state = State.DONE if self._is_native() and not self._patient else State.SENT
        return [ForwardRequest(body, set_headers=(("content-length", str(len(body))),))]

    def _is_native(self) -> bool:
        return self._dialect == self._itinerary.dialect

    def _native_body(self, raw: bytes) -> bytes:
        call = self._caller.read_call(orjson.loads(raw), self._itinerary.address)
        return self._caller.upstream_body(call, raw, self._leg.target.model, self._leg.cap)

    def _translated_body(self, raw: bytes) -> bytes:
        self._translation = Translation(
            CHAT[self._itinerary.dialect],
            CHAT[self._dialect],
            orjson.loads(raw),
            self._itinerary.address,
            drop=self._itinerary.drop,
            request_id=self._itinerary.request_id,
            created_s=self._targets.wall_ms() // 1000,
        )
        return self._translation.body(self._leg.target.model, self._leg.cap)

    # --- The answer ---------------------------------------------------------------------------------------------------

    def _on_response_headers(self, event: ResponseHeaders) -> list[Command]:
        view = dict(event.headers)
        self._status = int(view.get(":status") or 0)
        self._begins = self._what_begins(view, event.end)
        if self._patient and self._itinerary.stream and self._begins in (State.STREAMING, State.PASSING):
            self._state = State.WAITING
            self._first = JsonArrayParser() if self._is_native() and self._itinerary.address.array else SseParser()
            return [AwaitMore(FIRST_EVENT_WAIT_MS)]
        return [self._begin()]

    def _what_begins(self, view: Mapping[str, str], end: bool) -> State:
        succeeded = 200 <= self._status < 300
        if end:
            return State.DONE
        if self._is_native():
            return State.PASSING
        if succeeded and not self._itinerary.stream:
            return State.WHOLE
        if succeeded and _is(view, "content-type", "text/event-stream") and _is(view, "content-encoding", "identity"):
            return State.STREAMING
        if succeeded:  # … and no stream: it must not pass as one. Any other status may yet fail over, and stays
            self._status = 502
        return State.FAILING

    def _begin(self) -> ContinueResponse:
        """Let the headers go on, as those of what follows."""
        self._state = self._begins
        if self._state in (State.PASSING, State.DONE):
            return ContinueResponse()
        kind = _SSE if self._state is State.STREAMING and not self._itinerary.address.array else _JSON
        return ContinueResponse(
            set_headers=((":status", str(self._status)), kind), remove_headers=("content-length", "content-encoding")
        )

    def _on_early_chunk(self, event: ResponseBody) -> list[Command]:
        """Envoy waits for an answer to the headers, while the body comes: all are answered at once, in order."""
        self._early.append(event)
        try:
            data = [block.data for block in self._first.feed(event.body) if block.data]
        except StreamTooLarge:  # who reads it next says so, at the same bound
            return self._begin_late()
        if not data and not event.end:
            return []
        self._failure = self._failure_in(data)
        if self._failure is not None:
            self._status, self._begins = self._failure.status, State.FAILING
        return self._begin_late()

    def _begin_late(self) -> list[Command]:
        commands: list[Command] = [self._begin()]
        early, self._early = self._early, []
        for chunk in early:
            commands += self.handle(chunk)
        return commands

    def _failure_in(self, data: list[bytes]) -> ProviderError | None:
        """An error event before anything else; its status decides whether the next target is asked."""
        if not data or self._dialect not in CHAT:
            return None
        seed = Seed(self._itinerary.request_id, 0, NO_REQUEST)
        said = CHAT[self._dialect].stream_reader(seed).read(data[0])
        return next((event.error for event in said if isinstance(event, Failed)), None)

    def _on_chunk(self, event: ResponseBody) -> list[Command]:
        self._end_with(event)
        try:
            return [ForwardChunk(self._translation.chunk(event.body, event.end))]
        except StreamTooLarge:
            self._state = State.DONE
            error = ProviderError("The provider's stream has an event that is too long.", status=502)
            return [ForwardChunk(self._translation.broken_off(error))]

    def _on_piece(self, event: ResponseBody) -> list[Command]:
        """A whole answer is held back until its end. Its headers are gone by then: what cannot be read is a reset."""
        self._held += event.body
        if len(self._held) > MAX_ANSWER_BYTES:
            return self._lose("answer_too_large")
        if not event.end:
            return [ForwardChunk(b"")]
        self._state = State.DONE
        try:
            return [ForwardChunk(self._translation.whole(bytes(self._held)))]
        except ValueError:
            return self._refuse_to_pass(bytes(self._held))

    def _refuse_to_pass(self, body: bytes) -> list[Command]:
        """An error that came as a success is no answer, and not billed. Whatever else it is may be."""
        said = parse(body)
        if isinstance(said, dict) and said.get("error"):
            return self._reply(502, "error_as_answer")
        return self._lose("unreadable_answer")

    def _lose(self, details: str) -> list[Command]:
        """The provider has answered, and the caller gets nothing of it: for the gate it was lost."""
        self._state = State.DONE
        return [Reply(502, (_LOST,), details=details)]

    def _on_error_piece(self, event: ResponseBody) -> list[Command]:
        self._held += event.body[: MAX_ERROR_BYTES - len(self._held)]
        if not event.end:
            return [ForwardChunk(b"")]
        self._state = State.DONE
        if self._failure is not None:
            return [ForwardChunk(self._caller.render_error(self._failure))]
        return [ForwardChunk(self._translation.error(self._status, bytes(self._held)))]

    def _on_native_chunk(self, event: ResponseBody) -> list[Command]:
        self._end_with(event)
        return [ForwardChunk()]

    def _on_late_chunk(self, _: ResponseBody) -> list[Command]:
        """What follows an event that was too long."""
        return [ForwardChunk(b"")]

    def _end_with(self, event: ResponseBody) -> None:
        if event.end:
            self._state = State.DONE

    def _on_trailers(self, event: ResponseTrailers) -> list[Command]:
        """Too late to add to the body: a stream has its closing event by now, or the gate sees that it lacks."""
        if self._state in (State.WHOLE, State.FAILING):
            return self._lose("answer_in_trailers")
        begun = self._begin_late() if self._state is State.WAITING else []
        self._state = State.DONE
        return [*begun, DropTrailers(event.names)]

    def _reply(self, status: int, details: str, body: bytes = b"") -> list[Command]:
        self._state = State.DONE
        return [Reply(status, (_JSON,) if body else (), body, details)]


def _whereto(event: RequestHeaders) -> tuple[Provider, Itinerary]:
    """Raises ProtocolViolation where Envoy's configuration does not say: the request must not go on."""
    provider = PROVIDERS.get(event.provider or "")
    if provider is None:
        raise ProtocolViolation(f"no such provider: {event.provider!r}")
    try:
        return provider, Itinerary.decode(event.itinerary or "")
    except ValueError:
        raise ProtocolViolation("an attempt without an itinerary") from None


def _foreign(provider: Provider) -> str:
    """The gate has sent nobody here whose call could not be translated."""
    name = chat_of(provider)
    if name is None:
        raise ProtocolViolation(f"{provider.name} has no chat")
    return name


def _is(view: Mapping[str, str], name: str, value: str) -> bool:
    return view.get(name, value).partition(";")[0].strip().lower() == value


Step = Callable[[Attempt, Any], list[Command]]

# The whole protocol. `Closed` may come at any time, and changes nothing.
TRANSITIONS: dict[tuple[State, type[Event]], Step] = {
    (State.ASKED, RequestHeaders): Attempt._on_request_headers,
    (State.BODY, RequestBody): Attempt._on_request_body,
    (State.SENT, ResponseHeaders): Attempt._on_response_headers,
    (State.WAITING, ResponseBody): Attempt._on_early_chunk,
    (State.STREAMING, ResponseBody): Attempt._on_chunk,
    (State.WHOLE, ResponseBody): Attempt._on_piece,
    (State.FAILING, ResponseBody): Attempt._on_error_piece,
    (State.PASSING, ResponseBody): Attempt._on_native_chunk,
    (State.DONE, ResponseBody): Attempt._on_late_chunk,
    **{(state, ResponseTrailers): Attempt._on_trailers for state in State if state.value >= State.STREAMING.value},
}
