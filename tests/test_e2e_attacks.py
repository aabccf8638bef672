"""Attacks on a running gateway: what it refuses, what it passes on, and that the provider's key stays with it.

Each case says what the provider saw, since that is what was billed: nothing, or exactly what was metered.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import random
import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from redis import Redis

from extproc import limits
from extproc.local.http import Request, Response, serve
from extproc.local.issuer import DevIssuer
from extproc.local.provider import Received, Script
from extproc.records import Outcome
from extproc.tokens import counter
from tests.checker import Checker
from tests.rig import AUDIENCE, DONE, PROVIDER_KEY, SERVICE, Rig, Told, delta, eventually, running, streamed, usage

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
JSON = ("content-type", "application/json")
BODY = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}]}
BUDGETS = "  - {scope: global, window: total, limit_usd: 100000}\n"


def whole(prompt: int = 9, completion: int = 1, text: str = "hi", **fields: Any) -> Script:
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }
    return Script(headers=(JSON,), chunks=(json.dumps(answer | fields).encode(),), whole=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gateway(short_directory: Path) -> AsyncIterator[Rig]:
    """Whatever the tests do to it, the checker looks at afterwards."""
    async with running(short_directory, budgets=BUDGETS) as rig:
        rig.answer(whole())
        checker = Checker(rig)
        yield rig
        await checker.check()


@pytest.fixture
def rig(gateway: Rig) -> Rig:
    """The gateway, with a provider that answers."""
    gateway.answer(whole())
    return gateway


async def post(rig: Rig, content: bytes, path: str = CHAT, **headers: str) -> Told:
    """One POST with exactly this body."""
    async with rig.client(verify=False, headers={"content-type": "application/json", **headers}) as client:
        answer = await client.post(path, content=content)
    told = Told(answer.status_code, answer.headers, answer.content)
    rig.told.append(told)
    return told


async def raw(rig: Rig, data: bytes) -> bytes:
    """All that comes back for these bytes on a connection of their own, until Envoy closes it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(data)
    answer = bytearray()
    with suppress(ConnectionError):
        while part := await asyncio.wait_for(reader.read(65536), 10):
            answer += part
    writer.close()
    rig.told.append(Told(0, httpx.Headers(), bytes(answer)))
    return bytes(answer)


def head(rig: Rig, *lines: bytes, path: bytes = CHAT.encode(), end: bytes = b"\r\n") -> bytes:
    fixed = (
        b"POST " + path + b" HTTP/1.1",
        b"host: gateway",
        b"authorization: Bearer " + rig.token().encode(),
        b"content-type: application/json",
        b"connection: close",
    )
    return end.join((*fixed, *lines, b"", b""))


def assert_openais_shape(told: Told, status: int, code: str) -> None:
    assert told.status == status, told.body
    assert told.headers["content-type"] == "application/json"
    assert told.error is not None
    assert set(told.error) == {"message", "type", "param", "code"}
    assert told.error["code"] == code


# 26, 27: bodies that two readers may read differently -----------------------------------------------------------------

MESSAGES = '"messages":[{"role":"user","content":"hi"}]'


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ('{"model":"gpt-4o","model":"o1",%s}', "duplicate_key"),
        ('{"model":"gpt-4o","mod\\u0065l":"o1",%s}', "duplicate_key"),
        ('{"model":"gpt-4o",%s,"max_tokens":1,"max_tokens":100000}', "duplicate_key"),
        ('{"model":"gpt-4o",%s,"metadata":{"a":{"b":1,"b":2}}}', "duplicate_key"),
        ('{"model":"gpt-4o",%s,"Model":"o1"}', "unknown_parameter"),
        ('{"model":"gpt-4o",%s,"MAX_TOKENS":100000}', "unknown_parameter"),
        ('{"model":"gpt-4o",%s,"maxTokens":100000}', "unknown_parameter"),
        ('{"model":"gpt-4o",%s,"N":100}', "unknown_parameter"),
        ('{"model":"gpt-4o",%s,"stream":true,"stream_options":{"Include_Usage":false}}', "unknown_parameter"),
        ('{"Model":"gpt-4o",%s}', "unknown_parameter"),
        ('{"model":"gpt-4o",%s,"x":NaN}', "invalid_json"),
        ('{"model":"gpt-4o",%s,"temperature":Infinity}', "invalid_json"),
        ('{"model":"gpt-4o",%s,"max_tokens":1e999}', "invalid_number"),
        ('{"model":"gpt-4o",%s,"seed":99999999999999999999}', "invalid_number"),
        ('{"model":"gpt-4o",%s,"seed":' + "9" * 100_000 + "}", "invalid_number"),
        ('{"model":"gpt-4o",%s,"x":' + "[" * 100_000 + "]" * 100_000 + "}", "too_deep"),
        ('{"model":"gpt-4o",%s,"x":' + '{"a":' * 65 + "1" + "}" * 65 + "}", "too_deep"),
        ('{"model":"gpt-4o",%s,"x":' + "[" * 100_000, "too_deep"),
        ('{"model":"gpt-4o",%s,"user":"\\ud800"}', "invalid_string"),
        ('{"model":"gpt-4o",%s}{"model":"o1"}', "invalid_json"),
        ('{"model":"gpt-4o",%s,}', "invalid_json"),
        ("{'model':'gpt-4o'}", "invalid_json"),
        ('\ufeff{"model":"gpt-4o",%s}', "invalid_encoding"),
        ('[{"model":"gpt-4o",%s}]', "not_an_object"),
        ("null", "not_an_object"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else None,
)
async def test_27_a_body_with_two_readings_is_refused(rig: Rig, body: str, code: str) -> None:
    seen = len(rig.provider.received)
    told = await post(rig, body.replace("%s", MESSAGES).encode())
    assert_openais_shape(told, 400, code)
    assert len(rig.provider.received) == seen
    assert (await rig.record(told.request_id)).status == 400


