"""Requests whose processor died: one record each, from the note beside the hold and its last checkpoint."""

from __future__ import annotations

from collections.abc import Iterable

import orjson
import pytest

from extproc.errors import LedgerUnavailable
from extproc.events import PlaceHold
from extproc.records import Amount, Orphan, Outcome, UsageRecord, UsageSource
from extproc.sweeping import Sweeper, orphan_record
from tests.exchanges import CALLER, PROMPT, REQUEST_ID, Talk
from tests.rig import eventually


def note() -> bytes:
    """What a real exchange leaves beside its hold."""
    talk = Talk()
    talk.post(stream=True)
    return talk.one(PlaceHold).ask.note


def orphan(request_id: str, text: bytes | None = None) -> Orphan:
    fields = {**orjson.loads(note()), "request_id": request_id}
    return Orphan(request_id, Amount(70_000, PROMPT + 30), orjson.dumps(fields) if text is None else text)


class Ledger:
    """Keeps orphans until they are forgotten."""

    def __init__(self, *orphans: Orphan) -> None:
        self.orphans = {orphan.request_id: orphan for orphan in orphans}
        self.up = True
        self.sweeps = 0

    async def sweep(self) -> tuple[Orphan, ...]:
        self.sweeps += 1
        if not self.up:
            raise LedgerUnavailable("down")
        return tuple(self.orphans.values())

    async def forget(self, request_ids: Iterable[str]) -> None:
        for request_id in tuple(request_ids):
            self.orphans.pop(request_id, None)


def sweeper(ledger: Ledger, interval_s: float = 1.0) -> tuple[Sweeper, list[UsageRecord]]:
    written: list[UsageRecord] = []
    return Sweeper(ledger, written.append, interval_s), written


def test_the_record_is_the_note_with_what_was_posted() -> None:
    record = orphan_record(orphan(REQUEST_ID))
    assert (record.request_id, record.service, record.model) == (REQUEST_ID, CALLER.service, "gpt-4o")
    assert (record.outcome, record.usage_source) == (Outcome.UPSTREAM_ERROR, UsageSource.COUNTED)
    assert (record.cost_nanousd, record.prompt_tokens, record.completion_tokens) == (70_000, PROMPT, 30)
    assert isinstance(record.outcome, Outcome)


def test_less_than_the_prompt_is_no_negative_answer() -> None:
    assert orphan_record(Orphan("a", Amount(0, 0), note())).completion_tokens == 0


async def test_an_orphan_is_written_once_and_forgotten_a_round_later() -> None:
    ledger = Ledger(orphan("a"))
    sweeping, written = sweeper(ledger)
    await sweeping.sweep()
    assert ([record.request_id for record in written], list(ledger.orphans)) == (["a"], ["a"])
    ledger.orphans["b"] = orphan("b")
    await sweeping.sweep()
    assert ([record.request_id for record in written], list(ledger.orphans)) == (["a", "b"], ["b"])
    await sweeping.sweep()
    assert (len(written), ledger.orphans) == (2, {})


async def test_a_failed_round_is_made_up_for_by_the_next() -> None:
    ledger = Ledger(orphan("a"))
    sweeping, written = sweeper(ledger)
    await sweeping.sweep()
    ledger.up = False
    with pytest.raises(LedgerUnavailable):
        await sweeping.sweep()
    ledger.up = True
    await sweeping.sweep()
    assert (len(written), ledger.orphans) == (1, {})


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"prompt_tokens": "x"}'], ids=repr)
async def test_a_note_that_cannot_be_read_keeps_no_other_from_being_swept(
    text: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    ledger = Ledger(orphan("a", text), orphan("b"))
    sweeping, written = sweeper(ledger)
    await sweeping.sweep()
    assert [record.request_id for record in written] == ["b"]
    assert "70000" in caplog.text
    await sweeping.sweep()
    assert ledger.orphans == {}


async def test_it_sweeps_in_the_background_and_outlives_the_ledgers_failures() -> None:
    ledger = Ledger(orphan("a"))
    ledger.up = False
    sweeping, written = sweeper(ledger, interval_s=0.0)
    sweeping.start()
    await eventually(lambda: ledger.sweeps >= 3, "three rounds")
    ledger.up = True
    await eventually(lambda: not ledger.orphans, "the orphan to be forgotten")
    await sweeping.close()
    assert len(written) == 1
