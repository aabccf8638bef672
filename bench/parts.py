"""The parts of the bench. Each measures one gateway once, and is run for all of them in turn, round after round."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

from bench import load, processes, startup
from bench.figures import Figures, quantile
from bench.gateways import LONG_MODEL, STORE, BareEnvoy, Direct, Gateway, Tollgate, TollgateWire
from bench.load import Answer, Client

GAP_US = 20_000  # 50 events a second, about what models write
BUSY = 32  # the connections at which CPU is counted
LOAD, PROVIDER, WHOLE = "load generator", "provider", "whole"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. `seldom`: in how many of the rounds those parts run that take long."""

    rounds: int
    seldom: int
    deadline_s: float  # no part begins after it
    request_s: float  # of load, at each number of connections
    turns: int  # streams one by one, for the time to the first token
    events: int  # of a stream whose CPU is counted
    held_s: float  # how long streams must keep up
    held_most: int  # more are not tried
    idle: int
    idle_s: float  # of opening them
    crowd: int  # streams that are open while requests are counted
    long_tokens: int
    prompts: int  # of 1 MB


FULL = Plan(9, 3, 6 * 3600, 2.0, 30, 220, 3.0, 4_096, 10_000, 60.0, 5_000, 100_000, 8)
SHORT = Plan(1, 1, 150, 0.5, 10, 60, 1.0, 600, 500, 6.0, 500, 10_000, 3)