@pytest.mark.parametrize("charset", [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80"], ids=["stray", "overlong", "surrogate"])
async def test_27_bytes_that_are_not_utf8_are_refused(rig: Rig, charset: bytes) -> None:
    seen = len(rig.provider.received)
    told = await post(rig, b'{"model":"gpt-4o","messages":[{"role":"user","content":"%s"}]}' % charset)
    assert told.status == 400
    assert len(rig.provider.received) == seen


async def test_27_what_the_provider_reads_is_what_was_metered(rig: Rig) -> None:
    """Differential: another reader of the bytes that went out finds what the record says and what the caller sent."""
    random_ = random.Random(27)
    for _ in range(20):
        sent: dict[str, Any] = {
            **BODY,
            "model": random_.choice(["gpt-4o", "gpt-4o-mini", "o3-mini", "a/b:c"]),
            "n": random_.randint(1, 5),
            "max_completion_tokens": random_.randint(1, 500),
            "seed": random_.choice([-(2**63), 2**64 - 1, 0]),
            "temperature": random_.choice([0.1, 1e-7, 2, 1.7976931348623157e308]),
            "metadata": {"\x00": "\u2028", "é": "\U0001f600", "a": [None, True, {"b": ""}]},
            "stream": random_.random() < 0.5,
        }
        rig.answer(streamed(2) if sent["stream"] else whole())
        text = json.dumps(sent, ensure_ascii=random_.random() < 0.5, indent=random_.choice([None, 1]))
        told = await post(rig, text.encode())
        assert told.status == 200
        read = json.loads(rig.provider.received[-1].body, object_pairs_hook=_no_duplicates)
        if sent["stream"]:
            assert read.pop("stream_options") == {"include_usage": True}
        assert read == sent
        record = await rig.record(told.request_id)
        assert (record.requested_model, record.model, record.stream) == (sent["model"], sent["model"], sent["stream"])


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


# 28: caps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "integer_below_min_value"),
        (-1, "integer_below_min_value"),
        (-(2**63), "integer_below_min_value"),
        (2**53, "integer_above_max_value"),
        (2**64 - 1, "integer_above_max_value"),
        (2**64, "invalid_number"),
        (1.5, "invalid_type"),
        ("10", "invalid_type"),
        (True, "invalid_type"),
        ([10], "invalid_type"),
    ],
)
async def test_28_a_cap_that_is_none_is_refused(rig: Rig, field: str, value: Any, code: str) -> None:
    seen = len(rig.provider.received)
    assert_openais_shape(await post(rig, json.dumps(BODY | {field: value}).encode()), 400, code)
    assert len(rig.provider.received) == seen


@pytest.mark.parametrize(
    "fields",
    [{"n": 0}, {"n": -1}, {"n": limits.MAX_CHOICES + 1}, {"n": 2.0}, {"max_tokens": 1, "max_completion_tokens": 2}],
    ids=str,
)
async def test_28_an_impossible_number_of_choices_or_two_caps_are_refused(rig: Rig, fields: dict[str, Any]) -> None:
    seen = len(rig.provider.received)
    assert (await post(rig, json.dumps(BODY | fields).encode())).status == 400
    assert len(rig.provider.received) == seen


@pytest.mark.parametrize("asked", [None, 5, 10**9, 2**53 - 1])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_28_the_cap_is_clamped_to_the_models_and_told_to_the_provider(
    rig: Rig, field: str, asked: int | None
) -> None:
    assert (await post(rig, json.dumps(BODY | {field: asked}).encode())).status == 200
    sent = json.loads(rig.provider.received[-1].body)
    caps = {name: sent[name] for name in ("max_tokens", "max_completion_tokens") if sent.get(name) is not None}
    name = field if asked is not None else "max_completion_tokens"
    assert caps == {name: min(asked or 16_384, 16_384)}  # gpt-4o's own


