"""`python -m bench [--short]`: Tollgate against a bare Envoy, in interleaved rounds, in one run.

Both Envoys are the same binary with the same configuration, but that the bare one has no processor. Tollgate has
everything on: identity, policy, hold, metering with tiktoken, settlement, usage journal.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
import yaml

from bench.load import Load, request, run
from bench.provider import Server
from extproc.local.envoy_config import envoy_binary
from extproc.local.valkey import free_port
from tests.rig import Rig, eventually, running

RESULTS = Path(__file__).parent / "results"
_BUDGETS = """\
  - {scope: service, id: "*", window: day, limit_usd: 100000}
  - {scope: global, window: month, limit_tokens: 1000000000000}
"""
_WHOLE = b'{"model":"gpt-4o","messages":[{"role":"user","content":"Hello, how are you?"}],"max_tokens":50}'
_STREAM = b'{"model":"gpt-4o","messages":[{"role":"user","content":"Hello, how are you?"}],"stream":true}'
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Figures:
    """One list of measurements a figure, one entry a round."""

    rounds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.rounds.setdefault(name, []).append(value)

    def row(self, name: str, unit: str) -> str:
        values = sorted(self.rounds[name])
        return f"| {name} | {statistics.median(values):,.2f} {unit} | {values[0]:,.2f} – {values[-1]:,.2f} |"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    rounds: int
    requests: int
    streams: int
    events: int


FULL = Plan(rounds=9, requests=600, streams=64, events=200)
SHORT = Plan(rounds=3, requests=200, streams=32, events=100)


def cpu_s(pid: int) -> float:
    """User and system CPU seconds of a process so far (proc(5), stat, fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


@asynccontextmanager
async def bare_envoy(rig: Rig, provider_port: int) -> AsyncIterator[int]:
    """The rig's own configuration without gate and target, straight to the provider. Yields its port."""
    config: dict[str, Any] = yaml.safe_load((rig.directory / "envoy.yaml").read_text())
    port = free_port()
    config["admin"]["address"]["socket_address"]["port_value"] = free_port()
    listener = config["static_resources"]["listeners"][0]
    listener["address"]["socket_address"]["port_value"] = port
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    manager["http_filters"] = [f for f in manager["http_filters"] if f["name"] == "router"]
    host = manager["route_config"]["virtual_hosts"][0]
    host["routes"] = host["routes"][:1]
    del host["routes"][0]["match"]["headers"]
    cluster = next(c for c in config["static_resources"]["clusters"] if c["name"] == "openai")
    options = cluster["typed_extension_protocol_options"]["envoy.extensions.upstreams.http.v3.HttpProtocolOptions"]
    options["http_filters"] = [f for f in options["http_filters"] if f["name"] == "codec"]
    path = rig.directory / "bare.yaml"
    path.write_text(yaml.safe_dump(config))
    log = (rig.directory / "bare.log").open("wb")
    command = ("--config-path", str(path), "--log-level", "error", "--concurrency", "1", "--use-dynamic-base-id")
    process = await asyncio.create_subprocess_exec(envoy_binary(), *command, stdout=log, stderr=log)
    try:
        await eventually(lambda: _listens(port), "the bare Envoy")
        yield port
    finally:
        process.kill()
        await process.wait()
        log.close()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def percentile(load: Load, part: float) -> float:
    """Milliseconds."""
    ordered = sorted(load.seconds)
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))] * 1000


async def measure(plan: Plan) -> Figures:
    """All rounds. Prints where it is."""
    figures = Figures()
    provider = Server()
    await provider.start()
    url = f"http://127.0.0.1:{provider.port}/v1"
    with tempfile.TemporaryDirectory(prefix="tg") as name:
        async with (
            running(Path(name), budgets=_BUDGETS, base_url=lambda _: url) as rig,
            bare_envoy(rig, provider.port) as bare_port,
        ):
            token = rig.token()
            for number in range(plan.rounds + 1):
                print(f"round {number} of {plan.rounds}" if number else "warming up", file=sys.stderr, flush=True)
                into = figures if number else Figures()
                await _latency(plan, rig, bare_port, token, into)
                await _throughput(plan, rig, bare_port, token, into)
                await _streams(plan, rig, provider, token, into)
    provider.close()
    return figures


