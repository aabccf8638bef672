"""What goes into the state machines and what comes out: the whole vocabulary between the pure half and the shell.

Events are what happened (a message of Envoy's, an answer of the ledger's, a timer). Commands are what the shell must
do, in order. Header values are text: HTTP's octets, decoded as Latin-1.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from extproc.records import Amount, BudgetWindow, Hold, HoldAsk, HoldRefusal, Lease, Settlement, Target, UsageRecord

Headers = tuple[tuple[str, str], ...]


# Events ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestHeaders:
    """The request line and headers. `end`: there is no body.

    Where a target is asked, `provider` is its endpoint's, and `itinerary` what the gate said (`ForwardRequest`).
    """

    headers: Headers
    end: bool
    provider: str | None = None
    itinerary: str | None = None


@dataclass(frozen=True, slots=True)
class RequestBody:
    """The whole body: Envoy buffers it."""

    body: bytes
    end: bool


@dataclass(frozen=True, slots=True)
class ResponseHeaders:
    """The provider's status and headers, or those of a reply that Envoy made itself."""

    headers: Headers
    end: bool


class ResponseBody(NamedTuple):
    """One chunk, wherever the network happened to cut it."""

    body: bytes
    end: bool


@dataclass(frozen=True, slots=True)
class ResponseTrailers:
    """The provider ended its answer with trailers; the last chunk before them had no end."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeysRefreshed:
    """The issuer's keys were fetched again, or it was too soon to."""


@dataclass(frozen=True, slots=True)
class PromptCounted:
    """A long prompt was counted outside the event loop; None where too many were waiting for it."""

    tokens: int | None


@dataclass(frozen=True, slots=True)
class HoldAnswered:
    """The ledger's answer; None where it gave none in time."""

    answer: Hold | HoldRefusal | None


@dataclass(frozen=True, slots=True)
class LeaseAnswered:
    """The ledger's answer to an extension; None where it gave none in time."""

    lease: Lease | None


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The one timer that the exchange last set."""


@dataclass(frozen=True, slots=True)
class Closed:
    """Envoy closed the side stream: the request is over, whether or not it was complete."""


Event = (
    RequestHeaders
    | RequestBody
    | ResponseHeaders
    | ResponseBody
    | ResponseTrailers
    | KeysRefreshed
    | PromptCounted
    | HoldAnswered
    | LeaseAnswered
    | TimerFired
    | Closed
)


# Commands that answer Envoy's message ---------------------------------------------------------------------------------


class Crossing(Enum):
    """What of an attempt comes to its target besides the request's headers."""

    NOTHING = auto()
    REQUEST = auto()  # the request's body
    BOTH = auto()  # that, and the whole answer as it comes


@dataclass(frozen=True, slots=True)
class ContinueRequest:
    """Go on to the body, or, where a target answers, to the provider with these changes."""

    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()
    crossing: Crossing = Crossing.NOTHING


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """Send this body on, in place of the caller's. `itinerary` is for the targets of all attempts to come."""

    body: bytes
    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()
    itinerary: str | None = None


@dataclass(frozen=True, slots=True)
class ContinueResponse:
    """Let the response begin, with these changes."""

    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()


class ForwardChunk(NamedTuple):
    """Send this in place of the chunk; None leaves the chunk as it is."""

    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class AwaitMore:
    """The answer to Envoy's message will take this long: it waits for another message. Answers nothing by itself."""

    timeout_ms: int


@dataclass(frozen=True, slots=True)
class DropTrailers:
    """Let the response end, without these trailers."""

    names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Reply:
    """Answer the caller in the provider's stead. Ends the exchange with Envoy.

    Once the response has begun nothing of it is sent: it resets the caller's stream and the provider's.
    """

    status: int
    headers: Headers = ()
    body: bytes = b""
    details: str = ""


ASKS = (RequestHeaders, RequestBody, ResponseHeaders, ResponseBody, ResponseTrailers)  # Envoy's own messages
ANSWERS = (ContinueRequest, ForwardRequest, ContinueResponse, ForwardChunk, DropTrailers, Reply)


# Commands to everything else ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RefreshKeys:
    """Fetch an issuer's keys, if that was not done just now. Answered by KeysRefreshed."""

    issuer: str


@dataclass(frozen=True, slots=True)
class RefreshSecret:
    """A provider did not accept the gateway's key: look for a new one, if that was not done just now."""

    provider: str


@dataclass(frozen=True, slots=True)
class CountPrompt:
    """Count these texts outside the event loop. Answered by PromptCounted."""

    texts: tuple[str, ...]
    encoding: str


@dataclass(frozen=True, slots=True)
class PlaceHold:
    """Answered by HoldAnswered."""

    ask: HoldAsk


@dataclass(frozen=True, slots=True)
class ExtendLease:
    """Record `used`, and raise the hold towards `target` in all. Answered by LeaseAnswered."""

    request_id: str
    windows: tuple[BudgetWindow, ...]
    used: Amount
    target: Amount


@dataclass(frozen=True, slots=True)
class Settle:
    """Post what the request cost. Never lost: the shell journals it where the ledger cannot take it.

    `record` is the row of a request that was admitted: it is written too, and kept beside what was posted until a usage
    store has it. A hold that is only given back has none.
    """

    settlement: Settlement
    record: UsageRecord | None = None


@dataclass(frozen=True, slots=True)
class Learn:
    """Tell everybody how a count compared with the bill."""

    target: Target
    counted: int
    billed: int


@dataclass(frozen=True, slots=True)
class WriteRecord:
    """Append the row of a request that was never admitted to the usage journal."""

    record: UsageRecord


@dataclass(frozen=True, slots=True)
class SetTimer:
    """Replaces the timer that is running. Answered by TimerFired."""

    after_ms: int


Command = (
    ContinueRequest
    | ForwardRequest
    | ContinueResponse
    | ForwardChunk
    | AwaitMore
    | DropTrailers
    | Reply
    | RefreshKeys
    | RefreshSecret
    | CountPrompt
    | PlaceHold
    | ExtendLease
    | Settle
    | Learn
    | WriteRecord
    | SetTimer
)
