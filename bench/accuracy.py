"""`python -m bench.accuracy`: how well the running count of a stream follows its bill, over all recorded streams.

Each stream goes through the StreamMeter of its own dialect; what is compared with the bill is `seen`, the text alone.
Factors are learned as in production, by the ledger's own script in a Valkey of its own: on one half of the recordings,
and measured on the other. A recording's half is decided by a digest of its name, and all is done for several such
splits. Deterministic: no figure depends on the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

from bench.figures import quantile
from extproc import models
from extproc.dialects import DIALECTS
from extproc.dialects.dialect import Address
from extproc.errors import BadRequest
from extproc.jsonarray import JsonArrayParser
from extproc.ledger import Ledger
from extproc.local.valkey import LocalValkey
from extproc.metering import StreamMeter, starting_factor
from extproc.records import Call, Target
from extproc.sse import SseParser
from extproc.tokens import counter
from tests.recordings import COLLECTION, Case, cases

RESULTS = Path(__file__).parent / "results" / "accuracy.md"
LEAST_TOKENS = 100
SPLITS = 8
_DIALECTS = {
    "openai-chat": "openai-chat",
    "openai-responses": "openai-responses",
    "anthropic-messages": "anthropic-messages",
    "gemini": "gemini-generate",
}
_OTHERS = "other providers"
# A recording with one of these is not plain text, whatever its meta says of thoughts and calls of tools.
_NOT_TEXT = ("audio", "block:", "citations", "image-out", "server-tool", "tool-call")

# Why these are far off, by hand. They stay in the figures.
KNOWN = {
    "anthropic/messages-stream-claude-sonnet-4-5-20250929-image-in-02": "its words are cut between events more than "
    "others' (`d wings`), and each piece counts as a token",
    "anthropic/messages-stream-claude-sonnet-4-6-06": "short: a table with emoji; why it costs more is not known",
    "gemini/generate-stream-gemini-2.5-flash-lite-long-output-01": "three pieces of its text came as `content: null`: "
    "billed, and not there",
    "groq/chat-stream-llama-3.1-70b-versatile-01": "billed for twice its text; nothing in the answer says for what",
    "openai/responses-stream-gpt-4.1-2025-04-14-long-output-01": "compactions, which are encrypted",
    "openrouter/chat-stream-minimax-m1-02": "its thoughts were left out and are not told apart in the bill",
}


@dataclass(frozen=True, eq=False)
class Stream:
    """One recorded stream, and the target that it would have been asked of."""

    case: Case

    @cached_property
    def target(self) -> Target:
        return Target(self.case.provider, self.case.model)

    @property
    def about(self) -> str:
        """The row of the table that it belongs to."""
        match self.case.protocol, self.case.provider:
            case ("anthropic-messages", _):
                return "Anthropic"
            case ("gemini", _):
                return "Gemini"
            case (protocol, "openai"):
                return "OpenAI, chat" if protocol == "openai-chat" else "OpenAI, Responses"
        return _OTHERS

    @property
    def family(self) -> str:
        """Models of one provider that start from the same factor."""
        return f"{self.case.provider}/{starting_factor(self.target):.3f}"

    @property
    def completion(self) -> int:
        """All output tokens of the bill."""
        return self.case.figures[1] if self.case.figures else 0

    @property
    def billed(self) -> int:
        """Output tokens, without those thoughts that the provider counts apart."""
        return self.completion - (self.case.figures[3] if self.case.figures else 0)

    def meter(self, factor: float = 1.0) -> StreamMeter:
        """After the whole stream."""
        framing = JsonArrayParser if "json-array" in self.case.features else SseParser
        dialect = DIALECTS[_DIALECTS[self.case.protocol]]
        known = models.traits(self.target.provider, self.target.model, None)
        meter = StreamMeter(dialect, counter(known.encoding), factor, framing=framing)
        for chunk in self.case.recorded_chunks():
            meter.feed(chunk)
        meter.finish()
        return meter

    @cached_property
    def lesson(self) -> tuple[int, int] | None:
        """What production learns from it, if anything (`exchange.py`)."""
        call = self._call
        teaches = call is None or call.teaches
        return self.shown if teaches and not self._thinks else None

    @cached_property
    def shown(self) -> tuple[int, int] | None:
        """(counted, billed) where the meter knows of nothing that was billed and not shown."""
        return self.meter().learnable()

    @cached_property
    def _call(self) -> Call | None:
        """The recorded request, if there is one that can be read."""
        address = Address(self.case.model, stream=True) if self.case.protocol == "gemini" else Address()
        with suppress(BadRequest):
            return DIALECTS[_DIALECTS[self.case.protocol]].read_call(self.case.request or {}, address)
        return None

    @property
    def _thinks(self) -> bool:
        """As `plan.py` decides it."""
        if self._call is not None and self._call.thinks is not None:
            return self._call.thinks
        return models.traits(self.target.provider, self.target.model, None).reasoning


def recorded(root: Path) -> list[Stream]:
    """Every whole stream with usage."""
    return [
        Stream(case)
        for case in cases(root)
        if case.protocol in _DIALECTS and case.stream and case.complete and case.figures
    ]


def plain(stream: Stream) -> bool:
    """At least 100 tokens of text, and all that was billed is text in the answer."""
    return stream.case.countable_text and stream.billed >= LEAST_TOKENS


def told_apart(stream: Stream) -> bool:
    """The same, but for thoughts that are not shown, and that the bill has a figure of their own for."""
    meta: dict[str, Any] = stream.case.meta
    text = not (meta.get("thinking_chars") or meta.get("tool_calls"))
    text = text and not any(name.startswith(_NOT_TEXT) for name in stream.case.features)
    reasoning = (stream.case.figures or (0, 0, 0, 0))[3]
    return text and bool(meta.get("text_chars")) and reasoning > 0 and stream.billed >= LEAST_TOKENS


def half(stream: Stream, split: int) -> bool:
    """On which side of this split it is."""
    return bool(sha256(f"{split}/{stream.case.name}".encode()).digest()[0] & 1)


# Learning -------------------------------------------------------------------------------------------------------------

Key = Callable[[Stream], str]


def by_family(stream: Stream) -> str:
    return stream.family


def by_model(stream: Stream) -> str:
    """As in production, where there are more than two streams of a model."""
    return f"{stream.target.provider}/{stream.target.model}"


def given(stream: Stream, _: Sequence[Stream]) -> float:
    """The product's own starting factor."""
    return starting_factor(stream.target)


