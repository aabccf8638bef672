"""Counting streams: by hand-made events, and by every recorded one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

import pytest

from extproc import form
from extproc.dialects import pieces
from extproc.dialects.openai_chat import OpenAIChat
from extproc.errors import ProviderError, StreamTooLarge
from extproc.jsonarray import JsonArrayParser
from extproc.limits import COUNT_SLICE_CHARS, LEARN_MIN_TOKENS, MAX_COUNT_CHARS, MAX_EVENT_COUNT_CHARS, MIB
from extproc.metering import StreamMeter, count_texts, final_usage, starting_factor
from extproc.records import Metered, Piece, Target, Usage, UsageSource
from extproc.sse import SseParser
from extproc.tokens import counter
from tests.each import each_case
from tests.recordings import Case, chat_cases

COUNT = counter("o200k_base")
STREAMS = chat_cases(True)


def event(*choices: dict[str, Any], **fields: Any) -> bytes:
    return b"data: " + json.dumps({"choices": choices, **fields}).encode() + b"\n\n"


def text(content: str, index: int = 0, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": {"content": content}, "finish_reason": finish}


def usage(prompt: int, completion: int, **details: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "completion_tokens_details": details}


STOP = event(text("", finish="stop"))
DONE = b"data: [DONE]\n\n"


def meter(
    *, factor: float = 1.0, hide_usage: bool = True, choices: int = 1, max_event_bytes: int = 9_999
) -> StreamMeter:
    """One that counts characters."""
    return StreamMeter(
        OpenAIChat(), len, factor, hide_usage=hide_usage, choices=choices, max_event_bytes=max_event_bytes
    )


def feed(stream: StreamMeter, chunks: Iterable[bytes]) -> list[Metered]:
    return [metered for chunk in chunks for metered in stream.feed(chunk)]


# --- The running estimate ---------------------------------------------------------------------------------------------


def test_tokens_run_with_the_events() -> None:
    stream = meter()
    first, second = event(text("abc")), event(text("de"), text("f", index=1))
    assert stream.feed(first + b": hi\n\n" + second) == [
        Metered(first, False, 3),
        Metered(b": hi\n\n", False, 3),
        Metered(second, False, 6),
    ]
    assert (stream.counted, stream.tokens) == (6, 6)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, 4), (1.0, 7), (1.1, 8), (2.0, 14)])
def test_the_factor_corrects_the_sum_and_rounds_up(factor: float, expected: int) -> None:
    stream = meter(factor=factor)
    metered = [stream.feed(event(text(letter)))[0] for letter in "abcdefg"]
    assert metered[-1].tokens == stream.tokens == expected
    assert stream.counted == 7


def test_an_unfinished_event_is_held_back() -> None:
    stream = meter()
    whole = event(text("abc"))
    assert feed(stream, [whole[:5], whole[5:-1]]) == []
    assert stream.tokens == 0
    assert stream.feed(whole[-1:]) == [Metered(whole, False, 3)]


def test_an_event_that_is_too_large_raises() -> None:
    stream = meter(max_event_bytes=20)
    with pytest.raises(StreamTooLarge):
        stream.feed(event(text("a" * 20)))


def test_a_large_event_is_estimated() -> None:
    counted = Counted(len)
    stream = StreamMeter(OpenAIChat(), counted, 1.0)
    stream.feed(event(text("a" * 4 * MIB)))
    assert counted.chars == MAX_EVENT_COUNT_CHARS
    assert stream.counted == 4 * MIB


# --- The usage chunk --------------------------------------------------------------------------------------------------

USAGE_ONLY = event(usage=usage(3, 4))
USAGE_LAST = event(text("a", finish="stop"), usage=usage(3, 4))
AZURE_FIRST = event(prompt_filter_results=[{}])


@pytest.mark.parametrize(
    ("raw", "hide_usage", "hidden"),
    [(USAGE_ONLY, True, True), (USAGE_ONLY, False, False), (USAGE_LAST, True, False), (AZURE_FIRST, True, False)],
    ids=["not asked for", "asked for", "with a choice", "Azure's first event"],
)
def test_hidden(raw: bytes, hide_usage: bool, hidden: bool) -> None:
    assert meter(hide_usage=hide_usage).feed(raw)[0].hidden is hidden


def test_the_last_usage_wins_even_if_it_shrinks() -> None:
    stream = meter()
    feed(stream, [event(usage=usage(3, 9)), event(usage=usage(3, 4)), event(text("a"), usage=None)])
    assert stream.usage == Usage(3, 4)


def test_service_tier() -> None:
    stream = meter()
    feed(stream, [event(service_tier="auto"), event(service_tier="flex"), event()])
    assert stream.service_tier == "flex"


# --- What the provider says while it streams --------------------------------------------------------------------------

REPORTS: dict[str, tuple[list[bytes], list[int]]] = {
    "more than was counted": ([event(text("abc"), usage=usage(3, 9)), event(text("d"))], [9, 9]),
    "counted past it": ([event(text("abc"), usage=usage(3, 4)), event(text("de"))], [4, 5]),
    "less than was counted": ([event(text("abc"), usage=usage(3, 1))], [3]),
    "zeros, until the last": ([event(text("abc"), usage=usage(3, 0)), event(text("d"), usage=usage(3, 7))], [3, 7]),
    "less than before": (
        [event(text("abc"), usage=usage(3, 9)), event(text("d"), usage=usage(3, 5)), event(text("e"))],
        [9, 9, 9],
    ),
    "before any text": ([event(usage=usage(3, 6)), event(text("abc"))], [6, 6]),
    "with the last text": ([event(text("abc", finish="stop"), usage=usage(3, 9))], [9]),
    "with the end, after all text": ([event(text("abc")), event(text("", finish="stop"), usage=usage(3, 9))], [3, 3]),
    "after the end": ([event(text("abc", finish="stop")), event(usage=usage(3, 9)), DONE], [3, 3, 3]),
    "after one of two ends": ([event(text("abc"), text("", 1)), STOP, event(usage=usage(3, 9))], [3, 3, 9]),
}


@pytest.mark.parametrize(("events", "expected"), REPORTS.values(), ids=REPORTS)
def test_a_reported_usage_is_a_floor_for_the_running_estimate(events: list[bytes], expected: list[int]) -> None:
    stream = meter()
    assert [metered.tokens for metered in feed(stream, events)] == expected
    assert stream.tokens == expected[-1]


# --- Other framings ---------------------------------------------------------------------------------------------------


def element(*choices: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"choices": choices, **fields}).encode()


def array_meter() -> StreamMeter:
    return StreamMeter(OpenAIChat(), len, 1.0, framing=JsonArrayParser, max_event_bytes=200)


def test_an_array_is_metered_by_its_elements() -> None:
    stream = array_meter()
    first, second = element(text("abc")), element(text("d", finish="stop"), usage=usage(3, 4))
    events = feed(stream, [b"[" + first[:9], first[9:] + b"\n,\n" + second, b"\n]"])
    assert events == [Metered(b"[" + first, False, 3), Metered(b"\n,\n" + second, False, 4)]
    assert stream.finish() == b"\n]"
    assert (stream.complete, stream.usage) == (True, Usage(3, 4))


def test_an_array_that_is_cut_off_in_an_element() -> None:
    stream = array_meter()
    feed(stream, [b"[" + element(text("abc")), b"," + element(text("d"))[:-2]])
    assert stream.finish() == b"," + element(text("d"))[:-2]
    assert (stream.complete, stream.counted) == (False, 3)


def test_an_element_that_is_too_large_raises() -> None:
    with pytest.raises(StreamTooLarge):
        array_meter().feed(b"[" + element(text("a" * 200)))


# --- By the canonical form --------------------------------------------------------------------------------------------


class Scripted(OpenAIChat):
    """A dialect whose reader says of each event what the script says."""

    def __init__(self, script: dict[bytes, list[form.StreamEvent]]) -> None:
        self._script = script

    def piece_reader(self) -> Callable[[bytes], Piece]:
        return lambda data: pieces.piece(self._script[data])


def scripted(*events: list[form.StreamEvent], choices: int = 1) -> StreamMeter:
    script = {str(number).encode(): said for number, said in enumerate(events)}
    stream = StreamMeter(Scripted(script), len, 1.0, choices=choices)
    feed(stream, (b"data: %s\n\n" % data for data in script))
    return stream


STARTED = form.Started("id", "model", Usage(7, 1))
TEXT, THOUGHT, CALL = form.TextDelta(0, "abc"), form.ThinkingDelta(0, "de"), form.ToolStarted(0, 0, "id", "f")
FINISHED, USED = form.Finished(0, form.Finish.STOP), form.Used(Usage(7, 9))

CANONICAL: dict[str, tuple[list[list[form.StreamEvent]], int, bool]] = {
    "begun": ([[STARTED]], 1, False),
    "text": ([[STARTED], [TEXT]], 1, False),
    "finished, where no closing event comes": ([[STARTED], [THOUGHT], [TEXT], [FINISHED, USED]], 1, True),
    "closed": ([[STARTED], [TEXT], [FINISHED, USED], [form.Done()]], 1, True),
    "closed at once": ([[STARTED, TEXT, FINISHED, form.Done()]], 1, True),
    "closed without a choice: a blocked prompt": ([[STARTED], [form.Done()]], 2, True),
    "one of two finished": ([[STARTED], [TEXT, form.TextDelta(1, "x")], [FINISHED]], 2, False),
    "a second one began, unasked": ([[STARTED], [TEXT, form.ToolStarted(1, 0, "id", "f")], [FINISHED]], 1, False),
    "the figures, and no end": ([[STARTED], [TEXT], [USED]], 1, False),
    "broken off": ([[STARTED], [TEXT], [form.Failed(ProviderError("x", status=529))]], 1, False),
}


@pytest.mark.parametrize(("events", "choices", "complete"), CANONICAL.values(), ids=CANONICAL)
def test_complete_by_the_canonical_form(events: list[list[form.StreamEvent]], choices: int, complete: bool) -> None:
    assert scripted(*events, choices=choices).complete is complete


def test_all_that_is_billed_is_counted_by_the_canonical_form() -> None:
    stream = scripted([STARTED], [THOUGHT], [TEXT], [CALL, form.ToolArguments(0, 0, "{}")], [form.Unseen("xy")])
    assert stream.counted == len("deabcf{}xy")
    assert stream.usage == Usage(7, 1)


@pytest.mark.parametrize(
    ("event", "teaches"),
    [
        (form.Cited(0, form.Citation()), True),
        (form.Unseen("a query of the provider's own search"), False),
        (form.Unseen(""), False),
        (CALL, False),
        (form.ToolArguments(0, 0, "{}"), False),
    ],
    ids=str,
)
def test_what_is_billed_and_not_seen_teaches_nothing(event: form.StreamEvent, teaches: bool) -> None:
    stream = scripted([STARTED], [form.TextDelta(0, LONG), event], [FINISHED, form.Used(Usage(7, ENOUGH))])
    assert (stream.learnable() == (LEARN_MIN_TOKENS, ENOUGH)) is teaches


def test_thoughts_that_are_reported_and_not_shown_are_in_the_estimate() -> None:
    """Gemini reports with every event: the hidden thoughts are held for as they are thought, not at the end."""
    thinking = form.Used(Usage(7, 400, reasoning=400))
    stream = scripted([STARTED, thinking], [TEXT, form.Used(Usage(7, 403, reasoning=400))])
    assert (stream.counted, stream.tokens) == (3, 403)


# --- The end ----------------------------------------------------------------------------------------------------------

ENDS: dict[str, tuple[list[bytes], int, bool]] = {
    "nothing": ([], 1, False),
    "text": ([event(text("a"))], 1, False),
    "finished": ([event(text("a")), STOP], 1, True),
    "finished at once": ([STOP], 1, True),
    "done": ([event(text("a")), DONE], 1, True),
    "one of two finished": ([event(text("a"), text("b", index=1)), STOP], 1, False),
    "two of two finished": ([STOP, event(text("", index=1, finish="length"))], 2, True),
    "the second choice never came": ([STOP], 2, False),
    "usage, but no end": ([event(text("a"), usage=usage(1, 1))], 1, False),
    "error": ([event(text("a")), event(error={"message": "x"})], 1, False),
}


@pytest.mark.parametrize(("events", "choices", "complete"), ENDS.values(), ids=ENDS)
def test_complete(events: list[bytes], choices: int, complete: bool) -> None:
    stream = meter(choices=choices)
    feed(stream, events)
    assert stream.complete is complete


def test_closed() -> None:
    """Complete by its choices, a stream may still bring its usage; closed, it brings nothing more."""
    stream = meter()
    stream.feed(STOP)
    assert (stream.complete, stream.closed) == (True, False)
    stream.feed(DONE)
    assert (stream.complete, stream.closed) == (True, True)


def test_errored() -> None:
    stream = meter()
    stream.feed(event(text("a")))
    assert not stream.errored
    feed(stream, [event(error={"message": "overloaded"}), DONE])
    assert stream.errored


def test_a_closing_event_without_line_ends_closes() -> None:
    stream = meter()
    feed(stream, [event(text("a")), b"data: [DONE]"])
    assert not stream.complete
    assert stream.finish() == b"data: [DONE]"
    assert stream.complete


@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n", b"\r\n\r"])
def test_an_unfinished_last_event_is_counted_and_passed_on_once(end: bytes) -> None:
    stream = meter()
    last = event(text("abc")).rstrip() + end
    stream.feed(last)
    assert stream.finish() == last
    assert stream.counted == 3
    assert stream.finish() == b""
    assert stream.counted == 3


@pytest.mark.parametrize(("hide_usage", "left"), [(True, b""), (False, USAGE_ONLY.rstrip())])
def test_an_unfinished_usage_chunk_is_hidden_too(hide_usage: bool, left: bytes) -> None:
    stream = meter(hide_usage=hide_usage)
    stream.feed(USAGE_ONLY.rstrip())
    assert stream.finish() == left
    assert stream.usage == Usage(3, 4)


def test_a_stream_that_dies_within_an_event() -> None:
    stream = meter()
    stream.feed(event(text("abc"))[:-9])
    assert stream.finish() == event(text("abc"))[:-9]
    assert (stream.complete, stream.usage) == (False, None)


# --- What is billed ---------------------------------------------------------------------------------------------------

REPORTED = Usage(10, 20, cached_prompt=5, reasoning=2)

FINAL: dict[str, tuple[Usage | None, bool, Usage, UsageSource]] = {
    "reported": (REPORTED, True, REPORTED, UsageSource.PROVIDER),
    "reported, though less than was counted": (Usage(10, 3), True, Usage(10, 3), UsageSource.PROVIDER),
    "reported zero": (Usage(0, 0), True, Usage(0, 0), UsageSource.PROVIDER),
    "not reported": (None, True, Usage(9, 15), UsageSource.COUNTED),
    "not reported, cut": (None, False, Usage(9, 15), UsageSource.COUNTED),
    "cut after usage": (REPORTED, False, REPORTED, UsageSource.PROVIDER),
    "cut after zeros": (Usage(0, 0), False, Usage(9, 15), UsageSource.COUNTED),
    "cut long after usage": (Usage(10, 3, 5), False, Usage(10, 15, 5), UsageSource.COUNTED),
}


@pytest.mark.parametrize(("reported", "complete", "expected", "source"), FINAL.values(), ids=FINAL)
def test_final_usage(reported: Usage | None, complete: bool, expected: Usage, source: UsageSource) -> None:
    found = final_usage(reported, complete=complete, prompt_tokens=9, completion_tokens=15)
    assert found == (expected, source)


LONG = "a" * LEARN_MIN_TOKENS
ENOUGH = 2 * LEARN_MIN_TOKENS
TOOL_CALL = {"index": 0, "delta": {"tool_calls": [{"function": {"arguments": LONG}}]}}

LESSONS: dict[str, tuple[list[bytes], tuple[int, int] | None]] = {
    "enough": ([event(text(LONG)), STOP, event(usage=usage(3, ENOUGH))], (LEARN_MIN_TOKENS, ENOUGH)),
    "no usage": ([event(text(LONG)), STOP], None),
    "cut short": ([event(text(LONG)), event(usage=usage(3, ENOUGH))], None),
    "too little counted": ([event(text(LONG[1:])), STOP, event(usage=usage(3, ENOUGH))], None),
    "too little billed": ([event(text(LONG)), STOP, event(usage=usage(3, LEARN_MIN_TOKENS - 1))], None),
    "reasoning": ([event(text(LONG)), STOP, event(usage=usage(3, ENOUGH, reasoning_tokens=1))], None),
    "audio": ([event(text(LONG)), STOP, event(usage=usage(3, ENOUGH, audio_tokens=1))], None),
    "tool call": ([event(TOOL_CALL), STOP, event(usage=usage(3, ENOUGH))], None),
    "error": ([event(text(LONG)), STOP, event(usage=usage(3, ENOUGH)), event(error={"message": "x"})], None),
}


@pytest.mark.parametrize(("events", "expected"), LESSONS.values(), ids=LESSONS)
def test_learnable(events: list[bytes], expected: tuple[int, int] | None) -> None:
    stream = meter()
    feed(stream, events)
    assert stream.learnable() == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target("openai", "gpt-4o"), 1.0),
        (Target("anthropic", "x"), 1.135),
        (Target("openrouter", "anthropic/Claude-Sonnet-4.5"), 1.135),
        (Target("vertex", "claude-sonnet-4-5@20250929"), 1.135),
        (Target("anthropic", "claude-sonnet-4-20250514"), 1.135),
        (Target("anthropic", "claude-3-5-sonnet-20240620"), 1.135),
        (Target("anthropic", "claude-opus-4-6"), 1.135),
        (Target("anthropic", "claude-opus-4-7"), 1.476),
        (Target("openrouter", "anthropic/claude-opus-4.8"), 1.476),
        (Target("vertex", "claude-sonnet-5@default"), 1.476),
        (Target("anthropic", "claude-fable-5-1"), 1.476),
        (Target("gemini", "gemini-2.0-flash-lite"), 1.01),
        (Target("vertex", "gemini-2.5-pro"), 1.13),
        (Target("gemini", "gemini-3-flash-preview"), 1.05),
        (Target("gemini", "gemini-flash-latest"), 1.05),
    ],
    ids=str,
)
def test_starting_factor(target: Target, expected: float) -> None:
    assert starting_factor(target) == pytest.approx(expected, abs=0.001)


# --- Counting texts ---------------------------------------------------------------------------------------------------


def test_texts_are_counted_apart_from_each_other() -> None:
    assert count_texts(["in", "come"], COUNT) == COUNT("in") + COUNT("come")
    assert count_texts([], COUNT) == 0


def test_long_texts_are_counted_in_slices() -> None:
    seen: list[str] = []

    def count(text: str) -> int:
        seen.append(text)
        return 1

    long = "".join(map(str, range(10_000)))
    assert count_texts([long, "x"], count) == len(seen)
    assert "".join(seen) == long + "x"
    assert max(map(len, seen)) == COUNT_SLICE_CHARS


def test_slices_add_a_token_or_two_each() -> None:
    long = "The quick brown fox jumps over the lazy dog. " * 2_000
    slices = -(-len(long) // COUNT_SLICE_CHARS)
    assert COUNT(long) <= count_texts([long], COUNT) <= COUNT(long) + 2 * slices


class Counted:
    """A counter, and how many characters it was given."""

    def __init__(self, count: Callable[[str], int] = COUNT) -> None:
        self.chars = 0
        self._count = count

    def __call__(self, text: str) -> int:
        self.chars += len(text)
        return self._count(text)


def recorded_text(chars: int) -> str:
    """Everything that recorded answers say, over and over."""
    streams = [OpenAIChat().read_event(event.data or b"") for case in STREAMS for event in SseParser().feed(case.body)]
    once = "".join(text for piece in streams for text in piece.texts)
    return (once * (chars // len(once) + 1))[:chars]


def exactly(text: str) -> int:
    return count_texts([text], COUNT, max_chars=len(text))


RECORDED = recorded_text(3 * MIB)
DENSE = "".join(map(chr, Random(1).choices(range(0x4E00, 0x9FFF), k=MIB)))
CHEAP = "The quick brown fox jumps over the lazy dog. " * (MIB // 45)
BLANK = " " * COUNT_SLICE_CHARS

LARGE: dict[str, str] = {
    "recorded": RECORDED,
    "just over the bound": RECORDED[: MAX_COUNT_CHARS + 1],
    "cheap, then dense": CHEAP + DENSE,
    "dense, then cheap": DENSE + CHEAP,
    "a few dense pages": CHEAP + DENSE[: MIB // 8] + CHEAP,
    "nothing at the beginning of each part": "".join(
        BLANK + DENSE[i : i + 3 * COUNT_SLICE_CHARS] for i in range(0, MIB, 4 * COUNT_SLICE_CHARS)
    ),
}


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_large_texts_are_estimated_from_a_part_of_them(text: str) -> None:
    counted = Counted()
    estimate = count_texts([text], counted)
    assert counted.chars <= MAX_COUNT_CHARS
    assert estimate == pytest.approx(exactly(text), rel=0.1)
    assert count_texts([text], COUNT) == estimate


def test_the_estimate_of_recorded_texts_is_hardly_below_their_count() -> None:
    assert count_texts([RECORDED], COUNT) >= 0.95 * exactly(RECORDED)


def test_the_bound_is_on_all_texts_together() -> None:
    texts = [RECORDED[i : i + 100] for i in range(0, MIB, 100)]
    counted = Counted()
    estimate = count_texts(texts, counted)
    assert counted.chars <= MAX_COUNT_CHARS
    assert estimate == pytest.approx(sum(map(COUNT, texts)), rel=0.1)


def test_up_to_the_bound_every_character_is_counted() -> None:
    counted = Counted(len)
    assert count_texts([RECORDED[:MAX_COUNT_CHARS]], counted) == counted.chars == MAX_COUNT_CHARS


def test_halves_of_characters_are_estimated_too() -> None:
    assert count_texts(["\ud83d" * 2 * MAX_COUNT_CHARS], len) == 2 * MAX_COUNT_CHARS


# --- Recorded streams -------------------------------------------------------------------------------------------------


def metered_in(case: Case, chunks: Iterable[bytes]) -> tuple[StreamMeter, list[Metered], bytes]:
    choices = (case.request or {}).get("n") or 1
    stream = StreamMeter(OpenAIChat(), COUNT, 1.0, choices=choices)
    return stream, feed(stream, chunks), stream.finish()


@each_case(STREAMS)
def test_recorded_stream(case: Case) -> None:
    stream, events, left = metered_in(case, case.recorded_chunks())
    assert b"".join(event.raw for event in events) + left == case.body
    assert (stream.usage and (stream.usage.prompt, stream.usage.completion)) == case.billed
    assert stream.complete is case.complete
    assert stream.errored is bool(case.meta.get("error"))
    assert [event.tokens for event in events] == sorted(event.tokens for event in events)
    assert any(event.hidden for event in events) is ("usage-only-final-chunk" in case.features)
    for event in events:
        if event.hidden:
            assert not (json.loads(event.raw.partition(b":")[2]).get("choices"))


@each_case(STREAMS)
def test_chunks_change_nothing(case: Case) -> None:
    whole, events, left = metered_in(case, [case.body])
    for chunks in (case.random_chunks(seed=1), case.random_chunks(seed=2, largest=3)):
        other, same_events, same_left = metered_in(case, chunks)
        assert (same_events, same_left) == (events, left)
        assert (other.counted, other.usage, other.complete) == (whole.counted, whole.usage, whole.complete)


# Where plain text is billed by a vocabulary like OpenAI's, with nothing hidden: the starting factor of 1 is right.
FOLLOWING = ("alibaba", "azure-foundry", "azure-openai", "deepseek", "huggingface", "mistral", "openai", "perplexity")
PLAIN = [
    case
    for case in STREAMS
    if case.provider in FOLLOWING and case.countable_text and case.billed and case.billed[1] >= LEARN_MIN_TOKENS
]


@each_case(PLAIN)
def test_the_count_follows_the_bill(case: Case) -> None:
    stream, _, _ = metered_in(case, [case.body])
    assert case.billed
    exact = 0 if case.provider == "openai" else 0.05
    assert stream.counted == pytest.approx(case.billed[1], rel=exact)
    assert stream.learnable() == (stream.counted, case.billed[1])
