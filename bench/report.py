"""The page and the chart: targets first, then every figure of every gateway."""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from bench import startup
from bench.figures import Figures, Spread
from bench.gateways import ENVOY, PROCESSOR, STORE, BareEnvoy, Direct, Gateway, LiteLLM, Portkey, TensorZero, Tollgate
from bench.parts import BUSY, FEW, LOAD, MANY, PROVIDER, WHOLE, Plan

_BARE = BareEnvoy.name
_RPS = f"rps_{BUSY}"


# Targets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """What is wanted of a figure. `value` is None where something that it needs was not measured."""

    what: str
    wanted: str
    value: Callable[[Figures, str], float | None]
    met: Callable[[float], bool]


def _median(figure: str) -> Callable[[Figures, str], float | None]:
    return lambda figures, name: figures.median(figure, name)


def _over(figure: str, rival: str) -> Callable[[Figures, str], float | None]:
    """A Tollgate's median over a rival's."""

    def value(figures: Figures, name: str) -> float | None:
        ours, theirs = figures.median(figure, name), figures.median(figure, rival)
        return None if ours is None or not theirs else ours / theirs

    return value


def _center(spread: Spread | None) -> float | None:
    return None if spread is None else spread.median


TARGETS = (
    Target(
        f"CPU of the processor a streamed event, {MANY} streams",
        "≤ 18 µs",
        _median(f"cpu_event_busy/{PROCESSOR}"),
        lambda v: v <= 18,
    ),
    Target(f"… {FEW} streams", "≤ 18 µs", _median(f"cpu_event/{PROCESSOR}"), lambda v: v <= 18),
    Target("CPU of the processor a request", "≤ 150 µs", _median(f"cpu_request/{PROCESSOR}"), lambda v: v <= 150),
    Target(
        "p50 added to a bare Envoy, 1 connection",
        "≤ 0.6 ms",
        lambda figures, name: _center(figures.added("p50_1", name, _BARE)),
        lambda v: v <= 0.6,
    ),
    Target("p50, 1 connection, over TensorZero's", "≤ 1.5", _over("p50_1", TensorZero.name), lambda v: v <= 1.5),
    Target("requests a second, 32 connections, over LiteLLM's", "≥ 60", _over(_RPS, LiteLLM.name), lambda v: v >= 60),
    Target("… over Portkey's", "> 1", _over(_RPS, Portkey.name), lambda v: v > 1),
    Target("… over TensorZero's", "≥ 0.5", _over(_RPS, TensorZero.name), lambda v: v >= 0.5),
    Target(
        f"CPU an event, processor and Envoy, over TensorZero's, {MANY} streams",
        "≤ 1.3",
        _over(f"cpu_event_busy/{WHOLE}", TensorZero.name),
        lambda v: v <= 1.3,
    ),
    Target("… over LiteLLM's", "≤ 0.1", _over(f"cpu_event_busy/{WHOLE}", LiteLLM.name), lambda v: v <= 0.1),
    Target("start to ready, as the manifest has it", "< 3 s", _median("start_up/ready"), lambda v: v < 3),
    Target("memory of the processor an open stream", "≤ 40 KB", _median(f"memory/{PROCESSOR}"), lambda v: v <= 40),
    Target(
        "CPU of the processor a request, thousands of streams open, over 10",
        "0.75 – 1.25",
        lambda figures, name: _center(
            figures.ratio(f"cpu_request_many/{PROCESSOR}", f"cpu_request_few/{PROCESSOR}", name)
        ),
        lambda v: 0.75 <= v <= 1.25,
    ),
    Target(
        "CPU of the processor a chunk, last tenth of a long answer over the first",
        "0.9 – 1.1",
        lambda figures, name: _center(
            figures.ratio(f"cpu_chunk_last/{PROCESSOR}", f"cpu_chunk_first/{PROCESSOR}", name)
        ),
        lambda v: 0.9 <= v <= 1.1,
    ),
    Target("another stream's latest chunk, at prompts of 1 MB", "≤ 5 ms", _median("late_prompt"), lambda v: v <= 5),
)


