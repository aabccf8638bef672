"""Counts long prompts outside the event loop, no more of them at once than can be answered in time."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from extproc import tokens
from extproc.limits import COUNT_THREADS, MAX_COUNT_CHARS, MAX_COUNT_QUEUE_CHARS
from extproc.metering import count_texts


class PromptCounter:
    """A few threads, and a bounded queue before them. Used from the event loop alone."""

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` is how long a caller waits: what has not begun by then is dropped."""
        self._timeout_s = timeout_s
        self._threads = ThreadPoolExecutor(COUNT_THREADS, thread_name_prefix="count")
        self._queued_chars = 0

    def count(self, texts: tuple[str, ...], encoding: str) -> asyncio.Future[int | None]:
        """The tokens of all texts; None where too much is waiting already, or time ran out in the queue."""
        loop = asyncio.get_running_loop()
        chars = min(sum(map(len, texts)), MAX_COUNT_CHARS)
        if self._queued_chars + chars > MAX_COUNT_QUEUE_CHARS:
            full: asyncio.Future[int | None] = loop.create_future()
            full.set_result(None)
            return full
        self._queued_chars += chars
        deadline = time.monotonic() + self._timeout_s
        counted = loop.run_in_executor(self._threads, _count, texts, encoding, deadline)
        counted.add_done_callback(lambda _: self._answered(chars))
        return counted

    def close(self) -> None:
        """Waits for the counts under way; those in the queue are given up."""
        self._threads.shutdown(cancel_futures=True)

    def _answered(self, chars: int) -> None:
        self._queued_chars -= chars


def _count(texts: tuple[str, ...], encoding: str, deadline: float) -> int | None:
    return count_texts(texts, tokens.counter(encoding)) if time.monotonic() < deadline else None
