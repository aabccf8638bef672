"""Providers that break and lie, callers that leave, bodies that are too large: in a real Envoy, over a real Valkey."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from h2.connection import H2Connection
from h2.events import DataReceived

from extproc.limits import MAX_EVENT_BYTES, MAX_REQUEST_BYTES, MIB
from extproc.local.provider import Received, Script
from extproc.records import Outcome, UsageSource
from tests.checker import Checker
from tests.rig import DONE, PROVIDER_KEY, Rig, Told, delta, event, eventually, running, streamed, usage, whole

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOMAIN = "test.iam.gserviceaccount.com"
PROMPT = 9
PAUSE_S = 0.02
STALL_S = 1  # Envoy's per_try_idle_timeout here: two minutes in envoy.yaml
JSON = (("content-type", "application/json"),)

BUDGETS = """\
  - {scope: service, id: "*", window: total, limit_usd: 5}
  - {scope: service, id: "*", window: total, limit_tokens: 200000}
"""


def impatient(config: dict[str, Any]) -> None:
    """Shorten how long Envoy waits for a silent provider."""
    manager = config["static_resources"]["listeners"][0]["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    openai = next(route for route in routes if route["name"] == "openai")
    openai["route"]["idle_timeout"] = f"{STALL_S}s"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    async with running(short_directory, budgets=BUDGETS, tune=impatient) as rig:
        yield rig


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def checked(checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


def caller(name: str) -> str:
    return f"{name}@{DOMAIN}"


def by_caller(scripts: dict[str, Script]) -> Callable[[Received], Script]:
    return lambda request: scripts[json.loads(request.body)["user"]]


def succeeded(told: Told) -> bool:
    """As a client judges: the answer came to its end, and no error is in it."""
    return told.status == 200 and told.broken is None and told.error is None


# The provider ends too early ------------------------------------------------------------------------------------------

WORDS = 5
ANSWER = [*(delta(f" word{i}") for i in range(WORDS)), delta("", finish="stop"), usage(PROMPT, 42), DONE]
WHOLE_FROM = WORDS + 1  # events, from which on the answer is known to be whole


@pytest.mark.parametrize("fault", [None, "close", "reset"], ids=["cleanly", "without its closing chunk", "by reset"])
async def test_a_stream_that_ends_at_any_event(rig: Rig, fault: str | None) -> None:
    scripts = {
        caller(f"ends-{fault}-{sent}".lower()): Script(chunks=ANSWER[:sent], pause_s=PAUSE_S, fault=fault)
        for sent in range(len(ANSWER) + 1)
    }
    rig.answer(by_caller(scripts))
    answers = await asyncio.gather(*(rig.ask(who, stream=True) for who in scripts))
    for sent, told in enumerate(answers):
        record = await rig.record(told.request_id)
        passed = [chunk for chunk in ANSWER[:sent] if chunk != usage(PROMPT, 42)]
        if fault is None:
            is_whole = sent >= WHOLE_FROM
            assert succeeded(told) is is_whole
            assert told.events[: len(passed)] == passed
            assert len(told.events) == len(passed) + (not is_whole)
            assert record.outcome is (Outcome.OK if is_whole else Outcome.UPSTREAM_ERROR)
        else:
            assert not succeeded(told)
            assert told.status == 502 or told.events == passed[: len(told.events)]
        if record.usage_source is UsageSource.PROVIDER:
            assert (record.prompt_tokens, record.completion_tokens) == (PROMPT, 42)
            assert sent > WHOLE_FROM
        else:
            said = sum(b" word" in chunk for chunk in told.events)
            assert 2 * said <= record.completion_tokens <= 2 * min(sent, WORDS)  # " word3" is two tokens


async def test_half_an_event_is_never_joined_with_the_error(rig: Rig) -> None:
    for cut in (1, 20, len(ANSWER[2]) - 2, len(ANSWER[2]) - 1):
        rig.answer(Script(chunks=[*ANSWER[:2], ANSWER[2][:cut]], pause_s=PAUSE_S))
        told = await rig.ask(caller(f"half-{cut}"), stream=True)
        assert told.events[:2] == ANSWER[:2]
        assert len(told.events) == 3
        assert told.error is not None
        assert told.error["type"] == "upstream_error"
        assert (await rig.record(told.request_id)).outcome is Outcome.UPSTREAM_ERROR


async def test_a_whole_answer_that_breaks_off(rig: Rig) -> None:
    who = caller("ends-whole")
    body = whole("word " * 50, prompt=PROMPT, completion=51).chunks[0]
    rig.answer(Script(headers=JSON, chunks=[body[:200], body[200:-30]], pause_s=PAUSE_S, fault="reset"))
    told = await rig.ask(who, max_tokens=100)
    assert told.broken is not None
    record = await rig.record(told.request_id)
    assert record.outcome is not Outcome.OK
    assert 50 <= record.completion_tokens <= 100


# The provider stalls --------------------------------------------------------------------------------------------------


async def test_a_provider_that_never_begins(rig: Rig) -> None:
    who = caller("stall-before")
    rig.answer(Script(first_pause_s=30))
    told = await rig.ask(who, stream=True)
    assert told.status == 504
    assert told.error is not None
    assert told.error["code"] == "timeout"
    assert rig.played[-1][0].ended in ("", "gone")
    assert (await rig.record(told.request_id)).outcome is Outcome.UPSTREAM_ERROR


async def test_a_whole_answer_that_takes_too_long_is_not_free(rig: Rig) -> None:
    who = caller("stall-whole")
    rig.answer(Script(first_pause_s=30))
    told = await rig.ask(who, stream=False, max_tokens=40)
    assert told.status == 504
    record = await rig.record(told.request_id)
    assert record.outcome is Outcome.UPSTREAM_ERROR
    assert record.completion_tokens == 40  # its cap: at 200 tokens a second it was written long before
    assert await rig.posted_tokens(who) == record.prompt_tokens + 40


async def test_a_provider_that_refuses_bills_nothing(rig: Rig) -> None:
    who = caller("refused")
    rig.answer(Script(status=503, headers=(("content-type", "application/json"),), chunks=(b"{}",), whole=True))
    told = await rig.ask(who, stream=False, max_tokens=40)
    assert told.status == 503
    assert (await rig.record(told.request_id)).completion_tokens == 0


async def test_a_provider_that_stops_in_the_middle(rig: Rig) -> None:
    who = caller("stall-middle")
    rig.answer(Script(chunks=ANSWER[:3], pause_s=PAUSE_S, fault="hang"))
    told = await rig.ask(who, stream=True)
    assert told.events == ANSWER[:3]
    assert told.broken is not None
    await rig.played[-1][0].done.wait()
    assert (await rig.record(told.request_id)).completion_tokens == 6
    assert await rig.posted_tokens(who) == PROMPT + 6


async def test_a_stream_that_drips_is_not_taken_for_a_stalled_one(rig: Rig) -> None:
    chunk = b"".join(ANSWER)
    rig.answer(Script(chunks=[chunk[i : i + 400] for i in range(0, len(chunk), 400)], pause_s=STALL_S / 2))
    assert succeeded(await rig.ask(caller("stall-drip"), stream=True))


# Malformed streams ----------------------------------------------------------------------------------------------------

CLOSING = [delta("", finish="stop"), DONE]


def bare(text: str) -> bytes:
    """The JSON of a chunk."""
    return delta(text).removeprefix(b"data: ").rstrip(b"\n")


SPOKEN = 'data: {"choices": [{"index": 0, "delta": {"content": "é"}}]}\n\n'.encode()
ACCENT = SPOKEN.index("é".encode())

MALFORMED = {
    "cr": ([b"data: " + bare(" word") + b"\r\r"] * 3 + [b"data: [DONE]\r\r"], 3),
    "crlf": ([b"data: " + bare(" word") + b"\r\n\r\n"] * 3 + [b"data: [DONE]\r\n\r\n"], 3),
    "mixed": ([b"data: " + bare(" word") + end for end in (b"\r\n\n", b"\n\r\n", b"\r\n\r\n", b"\n\n")] + CLOSING, 4),
    "bom": ([b"\xef\xbb\xbf" + delta(" word"), delta(" word"), *CLOSING], 2),
    "no space": ([b"data:" + bare(" word") + b"\n\n", *CLOSING], 1),
    "two data lines": ([b"data: " + bare(" word").replace(b", ", b",\ndata: ", 1) + b"\n\n", *CLOSING], 1),
    "comments": ([b": keep-alive\n\n", delta(" word"), b":\n\n", *CLOSING], 1),
    "other fields": ([b"id: 7\nretry: 3\nevent: message\n" + delta(" word"), *CLOSING], 1),
    "not json": ([b"data: {\n\n", b"data: \xff\xfe\n\n", b"\x00\n\n", delta(" word"), *CLOSING], 1),
    "blank lines": ([b"\n\n\n", delta(" word"), b"\n\n", *CLOSING], 1),
    "no last line end": ([delta(" word"), delta("", finish="stop"), b"data: [DONE]"], 1),
    "no closing event": ([delta(" word"), delta("", finish="stop")], 1),
    "split utf-8": ([SPOKEN[: ACCENT + 1], SPOKEN[ACCENT + 1 :], *CLOSING], 1),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_malformed_stream_is_passed_on_and_counted(rig: Rig, name: str) -> None:
    chunks, tokens = MALFORMED[name]
    rig.answer(Script(chunks=chunks, pause_s=0.005))
    told = await rig.ask(caller(f"malformed-{name.replace(' ', '-')}"), stream=True)
    assert told.broken is None
    assert told.body == b"".join(chunks)
    record = await rig.record(told.request_id)
    assert (record.outcome, record.usage_source) == (Outcome.OK, UsageSource.COUNTED)
    assert record.completion_tokens == tokens


async def test_an_event_without_an_end_is_bounded(rig: Rig) -> None:
    who = caller("giant")
    giant = b'data: {"choices": [{"index": 0, "delta": {"content": "' + b" word" * (MAX_EVENT_BYTES // 5 + MIB)
    pieces = [giant[i : i + MIB] for i in range(0, len(giant), MIB)]
    rig.answer(Script(chunks=[delta(" word"), *pieces], fault="hang"))
    told = await rig.ask(who, stream=True)
    assert told.events[0] == delta(" word")
    assert len(told.events) == 2
    assert told.error is not None
    assert told.error["type"] == "upstream_error"
    assert told.broken is not None
    record = await rig.record(told.request_id)
    assert record.outcome is Outcome.UPSTREAM_ERROR
    assert record.completion_tokens >= 1


async def test_text_that_looks_like_a_streams_framing(rig: Rig) -> None:
    who = caller("framing")
    texts = ["\n", "\n\n", "data: [DONE]", "\r\n\r\n", "\u2028", 'data: {"error": {}}\n\n', "\x00", "\ufeff", "[DONE]"]
    rig.answer(Script(chunks=[*map(delta, texts), *CLOSING]))
    told = await rig.ask(who, stream=True)
    said = [json.loads(block.removeprefix(b"data: ")) for block in told.events[: len(texts)]]
    assert [chunk["choices"][0]["delta"]["content"] for chunk in said] == texts
    assert told.events[len(texts) :] == CLOSING
    assert (await rig.record(told.request_id)).outcome is Outcome.OK


# Usage ----------------------------------------------------------------------------------------------------------------

FINISH = delta("", finish="stop")
USAGES = {
    "absent": ([], PROMPT, 3, UsageSource.COUNTED),
    "zero": ([usage(0, 0)], 0, 0, UsageSource.PROVIDER),
    "shrinking": ([usage(PROMPT, 30), usage(PROMPT, 20)], PROMPT, 20, UsageSource.PROVIDER),
    "twice": ([usage(PROMPT, 30), usage(PROMPT, 30)], PROMPT, 30, UsageSource.PROVIDER),
    "growing": ([usage(PROMPT, 10), usage(PROMPT, 20), usage(PROMPT, 30)], PROMPT, 30, UsageSource.PROVIDER),
    "half": ([event({"choices": [], "usage": {"prompt_tokens": 5}})], PROMPT, 3, UsageSource.COUNTED),
    "negative": (
        [event({"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": -1}})],
        PROMPT,
        3,
        UsageSource.COUNTED,
    ),
    "null": ([event({"choices": [], "usage": None})], PROMPT, 3, UsageSource.COUNTED),
}


@pytest.mark.parametrize("name", USAGES)
async def test_what_is_billed_by_what_the_provider_reports(rig: Rig, name: str) -> None:
    figures, prompt, completion, source = USAGES[name]
    who = caller(f"usage-{name}")
    rig.answer(Script(chunks=[delta(" word"), delta(" word"), delta(" word"), FINISH, *figures, DONE]))
    told = await rig.ask(who, stream=True)
    assert succeeded(told)
    record = await rig.record(told.request_id)
    assert (record.prompt_tokens, record.completion_tokens, record.usage_source) == (prompt, completion, source)
    assert await rig.posted_tokens(who) == prompt + completion


@pytest.mark.parametrize("options", [None, {"include_usage": False}, {"include_usage": True}], ids=str)
async def test_usage_is_always_asked_for_and_shown_to_who_asked(rig: Rig, options: dict[str, bool] | None) -> None:
    wanted = bool(options and options["include_usage"])
    who = caller(f"include-{options and options['include_usage']}".lower())
    script = streamed(3, prompt=PROMPT)
    rig.answer(script)
    told = await rig.ask(who, stream=True, stream_options=options)
    asked = json.loads(rig.played[-1][0].body)
    assert asked["stream_options"] == {"include_usage": True}
    assert told.events == [chunk for chunk in script.chunks if wanted or chunk != usage(PROMPT, 3)]
    assert (await rig.record(told.request_id)).usage_source is UsageSource.PROVIDER


# Compression, and size ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "deflate, gzip"])
async def test_a_compressed_answer_is_refused(rig: Rig, encoding: str, stream: bool) -> None:
    who = caller(f"compressed-{encoding[:4]}{stream:d}")
    plain = streamed(3, prompt=PROMPT) if stream else whole("hi", prompt=PROMPT, completion=1)
    headers = (*plain.headers, ("content-encoding", encoding))
    rig.answer(Script(headers=headers, chunks=[gzip.compress(b"".join(plain.chunks))], whole=plain.whole))
    told = await rig.ask(who, headers={"accept-encoding": "gzip, br, zstd"}, stream=stream, max_tokens=50)
    assert told.status == 502
    assert told.error is not None
    assert told.error["type"] == "upstream_error"
    assert rig.played[-1][0].header("accept-encoding") == "identity"
    assert (await rig.record(told.request_id)).outcome is Outcome.UPSTREAM_ERROR


async def test_a_compressed_request_is_refused_unread(rig: Rig) -> None:
    asked = len(rig.played)
    bomb = gzip.compress(b'{"model": "gpt-4o", "messages": "' + bytes(64 * MIB))
    async with rig.client(caller("bomb")) as client:
        for encoding in ("gzip", "br", "zstd", "identity, gzip"):
            answer = await client.post(
                "/v1/chat/completions", content=bomb, headers=dict(JSON) | {"content-encoding": encoding}
            )
            assert answer.status_code == 415
            assert answer.json()["error"]["code"] == "unsupported_media_type"
            assert (await rig.record(answer.headers["x-request-id"])).outcome is Outcome.REFUSED
    assert len(rig.played) == asked


ROUNDS = 8


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) * 1024


async def send_endlessly(rig: Rig, who: str, framing: str) -> tuple[int, bytes, bytes]:
    """Send a body of a gigabyte until the gateway has had enough. (bytes sent, the answer's head and body)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {rig.token(who)}\r\n"
        f"content-type: application/json\r\n{framing}\r\n\r\n"
    )
    writer.write(head.encode())
    answer = asyncio.create_task(read_answer(reader))
    piece, sent = b"x" * 65_536, 0
    while not answer.done() and sent < 1024 * MIB:
        try:
            writer.write(piece if "length" in framing else b"10000\r\n%s\r\n" % piece)
            await writer.drain()
        except OSError:
            break
        sent += len(piece)
    writer.close()
    return sent, *await answer


