"""`python -m bench.failover`: what translation costs, what waiting for the first event costs, and what a failure costs.

One Tollgate, whose models are the ways of a request: one worker, one Envoy, the provider and the load generator of the
bench. All ways in turn, in interleaved rounds, so that whatever else the machine does touches all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from bench import parts
from bench.__main__ import say
from bench.figures import Figures, Spread
from bench.gateways import ENVOY, POLICY, PROCESSOR, Gateway, TollgateGrpc, TollgateWire, start_provider
from bench.parts import BUSY, FULL, LOAD, PROVIDER, WHOLE, Bench
from bench.provider import FAILS
from tests.rig import running

RESULTS = Path(__file__).parent / "results" / "failover.md"
PLAN = replace(FULL, rounds=5, request_s=0.7, turns=20, events=90)
_MODELS = f"""\
  claude: {{targets: [anthropic/claude-haiku-4-5]}}
  patient: {{targets: [azure/gpt-4o]}}
  failing: {{targets: [azure/{FAILS}, openai/gpt-4o], reasoning: false}}
"""


class _Tollgate(TollgateWire):
    """With three providers, one of whose chains waits for the first event."""

    async def start(self) -> None:
        if self._rig is not None:
            await super().start()
            return
        self._rig = await self._stack.enter_async_context(
            running(
                self.directory,
                policy=POLICY.replace("models:\n", f"models:\n{_MODELS}"),
                providers=("openai", "anthropic", "azure"),
                base_urls=dict.fromkeys(("openai", "anthropic", "azure"), self.provider_url),
                environment={"TOLLGATE_TRANSPORT": self.transport},
                tune=_tune,
            )
        )
        self.port = self._rig.port


class _TollgateGrpc(_Tollgate):
    name = TollgateGrpc.name
    transport = TollgateGrpc.transport


def _tune(config: dict[str, Any]) -> None:
    """Azure's chain waits, nobody is left out for failing always, and there is room for an HTTP/1.1 provider."""
    clusters = {cluster["name"]: cluster for cluster in config["static_resources"]["clusters"]}
    options = "typed_extension_protocol_options"
    clusters["azure-alone"][options] = clusters["waiting"][options]
    for cluster in clusters.values():
        cluster.pop("outlier_detection", None)
        for threshold in cluster.get("circuit_breakers", {}).get("thresholds", ()):
            threshold.update(max_connections=20_000, max_pending_requests=20_000)


class Way(Gateway):
    """One model of a Tollgate: the way that its requests go."""

    def __init__(self, gateway: _Tollgate) -> None:
        self._gateway = gateway
        self.port = gateway.port

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def roots(self) -> dict[str, list[int]]:
        return self._gateway.roots()

    def headers(self) -> dict[str, str]:
        return self._gateway.headers()


class Native(Way):
    """OpenAI's caller, and OpenAI."""

    name = "native"
    everything = "the first target's body goes on as the gate wrote it, and nothing of the answer comes to the target"


class Translated(Way):
    """OpenAI's caller, and Claude."""

    name = "translated"
    model = "claude"
    everything = "the target reads the body and writes another one, and each event likewise"


class Patient(Way):
    """OpenAI's caller, and OpenAI's dialect, with the role target-first-event."""

    name = "native, waiting"
    model = "patient"
    everything = "headers wait for the first event; all bodies cross to the target for it"


class Failed(Way):
    """OpenAI's caller; the first provider answers 500, and OpenAI is asked."""

    name = "failed over"
    model = "failing"
    everything = "the first provider answers 500 to every request, and the second one is asked"


WAYS: tuple[type[Way], ...] = (Native, Translated, Patient, Failed)


async def measure(kind: type[_Tollgate], rounds: int) -> Figures:
    """All ways in all rounds."""
    figures = Figures()
    async with AsyncExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tg")))
        provider, port = await start_provider(directory / "provider.log")
        stack.push_async_callback(provider.stop, 1.0)
        place = directory / "g"
        place.mkdir()
        gateway = kind(place, port)
        stack.push_async_callback(gateway.close)
        await gateway.up()
        await gateway.check()
        ways = [way(gateway) for way in WAYS]
        for way in ways:
            await way.check()
        bench = Bench(replace(PLAN, rounds=rounds), figures, provider.pid, port)
        for bench.number in range(1, rounds + 1):
            turn = bench.number % len(ways)
            for way in ways[turn:] + ways[:turn]:
                say(f"round {bench.number} of {rounds}: {way.name}")
                await parts.requests(bench, way)
                await parts.streams(bench, way)
    return figures


# The page -------------------------------------------------------------------------------------------------------------

_PROCESSES = ((PROCESSOR, "processor"), (ENVOY, "Envoy"), (WHOLE, "both"))


def _rows() -> list[tuple[str, str]]:
    rows = [(f"CPU a streamed event, {title}, µs", f"cpu_event/{name}") for name, title in _PROCESSES]
    rows += [(f"CPU a request, {title}, µs", f"cpu_request/{name}") for name, title in _PROCESSES]
    rows += [("p50 of a request, 1 connection, ms", "p50_1"), (f"p50, {BUSY} connections, ms", f"p50_{BUSY}")]
    rows += [("first token, p50, ms", "ttft_p50"), ("gap between events, p99, ms", "gap_p99")]
    rows += [(f"CPU a streamed event, {name}, µs", f"cpu_event/{name}") for name in (LOAD, PROVIDER)]
    return rows


def _table(figures: Figures, ways: Sequence[type[Way]], base: str | None = None) -> list[str]:
    """With `base`, what each adds to it within one round."""
    names = [way.name for way in ways]
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for title, figure in _rows():
        cells: list[Spread | None] = [
            figures.spread(figure, name) if base is None else figures.added(figure, name, base) for name in names
        ]
        lines.append(f"| {title} | {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    return lines


def page(figures: Figures, kind: type[_Tollgate], rounds: int) -> str:
    """Markdown."""
    return "\n".join(
        (
            "# What translation, waiting for the first event, and a failure cost",
            "",
            f"`python -m bench.failover` of {time.strftime('%Y-%m-%d')}: {kind.name}, interleaved rounds ({rounds}); "
            f"medians, and the least and the most of a round. {os.cpu_count()} cores, Linux {platform.release()}, "
            f"Python {platform.python_version()}. [How it is measured](../README.md#failover).",
            "",
            *(f"- {way.name}: {way.everything}" for way in WAYS),
            "",
            *_table(figures, WAYS),
            "",
            "## Added to the native way, within one round",
            "",
            *_table(figures, WAYS[1:], Native.name),
            "",
        )
    )


def main() -> None:
    """Measure, and write the page to bench/results/."""
    parser = argparse.ArgumentParser(prog="bench.failover", description=__doc__)
    parser.add_argument("--rounds", type=int, default=PLAN.rounds)
    parser.add_argument("--grpc", action="store_true", help="on the reference transport")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page to write")
    given = parser.parse_args()
    kind = _TollgateGrpc if given.grpc else _Tollgate
    written = page(uvloop.run(measure(kind, given.rounds)), kind, given.rounds)
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(written)
    print(written)
    print(f"written to {given.results}", file=sys.stderr)


if __name__ == "__main__":
    main()
