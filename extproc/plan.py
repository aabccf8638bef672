"""What the gate decides of a request before it holds anything: where it may go, at what price, under which budgets."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import orjson

from extproc import budget
from extproc.dialects import CHAT
from extproc.dialects.dialect import Address, ChatDialect, Dialect
from extproc.dialects.fields import renamed
from extproc.endpoints import Endpoint
from extproc.errors import BadRequest
from extproc.form import MEDIA, Request, features
from extproc.gate import Gate
from extproc.intake import parse_json
from extproc.itinerary import Itinerary, Leg
from extproc.pricing import FREE, Price, dearest
from extproc.providers import PROVIDERS
from extproc.records import Budget, Call, ModelTraits, Principal, Route, Target
from extproc.routing import Way, way
from extproc.translation import chat_of, refusal, within


@dataclass(frozen=True, slots=True)
class Candidate:
    """One target that can take the call. `cap` bounds one choice's output tokens: the least of caller's and model's.

    `thinks`: it may write unseen: thoughts, or, translated for some callers, a tool's call until it is whole.
    `native`: it is asked in the caller's own dialect. `call` is the call as it reads it: what a picture or a tool costs
    is each dialect's and each model's own.
    """

    target: Target
    call: Call
    traits: ModelTraits
    price: Price
    cap: int
    thinks: bool
    native: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """One admitted request: its candidates in the order of attempts. Until one of them answers, the dearest counts.

    `raw` is the body as the caller sent it; `drop` the policy's word on what a target cannot do. `price` is what is
    held for, and `cap` the most output tokens of one choice, whoever answers.
    `cuttable`: the answer can be ended at the limit. A whole one cannot, nor what is billed and cannot be counted:
    thoughts that nobody sees, sound and pictures.
    """

    call: Call
    raw: bytes
    dialect: Dialect
    address: Address
    route: Route
    candidates: tuple[Candidate, ...]
    drop: bool
    budgets: tuple[Budget, ...]
    price: Price
    cap: int
    cuttable: bool

    def sent_cap(self, candidate: Candidate) -> int | None:
        """The cap to tell a provider: what is held for must be enforced; a cuttable stream needs none."""
        return candidate.cap if not self.cuttable or self.call.cap is not None else None

    @property
    def written(self) -> bool:
        """Whether the first candidate's body can be made here, so that it need not come to the target."""
        first = self.candidates[0]
        return first.native and not PROVIDERS[first.target.provider].body_fields

    def body(self) -> bytes:
        """The body that every attempt gets: the first candidate's, or the caller's own."""
        first = self.candidates[0]
        if not self.written:
            return self.raw
        body = self.dialect.upstream_body(self.call, self.raw, first.target.model, self.sent_cap(first))
        return renamed(body, PROVIDERS[first.target.provider].renames)

    def itinerary(self, request_id: str, body_bytes: int) -> Itinerary:
        """What the targets are told."""
        return Itinerary(
            request_id=request_id,
            dialect=self.dialect.name,
            address=self.address,
            stream=self.call.stream,
            legs=tuple(Leg(candidate.target, self.sent_cap(candidate)) for candidate in self.candidates),
            body_bytes=body_bytes,
            written=self.written,
            drop=self.drop,
        )


def make_plan(gate: Gate, endpoint: Endpoint, principal: Principal, raw: bytes, forced_provider: str | None) -> Plan:
    """Parse and decide. Raises BadRequest, naming the field, and what routing and pricing raise."""
    call = endpoint.dialect.read_call(parse_json(raw), endpoint.address)
    found = way(gate.policy, call.model, forced_provider, gate.providers())
    candidates = _candidates(gate, _Asked(endpoint, call, found.drop), found)
    route = found.route
    if len(candidates) < len(route.targets):
        route = replace(route, targets=tuple([candidate.target for candidate in candidates]))
    return Plan(
        call=call,
        raw=raw,
        dialect=endpoint.dialect,
        address=endpoint.address,
        route=route,
        candidates=candidates,
        drop=found.drop,
        budgets=budget.applicable(gate.policy.budgets, principal, call.model),
        price=dearest([candidate.price for candidate in candidates]),
        cap=max([candidate.cap for candidate in candidates]),
        cuttable=call.stream and not call.unseen and not any(candidate.thinks for candidate in candidates),
    )


