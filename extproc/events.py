"""What goes into the state machines and what comes out: the whole vocabulary between the pure half and the shell.

Events are what happened (a message of Envoy's, an answer of the ledger's, a timer). Commands are what the shell must
do, in order. Header values are text: HTTP's octets, decoded as Latin-1.

Structs, which are made in C: a frozen dataclass sets every field through Python. They cannot be in a cycle of
references, so the garbage collector does not track them (`gc=False`).
"""

from __future__ import annotations

from enum import Enum, auto
from typing import NamedTuple

from msgspec import Struct

from extproc.records import Amount, BudgetWindow, Hold, HoldAsk, HoldRefusal, Lease, Settlement, Target, UsageRecord

Headers = tuple[tuple[str, str], ...]


# Events ---------------------------------------------------------------------------------------------------------------


class RequestHeaders(Struct, frozen=True, gc=False):
    """The request line and headers. `end`: there is no body.

    Where a target is asked, `provider` is its endpoint's, and `itinerary` what the gate said (`ForwardRequest`).
    """

    headers: Headers
    end: bool
    provider: str | None = None
    itinerary: str | None = None


class RequestBody(Struct, frozen=True, gc=False):
    """The whole body: Envoy buffers it."""

    body: bytes
    end: bool


class ResponseHeaders(Struct, frozen=True, gc=False):
    """The provider's status and headers, or those of a reply that Envoy made itself."""

    headers: Headers
    end: bool


class ResponseBody(NamedTuple):
    """One chunk, wherever the network happened to cut it."""

    body: bytes
    end: bool


class ResponseTrailers(Struct, frozen=True, gc=False):
    """The provider ended its answer with trailers; the last chunk before them had no end."""

    names: tuple[str, ...]


class KeysRefreshed(Struct, frozen=True, gc=False):
    """The issuer's keys were fetched again, or it was too soon to."""


class PromptCounted(Struct, frozen=True, gc=False):
    """A long prompt was counted outside the event loop; None where too many were waiting for it."""

    tokens: int | None


class HoldAnswered(Struct, frozen=True, gc=False):
    """The ledger's answer; None where it gave none in time."""

    answer: Hold | HoldRefusal | None


class LeaseAnswered(Struct, frozen=True, gc=False):
    """The ledger's answer to an extension; None where it gave none in time."""

    lease: Lease | None


class TimerFired(Struct, frozen=True, gc=False):
    """The one timer that the exchange last set."""


class Closed(Struct, frozen=True, gc=False):
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


class ContinueRequest(Struct, frozen=True, gc=False):
    """Go on to the body, or, where a target answers, to the provider with these changes."""

    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()
    crossing: Crossing = Crossing.NOTHING


class ForwardRequest(Struct, frozen=True, gc=False):
    """Send this body on, in place of the caller's. `itinerary` is for the targets of all attempts to come."""

    body: bytes
    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()
    itinerary: str | None = None


class ContinueResponse(Struct, frozen=True, gc=False):
    """Let the response begin, with these changes."""

    set_headers: Headers = ()
    remove_headers: tuple[str, ...] = ()


class ForwardChunk(NamedTuple):
    """Send this in place of the chunk; None leaves the chunk as it is."""

    body: bytes | None = None


class AwaitMore(Struct, frozen=True, gc=False):
    """The answer to Envoy's message will take this long: it waits for another message. Answers nothing by itself."""

    timeout_ms: int


class DropTrailers(Struct, frozen=True, gc=False):
    """Let the response end, without these trailers."""

    names: tuple[str, ...]


class Reply(Struct, frozen=True, gc=False):
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


class RefreshKeys(Struct, frozen=True, gc=False):
    """Fetch an issuer's keys, if that was not done just now. Answered by KeysRefreshed."""

    issuer: str


class RefreshSecret(Struct, frozen=True, gc=False):
    """A provider did not accept the gateway's key: look for a new one, if that was not done just now."""

    provider: str


class CountPrompt(Struct, frozen=True, gc=False):
    """Count these texts outside the event loop. Answered by PromptCounted."""

    texts: tuple[str, ...]
    encoding: str


class PlaceHold(Struct, frozen=True, gc=False):
    """Answered by HoldAnswered."""

    ask: HoldAsk


class ExtendLease(Struct, frozen=True, gc=False):
    """Record `used`, and raise the hold towards `target` in all. Answered by LeaseAnswered."""

    request_id: str
    windows: tuple[BudgetWindow, ...]
    used: Amount
    target: Amount


class Settle(Struct, frozen=True, gc=False):
    """Post what the request cost. Never lost: the shell journals it where the ledger cannot take it.

    `record` is the row of a request that was admitted: it is written too, and kept beside what was posted until a usage
    store has it. A hold that is only given back has none.
    """

    settlement: Settlement
    record: UsageRecord | None = None


class Learn(Struct, frozen=True, gc=False):
    """Tell everybody how a count compared with the bill."""

    target: Target
    counted: int
    billed: int


class WriteRecord(Struct, frozen=True, gc=False):
    """Append the row of a request that was never admitted to the usage journal."""

    record: UsageRecord


class SetTimer(Struct, frozen=True, gc=False):
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
