"""The canonical form into a caller's stream of Responses: every item and part that is added is also done.

The order of events: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from extproc import form
from extproc.dialects.dialect import Seed
from extproc.dialects.fields import dumps
from extproc.dialects.openai_responses.answers import (
    IN_PROGRESS,
    Items,
    ending_of,
    refusal_part,
    snapshot,
    summary_part,
    text_part,
    write_citation,
    write_logprobs,
    write_usage,
)
from extproc.dialects.openai_responses.errors import error_event
from extproc.dialects.openai_responses.thoughts import encrypted
from extproc.records import Usage


@dataclass(slots=True, eq=False)
class _Part:
    """A part of a message: text, or a refusal. `start`: where it begins in all of the answer's text."""

    is_text: bool
    start: int
    texts: list[str] = field(default_factory=list)
    citations: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def written(self) -> dict[str, Any]:
        text = "".join(self.texts)
        return text_part(text, self.citations, self.logprobs) if self.is_text else refusal_part(text)


@dataclass(slots=True)
class _Message:
    index: int
    parts: list[_Part] = field(default_factory=list)


@dataclass(slots=True)
class _Thoughts:
    index: int
    texts: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    index: int
    id: str
    name: str
    texts: list[str] = field(default_factory=list)


class ResponseWriter:
    """One stream. A message or thoughts end where something else begins; calls may be interleaved, and end last."""

    def __init__(self, seed: Seed) -> None:
        self._seed = seed
        self._items = Items(seed)
        self._sequence_number = 0
        self._output: list[dict[str, Any] | None] = []  # None while an item is not done
        self._open: _Message | _Thoughts | None = None
        self._calls: dict[int, _Call] = {}
        self._last_text: tuple[_Message, _Part] | None = None
        self._text_chars = 0
        self._refused = False
        self._model: str | None = None
        self._finished: form.Finish | None = None
        self._usage: Usage | None = None
        self._service_tier: str | None = None
        self._ended = False

    def write(self, event: form.StreamEvent) -> bytes:
        """The bytes of whole events, or none."""
        if self._ended:
            return b""
        handle = self._HANDLERS.get(type(event))
        return handle(self, event) if handle else b""

    # The frame --------------------------------------------------------------------------------------------------------

    def _begin(self, event: form.Started) -> bytes:
        self._model, self._service_tier, self._usage = event.model, event.service_tier, event.usage
        response = snapshot(
            self._seed, self._items.response_id, self._model, [], IN_PROGRESS, service_tier=self._service_tier
        )
        created = self._event("response.created", response=response)
        return created + self._event("response.in_progress", response=response)

    def _finish(self, event: form.Finished) -> bytes:
        if event.choice == 0:
            self._finished = event.finish
        return b""

    def _use(self, event: form.Used) -> bytes:
        self._usage = event.usage
        self._service_tier = event.service_tier or self._service_tier
        return b""

    def _fail(self, event: form.Failed) -> bytes:
        self._ended = True
        return error_event(event.error, self._next(), write_usage(self._usage))

    def _end(self, _: form.Done) -> bytes:
        """What is open is done, in the order in which it was begun, and then the whole response."""
        self._ended = True
        ending = ending_of(self._finished, self._refused)
        status = "completed" if ending["status"] == "completed" else "incomplete"
        out = self._close(status)
        for call in self._calls.values():
            is_last = call.index == len(self._output) - 1
            out += self._call_done(call, status if is_last else "completed")
        response = snapshot(
            self._seed,
            self._items.response_id,
            self._model,
            [item for item in self._output if item is not None],
            ending,
            usage=self._usage,
            service_tier=self._service_tier,
        )
        return out + self._event(f"response.{ending['status']}", response=response)

    def _next(self) -> int:
        self._sequence_number += 1
        return self._sequence_number - 1

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = {"type": kind, "sequence_number": self._next(), **fields}
        return b"event: %s\ndata: %s\n\n" % (kind.encode(), dumps(event))

    def _added(self, item: dict[str, Any]) -> bytes:
        self._output.append(None)
        return self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _done(self, index: int, item: dict[str, Any]) -> bytes:
        self._output[index] = item
        return self._event("response.output_item.done", output_index=index, item=item)

    def _close(self, status: str = "completed") -> bytes:
        """Ends the message or the thoughts that are open."""
        match self._open:
            case _Message():
                return self._message_done(self._open, status)
            case _Thoughts():
                return self._thoughts_done(self._open, None)
        return b""

    # Messages ---------------------------------------------------------------------------------------------------------

    def _text(self, event: form.TextDelta) -> bytes:
        text = event.text
        out, message, part = self._part(is_text=True)
        part.texts.append(text)
        self._text_chars += len(text)
        return out + self._part_event("output_text.delta", message, delta=text, logprobs=[])

    def _refusal(self, event: form.RefusalDelta) -> bytes:
        self._refused = True
        out, message, part = self._part(is_text=False)
        part.texts.append(event.text)
        return out + self._part_event("refusal.delta", message, delta=event.text)

    def _logprobs(self, event: form.Logprobs) -> bytes:
        """Beside no text, since they come apart from it."""
        out, message, part = self._part(is_text=True)
        logprobs = write_logprobs(event.tokens)
        part.logprobs += logprobs
        return out + self._part_event("output_text.delta", message, delta="", logprobs=logprobs)

    def _cited(self, event: form.Cited) -> bytes:
        """About the latest text, even where that has ended: the whole response still takes it."""
        if self._last_text is None:
            return b""
        message, part = self._last_text
        part.citations.append(write_citation(event.citation, part.start))
        added = {"annotation_index": len(part.citations) - 1, "annotation": part.citations[-1]}
        return self._part_event("output_text.annotation.added", message, part, **added)

    def _part(self, *, is_text: bool) -> tuple[bytes, _Message, _Part]:
        """The part that takes this kind of text: the one that is open, or a new one."""
        message, out = self._open, b""
        if not isinstance(message, _Message):
            out = self._close()
            self._open = message = _Message(len(self._output))
            out += self._added(self._items.message(message.index, [], "in_progress"))
        if not message.parts or message.parts[-1].is_text is not is_text:
            out += self._part_done(message)
            message.parts.append(_Part(is_text, self._text_chars))
            out += self._part_event("content_part.added", message, part=message.parts[-1].written())
        part = message.parts[-1]
        if is_text:
            self._last_text = message, part
        return out, message, part

    def _part_event(self, kind: str, message: _Message, part_of: _Part | None = None, /, **fields: Any) -> bytes:
        position = message.parts.index(part_of) if part_of else len(message.parts) - 1
        item_id = self._items.message_id(message.index)
        place = {"item_id": item_id, "output_index": message.index, "content_index": position}
        return self._event(f"response.{kind}", **place, **fields)

    def _part_done(self, message: _Message) -> bytes:
        if not message.parts:
            return b""
        part = message.parts[-1]
        text, whole = "".join(part.texts), part.written()
        if part.is_text:
            out = self._part_event("output_text.done", message, text=text, logprobs=part.logprobs)
        else:
            out = self._part_event("refusal.done", message, refusal=text)
        return out + self._part_event("content_part.done", message, part=whole)

    def _message_done(self, message: _Message, status: str) -> bytes:
        self._open = None
        out = self._part_done(message)
        content = [part.written() for part in message.parts]
        return out + self._done(message.index, self._items.message(message.index, content, status))

    # Thoughts ---------------------------------------------------------------------------------------------------------

    def _thinking(self, event: form.ThinkingDelta) -> bytes:
        out, thoughts = b"", self._open
        if not isinstance(thoughts, _Thoughts):
            out = self._close()
            self._open = thoughts = _Thoughts(len(self._output))
            out += self._added(self._items.reasoning(thoughts.index, "", None))
        if not thoughts.texts:
            out += self._summary_event("part.added", thoughts, part=summary_part(""))
        thoughts.texts.append(event.text)
        return out + self._summary_event("text.delta", thoughts, delta=event.text)

    def _signed(self, event: form.ThinkingSigned) -> bytes:
        out, thoughts = b"", self._open
        if not isinstance(thoughts, _Thoughts):
            out = self._close()
            thoughts = _Thoughts(len(self._output))
            out += self._added(self._items.reasoning(thoughts.index, "", None))
        return out + self._thoughts_done(thoughts, event)

    def _thoughts_done(self, thoughts: _Thoughts, signed: form.ThinkingSigned | None) -> bytes:
        self._open = None
        text, out = "".join(thoughts.texts), b""
        if thoughts.texts:
            out += self._summary_event("text.done", thoughts, text=text)
            out += self._summary_event("part.done", thoughts, part=summary_part(text))
        signature = None
        if signed is not None:
            signature = encrypted(form.Thinking("", signed.signature, signed.origin, signed.redacted))
        return out + self._done(thoughts.index, self._items.reasoning(thoughts.index, text, signature))

    def _summary_event(self, kind: str, thoughts: _Thoughts, **fields: Any) -> bytes:
        item_id = self._items.reasoning_id(thoughts.index)
        place = {"item_id": item_id, "output_index": thoughts.index, "summary_index": 0}
        return self._event(f"response.reasoning_summary_{kind}", **place, **fields)

    # Calls ------------------------------------------------------------------------------------------------------------

    def _call(self, event: form.ToolStarted) -> bytes:
        out = self._close()
        call = self._calls[event.call] = _Call(len(self._output), event.id, event.name)
        return out + self._added(self._items.call(call.index, call.id, call.name, "", "in_progress"))

    def _arguments(self, event: form.ToolArguments) -> bytes:
        call = self._calls.get(event.call)
        if call is None:
            return b""
        call.texts.append(event.json)
        return self._call_event("delta", call, delta=event.json)

    def _call_done(self, call: _Call, status: str) -> bytes:
        json = "".join(call.texts)
        item = self._items.call(call.index, call.id, call.name, json, status)
        return self._call_event("done", call, name=call.name, arguments=json) + self._done(call.index, item)

    def _call_event(self, kind: str, call: _Call, **fields: Any) -> bytes:
        place = {"item_id": self._items.call_id(call.index), "output_index": call.index}
        return self._event(f"response.function_call_arguments.{kind}", **place, **fields)

    _HANDLERS: Mapping[type[form.StreamEvent], Callable[[ResponseWriter, Any], bytes]] = {
        form.Started: _begin,
        form.TextDelta: _text,
        form.RefusalDelta: _refusal,
        form.Logprobs: _logprobs,
        form.Cited: _cited,
        form.ThinkingDelta: _thinking,
        form.ThinkingSigned: _signed,
        form.ToolStarted: _call,
        form.ToolArguments: _arguments,
        form.Finished: _finish,
        form.Used: _use,
        form.Failed: _fail,
        form.Done: _end,
    }
