"""Two whole instances on one Redis, each with its own Envoy, processor and disk; and one of them dies with its disk."""

from __future__ import annotations

import asyncio
import shutil
import signal
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from extproc.instance import instance_of
from extproc.ledger import Ledger
from extproc.local.provider import Script
from extproc.local.valkey import LocalValkey
from extproc.records import UsageRecord
from extproc.usage.sinks.duckdb import read_usage
from tests.clusters import start_cluster
from tests.rig import DONE, POLICY, Rig, delta, eventually, running, streamed, usage, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOMAIN = "test.iam.gserviceaccount.com"
PROMPT, WHOLE, FIT, CALLERS = 9, 50, 10, 60
STREAMS = 4  # of each instance, while one is killed

BUDGETS = (
    POLICY.replace("{search: [ranker@test.iam.gserviceaccount.com]}", f"{{full: [full-*@{DOMAIN}]}}")
    + f"""\
  - {{scope: team, id: full, window: total, limit_tokens: {FIT * (PROMPT + WHOLE)}}}
  - {{scope: global, window: total, limit_usd: 1000}}
"""
)


@dataclass
class Instance:
    """A gateway and what ships its journal, into a store that is not on its disk."""

    rig: Rig
    shipper: asyncio.subprocess.Process
    store: Path

    @property
    def state_dir(self) -> Path:
        return self.rig.processors[0].state_dir

    @property
    def stored(self) -> dict[str, UsageRecord]:
        """The rows of its store, by request. Its shipper must have ended."""
        rows = read_usage(self.store)
        assert len({row.request_id for row in rows}) == len(rows)
        return {row.request_id: row for row in rows}

    async def end_shipper(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.shipper.send_signal(number)
        await self.shipper.wait()

    async def die(self) -> None:
        """Without a word, and with its disk."""
        await self.rig.kill_envoy()
        await self.rig.processors[0].stop(signal.SIGKILL)
        await self.end_shipper(signal.SIGKILL)
        shutil.rmtree(self.state_dir)


async def _shipping(rig: Rig, stack: AsyncExitStack) -> Instance:
    store = rig.directory / "usage.duckdb"
    environment = {**rig.processors[0].environment, "TOLLGATE_USAGE_DB": str(store)}
    with (rig.directory / "shipper.log").open("ab") as log:
        command = (sys.executable, "-m", "extproc", "ship")
        shipper = await asyncio.create_subprocess_exec(*command, env=environment, stdout=log, stderr=log)
    instance = Instance(rig, shipper, store)
    stack.push_async_callback(instance.end_shipper, signal.SIGKILL)
    return instance


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["valkey", "cluster"])
async def instances(request: pytest.FixtureRequest, short_directory: Path) -> AsyncIterator[tuple[Instance, Instance]]:
    directory = short_directory / request.param
    environment = {"TOLLGATE_HOLD_TTL_MS": "1500", "TOLLGATE_LEDGER_TIMEOUT_MS": "2500"}
    with ExitStack() as servers:
        if request.param == "cluster":
            nodes = start_cluster(directory / "n", servers)
            redis = nodes[0], nodes[0].url.replace("redis://", "redis+cluster://")
        else:
            valkey = servers.enter_context(LocalValkey(directory / "v"))
            redis = valkey, valkey.url
        async with AsyncExitStack() as stack:
            for name in "ab":
                (directory / name).mkdir(parents=True)
            first = await stack.enter_async_context(
                running(directory / "a", policy=BUDGETS, environment=environment, redis=redis)
            )
            second = await stack.enter_async_context(running(directory / "b", environment=environment, beside=first))
            yield await _shipping(first, stack), await _shipping(second, stack)


def everybody(instances: tuple[Instance, Instance]) -> list[Rig]:
    return [instance.rig for instance in instances]


