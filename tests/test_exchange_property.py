"""Random requests: any order that Envoy, the ledger, the clock, the caller and the provider may bring about."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import event as note
from hypothesis import given, settings
from hypothesis import strategies as st

from extproc.dialects.openai_chat import OpenAIChat
from extproc.events import (
    Closed,
    Command,
    ContinueRequest,
    ContinueResponse,
    CountPrompt,
    ExtendLease,
    ForwardChunk,
    ForwardRequest,
    HoldAnswered,
    KeysRefreshed,
    LeaseAnswered,
    PlaceHold,
    PromptCounted,
    RefreshKeys,
    Reply,
    RequestBody,
    ResponseBody,
    ResponseTrailers,
    SetTimer,
    Settle,
    TimerFired,
    WriteRecord,
)
from extproc.exchange import State
from extproc.metering import StreamMeter
from extproc.records import NOTHING, Hold, HoldAsk, Lease, Outcome, UsageSource
from extproc.tokens import counter
from tests.exchanges import (
    DONE,
    JSON,
    PROMPT,
    REQUEST_ID,
    SSE,
    Talk,
    answer,
    body,
    cost,
    delta,
    event,
    figures,
    refusal,
    usage,
)

COUNT = counter("o200k_base")
USUAL = 12  # times as likely as a caller that leaves at this moment
STATES = (State.STREAMING, State.WAITING, State.CUTTING)


@st.composite
def answers(draw: st.DrawFn) -> bytes:
    """What a provider may stream: text, sometimes an error, usage or not, an end or not, whole events or not."""
    events = draw(st.lists(st.sampled_from([delta(" word"), delta(" five words in one event"), b": ping\n\n"])))
    events += draw(st.sampled_from([[], [delta(finish="stop")], [event(error={"message": "overloaded"})]]))
    events += draw(st.sampled_from([[], [usage(PROMPT, 12)], [usage(0, 0)]]))
    events += draw(st.sampled_from([[], [DONE], [DONE.strip()], [b'data: {"choi']]))
    return b"".join(events)


class World:
    """Everything around one exchange, and what of it may happen next."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.talk = Talk()
        self.closed = False
        self.timer = False
        self.asked: dict[type[Command], list[Command]] = {}
        self.granted = False
        self.unanswered_hold = False
        self.phase: Callable[[], None] | None = self.headers
        self.provider = b""
        self.sent = 0
        self.streamed = False
        self.received = b""
        self.originals: list[bytes] = []
        self.most = NOTHING

    def draw(self, *options: object) -> object:
        return self.data.draw(st.sampled_from(options))

    # --- What may happen ----------------------------------------------------------------------------------------------

    def steps(self) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = []
        if not self.closed:
            steps.append(self.close)
            if self.timer:
                steps.append(lambda: self.feed(TimerFired()))
            if self.phase is not None:
                steps += [self.phase] * USUAL
        if self.asked.get(RefreshKeys):
            steps += [lambda: self.answer(RefreshKeys, KeysRefreshed())] * USUAL
        if self.asked.get(CountPrompt):
            steps += [lambda: self.answer(CountPrompt, PromptCounted(2))] * USUAL
        if self.asked.get(PlaceHold):
            steps += [self.answer_hold] * USUAL
        if self.asked.get(ExtendLease):
            steps += [self.answer_lease] * USUAL
        return steps

    def feed(self, what: object) -> None:
        self.talk.tick(7)
        if isinstance(what, ResponseBody):
            self.originals.append(what.body)
        for command in self.talk.feed(what):  # type: ignore[arg-type]
            self.take(command)
        waits = [command for command in (RefreshKeys, CountPrompt, PlaceHold, ExtendLease) if self.asked.get(command)]
        assert all(len(self.asked[kind]) == 1 for kind in waits), "asked twice at once"

    def take(self, command: Command) -> None:
        match command:
            case RefreshKeys() | CountPrompt() | PlaceHold() | ExtendLease():
                self.asked.setdefault(type(command), []).append(command)
            case SetTimer():
                self.timer = True
            case WriteRecord() | Settle():
                self.timer = False  # as the session does
            case Reply():
                self.phase = None
            case ContinueRequest():
                self.phase = self.request_body
            case ForwardRequest():
                self.phase = self.response_headers
            case ContinueResponse():
                self.phase = self.chunk
            case ForwardChunk(data):
                original = self.originals.pop(0)
                self.received += original if data is None else data
                if self.talk.state in STATES or self.streamed:
                    self.check_cover()
            case _:
                pass

    def check_cover(self) -> None:
        """What went on was held for, and is the provider's own bytes up to the gateway's error."""
        own, _, _ = self.received.partition(b'data: {"error":{"message":"')
        meter = StreamMeter(OpenAIChat(), COUNT, 1.0, hide_usage=False)
        meter.feed(own)
        meter.finish()
        assert cost(meter.tokens).tokens <= self.most.tokens
        assert self.provider.startswith(own) or self.provider.replace(usage(PROMPT, 12), b"").replace(
            usage(0, 0), b""
        ).startswith(own)

    # --- Envoy --------------------------------------------------------------------------------------------------------

    def headers(self) -> None:
        self.phase = None
        self.talk.callers.unknown_keys = int(str(self.draw(*[0] * 8, 1, 1, 2)))
        end = self.draw(*[False] * 12, True) is True
        self.feed_all(lambda: self.talk.ask(end=end))

    def feed_all(self, asking: Callable[[], list[Command]]) -> None:
        self.talk.tick(7)
        for command in asking():
            self.take(command)

    def request_body(self) -> None:
        self.phase = None
        text = self.draw(*["hi"] * 8, "word " * 1_000, "word " * 1_000, None)
        fields = {"stream": self.draw(True, True, True, False), "model": self.draw("gpt-4o", "gpt-4o", "o3")}
        data = body(messages=[{"role": "user", "content": text}], **fields) if text else b"{}"
        self.feed(RequestBody(data, True))

    def response_headers(self) -> None:
        self.phase = None
        status = int(str(self.draw(*[200] * 10, 401, 500)))
        self.streamed = self.draw(*[True] * 5, False) is True
        plain = answer(" one two", usage=figures(PROMPT, 3))
        self.provider = self.data.draw(answers()) if self.streamed else plain
        end = self.draw(*[False] * 12, True) is True
        headers = SSE if self.streamed else JSON
        self.streamed = self.streamed and status == 200
        self.feed_all(lambda: self.talk.answered(status, headers, end))
        if end:
            self.phase = None

    def chunk(self) -> None:
        """The next part of the answer, or its end. Envoy does not wait for the answer to one before the next."""
        size = self.data.draw(st.integers(0, 200))
        data = self.provider[self.sent : self.sent + size]
        self.sent += len(data)
        if self.sent < len(self.provider):
            self.feed(ResponseBody(data, False))
            return
        self.phase = None
        if self.draw(True, True, False):
            self.feed(ResponseBody(data, True))
        else:
            self.feed(ResponseBody(data, False))
            if self.talk.all(Reply) == []:
                self.feed(ResponseTrailers(("x",)))

    def close(self) -> None:
        self.closed = True
        self.phase = None
        self.timer = False
        self.feed(Closed())

    # --- The ledger ---------------------------------------------------------------------------------------------------

    def answer(self, kind: type[Command], what: object) -> None:
        self.asked[kind].pop()
        self.feed(what)

    def answer_hold(self) -> None:
        asked = self.asked[PlaceHold][0]
        assert isinstance(asked, PlaceHold)
        ask: HoldAsk = asked.ask
        match self.draw(*["all"] * 8, *["least"] * 4, "refused", "unanswered"):
            case "refused":
                self.answer(PlaceHold, HoldAnswered(refusal(ask.budgets[0])))
            case "unanswered":
                self.unanswered_hold = True
                self.answer(PlaceHold, HoldAnswered(None))
            case how:
                self.granted = True
                self.most = ask.ask if how == "all" else ask.least
                self.answer(PlaceHold, HoldAnswered(Hold(REQUEST_ID, (), self.most)))

    def answer_lease(self) -> None:
        asked = self.asked[ExtendLease][0]
        assert isinstance(asked, ExtendLease)
        budget = self.talk.one(PlaceHold).ask.budgets[0]
        match self.draw("all", "all", "a little", "nothing", "gone", "unanswered"):
            case "gone":
                lease = Lease(NOTHING, gone=True)
            case "unanswered":
                self.answer(ExtendLease, LeaseAnswered(None))
                return
            case "all":
                self.most = asked.target
                lease = Lease(self.most)
            case how:
                held = self.most.tokens - PROMPT + (1 if how == "a little" else 0)
                self.most = max(self.most, cost(held), key=lambda amount: amount.tokens)
                lease = Lease(self.most, limited_by=refusal(budget))
        self.answer(ExtendLease, LeaseAnswered(lease))


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_every_request_ends_once_is_settled_once_and_never_passes_more_than_was_held(data: st.DataObject) -> None:
    """`Talk` asserts the rest: one answer each and in order, nothing to Envoy after a reply, one record, one Settle."""
    world = World(data)
    for _ in range(60):
        steps = world.steps()
        if not steps:
            break
        data.draw(st.sampled_from(steps))()
    if not world.closed:
        world.close()
    while steps := world.steps():
        steps[0]()
    check_end(world)


def check_end(world: World) -> None:
    talk = world.talk
    assert talk.exchange.done or talk.state is State.START
    if talk.state is State.START:
        assert talk.commands == []
        return
    record = talk.record
    note(str(record.outcome))
    assert len(talk.all(Settle)) == (world.granted or world.unanswered_hold)
    if not world.granted:
        assert record.outcome in (Outcome.REFUSED, Outcome.CLIENT_GONE)
        assert all(settle.settlement.actual == NOTHING for settle in talk.all(Settle))
        return
    actual = talk.settlement.actual
    if not talk.all(ForwardRequest):
        assert actual == NOTHING
        return
    assert record.cost_nanousd == actual.nanousd
    assert record.prompt_tokens + record.completion_tokens == actual.tokens
    if record.usage_source is UsageSource.COUNTED and world.streamed and world.received:
        own, _, _ = world.received.partition(b'data: {"error":{"message":"')
        seen = StreamMeter(OpenAIChat(), COUNT, 1.0)
        seen.feed(own)
        assert record.completion_tokens >= seen.tokens
    if record.outcome is Outcome.OK and world.streamed:
        assert b'data: {"error"' not in world.received
