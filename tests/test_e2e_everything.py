"""One run with everything on: a thousand requests of every kind, an outage of BigQuery, a key that is rotated.

Both containers run as the manifest defines them, with two workers. At the end Cloud Run's SIGTERM, and then the books:
what callers saw, what providers were asked, what is in BigQuery, in the ledger and in the telemetry must agree.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from redis import Redis

from extproc.exchange import CLIENT_GONE_STATUS
from extproc.local.provider import Received, Script
from extproc.local.valkey import LocalValkey, free_port
from extproc.providers import PROVIDERS
from extproc.records import Outcome, UsageRecord
from extproc.usage.sinks import UsageRow
from tests import voices
from tests.bigquery_server import FakeBigQuery, Fault
from tests.otlp_collector import Collector, attributes
from tests.rig import Rig, delta, eventually, key_of, running
from tests.secret_manager_server import SecretManagerServer
from tests.warehouse import warehouse

REQUESTS, AT_ONCE = 1_000, 64
BEFORE, MEANWHILE = 250, 550  # requests sent when the outage begins, and when it is over
SOME = 8  # streams that are open when OpenAI goes; and at SIGTERM

# The keys of OpenAI, two versions, and of Anthropic.
OLD, NEW, OTHER = "sk-canary-v1-0123456789", "sk-canary-v2-0123456789", "sk-ant-canary-0123456789"
PASSWORD = "canary-password-0123456789"  # Redis's
DOMAIN = "test.iam.gserviceaccount.com"
POLICY = f"""\
identity:
  audiences: [https://tollgate.test]
  issuers: [https://accounts.google.com]
  allow: ["*@{DOMAIN}"]
  teams: {{thrifty: [thrifty@{DOMAIN}]}}
models:
  gpt: {{targets: [openai/gpt-4o]}}
  claude: {{targets: [anthropic/claude-sonnet-4-5]}}
  either: {{targets: [openai/gpt-4o, anthropic/claude-sonnet-4-5]}}
budgets:
  - {{scope: global, window: total, limit_usd: 1000}}
  - {{scope: service, id: "*", window: total, limit_usd: 5}}
  - {{scope: service, id: "cut-*@{DOMAIN}", window: total, limit_tokens: 40}}
  - {{scope: team, id: thrifty, window: total, limit_usd: 0.000001, mode: soft}}
"""
_PLAINTEXT = ssl.create_default_context()  # httpx would make one for every client
WORDS = ("All", " of", " it", " is", " here", ".")
PROMPT, COMPLETION = 21, 17


@dataclass(frozen=True)
class Kind:
    """One kind of request, what its caller must see and its row must say. `status` is None where it left before."""

    status: int | None
    outcome: Outcome
    weight: int
    model: str = "gpt"
    stream: bool = False
    dialect: str = "openai"
    caller: str = "plain"  # a number is put in the place of #


KINDS = {
    "whole": Kind(200, Outcome.OK, 16),
    "stream": Kind(200, Outcome.OK, 16, stream=True),
    "thrifty": Kind(200, Outcome.OK, 4, stream=True, caller="thrifty"),
    "claude": Kind(200, Outcome.OK, 8, model="claude", dialect="anthropic"),
    "translated": Kind(200, Outcome.OK, 8, model="gpt", dialect="anthropic", stream=True),
    "failover": Kind(200, Outcome.OK, 8, model="either"),
    "failing stream": Kind(200, Outcome.OK, 8, model="either", stream=True),
    "cut": Kind(200, Outcome.CUT, 6, stream=True, caller="cut-#"),
    "used up": Kind(429, Outcome.REFUSED, 4, stream=True, caller="cut-0"),
    "leaves": Kind(200, Outcome.CLIENT_GONE, 6, stream=True),
    "leaves early": Kind(None, Outcome.CLIENT_GONE, 4, stream=True),
    "bad request": Kind(400, Outcome.UPSTREAM_ERROR, 4),
    "no token": Kind(401, Outcome.REFUSED, 3),
    "expired": Kind(401, Outcome.REFUSED, 3),
    "bad JSON": Kind(400, Outcome.REFUSED, 3),
    "unknown model": Kind(400, Outcome.REFUSED, 3, model="unknown"),
    "nowhere": Kind(404, Outcome.REFUSED, 3),
}
STREAM = Kind(200, Outcome.OK, 0, stream=True)
BREAKS = Kind(200, Outcome.CLIENT_GONE, 0, stream=True)  # docs/failures.md: seen as if the caller had left


@dataclass(frozen=True)
class Sent:
    """One request as its caller saw it."""

    kind: str
    status: int | None
    request_id: str | None
    told: bytes


@dataclass
class Run:
    """The stack, both sides of it, and what was sent."""

    rig: Rig
    fake: FakeBigQuery
    secrets: SecretManagerServer
    collector: Collector
    key: str = OLD  # the one that OpenAI accepts
    sent: list[Sent] = field(default_factory=list)
    arrived: dict[str, asyncio.Event] = field(default_factory=dict)  # by prompt, of those who leave when it has come
    tokens: dict[str, str] = field(default_factory=dict)
    begun: int = 0  # answers of which something has come
    numbers: Iterator[int] = field(default_factory=itertools.count)

    # Providers --------------------------------------------------------------------------------------------------------

    def openai(self, request: Received) -> Script:
        """It says the key again wherever it can: none of that may reach a caller."""
        key = (request.header("authorization") or "").removeprefix("Bearer ")
        if key != self.key:
            return voices.failed("openai", 401, f"Incorrect API key provided: {key}.")
        match _kind_of(request):
            case "cut":
                return Script(chunks=[delta(" word")] * 50, fault="hang")
            case "leaves" | "breaks":
                return Script(chunks=[delta(" word")] * 3, fault="hang")
            case "leaves early":
                self.arrived[_prompt_of(request)].set()
                return Script(first_pause_s=60, fault="drop")
            case "failover" | "failing stream":
                return voices.failed("openai", 500, f"Not with {key}.")
            case "bad request":
                return voices.failed("openai", 400, f"Not with {key}.")
            case "last":
                return voices.streamed("openai", WORDS, PROMPT, COMPLETION, pause_s=0.1)
            case "rotated":  # until every worker has the new key, not every one would know it in an answer
                return voices.streamed("openai", WORDS, PROMPT, COMPLETION)
        if b'"stream":true' in request.body:
            return voices.streamed("openai", (*WORDS, f" {key}"), PROMPT, COMPLETION)
        return voices.whole("openai", "".join(WORDS), PROMPT, COMPLETION)

    def anthropic(self, request: Received) -> Script:
        if b'"stream":true' in request.body:
            return voices.streamed("anthropic", WORDS, PROMPT, COMPLETION)
        return voices.whole("anthropic", "".join(WORDS), PROMPT, COMPLETION)

    # Callers ----------------------------------------------------------------------------------------------------------

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.rig.url, timeout=60, verify=_PLAINTEXT)

    async def send(self, client: httpx.AsyncClient, name: str, kind: Kind | None = None) -> None:
        kind = kind or KINDS[name]
        prompt = f"<{name} {next(self.numbers)}>"
        caller = voices.CALLERS[kind.dialect]
        path = caller.path if name != "nowhere" else "/v1/nowhere"
        body = json.dumps(caller.fields(prompt, kind.stream) | {"model": kind.model}).encode()
        request = client.build_request(
            "POST",
            path,
            headers={"content-type": "application/json", **self._credential(name, kind, prompt)},
            content=body if name != "bad JSON" else body[:-1],
        )
        if name == "leaves early":
            await self._leave_early(client, request, prompt)
            return
        answer = await client.send(request, stream=True)
        told = bytearray()
        try:
            async for part in answer.aiter_raw():
                self.begun += not told
                told += part
                if name == "leaves":
                    break
        except httpx.RemoteProtocolError:
            assert name in ("cut", "breaks")
        finally:
            await answer.aclose()
        said = repr(answer.headers.raw).encode() + bytes(told)
        self.sent.append(Sent(name, answer.status_code, answer.headers["x-request-id"], said))

    async def _leave_early(self, client: httpx.AsyncClient, request: httpx.Request, prompt: str) -> None:
        arrived = self.arrived[prompt] = asyncio.Event()
        asking = asyncio.ensure_future(client.send(request))
        await arrived.wait()
        asking.cancel()
        await asyncio.wait((asking,))
        self.sent.append(Sent("leaves early", None, None, b""))

    def _credential(self, name: str, kind: Kind, prompt: str) -> dict[str, str]:
        if name == "no token":
            return {}
        number = re.sub(r"\D", "", prompt)
        who = kind.caller.replace("#", number) if name != "expired" else name
        if who not in self.tokens:
            claims = {"exp": 1} if name == "expired" else {}
            self.tokens[who] = self.rig.token(f"{who}@{DOMAIN}", **claims)
        return {"authorization": f"Bearer {self.tokens[who]}"}

    async def send_mixed(self, upto: int) -> None:
        """Every kind by its weight, until so many have been sent in all. The same ones in every run."""
        weights = [kind.weight for kind in KINDS.values()]
        chosen = random.Random(upto).choices(list(KINDS), weights, k=upto - len(self.sent))
        names = iter(sorted(chosen, key=lambda name: name != "cut"))  # the slowest first: the others go on beside them

        async def send_some() -> None:
            async with self.client() as client:  # a pool for all of them would cost more than the gateway
                for name in names:
                    await self.send(client, name)

        await asyncio.gather(*(send_some() for _ in range(AT_ONCE)))

    async def rotate(self, client: httpx.AsyncClient) -> None:
        """A new version in Secret Manager; then the old key is refused, and each worker learns of it by that."""
        self.secrets.add("openai-key", NEW)
        self.key = NEW

        async def both_have_it() -> bool:
            both = self.rig.processors[0].log.count("secrets/openai-key/versions/2 is in use") == 2
            begun = len(self.sent)
            await asyncio.gather(*(self.send(client, "rotated", STREAM) for _ in range(8)))
            return both and all(one.status == 200 for one in self.sent[begun:])

        await eventually(both_have_it, "both workers to have the new key")

    async def break_some(self, client: httpx.AsyncClient) -> None:
        """OpenAI goes while it answers."""
        begun = self.begun
        streams = [asyncio.create_task(self.send(client, "breaks", BREAKS)) for _ in range(SOME)]
        await eventually(lambda: self.begun == begun + SOME, "streams to begin")
        async with self.rig.down("openai"):
            await asyncio.gather(*streams)

    # The books --------------------------------------------------------------------------------------------------------

    async def metrics(self) -> str:
        (port,) = re.findall(r"metrics on port (\d+)", self.rig.processors[0].log)
        async with httpx.AsyncClient() as client:
            return (await client.get(f"http://127.0.0.1:{port}/metrics")).text

    def rows(self) -> dict[str, UsageRecord]:
        """By request, as BigQuery's view `usage` has them."""
        log = [dict(row) for row in self.fake.rows["usage_log"]]
        db = warehouse(UsageRow(orphan=row.pop("orphan"), record=UsageRecord(**row)) for row in log)
        found = db.execute("SELECT * EXCLUDE (orphan, ts), ts::VARCHAR AS ts FROM usage")
        names = [column[0] for column in found.description or ()]
        rows = [UsageRecord(**dict(zip(names, row, strict=True))) for row in found.fetchall()]
        by_id = {row.request_id: row for row in rows}
        assert len(by_id) == len(rows), "the view has a request twice"
        return by_id


def _prompt_of(request: Received) -> str:
    found = re.search(rb"<[a-zA-Z ]+ \d+>", request.body)
    assert found is not None
    return found[0].decode()


def _kind_of(request: Received) -> str:
    return _prompt_of(request)[1:].rpartition(" ")[0]


@asynccontextmanager
async def everything(directory: Path) -> AsyncIterator[Run]:
    """The stack, and on this machine whatever it speaks with."""
    fake, collector, secrets = FakeBigQuery(forgets=True).start(), Collector(), SecretManagerServer().start()
    fake.create_tables()
    await collector.start()
    secrets.add("openai-key", OLD)
    secrets.add("anthropic-key", OTHER)
    port = free_port()
    valkey = LocalValkey(directory / "valkey", port=port, appendonly=True).start()
    with Redis(unix_socket_path=str(valkey.socket_path)) as redis:
        redis.config_set("requirepass", PASSWORD)
    environment = {
        **fake.environment,
        "TOLLGATE_SHIP": "1",
        "OPENAI_API_KEY_SECRET": "projects/p/secrets/openai-key/versions/latest",
        "ANTHROPIC_API_KEY_SECRET": "projects/p/secrets/anthropic-key/versions/1",
        "TOLLGATE_SECRET_MANAGER_ENDPOINT": secrets.endpoint,
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRIC_EXPORT_INTERVAL": "1000",
    }
    try:
        async with running(
            directory,
            policy=POLICY,
            workers_each=2,
            environment=environment,
            providers=("openai", "anthropic"),
            redis=(valkey, f"redis://:{PASSWORD}@127.0.0.1:{port}/0"),
            contained=True,
        ) as rig:
            run = Run(rig, fake, secrets, collector)
            rig.answer(run.openai, "openai")
            rig.answer(run.anthropic, "anthropic")
            yield run
    finally:
        valkey.stop()
        secrets.stop()
        await collector.close()
        fake.close()


@pytest.mark.asyncio
async def test_the_books_balance_after_everything(short_directory: Path) -> None:
    async with everything(short_directory) as run:
        async with run.client() as client:
            page = await _send_all(run, client)
        rows = run.rows()
        _assert_rows_are_what_callers_saw(rows, run.sent)
        balances = await run.rig.balances()
        assert sum(row.cost_nanousd for row in rows.values()) == balances["global/*/total/usd"].posted > 0
        assert all(balance.pending == 0 for balance in balances.values())
        spans = [attributes(span)["tollgate.request_id"] for span in run.collector.spans]
        assert len(spans) == len(set(spans))
        assert set(spans) <= rows.keys()
        _assert_nothing_leaked(run, page)


async def _send_all(run: Run, client: httpx.AsyncClient) -> str:
    """All requests, and the end. Returns the page of metrics as it was before the last ones."""
    await run.send(client, "cut")
    faults = iter([Fault(lost=True)])  # stored, and not acknowledged: those rows come twice
    run.fake.fault = lambda: next(faults, None)
    await run.send_mixed(BEFORE)
    refused = 0

    def refuse() -> Fault:
        nonlocal refused
        refused += 1
        return Fault(503)

    run.fake.fault = refuse
    await run.send(client, "whole")
    await eventually(lambda: refused, "the shipper to be refused")
    with run.fake.away():
        stored = len(run.fake.ids())
        await run.send_mixed((BEFORE + MEANWHILE) // 2)
        await run.rotate(client)
        await run.break_some(client)
        await run.send_mixed(MEANWHILE)
        assert len(run.fake.ids()) == stored
    run.fake.fault = lambda: None
    await run.send_mixed(REQUESTS - SOME)
    await eventually(lambda: len(run.fake.ids()) > stored, "rows to come again")
    page = await _page_of(run, REQUESTS - SOME)
    await _end(run, client)
    return page


async def _page_of(run: Run, requests: int) -> str:
    """The page, once it has counted so many."""
    page = ""

    async def counted() -> bool:
        nonlocal page
        page = await run.metrics()
        return sum(map(float, re.findall(r"^tollgate_requests_total\{.*\} (\S+)$", page, re.MULTILINE))) == requests

    await eventually(counted, "every request to be on the page")
    return page


async def _end(run: Run, client: httpx.AsyncClient) -> None:
    """SIGTERM to both containers at once, as Cloud Run sends it, while streams are open: they end whole."""
    since = len(run.rig.played)
    last = [asyncio.create_task(run.send(client, "last", STREAM)) for _ in range(SOME)]
    await eventually(
        lambda: sum(request.chunks_sent > 0 for request, _ in run.rig.played[since:]) == SOME, "the last streams"
    )
    run.rig.envoy.terminate()
    assert await run.rig.processors[0].stop() == 0
    await asyncio.gather(*last)
    assert "usage row not shipped" not in run.rig.processors[0].log


def _assert_rows_are_what_callers_saw(rows: dict[str, UsageRecord], sent: list[Sent]) -> None:
    assert len(sent) == REQUESTS
    told = {one.request_id: one for one in sent if one.request_id is not None}
    assert len(told) == sum(one.request_id is not None for one in sent), "two requests have the same id"
    assert told.keys() - rows.keys() == set()
    assert [(one, rows[name]) for name, one in told.items() if rows[name].status != one.status] == []
    untold = [row for name, row in rows.items() if name not in told]
    assert Counter((row.status, row.outcome) for row in untold) == {
        (CLIENT_GONE_STATUS, Outcome.CLIENT_GONE): REQUESTS - len(told)
    }
    seen = {(one.kind, rows[name].status, Outcome(rows[name].outcome)) for name, one in told.items()}
    assert seen == {
        *((name, kind.status, kind.outcome) for name, kind in KINDS.items() if kind.status is not None),
        *((name, 200, Outcome.OK) for name in ("rotated", "last")),
        ("breaks", 200, Outcome.CLIENT_GONE),
        ("rotated", 502, Outcome.UPSTREAM_ERROR),
    }
    by = Counter((one.kind, rows[name].provider, rows[name].attempts) for name, one in told.items())
    assert by["failover", "anthropic", 2]
    assert by["failing stream", "anthropic", 2]


def _assert_nothing_leaked(run: Run, page: str) -> None:
    """No key to anybody but its provider, no token to anybody but the gateway, the password to nobody."""
    tokens = run.rig.minted
    assert len(tokens) > 10
    canaries = {OLD, NEW, OTHER, PASSWORD, *map(key_of, ("openai", "anthropic"))}
    canaries |= {tokens[0].partition(".")[0], *(token.rpartition(".")[2] for token in tokens)}
    places = {str(path): path.read_bytes() for path in _files(run.rig.directory)}
    assert any(path.endswith("processor.log") for path in places)
    assert any("appendonly" in path for path in places)
    places["the metrics"] = page.encode()
    places["BigQuery"] = json.dumps([run.fake.rows, run.fake.inserts]).encode()
    places["OTLP"] = b"".join(one.SerializeToString() for one in (*run.collector.traces, *run.collector.metrics))
    places["OTLP's headers"] = repr(run.collector.headers).encode()
    places["callers"] = b"".join(one.told for one in run.sent)
    places["OpenAI"], places["Anthropic"] = _asked(run.rig, "openai"), _asked(run.rig, "anthropic")
    found = [(place, one) for place, text in places.items() for one in canaries if one.encode() in text]
    assert found == []
    assert b"[redacted]" in places["callers"]


def _files(directory: Path) -> Iterator[Path]:
    """All that anything has written there. Images are links to what was there before."""
    for folder, _, names in os.walk(directory):
        yield from (path for path in (Path(folder, name) for name in names) if path.is_file() and not path.is_symlink())


def _asked(rig: Rig, provider: str) -> bytes:
    """All that a provider was sent, but its own keys in their place."""
    keys = {"openai": (OLD, NEW), "anthropic": (OTHER,)}[provider]
    own = {pair for key in keys for pair in PROVIDERS[provider].auth_headers(key)}
    received = rig.providers[provider].received
    return repr([[pair for pair in one.headers if pair not in own] + [one.body] for one in received]).encode()
