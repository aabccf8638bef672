"""A provider's stream of Responses into the canonical form.

Every text comes up to four times: in deltas, at the end of its part, with its item, and in the whole response. Each
slot remembers how much of it has been said, so that a provider that leaves some of these out loses nothing, and one
that repeats itself is counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from extproc import form
from extproc.dialects.fields import dicts, parse
from extproc.dialects.openai_parts import provider_error
from extproc.dialects.openai_responses.answers import (
    PARAGRAPH,
    arguments,
    call_id,
    count_searches,
    read_citation,
    read_finish,
    read_logprobs,
    read_usage,
    text_of,
    tool_texts,
)
from extproc.dialects.openai_responses.thoughts import thinking

_ENDINGS = ("response.completed", "response.incomplete", "response.failed", "response.cancelled")

# Deltas and what ends them, by what they are about: (event, the field of the end's text).
_TEXT = ("response.output_text", "text")
_REFUSAL = ("response.refusal", "refusal")
_SUMMARY = ("response.reasoning_summary_text", "text")
_REASONING = ("response.reasoning_text", "text")
_ARGUMENTS = ("response.function_call_arguments", "arguments")
_UNSEEN = (
    ("response.custom_tool_call_input", "input"),
    ("response.mcp_call_arguments", "arguments"),
    ("response.code_interpreter_call_code", "code"),
)
_SAID = {
    f"{about[0]}.{when}": (about, "delta" if when == "delta" else about[1])
    for about in (_TEXT, _REFUSAL, _SUMMARY, _REASONING, _ARGUMENTS, *_UNSEEN)
    for when in ("delta", "done")
}

_THOUGHTS = (_SUMMARY, _REASONING)

_Slot = tuple[str, int | None, int]


class ResponseReader:
    """One stream."""

    def __init__(self) -> None:
        self._started = False
        self._ended = False
        self._chars: dict[_Slot, int] = {}  # said so far
        self._starts: dict[_Slot, int] = {}  # where in the choice's text a part begins, for its citations
        self._cited: dict[_Slot, int] = {}
        self._text_chars = 0
        # By output index:
        self._calls: dict[int | None, int] = {}
        self._tools: set[int | None] = set()
        self._thought: set[int | None] = set()
        self._signed: set[int | None] = set()
        self._searches = 0
        self._refused = False

    def read(self, data: bytes) -> list[form.StreamEvent]:
        """What one event says. What is not understood says nothing."""
        event = parse(data)
        if not isinstance(event, dict) or self._ended:
            return []
        return list(self._read(event))

    def finish(self) -> list[form.StreamEvent]:
        """The stream has a closing event of its own: without it, it is not complete."""
        return []

    def _read(self, event: dict[str, Any]) -> Iterator[form.StreamEvent]:
        kind = event.get("type")
        if kind == "error" or (kind is None and event.get("error")):
            self._ended = True
            if (usage := read_usage(event, self._searches)) is not None:
                yield form.Used(usage)
            yield form.Failed(provider_error(event))
            return
        if not isinstance(kind, str) or not kind.startswith("response."):
            return
        if not self._started:
            self._started = True
            yield _started(event.get("response"))
        if (said := _SAID.get(kind)) is not None:
            yield from self._say(said[0], event, event.get(said[1]), whole=said[1] != "delta")
        elif (read := self._READERS.get(kind)) is not None:
            yield from read(self, event)
        elif kind in _ENDINGS and isinstance(event.get("response"), dict):
            yield from self._end(event["response"])

    # Texts ------------------------------------------------------------------------------------------------------------

    def _say(
        self, about: tuple[str, str], event: Mapping[str, Any], text: object, *, whole: bool = False
    ) -> Iterator[form.StreamEvent]:
        """A piece of a text, or the `whole` of it, of which the rest is said that has not been."""
        slot = _slot(about, event)
        said = self._chars.setdefault(slot, 0)
        if not said:
            self._starts[slot] = self._text_chars
        if isinstance(text, str) and (new := text[said:] if whole else text):
            if about is _ARGUMENTS:
                yield from self._call(event, "", "")
            elif about in _THOUGHTS and not said:
                if slot[1] in self._thought:
                    yield form.ThinkingDelta(0, PARAGRAPH)
                self._thought.add(slot[1])
            self._chars[slot] = said + len(new)
            yield self._piece(about, slot, new)
        if about is _TEXT and not (whole and said) and (tokens := read_logprobs(event.get("logprobs"))):
            yield form.Logprobs(0, tokens)

    def _piece(self, about: tuple[str, str], slot: _Slot, text: str) -> form.StreamEvent:
        if about is _TEXT:
            self._text_chars += len(text)
            return form.TextDelta(0, text)
        if about is _REFUSAL:
            self._refused = True
            return form.RefusalDelta(0, text)
        if about in _THOUGHTS:
            return form.ThinkingDelta(0, text)
        return form.ToolArguments(0, self._calls[slot[1]], text) if about is _ARGUMENTS else form.Unseen(text)

    def _cite(self, slot: _Slot, annotation: dict[str, Any]) -> form.StreamEvent:
        self._cited[slot] = self._cited.get(slot, 0) + 1
        citation, start = read_citation(annotation), self._starts.get(slot, 0)
        return form.Cited(0, _moved(citation, start) if start else citation)

    def _annotation(self, event: dict[str, Any]) -> Iterator[form.StreamEvent]:
        if isinstance(event.get("annotation"), dict):
            yield self._cite(_slot(_TEXT, event), event["annotation"])

    # Items ------------------------------------------------------------------------------------------------------------

    def _item_added(self, event: dict[str, Any]) -> Iterator[form.StreamEvent]:
        item = event.get("item")
        if isinstance(item, dict) and item.get("type") == "function_call":
            yield from self._call(event, call_id(item), text_of(item, "name") or "")

    def _item_done(self, event: dict[str, Any]) -> Iterator[form.StreamEvent]:
        item = event.get("item")
        if not isinstance(item, dict):
            return
        match item.get("type"):
            case "message":
                yield from self._message_done(event, item)
            case "reasoning":
                yield from self._reasoning_done(event, item)
            case "function_call":
                yield from self._call(event, call_id(item), text_of(item, "name") or "")
                yield from self._say(_ARGUMENTS, event, arguments(item), whole=True)
            case str():
                yield from self._tool_done(event, item)

    def _message_done(self, event: dict[str, Any], item: dict[str, Any]) -> Iterator[form.StreamEvent]:
        for i, part in enumerate(dicts(item.get("content"))):
            where = {**part, "output_index": event.get("output_index"), "content_index": i}
            if part.get("type") == "refusal":
                yield from self._say(_REFUSAL, where, part.get("refusal"), whole=True)
                continue
            yield from self._say(_TEXT, where, part.get("text"), whole=True)
            slot = _slot(_TEXT, where)
            for annotation in dicts(part.get("annotations"))[self._cited.get(slot, 0) :]:
                yield self._cite(slot, annotation)

    def _reasoning_done(self, event: dict[str, Any], item: dict[str, Any]) -> Iterator[form.StreamEvent]:
        index = _index(event)
        for about, name, place in ((_REASONING, "content", "content_index"), (_SUMMARY, "summary", "summary_index")):
            for i, part in enumerate(dicts(item.get(name))):
                yield from self._say(about, {"output_index": index, place: i}, part.get("text"), whole=True)
        if (encrypted := text_of(item, "encrypted_content")) is None or index in self._signed:
            return
        self._signed.add(index)
        thoughts = thinking("", encrypted)
        yield form.ThinkingSigned(0, thoughts.signature or "", thoughts.origin or "", thoughts.redacted)

    def _call(self, event: Mapping[str, Any], tool_call_id: str, name: str) -> Iterator[form.StreamEvent]:
        """A call of a function begins, where it has not."""
        index = _index(event)
        if index in self._calls:
            return
        self._calls[index] = len(self._calls)
        yield form.ToolStarted(0, self._calls[index], tool_call_id, name)

    def _tool_done(self, event: dict[str, Any], item: dict[str, Any]) -> Iterator[form.StreamEvent]:
        """What the model wrote for a tool of the provider's, where no delta has said it; or a compaction, encrypted."""
        index = _index(event)
        if index in self._tools:
            return
        self._tools.add(index)
        self._searches += count_searches([item])
        rest = dict(item)
        for about in _UNSEEN:
            if about[0] == f"response.{item.get('type')}_{about[1]}":
                yield from self._say(about, event, rest.pop(about[1], None), whole=True)
        yield from map(form.Unseen, tool_texts(rest) or ("",))

    # The end ----------------------------------------------------------------------------------------------------------

    def _end(self, response: dict[str, Any]) -> Iterator[form.StreamEvent]:
        """All of the output, where nothing of it was said before, and what it cost."""
        self._ended = True
        items = dicts(response.get("output"))
        if not (self._chars or self._calls or self._tools or self._signed):
            for i, item in enumerate(items):
                yield from self._item_done({"output_index": i, "item": item})
        usage = read_usage(response, max(count_searches(items), self._searches))
        finish = read_finish(response, called=bool(self._calls), refused=self._refused)
        failed = response.get("status") == "failed"
        if not failed:
            yield form.Finished(0, finish)
        if usage is not None:
            yield form.Used(usage, text_of(response, "service_tier"))
        yield form.Failed(provider_error(response)) if failed else form.Done()

    _READERS: Mapping[str, Callable[[ResponseReader, dict[str, Any]], Iterator[form.StreamEvent]]] = {
        "response.output_item.added": _item_added,
        "response.output_item.done": _item_done,
        "response.output_text.annotation.added": _annotation,
    }


def _started(response: object) -> form.Started:
    fields = response if isinstance(response, dict) else {}
    return form.Started(text_of(fields, "id"), text_of(fields, "model"), None, text_of(fields, "service_tier"))


def _slot(about: tuple[str, str], event: Mapping[str, Any]) -> _Slot:
    """By place, since some providers (GitHub Copilot) give an item a new id with every event."""
    place = event.get("summary_index") if about is _SUMMARY else event.get("content_index")
    return about[0], _index(event), place if type(place) is int else 0


def _index(event: Mapping[str, Any]) -> int | None:
    index = event.get("output_index")
    return index if type(index) is int else None


def _moved(citation: form.Citation, by: int) -> form.Citation:
    start, end = (None if offset is None else offset + by for offset in (citation.start, citation.end))
    return form.Citation(citation.url, citation.title, citation.quote, start, end)
