"""A proxy between a processor and its Valkey that can slow, hold back, lose and cut what passes."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

_READ_BYTES = 64 * 1024


class FaultProxy:
    """Listens on one Unix socket and connects to another. Without faults it only passes bytes on.

    `requests` and `replies` are gates: cleared, nothing passes in that direction until they are set again.
    `latency_s` is added to every reply.
    """

    def __init__(self, path: Path, upstream: Path) -> None:
        self.path = path
        self.requests = asyncio.Event()
        self.replies = asyncio.Event()
        self.latency_s = 0.0
        self.lost = 0  # replies, so far
        self._upstream = upstream
        self._to_lose: list[bytes] = []
        self._to_hold_back: list[bytes] = []
        self._healed = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._conversations: set[asyncio.Task[None]] = set()
        self.heal()

    @property
    def url(self) -> str:
        """As `REDIS_URL` takes it."""
        return f"unix://{self.path}"

    async def start(self) -> FaultProxy:
        """Take connections from now on."""
        self._server = await asyncio.start_unix_server(self._on_connection, self.path)
        return self

    async def close(self) -> None:
        """Stop listening, and cut every connection."""
        if self._server is not None:
            self._server.close()
        self.cut()
        await asyncio.gather(*self._conversations, return_exceptions=True)

    def lose(self, marker: bytes, times: int = 1) -> None:
        """Pass on so many requests that hold `marker`, and cut the connection in the place of each one's reply."""
        self._to_lose += [marker] * times

    def hold_back(self, marker: bytes) -> None:
        """Pass on requests that hold `marker`, and none of their replies until `heal`."""
        self._to_hold_back.append(marker)
        self._healed.clear()

    def cut(self) -> None:
        """Cut every connection."""
        for conversation in self._conversations:
            conversation.cancel()

    def heal(self) -> None:
        """Let everything pass again."""
        self.requests.set()
        self.replies.set()
        self.latency_s = 0.0
        self._to_lose.clear()
        self._to_hold_back.clear()
        self._healed.set()

    def _on_connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.create_task(self._converse(reader, writer))
        self._conversations.add(conversation)
        conversation.add_done_callback(self._conversations.discard)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            upstream_reader, upstream_writer = await asyncio.open_unix_connection(self._upstream)
            asked = bytearray()  # since the last reply: a processor sends one pipeline at a time
            forth = asyncio.create_task(self._forth(reader, upstream_writer, asked))
            back = asyncio.create_task(self._back(upstream_reader, writer, asked))
            try:
                await asyncio.wait((forth, back), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (forth, back):
                    task.cancel()
                await asyncio.gather(forth, back, return_exceptions=True)
                upstream_writer.close()
        writer.close()

    async def _forth(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytearray) -> None:
        while data := await reader.read(_READ_BYTES):
            asked += data
            await self.requests.wait()
            writer.write(data)
            await writer.drain()

    async def _back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: bytearray) -> None:
        while data := await reader.read(_READ_BYTES):
            for marker in self._to_lose:
                if marker in asked:
                    self._to_lose.remove(marker)
                    self.lost += 1
                    return
            if any(marker in asked for marker in self._to_hold_back):
                await self._healed.wait()
            asked.clear()
            await self.replies.wait()
            await asyncio.sleep(self.latency_s)
            writer.write(data)
            await writer.drain()
