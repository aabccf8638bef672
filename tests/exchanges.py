"""An exchange under test: real prices, policy, dialect and token counter around it, its callers and clock made up."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

import orjson

from extproc import tokens
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
    LeaseAnswered,
    PlaceHold,
    PromptCounted,
    RefreshKeys,
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
from extproc.exchange import Exchange, State
from extproc.gate import Clock, Gate
from extproc.identity import Identity, UnknownKey
from extproc.pricing import PriceBook
from extproc.records import (
    Amount,
    Budget,
    BudgetRule,
    BudgetWindow,
    Hold,
    HoldRefusal,
    IdentityRules,
    Lease,
    ModelRule,
    Policy,
    PriceRule,
    Principal,
    Scope,
    Settlement,
    Target,
    Unit,
    UsageRecord,
    Window,
)
from extproc.redaction import Redactor

C = TypeVar("C", bound=Command)

REQUEST_ID = "6f1c2e"
SECRET = "sk-canary-0123456789"
CALLER = Principal("ranker@test.iam.gserviceaccount.com", "ranker@test.iam.gserviceaccount.com", "search", None)
TOKEN = "Bearer a.b.c"

INPUT_NANOUSD, OUTPUT_NANOUSD = 1_000, 2_000  # a token
DEAR = 5  # how much dearer Anthropic's are
LEASE = 10
HEARTBEAT_MS = 20_000
FIRST_BYTE_MS = 30_000
ADMISSION_MS = 3_000
START_NS = 5_000_000_000
START_MS = 1_795_435_200_000  # 2026-11-23T12:00:00Z
BUDGET_ID = f"service/{CALLER.service}/day/usd"

MESSAGES = [{"role": "user", "content": "hi"}]
PROMPT = 9  # two words of one token each, four around a message and three before the answer

SSE = (("content-type", "text/event-stream; charset=utf-8"),)
JSON = (("content-type", "application/json"),)
DONE = b"data: [DONE]\n\n"


class Callers:
    """Knows one token. `unknown_keys` is how many times its key is not known yet."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.unknown_keys = 0
        self.asked: list[tuple[tuple[str, ...], str | None]] = []

    def principal(self, authorization: tuple[str, ...], user: str | None) -> Principal:
        self.asked.append((authorization, user))
        if self.error is not None:
            raise self.error
        if self.unknown_keys:
            self.unknown_keys -= 1
            raise UnknownKey("https://issuer.test", "k1")
        return CALLER


def gate(callers: Callers, clock: Clock, **changed: Any) -> Gate:
    """One service's budget of a day, any model at OpenAI; a token costs 1,000 nano-USD in and 2,000 out."""
    rules = (
        PriceRule("openai/gpt-4o", INPUT_NANOUSD * 10**6, OUTPUT_NANOUSD * 10**6),
        PriceRule("openai/o3", INPUT_NANOUSD * 10**6, OUTPUT_NANOUSD * 10**6),
        PriceRule("anthropic/*", DEAR * INPUT_NANOUSD * 10**6, DEAR * OUTPUT_NANOUSD * 10**6),
        PriceRule("three-*", INPUT_NANOUSD * 10**6, OUTPUT_NANOUSD * 10**6),
    )
    policy = Policy(
        version="v",
        identity=IdentityRules(("https://tollgate.test",), ("https://issuer.test",), ("*",)),
        models=(
            ModelRule("gpt-4o", (Target("openai", "gpt-4o"),), max_output_tokens=1_000),
            ModelRule("o3", (Target("openai", "o3"),), max_output_tokens=500),
            ModelRule("real-*", (Target("openai", "gpt-4.1"),)),
            ModelRule("elsewhere", (Target("anthropic", "claude-sonnet-4-5"),)),
            ModelRule("priceless", (Target("openai", "no-such-model"),)),
            ModelRule("both", (Target("openai", "gpt-4o"), Target("anthropic", "claude-haiku-4-5")), 1_000),
            ModelRule(
                "three",
                tuple(Target(name, f"three-{name}") for name in ("openai", "anthropic", "gemini")),
                max_output_tokens=1_000,
                reasoning=False,
            ),
            ModelRule(
                "lenient", (Target("anthropic", "claude-haiku-4-5"),), max_output_tokens=1_000, drop_unsupported=True
            ),
        ),
        prices=rules,
        budgets=(BudgetRule(Scope.SERVICE, "*", Window.DAY, Unit.NANOUSD, 5 * 10**9),),
    )
    plain = Gate(
        policy=policy,
        identity=cast(Identity, callers),
        prices=PriceBook(rules, lambda: datetime(2026, 11, 23, 12, tzinfo=UTC)),
        providers=lambda: frozenset({"openai"}),
        counter=tokens.counter,
        factor=lambda _: 1.0,
        redact=Redactor(lambda: (SECRET,)).redact,
        unready=lambda: None,
        clock=clock,
        lease_tokens=LEASE,
        heartbeat_ms=HEARTBEAT_MS,
        first_byte_timeout_ms=FIRST_BYTE_MS,
        admission_timeout_ms=ADMISSION_MS,
    )
    return replace(plain, **changed)