@dataclass
class Bench:
    """What all parts share."""

    plan: Plan
    figures: Figures
    provider_pid: int
    provider_port: int
    number: int = 0  # of the round

    def note(self, figure: str, gateway: Gateway, value: float) -> None:
        self.figures.note(figure, gateway.name, self.number, value)

    async def provider_late_ms(self) -> float:
        """How late the latest event was since this was last asked."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.provider_port)
        writer.write(b"GET /lateness HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        late_ms = float(await reader.read(64))
        writer.close()
        return late_ms


class Spent:
    """CPU microseconds since it was made, by process; WHOLE is the gateway with its Envoy, without its Valkey."""

    def __init__(self, bench: Bench, gateway: Gateway) -> None:
        self._roots = {**gateway.roots(), PROVIDER: [bench.provider_pid]}
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        used = {name: processes.cpu_us(pids) for name, pids in self._roots.items()}
        return {**used, LOAD: time.process_time_ns() / 1000}

    def us(self) -> dict[str, float]:
        """So far."""
        spent = {name: used - self._before[name] for name, used in self._now().items()}
        spent[WHOLE] = sum(used for name, used in spent.items() if name not in (STORE, PROVIDER, LOAD))
        return spent


# Whole answers --------------------------------------------------------------------------------------------------------


async def requests(bench: Bench, gateway: Gateway) -> None:
    """Latency, requests a second and CPU a request."""
    message = gateway.message()
    await load.requests(gateway.port, message, connections=8, seconds=0.1)
    for connections in (1, BUSY, 256):
        spent = Spent(bench, gateway)
        run = await load.requests(gateway.port, message, connections=connections, seconds=bench.plan.request_s)
        bench.note(f"p50_{connections}", gateway, quantile(run.seconds, 0.5) * 1000)
        bench.note(f"p99_{connections}", gateway, quantile(run.seconds, 0.99) * 1000)
        bench.note(f"rps_{connections}", gateway, len(run.seconds) / run.elapsed_s)
        if connections == BUSY:
            for process, us in spent.us().items():
                bench.note(f"cpu_request/{process}", gateway, us / len(run.seconds))


# Streams --------------------------------------------------------------------------------------------------------------

# Of few streams every event wakes everybody up by itself; of many, one read of a socket holds several.
FEW, MANY = 16, 96


async def streams(bench: Bench, gateway: Gateway) -> None:
    """Time to the first token, the gaps between events, and CPU an event."""
    message, turns = gateway.stream(3, 1000), bench.plan.turns
    one_by_one = await load.streams(gateway.port, message, count=1, words=3, expected_s=1, in_turn=turns)
    first_ms = sorted((answer.words[0] - answer.begun) * 1000 for answer in one_by_one)
    bench.note("ttft_p50", gateway, quantile(first_ms, 0.5))
    bench.note("ttft_p99", gateway, quantile(first_ms, 0.99))

    for figure, count in (("cpu_event", FEW), ("cpu_event_busy", MANY)):
        short, _ = await _paced(bench, gateway, count, 10)
        long, answers = await _paced(bench, gateway, count, bench.plan.events)
        events = count * (bench.plan.events - 10)
        for process, us in long.items():  # a stream's beginning and end are in both
            bench.note(f"{figure}/{process}", gateway, (us - short[process]) / events)
        if count == FEW:
            gaps_ms = sorted(gap * 1000 for answer in answers for gap in _gaps(answer))
            bench.note("gap_p50", gateway, quantile(gaps_ms, 0.5))
            bench.note("gap_p99", gateway, quantile(gaps_ms, 0.99))


async def _paced(bench: Bench, gateway: Gateway, count: int, events: int) -> tuple[dict[str, float], list[Answer]]:
    spent = Spent(bench, gateway)
    message = gateway.stream(events, GAP_US)
    expected_s = events * GAP_US / 1e6
    answers = await load.streams(gateway.port, message, count=count, words=events, expected_s=expected_s)
    return spent.us(), answers


def _gaps(answer: Answer) -> Iterable[float]:
    return (after - before for before, after in zip(answer.words, answer.words[1:], strict=False))


async def held(bench: Bench, gateway: Gateway) -> None:
    """The most streams of 50 events a second that do not fall behind: more and more until some do, then halved."""
    most, too_many, step = 0, bench.plan.held_most, 4 if bench.plan.rounds == 1 else 2
    while (count := most * step or 8) < too_many:
        if await _keeps_up(bench, gateway, count):
            most = count
        else:
            too_many = count
            break
    for _ in range(1 if bench.plan.rounds == 1 else 2):
        between = (most + too_many) // 2
        if between > most and await _keeps_up(bench, gateway, between):
            most = between
        else:
            too_many = between
    bench.note("held", gateway, most)
    bench.note("held_provider_late", gateway, await bench.provider_late_ms())


async def _keeps_up(bench: Bench, gateway: Gateway, count: int) -> bool:
    """A stream falls behind where its last event is later against its first than it was sent, by five events."""
    events = int(bench.plan.held_s * 1e6 / GAP_US)
    try:
        _, answers = await _paced(bench, gateway, count, events)
    except load.Unanswered:  # one that fails under the load does not hold it either
        return False
    behind_s = sorted(answer.words[-1] - answer.words[0] - (events - 1) * GAP_US / 1e6 for answer in answers)
    return quantile(behind_s, 0.99) < 5 * GAP_US / 1e6


# Open streams ---------------------------------------------------------------------------------------------------------

_SILENT_US = 3_600_000_000


async def idle(bench: Bench, gateway: Gateway) -> None:
    """Memory of streams that say nothing, in processes that have just started; and how long the start took."""
    if bench.number > 1 and gateway.roots():
        await gateway.stop()
        await gateway.up()
    bench.note("start", gateway, gateway.start_s)
    await load.requests(gateway.port, gateway.message(), connections=8, seconds=0.3)
    before = _resident(gateway)
    async with Client(gateway.port, 0) as client:
        message = gateway.stream(2, _SILENT_US)
        opened = await load.open_streams(client, message, count=bench.plan.idle, seconds=bench.plan.idle_s)
        await asyncio.sleep(0.5)
        for process, grown in _resident(gateway).items():
            bench.note(f"memory/{process}", gateway, (grown - before[process]) / opened / 1024)
        bench.note("idle_streams", gateway, opened)
    await asyncio.sleep(0.5)


async def start_up(bench: Bench, gateway: Gateway) -> None:
    """From the start of an instance, as the manifest has it, to ready."""
    for name, seconds in (await startup.measure()).items():
        bench.note(f"start_up/{name}", gateway, seconds)


def _resident(gateway: Gateway) -> dict[str, int]:
    used = {name: processes.resident_bytes(pids) for name, pids in gateway.roots().items() if name != STORE}
    return {**used, WHOLE: sum(used.values())}


# What must not grow ---------------------------------------------------------------------------------------------------


async def crowd(bench: Bench, gateway: Gateway) -> None:
    """CPU a request with 10 streams open, and with thousands."""
    async with Client(gateway.port, 0) as client:
        for name, count in (("few", 10), ("many", bench.plan.crowd - 10)):
            await load.open_streams(client, gateway.stream(2, _SILENT_US), count=count, seconds=60)
            await asyncio.sleep(0.2)
            spent = Spent(bench, gateway)
            run = await load.requests(gateway.port, gateway.message(), connections=BUSY, seconds=bench.plan.request_s)
            for process, us in spent.us().items():
                bench.note(f"cpu_request_{name}/{process}", gateway, us / len(run.seconds))
    await asyncio.sleep(0.5)


async def growth(bench: Bench, gateway: Gateway) -> None:
    """CPU a chunk in the first and in the last tenth of long answers."""
    tokens, gap_us, count = 20, 4_000, 4
    events = bench.plan.long_tokens // tokens
    message = gateway.stream(events, gap_us, tokens, model=LONG_MODEL, max_tokens=2 * bench.plan.long_tokens)
    whole_s = events * gap_us / 1e6
    running = asyncio.ensure_future(
        load.streams(gateway.port, message, count=count, words=events * tokens, expected_s=whole_s)
    )
    begun = time.perf_counter()
    windows: dict[str, tuple[float, float, dict[str, float]]] = {}
    for name, part in (("first", 0.01), ("last", 0.89)):
        await asyncio.sleep(begun + part * whole_s - time.perf_counter())
        spent, start = Spent(bench, gateway), time.perf_counter()
        await asyncio.sleep(0.1 * whole_s)
        windows[name] = start, time.perf_counter(), spent.us()
    answers = await running
    for name, (start, end, us_of) in windows.items():
        chunks = sum(start <= at < end for answer in answers for at in answer.words) / tokens
        for process, us in us_of.items():
            bench.note(f"cpu_chunk_{name}/{process}", gateway, us / chunks)


async def prompt(bench: Bench, gateway: Gateway) -> None:
    """How late another stream's latest event is while prompts of 1 MB come in, and while none does."""
    words = random.Random(1)
    text = " ".join("".join(words.choices("aeioulnrst", k=words.randint(2, 9))) for _ in range(160_000))[:1_000_000]
    large = gateway.message(text)
    bench.note("late_alone", gateway, await _latest_ms(gateway, bench.plan.prompts, None))
    bench.note("late_prompt", gateway, await _latest_ms(gateway, bench.plan.prompts, large))


