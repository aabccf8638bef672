"""The real thing on loopback, for tests: Envoy, processors, Valkey and a scripted provider, on free ports.

Everything is the local stack's own code; only the provider's scripts and the faults are the tests'.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import yaml

from extproc.envoy_config import Places, render
from extproc.ledger import Ledger
from extproc.local.container import Process as Container
from extproc.local.envoy_check import envoy_binary
from extproc.local.http import Server
from extproc.local.issuer import CERTIFICATES_PATH, DevIssuer, serve_certificates
from extproc.local.provider import Received, Script, ScriptedProvider
from extproc.local.valkey import LocalValkey, free_port
from extproc.providers import PROVIDERS
from extproc.records import Balance, UsageRecord
from extproc.usage import journal
from extproc.workers import worker_socket
from tests import manifest_rig

AUDIENCE = "https://tollgate.test"
SERVICE = "ranker@test.iam.gserviceaccount.com"
CHAT_PATH = "/v1/chat/completions"
PROVIDER_KEY = "sk-canary-0123456789abcdef"  # OpenAI's


def key_of(provider: str) -> str:
    """A provider's key: a canary, which must reach nobody else."""
    return PROVIDER_KEY if provider == "openai" else f"canary-{provider}-0123456789abcdef"


POLICY = """\
identity:
  audiences: [https://tollgate.test]
  issuers: [https://accounts.google.com]
  allow: ["*@test.iam.gserviceaccount.com", "*@people.example"]
  delegates: [frontend@test.iam.gserviceaccount.com]
  teams: {search: [ranker@test.iam.gserviceaccount.com]}
models:
  "*": {targets: ["openai/*"]}
prices:
  "*": {input_usd_per_mtok: 10, output_usd_per_mtok: 30}
budgets:
"""

_START_TIMEOUT_S = 20.0

decode = cache(journal.decode)  # tests that poll for a row read the same lines many times


_PLAINTEXT = ssl.create_default_context()  # made once: every httpx client would make its own, which is slow


@dataclass(frozen=True)
class Told:
    """All that a caller was told. `broken` is how its connection failed before the end, if it did."""

    status: int
    headers: httpx.Headers
    body: bytes
    broken: Exception | None = None

    @property
    def request_id(self) -> str:
        return str(self.headers["x-request-id"])

    @property
    def events(self) -> list[bytes]:
        """The events of a stream, each with its blank line."""
        return [block + b"\n\n" for block in self.body.split(b"\n\n") if block]

    @property
    def error(self) -> dict[str, Any] | None:
        """The error of the answer, or of its last event."""
        last = self.body
        if self.events and not last.startswith(b"{"):
            last = self.events[-1].partition(b"data: ")[2]  # behind its name, where it has one
        with suppress(ValueError):
            error: dict[str, Any] | None = json.loads(last).get("error")
            return error
        return None


@dataclass
class Processor:
    """One processor process."""

    socket: Path
    state_dir: Path
    environment: Mapping[str, str]
    workers: int = 1
    container: Container | None = None
    process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        log = (self.state_dir / "processor.log").open("ab")
        command: tuple[str, ...] = (sys.executable, "-m", "extproc", "serve", "--workers", str(self.workers))
        if self.container is not None:
            command = manifest_rig.executable(self.container)
        directory = self.container.directory if self.container is not None else None
        self.process = await asyncio.create_subprocess_exec(
            *command, env=dict(self.environment), cwd=directory, stdout=log, stderr=log
        )
        log.close()

    @property
    def log(self) -> str:
        return (self.state_dir / "processor.log").read_text()

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.process is not None
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)
        return await self.process.wait()