_ANSWER_TO: dict[type[Event], type[Command]] = {
    RequestHeaders: ContinueRequest,
    RequestBody: ForwardRequest,
    ResponseHeaders: ContinueResponse,
    ResponseBody: ForwardChunk,
    ResponseTrailers: DropTrailers,
}


class Talk:
    """One exchange and everything it was told and said. Every command is checked against what may come at all."""

    def __init__(self, **changed: Any) -> None:
        self.callers = Callers()
        self.now_ns = START_NS
        self.wall_ms = START_MS
        self.gate = gate(self.callers, Clock(lambda: self.now_ns, lambda: self.wall_ms), **changed)
        self.exchange = Exchange(self.gate)
        self.commands: list[Command] = []
        self.unanswered: deque[type[Event]] = deque()
        self.held = Amount(0, 0)
        self.windows: tuple[BudgetWindow, ...] = ()

    # --- Feeding ------------------------------------------------------------------------------------------------------

    def feed(self, event: Event) -> list[Command]:
        """What the exchange says to it. Asserts what holds for any exchange at any time."""
        if isinstance(event, ASKS):
            self.unanswered.append(type(event))
        commands = self.exchange.handle(event)
        for command in commands:
            self._check(command)
            self.commands.append(command)
        return commands

    def _check(self, command: Command) -> None:
        if isinstance(command, ANSWERS):
            assert not self.all(Reply), "something was said to Envoy after the reply"
            if isinstance(command, Reply):
                self.unanswered.clear()
            else:
                asked = self.unanswered.popleft()
                assert _ANSWER_TO[asked] is type(command), f"{command} answers {asked}"
        if isinstance(command, WriteRecord | Settle):
            assert not self.all(type(command)), f"a second {type(command).__name__}"
        if isinstance(command, WriteRecord) or (isinstance(command, Settle) and command.record):
            assert not self.records, "a second record"
        if isinstance(command, PlaceHold | ExtendLease | SetTimer | CountPrompt | RefreshKeys):
            assert not self.records, f"{command} after the record"

    def tick(self, ms: int) -> None:
        self.now_ns += ms * 1_000_000
        self.wall_ms += ms

    # --- What was said ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        return self.exchange.state

    def all(self, kind: type[C]) -> list[C]:
        return [command for command in self.commands if isinstance(command, kind)]

    def one(self, kind: type[C]) -> C:
        found = self.all(kind)
        assert len(found) == 1, found
        return found[0]

    @property
    def records(self) -> list[UsageRecord]:
        """The rows: of a request that was settled, and of one that was not."""
        settled = [command.record for command in self.all(Settle) if command.record is not None]
        return settled + [command.record for command in self.all(WriteRecord)]

    @property
    def record(self) -> UsageRecord:
        (record,) = self.records
        return record

    @property
    def settlement(self) -> Settlement:
        return self.one(Settle).settlement

    @property
    def error(self) -> dict[str, Any]:
        """The error that the caller was told in the reply."""
        error: dict[str, Any] = orjson.loads(self.one(Reply).body)["error"]
        return error

    # --- Whole phases -------------------------------------------------------------------------------------------------

    def ask(self, *extra: tuple[str, str], end: bool = False, **changed: str) -> list[Command]:
        return self.feed(RequestHeaders(request_headers(*extra, **changed), end))

    def post(self, **fields: Any) -> list[Command]:
        """The request up to its body."""
        self.ask()
        return self.feed(RequestBody(body(**fields), True))

    def hold(self, tokens: int) -> list[Command]:
        """The ledger's grant: the prompt, and so many output tokens."""
        ask = self.one(PlaceHold).ask
        self.windows = tuple(BudgetWindow(budget, 0, 86_400_000) for budget in ask.budgets)
        self.held = cost(tokens)
        return self.feed(HoldAnswered(Hold(REQUEST_ID, self.windows, self.held)))

    def lease(self, tokens: int, limited: bool = False) -> list[Command]:
        """The ledger's answer to an extension: so many output tokens in all."""
        self.held = cost(tokens)
        limit = refusal(self.windows[0].budget) if limited else None
        return self.feed(LeaseAnswered(Lease(self.held, limited_by=limit)))

    def sent(self, tokens: int = 2 * LEASE, **fields: Any) -> Talk:
        """Up to the provider."""
        self.post(**fields)
        self.hold(tokens)
        return self

    def answered(self, status: int = 200, headers: Headers = JSON, end: bool = False) -> list[Command]:
        return self.feed(ResponseHeaders(response_headers(status, *headers), end))

    def streaming(self, tokens: int = 2 * LEASE, **fields: Any) -> Talk:
        """Up to a stream's headers."""
        self.sent(tokens, stream=True, **fields)
        self.answered(headers=SSE)
        return self

    def chunk(self, data: bytes, end: bool = False) -> list[Command]:
        return self.feed(ResponseBody(data, end))

    def close(self) -> list[Command]:
        return self.feed(Closed())