async def test_28_a_hold_is_never_less_than_the_cost(rig: Rig) -> None:
    """Whatever is asked for, and although the provider uses all of its cap: what was held then covers what it cost."""
    random_ = random.Random(28)
    held: list[int] = []

    def all_of_it(request: Received) -> Script:
        held.append(_held(rig))
        body = json.loads(request.body)
        prompt = sum(counter("o200k_base")(message["content"]) + 4 for message in body["messages"]) + 3
        completion = body[next(name for name in ("max_tokens", "max_completion_tokens") if name in body)]
        return whole(prompt, completion * body.get("n", 1), service_tier=body.get("service_tier"))

    rig.answer(all_of_it)
    for _ in range(40):
        messages = [
            {"role": "user", "content": "lorem ipsum dolor " * random_.randint(0, 300)}
            for _ in range(random_.randint(1, 4))
        ]
        optional = {
            "max_tokens": random_.choice([1, 7, 1000, 10**9]),
            "max_completion_tokens": random_.choice([1, 10**12]),
            "n": random_.choice([1, 2, limits.MAX_CHOICES]),
            "service_tier": random_.choice(["default", "priority", "flex"]),
        }
        chosen = {name: value for name, value in optional.items() if random_.random() < 0.5}
        if len(chosen.keys() & {"max_tokens", "max_completion_tokens"}) > 1:
            del chosen["max_tokens"]
        model = random_.choice(["gpt-4o", "gpt-4o-mini", "o3-mini", "gpt-4.1", "nobody-knows-it"])
        told = await post(rig, json.dumps({"model": model, "messages": messages, **chosen}).encode())
        assert told.status == 200, told.body
        record = await rig.record(told.request_id)
        assert record.completion_tokens > 0
        assert held[-1] >= record.cost_nanousd > 0, (model, chosen)


def _held(rig: Rig) -> int:
    """The one open hold, in nano-USD, read while the provider has the request."""
    with Redis(unix_socket_path=str(rig.valkey.socket_path), decode_responses=True) as redis:
        holds = [redis.hgetall(key) for key in redis.scan_iter(match=f"{{{rig.namespace}}}:hold:*", count=1000)]
    (open_hold,) = [hold for hold in holds if hold["state"] == "open"]
    return int(open_hold["nanousd"])


# 29: two readings of where a request ends -----------------------------------------------------------------------------

TEXT = json.dumps(BODY).encode()
LENGTH = b"content-length: %d" % len(TEXT)
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(TEXT), TEXT)
SMUGGLED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: 0\r\n\r\n"


AMBIGUOUS: dict[str, tuple[tuple[bytes, ...], bytes]] = {
    "length and chunked": ((LENGTH, b"transfer-encoding: chunked"), CHUNKS),
    "chunked and length": ((b"transfer-encoding: chunked", b"content-length: 4"), CHUNKS),
    "two lengths": ((LENGTH, b"content-length: 3"), TEXT),
    "same length twice": ((LENGTH, LENGTH), TEXT),
    "list of lengths": ((LENGTH + b", %d" % len(TEXT),), TEXT),
    "plus": ((b"content-length: +%d" % len(TEXT),), TEXT),
    "negative": ((b"content-length: -1",), TEXT),
    "hexadecimal": ((b"content-length: 0x10",), TEXT),
    "space before the colon": ((b"content-length : %d" % len(TEXT),), TEXT),
    "chunked and identity": ((b"transfer-encoding: chunked", b"transfer-encoding: identity"), CHUNKS),
    "identity, chunked": ((b"transfer-encoding: identity, chunked",), CHUNKS),
    "xchunked": ((b"transfer-encoding: xchunked",), CHUNKS),
    "vertical tab": ((b"transfer-encoding:\x0bchunked",), CHUNKS),
    "space before chunked's colon": ((b"transfer-encoding : chunked",), CHUNKS),
    "NUL": ((LENGTH, b"x-a: b\0c"), TEXT),
    "bare LF in chunks": ((b"transfer-encoding: chunked",), CHUNKS.replace(b"\r\n", b"\n")),
    "bare LF after an extension": ((b"transfer-encoding: chunked",), b"%x;a\n%s\r\n0\r\n\r\n" % (len(TEXT), TEXT)),
    "negative chunk": ((b"transfer-encoding: chunked",), b"-1\r\n" + TEXT),
    "0x in a chunk's size": ((b"transfer-encoding: chunked",), b"0x" + CHUNKS),
    "huge chunk": ((b"transfer-encoding: chunked",), b"f" * 18 + b"\r\n" + TEXT),
}


async def test_29_an_ambiguous_length_is_refused_by_envoy(rig: Rig) -> None:
    """Envoy closes the connection, with 400 in its log: a reply goes past the gate, and would come too late."""
    before = len(rig.provider.received)
    attempts = [raw(rig, head(rig, *lines) + body + SMUGGLED) for lines, body in AMBIGUOUS.values()]
    answers = dict(zip(AMBIGUOUS, await asyncio.gather(*attempts), strict=True))
    assert [name for name, answer in answers.items() if answer and not answer.startswith(b"HTTP/1.1 400 ")] == []
    assert [name for name, answer in answers.items() if answer.count(b"HTTP/1.1 ") > 1] == []
    assert len(rig.provider.received) == before


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        (b"accept: a\ntransfer-encoding: chunked", None),
        (b"accept: a\nx-evil: 1", "a"),
        (b"accept: a\r\n x-evil: 1", "a x-evil: 1"),
        (b"accept: a\rx-evil: 1", "ax-evil: 1"),
    ],
    ids=["bare LF before chunked", "bare LF", "folded line", "bare CR"],
)
async def test_29_a_line_end_that_envoy_takes_is_not_passed_on(rig: Rig, line: bytes, seen: str | None) -> None:
    """A bare LF ends a line (RFC 9112, 2.2). What it ends is judged, and the provider gets lines of Envoy's own."""
    before = len(rig.provider.received)
    await raw(rig, head(rig, LENGTH, line) + TEXT)
    received = rig.provider.received[before:]
    assert [request.header("accept") for request in received] == ([] if seen is None else [seen])
    assert all(json.loads(request.body)["messages"] == BODY["messages"] for request in received)
    assert all(request.header("x-evil") is None for request in received)


