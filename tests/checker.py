"""What must hold after every case, whatever was broken: nothing unbilled, nothing billed twice, nothing left over.

Redis, the journals, /proc and Envoy's statistics are read directly: none of it through the ledger's own code.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from redis import Redis

from extproc.limits import MAX_LEDGER_CONNECTIONS
from extproc.local.provider import Received, Script
from extproc.providers import PROVIDERS
from extproc.records import Outcome, UsageRecord
from extproc.tokens import counter
from tests.rig import Rig, key_of

LEASE_TOKENS = 100  # the stated bound: what one open stream may miss, or exceed, is one lease

_SETTLES_WITHIN_S = 15.0
_SPARE_FILES = MAX_LEDGER_CONNECTIONS + 4  # connections that a processor opens when it first needs them
_LONGEST_CHAIN = 3  # what a row may stand for that was written before any answer, and so knows of no attempt
_ADDRESS = re.compile(rb"[\w.+-]+@[\w-]+(\.[\w-]+)+")
_OURS = ("x-tollgate-", "x-envoy-", "x-request-id", "x-forwarded-")  # headers that are no provider's business


@dataclass
class Checker:
    """The one checker. `check` waits until everything holds, and says what does not where it never does.

    An answer that the provider sent whole is posted by the provider's own figures, unless its row says that it was cut,
    left or broken. Of every other what was emitted and not posted is bounded by a lease. `unseen` adds, by caller, what
    a case says cannot have reached the gateway.
    """

    rig: Rig
    unseen: dict[str, int] = field(default_factory=dict)
    files: dict[int, int] = field(default_factory=dict)  # each processor's open files when it was first seen
    reported: set[str] = field(default_factory=set)  # each problem fails one case, and not those after it too
    emitted: dict[tuple[int, int], int] = field(default_factory=dict)  # tokens, as they do not change

    def __post_init__(self) -> None:
        self._leftovers()

    async def check(self) -> None:
        """Raises AssertionError with all that is wrong."""
        deadline = time.monotonic() + _SETTLES_WITHIN_S
        quiet = 0
        while quiet < 2:  # twice: what comes late and twice must be seen
            problems = [problem for problem in await self._problems() if problem not in self.reported]
            quiet = 0 if problems else quiet + 1
            if problems and time.monotonic() > deadline:
                self.reported.update(problems)
                raise AssertionError("\n".join(("the checker found:", *problems)))
            await asyncio.sleep(0.05)

    async def _problems(self) -> list[str]:
        ledger = _LedgerDump.of(self.rig)
        rows = self.rig.records()
        return [
            *ledger.problems(),
            *_unsettled(ledger, rows),
            *_misposted(ledger, rows),
            *self._unbilled(rows),
            *_leaks(self.rig, ledger),
            *self._leftovers(),
            *await self._open_streams(),
        ]

    def _unbilled(self, rows: list[UsageRecord]) -> list[str]:
        """What the provider was asked and emitted, by caller, against what was written down."""
        left = [row for row in rows if row.outcome is not Outcome.REFUSED]
        asked = _by_caller(self.rig.played)
        problems = [*_untold(asked, left)]
        loose = {caller: _take_billed(played, left, caller) for caller, played in asked.items()}
        return problems + [problem for caller, played in loose.items() for problem in self._short(played, left, caller)]

    def _short(self, played: list[_Played], left: list[UsageRecord], caller: str | None) -> Iterable[str]:
        """Of answers that no row has the figures of. Takes as many rows out of `left`."""
        name = caller or "no user"
        own = [row for row in left if _is_of(row, caller)]
        broken = sum(row.outcome is not Outcome.OK for row in own)
        figures = [figure for figure in map(_reported, played) if figure is not None]
        if len(figures) > broken:
            yield f"{name}: the provider billed {figures}, no row says so and {broken} did not end well"
        own = sorted(own, key=lambda row: row.completion_tokens, reverse=True)[: len(played)]
        emitted = sum(self._emitted(request, script) for request, script in played)
        posted = sum(row.completion_tokens for row in own)
        if emitted - posted > LEASE_TOKENS * len(played) + self.unseen.get(name, 0):
            yield f"{name}: {emitted} tokens emitted, {posted} posted"
        for row in own:
            left.remove(row)

    def _emitted(self, request: Received, script: Script) -> int:
        key = (id(request), request.chunks_sent)  # the rig keeps every request, so that its id is no other's
        if key not in self.emitted:
            self.emitted[key] = emitted_tokens(request, script)
        return self.emitted[key]

    def _leftovers(self) -> list[str]:
        problems = []
        for processor in self.rig.processors:
            process = processor.process
            if process is None or process.returncode is not None:
                continue
            count = len(os.listdir(f"/proc/{process.pid}/fd"))
            allowed = self.files.setdefault(process.pid, count) + _SPARE_FILES
            if count > allowed:
                problems.append(f"processor {process.pid} has {count} open files, {allowed} at most were to be left")
        return problems

    async def _open_streams(self) -> list[str]:
        if self.rig.envoy.returncode is not None:
            return []
        stats = await self.rig.admin("/stats?filter=rq_active")
        figures = (line.split(": ") for line in stats.splitlines() if line.startswith("cluster."))
        return [f"Envoy's {name} is {figure}" for name, figure in figures if figure != "0"]


@dataclass(frozen=True)
class _LedgerDump:
    """The whole of Redis. `text` is all of it, for canaries."""

    holds: dict[str, dict[str, str]]
    windows: dict[str, dict[str, str]]
    text: str

    @classmethod
    def of(cls, rig: Rig) -> _LedgerDump:
        prefix = f"{{{rig.namespace}}}:"
        found: dict[str, dict[str, dict[str, str]]] = {"hold": {}, "window": {}}
        with Redis(unix_socket_path=str(rig.valkey.socket_path), decode_responses=True, socket_timeout=5) as redis:
            keys = sorted(redis.scan_iter(count=10_000))
            pipeline = redis.pipeline(transaction=False)
            for key in keys:
                if key.endswith((":due", ":windows", ":outboxes")):
                    pipeline.zrange(key, 0, -1)
                else:
                    pipeline.hgetall(key)
            everything = list(zip(keys, pipeline.execute(), strict=True))
        for key, values in everything:
            kind, _, name = key.removeprefix(prefix).partition(":")
            if kind in found:
                found[kind][name] = values
        return cls(found["hold"], found["window"], json.dumps(everything))

    def problems(self) -> list[str]:
        open_holds = {name: hold for name, hold in self.holds.items() if hold["state"] == "open"}
        held: dict[str, int] = {}
        for hold in open_holds.values():
            for key, unit in json.loads(hold["windows"]):
                name = key.partition(":window:")[2]
                held[name] = held.get(name, 0) + int(hold[unit])
        problems = [f"the hold of {name} is left open" for name in open_holds]
        for name, window in self.windows.items():
            pending = int(window.get("pending", 0))
            if pending != held.get(name, 0):
                problems.append(f"{name}: {pending} is pending, the open holds are {held.get(name, 0)}")
        return problems

    def budgets(self) -> dict[str, int]:
        """What is posted under each budget, its windows together."""
        posted: dict[str, int] = {}
        for name, window in self.windows.items():
            budget_id = name.rpartition(":")[0]
            posted[budget_id] = posted.get(budget_id, 0) + int(window.get("posted", 0))
        return posted


def emitted_tokens(request: Received, script: Script) -> int:
    """Tokens of all text in the chunks that the provider sent, as far as they can be read."""
    if not 200 <= script.status < 300 or dict(script.headers).get("content-encoding"):
        return 0
    body = b"".join(script.chunks[: request.chunks_sent])
    count = counter("o200k_base")
    lines = [body] if script.whole else body.replace(b"\r", b"\n").split(b"\n")
    return sum(count(text) for line in lines for text in _texts(line.removeprefix(b"data:")))


def _texts(data: bytes) -> Iterable[str]:
    """Of one event or a whole answer, in OpenAI's chat, Anthropic's or Google's form."""
    said = {}
    with suppress(ValueError):
        said = json.loads(data)
    if not isinstance(said, dict):
        return
    for choice in said.get("choices") or ():
        message = choice.get("delta") or choice.get("message") or {}
        yield message.get("content") or ""
        yield from (call["function"].get("arguments") or "" for call in message.get("tool_calls") or ())
    blocks = said.get("content") or [said.get("delta")]
    parts = [part for candidate in said.get("candidates") or () for part in candidate["content"].get("parts") or ()]
    yield from (part.get("text") or "" for part in (*blocks, *parts) if isinstance(part, dict))