async def test_a_budget_that_both_draw_on_holds(instances: tuple[Instance, Instance]) -> None:
    rigs = everybody(instances)
    rigs[0].answer(whole("word", prompt=PROMPT, completion=WHOLE))
    callers = [(rigs[number % 2], f"full-{number}@{DOMAIN}") for number in range(CALLERS)]
    told = await asyncio.gather(*(rig.ask(who, max_tokens=WHOLE) for rig, who in callers))
    assert Counter(answer.status for answer in told) == {200: FIT, 429: CALLERS - FIT}
    for rig in rigs:
        assert (await rig.settled())["team/full/total/tokens"].posted == FIT * (PROMPT + WHOLE)


async def test_what_one_learns_the_other_counts_with(instances: tuple[Instance, Instance]) -> None:
    a, b = everybody(instances)
    words = streamed(60, end=False).chunks
    a.answer(Script(chunks=[*words, delta("", finish="stop"), usage(PROMPT, 120), DONE]))  # twice what is counted
    for number in range(3):
        assert (await a.ask(f"teacher-{number}@{DOMAIN}", stream=True)).status == 200
    a.answer(Script(chunks=[*words, delta("", finish="stop"), DONE]))  # nothing is reported

    async def counts_with_it() -> bool:
        told = await b.ask(f"pupil@{DOMAIN}", stream=True)
        return (await b.record(told.request_id)).completion_tokens > 60

    await eventually(counts_with_it, "the other one to count with what was learned")


async def test_a_policy_is_the_same_version_for_both(instances: tuple[Instance, Instance]) -> None:
    used = {rig.processors[0].log.partition(" is in use")[0].rpartition(" ")[2] for rig in everybody(instances)}
    assert len(used) == 1


async def test_an_instance_that_dies_with_its_disk_loses_no_money_and_no_row(
    instances: tuple[Instance, Instance],
) -> None:
    dying, surviving = instances
    a, b = dying.rig, surviving.rig
    a.answer(whole("word", prompt=PROMPT, completion=WHOLE))
    told = [await a.ask(f"early-{number}@{DOMAIN}", max_tokens=WHOLE) for number in range(3)]
    outbox = Ledger(a.redis_url, instance=instance_of(dying.state_dir)).outbox

    async def emptied() -> bool:
        async with b.ledger() as ledger:
            return await ledger.rows(outbox, 0) == (0, ())

    await eventually(emptied, "the first rows to be stored")
    await dying.end_shipper(signal.SIGKILL)  # what comes now is on its disk only, and in Redis
    told += [await a.ask(f"late-{number}@{DOMAIN}", max_tokens=WHOLE) for number in range(10)]
    assert {answer.status for answer in told} == {200}

    a.answer(streamed(150, prompt=PROMPT, pause_s=0.02))
    asked = len(a.played)
    streams = [
        asyncio.ensure_future(rig.ask(f"stream-{number}@{DOMAIN}", stream=True))
        for number, rig in enumerate((a, b) * STREAMS)
    ]
    await eventually(lambda: _streaming(a, asked) == 2 * STREAMS, "all streams")
    assert not await emptied()
    await dying.die()
    broken = await asyncio.gather(*streams)
    assert [answer.broken is not None for answer in broken] == [True, False] * STREAMS

    balances = await b.settled()
    await eventually(emptied, "the survivor to store the rows of the dead")
    await eventually(lambda: {one.request_id for one in broken} <= _journaled(b), "the rows of broken streams")
    await surviving.end_shipper(signal.SIGTERM)
    early, rows = dying.stored, surviving.stored
    assert all(rows.get(name, row) == row for name, row in early.items())  # stored, and adopted all the same
    rows |= early
    everything = [*a.told, *b.told]
    assert {one.request_id for one in everything if one.status == 200} <= rows.keys()
    assert rows.keys() <= {one.request_id for one in everything}
    assert sum(row.cost_nanousd for row in rows.values()) == balances["global/*/total/usd"].posted


def _streaming(rig: Rig, since: int) -> int:
    return sum(request.chunks_sent > 0 for request, _ in rig.played[since:])


def _journaled(rig: Rig) -> set[str]:
    return {row.request_id for row in rig.records()}
