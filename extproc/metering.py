"""Counts what a provider streams, event by event, and says at the end what the answer is billed.

While a stream runs, its text is counted and multiplied by the model's factor (billed ÷ counted). Once it has ended,
the provider's own figures are what counts, if it gave any.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache
from hashlib import blake2b, shake_128
from math import ceil
from typing import Protocol

from extproc.dialects.dialect import Dialect
from extproc.limits import (
    COUNT_SLICE_CHARS,
    LEARN_MIN_TOKENS,
    MAX_CACHED_TRAITS,
    MAX_COUNT_CHARS,
    MAX_EVENT_BYTES,
    MAX_EVENT_COUNT_CHARS,
)
from extproc.records import Metered, Piece, Target, Usage, UsageSource
from extproc.sse import SseEvent, SseParser

# Medians of billed ÷ counted over recorded answers of 100 tokens and more, without what was not shown, by what a
# model's or provider's name holds. First match. Of the same text, Opus 4.7 and what came after it make about 30% more
# tokens than Claude did before (Anthropic's migration guides).
_CLAUDE = 1 / 0.881
_STARTING_FACTORS = (
    (re.compile(r"claude-(?:opus-4[-.][7-9]|(?:[a-z]+-)?[5-9])"), 1.3 * _CLAUDE),
    (re.compile(r"claude|anthropic"), _CLAUDE),
    (re.compile(r"gemini-2\.0"), 1.01),
    (re.compile(r"gemini-2\.5"), 1.13),
    (re.compile(r"gemini"), 1.05),
)


@lru_cache(maxsize=MAX_CACHED_TRAITS)
def starting_factor(target: Target) -> float:
    """Billed ÷ counted for a model about which nothing has been learned yet."""
    name = f"{target.provider}/{target.model}".lower()
    return next((factor for part, factor in _STARTING_FACTORS if part.search(name)), 1.0)


def count_texts(texts: Iterable[str], count: Callable[[str], int], max_chars: int = MAX_COUNT_CHARS) -> int:
    """Tokens of all texts. Long ones are counted in slices: linear, at the price of a token or two at each cut.

    Texts of more than `max_chars` together are estimated from that many of their characters: no count costs more.
    """
    texts = tuple(texts)
    if len(texts) == 1 and len(texts[0]) <= COUNT_SLICE_CHARS <= max_chars:
        return count(texts[0])
    if sum(map(len, texts)) > max_chars:
        return _estimate("\n".join(texts), count, max_chars // COUNT_SLICE_CHARS)
    return sum(count(text[i : i + COUNT_SLICE_CHARS]) for text in texts for i in range(0, len(text), COUNT_SLICE_CHARS))


def _estimate(text: str, count: Callable[[str], int], samples: int) -> int:
    """Tokens of a text from one slice of each of `samples` equal parts, multiplied by the slices in the part.

    Which slice, the text's digest decides: the same for the same text, but nobody can write one whose dense parts lie
    where they are known not to be looked at.
    """
    digest = blake2b(text.encode("utf-8", "surrogatepass")).digest()
    drawn = memoryview(shake_128(digest).digest(4 * samples)).cast("I")
    slices = ceil(len(text) / COUNT_SLICE_CHARS)
    total = 0
    for part in range(samples):
        first, end = slices * part // samples, slices * (part + 1) // samples
        start = min((first + drawn[part] % (end - first)) * COUNT_SLICE_CHARS, len(text) - COUNT_SLICE_CHARS)
        total += count(text[start : start + COUNT_SLICE_CHARS]) * (end - first)
    return total


def final_usage(
    reported: Usage | None, *, complete: bool, prompt_tokens: int, completion_tokens: int
) -> tuple[Usage, UsageSource]:
    """What an answer is billed: the provider's figures, else the counted ones (`prompt_tokens`, `completion_tokens`).

    A stream that did not end may have reported usage before its last text. The larger figure is taken then, and zeros,
    which some providers send with every event until the last, say nothing.
    """
    if reported is None:
        return Usage(prompt_tokens, completion_tokens), UsageSource.COUNTED
    if complete:
        return reported, UsageSource.PROVIDER
    completion = max(reported.completion, completion_tokens)
    usage = replace(reported, prompt=reported.prompt or prompt_tokens, completion=completion)
    return usage, UsageSource.PROVIDER if usage == reported else UsageSource.COUNTED


class Framing(Protocol):
    """How a stream is put together: `SseParser`, or `JsonArrayParser`, whose events are an array's elements."""

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """The events that this chunk completes. Raises StreamTooLarge."""

    def finish(self) -> bytes:
        """What came after the last of them."""


