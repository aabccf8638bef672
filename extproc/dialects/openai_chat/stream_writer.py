"""The canonical form written as a stream of chat completion chunks, one for each event.

Most events are a piece of text, and cost one serialised string: the rest of their chunk is made once a stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from extproc import form
from extproc.dialects.dialect import Seed
from extproc.dialects.fields import dumps
from extproc.dialects.openai_chat.answers import annotation_of, finish_fields, logprob_fields, usage_fields
from extproc.dialects.openai_chat.thoughts import proof_of
from extproc.dialects.openai_parts import error_fields
from extproc.records import Usage

_UNFINISHED = b',"finish_reason":null}]}\n\n'


class _Choice:
    """What has been written of one choice."""

    __slots__ = ("annotations", "held", "refused", "thinking", "thoughts")

    def __init__(self) -> None:
        self.thoughts = 0  # blocks, the open one included
        self.thinking = False  # whether one is open
        self.held: dict[str, Any] | None = None  # a signature's entry, until it is known whether it is a call's
        self.annotations = 0
        self.refused = False


class ChatStreamWriter:
    """One stream. The figures come once, at its end, or with the error that ends it."""

    __slots__ = ("_before_choice", "_before_index", "_choices", "_fields", "_holding", "_seed", "_tier", "_usage")

    def __init__(self, seed: Seed) -> None:
        self._seed = seed
        self._choices: list[_Choice] = []
        self._holding = False
        self._usage: Usage | None = None
        self._tier: str | None = None
        self._begin(form.Started(None, None))

    def write(self, event: form.StreamEvent) -> bytes:
        """The bytes of whole events, or none."""
        if type(event) is form.TextDelta and event.choice < len(self._choices) and not self._holding:
            return self._chunk(event.choice, b'{"content":%b}' % dumps(event.text))
        return self._write(event)

    def _write(self, event: Any) -> bytes:
        if (write := _OF_CHOICES.get(type(event))) is not None:
            return self._role(event.choice) + self._released(event) + write(self, event)
        match event:
            case form.Started():
                self._begin(event)
                return self._role(0)
            case form.Used():
                self._usage, self._tier = event.usage, event.service_tier or self._tier
            case form.Failed():
                return self._failed(event)
            case form.Done():
                return self._figures() + b"data: [DONE]\n\n"
        return b""

    def _begin(self, event: form.Started) -> None:
        self._usage, self._tier = event.usage, event.service_tier
        self._fields: dict[str, Any] = {
            "id": event.id or f"chatcmpl-{self._seed.request_id}",
            "object": "chat.completion.chunk",
            "created": self._seed.created_s,
            "model": event.model or self._seed.request.model,
        }
        if event.service_tier is not None:
            self._fields["service_tier"] = event.service_tier
        self._before_choice = b"data: " + dumps(self._fields)[:-1] + b',"choices":['
        self._before_index = self._before_choice + b'{"index":'

    def _role(self, index: int) -> bytes:
        """The first chunk of every choice up to this one: clients keep them in a list, in the order they come."""
        written = b""
        while len(self._choices) <= index:
            written += self._chunk(len(self._choices), b'{"role":"assistant","content":""}')
            self._choices.append(_Choice())
        return written

    # What choices say -------------------------------------------------------------------------------------------------

    def _text(self, event: form.TextDelta) -> bytes:
        return self._delta(event.choice, content=event.text)

    def _refuse(self, event: form.RefusalDelta) -> bytes:
        self._choices[event.choice].refused = True
        return self._delta(event.choice, refusal=event.text)

    def _call(self, event: form.ToolStarted) -> bytes:
        function = {"name": event.name, "arguments": ""}
        call = {"index": event.call, "id": event.id, "type": "function", "function": function}
        return self._delta(event.choice, tool_calls=[call])

    def _arguments(self, event: form.ToolArguments) -> bytes:
        call = {"index": event.call, "function": {"arguments": event.json}}
        return self._delta(event.choice, tool_calls=[call])

    def _cite(self, event: form.Cited) -> bytes:
        choice = self._choices[event.choice]
        annotation = {"index": choice.annotations, **annotation_of(event.citation)}
        choice.annotations += 1
        return self._delta(event.choice, annotations=[annotation])

    def _logprobs(self, event: form.Logprobs) -> bytes:
        refused = self._choices[event.choice].refused
        return self._of_choice(event.choice, logprobs=logprob_fields(event.tokens, refused=refused))

    def _finish(self, event: form.Finished) -> bytes:
        refused = self._choices[event.choice].refused
        return self._of_choice(event.choice, **finish_fields(event.finish, event.stop_sequence, refused=refused))

    # Thoughts ---------------------------------------------------------------------------------------------------------

    def _thought(self, event: form.ThinkingDelta) -> bytes:
        choice = self._choices[event.choice]
        if not choice.thinking:
            choice.thinking = True
            choice.thoughts += 1
        entry = {"type": "reasoning.text", "index": choice.thoughts - 1, "text": event.text}
        return self._delta(event.choice, reasoning_content=event.text, reasoning_details=[entry])

    def _sign(self, event: form.ThinkingSigned) -> bytes:
        """The proof joins the thoughts before it by their index. Clients append texts, so that it comes without."""
        choice = self._choices[event.choice]
        shown = choice.thinking and not event.redacted
        entry = proof_of(event.signature, event.origin, redacted=event.redacted, shown=shown)
        if not shown:
            choice.thoughts += 1
        choice.thinking = False
        choice.held = {**entry, "index": choice.thoughts - 1}
        self._holding = True
        return b""

    def _released(self, event: Any) -> bytes:
        """The proof before this event. One that stands before a call is that call's: the entry names it."""
        choice = self._choices[event.choice]
        if choice.held is None:
            return b""
        entry, choice.held = choice.held, None
        self._holding = any(other.held for other in self._choices)
        if isinstance(event, form.ToolStarted):
            entry.setdefault("id", event.id)
        return self._delta(event.choice, reasoning_details=[entry])

    # The end ----------------------------------------------------------------------------------------------------------

    def _failed(self, event: form.Failed) -> bytes:
        """The figures so far are billed all the same."""
        figures = {} if self._usage is None else {"usage": usage_fields(self._usage)}
        return b"data: %b\n\n" % dumps({"error": error_fields(event.error), **figures})

    def _figures(self) -> bytes:
        if self._usage is None:
            return b""
        tier = {} if self._tier is None else {"service_tier": self._tier}
        return b"data: %b\n\n" % dumps({**self._fields, "choices": [], "usage": usage_fields(self._usage), **tier})

    # Chunks -----------------------------------------------------------------------------------------------------------

    def _chunk(self, index: int, delta: bytes) -> bytes:
        return b'%b%d,"delta":%b%b' % (self._before_index, index, delta, _UNFINISHED)

    def _delta(self, index: int, **fields: Any) -> bytes:
        return self._chunk(index, dumps(fields))

    def _of_choice(self, index: int, **fields: Any) -> bytes:
        """A chunk that says something of the choice itself."""
        choice = dumps({"index": index, "delta": {}, "finish_reason": None, **fields})
        return self._before_choice + choice + b"]}\n\n"


_OF_CHOICES: Mapping[type, Callable[[ChatStreamWriter, Any], bytes]] = {
    form.TextDelta: ChatStreamWriter._text,
    form.RefusalDelta: ChatStreamWriter._refuse,
    form.ThinkingDelta: ChatStreamWriter._thought,
    form.ThinkingSigned: ChatStreamWriter._sign,
    form.ToolStarted: ChatStreamWriter._call,
    form.ToolArguments: ChatStreamWriter._arguments,
    form.Cited: ChatStreamWriter._cite,
    form.Logprobs: ChatStreamWriter._logprobs,
    form.Finished: ChatStreamWriter._finish,
}
