"""`tollgate up`: the whole gateway on this machine, in the foreground, and nothing left of it afterwards."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import requests

from extproc.envoy_config import Places, in_use, render
from extproc.errors import PolicyInvalid
from extproc.limits import MAX_TOKEN_LIFETIME_S, MAX_UNIX_PATH_BYTES, MAX_WORKERS
from extproc.local import example
from extproc.local.envoy_check import envoy_binary
from extproc.local.issuer import CERTIFICATES_PATH, DevIssuer, serve_certificates
from extproc.local.provider import ScriptedProvider
from extproc.local.replay import REPLAYED, base_url, choose
from extproc.local.valkey import LocalValkey, ValkeyFailed, free_port
from extproc.policy import parse_policy
from extproc.process import Child
from extproc.providers import PROVIDERS
from extproc.secrets import SecretStore, variable_of
from extproc.settings import Settings, SettingsInvalid
from extproc.workers import cpus, default_workers, worker_socket

DEFAULT_PORT = 8080
ENV_FILE = "stack.env"

_KEYS = frozenset(map(variable_of, PROVIDERS))  # which only the processor needs

_READY_TIMEOUT_S = 60.0
_ENVOY_GRACE_S = 2.0
_PROCESSOR_GRACE_S = 10.0


class StackFailed(Exception):
    """Why the stack cannot run, in one line."""


def run() -> None:
    """Run until Ctrl-C or SIGTERM. Exits with 1, and one line on stderr, where it cannot."""
    run_stack(lambda: Stack(os.environ))


def run_stack(make: Callable[[], Stack]) -> None:
    """See `run`. A stack that cannot be made is said likewise."""
    try:
        asyncio.run(make().run())
    except (StackFailed, SettingsInvalid, ValkeyFailed, OSError) as error:
        sys.exit(f"tollgate: {error}")
    except PolicyInvalid as error:
        sys.exit("tollgate: the policy cannot be used:\n" + "\n".join(f"  {problem}" for problem in error.problems))


class Stack:
    """What one `tollgate up` runs, built from its environment."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = dict(env)
        self._settings = Settings.from_environment(env)
        self._state_dir = self._settings.state_dir.resolve()
        self._port = _port(env.get("PORT") or str(DEFAULT_PORT))
        self._workers = _workers(env.get("TOLLGATE_WORKERS") or str(default_workers()))
        self._children: list[Child] = []

    async def run(self) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        self._state_dir.mkdir(parents=True, exist_ok=True)
        with _only_one(self._state_dir, self._port):
            _require_free(self._port)
            async with AsyncExitStack() as parts:
                starting = asyncio.ensure_future(self._start(parts))
                stopping: asyncio.Task[Any] = asyncio.ensure_future(stop.wait())
                await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
                if not starting.done():
                    starting.cancel()
                    await asyncio.gather(starting, return_exceptions=True)
                    return
                starting.result()
                await self.supervise(stopping)
                _say("stopping")

    async def _start(self, parts: AsyncExitStack) -> None:
        policy_path = self._policy_path()
        policy = parse_policy(policy_path.read_text())
        env = self._env | {
            "TOLLGATE_POLICY": str(policy_path),
            "TOLLGATE_STATE_DIR": str(self._state_dir),
            "TOLLGATE_USAGE_DB": str(self._settings.usage_db_path.resolve()),
        }
        env |= await self._issuer(parts)
        env |= self._redis(parts)
        env |= await self._replayed(parts)
        base_urls = self._reached(env)
        self._write_env_file(env)
        await self.run_gateway(parts, env, base_urls)
        email = example.caller(policy)
        audience = policy.identity.audiences[0]
        token = DevIssuer.open(self._state_dir).mint(email, audience, MAX_TOKEN_LIFETIME_S, time.time())
        _announce(self._port, email, token, example.model(policy, base_urls))

    async def run_gateway(self, parts: AsyncExitStack, env: Mapping[str, str], base_urls: Mapping[str, str]) -> None:
        """Start what stands between callers and providers, and wait until it takes requests."""
        env = {
            **env,
            "TOLLGATE_HEALTH_PORT": str(free_port()),
            "TOLLGATE_METRICS_PORT": self._env.get("TOLLGATE_METRICS_PORT") or str(free_port()),
            "TOLLGATE_SOCKET": str(self._socket_path(parts)),
            "TOLLGATE_WORKERS": str(self._workers),
            "TOLLGATE_SHIP": "0",  # it has a child of its own for that
        }
        without_keys = {name: value for name, value in env.items() if name not in _KEYS}
        ship = (sys.executable, "-m", "extproc", "ship")
        shipper_grace_s = self._settings.flush_timeout_s + 1.0
        await self._run_child(parts, "usage store", ship, without_keys, shipper_grace_s)
        processor = (sys.executable, "-m", "extproc", "serve")
        await self._run_child(parts, "processor", processor, env, _PROCESSOR_GRACE_S)
        await self._run_envoy(parts, without_keys, base_urls)
        await self._await_ready()

    def _policy_path(self) -> Path:
        """The named policy, else a copy of the default one, which may be changed while the stack runs."""
        if self._env.get("TOLLGATE_POLICY"):
            return self._settings.policy_path.resolve()
        path = self._state_dir / "policy.yaml"
        if not path.exists():
            path.write_text((resources.files("extproc.local") / "policy.yaml").read_text())
        return path

    def _socket_path(self, parts: AsyncExitStack) -> Path:
        path = self._state_dir / "extproc.sock"
        if len(str(path).encode()) > MAX_UNIX_PATH_BYTES:  # a deep checkout
            folder = tempfile.mkdtemp(prefix="tollgate-")
            parts.callback(shutil.rmtree, folder, ignore_errors=True)
            path = Path(folder) / "extproc.sock"
        path.unlink(missing_ok=True)
        return path

    async def _issuer(self, parts: AsyncExitStack) -> dict[str, str]:
        issuer = DevIssuer.open(self._state_dir)
        server = await serve_certificates(issuer)
        parts.push_async_callback(server.close)
        own = f"{issuer.issuer}=http://127.0.0.1:{server.port}{CERTIFICATES_PATH}"
        return {"TOLLGATE_ISSUER_KEYS": f"{self._env.get('TOLLGATE_ISSUER_KEYS', '')} {own}".strip()}

    def _redis(self, parts: AsyncExitStack) -> dict[str, str]:
        if self._env.get("REDIS_URL"):
            return {}
        _say("starting valkey")
        valkey = LocalValkey(self._state_dir / "valkey", appendonly=True).start()
        parts.callback(valkey.stop)
        return {"REDIS_URL": valkey.url}

    async def _replayed(self, parts: AsyncExitStack) -> dict[str, str]:
        """Where providers without a key are called: at their base URL, if one is set, else at the scripted provider."""
        keys = SecretStore.of(self._settings.secrets_dir, self._env, PROVIDERS)
        named = self._settings.secret_versions
        keyless = [PROVIDERS[name] for name in REPLAYED if keys.key(name) is None and name not in named]
        scripted = [one for one in keyless if not self._env.get(one.base_url_variable)]
        env = {one.key_variable: "none" for one in keyless if one not in scripted}
        if not scripted:
            return env
        names = ", ".join(one.name for one in scripted)
        _say(f"starting a scripted provider, which replays recorded answers, for want of a key: {names}")
        provider = ScriptedProvider(choose)
        await provider.start()
        parts.push_async_callback(provider.close)
        for one in scripted:
            env |= {one.key_variable: "scripted", one.base_url_variable: base_url(provider.port, one.name)}
        return env

    def _reached(self, env: Mapping[str, str]) -> dict[str, str]:
        """The base URLs of the providers that are called: those with a key, or with Google's tokens in its place."""
        keys = SecretStore.of(self._settings.secrets_dir, env, PROVIDERS)
        with_key = {name for name in PROVIDERS if keys.key(name) is not None}
        return in_use(Settings.from_environment(env).base_urls, env, with_key)

    def _write_env_file(self, env: Mapping[str, str]) -> None:
        """For `tollgate usage` and the others, so that they find this stack. REDIS_URL may hold a password."""
        names = ("REDIS_URL", "TOLLGATE_POLICY", "TOLLGATE_STATE_DIR", "TOLLGATE_USAGE_DB", "TOLLGATE_NAMESPACE")
        path = self._state_dir / ENV_FILE
        path.touch(mode=0o600)
        path.chmod(0o600)  # also one that was there before
        path.write_text("".join(f"{name}={env[name]}\n" for name in names if name in env))

    async def _run_envoy(self, parts: AsyncExitStack, env: Mapping[str, str], base_urls: Mapping[str, str]) -> None:
        config = self._state_dir / "envoy.yaml"
        config.write_text(
            render(
                Places(
                    port=self._port,
                    admin_port=free_port(),
                    sockets=[worker_socket(Path(env["TOLLGATE_SOCKET"]), number) for number in range(self._workers)],
                    base_urls=base_urls,
                )
            )
        )
        command = (
            *(envoy_binary(), "--config-path", str(config), "--log-level", "warn"),
            *("--concurrency", str(max(1, cpus() - self._workers)), "--use-dynamic-base-id"),
        )
        await self._run_child(parts, "envoy", command, env, _ENVOY_GRACE_S)

    async def _run_child(
        self, parts: AsyncExitStack, name: str, command: tuple[str, ...], env: Mapping[str, str], grace_s: float
    ) -> None:
        _say(f"starting {name}")
        log = self._log_path(name)
        log.unlink(missing_ok=True)
        child = await Child.start(name, command, env, log)
        self._children.append(child)
        parts.push_async_callback(child.stop, grace_s)

    def _log_path(self, name: str) -> Path:
        return self._state_dir / f"{name.replace(' ', '-')}.log"

    async def _await_ready(self) -> None:
        deadline_s = time.monotonic() + _READY_TIMEOUT_S
        lacking = "Envoy does not answer"
        while time.monotonic() < deadline_s:
            if (dead := self._dead()) is not None:
                raise self._death(dead)
            lacking = await asyncio.to_thread(_lacking, self._port)
            if not lacking:
                return
            await asyncio.sleep(0.05)
        raise StackFailed(f"not ready after {_READY_TIMEOUT_S:.0f} s: {lacking}; logs are in {self._state_dir}")

    async def supervise(self, stopping: asyncio.Task[Any]) -> None:
        """Wait until it is to stop. Raises StackFailed when one of its processes ends before."""
        ends: list[asyncio.Task[Any]] = [asyncio.ensure_future(child.wait()) for child in self._children]
        await asyncio.wait((stopping, *ends), return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        if not stopping.done() and (dead := self._dead()) is not None:
            raise self._death(dead)

    def _dead(self) -> Child | None:
        return next((child for child in self._children if child.returncode is not None), None)

    def _death(self, child: Child) -> StackFailed:
        log = self._log_path(child.name)
        last = (log.read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        return StackFailed(f"the {child.name} ended with code {child.returncode}: {last} (see {log})")


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65_536:
        raise StackFailed(f"PORT must be a port number, not {text!r}")
    return int(text)


def _workers(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= MAX_WORKERS:
        raise StackFailed(f"TOLLGATE_WORKERS must be a whole number from 1 to {MAX_WORKERS}")
    return int(text)


def _require_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise StackFailed(f"port {port} is taken: set PORT to another one") from error


@contextmanager
def _only_one(state_dir: Path, port: int) -> Iterator[None]:
    """Raises StackFailed where another stack runs in the same state directory."""
    with (state_dir / "stack.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise StackFailed(f"a stack already runs in {state_dir}: {lock.read().strip()}") from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()}, http://127.0.0.1:{port}")
        lock.flush()
        yield
        lock.truncate(0)


def _lacking(port: int) -> str:
    """What the gateway lacks, or nothing."""
    try:
        answer = requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5)
    except requests.RequestException:
        return "Envoy does not answer"
    try:
        body = answer.json()
    except ValueError:
        return "the processor does not answer"
    return "" if answer.status_code == 200 else str(body.get("lacking") or "the processor does not answer")


def _say(line: str) -> None:
    print(line, flush=True)


def _announce(port: int, email: str, token: str, model: str) -> None:
    url = f"http://127.0.0.1:{port}"
    body = json.dumps({"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello"}]})
    _say(f"ready {url}")
    _say(f"\na token of the development issuer, for {email}, good for a day:\n\n{token}\n")
    _say(
        f"try it:\n\ncurl -N {url}/v1/chat/completions \\\n  -H 'authorization: Bearer {token}' \\\n"
        f"  -H 'content-type: application/json' \\\n  -d '{body}'\n"
    )