async def test_29_a_whole_head_with_bare_line_feeds_is_one_request(rig: Rig) -> None:
    before = len(rig.provider.received)
    answer = await raw(rig, head(rig, LENGTH, end=b"\n") + TEXT)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert len(rig.provider.received) == before + 1


async def test_29_a_second_request_after_the_first_is_judged_by_itself(rig: Rig) -> None:
    """Pipelined, and so not smuggled: it has no token of its own."""
    before = len(rig.provider.received)
    first = head(rig, LENGTH).replace(b"connection: close\r\n", b"")
    last = SMUGGLED.replace(b"content-length: 0", b"connection: close\r\ncontent-length: 0")
    answer = await raw(rig, first + TEXT + last)
    assert re.findall(rb"HTTP/1.1 (\d+) ", answer) == [b"200", b"401"]
    assert len(rig.provider.received) == before + 1


# 30: paths ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/chat/completions?", "/v1/chat/completions?a=../../x", "/v1/../v1/chat/completions"),
        *("/v1/./chat/completions", "/v1//chat/completions", "//v1/chat/completions", "/v1/x/../chat/completions"),
        *("/v1/%2e%2e/v1/chat/completions", "/v1/chat/%63ompletions", "/v1/chat\\completions"),
    ],
)
async def test_30_another_spelling_of_the_path_is_the_same_path(rig: Rig, path: str) -> None:
    before = len(rig.provider.received)
    answer = await raw(rig, head(rig, LENGTH, path=path.encode()) + TEXT)
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert [request.target for request in rig.provider.received[before:]] == [CHAT]


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/v1/chat/completions/", 404, "unknown_url"),
        ("/V1/chat/completions", 404, "unknown_url"),
        ("/v1/Chat/Completions", 404, "unknown_url"),
        ("/v1/chat/completions;a=b", 404, "unknown_url"),
        ("/v1/chat/completions%20", 404, "unknown_url"),
        ("/v1/chat/completions/../completionsx", 404, "unknown_url"),
        ("/v1/files", 404, "unknown_url"),
        ("/v1/audio/speech", 404, "unknown_url"),
        ("/", 404, "unknown_url"),
        ("/healthz/", 404, "unknown_url"),
        ("/v1/chat%2fcompletions", 400, "path_normalization_failed"),
        ("/v1/chat%5ccompletions", 400, "path_normalization_failed"),
        ("/v1/chat/completions%00", 400, "path_normalization_failed"),
        ("/v1/chat/completions#a", 400, "path_normalization_failed"),
        ("/../../../v1/chat/completionsx", 404, "unknown_url"),
    ],
)
async def test_30_any_other_path_is_refused(rig: Rig, path: str, status: int, code: str) -> None:
    before = len(rig.provider.received)
    answer = await raw(rig, head(rig, LENGTH, path=path.encode()) + TEXT)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"].startswith(code)
    assert len(rig.provider.received) == before


# 31: headers ----------------------------------------------------------------------------------------------------------

SPOOFED = {
    "x-tollgate-internal-route": "nowhere",
    "x-tollgate-internal-anything": "1",
    "X-Tollgate-Internal-Case": "1",
    "x-tollgate-role": "target",
    "x-envoy-original-path": "/healthz",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-max-retries": "99",
    "x-envoy-retry-on": "5xx",
    "x-envoy-hedge-on-per-try-timeout": "true",
    "x-envoy-expected-rq-timeout-ms": "1",
    "x-envoy-internal": "true",
    "x-envoy-decorator-operation": "x",
    "x-goog-authenticated-user-email": "accounts.google.com:root@people.example",
    "x-goog-iap-jwt-assertion": "x",
    "x-serverless-authorization": "Bearer x",
    "x-forwarded-for": "127.0.0.1, 10.0.0.1",
    "x-forwarded-host": "evil.example",
    "x-forwarded-proto": "https",
    "x-forwarded-client-cert": "By=x",
    "forwarded": "for=127.0.0.1",
    "x-real-ip": "127.0.0.1",
    "x-original-url": "/healthz",
    "x-rewrite-url": "/healthz",
    "x-http-method-override": "GET",
    "x-request-id": "00000000-0000-4000-8000-000000000000",
    "x-client-trace-id": "x",
    "x-b3-traceid": "x",
    "proxy-authorization": "Basic eDp5",
    "proxy-connection": "keep-alive",
    "keep-alive": "timeout=9",
    "te": "trailers",
    "trailer": "x-a",
    "upgrade": "h2c",
    "http2-settings": "AAMAAABkAARAAAAAAAIAAAAA",
    "connection": "keep-alive, x-hop, upgrade, http2-settings",
    "x-hop": "1",
    "cookie": "a=b",
    "api-key": "x",
    "x-api-key": "x",
    "openai-organization": "org-evil",
    "openai-project": "proj-evil",
    "openai-beta": "assistants=v2",
    "user-agent": "caller/1",
    "x-stainless-lang": "python",
    "referer": "http://x",
    "origin": "http://x",
    "accept-encoding": "gzip, br",
    "accept-language": "de",
    "range": "bytes=0-1",
    "if-none-match": "x",
    "expect": "100-continue",
    "x_under_score": "1",
}
PASSED = {
    "accept": "text/event-stream",
    "traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "tracestate": "a=b",
}