def _targets(figures: Figures, tollgates: Sequence[str]) -> list[str]:
    lines = [f"| figure | target | {' | '.join(tollgates)} |", "|---|---|" + "---|" * len(tollgates)]
    for target in TARGETS:
        cells = []
        for name in tollgates:
            value = target.value(figures, name)
            verdict = "" if value is None else "met" if target.met(value) else "**not met**"
            cells.append("not measured" if value is None else f"{Spread(value, value, value)}, {verdict}")
        lines.append(f"| {target.what} | {target.wanted} | {' | '.join(cells)} |")
    return lines


# Figures --------------------------------------------------------------------------------------------------------------


def _rows() -> list[tuple[str, str, str]]:
    """(title, figure, kind): kind is "plain", or "added" for what is over the bare Envoy."""
    rows = []
    for connections in (1, BUSY, 256):
        at = f"{connections} connection{'s' if connections > 1 else ''}"
        rows += [
            (f"p50, {at}, ms", f"p50_{connections}", "plain"),
            (f"p50 added, {at}, ms", f"p50_{connections}", "added"),
            (f"p99, {at}, ms", f"p99_{connections}", "plain"),
            (f"p99 added, {at}, ms", f"p99_{connections}", "added"),
            (f"requests a second, {at}", f"rps_{connections}", "plain"),
        ]
    processes = ((WHOLE, "gateway and Envoy"), (PROCESSOR, "processor"), (ENVOY, "Envoy"), (STORE, "Valkey"))
    bench = ((LOAD, "load generator"), (PROVIDER, "provider"))
    rows += [(f"CPU a request, {title}, µs", f"cpu_request/{name}", "plain") for name, title in processes + bench]
    rows += [
        ("first token, p50, ms", "ttft_p50", "plain"),
        ("first token added, p50, ms", "ttft_p50", "added"),
        ("first token added, p99, ms", "ttft_p99", "added"),
        ("gap between events added, p50, ms", "gap_p50", "added"),
        ("gap between events added, p99, ms", "gap_p99", "added"),
    ]
    for figure, count in (("cpu_event", FEW), ("cpu_event_busy", MANY)):
        rows += [
            (f"CPU a streamed event, {count} streams, {title}, µs", f"{figure}/{name}", "plain")
            for name, title in processes + bench
        ]
    rows += [
        ("streams of 50 events a second held", "held", "plain"),
        ("… the provider's own worst lateness at that, ms", "held_provider_late", "plain"),
    ]
    rows += [(f"memory an idle stream, {title}, KB", f"memory/{name}", "plain") for name, title in processes[:3]]
    rows += [("… with so many open", "idle_streams", "plain"), ("start to the first answer, s", "start", "plain")]
    rows += [
        (f"start to ready, as the manifest has it{title}, s", f"start_up/{name}", "plain")
        for name, title in [("ready", ""), *((name, f": {name}") for name in ("processor", "Envoy", *startup.STEPS))]
    ]
    for name, title in (("few", "10 streams open"), ("many", "thousands open")):
        rows.append((f"CPU a request, processor, {title}, µs", f"cpu_request_{name}/{PROCESSOR}", "plain"))
    for name in ("first", "last"):
        title = f"CPU a chunk, processor, {name} tenth of a long answer, µs"
        rows.append((title, f"cpu_chunk_{name}/{PROCESSOR}", "plain"))
    rows += [
        ("another stream's latest chunk, ms", "late_alone", "plain"),
        ("another stream's latest chunk, at prompts of 1 MB, ms", "late_prompt", "plain"),
    ]
    return rows


def _figures(figures: Figures, names: Sequence[str]) -> list[str]:
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for title, figure, kind in _rows():
        spreads = [figures.added(figure, n, _BARE) if kind == "added" else figures.spread(figure, n) for n in names]
        if kind == "added":
            spreads = [None if name in (_BARE, Direct.name) else s for name, s in zip(names, spreads, strict=True)]
        if any(spread is not None for spread in spreads):
            lines.append(f"| {title} | {' | '.join('' if s is None else str(s) for s in spreads)} |")
    return lines


