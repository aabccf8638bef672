"""One ext_proc stream: feeds a state machine and carries out its commands. Both transports drive it the same way.

No task and no await: dependencies answer through futures, whose callbacks feed the next event. The transport gives
two callables, `send` (one message to Envoy) and `end` (the stream's last word), and calls `feed` and `close`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from extproc import envoy
from extproc.errors import LedgerUnavailable, ProtocolViolation
from extproc.events import (
    Closed,
    Command,
    CountPrompt,
    Event,
    ExtendLease,
    HoldAnswered,
    KeysRefreshed,
    Learn,
    LeaseAnswered,
    PlaceHold,
    PromptCounted,
    RefreshKeys,
    RefreshSecret,
    Reply,
    SetTimer,
    Settle,
    TimerFired,
    WriteRecord,
)
from extproc.records import Amount, BudgetWindow, Hold, HoldAsk, HoldRefusal, Lease, Settlement, Target, UsageRecord

_log = logging.getLogger(__name__)


class Machine(Protocol):
    """A pure state machine: `exchange.Exchange` or `target.Attempt`."""

    @property
    def done(self) -> bool:
        """Whether the request is over for it: nothing waits for an answer, or may still pass."""

    def handle(self, event: Event) -> list[Command]:
        """Take one event; return what must be done. Raises ProtocolViolation."""


class Ledger(Protocol):
    """What a session asks of `ledger.Ledger`."""

    def hold(self, ask: HoldAsk) -> asyncio.Future[Hold | HoldRefusal]: ...

    def extend(
        self, request_id: str, windows: tuple[BudgetWindow, ...], used: Amount, target: Amount
    ) -> asyncio.Future[Lease]: ...


@dataclass(frozen=True, slots=True)
class Services:
    """Everything that commands need, shared by all sessions. None of these may block the event loop."""

    ledger: Ledger
    settle: Callable[[Settlement, UsageRecord | None], None]
    learn: Callable[[Target, int, int], None]
    write: Callable[[UsageRecord], object]
    refresh_keys: Callable[[str], asyncio.Future[None]]
    refresh_secret: Callable[[str], None]
    count: Callable[[tuple[str, ...], str], asyncio.Future[int | None]]


class Session:
    """One stream's life, from its first message to its close.

    `end(None)` closes the stream well; `end(reason)` with an error, which makes Envoy fail the request: the only
    safe end before everything was answered, since Envoy lets traffic through after a clean one.
    """

    __slots__ = ("_closed", "_end", "_loop", "_machine", "_send", "_services", "_timer")

    def __init__(
        self,
        machine: Machine,
        services: Services,
        send: Callable[[bytes], None],
        end: Callable[[str | None], None],
    ) -> None:
        self._machine = machine
        self._services = services
        self._send = send
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def feed(self, message: bytes) -> None:
        """One ProcessingRequest."""
        if self._closed:
            return
        try:
            event = envoy.decode(message)
        except ProtocolViolation as error:
            self._fail(str(error))
            return
        self._handle(event)

    @property
    def done(self) -> bool:
        """Whether Envoy may close the stream. Before that, a close must not look like consent."""
        return self._machine.done

    def close(self) -> None:
        """Envoy closed or reset the stream. Dependencies may still answer; nothing is sent any more."""
        if not self._closed:
            self._closed = True
            self._handle(Closed())
            self._stop_timer()

    def _handle(self, event: Event) -> None:
        try:
            commands = self._machine.handle(event)
        except ProtocolViolation as error:
            self._fail(str(error))
            return
        except Exception:
            self._break()
            return
        for command in commands:
            try:
                self._carry_out(command)
            except Exception:  # the others are carried out all the same: one of them may be the settlement
                self._break()

    def _break(self) -> None:
        _log.exception("a request could not be processed")
        self._fail("internal error")

    def _fail(self, reason: str) -> None:
        """End with an error, and let the machine account for what was under way."""
        if self._closed:
            _log.error("after its close: %s", reason)
            return
        _log.warning("stream ended with an error: %s", reason)
        self._end(reason)
        self.close()

    def _carry_out(self, command: Command) -> None:
        message = envoy.encode(command)
        if message is None:
            _CARRY_OUT[type(command)](self, command)
        elif not self._closed:
            self._send(message)
            if isinstance(command, Reply):
                self._end(None)

    def _place_hold(self, command: PlaceHold) -> None:
        self._await(self._services.ledger.hold(command.ask), HoldAnswered)

    def _extend_lease(self, command: ExtendLease) -> None:
        lease = self._services.ledger.extend(command.request_id, command.windows, command.used, command.target)
        self._await(lease, LeaseAnswered)

    def _refresh_keys(self, command: RefreshKeys) -> None:
        self._await(self._services.refresh_keys(command.issuer), lambda _: KeysRefreshed())

    def _refresh_secret(self, command: RefreshSecret) -> None:
        self._services.refresh_secret(command.provider)

    def _count_prompt(self, command: CountPrompt) -> None:
        self._await(self._services.count(command.texts, command.encoding), PromptCounted)

    def _await(self, future: asyncio.Future[Any], event: Callable[[Any], Event]) -> None:
        """Feed the answer, or None where the ledger gives none."""

        def answered(done: asyncio.Future[Any]) -> None:
            if done.cancelled():
                return
            error = done.exception()
            if error is None:
                self._handle(event(done.result()))
            elif isinstance(error, LedgerUnavailable):
                self._handle(event(None))
            else:
                _log.error("a dependency failed", exc_info=error)
                self._fail("a dependency failed")

        future.add_done_callback(answered)

    def _set_timer(self, command: SetTimer) -> None:
        self._stop_timer()
        if not self._closed:
            self._timer = self._loop.call_later(command.after_ms / 1000, self._handle, TimerFired())

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _settle(self, command: Settle) -> None:
        self._stop_timer()
        self._services.settle(command.settlement, command.record)

    def _learn(self, command: Learn) -> None:
        self._services.learn(command.target, command.counted, command.billed)

    def _write_record(self, command: WriteRecord) -> None:
        self._stop_timer()
        self._services.write(command.record)


_CARRY_OUT: dict[type[Command], Callable[[Session, Any], None]] = {
    PlaceHold: Session._place_hold,
    ExtendLease: Session._extend_lease,
    RefreshKeys: Session._refresh_keys,
    RefreshSecret: Session._refresh_secret,
    CountPrompt: Session._count_prompt,
    SetTimer: Session._set_timer,
    Settle: Session._settle,
    Learn: Session._learn,
    WriteRecord: Session._write_record,
}
