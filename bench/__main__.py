"""`python -m bench [--short] [--only PART] [--gateways NAME]`: all gateways in interleaved rounds, in one run."""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import uvloop

from bench import report
from bench.figures import Figures
from bench.gateways import BareEnvoy, Direct, Gateway, NotAsSaid, Tollgate, rivals, start_provider, tollgates
from bench.load import Unanswered
from bench.parts import FULL, PARTS, SHORT, Bench, Plan, applies, as_json
from bench.rivals import RIVALS

RESULTS = Path(__file__).parent / "results"
_SPARE_FILES = 800  # open files of a process that are no streams


def say(line: str) -> None:
    """Progress, on stderr."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


async def measure(plan: Plan, parts: Sequence[str], wanted: Sequence[str]) -> tuple[Figures, list[type[Gateway]]]:
    """Start everything, then all rounds. Returns what was measured, and of whom."""
    begun = time.monotonic()
    figures = Figures()
    with tempfile.TemporaryDirectory(prefix="tg") as name:
        async with AsyncExitStack() as stack:
            provider, port = await start_provider(Path(name) / "provider.log")
            stack.push_async_callback(provider.stop, 1.0)
            gateways = await stack.enter_async_context(_started(Path(name), port, wanted, figures))
            bench = Bench(plan, figures, provider.pid, port)
            for bench.number in range(1, plan.rounds + 1):
                for part in parts:
                    if PARTS[part].seldom and bench.number > plan.seldom:
                        continue
                    # Not always in the same order: none is always the first after another.
                    turn = bench.number % len(gateways) if gateways else 0
                    for gateway in gateways[turn:] + gateways[:turn]:
                        await _one(bench, part, gateway, begun)
            return figures, [type(gateway) for gateway in gateways]


async def _one(bench: Bench, part: str, gateway: Gateway, begun: float) -> None:
    key = (part, gateway.name)
    if not applies(part, gateway) or key in bench.figures.failures:
        return
    if time.monotonic() - begun > bench.plan.deadline_s:
        bench.figures.failures[key] = "no time was left"
        return
    say(f"round {bench.number} of {bench.plan.rounds}: {part}, {gateway.name}")
    try:
        await PARTS[part].measure(bench, gateway)
    except (Unanswered, NotAsSaid, OSError, ArithmeticError) as error:
        bench.figures.failures[key] = str(error) or type(error).__name__
        say(f"failed: {part}, {gateway.name}: {error}")


@asynccontextmanager
async def _started(directory: Path, port: int, wanted: Sequence[str], figures: Figures) -> AsyncIterator[list[Gateway]]:
    """Everything that starts and does what it says."""
    gateways: list[Gateway] = []
    async with AsyncExitStack() as stack:
        kinds: list[type[Gateway]] = [Direct, *tollgates(), BareEnvoy, *rivals()]
        for number, kind in enumerate(kinds):
            # A bare Envoy is made from Tollgate's configuration and is what the others are compared with.
            if wanted and not any(part.lower() in kind.name.lower() for part in wanted) and kind is not BareEnvoy:
                continue
            lacking = RIVALS[kind.name].lacking() if kind.name in RIVALS else None
            if lacking is not None:
                figures.failures["start", kind.name] = lacking
                say(f"without {kind.name}: {lacking}")
                continue
            place = directory / f"g{number}"
            place.mkdir()
            gateway = kind(place, port)
            if isinstance(gateway, BareEnvoy):
                made = next((other for other in gateways if isinstance(other, Tollgate)), None)
                if made is None:
                    continue
                gateway.config = made.envoy_config
            stack.push_async_callback(gateway.close)
            try:
                await gateway.up()
                await gateway.check()
            except (NotAsSaid, OSError, AssertionError) as error:
                figures.failures["start", kind.name] = str(error)
                say(f"without {kind.name}: {error}")
                await gateway.close()
                continue
            refuses = ", and refuses what it must" if kind.refuses else ""
            say(f"{kind.name} started in {gateway.start_s:.2f} s{refuses}")
            gateways.append(gateway)
        yield gateways


def open_files() -> int:
    """Raise the limit as far as this process may, and return it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def main() -> None:
    """Measure, and write the page, the chart and all values to bench/results/."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__)
    parser.add_argument("--short", action="store_true", help="one small round of everything, in less than 3 minutes")
    parser.add_argument("--rounds", type=int, help="how many, in place of the plan's")
    parser.add_argument("--only", action="append", choices=PARTS, help="this part only; may be repeated")
    parser.add_argument("--gateways", action="append", help="only those whose name holds this; may be repeated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to write to")
    given = parser.parse_args()
    plan = SHORT if given.short else FULL
    # An open stream takes two files of an Envoy: the caller's connection and the provider's.
    plan = replace(plan, idle=min(plan.idle, (open_files() - _SPARE_FILES) // 2), rounds=given.rounds or plan.rounds)
    figures, kinds = uvloop.run(measure(plan, given.only or list(PARTS), given.gateways or []))
    page = report.page(figures, kinds, plan)
    given.results.mkdir(parents=True, exist_ok=True)
    name = "short" if given.short else "-".join(given.only) if given.only else "results"
    (given.results / f"{name}.md").write_text(page.replace("{chart}", f"{name}.svg"))
    (given.results / f"{name}.svg").write_text(report.chart(figures, kinds))
    (given.results / f"{name}.json").write_text(as_json(figures))
    print(page.replace("{chart}", f"{name}.svg"))
    say(f"written to {given.results / name}.md")


if __name__ == "__main__":
    main()