@dataclass
class Rig:
    """A running gateway. `provider` is OpenAI's stand-in, `providers` are all of them by name."""

    directory: Path
    valkey: LocalValkey
    providers: Mapping[str, ScriptedProvider]
    issuer: DevIssuer
    keys: Server
    processors: list[Processor]
    envoy: asyncio.subprocess.Process
    port: int
    admin_port: int
    namespace: str
    redis_url: str
    policy_path: Path
    envoys_container: Container | None = None
    scripts: dict[str, Callable[[Received], Script]] = field(default_factory=dict)
    played: list[tuple[Received, Script]] = field(default_factory=list)  # what the providers were asked and answered
    minted: list[str] = field(default_factory=list)  # every ID token, for canaries
    told: list[Told] = field(default_factory=list)  # everything that `ask` was told

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def provider(self) -> ScriptedProvider:
        return self.providers["openai"]

    def answer(self, script: Script | Callable[[Received], Script], provider: str = "openai") -> None:
        """What a provider answers from now on."""
        self.scripts[provider] = script if callable(script) else lambda _: script

    def token(self, email: str = SERVICE, **claims: Any) -> str:
        token = self.issuer.mint(email, AUDIENCE, 3600, time.time(), **claims)
        self.minted.append(token)
        return token

    def client(self, email: str = SERVICE, **options: Any) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {self.token(email)}", **options.pop("headers", {})}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=30, **options)

    async def ask(
        self,
        email: str = SERVICE,
        *,
        http2: bool = False,
        headers: Mapping[str, str] | None = None,
        path: str = CHAT_PATH,
        **fields: Any,
    ) -> Told:
        """One call, read to its end or until it breaks. `fields` are the body's; a chat call of OpenAI's needs none.

        The checker knows by `user`, or by an address anywhere else in the body, who a provider was asked for.
        """
        chat = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hi"}], "user": email}
        body = chat | fields if path == CHAT_PATH else fields
        broken: Exception | None = None
        received = bytearray()
        async with (
            self.client(email, http1=not http2, http2=http2, verify=_PLAINTEXT, headers=headers or {}) as client,
            client.stream("POST", path, json=body) as answer,
        ):
            try:
                async for part in answer.aiter_raw():
                    received += part
            except httpx.TransportError as error:
                broken = error
        told = Told(answer.status_code, answer.headers, bytes(received), broken)
        self.told.append(told)
        return told

    @asynccontextmanager
    async def down(self, provider: str) -> AsyncIterator[None]:
        """A provider that refuses connections."""
        port = self.providers[provider].port
        await self.providers[provider].close()
        try:
            yield
        finally:
            await self.providers[provider].start(port=port)

    async def set_policy(self, text: str) -> None:
        """Write the policy, and wait until every processor has taken it."""
        seen = [processor.log.count("is in use") for processor in self.processors]
        self.policy_path.write_text(text)
        await eventually(
            lambda: all(p.log.count("is in use") > n for p, n in zip(self.processors, seen, strict=True)),
            "the policy's reload",
        )

    @asynccontextmanager
    async def ledger(self) -> AsyncIterator[Ledger]:
        ledger = Ledger(self.redis_url, namespace=self.namespace, timeout_ms=30_000)  # a slow machine proves nothing
        try:
            yield ledger
        finally:
            await ledger.close()

    async def balances(self) -> dict[str, Balance]:
        async with self.ledger() as ledger:
            return {balance.budget.id: balance for balance in await ledger.balances()}

    def records(self) -> list[UsageRecord]:
        """Every row of every processor's journal; a request's own row takes the place of an orphan's."""
        rows: dict[str, UsageRecord] = {}
        own: set[str] = set()
        count: dict[str, int] = {}
        for processor in self.processors:
            for segment in sorted((processor.state_dir / "journal").glob("usage-*.jsonl")):
                written, _, _ = segment.read_bytes().rpartition(b"\n")  # the last line may be on its way
                for line in written.splitlines():
                    row = decode(line)
                    request_id = row.record.request_id
                    if not row.orphan:
                        own.add(request_id)
                        count[request_id] = count.get(request_id, 0) + 1
                    if not row.orphan or request_id not in own:
                        rows[request_id] = row.record
        doubled = {request_id: n for request_id, n in count.items() if n > 1}
        assert not doubled, f"more than one usage row: {doubled}"
        return list(rows.values())

    async def record(self, request_id: str) -> UsageRecord:
        """The row of one request, once it has been written."""
        found: list[UsageRecord] = []

        def written() -> bool:
            found[:] = [record for record in self.records() if record.request_id == request_id]
            return bool(found)

        await eventually(written, f"the record of {request_id}")
        return found[0]

    async def row_of(self, who: str) -> UsageRecord:
        """The one row of a caller; its own one where an orphan's was written first."""
        rows: list[UsageRecord] = []

        def recorded() -> bool:
            rows[:] = [record for record in self.records() if record.service == who]
            return bool(rows)

        await eventually(recorded, f"the row of {who}")
        (row,) = rows
        return row

    async def posted_tokens(self, who: str) -> int:
        """What a caller's budget of tokens in total has used. One of which nothing was used may be forgotten."""
        balance = (await self.settled()).get(f"service/{who}/total/tokens")
        return balance.posted if balance is not None else 0

    async def settled(self) -> dict[str, Balance]:
        """The balances, once nothing is pending any more."""
        balances: dict[str, Balance] = {}

        async def nothing_pending() -> bool:
            balances.clear()
            balances.update(await self.balances())
            return all(balance.pending == 0 for balance in balances.values())

        await eventually(nothing_pending, "pending to return to zero")
        return balances

    async def kill_envoy(self) -> None:
        os.killpg(self.envoy.pid, signal.SIGKILL)  # in a container, Envoy is not the first process
        await self.envoy.wait()

    async def start_envoy(self) -> None:
        self.envoy = await _start_envoy(self.directory, self.envoys_container)

    async def ready(self) -> None:
        async with httpx.AsyncClient() as client:

            async def healthy() -> bool:
                with suppress(httpx.HTTPError):
                    # All processors that run, and not only the one that would be asked now.
                    running = (p for p in self.processors if p.process is not None and p.process.returncode is None)
                    alive = sum(p.workers for p in running)
                    members = await self.admin("/stats?filter=cluster.extproc.membership_healthy")
                    asked = [await client.get(f"{self.url}/healthz") for _ in range(4 * alive)]
                    return members.strip().endswith(f": {alive}") and all(a.status_code == 200 for a in asked)
                return False

            await eventually(healthy, "the gateway to be ready")

    async def admin(self, path: str) -> str:
        async with httpx.AsyncClient() as client:
            return (await client.get(f"http://127.0.0.1:{self.admin_port}{path}")).text

    def everything_written(self) -> str:
        """All logs and journals, for canaries."""
        texts = []
        for path in self.directory.rglob("*"):
            if path.is_file() and path.suffix in (".log", ".jsonl") and "valkey" not in path.parts:
                texts.append(path.read_text(errors="replace"))
        return "\n".join(texts)