async def _latest_ms(gateway: Gateway, times: int, large: bytes | None) -> float:
    gap_us, every_s = 5_000, 0.3
    events = int((times + 1) * every_s * 1e6 / gap_us)
    message = gateway.stream(events, gap_us)
    expected_s = events * gap_us / 1e6
    running = asyncio.ensure_future(load.streams(gateway.port, message, count=1, words=events, expected_s=expected_s))
    for _ in range(times):
        await asyncio.sleep(every_s)
        if large is not None:
            await load.ask(gateway.port, large)
    (answer,) = await running
    late_ms = sorted((at - answer.words[0]) * 1000 - n * gap_us / 1000 for n, at in enumerate(answer.words))
    return late_ms[-1] - quantile(late_ms, 0.5)


# ----------------------------------------------------------------------------------------------------------------------

Measure = Callable[[Bench, Gateway], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Part:
    """One measurement, and whom it is about."""

    measure: Measure
    seldom: bool
    about: tuple[type[Gateway], ...] = (Gateway,)


# Idle streams first: their memory is that of processes which have just started.
PARTS: dict[str, Part] = {
    "idle": Part(idle, True),
    "start_up": Part(start_up, True, (TollgateWire,)),
    "requests": Part(requests, False),
    "streams": Part(streams, False),
    "crowd": Part(crowd, True, (Tollgate,)),
    "growth": Part(growth, True, (Tollgate,)),
    "prompt": Part(prompt, True, (BareEnvoy, Tollgate)),
    "held": Part(held, True),  # last, since it overloads everybody
}
NOT_DIRECT = ("idle",)  # which has no process to look at


def applies(part: str, gateway: Gateway) -> bool:
    """Whether a part says anything of a gateway."""
    if isinstance(gateway, Direct) and part in NOT_DIRECT:
        return False
    return isinstance(gateway, PARTS[part].about)


def as_json(figures: Figures) -> str:
    """Every round's values, for whoever wants to look closer."""
    rows = [
        {"figure": figure, "gateway": gateway, "rounds": rounds}
        for (figure, gateway), rounds in sorted(figures.values.items())
    ]
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
