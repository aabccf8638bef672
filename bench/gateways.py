"""What is measured: the provider by itself, a bare Envoy, Tollgate on each transport, and the rivals.

Each is started and stopped by itself, says which processes are its own, and has a request that it must refuse, so
that nothing is measured that has its work switched off.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, ClassVar

import yaml

from bench.load import Unanswered, ask
from bench.provider import pace
from bench.rivals import RIVALS
from extproc import settings
from extproc.local.envoy_check import envoy_binary
from extproc.local.valkey import LocalValkey, free_port
from extproc.process import Child
from tests.rig import Rig, running

PROCESSOR, ENVOY, STORE, GATEWAY = "processor", "Envoy", "Valkey", "gateway"
LONG_MODEL = "long"  # one whose answers may have 100,000 tokens and more
_START_TIMEOUT_S = 120.0
_POLL_S = 0.01
_STOP_GRACE_S = 5.0
_BROKE = "broke@people.example"
POLICY = f"""\
identity:
  audiences: [https://tollgate.test]
  issuers: [https://accounts.google.com]
  allow: ["*@test.iam.gserviceaccount.com", "*@people.example"]
  teams: {{search: [ranker@test.iam.gserviceaccount.com]}}
models:
  {LONG_MODEL}: {{targets: [openai/gpt-4o], max_output_tokens: 1000000}}
  "*": {{targets: ["openai/*"]}}
prices:
  "*": {{input_usd_per_mtok: 10, output_usd_per_mtok: 30}}
budgets:
  - {{scope: service, id: "*", window: day, limit_usd: 100000}}
  - {{scope: user, id: {_BROKE}, window: day, limit_tokens: 1}}
  - {{scope: global, window: month, limit_tokens: 1000000000000}}
"""


class NotAsSaid(Exception):
    """A gateway does not start, or lets through what it must refuse. The message says why."""


class Gateway(ABC):
    """One that answers at `port` once it is started."""

    name: ClassVar[str]
    everything: ClassVar[str]  # what is switched on, for the report
    path: ClassVar[str] = "/v1/chat/completions"
    model: ClassVar[str] = "gpt-4o"
    refuses: ClassVar[tuple[int, ...]] = ()  # the statuses of `forbidden`

    def __init__(self, directory: Path, provider_port: int) -> None:
        self.directory = directory
        self.provider_url = f"http://127.0.0.1:{provider_port}/v1"
        self.port = free_port()
        self.start_s = 0.0  # from the start of its processes to its first answer, the last time

    @abstractmethod
    async def start(self) -> None:
        """Start its processes; it may not answer yet."""

    @abstractmethod
    async def stop(self) -> None:
        """End them."""

    async def close(self) -> None:
        """End them, and what they need."""
        await self.stop()

    @abstractmethod
    def roots(self) -> dict[str, list[int]]:
        """Its processes, by what they are."""

    def headers(self) -> dict[str, str]:
        """What a caller sends besides the body."""
        return {}

    def forbidden(self) -> bytes:
        """A request that must be refused."""
        return b""

    def message(
        self, prompt: str = "Hello, how are you?", *, stream: bool = False, model: str = "", **fields: Any
    ) -> bytes:
        """One chat request."""
        messages = [{"role": "user", "content": prompt}]
        body = {"model": model or self.model, "messages": messages, "max_tokens": 4000, **fields}
        if stream:
            body["stream"] = True
        return self.raw(json.dumps(body, separators=(",", ":")).encode(), self.headers())

    def raw(self, body: bytes, headers: dict[str, str]) -> bytes:
        head = [f"POST {self.path} HTTP/1.1", f"host: 127.0.0.1:{self.port}", "content-type: application/json"]
        head += [f"{name}: {value}" for name, value in headers.items()]
        head += [f"content-length: {len(body)}", "", ""]
        return "\r\n".join(head).encode() + body

    def stream(self, events: int, gap_us: int, tokens: int = 1, **fields: Any) -> bytes:
        """A request whose answer is streamed like this."""
        return self.message(f"{pace(events, gap_us, tokens)} Tell me more.", stream=True, **fields)

    async def up(self) -> None:
        """Start it and wait for its first answer. Raises NotAsSaid."""
        begun = time.perf_counter()
        await self.start()
        while not await self._answers():
            if time.perf_counter() - begun > _START_TIMEOUT_S:
                raise NotAsSaid("it does not answer")
            await asyncio.sleep(_POLL_S)
        self.start_s = time.perf_counter() - begun

    async def check(self) -> None:
        """That it streams whole answers, and refuses what it must. Raises NotAsSaid."""
        try:
            answer = await ask(self.port, self.stream(7, 1000), patience_s=20)
            if len(answer.words) != 7:
                raise NotAsSaid(f"of 7 events it passed on {len(answer.words)}")
            if self.refuses:
                status = (await ask(self.port, self.forbidden(), only_ok=False, patience_s=20)).status
                if status not in self.refuses:
                    raise NotAsSaid(f"what it must refuse is answered {status}")
        except Unanswered as error:
            raise NotAsSaid(str(error)) from error

    async def _answers(self) -> bool:
        try:
            answer = await ask(self.port, self.message(), only_ok=False, patience_s=20)
        except (OSError, Unanswered):
            return False
        return answer.status == 200


class Direct(Gateway):
    """The load generator and the provider without anything between them: what the bench itself costs."""

    name = "no gateway"
    everything = "the load generator against the provider: the most that this bench can see"

    def __init__(self, directory: Path, provider_port: int) -> None:
        super().__init__(directory, provider_port)
        self.port = provider_port

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def roots(self) -> dict[str, list[int]]:
        return {}


class Tollgate(Gateway):
    """The whole of it, on one transport."""

    everything = "identity, policy, hold, metering with tiktoken, settlement, usage journal"
    refuses = (429,)
    transport: ClassVar[str]

    def __init__(self, directory: Path, provider_port: int) -> None:
        super().__init__(directory, provider_port)
        self._stack = AsyncExitStack()
        self._rig: Rig | None = None

    async def start(self) -> None:
        if self._rig is not None:
            await asyncio.gather(self._rig.processors[0].start(), self._rig.start_envoy())
            return
        self._rig = await self._stack.enter_async_context(
            running(
                self.directory,
                policy=POLICY,
                base_url=lambda _: self.provider_url,
                environment={"TOLLGATE_TRANSPORT": self.transport},
                tune=_allow_connections,
            )
        )
        self.port = self._rig.port

    async def stop(self) -> None:
        if self._rig is not None:
            await self._rig.kill_envoy()
            await self._rig.processors[0].stop()

    async def close(self) -> None:
        await self._stack.aclose()

    async def up(self) -> None:
        """The first time its Valkey and issuer start too, and the rig waits longer than it must: start again."""
        if self._rig is None:
            await self.start()
            await self.stop()
        await super().up()

    def roots(self) -> dict[str, list[int]]:
        assert self._rig is not None
        processors = [p.process.pid for p in self._rig.processors if p.process is not None]
        return {PROCESSOR: processors, ENVOY: [self._rig.envoy.pid], STORE: [self._rig.valkey.pid]}

    def headers(self) -> dict[str, str]:
        assert self._rig is not None
        return {"authorization": f"Bearer {self._rig.token()}"}

    def forbidden(self) -> bytes:
        """By one whose budget is a single token."""
        assert self._rig is not None
        body = b'{"model":"gpt-4o","messages":[{"role":"user","content":"Hello"}],"max_tokens":50}'
        return self.raw(body, {"authorization": f"Bearer {self._rig.token(_BROKE)}"})

    @property
    def envoy_config(self) -> dict[str, Any]:
        """What its Envoy runs with."""
        config: dict[str, Any] = yaml.safe_load((self.directory / "envoy.yaml").read_text())
        return config


class TollgateGrpc(Tollgate):
    """On the reference transport."""

    name = "Tollgate (grpc)"
    transport = "grpc"


class TollgateWire(Tollgate):
    """On the transport of its own."""

    name = "Tollgate (wire)"
    transport = "wire"


def _allow_connections(config: dict[str, Any]) -> None:
    """This provider speaks HTTP/1.1, so that every open stream is a connection; real ones have a hundred on one."""
    for cluster in config["static_resources"]["clusters"]:
        if cluster["name"] == "openai":
            cluster["circuit_breakers"]["thresholds"][0].update(max_connections=20_000, max_pending_requests=20_000)


class _Command(Gateway):
    """A gateway that is one command."""

    def __init__(self, directory: Path, provider_port: int) -> None:
        super().__init__(directory, provider_port)
        self._child: Child | None = None

    @abstractmethod
    def command(self) -> tuple[str, ...]:
        """What to run."""

    environment: ClassVar[dict[str, str]] = {}

    async def start(self) -> None:
        env = {"PATH": os.environ["PATH"], "HOME": str(self.directory), **self.environment}
        self._child = await Child.start(self.name, self.command(), env, self.directory / "log")

    async def stop(self) -> None:
        if self._child is not None:
            await self._child.stop(_STOP_GRACE_S)
            self._child = None

    async def _answers(self) -> bool:
        if self._child is not None and self._child.returncode is not None:
            said = (self.directory / "log").read_text(errors="replace").split("\n")
            raise NotAsSaid(f"it ended with code {self._child.returncode}: {' '.join(said[-5:])[-400:]}")
        return await super()._answers()

    def roots(self) -> dict[str, list[int]]:
        return {GATEWAY: [self._child.pid] if self._child is not None else []}


class BareEnvoy(_Command):
    """Tollgate's own Envoy, configuration and all, without the gate and the target. Started after a Tollgate."""

    name = "bare Envoy"
    everything = "Tollgate's Envoy and its configuration, without the processor"
    config: dict[str, Any]

    def command(self) -> tuple[str, ...]:
        config = self.config
        config["admin"]["address"]["socket_address"]["port_value"] = free_port()
        listener = config["static_resources"]["listeners"][0]
        listener["address"]["socket_address"]["port_value"] = self.port
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        manager["http_filters"] = [f for f in manager["http_filters"] if f["name"] == "router"]
        host = manager["route_config"]["virtual_hosts"][0]
        # Straight to the provider's cluster, which has its protocol and its pool, and no target.
        host["routes"] = [{"match": {"prefix": "/"}, "route": {"cluster": "openai", "timeout": "0s"}}]
        path = self.directory / "envoy.yaml"
        path.write_text(yaml.safe_dump(config))
        arguments = ("--log-level", "error", "--concurrency", "1", "--use-dynamic-base-id")
        return (envoy_binary(), "--config-path", str(path), *arguments)

    def roots(self) -> dict[str, list[int]]:
        return {ENVOY: super().roots()[GATEWAY]}


class LiteLLM(_Command):
    """Its proxy, with the one worker that it starts by default."""

    name = "LiteLLM"
    everything = "its proxy with a master key, one worker; keys and budgets of callers need a database: off"
    refuses = (400, 401)
    environment: ClassVar[dict[str, str]] = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR"}

    def command(self) -> tuple[str, ...]:
        config = {
            "model_list": [
                {
                    "model_name": "gpt-4o",
                    "litellm_params": {"model": "openai/gpt-4o", "api_base": self.provider_url, "api_key": "none"},
                }
            ],
            "general_settings": {"master_key": "sk-bench"},
            "litellm_settings": {"telemetry": False},
        }
        path = self.directory / "config.yaml"
        path.write_text(yaml.safe_dump(config))
        binary = RIVALS["LiteLLM"].home / "bin" / "litellm"
        return (str(binary), "--config", str(path), "--host", "127.0.0.1", "--port", str(self.port))

    def headers(self) -> dict[str, str]:
        return {"authorization": "Bearer sk-bench"}

    def forbidden(self) -> bytes:
        return self.raw(b'{"model":"gpt-4o","messages":[]}', {"authorization": "Bearer sk-another"})


_TENSORZERO_HOST = """
import signal, sys, tensorzero
gateway = tensorzero._start_http_gateway(
    config_file=sys.argv[1], clickhouse_url=None, postgres_url=None, valkey_url=sys.argv[2], async_setup=False
)
open(sys.argv[3], "w").write(gateway.base_url)
signal.pause()
"""


class TensorZero(_Command):
    """The gateway that its Python client embeds, with its HTTP server; Python itself only starts it."""

    name = "TensorZero"
    everything = "its token and request limits, kept in Valkey; observability, which needs ClickHouse, off"
    path = "/openai/v1/chat/completions"
    model = "tensorzero::model_name::gpt-4o"
    refuses = (429,)

    def __init__(self, directory: Path, provider_port: int) -> None:
        super().__init__(directory, provider_port)
        self._valkey = LocalValkey(directory / "valkey", port=free_port(), appendonly=True)
        self._running = False

    def command(self) -> tuple[str, ...]:
        if not self._running:
            self._valkey.start()
            self._running = True
        config = self.directory / "tensorzero.toml"
        config.write_text(_TENSORZERO_CONFIG % self.provider_url)
        self._address.unlink(missing_ok=True)
        python = str(RIVALS["TensorZero"].home / "bin" / "python")
        return (python, "-c", _TENSORZERO_HOST, str(config), self._valkey.url, str(self._address))

    @property
    def _address(self) -> Path:
        return self.directory / "address"

    async def _answers(self) -> bool:
        if self._address.exists() and (url := self._address.read_text()):
            self.port = int(url.partition("://")[2].partition("/")[0].rpartition(":")[2])
        return await super()._answers()

    async def close(self) -> None:
        await super().close()
        if self._running:
            self._valkey.stop()

    def roots(self) -> dict[str, list[int]]:
        return {**super().roots(), STORE: [self._valkey.pid]}

    def forbidden(self) -> bytes:
        """By one who has a single token."""
        fields: dict[str, Any] = {"tensorzero::tags": {"user": "broke"}}
        return self.message(**fields)


_TENSORZERO_CONFIG = """
[gateway]
observability.enabled = false
disable_pseudonymous_usage_analytics = true

[models."gpt-4o"]
routing = ["bench"]

[models."gpt-4o".providers.bench]
type = "openai"
model_name = "gpt-4o"
api_base = "%s"
api_key_location = "none"

[rate_limiting]
enabled = true

[[rate_limiting.rules]]
tokens_per_month = 1_000_000_000_000
model_inferences_per_day = 1_000_000_000
always = true

[[rate_limiting.rules]]
tokens_per_day = 1
scope = [{ tag_key = "user", tag_value = "broke" }]
always = true
"""


class Portkey(_Command):
    """Its open-source gateway: it routes, and neither identifies nor limits anybody."""

    name = "Portkey"
    everything = "routing only: it has neither identity nor budgets by itself"
    environment: ClassVar[dict[str, str]] = {"NODE_ENV": "production", "TRUSTED_CUSTOM_HOSTS": "127.0.0.1,localhost"}

    def command(self) -> tuple[str, ...]:
        server = RIVALS["Portkey"].home / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
        return ("node", str(server), f"--port={self.port}", "--headless")

    def headers(self) -> dict[str, str]:
        host = {"x-portkey-provider": "openai", "x-portkey-custom-host": self.provider_url}
        return {**host, "authorization": "Bearer none"}


def tollgates() -> list[type[Tollgate]]:
    """Tollgate on those transports that it has."""
    transports = getattr(settings, "TRANSPORTS", ("grpc",))
    return [gateway for gateway in (TollgateGrpc, TollgateWire) if gateway.transport in transports]


def rivals() -> list[type[Gateway]]:
    """The others, installed or not."""
    return [LiteLLM, TensorZero, Portkey]


async def start_provider(log: Path) -> tuple[Child, int]:
    """The provider in its own process, and its port."""
    child = await Child.start("provider", (sys.executable, "-m", "bench.provider"), os.environ, log)
    while not (said := log.read_text()).strip():  # noqa: ASYNC240 — a few bytes, before anything runs
        if child.returncode is not None:
            raise NotAsSaid("the provider does not start")
        await asyncio.sleep(_POLL_S)
    return child, int(said)