async def _latency(plan: Plan, rig: Rig, bare_port: int, token: str, figures: Figures) -> None:
    bare = await run(bare_port, request(bare_port, token, _WHOLE), requests=plan.requests, connections=1)
    ours = await run(rig.port, request(rig.port, token, _WHOLE), requests=plan.requests, connections=1)
    for name, part in (("p50", 0.5), ("p99", 0.99)):
        figures.add(f"bare Envoy, {name}", percentile(bare, part))
        figures.add(f"Tollgate, {name}", percentile(ours, part))
        figures.add(f"added, {name}", percentile(ours, part) - percentile(bare, part))


async def _throughput(plan: Plan, rig: Rig, bare_port: int, token: str, figures: Figures) -> None:
    count = plan.requests * 2
    bare = await run(bare_port, request(bare_port, token, _WHOLE), requests=count, connections=32)
    figures.add("bare Envoy, requests a second", count / bare.elapsed_s)
    processor, envoy = _pids(rig)
    before = cpu_s(processor), cpu_s(envoy)
    ours = await run(rig.port, request(rig.port, token, _WHOLE), requests=count, connections=32)
    figures.add("Tollgate, requests a second", count / ours.elapsed_s)
    figures.add("processor, CPU a request", (cpu_s(processor) - before[0]) / count * 1e6)
    figures.add("Envoy, CPU a request", (cpu_s(envoy) - before[1]) / count * 1e6)


async def _streams(plan: Plan, rig: Rig, provider: Server, token: str, figures: Figures) -> None:
    provider.pace.events, provider.pace.gap_s = plan.events, 0.02
    processor, envoy = _pids(rig)
    before = cpu_s(processor), cpu_s(envoy)
    await run(rig.port, request(rig.port, token, _STREAM), requests=plan.streams, connections=plan.streams)
    events = plan.streams * plan.events
    figures.add("processor, CPU a streamed event", (cpu_s(processor) - before[0]) / events * 1e6)
    figures.add("Envoy, CPU a streamed event", (cpu_s(envoy) - before[1]) / events * 1e6)


def _pids(rig: Rig) -> tuple[int, int]:
    process = rig.processors[0].process
    assert process is not None
    return process.pid, rig.envoy.pid


def report(figures: Figures, plan: Plan) -> str:
    """The figures as a Markdown page."""
    rows = [figures.row(name, _unit(name)) for name in figures.rounds]
    return "\n".join(
        (
            "# Tollgate over a bare Envoy",
            "",
            f"Measured {time.strftime('%Y-%m-%d')} by `make bench`, {plan.rounds} interleaved rounds: medians, and the "
            f"least and the most of a round. {os.cpu_count()} cores, Python {platform.python_version()}; load "
            "generator, provider, both Envoys, Valkey and processor share them, so read ratios, not absolutes.",
            "",
            "One whole answer a request (hold, settlement, record), one connection for latency and 32 for the rest; "
            f"{plan.streams} streams of {plan.events} events, 50 a second each. A stream's CPU includes its request's.",
            "",
            "| figure | median | least – most |",
            "|---|---|---|",
            *rows,
            "",
        )
    )


def _unit(name: str) -> str:
    if "second" in name:
        return ""
    return "µs" if "CPU" in name else "ms"


def main() -> None:
    """Measure, print the page, and write it to bench/results/."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="a third of the rounds, smaller ones")
    plan = SHORT if parser.parse_args().short else FULL
    page = report(uvloop.run(measure(plan)), plan)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / ("short.md" if plan is SHORT else "overhead.md")).write_text(page)
    print(page)


main()
