"""Counting long prompts in threads: how many at once, and what becomes of the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from extproc.counting import PromptCounter
from extproc.limits import COUNT_THREADS, MAX_COUNT_CHARS, MAX_COUNT_QUEUE_CHARS
from extproc.tokens import counter
from tests.rig import eventually

TEXTS = ("Hello, world!", "Hello, world!")
TOKENS = 2 * counter("o200k_base")(TEXTS[0])


class Held:
    """A counter that waits for leave."""

    def __init__(self) -> None:
        self.leave = threading.Event()
        self.running = 0
        self._lock = threading.Lock()

    def __call__(self, _: str) -> Callable[[str], int]:
        def count(text: str) -> int:
            with self._lock:
                self.running += 1
            self.leave.wait()
            return len(text)

        return count


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held()
    monkeypatch.setattr("extproc.tokens.counter", held)
    yield held
    held.leave.set()


async def test_a_prompt_is_counted() -> None:
    prompts = PromptCounter(60)
    assert await prompts.count(TEXTS, "o200k_base") == TOKENS
    prompts.close()


async def test_above_the_bound_there_is_no_count_until_another_has_ended(held: Held) -> None:
    prompts = PromptCounter(60)
    largest = MAX_COUNT_QUEUE_CHARS // MAX_COUNT_CHARS
    counts = [prompts.count(("a" * (MAX_COUNT_CHARS + extra),), "x") for extra in range(largest)]
    assert await prompts.count(("a",), "x") is None
    await eventually(lambda: held.running == COUNT_THREADS, "all threads count")
    held.leave.set()
    assert None not in await asyncio.gather(*counts)
    assert await prompts.count(("a",), "x") == 1
    prompts.close()


async def test_what_nobody_waits_for_any_more_is_not_counted(held: Held) -> None:
    prompts = PromptCounter(0)
    assert await prompts.count(("a",), "x") is None
    assert held.running == 0
    prompts.close()


async def test_closing_gives_up_what_has_not_begun(held: Held) -> None:
    prompts = PromptCounter(60)
    counts = [prompts.count(("a",), "x") for _ in range(COUNT_THREADS + 1)]
    await eventually(lambda: held.running == COUNT_THREADS, "all threads count")
    closing = asyncio.create_task(asyncio.to_thread(prompts.close))
    await eventually(counts[-1].cancelled, "the last is given up")
    held.leave.set()
    assert await asyncio.gather(*counts[:-1]) == [1] * COUNT_THREADS
    await closing