class StreamMeter:
    """One stream. `feed` takes it apart and counts; what it returns is passed on, or kept back where `hidden`.

    `count` gives a text's tokens, `factor` is billed ÷ counted. `hide_usage`: the caller did not ask for the chunk
    that holds nothing but usage. `choices` is how many answers were asked for. `framing` makes the parser of a stream
    whose events have so many bytes at most: `feed` raises StreamTooLarge for one above `max_event_bytes`.
    """

    def __init__(
        self,
        dialect: Dialect,
        count: Callable[[str], int],
        factor: float,
        *,
        hide_usage: bool = True,
        choices: int = 1,
        framing: Callable[[int], Framing] = SseParser,
        max_event_bytes: int = MAX_EVENT_BYTES,
    ) -> None:
        self.counted = 0
        # The running estimate of output tokens: counted text times the factor, rounded up, and no less than the
        # provider has reported so far. Some of it cannot be seen.
        self.tokens = 0
        self.usage: Usage | None = None
        self.errored = False
        self.service_tier: str | None = None
        self._read = dialect.piece_reader()
        self._count = count
        self._factor = factor
        self._hide_usage = hide_usage
        self._choices = choices
        self._framing = framing
        self._parser = framing(max_event_bytes)
        self._floor = 0
        self._done = False
        self._unseen = False
        self._started: set[int] = set()
        self._finished: set[int] = set()

    @property
    def seen(self) -> int:
        """The estimate of what could be seen, whatever the provider has reported."""
        return ceil(self.counted * self._factor)

    @property
    def complete(self) -> bool:
        """Whether the answer has come whole: closed by its dialect, or every choice finished (some never close)."""
        return self._done or (self._started <= self._finished and len(self._finished) >= self._choices)

    @property
    def closed(self) -> bool:
        """Whether the dialect's closing event has come, after which there is nothing more."""
        return self._done

    def feed(self, chunk: bytes) -> list[Metered]:
        """The events that this chunk completes, in order. An event's beginning is held back until its end has come."""
        return [self._meter(event) for event in self._parser.feed(chunk)]

    def finish(self) -> bytes:
        """The stream has ended: what is left of it, to be passed on. Mistral and Groq leave out the last line ends.

        The remainder is read like an event, so that it is counted, and empty if the caller must not see it.
        """
        remainder = self._parser.finish()
        events = self._framing(len(remainder) + 2).feed(remainder + b"\n\n")
        return remainder if not any(self._meter(event).hidden for event in events) else b""

    def learnable(self) -> tuple[int, int] | None:
        """(counted, billed) where this stream says something about the model's factor, else None.

        Not where some of what was billed could not be seen: reasoning, audio, a tool call's framing, a lost end.
        """
        usage = self.usage
        if usage is None or not self.complete or self.errored:
            return None
        if usage.reasoning or usage.audio_completion or self._unseen:
            return None
        if min(self.counted, usage.completion) < LEARN_MIN_TOKENS:
            return None
        return self.counted, usage.completion

    def _meter(self, event: SseEvent) -> Metered:
        if event.data is None:
            return Metered(event.raw, False, self.tokens)
        piece = self._read(event.data)
        self._take(piece)
        return Metered(event.raw, piece.usage_only and self._hide_usage, self.tokens)

    def _take(self, piece: Piece) -> None:
        if piece.texts:
            self.counted += count_texts(piece.texts, self._count, MAX_EVENT_COUNT_CHARS)  # all streams wait for it
            estimate = ceil(self.counted * self._factor)
            self.tokens = estimate if estimate > self._floor else self._floor
        if piece.started:
            self._started.update(piece.started)
        if piece.finished:
            self._finished.update(piece.finished)
        if piece.done:
            self._done = True
        if piece.unseen:
            self._unseen = True
        if piece.error:
            self.errored = True
        if piece.usage is not None:
            self._take_usage(piece.usage, bool(piece.texts))
        if piece.service_tier is not None:
            self.service_tier = piece.service_tier

    def _take_usage(self, usage: Usage, with_text: bool) -> None:
        """The last figures are the bill. Once all text has come they are no floor: a cut there would save nothing."""
        self.usage = usage
        if with_text or not self.complete:
            self._floor = max(self._floor, usage.completion)
            self.tokens = max(self.tokens, self._floor)
