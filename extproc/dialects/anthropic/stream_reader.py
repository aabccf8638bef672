"""A provider's stream of Anthropic's into the canonical form (https://platform.claude.com/docs/en/build-with-claude/streaming)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from extproc import form
from extproc.dialects.anthropic.answers import (
    UNCOUNTED,
    finish_of,
    is_run_there,
    read_citation,
    read_service_tier,
    read_usage,
    refusal_of,
    unseen_of,
)
from extproc.dialects.anthropic.errors import read_error_event
from extproc.dialects.anthropic.vocabulary import ORIGIN, arguments_of
from extproc.dialects.fields import parse

_Events = Iterator[form.StreamEvent]


class MessageReader:
    """One stream. Figures are cumulative, and those that an event leaves out hold on.

    A block's own event may hold its whole text, or the empty one that its deltas then fill.
    """

    __slots__ = ("_block", "_calls", "_has_arguments", "_signature", "_started", "_usage")

    def __init__(self) -> None:
        self._usage: dict[str, Any] = {}
        self._started = False
        self._calls = 0
        self._block: Mapping[str, Any] = {}
        self._has_arguments = False
        self._signature = ""

    def read(self, data: bytes) -> Sequence[form.StreamEvent]:
        """What the data of one event says. What is not understood says nothing; nothing is raised."""
        event = parse(data)
        if not isinstance(event, dict):
            return ()
        kind = event.get("type")
        reader = _READERS.get(kind) if isinstance(kind, str) else None
        return tuple(reader(self, event)) if reader is not None else ()

    def finish(self) -> Sequence[form.StreamEvent]:
        """A stream that has not been closed by its own event is not complete."""
        return ()

    def _message_start(self, event: Mapping[str, Any]) -> _Events:
        message = event.get("message")
        if self._started or not isinstance(message, dict):
            return
        self._started = True
        self._keep_usage(message)
        tier = read_service_tier(self._usage)
        yield form.Started(_text(message, "id"), _text(message, "model"), read_usage(self._usage), tier)

    def _block_start(self, event: Mapping[str, Any]) -> _Events:
        block = event.get("content_block")
        if not isinstance(block, dict):
            return
        self._block, self._has_arguments, self._signature = block, False, _text(block, "signature") or ""
        match block.get("type"):
            case "text":
                yield from self._written(form.TextDelta, block, "text")
            case "thinking":
                yield from self._written(form.ThinkingDelta, block, "thinking")
            case "redacted_thinking":
                yield form.ThinkingSigned(0, _text(block, "data") or "", ORIGIN, redacted=True)
            case "tool_use":
                yield form.ToolStarted(0, self._calls, _text(block, "id") or "", _text(block, "name") or "")
                self._calls += 1
            case kind if is_run_there(kind):
                yield form.Unseen(_text(block, "name") or "")
            case _:
                yield from map(form.Unseen, filter(None, unseen_of(block)))

    def _block_delta(self, event: Mapping[str, Any]) -> _Events:
        delta = event.get("delta")
        if not isinstance(delta, dict):
            return
        match delta.get("type"):
            case "text_delta":
                yield from self._written(form.TextDelta, delta, "text")
            case "thinking_delta":
                yield from self._written(form.ThinkingDelta, delta, "thinking")
            case "input_json_delta":
                yield from self._arguments(_text(delta, "partial_json") or "")
            case "signature_delta":
                self._signature = _text(delta, "signature") or self._signature
            case "citations_delta":
                yield form.Unseen("")  # the text that is cited costs nothing, but saying where it is does
                if (citation := read_citation(delta.get("citation"))) is not None:
                    yield form.Cited(0, citation)
            case "compaction_delta":
                if text := _text(delta, "content"):
                    yield form.Unseen(text)

    def _block_stop(self, _: Mapping[str, Any]) -> _Events:
        if not self._has_arguments and (self._block.get("type") == "tool_use" or is_run_there(self._block.get("type"))):
            yield from self._arguments(arguments_of(self._block))
        if self._signature:
            yield form.ThinkingSigned(0, self._signature, ORIGIN)
        self._block, self._signature = {}, ""

    def _message_delta(self, event: Mapping[str, Any]) -> _Events:
        delta = event.get("delta")
        delta = delta if isinstance(delta, dict) else {}
        if refusal := refusal_of(delta):
            yield form.RefusalDelta(0, refusal)
        if (finish := finish_of(delta)) is not None:
            yield form.Finished(0, finish, _text(delta, "stop_sequence"))
        yield from self._figures(event)

    def _message_stop(self, _: Mapping[str, Any]) -> _Events:
        yield form.Done()

    def _error(self, event: Mapping[str, Any]) -> _Events:
        yield from self._figures(event)
        yield form.Failed(read_error_event(event))

    def _written(
        self, delta: type[form.TextDelta] | type[form.ThinkingDelta], fields: Mapping[str, Any], name: str
    ) -> _Events:
        if text := _text(fields, name):
            yield delta(0, text)

    def _arguments(self, json: str) -> _Events:
        if not json:
            return
        self._has_arguments = True
        run_there = is_run_there(self._block.get("type"))
        yield form.Unseen(json) if run_there else form.ToolArguments(0, max(0, self._calls - 1), json)

    def _figures(self, event: Mapping[str, Any]) -> _Events:
        self._keep_usage(event)
        if isinstance(event.get("usage"), dict) and (usage := read_usage(self._usage)) is not None:
            yield form.Used(usage, read_service_tier(self._usage))

    def _keep_usage(self, holder: Mapping[str, Any]) -> None:
        usage = holder.get("usage")
        if isinstance(usage, dict):
            kept = {name: value for name, value in self._usage.items() if name not in UNCOUNTED}
            self._usage = kept | {name: value for name, value in usage.items() if value is not None}


_READERS: Mapping[str, Callable[[MessageReader, Mapping[str, Any]], _Events]] = {
    "message_start": MessageReader._message_start,
    "content_block_start": MessageReader._block_start,
    "content_block_delta": MessageReader._block_delta,
    "content_block_stop": MessageReader._block_stop,
    "message_delta": MessageReader._message_delta,
    "message_stop": MessageReader._message_stop,
    "error": MessageReader._error,
}


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None
