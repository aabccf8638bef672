"""One instance, run as Cloud Run does: containers start in order, are probed, and end together."""

from __future__ import annotations

import asyncio
import http.client
import shutil
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.local.container import Process
from extproc.local.manifest import Probe
from extproc.process import Child

GRACE_S = 10.0  # between SIGTERM, which all containers get at once, and SIGKILL


class InstanceFailed(Exception):
    """A container ended, or failed its probe too often."""


class Instance:
    """The containers of one instance. `ready_s` is when each one's startup probe succeeded, after the start of all."""

    def __init__(self, processes: Sequence[Process], log: Callable[[str], Path]) -> None:
        self._processes = processes
        self._log = log
        self._children: dict[str, Child] = {}
        self._begun_s = 0.0
        self.started_s: dict[str, float] = {}
        self.ready_s: dict[str, float] = {}

    @property
    def children(self) -> Mapping[str, Child]:
        """What runs, by the container's name."""
        return self._children

    async def start(self) -> None:
        """Start every container once those that it needs are ready. Raises InstanceFailed."""
        self._begun_s = time.monotonic()
        ready = {process.name: asyncio.Event() for process in self._processes}
        await _all(self._start(process, ready) for process in self._processes)

    async def supervise(self) -> None:
        """Probe those that have a liveness probe. Raises InstanceFailed when one fails, or when a container ends."""
        watched = [self._ends(process.name) for process in self._processes]
        watched += [self._lives(one.name, one.liveness) for one in self._processes if one.liveness is not None]
        await _all(watched)

    async def stop(self) -> dict[str, int]:
        """SIGTERM to all at once, SIGKILL to those that are left after ten seconds. Returns the exit codes."""
        codes = await asyncio.gather(*(child.stop(GRACE_S) for child in self._children.values()))
        return dict(zip(self._children, codes, strict=True))

    async def _start(self, process: Process, ready: Mapping[str, asyncio.Event]) -> None:
        for name in process.after:
            await ready[name].wait()
        self.started_s[process.name] = time.monotonic() - self._begun_s
        executable = shutil.which(process.command[0], path=process.env["PATH"])
        if executable is None:
            raise InstanceFailed(f"{process.name}: there is no {process.command[0]}")
        command = (executable, *process.command[1:])
        child = await Child.start(
            process.name, command, process.env, self._log(process.name), directory=process.directory
        )
        self._children[process.name] = child
        if process.startup is not None:
            await self._succeeds(process.name, process.startup)
        self.ready_s[process.name] = time.monotonic() - self._begun_s
        ready[process.name].set()

    async def _succeeds(self, name: str, probe: Probe) -> None:
        """Wait for the first success of a startup probe."""
        await asyncio.sleep(probe.initial_delay_s)
        for _ in range(probe.failures):
            next_s = time.monotonic() + probe.period_s
            if await succeeds(probe):
                return
            if self._children[name].returncode is not None:
                await self._ends(name)
            await asyncio.sleep(next_s - time.monotonic())
        raise InstanceFailed(f"{name}: its startup probe failed {probe.failures} times (see {self._log(name)})")

    async def _lives(self, name: str, probe: Probe) -> None:
        await asyncio.sleep(probe.initial_delay_s)
        failed = 0
        while failed < probe.failures:
            next_s = time.monotonic() + probe.period_s
            failed = 0 if await succeeds(probe) else failed + 1
            await asyncio.sleep(next_s - time.monotonic())
        raise InstanceFailed(f"{name}: its liveness probe failed {probe.failures} times (see {self._log(name)})")

    async def _ends(self, name: str) -> None:
        code = await self._children[name].wait()
        last = (self._log(name).read_text(errors="replace").strip().splitlines() or ["it said nothing"])[-1]
        raise InstanceFailed(f"the container {name} ended with code {code}: {last} (see {self._log(name)})")


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait for all of it, or for the first failure."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for one in work:
                tasks.create_task(one)
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None


async def succeeds(probe: Probe) -> bool:
    """Ask once."""
    return await asyncio.to_thread(_CHECKS[probe.kind], probe)


def _grpc(probe: Probe) -> bool:
    with grpc.insecure_channel(f"127.0.0.1:{probe.port}") as channel:
        request = health_pb2.HealthCheckRequest(service=probe.what)
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=probe.timeout_s)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def _http(probe: Probe) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", probe.port, timeout=probe.timeout_s)
    try:
        connection.request("GET", probe.what or "/")
        return 200 <= connection.getresponse().status < 400
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _tcp(probe: Probe) -> bool:
    try:
        socket.create_connection(("127.0.0.1", probe.port), probe.timeout_s).close()
    except OSError:
        return False
    return True


_CHECKS: Mapping[str, Callable[[Probe], bool]] = {"grpc": _grpc, "httpGet": _http, "tcpSocket": _tcp}
