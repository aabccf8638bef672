"""One stream's shell: messages in, commands carried out, and nothing lost however it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from extproc import envoy
from extproc.errors import LedgerUnavailable, ProtocolViolation
from extproc.events import (
    Closed,
    Command,
    ContinueRequest,
    CountPrompt,
    Event,
    ExtendLease,
    ForwardChunk,
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
    SetTimer,
    Settle,
    TimerFired,
    WriteRecord,
)
from extproc.exchange import Exchange
from extproc.gate import Clock
from extproc.pb import ext_proc_pb2 as pb
from extproc.records import NOTHING, Amount, Hold, HoldAsk, HoldRefusal, Lease, Outcome, Settlement, Target
from extproc.session import Services, Session
from tests.exchanges import Callers, Talk, body, cost, gate, request_headers

ASK = HoldAsk("id", (), NOTHING, NOTHING)
CHUNK = pb.ProcessingRequest(response_body=pb.HttpBody(body=b"x")).SerializeToString()


def a_record() -> WriteRecord:
    talk = Talk()
    talk.ask(path="/")
    return talk.one(WriteRecord)


RECORD = a_record()
SETTLE = Settle(Settlement("id", (), NOTHING), RECORD.record)


class Machine:
    """Answers each event by its type with what the test has laid out."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.answers: dict[type[Event], list[Command] | Exception] = {}
        self.done = False

    def handle(self, event: Event) -> list[Command]:
        self.events.append(event)
        answer = self.answers.get(type(event), [])
        if isinstance(answer, Exception):
            raise answer
        return answer


