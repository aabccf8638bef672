"""Recorded answers of real providers: the subset in `tests/streams`, and the whole collection where it is present.

The collection is looked for at TOLLGATE_RECORDINGS, else in a sibling checkout of recordings.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from random import Random
from typing import Any

SUBSET = Path(__file__).parent / "streams"
COLLECTION = Path(os.environ.get("TOLLGATE_RECORDINGS") or Path(__file__).parents[2] / "shared" / "streams")

# (prompt, completion) where what was billed is not what `usage` has as input and output: worked out by hand from the
# total, or from the cost where the provider states it.
_BILLED_OTHERWISE = {
    "doubleword/chat-stream-qwen3.5-9b-thinking-finish-length-01": (4865, 35),  # its own figures disagree: the larger
    "gemini/chat-json-gemini-2.5-pro-preview-05-06-tool-call-01": (35, 74),
    "mistral/chat-json-voxtral-small-latest-audio-in-01": (384, 201),
    "mistral/chat-stream-voxtral-small-latest-audio-in-01": (386, 15),
    "vercel-gateway/chat-stream-gemini-2.5-flash-01": (9, 27),
    "vercel-gateway/chat-stream-gemini-3-pro-preview-tool-call-thinking-01": (28, 70),
    "xai/chat-json-grok-4-fast-reasoning-01": (165, 127),
    "xai/chat-json-grok-code-fast-1-parallel-tool-calls-tool-call-01": (470, 253),
    "xai/chat-stream-grok-3-mini-high-tool-call-thinking-01": (288, 340),
    "xai/chat-stream-grok-3-mini-thinking-structured-output-01": (112, 416),
    "xai/chat-stream-grok-4-0709-01": (702, 137),
    "xai/chat-stream-grok-4-fast-reasoning-parallel-tool-calls-tool-call-01": (432, 204),
    "xai/chat-stream-grok-code-fast-1-parallel-tool-calls-tool-call-01": (466, 334),
    "xai/chat-stream-grok-code-fast-1-thinking-01": (213, 200),
    "xai/chat-stream-grok-code-fast-1-thinking-structured-output-01": (305, 329),
}

# What Anthropic samples beside the answer is billed, and is only in `iterations`: (prompt, completion, cached).
_BILLED_BESIDE = {
    "anthropic/messages-json-claude-sonnet-4-6-long-output-02": (2414 + 2728, 3200 + 874, 0),  # an adviser
    "anthropic/messages-stream-claude-opus-4-6-long-output-01": (
        612 + 60385,
        2819 + 522,
        0,
    ),  # a long context, summed up
    "anthropic/messages-stream-claude-sonnet-4-6-04": (181 + 100 + 55096, 8 + 83, 55096),  # likewise
}


@dataclass(frozen=True)
class Case:
    """One recorded exchange. `meta` is described in `tests/streams/README.md`."""

    folder: Path
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def provider(self) -> str:
        return self.folder.parent.name

    @property
    def protocol(self) -> str:
        return str(self.meta["protocol"])

    @property
    def model(self) -> str:
        return str(self.meta["model"])

    @property
    def stream(self) -> bool:
        return bool(self.meta["stream"])

    @property
    def status(self) -> int:
        return int(self.meta["status"])

    @property
    def complete(self) -> bool:
        return bool(self.meta["complete"])

    @property
    def exact(self) -> bool:
        """Byte for byte as it was sent."""
        return bool(self.meta["fidelity"] == "exact")

    @property
    def countable_text(self) -> bool:
        """All that is billed as output is plain text in the answer."""
        return bool(self.meta["countable_text"])

    @property
    def usage(self) -> dict[str, int]:
        """The provider's figures, the last value of each; empty where it gave none."""
        return {name: value for name, value in (self.meta["usage"] or {}).items() if value is not None}

    @property
    def billed(self) -> tuple[int, int] | None:
        """Prompt and completion tokens that a bill of this answer has, None where the provider gave no usage."""
        if "output" not in self.usage:
            return None
        return _BILLED_OTHERWISE.get(self.name, (self.usage["input"], self.usage["output"]))

    @property
    def figures(self) -> tuple[int, int, int, int] | None:
        """What a bill has of any protocol's answer: prompt, completion, and of these cached and reasoning tokens."""
        usage = self.usage
        if "input" not in usage:
            return None
        prompt, completion = usage["input"], usage.get("output", 0)
        cached, reasoning = usage.get("cached", 0), usage.get("reasoning", 0)
        match self.protocol:
            case "anthropic-messages":
                prompt += cached + usage.get("cache_creation", 0)
                prompt, completion, cached = _BILLED_BESIDE.get(self.name, (prompt, completion, cached))
            case "gemini":
                prompt, completion = prompt + usage.get("tool_use_prompt", 0), completion + reasoning
            case "openai-chat":
                prompt, completion = _BILLED_OTHERWISE.get(self.name, (prompt, completion))
                reasoning = max(reasoning, completion - usage["output"])  # Gemini's thoughts have no name of their own
        return prompt, completion, min(cached, prompt), reasoning

    @property
    def features(self) -> frozenset[str]:
        return frozenset(self.meta["features"])

    @cached_property
    def request(self) -> dict[str, Any] | None:
        request = json.loads((self.folder / "request.json").read_bytes())
        return request if isinstance(request, dict) else None

    @cached_property
    def body(self) -> bytes:
        return (self.folder / "response.body").read_bytes()

    def recorded_chunks(self) -> list[bytes]:
        """The body as the network delivered it, or whole where that is not known."""
        return list(_cut(self.body, self.meta.get("chunk_sizes") or [len(self.body)]))

    def random_chunks(self, seed: int, largest: int = 400) -> list[bytes]:
        """The body in chunks of 1 to `largest` bytes, the same ones for the same seed."""
        random = Random(seed)
        return list(_cut(self.body, (random.randint(1, largest) for _ in self.body)))


def _cut(body: bytes, sizes: Iterable[int]) -> Iterator[bytes]:
    start = 0
    for size in sizes:
        if start >= len(body):
            return
        yield body[start : start + size]
        start += size


@cache
def cases(root: Path) -> tuple[Case, ...]:
    """All cases below one folder, by name."""
    metas = sorted(root.glob("*/*/meta.json"))
    return tuple(Case(meta.parent, json.loads(meta.read_bytes())) for meta in metas)


@cache
def protocol_cases(protocol: str, stream: bool | None = None, root: Path | None = None) -> tuple[Case, ...]:
    """The cases of one protocol: all there are, or those below `root`; streams, others, or both (None)."""
    present = cases(root or (COLLECTION if cases(COLLECTION) else SUBSET))
    return tuple(c for c in present if c.protocol == protocol and stream in (None, c.stream))


@cache
def chat_cases(stream: bool | None = None, root: Path | None = None) -> tuple[Case, ...]:
    """The cases of OpenAI's chat completions, likewise."""
    return protocol_cases("openai-chat", stream, root)