def unknown(stream: Stream, taught: Sequence[Stream]) -> float:
    """One that knows only the half that is learned from: its median for the family."""
    ratios = [s.lesson[1] / s.lesson[0] for s in taught if s.lesson and s.family == stream.family]
    return statistics.median(ratios) if ratios else 1.0


Start = Callable[[Stream, Sequence[Stream]], float]


@dataclass(frozen=True, slots=True)
class Error:
    """How far off the count was at a stream's end, against the bill. `floored` is what production has there."""

    stream: Stream
    seen: float
    floored: float


async def errors(
    ledger_url: str, streams: Sequence[Stream], wanted: Sequence[Stream], key: Key, start: Start
) -> list[Error]:
    """Of every wanted stream once a split, with the factors learned from the half that it is not in."""
    found: list[Error] = []
    for split in range(SPLITS):
        for side in (False, True):
            ledger = Ledger(ledger_url, namespace=f"{key.__name__}-{start.__name__}-{split}-{side}")
            taught = [s for s in streams if half(s, split) is side and s.lesson]
            for stream in taught:
                counted, billed = stream.lesson or (0, 0)
                await ledger.learn(key(stream), counted, billed, start(stream, taught))
            factors = await ledger.factors()
            await ledger.close()
            for stream in wanted:
                if half(stream, split) is not side:
                    meter = stream.meter(factors.get(key(stream)) or start(stream, taught))
                    found.append(Error(stream, meter.seen / stream.billed - 1, meter.tokens / stream.completion - 1))
    return found


# The page -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of streams. Each counts once, with the median of its splits; errors are absolute."""

    about: str
    n: int
    median: float
    p90: float
    worst: float
    worst_split: float  # of any stream in any split
    floored: float  # the median, as production has it

    def __str__(self) -> str:
        figures = (self.median, self.p90, self.worst, self.worst_split, self.floored)
        return f"| {self.about} | {self.n} | {' | '.join(f'{100 * figure:.1f}%' for figure in figures)} |"


def by_stream(found: Iterable[Error]) -> dict[Stream, Error]:
    """The median of all splits."""
    grouped: dict[Stream, list[Error]] = {}
    for error in found:
        grouped.setdefault(error.stream, []).append(error)
    return {
        stream: Error(stream, statistics.median(e.seen for e in ones), statistics.median(e.floored for e in ones))
        for stream, ones in grouped.items()
    }


def rows(found: Sequence[Error]) -> list[Row]:
    """One a kind, in the order of their names, other providers last."""
    kinds: dict[str, list[Error]] = {}
    for error in found:
        kinds.setdefault(error.stream.about, []).append(error)
    return [_row(about, kinds[about]) for about in sorted(kinds, key=lambda about: (about == _OTHERS, about))]


def _row(about: str, ones: Sequence[Error]) -> Row:
    streams = by_stream(ones).values()
    off = sorted(abs(error.seen) for error in streams)
    floored = statistics.median(abs(error.floored) for error in streams)
    worst_split = max(abs(error.seen) for error in ones)
    return Row(about, len(off), statistics.median(off), quantile(off, 0.9), off[-1], worst_split, floored)


