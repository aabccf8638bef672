"""Several workers: how many, where they listen, and that one that dies is followed by another."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from functools import partial
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc import startup, workers
from extproc.limits import MAX_WORKERS
from extproc.local.issuer import CERTIFICATES_PATH, DevIssuer, serve_certificates
from extproc.local.valkey import LocalValkey, free_port
from extproc.settings import Settings
from extproc.transports.probe import LIVE
from extproc.workers import cpus, default_workers, worker_socket
from tests.rig import POLICY, eventually

SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 2),
        ("50000 100000", 1),
        ("1600000 100000", 8),
        ("?", 8),
    ],
    ids=["no limit", "two", "one and a half", "half", "more than there are", "unreadable"],
)
def test_cpus(text: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    limit = tmp_path / "cpu.max"
    limit.write_text(text)
    assert cpus(limit) == expected
    assert cpus(tmp_path / "absent") == 8


@pytest.mark.parametrize(("cores", "expected"), [(1, 1), (2, 1), (4, 2), (8, 4), (64, MAX_WORKERS)])
def test_workers_by_default(cores: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "cpus", lambda: cores)
    assert default_workers() == expected


def test_sockets_are_the_ones_that_envoy_lists() -> None:
    path = Path("/run/tollgate/extproc.sock")
    listed = (Path(__file__).parents[1] / "envoy" / "envoy.yaml").read_text()
    for number in range(MAX_WORKERS):
        assert f"{{path: {worker_socket(path, number)}}}" in listed
    assert str(worker_socket(path, MAX_WORKERS)) not in listed


def test_a_worker_does_not_write_envoys_configuration_with_its_own_socket_alone() -> None:
    env = {"TOLLGATE_ENVOY_CONFIG": "/run/tollgate/envoy.yaml"}
    worker = workers._worker(Settings.from_environment(env), env, Path("extproc-1.sock"))
    assert Settings.from_environment(worker._env).envoy_config_path is None


async def test_the_parent_of_workers_looks_for_garbage_once_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_for = []

    class Worker:
        async def keep(self, stop: asyncio.Event) -> None:
            looked_for.append(gc.isenabled())

    monkeypatch.setattr(workers, "_worker", lambda *_: Worker())
    startup.fast()
    try:
        await workers._run(Settings.from_environment({"TOLLGATE_HEALTH_PORT": "0"}), {}, 1)
    finally:
        gc.unfreeze()
        gc.enable()
    assert looked_for == [True]


async def test_a_worker_that_dies_is_followed_by_another(short_directory: Path) -> None:
    directory = short_directory
    issuer = DevIssuer.open(directory)
    keys = await serve_certificates(issuer)
    (directory / "policy.yaml").write_text(POLICY + "  []\n")
    health = f"127.0.0.1:{free_port()}"
    sockets = [worker_socket(directory / "extproc.sock", number) for number in range(2)]
    with LocalValkey(directory / "valkey") as valkey, (directory / "processor.log").open("wb") as log:
        pool = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "extproc", "serve", "--workers", "2"),
            env={
                "PATH": os.environ["PATH"],
                "TOLLGATE_POLICY": str(directory / "policy.yaml"),
                "TOLLGATE_STATE_DIR": str(directory),
                "TOLLGATE_HEALTH_PORT": health.partition(":")[2],
                "TOLLGATE_METRICS_PORT": "0",
                "TOLLGATE_ISSUER_KEYS": " ".join(
                    f"{name}=http://127.0.0.1:{keys.port}{CERTIFICATES_PATH}"
                    for name in (issuer.issuer, "https://accounts.google.com")
                ),
                "REDIS_URL": valkey.url,
                "OPENAI_API_KEY": "sk-test",
            },
            stdout=log,
            stderr=log,
        )
        try:
            await eventually(partial(_all_serve, sockets, LIVE), "two live workers")
            await eventually(partial(_all_serve, sockets, ""), "two ready workers")
            assert await _status(health) == SERVING
            first, second = _children(pool.pid)

            os.kill(first, signal.SIGKILL)
            await eventually(lambda: first not in _children(pool.pid), "the killed worker to be reaped")
            assert await _status(health) == SERVING  # by the other one
            await eventually(partial(_all_serve, sockets, LIVE), "another worker")
            last = _children(pool.pid)
            assert len(last) == 2
            assert second in last

            pool.terminate()
            assert await pool.wait() == 0
            assert not any(map(_command, map(str, last)))
        finally:
            if pool.returncode is None:
                pool.kill()
                await pool.wait()
            await keys.close()


async def _all_serve(sockets: list[Path], service: str) -> bool:
    return all([await _status(f"unix:{path}", service) == SERVING for path in sockets])


async def _status(address: str, service: str = "") -> int | None:
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        try:
            return int((await health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)).status)
        except grpc.RpcError:
            return None


def _children(pid: int) -> list[int]:
    """The processors among a process's children; each has a watchdog beside it."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"--workers\x001" in _command(child) and b"sh" not in _command(child)[:8]]


def _command(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