def page(figures: Figures, kinds: Sequence[type[Gateway]], plan: Plan) -> str:
    """Markdown. `{chart}` in it stands for the chart's file."""
    names = [kind.name for kind in kinds]
    tollgates = [kind.name for kind in kinds if issubclass(kind, Tollgate)]
    failures = figures.failures.items()
    missing = [f"- {name}, {part}: {' '.join(reason.split())[:300]}" for (part, name), reason in failures]
    return "\n".join(
        (
            "# Tollgate beside a bare Envoy and other gateways",
            "",
            f"`make bench` of {time.strftime('%Y-%m-%d')}: {plan.rounds} interleaved rounds, the long parts in "
            f"{min(plan.seldom, plan.rounds)} of them; medians, and the least and the most of a round. "
            f"{os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}. Load generator, "
            "provider and gateway share the cores: read ratios, not absolutes. [What each figure is](../README.md).",
            "",
            "![The main figures]({chart})",
            "",
            "## Targets",
            "",
            *_targets(figures, tollgates),
            "",
            "## Figures",
            "",
            *_figures(figures, names),
            "",
            "## What is switched on",
            "",
            *map(_switched_on, kinds),
            "",
            *(["## Not measured", "", *missing, ""] if missing else []),
        )
    )


def _switched_on(kind: type[Gateway]) -> str:
    refusal = f". Shown by a refusal ({' or '.join(map(str, kind.refuses))}) before the rounds." if kind.refuses else ""
    return f"- {kind.name}: {kind.everything}{refusal}"


# The chart ------------------------------------------------------------------------------------------------------------

_PANELS = (
    ("p50 of a request, 1 connection, ms", "p50_1"),
    ("requests a second, 32 connections", "rps_32"),
    ("CPU a request, gateway and Envoy, µs", f"cpu_request/{WHOLE}"),
    (f"CPU a streamed event, {MANY} streams, gateway and Envoy, µs", f"cpu_event_busy/{WHOLE}"),
    ("streams of 50 events a second held", "held"),
    ("memory an idle stream, gateway and Envoy, KB", f"memory/{WHOLE}"),
)
_WIDTH, _LABELS, _BAR, _TITLE = 460, 120, 18, 34


def chart(figures: Figures, kinds: Sequence[type[Gateway]]) -> str:
    """SVG: a panel a figure, a bar a gateway, on a logarithmic scale, since LiteLLM is hundreds of times off."""
    drawn = []
    height = _TITLE + _BAR * len(kinds) + 16
    for position, (title, figure) in enumerate(_PANELS):
        x, y = (position % 2) * _WIDTH, (position // 2) * height
        drawn.append(f'<g transform="translate({x + 10},{y + 10})">{_panel(figures, kinds, title, figure)}</g>')
    rows = (len(_PANELS) + 1) // 2
    drawn.append(
        f'<text x="10" y="{rows * height + 12}" fill="#57606a">Logarithmic scales; medians of the rounds.</text>'
    )
    size = f'width="{2 * _WIDTH + 20}" height="{rows * height + 20}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(drawn)}</svg>\n'
    )


def _panel(figures: Figures, kinds: Sequence[type[Gateway]], title: str, figure: str) -> str:
    medians = {kind.name: figures.median(figure, kind.name) for kind in kinds}
    known = [value for value in medians.values() if value and value > 0]
    parts = [f'<text y="14" font-weight="bold">{escape(title)}</text>']
    for row, kind in enumerate(kinds):
        y = _TITLE - 12 + row * _BAR
        value = medians[kind.name]
        parts.append(f'<text x="{_LABELS - 6}" y="{y + 12}" text-anchor="end">{escape(kind.name)}</text>')
        if not value or value <= 0:
            continue
        width = _length(value, min(known), max(known)) * (_WIDTH - _LABELS - 90)
        colour = "#1f6feb" if issubclass(kind, Tollgate) else "#9aa4b2"
        parts.append(f'<rect x="{_LABELS}" y="{y + 2}" width="{width:.1f}" height="{_BAR - 5}" fill="{colour}"/>')
        label = Spread(value, value, value)
        parts.append(f'<text x="{_LABELS + width + 5:.1f}" y="{y + 12}">{label}</text>')
    return "".join(parts)


def _length(value: float, least: float, most: float) -> float:
    """From a tenth to one: a decade is as long as any other."""
    return 1.0 if most <= least else 0.1 + 0.9 * math.log(value / least) / math.log(most / least)