async def test_31_the_provider_gets_exactly_these_headers(rig: Rig) -> None:
    before = len(rig.provider.received)
    lines = (f"{name}: {value}".encode() for name, value in {**SPOOFED, **PASSED}.items())
    sent = head(rig, LENGTH, *lines).replace(b"connection: close\r\n", b"")
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(sent + TEXT)
    await reader.readuntil(b"HTTP/1.1 200 OK\r\n")
    answered = dict(line.split(b": ", 1) for line in (await reader.readuntil(b"\r\n\r\n")).splitlines() if line)
    writer.close()
    (request,) = rig.provider.received[before:]
    assert len(dict(request.headers)) == len(request.headers)
    assert dict(request.headers) == {
        "host": "127.0.0.1",
        "authorization": f"Bearer {PROVIDER_KEY}",
        "content-type": "application/json",
        "content-length": str(len(request.body)),
        "accept-encoding": "identity",
        **PASSED,
    }
    assert request.method == "POST"
    assert answered[b"x-request-id"].decode() != SPOOFED["x-request-id"]
    assert not any(name.startswith((b"x-envoy", b"x-tollgate")) for name in answered)


@pytest.mark.parametrize(
    ("name", "status"),
    [("authorization", 401), ("x-tollgate-user", 400), ("x-llm-provider", 400), ("content-type", 415)],
)
async def test_31_a_header_that_decides_something_occurs_once(rig: Rig, name: str, status: int) -> None:
    before = len(rig.provider.received)
    lines = [f"{name}: a".encode(), f"{name}: b".encode()]
    answer = await raw(rig, head(rig, LENGTH, *lines) + TEXT)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert len(rig.provider.received) == before


async def test_31_what_the_provider_says_of_itself_stays_here(rig: Rig) -> None:
    shown = {"content-type": "application/json", "openai-processing-ms": "5", "cache-control": "no-store"}
    kept_back = {
        "x-request-id": "providers-own",
        "set-cookie": "a=b",
        "location": "http://provider",
        "openai-organization": "org-gateways",
        "x-ratelimit-remaining-tokens": "1",
        "x-tollgate-internal-route": "x",
        "x-tollgate-budget": "spoofed",
        "x-envoy-upstream-service-time": "1",
        "x-envoy-attempt-count": "77",
        "alt-svc": "h3",
        "www-authenticate": "Bearer",
        "server": "provider",
    }
    script = whole()
    rig.answer(Script(headers=tuple((shown | kept_back).items()), chunks=script.chunks, whole=True))
    told = await rig.ask()
    rest = {name: value for name, value in told.headers.items() if name not in shown}
    assert told.status == 200
    assert {name: told.headers[name] for name in shown} == shown
    assert set(rest) == {"content-length", "date", "server", "x-request-id"}
    assert rest["server"] == "tollgate"
    assert rest["x-request-id"] != "providers-own"
    assert (await rig.record(told.request_id)).attempts == 1


# 32: tokens -----------------------------------------------------------------------------------------------------------


