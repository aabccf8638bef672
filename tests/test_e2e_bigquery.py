"""The gateway with its shipper beside the workers, and BigQuery away in the middle."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
import pytest_asyncio

from tests.bigquery_server import FakeBigQuery
from tests.rig import PROVIDER_KEY, Rig, eventually, running, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUDGETS = "  - {scope: global, window: total, limit_usd: 1000}\n"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fake() -> AsyncIterator[FakeBigQuery]:
    fake = FakeBigQuery().start()
    fake.create_tables()
    yield fake
    fake.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path, fake: FakeBigQuery) -> AsyncIterator[Rig]:
    environment = {**fake.environment, "TOLLGATE_SHIP": "1", "TOLLGATE_DRAIN_TIMEOUT_S": "1"}
    async with running(short_directory, budgets=BUDGETS, environment=environment) as rig:
        rig.answer(streamed(3))
        yield rig


async def test_every_request_is_one_row_whatever_happens_to_bigquery_and_to_the_shipper(
    rig: Rig, fake: FakeBigQuery
) -> None:
    asked: list[str] = []

    async def ask(count: int) -> None:
        told = await asyncio.gather(*(rig.ask(stream=True) for _ in range(count)))
        assert {one.status for one in told} == {200}
        asked.extend(one.request_id for one in told)

    await ask(5)
    await eventually(lambda: fake.ids() == sorted(asked), "the first rows")
    with fake.away():
        await ask(5)
        os.kill(_shipper(rig), signal.SIGKILL)
    await ask(5)
    await eventually(lambda: fake.ids() == sorted(asked), "every row")
    (balance,) = (await rig.settled()).values()
    assert sum(fake.usage().values()) == balance.posted > 0

    await ask(2)
    assert await rig.processors[0].stop() == 0  # the last rows are flushed when the worker has drained
    assert fake.ids() == sorted(asked)
    assert "usage row not shipped" not in rig.processors[0].log
    written = str(fake.rows) + rig.everything_written()
    assert PROVIDER_KEY not in written
    assert not any(token in written for token in rig.minted)


def _shipper(rig: Rig) -> int:
    """The child of the supervisor that ships; it has been given no provider's key."""
    assert rig.processors[0].process is not None
    pid = rig.processors[0].process.pid
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with suppress(OSError):
            if Path(f"/proc/{child}/cmdline").read_bytes().endswith(b"\0extproc\0ship\0"):
                assert PROVIDER_KEY.encode() not in Path(f"/proc/{child}/environ").read_bytes()
                return int(child)
    raise AssertionError("there is no shipper")