_Played = tuple[Received, Script]


def _by_caller(played: Iterable[_Played]) -> dict[str | None, list[_Played]]:
    """Those without a name are last, for the rows that are left then."""
    found: dict[str | None, list[_Played]] = {}
    for request, script in played:
        found.setdefault(_caller(request), []).append((request, script))
    return dict(sorted(found.items(), key=lambda item: item[0] is None))


def _caller(request: Received) -> str | None:
    """By the request's `user`, which `Rig.ask` sets, or by the first address in it: not every dialect has users."""
    named = json.loads(request.body).get("user")
    address = None if named else _ADDRESS.search(request.body)
    return address[0].decode() if address else named


def _untold(asked: dict[str | None, list[_Played]], rows: list[UsageRecord]) -> Iterable[str]:
    """Who was asked more often than the rows' attempts say."""
    attempts = [(row, row.attempts or _LONGEST_CHAIN) for row in rows]
    everybodys = sum(count for _, count in attempts)
    for caller, played in asked.items():
        told = everybodys if caller is None else sum(count for row, count in attempts if _is_of(row, caller))
        if told < len(played):
            yield f"{caller or 'no user'}: the providers saw {len(played)} requests, the rows say {told}"
        everybodys -= len(played)


def _take_billed(played: list[_Played], left: list[UsageRecord], caller: str | None) -> list[_Played]:
    """Takes the rows out of `left` that have an answer's figures, one for each. Returns the answers without one."""
    loose = []
    for one in played:
        figure = _reported(one)
        own = (row for row in left if figure == (row.prompt_tokens, row.completion_tokens) and _is_of(row, caller))
        if (row := next(own, None)) is None:
            loose.append(one)
        else:
            left.remove(row)
    return loose