def _b64(data: bytes | dict[str, Any]) -> str:
    text = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def _forged(rig: Rig, decoy: str) -> dict[str, str]:
    """Tokens that must not be taken, by what is wrong with them. All that should be right in each of them is."""
    now = int(time.time())
    good = rig.token()
    head_, payload, signature = good.split(".")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    kid = rig.issuer.kid
    pem = rig.issuer.certificates()[kid]
    attackers = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    own = DevIssuer(attackers)

    def hs256(header: dict[str, Any], key: bytes) -> str:
        signed = f"{_b64(header)}.{_b64(claims)}"
        return f"{signed}.{_b64(hmac.new(key, signed.encode(), hashlib.sha256).digest())}"

    def signed_with(header: dict[str, Any]) -> str:
        """Signed by the attacker's own key, whose place its header names."""
        signed = f"{_b64(header)}.{_b64(claims)}"
        return f"{signed}.{_b64(attackers.sign(signed.encode(), padding.PKCS1v15(), hashes.SHA256()))}"

    other = own.mint(SERVICE, AUDIENCE, 3600, now)
    return {
        "none": f"{_b64({'alg': 'none', 'kid': kid})}.{payload}.",
        "none with a signature": f"{_b64({'alg': 'none', 'kid': kid})}.{payload}.{signature}",
        "NONE": f"{_b64({'alg': 'nOnE', 'kid': kid})}.{payload}.{signature}",
        "HS256 with the public key": hs256({"alg": "HS256", "kid": kid, "typ": "JWT"}, pem.encode()),
        "HS256 with nothing": hs256({"alg": "HS256", "kid": kid}, b""),
        "RS512": f"{_b64({'alg': 'RS512', 'kid': kid})}.{payload}.{signature}",
        "another key": other,
        "another key under our kid": f"{head_}.{other.split('.')[1]}.{other.split('.')[2]}",
        "jku": signed_with({"alg": "RS256", "kid": kid, "jku": f"{decoy}/jku"}),
        "jku and unknown kid": signed_with({"alg": "RS256", "kid": "evil", "jku": f"{decoy}/jku"}),
        "x5u": signed_with({"alg": "RS256", "kid": "evil2", "x5u": f"{decoy}/x5u"}),
        "jwk": signed_with({"alg": "RS256", "kid": "evil3", "jwk": {"kty": "RSA", "e": "AQAB", "n": "AQAB"}}),
        "kid is a path": signed_with({"alg": "RS256", "kid": "../../../../dev/null"}),
        "kid is a URL": signed_with({"alg": "RS256", "kid": f"{decoy}/kid"}),
        "kid is SQL": signed_with({"alg": "RS256", "kid": "x' UNION SELECT 'key"}),
        "kid is a list": signed_with({"alg": "RS256", "kid": [kid]}),
        "no kid": signed_with({"alg": "RS256"}),
        "crit": signed_with({"alg": "RS256", "kid": kid, "crit": ["b64"], "b64": False}),
        "issuer is the decoy": rig.token(iss=decoy),
        "no issuer": rig.token(iss=None),
        "other audience": rig.issuer.mint(SERVICE, "https://other.example", 3600, now),
        "audience with a suffix": rig.token(aud=AUDIENCE + ".evil.example"),
        "audience of numbers": rig.token(aud=[1, AUDIENCE]),
        "expired": rig.token(iat=now - 7200, exp=now - 3600),
        "never expires": rig.token(exp=2**62),
        "no expiry": rig.token(exp=None),
        "not yet": rig.token(nbf=now + 3600),
        "email not verified": rig.token(email_verified=False),
        "email verified in words": rig.token(email_verified="true"),
        "no email": rig.token("nobody"),
        "changed payload": f"{head_}.{_b64(claims | {'email': 'root@people.example'})}.{signature}",
        "cut signature": good[:-4],
        "padded": good + "==",
        "four parts": good + ".x",
        "two parts": f"{head_}.{payload}",
        "signature removed by Cloud Run": f"{head_}.{payload}.SIGNATURE_REMOVED_BY_GOOGLE",
        "an API key": "sk-proj-0123456789",
        "too long": "a" * 20_000,
    }


async def test_32_no_forged_token_is_taken_and_nothing_is_fetched_for_it(rig: Rig) -> None:
    asked: list[str] = []

    async def decoy(request: Request) -> Response:
        asked.append(request.target)
        return Response(200, (JSON,), json.dumps(rig.issuer.certificates()).encode())

    server = await serve(decoy)
    before = len(rig.provider.received)
    url = f"http://127.0.0.1:{server.port}"
    async with httpx.AsyncClient(base_url=rig.url, timeout=30) as client:
        for name, token in _forged(rig, url).items():
            answer = await client.post(CHAT, json=BODY, headers={"authorization": f"Bearer {token}"})
            told = Told(answer.status_code, answer.headers, answer.content)
            assert told.status == 401, (name, told.body)
            assert_openais_shape(told, 401, "invalid_api_key")
            assert told.headers["www-authenticate"] == "Bearer", name
            assert token not in told.body.decode(), name
            assert (await rig.record(told.request_id)).service is None, name
        for scheme in ("", "Basic eDp5", "bearer", f"Bearer  {rig.token()}", f"Bearer {rig.token()} {rig.token()}"):
            answer = await client.post(CHAT, json=BODY, headers={"authorization": scheme})
            assert answer.status_code == 401, scheme
        assert (await client.post(CHAT, json=BODY)).status_code == 401
        in_the_url = await client.post(f"{CHAT}?access_token={rig.token()}", json=BODY)
        assert (in_the_url.status_code, in_the_url.json()["error"]["code"]) == (400, "credential_in_url")
    await server.close()
    assert asked == []
    assert len(rig.provider.received) == before


@pytest.mark.parametrize("email", ["someone@elsewhere.example", "x@test.iam.gserviceaccount.com.evil.example"])
async def test_32_a_verified_stranger_is_told_so(rig: Rig, email: str) -> None:
    before = len(rig.provider.received)
    assert_openais_shape(await rig.ask(email), 403, "caller_not_allowed")
    assert len(rig.provider.received) == before


async def test_32_a_stripped_signature_is_explained(rig: Rig) -> None:
    token = rig.token().rpartition(".")[0] + ".SIGNATURE_REMOVED_BY_GOOGLE"
    told = await post(rig, TEXT, authorization=f"Bearer {token}")
    assert_openais_shape(told, 401, "invalid_api_key")
    assert told.error is not None
    assert "x-serverless-authorization" in told.error["message"]
    assert "invoker-iam-disabled" in told.error["message"]


# 34: addresses from the caller ----------------------------------------------------------------------------------------