class _Asked:
    """The call, and its canonical form, which is made where a target needs it."""

    def __init__(self, endpoint: Endpoint, call: Call, drop: bool) -> None:
        self.dialect = endpoint.dialect
        self.call = call
        self.drop = drop
        self.address = endpoint.address

    @cached_property
    def request(self) -> tuple[ChatDialect, Request] | None:
        """None where no other dialect says such a thing: an embedding, a count of tokens."""
        caller = CHAT.get(self.dialect.name)
        return None if caller is None else (caller, caller.read_request(self.call.body, self.address))


def _candidates(gate: Gate, asked: _Asked, found: Way) -> tuple[Candidate, ...]:
    """The targets that can take the call. Raises the first one's refusal where none can."""
    candidates: list[Candidate] = []
    refusals: list[BadRequest] = []
    for target, known in zip(found.route.targets, found.traits, strict=True):
        try:
            candidates.append(_candidate(gate, asked, target, known))
        except BadRequest as error:
            refusals.append(error)
    if not candidates:
        raise refusals[0]
    return tuple(candidates)


def _candidate(gate: Gate, asked: _Asked, target: Target, known: ModelTraits) -> Candidate:
    call = asked.call
    native = asked.dialect.name in PROVIDERS[target.provider].paths
    cap = min(call.cap or known.max_output_tokens, known.max_output_tokens)
    if native:
        thinks = known.reasoning if call.thinks is None else call.thinks
        theirs = _as_named(asked, target)
    else:
        caller, chat, request = _translatable(asked, target)
        thinks = known.reasoning or _writes_unseen(caller, request)
        theirs = _as_translated(asked, chat, request, target, cap)
    return Candidate(
        target=target,
        call=theirs,
        traits=known,
        # A tier is nothing that is translated: another provider is asked for its plain one.
        price=gate.prices.price(target, call.service_tier if native else None) if call.billed else FREE,
        cap=cap,
        thinks=thinks,
        native=native,
    )


def _writes_unseen(caller: ChatDialect, request: Request) -> bool:
    """What a translated call adds to a model's own way. No word of a caller's stops a model that always thinks."""
    thinks = request.reasoning is not None and request.reasoning.effort != "none"
    return thinks or (caller.calls_come_whole and bool(request.tools))


def _as_named(asked: _Asked, target: Target) -> Call:
    """The call with the model's real name, by which some pictures and searches cost more."""
    call, address = asked.call, asked.address
    if target.model == call.model:
        return call
    if address.model is not None:
        return asked.dialect.read_call(call.body, replace(address, model=target.model))
    return asked.dialect.read_call({**call.body, "model": target.model}, address)


def _as_translated(asked: _Asked, chat: ChatDialect, request: Request, target: Target, cap: int) -> Call:
    """The call as the target's dialect has it, where more than texts and turns are in it: those cost the same."""
    if not (request.tools or (request.choices or 1) > 1 or features(request) & MEDIA):
        return replace(asked.call, web_searches=0)
    written = chat.write_request(within(request, chat) if asked.drop else request, target.model, cap)
    return chat.read_call(orjson.loads(written), Address(target.model, asked.call.stream))


def _translatable(asked: _Asked, target: Target) -> tuple[ChatDialect, ChatDialect, Request]:
    """The caller's dialect, the target's, and the canonical form, if they can have it. Raises BadRequest."""
    name = chat_of(PROVIDERS[target.provider])
    if asked.request is None or name is None:
        raise BadRequest(
            "The providers of this model do not offer this API.", code="unsupported_endpoint", param="model"
        )
    caller, request = asked.request
    error = refusal(caller, CHAT[name], request, drop=asked.drop)
    if error is not None:
        raise error
    return caller, CHAT[name], request
