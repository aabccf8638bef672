"""The wire transport under a real Envoy: every way in which a request can go, once."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from extproc.local.provider import Script
from extproc.records import Outcome
from tests.rig import Rig, eventually, running, streamed

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUDGETS = """\
  - {scope: service, id: "cut-*@test.iam.gserviceaccount.com", window: day, limit_tokens: 120}
"""
ASK = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Say something."}]}
ANSWER = (
    b'{"id":"1","object":"chat.completion","created":1,"model":"gpt-4o","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"word"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":10,"completion_tokens":1,"total_tokens":11}}'
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    async with running(short_directory, budgets=BUDGETS, environment={"TOLLGATE_TRANSPORT": "wire"}) as rig:
        yield rig


def whole() -> Script:
    return Script(chunks=[ANSWER], headers=(("content-type", "application/json"),))


async def test_an_answer_in_one_piece(rig: Rig) -> None:
    rig.answer(whole())
    async with rig.client() as client:
        answer = await client.post("/v1/chat/completions", json=ASK)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "word"
    record = await rig.record(answer.headers["x-request-id"])
    assert (record.outcome, record.prompt_tokens, record.completion_tokens) == (Outcome.OK, 10, 1)


async def test_a_stream(rig: Rig) -> None:
    rig.answer(streamed(200))
    async with rig.client() as client:
        answer = await client.post("/v1/chat/completions", json={**ASK, "stream": True})
    assert answer.text.count(" word") == 200
    assert answer.text.endswith("data: [DONE]\n\n")
    record = await rig.record(answer.headers["x-request-id"])
    assert (record.outcome, record.completion_tokens) == (Outcome.OK, 200)


async def test_a_refusal(rig: Rig) -> None:
    async with rig.client() as client:
        answer = await client.post("/v1/chat/completions", json=ASK, headers={"authorization": "Bearer x"})
    assert answer.status_code == 401


async def test_a_cut(rig: Rig) -> None:
    rig.answer(streamed(1000, pause_s=0.001))
    text, request_id = "", ""

    async def read() -> None:
        nonlocal text, request_id
        async with (
            rig.client("cut-1@test.iam.gserviceaccount.com") as client,
            client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer,
        ):
            request_id = answer.headers["x-request-id"]
            async for piece in answer.aiter_text():
                text += piece

    with pytest.raises(httpx.RemoteProtocolError):
        await read()
    assert "insufficient_quota" in text
    assert 0 < text.count(" word") < 130
    assert (await rig.record(request_id)).outcome is Outcome.CUT


async def test_a_large_prompt(rig: Rig) -> None:
    """Crosses in one message, through both windows."""
    rig.answer(whole())
    prompt = "a word " * 1_500_000
    async with rig.client() as client:
        answer = await client.post(
            "/v1/chat/completions", json={**ASK, "messages": [{"role": "user", "content": prompt}]}
        )
    assert answer.status_code == 200, answer.text
    assert len(rig.provider.received[-1].body) > len(prompt)


async def test_a_caller_that_hangs_up(rig: Rig) -> None:
    rig.answer(streamed(10_000, pause_s=0.01))
    async with (
        rig.client() as client,
        client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer,
    ):
        request_id = answer.headers["x-request-id"]
        async for _ in answer.aiter_text():
            break
    assert (await rig.record(request_id)).outcome is Outcome.CLIENT_GONE


async def test_many_at_once(rig: Rig) -> None:
    rig.answer(streamed(20))
    async with rig.client() as client:
        answers = await asyncio.gather(
            *(client.post("/v1/chat/completions", json={**ASK, "stream": True}) for _ in range(100))
        )
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.text.count(" word") for answer in answers} == {20}
    await rig.settled()


async def test_nothing_went_wrong_on_the_way(rig: Rig) -> None:
    """No stream failed between Envoy and the processor, and no connection was ended by either."""
    stats = await rig.admin("/stats?filter=cluster.extproc")
    counts = {name: int(count) for name, count in re.findall(r"^cluster\.extproc\.(\S+): (\d+)$", stats, re.MULTILINE)}
    for name in ("upstream_rq_rx_reset", "upstream_cx_protocol_error", "http2.rx_messaging_error"):
        assert counts.get(name, 0) == 0, stats
    # Before the processor listened, Envoy tried in vain.
    assert counts["upstream_cx_destroy_remote"] == counts["upstream_cx_connect_fail"], stats


async def test_a_drain(rig: Rig) -> None:
    """A stream under way is finished; then the processor ends by itself."""
    rig.answer(streamed(50, pause_s=0.02))
    worker = rig.processors[0]
    text = ""
    async with (
        rig.client() as client,
        client.stream("POST", "/v1/chat/completions", json={**ASK, "stream": True}) as answer,
    ):
        async for piece in answer.aiter_text():
            if not text:
                worker.send(signal.SIGTERM)
            text += piece
    assert text.count(" word") == 50
    assert worker.process is not None
    assert await worker.process.wait() == 0
    await eventually(lambda: "Traceback" not in worker.log, "a quiet end")