def _is_of(row: UsageRecord, caller: str | None) -> bool:
    return caller in (None, row.service or row.user)


def _reported(played: _Played) -> tuple[int, int] | None:
    """Prompt and completion tokens as the provider says them, of an answer that it sent whole; None without."""
    request, script = played
    if request.ended != "whole" or not 200 <= script.status < 300 or dict(script.headers).get("content-encoding"):
        return None
    found: dict[str, Any] = {}
    body = b"".join(script.chunks)
    for line in (body, *body.replace(b"\r", b"\n").split(b"\n")):  # a whole answer, or events
        with suppress(ValueError, TypeError, AttributeError):
            said = json.loads(line.removeprefix(b"data:"))
            said = said.get("message") or said.get("response") or said  # Anthropic's first event; Responses' last
            found |= said.get("usage") or said.get("usageMetadata") or {}
    return next((figures for names in _FIGURES if (figures := _both(found, *names)) is not None), None)


# The names of prompt and of completion tokens, as each dialect has them, with what is billed beside each.
_FIGURES = (
    (("prompt_tokens",), ("completion_tokens",)),
    (("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"), ("output_tokens",)),
    (("promptTokenCount", "toolUsePromptTokenCount"), ("candidatesTokenCount", "thoughtsTokenCount")),
)


def _both(usage: dict[str, Any], prompt: tuple[str, ...], completion: tuple[str, ...]) -> tuple[int, int] | None:
    """Answers of the tests' own may have nonsense for figures."""
    figures = usage.get(prompt[0]), usage.get(completion[0])
    if not all(type(figure) is int and figure >= 0 for figure in figures):
        return None
    return sum(usage.get(name) or 0 for name in prompt), sum(usage.get(name) or 0 for name in completion)


def _unsettled(ledger: _LedgerDump, rows: list[UsageRecord]) -> list[str]:
    """Every hold has a row, and every row of a request that was let through a hold, settled or expired."""
    ids = {row.request_id for row in rows}
    admitted = {row.request_id for row in rows if row.outcome is not Outcome.REFUSED and row.cost_nanousd}
    ended = {name for name, hold in ledger.holds.items() if hold["state"] in ("settled", "expired")}
    return [
        *(f"{name} was held for and has no row" for name in set(ledger.holds) - ids),
        *(f"{name} was billed and never settled" for name in admitted - ended),
    ]


def _misposted(ledger: _LedgerDump, rows: list[UsageRecord]) -> list[str]:
    problems = []
    for budget_id, posted in ledger.budgets().items():
        billed = sum(_figure(row, budget_id) for row in rows if _applies(budget_id, row))
        if billed != posted:
            problems.append(f"{budget_id}: {posted} is posted, the rows' sum is {billed}")
    return problems


def _figure(row: UsageRecord, budget_id: str) -> int:
    tokens = budget_id.removesuffix("/soft").removesuffix("/shadow").endswith("/tokens")
    return row.prompt_tokens + row.completion_tokens if tokens else row.cost_nanousd


def _applies(budget_id: str, row: UsageRecord) -> bool:
    scope, _, rest = budget_id.partition("/")
    of = {"service": row.service, "team": row.team, "user": row.user, "model": row.requested_model}
    return scope == "global" or (of[scope] is not None and rest.startswith(f"{of[scope]}/"))


def _leaks(rig: Rig, ledger: _LedgerDump) -> list[str]:
    """A provider's key is for that provider only, a caller's token for the gateway, and its headers for nobody else."""
    secrets = {f"{name}'s key": {key_of(name)} for name in rig.providers}
    # How each token begins, which nothing else does.
    secrets["a caller's token"] = {token.partition(".")[0] for token in rig.minted}
    told = "\n".join(f"{told.headers.raw!r} {told.body.decode('latin-1')}" for told in rig.told)
    places = {"logs and journals": rig.everything_written(), "Redis": ledger.text, "callers' answers": told}
    places |= {
        name: "\n".join(_asked(name, request) for request in one.received) for name, one in rig.providers.items()
    }
    return [
        f"{what} is in {place}"
        for place, text in places.items()
        for what, hidden in secrets.items()
        if any(secret in text for secret in hidden)
    ] + [
        f"{name} was sent {header}"
        for name, provider in rig.providers.items()
        for header in {header for request in provider.received for header, _ in request.headers}
        if header.startswith(_OURS)
    ]


def _asked(name: str, request: Received) -> str:
    """All that a provider was sent but its own key."""
    own = PROVIDERS[name].auth_headers(key_of(name))
    pairs = [pair for pair in request.headers if pair not in own]
    return f"{request.target} {pairs} {request.body.decode('latin-1')}"