def request_headers(*extra: tuple[str, str], **changed: str) -> Headers:
    """A call's headers; `changed` replaces them by name with `_` for `-`, and removes where empty."""
    fields = {
        ":method": "POST",
        ":path": "/v1/chat/completions",
        "x-request-id": REQUEST_ID,
        "authorization": TOKEN,
        "content-type": "application/json",
    }
    fields.update({name.replace("_", "-"): value for name, value in changed.items() if name not in ("method", "path")})
    fields.update({f":{name}": changed[name] for name in ("method", "path") if name in changed})
    return (*((name, value) for name, value in fields.items() if value), *extra)


def response_headers(status: int, *headers: tuple[str, str]) -> Headers:
    return ((":status", str(status)), ("x-envoy-attempt-count", "2"), *headers)


def body(**fields: Any) -> bytes:
    return orjson.dumps({"model": "gpt-4o", "messages": MESSAGES, **fields})


def cost(tokens: int, prompt: int = PROMPT) -> Amount:
    """What so many output tokens cost with the prompt."""
    return Amount(prompt * INPUT_NANOUSD + tokens * OUTPUT_NANOUSD, prompt + tokens)


def refusal(budget: Budget, posted: int = 4_000_000_000) -> HoldRefusal:
    return HoldRefusal(budget, posted, 900_000_000, START_MS + 3_600_000, START_MS)


def event(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps(fields) + b"\n\n"


def delta(text: str = "", index: int = 0, finish: str | None = None, **more: Any) -> bytes:
    """One event of a stream. Words with a space in front are one token each."""
    return event(choices=[{"index": index, "delta": {"content": text}, "finish_reason": finish}], **more)


def figures(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def usage(prompt: int, completion: int) -> bytes:
    return event(choices=[], usage=figures(prompt, completion))


def words(count: int) -> list[bytes]:
    """So many events of one token each."""
    return [delta(" word") for _ in range(count)]


def answer(text: str = "Hello there", **more: Any) -> bytes:
    return orjson.dumps({"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}], **more})


def forwarded(commands: Iterable[Command], chunks: Iterable[bytes]) -> bytes:
    """What the caller received: `chunks` are what was answered, in order."""
    originals = iter(chunks)
    parts = []
    for command in commands:
        if isinstance(command, ForwardChunk):
            original = next(originals)
            parts.append(original if command.body is None else command.body)
    return b"".join(parts)


def at(state: State) -> Talk:
    """An exchange in that state."""
    talk = Talk()
    _TO[state](talk)
    assert talk.state is state
    return talk


def _identifying(talk: Talk) -> None:
    talk.callers.unknown_keys = 1
    talk.ask()


def _counting(talk: Talk) -> None:
    talk.ask()
    talk.feed(RequestBody(body(messages=[{"role": "user", "content": "word " * 2_000}]), True))


def _abandoned(talk: Talk) -> None:
    talk.post()
    talk.close()


def _waiting(talk: Talk) -> None:
    talk.streaming(1)
    talk.chunk(delta(" one two"))


def _cutting(talk: Talk) -> None:
    _waiting(talk)
    talk.lease(1, limited=True)


def _answering(talk: Talk) -> None:
    talk.sent()
    talk.answered()


def _failing(talk: Talk) -> None:
    talk.sent()
    talk.answered(429)


def _passing(talk: Talk) -> None:
    talk.feed(ResponseHeaders(response_headers(400), False))


def _done(talk: Talk) -> None:
    talk.ask(path="/")


_TO: dict[State, Callable[[Talk], object]] = {
    State.START: lambda talk: None,
    State.IDENTIFYING: _identifying,
    State.BODY: Talk.ask,
    State.COUNTING: _counting,
    State.HOLDING: Talk.post,
    State.ABANDONED: _abandoned,
    State.SENT: Talk.sent,
    State.STREAMING: Talk.streaming,
    State.WAITING: _waiting,
    State.ANSWERING: _answering,
    State.FAILING: _failing,
    State.CUTTING: _cutting,
    State.PASSING: _passing,
    State.DONE: _done,
}

SAMPLES: dict[str, Event] = {
    "RequestHeaders": RequestHeaders(request_headers(), False),
    "RequestBody": RequestBody(body(), True),
    "ResponseHeaders": ResponseHeaders(response_headers(200, *SSE), False),
    "ResponseBody": ResponseBody(b"data: 1\n\n", False),
    "ResponseTrailers": ResponseTrailers(("grpc-status",)),
    "KeysRefreshed": KeysRefreshed(),
    "PromptCounted": PromptCounted(7),
    "HoldAnswered": HoldAnswered(None),
    "LeaseAnswered": LeaseAnswered(None),
    "TimerFired": TimerFired(),
    "Closed": Closed(),
}