async def eventually(condition: Callable[[], Any], what: str, timeout_s: float = _START_TIMEOUT_S) -> None:
    """Wait until `condition` (which may be a coroutine function) is true."""
    deadline = time.monotonic() + timeout_s
    while True:
        result = condition()
        if asyncio.iscoroutine(result):
            result = await result
        if result:
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s for {what}")
        await asyncio.sleep(0.02)


@asynccontextmanager
async def running(
    directory: Path,
    *,
    budgets: str = "  []\n",
    policy: str | None = None,
    processors: int = 1,
    workers_each: int = 1,
    environment: Mapping[str, str] | None = None,
    base_url: Callable[[ScriptedProvider], str] | None = None,
    base_urls: Mapping[str, str] | None = None,
    providers: tuple[str, ...] = ("openai",),
    places: Mapping[str, Any] | None = None,
    tls: Any = None,
    tune: Callable[[dict[str, Any]], None] | None = None,
    redis: tuple[LocalValkey, str] | None = None,
    beside: Rig | None = None,
    contained: bool = False,
) -> AsyncIterator[Rig]:
    """A gateway of its own, in `directory`, taken down at the end. `tune` changes Envoy's configuration.

    `base_urls` are of providers that are somebody else than the rig's own. `redis` is a server that runs already, and
    what the processors are told of it. `beside`: another instance of that gateway, with the same providers, issuer,
    policy and Redis. `contained`: always as the manifest defines it.
    """
    scripts: dict[str, Callable[[Received], Script]] = beside.scripts if beside else {}
    played: list[tuple[Received, Script]] = beside.played if beside else []

    def chooser(name: str) -> Callable[[Received], Script]:
        def choose(request: Received) -> Script:
            script = scripts[name](request)
            played.append((request, script))
            return script

        return choose

    scripted = {name: ScriptedProvider(chooser(name)) for name in (() if beside else providers)}
    for one in scripted.values():
        await one.start(tls)
    issuer = DevIssuer.open(beside.directory if beside else directory)
    keys = await serve_certificates(issuer)
    shared = (beside.valkey, beside.redis_url) if beside else redis
    valkey = shared[0] if shared else LocalValkey(directory / "valkey", appendonly=True).start()
    redis_url = shared[1] if shared else valkey.url
    policy_path = directory / "policy.yaml"
    policy_path.write_text(beside.policy_path.read_text() if beside else policy or POLICY + budgets)
    port, admin_port = free_port(), free_port()
    asked = beside.providers if beside else scripted
    urls = {name: _base_url(name, one) for name, one in asked.items()}
    if base_url:
        urls["openai"] = base_url(scripted["openai"])
    urls.update(base_urls or {})
    workers = []
    for number in range(processors):
        state_dir = directory / f"p{number}"
        state_dir.mkdir()
        workers.append(
            Processor(
                socket=state_dir / "s",
                state_dir=state_dir,
                workers=workers_each,
                environment={
                    "PATH": os.environ["PATH"],
                    "TOLLGATE_POLICY": str(policy_path),
                    "TOLLGATE_STATE_DIR": str(state_dir),
                    "TOLLGATE_SOCKET": str(state_dir / "s"),
                    "TOLLGATE_HEALTH_PORT": "0",
                    "TOLLGATE_METRICS_PORT": "0",
                    # Google's issuer too, so that nothing is fetched from beyond this machine.
                    "TOLLGATE_ISSUER_KEYS": " ".join(
                        f"{name}=http://127.0.0.1:{keys.port}{CERTIFICATES_PATH}"
                        for name in (issuer.issuer, "https://accounts.google.com")
                    ),
                    "REDIS_URL": redis_url,
                    **{PROVIDERS[name].key_variable: key_of(name) for name in providers},
                    **{PROVIDERS[name].base_url_variable: url for name, url in urls.items()},
                    "TOLLGATE_TRANSPORT": os.environ.get("TOLLGATE_TRANSPORT", ""),  # every rig, over either
                    **(environment or {}),
                },
            )
        )
    envoys_config = render(
        Places(
            port=port,
            admin_port=admin_port,
            sockets=[worker_socket(worker.socket, n) for worker in workers for n in range(workers_each)],
            base_urls=urls,
            **(places or {}),
        )
    )
    if tune is not None:
        config = yaml.safe_load(envoys_config)
        tune(config)
        envoys_config = yaml.safe_dump(config, sort_keys=False)
    (directory / "envoy.yaml").write_text(envoys_config)
    container: Container | None = None
    tuned = tune or places or processors > 1 or workers[0].workers > 1
    if contained or (manifest_rig.wanted() and not tuned):
        container, workers = _contained(directory, port, admin_port, policy_path, workers[0], own=environment or {})
    for worker in workers:
        await worker.start()
    if container is not None:
        config = Path(container.env["TOLLGATE_ENVOY_CONFIG"])
        await eventually(config.exists, "the processor to write Envoy's configuration")
    envoy = await _start_envoy(directory, container)
    rig = Rig(
        directory=directory,
        valkey=valkey,
        providers=asked,
        issuer=issuer,
        keys=keys,
        processors=workers,
        envoy=envoy,
        port=port,
        admin_port=admin_port,
        namespace="tollgate",
        redis_url=redis_url,
        policy_path=policy_path,
        envoys_container=container,
        scripts=scripts,
        played=played,
    )
    try:
        await rig.ready()
        yield rig
    finally:
        if rig.envoy.returncode is None:
            await rig.kill_envoy()
        for worker in workers:
            await worker.stop(signal.SIGKILL)
        for one in scripted.values():
            await one.close()
        await keys.close()
        if shared is None:
            valkey.stop()


