"""The canonical form into a stream of Gemini's, as server-sent events or as one JSON array.

A call of a tool is one part, so that its arguments are gathered until its choice ends. The stream has no closing event:
what ends it is the last event's finish reasons, which are written once all has come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from extproc import form
from extproc.dialects.dialect import Seed
from extproc.dialects.gemini import errors, usage
from extproc.dialects.gemini.answers import write_content, write_finish, write_logprobs
from extproc.dialects.gemini.citations import write_grounding
from extproc.dialects.gemini.names import OWN, dumps
from extproc.dialects.gemini.parts import alone, signed, write_call, write_thinking
from extproc.form import Finish
from extproc.records import Usage


@dataclass(slots=True)
class _Call:
    """A call of a tool, as far as it has come."""

    id: str
    name: str
    signature: str | None
    arguments: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Choice:
    """What one choice has yet to say. `signature` belongs to its next part."""

    signature: str | None = None
    calls: dict[int, _Call] = field(default_factory=dict)
    logprobs: list[form.TokenLogprob] = field(default_factory=list)
    citations: list[form.Citation] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    malformed: list[tuple[str, str]] = field(default_factory=list)
    finish: Finish | None = None


class StreamWriter:
    """The canonical form into a caller's stream. One for each stream; where the seed says so, as one JSON array."""

    def __init__(self, seed: Seed) -> None:
        self._array = seed.array
        self._first = True
        self._id = seed.request_id
        self._model = seed.request.model
        self._usage: Usage | None = None
        self._service_tier: str | None = None
        self._usage_due = False
        self._choices: dict[int, _Choice] = {}

    def write(self, event: form.StreamEvent) -> bytes:
        """The bytes of whole events, or none."""
        match event:
            case form.TextDelta() | form.RefusalDelta():
                return self._text(event.choice, event.text)
            case form.ThinkingDelta():
                return self._parts(event.choice, write_thinking(form.Thinking(event.text)))
            case form.ThinkingSigned():
                return self._sign(event)
            case form.Finished() | form.Failed() | form.Done():
                return self._end(event)
        self._note(event)
        return b""

    def _end(self, event: form.Finished | form.Failed | form.Done) -> bytes:
        match event:
            case form.Finished():
                return self._finish(event)
            case form.Failed():
                return self._fail(event)
            case form.Done():
                return self._done()

    def _note(self, event: form.StreamEvent) -> None:
        """What is told later, with something else."""
        match event:
            case form.Started():
                self._id, self._model = event.id or self._id, event.model or self._model
                self._note_usage(event.usage, event.service_tier)
            case form.Used():
                self._note_usage(event.usage, event.service_tier)
            case form.ToolStarted():
                choice = self._choice(event.choice)
                choice.calls[event.call] = _Call(event.id, event.name, choice.signature)
                choice.signature = None
            case form.ToolArguments():
                if (call := self._choice(event.choice).calls.get(event.call)) is not None:
                    call.arguments.append(event.json)
            case form.Cited():
                self._choice(event.choice).citations.append(event.citation)
            case form.Logprobs():
                self._choice(event.choice).logprobs += event.tokens

    def _note_usage(self, figures: Usage | None, service_tier: str | None) -> None:
        self._service_tier = service_tier or self._service_tier
        if figures is not None:
            self._usage, self._usage_due = figures, True

    def _choice(self, index: int) -> _Choice:
        return self._choices.setdefault(index, _Choice())

    def _text(self, index: int, text: str) -> bytes:
        if not text:
            return b""
        choice = self._choice(index)
        choice.text.append(text)
        part = signed({"text": text}, choice.signature)
        choice.signature = None
        return self._parts(index, [part])

    def _parts(self, index: int, parts: list[dict[str, Any]]) -> bytes:
        """An event with a piece of one choice."""
        if not parts:
            return b""
        choice = self._choice(index)
        candidate = {"content": write_content(parts), "index": index, **write_logprobs(choice.logprobs)}
        choice.logprobs = []
        return self._event({"candidates": [candidate]})

    def _sign(self, event: form.ThinkingSigned) -> bytes:
        """A signature of this dialect waits for the part that it belongs to."""
        if event.origin == OWN:
            choice = self._choice(event.choice)
            earlier, choice.signature = choice.signature, event.signature
            return self._parts(event.choice, alone(earlier))
        thinking = form.Thinking("", event.signature, event.origin, event.redacted)
        return self._parts(event.choice, write_thinking(thinking))

    def _finish(self, event: form.Finished) -> bytes:
        choice = self._choice(event.choice)
        choice.finish = event.finish
        return self._calls(event.choice, choice)

    def _calls(self, index: int, choice: _Choice) -> bytes:
        parts = []
        for _, call in sorted(choice.calls.items()):
            arguments = "".join(call.arguments)
            part = write_call(call.id, call.name, arguments)
            if part is None:
                choice.malformed.append((call.name, arguments))
            else:
                parts.append(signed(part, call.signature))
        choice.calls = {}
        return self._parts(index, parts)

    def _done(self) -> bytes:
        """The last event has all finish reasons. A dialect may close without one: then it was an end like any other."""
        choices = sorted(self._choices.items()) or [(0, _Choice())]
        calls = b"".join(self._calls(index, choice) for index, choice in choices)
        self._usage_due = True  # whatever was told before: callers look for it here
        last = self._event({"candidates": [self._last(index, choice) for index, choice in choices]})
        return calls + last + (b"]" if self._array else b"")

    def _last(self, index: int, choice: _Choice) -> dict[str, Any]:
        text = "".join(choice.text)
        return {
            "content": write_content([signed({"text": ""}, choice.signature)]),
            **write_finish(choice.finish or Finish.STOP, choice.malformed),
            "index": index,
            **write_grounding([(citation, text) for citation in choice.citations]),
            **write_logprobs(choice.logprobs),
        }

    def _fail(self, event: form.Failed) -> bytes:
        """What was billed up to here, and why there is no more."""
        figures = self._event({}) if self._usage_due else b""
        return figures + self._frame(errors.render(event.error)) + (b"]" if self._array else b"")

    def _event(self, said: dict[str, Any]) -> bytes:
        if self._usage_due and self._usage is not None:
            said["usageMetadata"] = usage.write(self._usage, self._service_tier)
            self._usage_due = False
        return self._frame(dumps({**said, "modelVersion": self._model, "responseId": self._id}))

    def _frame(self, data: bytes) -> bytes:
        if not self._array:
            return b"data: " + data + b"\r\n\r\n"
        opening = b"[" if self._first else b",\r\n"
        self._first = False
        return opening + data