async def test_34_no_address_of_the_callers_is_ever_connected_to(rig: Rig) -> None:
    connections: list[bytes] = []

    async def note(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(await reader.read(1000))
        writer.close()

    decoy = await asyncio.start_server(note, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{decoy.sockets[0].getsockname()[1]}"
    host = url.removeprefix("http://")
    before, cases = len(rig.provider.received), 0
    names = (
        "base_url",
        "api_base",
        "baseURL",
        "openai_api_base",
        "url",
        "endpoint",
        "host",
        "proxy",
        "callback",
        "aws",
    )
    for name in names:
        told = await post(rig, json.dumps(BODY | {name: url}).encode())
        assert told.status in (200, 400)  # refused where the name is one of OpenAI's clients' own
        cases += told.status == 200
    for model in (url, f"openai/{url}", f"{url}/gpt-4o", "http://169.254.169.254/latest", "file:///etc/passwd"):
        await post(rig, json.dumps(BODY | {"model": model}).encode())
        cases += 1
    for provider in (url, host, "..", "extproc", "undecided", "", "azure", "openai,extproc", "openai@x"):
        told = await post(rig, TEXT, **{"x-llm-provider": provider})
        assert told.status == 400, (provider, told.body)
    for name in ("host", "x-forwarded-host", "x-envoy-original-dst-host", "x-original-host", "x-host"):
        await post(rig, TEXT, **{name: host})
        cases += 1
    for line, refused in (
        (f"POST {url}{CHAT} HTTP/1.1", False),
        (f"POST http://169.254.169.254{CHAT} HTTP/1.1", False),
        (f"POST https://{host}{CHAT} HTTP/1.1", True),
        (f"POST //{host}{CHAT} HTTP/1.1", True),
        (f"POST /{url}{CHAT} HTTP/1.1", True),
        (f"POST @{host}{CHAT} HTTP/1.1", True),
        (f"CONNECT {host} HTTP/1.1", True),
        (f"GET {url}/computeMetadata/v1/ HTTP/1.1", True),
        ("OPTIONS * HTTP/1.1", True),
    ):
        answer = await raw(rig, head(rig, LENGTH).replace(f"POST {CHAT} HTTP/1.1".encode(), line.encode()) + TEXT)
        assert answer.startswith(b"HTTP/1.1 200 ") is not refused, (line, answer)
        cases += not refused
    decoy.close()
    assert connections == []
    assert len(rig.provider.received) == before + cases
    assert {request.target for request in rig.provider.received[before:]} == {CHAT}
    assert {request.header("host") for request in rig.provider.received[before:]} == {"127.0.0.1"}
    # Envoy knows no other address.
    clusters = json.loads(await rig.admin("/clusters?format=json"))["cluster_statuses"]
    hosts = [host["address"] for cluster in clusters for host in cluster.get("host_statuses", [])]
    assert {address["socket_address"]["port_value"] for address in hosts if "socket_address" in address} == {
        rig.provider.port
    }
    assert {address["socket_address"]["address"] for address in hosts if "socket_address" in address} == {"127.0.0.1"}
    assert [address["pipe"] for address in hosts if "pipe" in address] == [{"path": str(rig.processors[0].socket)}]


# 35: the provider's key -----------------------------------------------------------------------------------------------

KEY = PROVIDER_KEY.encode()
REFLECTED = b'{"error":{"message":"Incorrect API key: Bearer %s, %s"}}' % (KEY, KEY)


def halves(data: bytes) -> list[bytes]:
    middle = data.index(KEY) + len(KEY) // 2
    return [data[:middle], data[middle:]]


def with_key(name: str) -> tuple[tuple[str, str], ...]:
    return ((name, f"v; k={PROVIDER_KEY}"),)


SECRET_HEADERS = tuple(
    pair
    for name in ("x-echo", "retry-after", "openai-processing-ms", "cache-control", "date", "x-request-id", "set-cookie")
    for pair in with_key(name)
)
ERRORS = {
    "a 400 in two halves": Script(400, (JSON,), halves(REFLECTED)),
    "a 400 byte by byte": Script(400, (JSON,), [bytes([byte]) for byte in REFLECTED]),
    "a 500 with a length": Script(500, (JSON,), halves(REFLECTED), whole=True),
    "a 429 in plain text": Script(429, (("content-type", "text/plain"),), [KEY]),
    "a 400 that is cut off": Script(400, (JSON,), halves(REFLECTED)[:1], fault="close"),
    "a 400 that is reset": Script(400, (JSON,), [REFLECTED], fault="reset"),
    "a 400 above the bound": Script(400, (JSON,), [b"x" * (limits.MAX_ERROR_BYTES - 5), REFLECTED]),
    "headers of a 400": Script(400, (JSON, *SECRET_HEADERS), [b"{}"]),
    "the type of a 400": Script(400, with_key("content-type"), [b"{}"]),
    "headers of a 400 without a body": Script(400, SECRET_HEADERS, [], whole=True),
    "a 401": Script(401, (JSON, *with_key("www-authenticate")), halves(REFLECTED)),
    "a 403": Script(403, (JSON,), halves(REFLECTED)),
    "a redirect": Script(302, (("location", f"http://127.0.0.1:1/?k={PROVIDER_KEY}"),), [REFLECTED]),
    "a permanent redirect": Script(308, (("location", f"http://127.0.0.1:1/?k={PROVIDER_KEY}"),), [REFLECTED]),
    "not modified": Script(304, with_key("etag"), [], whole=True),
    "no content": Script(204, with_key("etag"), [], whole=True),
    "gzip in name": Script(400, (JSON, ("content-encoding", "gzip")), [REFLECTED]),
    "an error with status 200": Script(200, (JSON,), [REFLECTED], whole=True),
    "plain text with status 200": Script(200, (("content-type", "text/plain"),), [KEY], whole=True),
    "headers of a 200": Script(200, (JSON, *SECRET_HEADERS), whole().chunks, whole=True),
}
STREAMS = {
    "an error event": [delta("a"), b"data: " + REFLECTED + b"\n\n", DONE],
    "an error event in two halves": [delta("a"), *halves(b"data: " + REFLECTED + b"\n\n"), DONE],
    "an error event by the byte": [bytes([byte]) for byte in delta("a") + b"data: " + REFLECTED + b"\n\n" + DONE],
    "an error event without an end": [delta("a"), *halves(b"data: " + REFLECTED)],
    "an error event that is no JSON": [delta("a"), *halves(b"event: error\ndata: " + KEY + b"\n\n"), DONE],
    "an error event first": [b"data: " + REFLECTED + b"\n\n"],
    "a comment": [delta("a"), *halves(b": " + KEY + b"\n\n"), delta("", finish="stop"), usage(9, 1), DONE],
    "an id": [*halves(b"id: " + KEY + b"\n" + delta("a")), delta("", finish="stop"), usage(9, 1), DONE],
    "the text": [*halves(delta(PROVIDER_KEY)), delta("", finish="stop"), usage(9, 1), DONE],
    "the end of a broken stream": [delta("a"), b"data: " + KEY],
}


@pytest.mark.parametrize("script", ERRORS.values(), ids=ERRORS.keys())
async def test_35_a_reflected_key_does_not_reach_the_caller(rig: Rig, script: Script) -> None:
    rig.answer(script)
    for stream in (False, True):
        await assert_the_key_stays(rig, await rig.ask(stream=stream))


@pytest.mark.parametrize("chunks", STREAMS.values(), ids=STREAMS.keys())
async def test_35_a_key_reflected_in_a_stream_does_not_reach_the_caller(rig: Rig, chunks: list[bytes]) -> None:
    rig.answer(Script(headers=(("content-type", "text/event-stream"), *with_key("x-echo")), chunks=chunks))
    told = await rig.ask(stream=True)
    assert told.status == 200
    await assert_the_key_stays(rig, told)


async def assert_the_key_stays(rig: Rig, told: Told) -> None:
    """The checker looks at logs, journal, Redis and the access log; it has something to look at."""
    assert PROVIDER_KEY not in str(told.headers.raw) + told.body.decode("latin-1")
    assert rig.provider.received[-1].header("authorization") == f"Bearer {PROVIDER_KEY}"
    assert (await rig.record(told.request_id)).status >= 200


async def test_35_the_logs_that_are_looked_at_are_not_empty(rig: Rig) -> None:
    rig.answer(ERRORS["a 400 in two halves"])
    told = await rig.ask()
    assert told.error == {"message": "Incorrect API key: Bearer [redacted], [redacted]"}
    await eventually(
        lambda: f'"request_id":"{told.request_id}"' in (rig.directory / "envoy.log").read_text(), "the access log"
    )
    assert (await rig.record(told.request_id)).outcome is Outcome.UPSTREAM_ERROR
    for text in (rig.everything_written(), str(await rig.balances())):
        assert PROVIDER_KEY not in text
        assert rig.minted[-1] not in text


# 37: trailers ---------------------------------------------------------------------------------------------------------


async def test_37_a_callers_trailers_go_nowhere(rig: Rig) -> None:
    before = len(rig.provider.received)
    trailers = b"0\r\nauthorization: Bearer x\r\nx-tollgate-internal-route: x\r\ncontent-length: 9\r\n\r\n"
    answer = await raw(rig, head(rig, b"transfer-encoding: chunked") + CHUNKS.replace(b"0\r\n\r\n", trailers))
    assert answer.startswith(b"HTTP/1.1 200 ")
    (request,) = rig.provider.received[before:]
    assert request.header("authorization") == f"Bearer {PROVIDER_KEY}"
    assert {"model", "messages", "max_completion_tokens"} == set(json.loads(request.body))


@pytest.mark.parametrize("stream", [False, True])
async def test_37_a_providers_trailers_are_dropped(rig: Rig, stream: bool) -> None:
    script = streamed(3) if stream else Script(headers=(JSON,), chunks=whole().chunks)
    rig.answer(replace(script, trailers=(("x-secret", PROVIDER_KEY), ("set-cookie", "a=b"))))
    body = json.dumps(BODY | {"stream": stream}).encode()
    answer = await raw(rig, head(rig, b"te: trailers", b"content-length: %d" % len(body)) + body)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n0\r\n\r\n")
    assert KEY not in answer