async def read_answer(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """The head and the body, and not the reset that follows them."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split()[0])
    return head, await reader.readexactly(length)


@pytest.mark.parametrize("framing", [f"content-length: {1024 * MIB}", "transfer-encoding: chunked"])
async def test_a_body_of_a_gigabyte_is_refused_and_memory_stays_flat(rig: Rig, framing: str) -> None:
    who = caller(f"huge-{framing.partition(':')[0]}")
    asked, processor = len(rig.played), rig.processors[0].process
    assert processor is not None
    memory: dict[int, list[int]] = {processor.pid: [], rig.envoy.pid: []}
    for _ in range(ROUNDS):
        sent, head, body = await send_endlessly(rig, who, framing)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert json.loads(body)["error"]["code"] == "request_too_large"
        assert sent < 256 * MIB
        for pid, figures in memory.items():
            figures.append(resident_bytes(pid))
    for figures in memory.values():
        # What one body needs comes and goes by the allocator's lights; if they were kept, it would show.
        assert figures[-1] - figures[0] < ROUNDS // 2 * MAX_REQUEST_BYTES
    assert len(rig.played) == asked

    def all_are_recorded() -> bool:
        rows = [record for record in rig.records() if record.service == who]
        return len(rows) == ROUNDS and all((row.outcome, row.status) == (Outcome.REFUSED, 413) for row in rows)

    await eventually(all_are_recorded, "one row for each refusal")


# The caller leaves ----------------------------------------------------------------------------------------------------


async def leave(rig: Rig, who: str, after: Callable[[bytes], bool], **fields: Any) -> bytes:
    """Ask as `Rig.ask` does, and close the connection as soon as `after` is true of the body. Returns the body."""
    body = json.dumps({"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], "user": who, **fields})
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nauthorization: Bearer {rig.token(who)}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    asked = len(rig.played)
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(head.encode() + body.encode())
    await eventually(lambda: len(rig.played) > asked, "the provider to be asked")
    received = b""
    try:
        while not after(received.partition(b"\r\n\r\n")[2]):
            received += await reader.readexactly(1)
    finally:
        writer.transport.abort()
    return received.partition(b"\r\n\r\n")[2]


LEAVES: dict[str, Callable[[bytes], bool]] = {
    "0": lambda body: True,
    "1": lambda body: len(body) >= 1,
    "k": lambda body: body.count(b" word") >= 20,
    "last": lambda body: body.endswith(b"0\r\n\r\n"),
}


@pytest.mark.parametrize("moment", LEAVES)
async def test_a_caller_that_leaves_a_stream_pays_for_what_was_written(rig: Rig, moment: str) -> None:
    who = caller(f"leaves-{moment}")
    rig.answer(streamed(60, prompt=PROMPT, pause_s=0.01))
    body = await leave(rig, who, LEAVES[moment], stream=True)
    request, _ = rig.played[-1]
    await request.done.wait()
    assert request.ended == ("whole" if moment == "last" else "gone")

    row = await rig.row_of(who)
    assert row.outcome is (Outcome.OK if moment == "last" else Outcome.CLIENT_GONE)
    assert body.count(b" word") <= row.completion_tokens <= request.chunks_sent
    assert row.prompt_tokens == PROMPT
    assert await rig.posted_tokens(who) == PROMPT + row.completion_tokens


async def test_a_caller_that_leaves_a_whole_answer_pays_for_the_time_up_to_its_cap(rig: Rig) -> None:
    """What the provider wrote meanwhile, nobody has seen."""
    scripts = {
        caller("leaves-soon"): Script(first_pause_s=0.5, headers=JSON, chunks=whole("", prompt=9, completion=9).chunks),
        caller("leaves-capped"): Script(first_pause_s=5, headers=JSON),
    }
    rig.answer(by_caller(scripts))
    for who in scripts:
        await leave(rig, who, lambda _: True, max_tokens=20)
        request, _ = rig.played[-1]
        await request.done.wait()
        assert request.ended == "gone"
        posted = await rig.posted_tokens(who)
        assert PROMPT <= posted <= PROMPT + 20


async def test_an_http2_caller_that_resets_its_stream(rig: Rig) -> None:
    """By hand: httpx only forgets the stream."""
    who = caller("leaves-h2")
    rig.answer(streamed(60, prompt=PROMPT, pause_s=0.01))
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], "user": who, "stream": True}
    head = {":method": "POST", ":scheme": "http", ":authority": "gateway", ":path": "/v1/chat/completions"}
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    http2 = H2Connection()
    http2.initiate_connection()
    http2.send_headers(1, list({**head, "authorization": f"Bearer {rig.token(who)}", **dict(JSON)}.items()))
    http2.send_data(1, json.dumps(body).encode(), end_stream=True)
    writer.write(http2.data_to_send())
    received = b""
    while received.count(b" word") < 20:
        for frame in http2.receive_data(await reader.read(65_536)):
            received += frame.data if isinstance(frame, DataReceived) else b""
    http2.reset_stream(1)
    writer.write(http2.data_to_send())
    request, _ = rig.played[-1]
    await request.done.wait()
    assert request.ended == "gone"
    row = await rig.row_of(who)
    assert row.outcome is Outcome.CLIENT_GONE
    assert 20 <= row.completion_tokens <= request.chunks_sent
    writer.close()


# Envoy's own answers come past the gate like a provider's -------------------------------------------------------------


async def test_a_provider_that_cannot_be_reached(rig: Rig) -> None:
    who = caller("unreachable")
    await rig.provider.close()
    try:
        for stream in (True, False):
            told = await rig.ask(who, stream=stream, max_tokens=50)
            assert told.status == 503
            assert told.error is not None
            assert told.error["code"] == "service_unavailable"
            record = await rig.record(told.request_id)
            assert (record.outcome, record.cost_nanousd) == (Outcome.UPSTREAM_ERROR, 0)
    finally:
        await rig.provider.start(port=rig.provider.port)


async def test_the_gateways_own_answers_have_one_row_each(rig: Rig) -> None:
    """`Rig.records` fails where there are two of one request."""
    who = caller("own")
    rig.answer(streamed(3, prompt=PROMPT))
    refused = [
        (400, await rig.ask(who, n=-1)),
        (400, await rig.ask(who, messages=[])),
        (401, await rig.ask(who, headers={"authorization": "Bearer x"})),
        (403, await rig.ask("someone@elsewhere.example")),
        (429, await rig.ask(who, model="gpt-5-pro", n=128, max_tokens=272_000)),
    ]
    for status, told in refused:
        assert told.status == status
        record = await rig.record(told.request_id)
        assert (record.outcome, record.status, record.cost_nanousd) == (Outcome.REFUSED, status, 0)
    rig.answer(
        Script(status=401, headers=JSON, chunks=[b'{"error": {"message": "bad key %s"}}' % PROVIDER_KEY.encode()])
    )
    told = await rig.ask(who)
    assert told.status == 502
    assert (await rig.record(told.request_id)).outcome is Outcome.UPSTREAM_ERROR