@dataclass(frozen=True)
class Accuracy:
    """All that was measured. `hidden` are the streams of at least 100 tokens that are left out."""

    streams: list[Stream]
    hidden: list[Stream]
    figures: dict[str, list[Error]]

    def __str__(self) -> str:
        return "\n".join(_page(self))


FAMILY, MODEL, UNKNOWN, APART = "by family", "by model", "no start", "thoughts told apart"


async def measure(root: Path) -> Accuracy:
    """Everything, with a Valkey of its own."""
    streams = recorded(root)
    long = [stream for stream in streams if plain(stream)]
    wanted = [stream for stream in long if stream.shown is not None]
    apart = [stream for stream in streams if told_apart(stream)]
    with tempfile.TemporaryDirectory(prefix="tg") as name, LocalValkey(Path(name)) as valkey:
        families = await errors(valkey.url, streams, [*wanted, *apart], by_family, given)
        figures = {
            FAMILY: [error for error in families if error.stream in wanted],
            MODEL: await errors(valkey.url, streams, wanted, by_model, given),
            UNKNOWN: await errors(valkey.url, streams, wanted, by_family, unknown),
            APART: [error for error in families if error.stream in apart],
        }
    return Accuracy(streams, [stream for stream in long if stream.shown is None], figures)


def _page(found: Accuracy) -> list[str]:
    lessons = sum(stream.lesson is not None for stream in found.streams)
    return [
        "# How well the running count follows the bill",
        "",
        f"`python -m bench.accuracy`, over {len(found.streams)} whole recorded streams with usage. Measured are those "
        f"of at least {LEAST_TOKENS} billed output tokens, all of them plain text in the answer; learned from is what "
        f"production learns from ({lessons} streams of 30 tokens and more, [how](../README.md#accuracy)). Each of "
        f"{SPLITS} splits is measured both ways; a stream's error is the median of its splits. Errors are absolute, of "
        "the count of the text alone, at the stream's end; production's count is no less than what the provider has "
        "reported on its way.",
        "",
        "## Factors learned by family: models of a provider that start from the same factor",
        "",
        *_table(found.figures[FAMILY]),
        "",
        "## Factors learned by model, as in production",
        "",
        "Of most models there are one or two recordings, so that this is nearly the starting factor.",
        "",
        *_table(found.figures[MODEL]),
        "",
        "## No starting factor but the median of the half that is learned from",
        "",
        "The starting factors in `extproc/metering.py` come from these same recordings (but for Claude's newer "
        "models': 30% more, as Anthropic says). Without them, a family that the other half does not have is counted as "
        "it is.",
        "",
        *_table(found.figures[UNKNOWN]),
        "",
        "## Streams with thoughts that are billed apart and not shown",
        "",
        "Not learned from. Their text against the bill without the thoughts; production's count against all of it, "
        "before it adds what they may have thought until their first word.",
        "",
        *_table(found.figures[APART]),
        "",
        "## Left out",
        "",
        "Streams that hold something of which the meter knows that it was billed and not shown, whatever their error. "
        "The same rule keeps production from learning from them.",
        "",
        *(_named(stream, stream.meter().seen / stream.billed - 1) for stream in found.hidden),
        "",
        "## Each stream, by family",
        "",
        "| stream | billed | error | |",
        "|---|---|---|---|",
        *map(_line, sorted(by_stream(found.figures[FAMILY]).values(), key=lambda error: -abs(error.seen))),
        "",
    ]


def _table(found: Sequence[Error]) -> list[str]:
    header = "| | streams | median | p90 | worst | worst, any split | median of production's count |"
    return [header, "|---|---|---|---|---|---|---|", *map(str, rows(found))]


def _named(stream: Stream, error: float) -> str:
    return f"- {stream.case.name}, {100 * error:+.1f}%: {KNOWN.get(stream.case.name, 'a tool of the provider at work')}"


def _line(error: Error) -> str:
    name = error.stream.case.name
    return f"| {name} | {error.stream.billed} | {100 * error.seen:+.1f}% | {KNOWN.get(name, '')} |"


def main() -> None:
    """Measure, and write the page to bench/results/."""
    parser = argparse.ArgumentParser(prog="bench.accuracy", description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the page to write")
    given = parser.parse_args()
    if not cases(COLLECTION):
        sys.exit("The whole collection of recordings is not here; the tests' own few have no such streams.")
    page = str(asyncio.run(measure(COLLECTION)))
    given.results.parent.mkdir(parents=True, exist_ok=True)
    given.results.write_text(page)
    print(page)


if __name__ == "__main__":
    main()