def _base_url(name: str, provider: ScriptedProvider) -> str:
    """Below the same paths as the real one, if it has a place of its own."""
    real = PROVIDERS[name].base_url or ("/v1/projects/p/locations/global/publishers/x" if "vertex" in name else "/v1")
    return f"http://127.0.0.1:{provider.port}{urlsplit(real).path}"


def _contained(
    directory: Path, port: int, admin_port: int, policy_path: Path, plain: Processor, *, own: Mapping[str, str]
) -> tuple[Container, list[Processor]]:
    """Envoy's container, and the processor as the manifest has it."""
    environment = {**plain.environment, "TOLLGATE_WORKERS": str(plain.workers)}
    envoy, container = manifest_rig.containers(directory, port, admin_port, policy_path, environment, own=own)
    state_dir = Path(container.env["TOLLGATE_STATE_DIR"])
    state_dir.mkdir()  # for the log
    socket = Path(container.env["TOLLGATE_SOCKET"])
    return envoy, [Processor(socket, state_dir, container.env, plain.workers, container)]


async def _start_envoy(directory: Path, container: Container | None) -> asyncio.subprocess.Process:
    log = (directory / "envoy.log").open("ab")
    command: tuple[str, ...] = (
        *(envoy_binary(), "--config-path", str(directory / "envoy.yaml")),
        *("--log-level", "warn", "--concurrency", "1", "--use-dynamic-base-id", "--file-flush-interval-msec", "50"),
    )
    if container is not None:
        command = manifest_rig.executable(container)
    process = await asyncio.create_subprocess_exec(
        *command,
        env=dict(container.env) if container is not None else None,
        cwd=container.directory if container is not None else None,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    log.close()
    return process


def event(payload: dict[str, Any] | str) -> bytes:
    """One SSE event as OpenAI writes them."""
    return b"data: " + (payload if isinstance(payload, str) else json.dumps(payload)).encode() + b"\n\n"


def delta(text: str, index: int = 0, finish: str | None = None) -> bytes:
    """One chunk of a streamed chat answer."""
    return event(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "gpt-4o",
            "choices": [{"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish}],
        }
    )


def usage(prompt: int, completion: int) -> bytes:
    """The closing usage chunk."""
    return event(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "gpt-4o",
            "choices": [],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        }
    )


DONE = event("[DONE]")


def streamed(words: int, *, prompt: int = 10, pause_s: float = 0.0, end: bool = True) -> Script:
    """A stream of so many one-token words."""
    chunks = [delta(" word") for _ in range(words)]
    if end:
        chunks += [delta("", finish="stop"), usage(prompt, words), DONE]
    return Script(chunks=chunks, pause_s=pause_s)


def whole(text: str, *, prompt: int, completion: int) -> Script:
    """A whole answer."""
    figures = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    answer = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o", "choices": [choice]}
    body = json.dumps({**answer, "usage": figures}).encode()
    return Script(headers=(("content-type", "application/json"),), chunks=[body], whole=True)
