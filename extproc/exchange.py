"""The state machine of one HTTP request at the gate: events in, commands out. It waits for nothing and calls no one.

`TRANSITIONS`, at the end, is the whole protocol: a pair that is not in it breaks the order, and ends the gRPC stream
with an error, because Envoy lets traffic through when a processor ends its stream cleanly.

    START ─► IDENTIFYING ─► BODY ─► COUNTING ─► HOLDING ─► SENT ─► STREAMING ⇄ WAITING ─► CUTTING ─► DONE
                                                              ├──► ANSWERING (a whole JSON answer) ──► DONE
                                                              └──► FAILING (an error's body) ────────► DONE
    START, BODY ─► PASSING: Envoy refused the request by itself

A stream's chunk is forwarded only as far as the hold covers it. Beyond that it waits for the ledger, which is asked
ahead of need, and is cut on the ledger's refusal. What was received is what is posted, forwarded or not: the provider
bills it all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from enum import Enum, auto
from math import ceil
from typing import Any
from urllib.parse import quote

import orjson

from extproc import budget, endpoints, headers, limits, offers, tracing
from extproc.allowance import Allowance
from extproc.dialects.dialect import Dialect
from extproc.dialects.openai_chat import OpenAIChat
from extproc.endpoints import Endpoint
from extproc.errors import (
    BadRequest,
    BudgetExhausted,
    MethodNotAllowed,
    NotFound,
    ProtocolViolation,
    RequestTooLarge,
    StreamTooLarge,
    TollgateError,
    Unauthenticated,
    Unavailable,
    UpstreamFailure,
)
from extproc.events import (
    ANSWERS,
    ASKS,
    Closed,
    Command,
    ContinueRequest,
    ContinueResponse,
    CountPrompt,
    DropTrailers,
    Event,
    ExtendLease,
    ForwardChunk,
    ForwardRequest,
    Headers,
    HoldAnswered,
    KeysRefreshed,
    Learn,
    LeaseAnswered,
    PlaceHold,
    PromptCounted,
    RefreshKeys,
    RefreshSecret,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    ResponseTrailers,
    SetTimer,
    Settle,
    TimerFired,
    WriteRecord,
)
from extproc.gate import Gate
from extproc.identity import UnknownKey
from extproc.itinerary import pick
from extproc.jsonarray import JsonArrayParser, last_element
from extproc.metering import Framing, StreamMeter, count_texts, final_usage
from extproc.plan import Candidate, Plan, make_plan
from extproc.pricing import Price
from extproc.records import (
    NOTHING,
    Amount,
    Hold,
    HoldAsk,
    HoldRefusal,
    Lease,
    Metered,
    Outcome,
    Principal,
    Settlement,
    Usage,
    UsageRecord,
    UsageSource,
)
from extproc.sse import SseParser
from extproc.tracing import TraceContext

ROUTE_HEADER = "x-tollgate-internal-route"
FIRST_BYTE_HEADER = "x-envoy-upstream-rq-per-try-timeout-ms"  # how long an attempt may take to begin its answer
# The reasons by which a provider had the request, and may have written an answer that never came.
_LOST_ANSWER = frozenset({"UC", "UR", "UT", "UPE", "SI"})
CLIENT_GONE_STATUS = 499  # nginx's, and now everybody's: the caller left before there was a status

_JSON = ("content-type", "application/json")
_HEALTH_PATH = "/healthz"
_DEFAULT_DIALECT = OpenAIChat()

NOBODY = Principal(email="", service=None, team=None, user=None)
_ENDED_EARLY = UpstreamFailure("The provider's answer ended early.")  # never raised, so that all may share it
NO_HOLD = Hold(request_id="", windows=(), held=NOTHING)


class State(Enum):
    """Where an exchange stands."""

    __hash__ = object.__hash__  # Enum's own is a Python function, and every event looks its state up

    START = auto()
    IDENTIFYING = auto()
    BODY = auto()
    COUNTING = auto()
    HOLDING = auto()
    ABANDONED = auto()
    SENT = auto()
    STREAMING = auto()
    WAITING = auto()
    ANSWERING = auto()
    FAILING = auto()
    CUTTING = auto()
    PASSING = auto()
    DONE = auto()


class Exchange:
    """One request, from its headers to its record. Feed it events in the order in which they happen."""

    __slots__ = (
        "_allowance",
        "_answer",
        "_asked_ns",
        "_attempts",
        "_backlog",
        "_begun_ns",
        "_blame",
        "_candidate",
        "_dialect",
        "_end",
        "_endpoint",
        "_extending",
        "_first_ns",
        "_fresh",
        "_gate",
        "_headers",
        "_hold",
        "_lost",
        "_meter",
        "_out",
        "_overhead_ns",
        "_passed",
        "_plan",
        "_principal",
        "_queue",
        "_request_id",
        "_sent_ns",
        "_span",
        "_state",
        "_status",
    )

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._state = State.START
        self._dialect: Dialect = _DEFAULT_DIALECT
        self._headers: dict[str, str] = {}
        self._request_id = ""
        self._principal: Principal = NOBODY
        self._span: TraceContext | None = None  # ours, if spans are exported
        self._plan: Plan | None = None
        self._candidate: Candidate  # who answers; until somebody has, who is asked first
        self._allowance: Allowance
        self._hold: Hold = NO_HOLD
        self._meter: StreamMeter
        self._backlog: list[Metered] = []
        self._out: list[bytes] = []
        self._passed = False  # something of a stream has gone on to the caller
        self._queue: deque[ResponseBody | ResponseTrailers] = deque()  # what came while a chunk waits, or after the cut
        self._answer = bytearray()
        self._end = False
        self._lost = False  # Envoy gave up on a provider that had the request
        self._extending = False  # an extension is under way
        self._fresh = False  # … and was asked for after the stream ran into its hold
        self._blame: TollgateError = _ENDED_EARLY
        self._status = 0
        self._attempts = 0
        self._begun_ns = 0
        self._sent_ns = 0
        self._first_ns = 0
        self._overhead_ns = 0
        self._asked_ns = 0

    @property
    def state(self) -> State:
        """Where the exchange stands, for the shell and for tests."""
        return self._state

    @property
    def done(self) -> bool:
        """Whether the request is over: nothing of it waits for an answer, or may still pass."""
        return self._state in (State.DONE, State.PASSING)

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what the shell must do, in order.

        Raises ProtocolViolation where the event cannot come in this state.
        """
        step = TRANSITIONS.get((self._state, type(event)))
        if step is None:
            raise ProtocolViolation(f"{type(event).__name__} in {self._state.name}")
        if not self._asked_ns and isinstance(event, ASKS):
            self._asked_ns = self._gate.clock.now_ns()
        try:
            commands = step(self, event)
        except TollgateError as error:
            commands = self._refuse(error)
        if self._asked_ns and commands and isinstance(commands[0], ANSWERS):
            self._overhead_ns += self._gate.clock.now_ns() - self._asked_ns
            self._asked_ns = 0
        return commands

    # --- The request --------------------------------------------------------------------------------------------------

    def _on_request_headers(self, event: RequestHeaders) -> list[Command]:
        self._begun_ns = self._asked_ns
        view = dict(event.headers)
        self._request_id, path = view.get("x-request-id", ""), view.get(":path", "")
        if not self._request_id:
            raise ProtocolViolation("a request without an id")
        if path.partition("?")[0] == _HEALTH_PATH:
            return self._health()
        self._endpoint = endpoint = endpoints.EXACT.get(path) or self._endpoint_at(path, view)
        self._dialect = endpoint.dialect
        if view.get(":method") != endpoint.method:
            raise MethodNotAllowed(f"This path takes {endpoint.method} only.")
        self._headers = headers.collect(event.headers)
        if self._gate.begin_span is not None and not endpoint.lists:
            callers = tracing.parse(self._headers.get(tracing.TRACEPARENT))
            self._span = self._gate.begin_span(self._request_id, callers, endpoint.dialect.name)
        if (lacking := self._gate.unready()) is not None:
            raise Unavailable(f"The gateway cannot take requests now: {lacking}.")
        return self._identify(event.end)

    def _endpoint_at(self, path: str, names: Collection[str]) -> Endpoint:
        self._dialect = endpoints.speaker(path, names)
        endpoint = endpoints.find(path, names)
        if endpoint is None:
            raise NotFound(f"There is nothing at this path. Served here: {', '.join(endpoints.SERVED)}.")
        return endpoint

    def _identify(self, end: bool) -> list[Command]:
        try:
            credential = headers.credential(self._headers)
            self._principal = self._gate.identity.principal(
                () if credential is None else (credential,), self._headers.get(headers.USER)
            )
        except UnknownKey as error:
            if self._state is State.IDENTIFYING:
                raise
            self._end = end
            self._state = State.IDENTIFYING
            return [RefreshKeys(error.issuer), SetTimer(self._gate.admission_timeout_ms)]
        return self._list_models() if self._endpoint.lists else self._await_body(end)

    def _on_keys_refreshed(self, _: KeysRefreshed) -> list[Command]:
        return self._identify(self._end)

    def _list_models(self) -> list[Command]:
        """A list costs nothing and asks no provider; it is written down like any other request."""
        offered = offers.offered(self._gate.policy, self._gate.providers())
        body = offers.render(self._dialect.name, offered, self._endpoint.address.model)
        return [Reply(200, (_JSON, self._own_id()), body, "models"), *self._write(Outcome.OK, 200)]

    def _await_body(self, end: bool) -> list[Command]:
        headers.require_json(self._headers.get("content-type"), self._headers.get("content-encoding"))
        length = self._headers.get("content-length")
        if length is not None and length.isdecimal() and int(length[:20]) > limits.MAX_REQUEST_BYTES:
            raise RequestTooLarge(f"The request is larger than {limits.MAX_REQUEST_BYTES // limits.MIB} MiB.")
        if end:
            raise BadRequest("The request has no body.")
        self._state = State.BODY
        return [ContinueRequest()]

    def _on_request_body(self, event: RequestBody) -> list[Command]:
        forced_provider = self._headers.get(headers.PROVIDER)
        self._plan = plan = make_plan(self._gate, self._endpoint, self._principal, event.body, forced_provider)
        self._candidate = plan.candidates[0]
        texts = plan.call.prompt_texts if plan.call.billed else ()
        if sum(map(len, texts)) > limits.INLINE_COUNT_CHARS:
            self._state = State.COUNTING
            return [CountPrompt(texts, self._candidate.traits.encoding), SetTimer(self._gate.admission_timeout_ms)]
        return self._place_hold(count_texts(texts, self._counter()))

    def _on_prompt_counted(self, event: PromptCounted) -> list[Command]:
        if event.tokens is None:
            raise Unavailable("The gateway is busy with too many long prompts.")
        return self._place_hold(event.tokens)

    def _place_hold(self, prompt_text_tokens: int) -> list[Command]:
        plan = self._admitted
        # Tokenizers differ: whichever target answers, the prompt is held for as the one that makes most of it.
        factor = max(1.0, *[self._gate.factor(candidate.target) for candidate in plan.candidates])
        extra = max([candidate.call.prompt_extra for candidate in plan.candidates])
        prompt_tokens = ceil(prompt_text_tokens * factor) + extra if plan.call.billed else 0
        self._allowance = allowance = self._allowance_at(plan.price, prompt_tokens, plan.cap)
        least = self._least()
        self._state = State.HOLDING
        ask = HoldAsk(
            request_id=self._request_id,
            budgets=plan.budgets,
            ask=allowance.lease(0) if plan.cuttable else least,  # the whole
            least=least,
            used=allowance.used(0),
            note=self._note(),
        )
        return [PlaceHold(ask), SetTimer(self._gate.admission_timeout_ms)]

    def _allowance_at(self, price: Price, prompt_tokens: int, cap: int) -> Allowance:
        call = self._admitted.call
        if not call.billed:
            cap = 0
        searches = max([candidate.call.web_searches for candidate in self._admitted.candidates])
        return Allowance(price, prompt_tokens, cap * call.choices, self._gate.lease_tokens, searches)

    def _least(self) -> Amount:
        """The least that the request can be let through with."""
        return self._allowance.used(1) if self._admitted.cuttable else self._allowance.whole()

    def _on_hold_answered(self, event: HoldAnswered) -> list[Command]:
        answer = event.answer
        if isinstance(answer, HoldRefusal):
            raise budget.refusal(answer, self._least())
        if answer is None:
            return [*self._refuse(Unavailable("The budget could not be checked in time.")), *self._release()]
        self._hold = answer
        self._allowance.grant(answer.held)
        self._state = State.SENT
        self._sent_ns = self._gate.clock.now_ns()
        return [self._forward_request(), SetTimer(self._gate.heartbeat_ms)]

    def _forward_request(self) -> ForwardRequest:
        plan = self._admitted
        body = plan.body()
        chain = ",".join([candidate.target.provider for candidate in plan.candidates])
        pairs = [(ROUTE_HEADER, chain), _JSON, ("content-length", str(len(body)))]
        if plan.call.stream:  # a whole answer begins when it is complete: envoy.yaml says how long that may take
            pairs.append((FIRST_BYTE_HEADER, str(self._gate.first_byte_timeout_ms)))
        trace, no_trace = tracing.onward(self._headers, self._span)
        return ForwardRequest(
            body,
            set_headers=(*pairs, *trace),
            # The target removes the rest; Envoy still routes by some of it.
            remove_headers=headers.CALLERS_ONLY + no_trace,
            itinerary=plan.itinerary(self._request_id, len(body)).encode(),
        )

    def _on_admission_timeout(self, _: TimerFired) -> list[Command]:
        unresolved = self._state is State.HOLDING
        commands = self._refuse(Unavailable("The gateway could not decide in time."))
        if unresolved:
            self._state = State.ABANDONED
        return commands

    def _on_abandoned_hold(self, event: HoldAnswered) -> list[Command]:
        """The caller left, or time ran out, before the ledger answered: what it granted goes back."""
        self._state = State.DONE
        if isinstance(event.answer, HoldRefusal):
            return []
        self._hold = event.answer or NO_HOLD
        return self._release()

    def _on_unseen_refusal(self, _: ResponseHeaders) -> list[Command]:
        """Envoy refuses what is not HTTP to it before the gate is asked, and its reply comes past here: no record."""
        self._state = State.PASSING
        return [ContinueResponse()]

    def _on_body_refusal(self, event: ResponseHeaders) -> list[Command]:
        """Envoy ended the request while its body came: too large (413), or too slow (408)."""
        status = int(dict(event.headers).get(":status") or 0)
        commands = [ContinueResponse(), *self._write(Outcome.REFUSED, status)]
        self._state = State.PASSING
        return commands

    def _pass_chunk(self, _: ResponseBody) -> list[Command]:
        return [_UNCHANGED]

    # --- The response -------------------------------------------------------------------------------------------------

    def _on_response_headers(self, event: ResponseHeaders) -> list[Command]:
        view = dict(event.headers)
        self._status = int(view.get(":status") or 0)
        self._attempts = int(view.get(headers.ATTEMPTS) or 1)
        self._settle_on(view.get(headers.ANSWERED_BY, ""))
        repeats = len(view) < len(event.headers)
        if repeats and (_repeats(event.headers, "content-type") or _repeats(event.headers, "content-encoding")):
            return self._replace_answer(UpstreamFailure("The provider's headers contradict each other."))
        encoding = (view.get("content-encoding") or "identity").strip().lower()
        if self._status in (401, 403) or 300 <= self._status < 400:
            error = UpstreamFailure("The provider did not accept the gateway's request.")
            refused = self._refused_key()  # before the answer has a status of its own
            return [*self._replace_answer(error), *refused]
        if encoding != "identity":  # neither metered nor searched for secrets
            return self._replace_answer(UpstreamFailure("The provider sent a compressed answer."))
        if not 200 <= self._status < 300:
            return self._begin_failure(event)
        if event.end:
            return self._replace_answer(UpstreamFailure("The provider's answer is empty."))
        return self._begin_answer(view, self._kept_back(event.headers))

    def _settle_on(self, provider: str) -> None:
        """Somebody has answered: from here on its price counts, and not the dearest. Nobody, if no host was left."""
        plan = self._admitted
        number = pick(plan.route.targets, provider, self._attempts)
        if number is None or len(plan.candidates) == 1:
            return
        self._candidate = candidate = plan.candidates[number]
        held, prompt_tokens = self._allowance.held, self._allowance.prompt_tokens
        self._allowance = self._allowance_at(candidate.price, prompt_tokens, candidate.cap)
        self._allowance.grant(held)

    def _kept_back(self, pairs: Headers) -> tuple[str, ...]:
        """Names that must not reach the caller: those that are not its business, and any with a secret in its value."""
        removed = headers.response_to_remove([name for name, _ in pairs])
        if not self._holds_secret("\n".join([value for _, value in pairs]).encode("latin-1")):
            return removed
        return removed + tuple(name for name, value in pairs if self._holds_secret(value.encode("latin-1")))

    def _holds_secret(self, data: bytes) -> bool:
        return self._gate.redact(data) != data

    def _begin_answer(self, view: dict[str, str], removed: tuple[str, ...]) -> list[Command]:
        plan = self._admitted
        content_type = (view.get("content-type") or "").partition(";")[0].strip().lower()
        framing = self._framing(content_type)
        if framing is not None:
            self._meter = StreamMeter(
                self._dialect,
                self._counter(),
                self._gate.factor(self._candidate.target),
                choices=self._candidate.call.choices,
                hide_usage=not plan.call.wants_usage,
                framing=framing,
            )
            self._state = State.STREAMING
            removed += ("content-length",)
        elif plan.cuttable:  # held for by the lease: what cannot be cut must not pass
            return self._replace_answer(UpstreamFailure("The provider's answer is not the stream that was asked for."))
        else:
            self._state = State.ANSWERING
        # A budget's name may hold a caller's or a policy's text, which is no header's.
        over = (quote(name, safe="/@*:+") for name in self._hold.over[:1])
        warning = tuple(("x-tollgate-budget", f"over its soft limit: {name}") for name in over)
        return [ContinueResponse(set_headers=(self._own_id(), *warning), remove_headers=removed)]

    def _framing(self, content_type: str) -> Callable[[int], Framing] | None:
        """How the answer is put together, if it is a stream, asked for or not."""
        if content_type == "text/event-stream" or (self._admitted.call.stream and not content_type):
            return SseParser
        return JsonArrayParser if content_type == "application/json" and self._endpoint.address.array else None

    def _on_answer_chunk(self, event: ResponseBody) -> list[Command]:
        self._mark_first()
        self._keep(event.body, limits.MAX_ANSWER_BYTES)
        if self._holds_secret(event.body):  # its length was announced, so that nothing can be taken out
            error = UpstreamFailure("The provider's answer holds a secret of the gateway.")
            self._status = error.status
            return [self._reply(error), *self._finish_unread(Outcome.UPSTREAM_ERROR)]
        return [ForwardChunk(), *self._finish_answer()] if event.end else [ForwardChunk()]

    def _keep(self, body: bytes, bound: int) -> None:
        """Keep a body that can only be read whole, without what is above its bound."""
        self._answer += body[: bound - len(self._answer)]

    def _finish_answer(self, unread: Outcome = Outcome.UPSTREAM_ERROR, at_least: int = 0) -> list[Command]:
        """`unread` is the outcome of what is no answer or not all of one, `at_least` its tokens if less is found."""
        try:
            answer = self._dialect.read_answer(bytes(self._answer))
        except ValueError:
            return self._finish_unread(unread, at_least)
        if answer.usage is not None:
            return self._finish(Outcome.OK, answer.usage, UsageSource.PROVIDER, answer.service_tier)
        usage = self._counted_usage(self._count(answer.texts))
        return self._finish(Outcome.OK, usage, UsageSource.COUNTED, answer.service_tier)

    def _finish_unread(self, outcome: Outcome, at_least: int = 0) -> list[Command]:
        """Perhaps an error with status 200, or the first half of an answer: all of its text is counted."""
        tokens = max(self._count((self._answer.decode("utf-8", "replace"),)), at_least)
        return self._finish(outcome, self._counted_usage(tokens), UsageSource.COUNTED)

    def _count(self, texts: tuple[str, ...]) -> int:
        """Output tokens of a whole answer. A very long one by its beginning: all streams wait for the count."""
        text = "".join(texts)
        head = text[: limits.MAX_COUNTED_CHARS]
        tokens = count_texts((head,), self._counter())
        return min(tokens * len(text) // (len(head) or 1), self._allowance.cap)

    # --- An answer that failed ----------------------------------------------------------------------------------------

    def _begin_failure(self, event: ResponseHeaders) -> list[Command]:
        """An error's body is kept back until it is whole, so that no secret passes in two halves."""
        self._state = State.FAILING
        self._lost = not _LOST_ANSWER.isdisjoint(dict(event.headers).get(headers.FLAGS, "").split(","))
        removed = (*self._kept_back(event.headers), "content-length")
        commands: list[Command] = [ContinueResponse(set_headers=(self._own_id(),), remove_headers=removed)]
        if event.end:
            commands += self._finish_failure()
        return commands

    def _refused_key(self) -> list[Command]:
        """Whether the provider means the key: 401 does, 403 may, and Gemini and xAI say so with 400 and in words."""
        in_words = self._status == 400 and b"api key" in self._answer.lower()
        return [RefreshSecret(self._candidate.target.provider)] if self._status in (401, 403) or in_words else []

    def _finish_failure(self) -> list[Command]:
        """Providers do not bill errors. An answer that was lost on its way is counted like one that was abandoned."""
        if self._lost:
            usage = self._counted_usage(self._unseen_tokens())
            return self._finish(Outcome.UPSTREAM_ERROR, usage, UsageSource.COUNTED)
        return self._finish(Outcome.UPSTREAM_ERROR, Usage(0, 0), UsageSource.PROVIDER)

    def _on_error_chunk(self, event: ResponseBody) -> list[Command]:
        self._keep(event.body, limits.MAX_ERROR_BYTES)
        if not event.end:
            return [ForwardChunk(b"")]
        body = self._gate.redact(bytes(self._answer))
        if len(self._answer) == limits.MAX_ERROR_BYTES:  # cut off, perhaps in the middle of a secret
            body = self._dialect.render_error(UpstreamFailure("The provider's error is too long to be passed on."))
        return [ForwardChunk(body), *self._refused_key(), *self._finish_failure()]

    def _replace_answer(self, error: TollgateError) -> list[Command]:
        """The provider's answer does not go on. What it may have billed for it is posted as far as it is known."""
        failed = not 200 <= self._status < 300
        usage = Usage(0, 0) if failed else self._counted_usage(self._written_by(self._gate.clock.now_ns()))
        self._status = error.status
        return [self._reply(error), *self._finish(Outcome.UPSTREAM_ERROR, usage, UsageSource.COUNTED)]

    # --- The stream ---------------------------------------------------------------------------------------------------

    def _on_chunk(self, event: ResponseBody) -> list[Command]:
        self._end = event.end
        try:
            self._backlog = self._meter.feed(event.body)
        except StreamTooLarge:
            return self._cut(UpstreamFailure("The provider's stream has an event that is too long."))
        if event.end:
            self._backlog += self._remainder()
        if self._meter.tokens:
            self._mark_first()
        if self._take_covered():
            return self._pass_on(event.body)
        self._state = State.WAITING
        return [] if self._extending else self._extend(fresh=True)

    def _remainder(self) -> list[Metered]:
        """What follows the last whole event. Half an event is left out: it would swallow the error that comes next."""
        raw = self._meter.finish()
        return [Metered(raw, False, self._meter.tokens)] if raw and self._meter_ended() else []

    def _meter_ended(self) -> bool:
        return self._meter.complete or self._meter.errored

    def _take_covered(self) -> bool:
        """Move what the hold covers out of the backlog. What it does not waits there for the ledger."""
        covered = self._allowance.covered
        for position, metered in enumerate(self._backlog):
            if metered.tokens > covered:
                self._backlog = self._backlog[position:]
                return False
            if not metered.hidden:
                self._out.append(metered.raw)
        self._backlog = []
        return True

    def _pass_on(self, original: bytes | None) -> list[Command]:
        self._state = State.STREAMING
        if self._end:
            return self._end_stream()
        commands: list[Command] = [self._chunk(original)]
        if not self._extending and self._allowance.runs_low(self._meter.tokens):
            commands += self._extend(fresh=False)
        return commands

    def _chunk(self, original: bytes | None) -> ForwardChunk:
        body = self._gate.redact(b"".join(self._out))  # whole events: no secret is in two halves
        self._out = []
        self._passed = self._passed or bool(body)
        return _UNCHANGED if body == original else ForwardChunk(body)

    def _extend(self, fresh: bool) -> list[Command]:
        self._extending, self._fresh = True, fresh
        tokens = self._tokens_so_far()
        target = self._allowance.lease(tokens)
        held = self._allowance.held
        return [
            ExtendLease(
                self._request_id,
                self._hold.windows,
                self._allowance.used(tokens),
                Amount(max(target.nanousd, held.nanousd), max(target.tokens, held.tokens)),
            )
        ]

    def _on_lease_answered(self, event: LeaseAnswered) -> list[Command]:
        self._extending = False
        if event.lease is not None:
            self._allowance.grant(event.lease.held)
        return []

    def _on_awaited_lease(self, event: LeaseAnswered) -> list[Command]:
        """The stream stands still until this answer. Only one to a question asked since then can cut it."""
        self._on_lease_answered(event)
        if self._take_covered():
            return self._pass_on(None) + self._catch_up()
        return self._cut(_cut_error(event.lease)) if self._fresh else self._extend(fresh=True)

    def _on_queued(self, event: ResponseBody | ResponseTrailers) -> list[Command]:
        """Envoy does not wait for one chunk's answer before it sends the next; the answers keep their order."""
        self._queue.append(event)
        return []

    def _catch_up(self) -> list[Command]:
        commands: list[Command] = []
        while self._queue and self._state is State.STREAMING:
            event = self._queue.popleft()
            commands += self._on_chunk(event) if isinstance(event, ResponseBody) else self._on_trailers(event)
        return commands

    def _end_stream(self) -> list[Command]:
        if not self._meter_ended():
            self._out.append(self._error_event(UpstreamFailure("The provider's stream ended early.")))
        outcome = Outcome.OK if self._meter.complete else Outcome.UPSTREAM_ERROR
        return [self._chunk(None), *self._finish_stream(outcome)]

    def _on_trailers(self, event: ResponseTrailers) -> list[Command]:
        """The end of an answer whose last chunk did not say so. Too late to add to the body: what lacks is a reset."""
        self._end = True
        if self._state is State.ANSWERING:
            return [DropTrailers(event.names), *self._finish_answer()]
        if self._state is State.STREAMING and self._meter_ended() and not self._meter.finish():
            return [DropTrailers(event.names), *self._finish_stream(Outcome.OK)]
        if self._state is State.FAILING:
            return [
                Reply(self._blame.status, details=self._blame.code),
                *self._finish_failure(),
            ]
        return self._reset()

    def _cut(self, error: TollgateError) -> list[Command]:
        """Tell the caller, then wait a moment for the event to reach it, then reset both sides."""
        self._blame = error
        self._out.append(self._error_event(error))
        commands: list[Command] = [self._chunk(None)]
        if self._end:
            return [*commands, *self._finish_stream(self._cut_outcome())]
        self._state = State.CUTTING
        return [*commands, SetTimer(limits.CUT_FLUSH_MS)]

    def _error_event(self, error: TollgateError) -> bytes:
        if not self._endpoint.address.array:
            return self._dialect.render_error_event(error)
        return last_element(self._dialect.render_error(error), first=not (self._passed or self._out))

    def _on_flushed(self, _: TimerFired) -> list[Command]:
        return self._reset()

    def _reset(self) -> list[Command]:
        reply = Reply(self._blame.status, details=self._blame.code)
        return [reply, *self._finish_stream(self._cut_outcome())]

    def _cut_outcome(self) -> Outcome:
        return Outcome.UPSTREAM_ERROR if isinstance(self._blame, UpstreamFailure) else Outcome.CUT

    # --- Heartbeat: a hold must not expire under a request that is only slow ------------------------------------------

    def _on_heartbeat(self, _: TimerFired) -> list[Command]:
        beat: list[Command] = [SetTimer(self._gate.heartbeat_ms)]
        return beat if self._extending else [*self._extend(fresh=False), *beat]

    # --- The end ------------------------------------------------------------------------------------------------------

    def _on_closed(self, _: Closed) -> list[Command]:
        """Envoy is done with the request. Before its own end: the caller left, or the provider's connection broke."""
        commands: list[Command] = []
        match self._state:
            case State.IDENTIFYING | State.BODY | State.COUNTING:
                commands = self._write(Outcome.CLIENT_GONE, CLIENT_GONE_STATUS)
            case State.HOLDING:
                commands = self._write(Outcome.CLIENT_GONE, CLIENT_GONE_STATUS)
                self._state = State.ABANDONED
            case State.SENT:
                self._status = CLIENT_GONE_STATUS
                usage = self._counted_usage(self._unseen_tokens())
                commands = self._finish(Outcome.CLIENT_GONE, usage, UsageSource.COUNTED)
            case State.ANSWERING:
                commands = self._finish_answer(Outcome.CLIENT_GONE, self._unseen_tokens())
            case State.STREAMING | State.WAITING:
                commands = self._finish_stream(Outcome.OK if self._has_everything() else Outcome.CLIENT_GONE)
            case State.CUTTING:
                commands = self._finish_stream(self._cut_outcome())
            case State.FAILING:
                commands = self._finish_failure()
        return commands

    def _has_everything(self) -> bool:
        """Clients hang up at the closing event, before the provider's connection has ended."""
        meter = self._meter
        return self._state is State.STREAMING and (meter.closed or (meter.complete and meter.usage is not None))

    def _finish_stream(self, outcome: Outcome) -> list[Command]:
        meter = self._meter
        # What came too late to be passed on is billed all the same.
        with suppress(StreamTooLarge):
            meter.feed(b"".join(event.body for event in self._queue if isinstance(event, ResponseBody)))
        meter.finish()
        if meter.errored and outcome is not Outcome.CUT:
            outcome = Outcome.UPSTREAM_ERROR  # whatever came after it
        usage, source = final_usage(
            meter.usage,
            complete=meter.complete,
            prompt_tokens=self._allowance.prompt_tokens,
            completion_tokens=self._tokens_so_far(),
        )
        commands = self._finish(outcome, usage, source, meter.service_tier)
        # Who may have thought unseen teaches nothing, whether or not it says what it thought.
        teaches = self._admitted.call.teaches and not self._candidate.thinks
        if teaches and (lesson := meter.learnable()) is not None:
            commands.append(Learn(self._candidate.target, *lesson))
        return commands

    def _finish(
        self, outcome: Outcome, usage: Usage, source: UsageSource, service_tier: str | None = None
    ) -> list[Command]:
        price = self._price(service_tier)
        billed = usage.prompt or usage.completion
        savings_nanousd = price.cache_savings(usage)
        searches = usage.web_searches
        if searches is None:  # a search that was asked for; in another dialect none was, since none is translated
            searches = self._candidate.call.web_searches
        cost_nanousd = price.cost(usage, searches) if billed else 0
        actual = Amount(cost_nanousd, usage.prompt + usage.completion)
        record = self._record(
            outcome, self._status, usage, source, cost_nanousd=cost_nanousd, savings_nanousd=savings_nanousd
        )
        self._state = State.DONE
        return [Settle(Settlement(self._request_id, self._hold.windows, actual), record)]

    def _price(self, service_tier: str | None) -> Price:
        """The price in the tier that the answer names, or, where that is not known, the one that was held for."""
        candidate = self._candidate
        if service_tier is None or not self._admitted.call.billed:
            return candidate.price
        try:
            return self._gate.prices.price(candidate.target, service_tier)
        except BadRequest:
            return candidate.price

    def _refuse(self, error: TollgateError) -> list[Command]:
        if isinstance(error, BudgetExhausted):
            self._blame = error
        return [self._reply(error), *self._write(Outcome.REFUSED, error.status)]

    def _reply(self, error: TollgateError) -> Reply:
        return Reply(error.status, self._error_headers(error), self._dialect.render_error(error), error.code)

    def _release(self) -> list[Command]:
        """Give a hold back whole: nothing of the request was sent."""
        return [Settle(Settlement(self._request_id, self._hold.windows, NOTHING))]

    def _health(self) -> list[Command]:
        self._state = State.DONE
        lacking = self._gate.unready()
        status = 200 if lacking is None else 503
        return [Reply(status, (_JSON,), orjson.dumps({"ready": lacking is None, "lacking": lacking}), "health")]

    # --- Figures ------------------------------------------------------------------------------------------------------

    def _mark_first(self) -> None:
        self._first_ns = self._first_ns or self._gate.clock.now_ns()

    def _counter(self) -> Callable[[str], int]:
        return self._gate.counter(self._candidate.traits.encoding)

    def _counted_usage(self, completion: int) -> Usage:
        return Usage(self._allowance.prompt_tokens, completion)

    def _tokens_so_far(self) -> int:
        """Output tokens by the best knowledge there is before the provider's own figure."""
        if self._state in (State.SENT, State.ANSWERING, State.FAILING):
            return self._unseen_tokens()
        thought = min(self._meter.seen + self._thought_tokens(), self._allowance.cap)
        return max(thought, self._meter.tokens)

    def _unseen_tokens(self) -> int:
        """What a provider may have written that nobody saw: a whole answer, or the thoughts before a stream."""
        if self._admitted.cuttable:
            return 0
        return self._written_by(self._gate.clock.now_ns())

    def _thought_tokens(self) -> int:
        """What a reasoning model has thought: as it reports, or what it may have before its first visible token."""
        if not self._candidate.thinks:
            return 0
        reported = self._meter.usage.reasoning if self._meter.usage is not None else 0
        return reported or self._written_by(self._first_ns or self._gate.clock.now_ns())

    def _written_by(self, now_ns: int) -> int:
        elapsed_ms = (now_ns - self._sent_ns) // 1_000_000
        return min(
            elapsed_ms * limits.ABANDONED_TOKENS_PER_S * self._admitted.call.choices // 1000, self._allowance.cap
        )

    @property
    def _admitted(self) -> Plan:
        if self._plan is None:
            raise ProtocolViolation("nothing was planned yet")
        return self._plan

    def _own_id(self) -> tuple[str, str]:
        """Set here, since Envoy takes it from the request, where the target has removed it."""
        return "x-request-id", self._request_id

    def _error_headers(self, error: TollgateError) -> Headers:
        pairs = [_JSON, self._own_id()]
        if error.retry_after_s is not None:
            pairs.append(("retry-after", str(error.retry_after_s)))
        if isinstance(error, BudgetExhausted) and not error.may_clear:
            pairs.append(("x-should-retry", "false"))  # OpenAI's clients heed it, and would try again in a second
        if isinstance(error, Unauthenticated):
            pairs.append(("www-authenticate", "Bearer"))
        if isinstance(error, MethodNotAllowed):
            pairs.append(("allow", self._endpoint.method))
        return tuple(pairs)

    # --- The record ---------------------------------------------------------------------------------------------------

    def _write(self, outcome: Outcome, status: int) -> list[Command]:
        self._state = State.DONE
        return [WriteRecord(self._record(outcome, status, Usage(0, 0), UsageSource.COUNTED))]

    def _note(self) -> bytes:
        """The record as it would be if this processor died now; the ledger adds what its last checkpoint says."""
        usage = self._counted_usage(0)
        return orjson.dumps(self._record(Outcome.UPSTREAM_ERROR, 0, usage, UsageSource.COUNTED))

    def _record(
        self,
        outcome: Outcome,
        status: int,
        usage: Usage,
        source: UsageSource,
        *,
        cost_nanousd: int = 0,
        savings_nanousd: int = 0,
    ) -> UsageRecord:
        plan, principal, clock = self._plan, self._principal, self._gate.clock
        candidate = self._candidate if plan else None
        now_ns = clock.now_ns()
        duration_ms = (now_ns - self._begun_ns) // 1_000_000
        blamed = self._blame.budget_id if isinstance(self._blame, BudgetExhausted) else None
        return UsageRecord(
            request_id=self._request_id,
            ts=clock.date(duration_ms),
            service=principal.service,
            user=principal.user,
            team=principal.team,
            requested_model=plan.call.model if plan else None,
            provider=candidate.target.provider if candidate else None,
            model=candidate.target.model if candidate else None,
            route=plan.route.name if plan else None,
            attempts=self._attempts,
            stream=plan.call.stream if plan else False,
            status=status,
            outcome=outcome,
            prompt_tokens=usage.prompt,
            cached_prompt_tokens=usage.cached_prompt,
            completion_tokens=usage.completion,
            reasoning_tokens=usage.reasoning,
            usage_source=source,
            cost_nanousd=cost_nanousd,
            price_version=candidate.price.version if candidate else None,
            ttft_ms=(self._first_ns - self._begun_ns) // 1_000_000 if self._first_ns else None,
            duration_ms=duration_ms,
            overhead_us=(self._overhead_ns + (now_ns - self._asked_ns if self._asked_ns else 0)) // 1000,
            budget_id=blamed or (plan.budgets[0].id if plan and plan.budgets else None),
            cache_savings_nanousd=savings_nanousd,
        )


_UNCHANGED = ForwardChunk()


def _repeats(pairs: Headers, name: str) -> bool:
    return sum(key == name for key, _ in pairs) > 1


def _cut_error(lease: Lease | None) -> TollgateError:
    if lease is None:
        return Unavailable("The budget could not be extended in time, and what was held is used up.")
    if lease.gone or lease.limited_by is None:
        return Unavailable("The budget's hold is gone.")
    return budget.cut(lease.limited_by)


def _ignore(_: Exchange, __: Any) -> list[Command]:
    return []


Step = Callable[[Exchange, Any], list[Command]]

# The whole protocol. `Closed` may come at any time.
TRANSITIONS: dict[tuple[State, type[Event]], Step] = {
    (State.START, RequestHeaders): Exchange._on_request_headers,
    (State.IDENTIFYING, KeysRefreshed): Exchange._on_keys_refreshed,
    (State.IDENTIFYING, TimerFired): Exchange._on_admission_timeout,
    (State.BODY, RequestBody): Exchange._on_request_body,
    (State.START, ResponseHeaders): Exchange._on_unseen_refusal,
    (State.BODY, ResponseHeaders): Exchange._on_body_refusal,
    (State.PASSING, ResponseBody): Exchange._pass_chunk,
    (State.BODY, TimerFired): _ignore,
    (State.COUNTING, PromptCounted): Exchange._on_prompt_counted,
    (State.COUNTING, TimerFired): Exchange._on_admission_timeout,
    (State.HOLDING, HoldAnswered): Exchange._on_hold_answered,
    (State.HOLDING, TimerFired): Exchange._on_admission_timeout,
    (State.ABANDONED, HoldAnswered): Exchange._on_abandoned_hold,
    (State.ABANDONED, TimerFired): _ignore,
    (State.SENT, ResponseHeaders): Exchange._on_response_headers,
    (State.STREAMING, ResponseBody): Exchange._on_chunk,
    (State.WAITING, ResponseBody): Exchange._on_queued,
    (State.WAITING, ResponseTrailers): Exchange._on_queued,
    (State.ANSWERING, ResponseBody): Exchange._on_answer_chunk,
    (State.FAILING, ResponseBody): Exchange._on_error_chunk,
    (State.WAITING, LeaseAnswered): Exchange._on_awaited_lease,
    (State.CUTTING, ResponseBody): Exchange._on_queued,
    (State.CUTTING, ResponseTrailers): _ignore,
    (State.CUTTING, TimerFired): Exchange._on_flushed,
    (State.CUTTING, LeaseAnswered): _ignore,
    # What comes after the end: late answers, and Envoy's messages that crossed a reset.
    (State.DONE, ResponseBody): _ignore,
    (State.DONE, ResponseTrailers): _ignore,
    (State.DONE, KeysRefreshed): _ignore,
    (State.DONE, PromptCounted): _ignore,
    (State.DONE, LeaseAnswered): _ignore,
    (State.DONE, TimerFired): _ignore,
    (State.STREAMING, ResponseTrailers): Exchange._on_trailers,
    **{(state, ResponseTrailers): Exchange._on_trailers for state in (State.ANSWERING, State.FAILING)},
    **{(state, LeaseAnswered): Exchange._on_lease_answered for state in (State.SENT, State.STREAMING)},
    **{(state, LeaseAnswered): Exchange._on_lease_answered for state in (State.ANSWERING, State.FAILING)},
    **{(state, TimerFired): Exchange._on_heartbeat for state in (State.SENT, State.STREAMING, State.WAITING)},
    **{(state, TimerFired): Exchange._on_heartbeat for state in (State.ANSWERING, State.FAILING)},
    **{(state, Closed): Exchange._on_closed for state in State},
}