class Ledger:
    """Answers when told to."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def hold(self, ask: HoldAsk) -> asyncio.Future[Hold | HoldRefusal]:
        self.asked.append(ask)
        return self.future

    def extend(self, *asked: Any) -> asyncio.Future[Lease]:
        self.asked.append(asked)
        return self.future


class Shell:
    """A session and all that it touches, in the order in which it does."""

    def __init__(self, machine: Any = None) -> None:
        self.machine: Any = machine or Machine()
        self.ledger = Ledger()
        self.did: list[Any] = []
        self.refuse: set[str] = set()
        services = Services(
            ledger=self.ledger,
            settle=lambda *settled: self.note("settle", settled),
            learn=lambda *lesson: self.note("learn", lesson),
            write=lambda record: self.note("write", record),
            refresh_keys=lambda issuer: self.ask("keys", issuer),
            refresh_secret=lambda provider: self.note("secret", provider),
            count=lambda *texts: self.ask("count", texts),
        )
        self.session = Session(self.machine, services, lambda data: self.note("send", data), self.end)

    def note(self, what: str, value: Any) -> None:
        if what in self.refuse:
            raise OSError(f"{what} does not work")
        self.did.append((what, value))

    def ask(self, what: str, value: Any) -> asyncio.Future[Any]:
        self.note(what, value)
        return self.ledger.future

    def end(self, reason: str | None) -> None:
        self.did.append(("end", reason))

    def feed(self, *commands: Command) -> None:
        self.machine.answers[ResponseBody] = list(commands)
        self.session.feed(CHUNK)

    @property
    def ends(self) -> list[str | None]:
        return [value for what, value in self.did if what == "end"]

    @property
    def kinds(self) -> list[str]:
        return [what for what, _ in self.did]


@pytest.fixture
async def shell() -> Shell:
    return Shell()


async def turns() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


# Messages and commands ------------------------------------------------------------------------------------------------


async def test_messages_become_events_and_commands_messages(shell: Shell) -> None:
    shell.feed(ForwardChunk(b"y"))
    assert shell.machine.events == [ResponseBody(b"x", False)]
    assert shell.did == [("send", envoy.encode(ForwardChunk(b"y")))]


async def test_commands_are_carried_out_in_their_order(shell: Shell) -> None:
    lesson = Learn(Target("openai", "gpt-4o"), 40, 44)
    shell.feed(ForwardChunk(), SETTLE, RECORD, lesson)
    assert shell.kinds == ["send", "settle", "write", "learn"]
    assert shell.did[1:] == [
        ("settle", (SETTLE.settlement, SETTLE.record)),
        ("write", RECORD.record),
        ("learn", (lesson.target, 40, 44)),
    ]


async def test_a_refused_key_is_said_with_its_provider(shell: Shell) -> None:
    shell.feed(Reply(502), RefreshSecret("openai"))
    assert shell.did[-1] == ("secret", "openai")


async def test_a_reply_is_the_last_message_and_ends_the_stream_well(shell: Shell) -> None:
    shell.feed(Reply(429), SETTLE)
    assert shell.kinds == ["send", "end", "settle"]
    assert shell.ends == [None]


async def test_whether_a_close_is_well_timed_is_the_machines_word(shell: Shell) -> None:
    assert not shell.session.done
    shell.machine.done = True
    assert shell.session.done


# Ends -----------------------------------------------------------------------------------------------------------------


async def test_a_close_is_an_event_once_and_nothing_is_sent_any_more(shell: Shell) -> None:
    shell.machine.answers[Closed] = [ForwardChunk(), Reply(500), SETTLE, RECORD]
    shell.session.close()
    shell.session.close()
    shell.session.feed(CHUNK)
    assert shell.machine.events == [Closed()]
    assert shell.kinds == ["settle", "write"]


@pytest.mark.parametrize("data", [b"\xff", b"", b"\x32\x00"], ids=["garbage", "nothing", "request trailers"])
async def test_a_message_that_was_not_asked_for_ends_the_stream_with_an_error(shell: Shell, data: bytes) -> None:
    shell.machine.answers[Closed] = [SETTLE]
    shell.session.feed(data)
    assert shell.machine.events == [Closed()]
    assert shell.kinds == ["end", "settle"]
    assert shell.ends[0]


@pytest.mark.parametrize("error", [ProtocolViolation("order"), RuntimeError("a secret")], ids=["order", "a bug"])
async def test_a_machine_that_raises_ends_the_stream_with_an_error(shell: Shell, error: Exception) -> None:
    shell.machine.answers = {ResponseBody: error, Closed: [SETTLE]}
    shell.session.feed(CHUNK)
    assert shell.ends == ["order" if isinstance(error, ProtocolViolation) else "internal error"]
    assert shell.kinds == ["end", "settle"]


@pytest.mark.parametrize("error", [ProtocolViolation("order"), RuntimeError("a bug")], ids=["order", "a bug"])
async def test_a_machine_that_raises_at_the_close_is_logged(
    shell: Shell, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    shell.machine.answers[Closed] = error
    shell.session.close()
    assert shell.did == []
    assert "after its close" in caplog.text


@pytest.mark.parametrize("broken", ["send", "write", "settle"])
async def test_a_command_that_cannot_be_carried_out_stops_no_other(shell: Shell, broken: str) -> None:
    shell.refuse = {broken}
    shell.feed(ForwardChunk(), SETTLE, RECORD)
    expected = [kind for kind in ("send", "settle", "write") if kind != broken]
    assert [kind for kind in shell.kinds if kind != "end"] == expected
    assert shell.ends == ["internal error"]


async def test_a_message_that_cannot_be_encoded_loses_no_settlement(shell: Shell) -> None:
    shell.feed(ContinueRequest(set_headers=(("x", "команда"),)), SETTLE)
    assert shell.kinds == ["end", "settle"]


# Dependencies ---------------------------------------------------------------------------------------------------------

EXTEND = ExtendLease("id", (), Amount(1, 2), Amount(3, 4))
ASKED: dict[str, tuple[Command, Any, Callable[[Any], Event]]] = {
    "a hold": (PlaceHold(ASK), Hold("id", (), NOTHING), HoldAnswered),
    "a lease": (EXTEND, Lease(NOTHING), LeaseAnswered),
    "keys": (RefreshKeys("https://i"), None, lambda _: KeysRefreshed()),
    "a count": (CountPrompt(("a",), "o200k_base"), 7, PromptCounted),
}


@pytest.mark.parametrize(("command", "result", "event"), ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed meanwhile"])
async def test_an_answer_is_an_event_also_after_the_close(
    shell: Shell, command: Command, result: Any, event: Callable[[Any], Event], closed: bool
) -> None:
    shell.feed(command)
    if closed:
        shell.session.close()
    answered = event(result)
    shell.machine.answers[type(answered)] = [ForwardChunk(), SETTLE]
    shell.ledger.future.set_result(result)
    await turns()
    assert shell.machine.events[-1] == answered
    assert ("send" in shell.kinds) == (not closed)
    assert shell.kinds[-1] == "settle"


async def test_what_is_asked_is_what_the_command_says(shell: Shell) -> None:
    shell.feed(PlaceHold(ASK), EXTEND, RefreshKeys("https://i"), CountPrompt(("a", "b"), "o200k_base"))
    assert shell.ledger.asked == [ASK, ("id", (), Amount(1, 2), Amount(3, 4))]
    assert shell.did == [("keys", "https://i"), ("count", (("a", "b"), "o200k_base"))]


@pytest.mark.parametrize(
    ("command", "event"), [(PlaceHold(ASK), HoldAnswered(None)), (EXTEND, LeaseAnswered(None))], ids=["hold", "lease"]
)
async def test_no_answer_of_the_ledger_is_an_answer_too(shell: Shell, command: Command, event: Event) -> None:
    shell.feed(command)
    shell.ledger.future.set_exception(LedgerUnavailable("down"))
    await turns()
    assert shell.machine.events[-1] == event
    assert shell.ends == []


@pytest.mark.parametrize("closed", [False, True], ids=["open", "closed meanwhile"])
async def test_a_dependency_that_breaks_ends_the_stream_with_an_error(shell: Shell, closed: bool) -> None:
    shell.feed(CountPrompt(("a",), "o200k_base"))
    if closed:
        shell.session.close()
    shell.ledger.future.set_exception(RuntimeError("broken"))
    await turns()
    assert shell.ends == ([] if closed else ["a dependency failed"])
    assert shell.machine.events[-1] == Closed()


async def test_a_cancelled_dependency_says_nothing(shell: Shell, caplog: pytest.LogCaptureFixture) -> None:
    shell.feed(PlaceHold(ASK))
    shell.ledger.future.cancel()
    await turns()
    assert caplog.text == ""
    assert shell.machine.events == [ResponseBody(b"x", False)]


# The timer ------------------------------------------------------------------------------------------------------------


async def fired(shell: Shell) -> int:
    """How often the timer fires within a few turns of the loop: those of the tests are due at once."""
    await asyncio.sleep(0.01)
    events: list[Event] = shell.machine.events
    return events.count(TimerFired())


async def test_the_timer_fires_once(shell: Shell) -> None:
    shell.feed(SetTimer(0))
    assert await fired(shell) == 1


async def test_a_new_timer_replaces_the_old_one(shell: Shell) -> None:
    shell.feed(SetTimer(0), SetTimer(60_000))
    assert await fired(shell) == 0
    shell.session.close()


@pytest.mark.parametrize("end", [SETTLE, RECORD], ids=["settled", "recorded"])
async def test_the_end_of_the_request_stops_the_timer(shell: Shell, end: Command) -> None:
    shell.feed(SetTimer(0), end)
    assert await fired(shell) == 0


async def test_a_close_stops_the_timer(shell: Shell) -> None:
    shell.feed(SetTimer(0))
    shell.machine.answers[Closed] = [SetTimer(0)]
    shell.session.close()
    assert await fired(shell) == 0


async def test_no_timer_is_set_after_the_close(shell: Shell) -> None:
    shell.feed(EXTEND)
    shell.session.close()
    shell.machine.answers[LeaseAnswered] = [SetTimer(0)]
    shell.ledger.future.set_result(Lease(NOTHING))
    assert await fired(shell) == 0


async def test_a_failure_stops_the_timer(shell: Shell) -> None:
    shell.feed(SetTimer(0))
    shell.session.feed(b"\xff")
    assert await fired(shell) == 0


# With the real machine ------------------------------------------------------------------------------------------------


def real() -> Shell:
    return Shell(Exchange(gate(Callers(), Clock(lambda: 1, lambda: 1))))


def send(shell: Shell, event: RequestHeaders | RequestBody) -> None:
    """As Envoy sends it."""
    if isinstance(event, RequestHeaders):
        headers = pb.HeaderMap(headers=[pb.HeaderValue(key=k, raw_value=v.encode("latin-1")) for k, v in event.headers])
        message = pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=headers, end_of_stream=event.end))
    else:
        message = pb.ProcessingRequest(request_body=pb.HttpBody(body=event.body, end_of_stream=event.end))
    shell.session.feed(message.SerializeToString())


@pytest.mark.parametrize("how", ["the caller leaves", "time runs out", "garbage comes"])
async def test_a_hold_that_is_granted_too_late_is_given_back(how: str) -> None:
    shell = real()
    send(shell, RequestHeaders(request_headers(), False))
    send(shell, RequestBody(body(), True))
    match how:
        case "the caller leaves":
            shell.session.close()
        case "time runs out":
            shell.session._handle(TimerFired())
        case _:
            shell.session.feed(b"\xff")
    shell.ledger.future.set_result(Hold("id", (), cost(1_000)))
    await turns()
    assert shell.kinds.count("write") == shell.kinds.count("settle") == 1
    ((settlement, row),) = (value for what, value in shell.did if what == "settle")
    (record,) = (value for what, value in shell.did if what == "write")
    assert (settlement.actual, row) == (NOTHING, None)
    assert record.outcome is (Outcome.REFUSED if how == "time runs out" else Outcome.CLIENT_GONE)


async def test_headers_in_the_wrong_place_end_the_stream_with_an_error() -> None:
    shell = real()
    send(shell, RequestBody(body(), True))
    assert shell.kinds == ["end"]
    assert "RequestBody in START" in (shell.ends[0] or "")
