"""A provider's stream of chat completion chunks, read into the canonical form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from extproc import form
from extproc.dialects.dialect import Seed
from extproc.dialects.fields import dicts, parse
from extproc.dialects.openai_chat.calls import PLAIN_FIELDS, is_error, service_tier_of, usage_of
from extproc.dialects.openai_chat.choices import ChoiceReader, call_ids, index_of, sources
from extproc.dialects.openai_parts import provider_error


class ChatStreamReader:
    """One stream. What comes after its end is not read."""

    __slots__ = ("_asked", "_choices", "_citations", "_ended", "_next_id", "_started")

    def __init__(self, seed: Seed) -> None:
        self._asked = seed.request.choices or 1
        self._next_id = call_ids(seed)
        self._choices: dict[int, ChoiceReader] = {}
        self._citations: object = None
        self._started = False
        self._ended = False

    def read(self, data: bytes) -> Sequence[form.StreamEvent]:
        """What the data of one event says."""
        if self._ended:
            return ()
        event = parse(data)
        if type(event) is not dict:
            return self._close() if data.strip() == b"[DONE]" else ()
        return self._plain_delta(event) or self._read(event)

    def finish(self) -> Sequence[form.StreamEvent]:
        """Some never close: the answer is whole where every choice has finished."""
        finished = [choice.finished for choice in self._choices.values()]
        if self._ended or not all(finished) or len(finished) < self._asked:
            return ()
        return self._close()

    def _plain_delta(self, event: dict[str, Any]) -> Sequence[form.StreamEvent]:
        """Nearly every event: a piece of text of a choice that has begun, and nothing else. Empty for any other."""
        choices = event.get("choices")
        if type(choices) is not list or len(choices) != 1 or event.get("usage") or not PLAIN_FIELDS.issuperset(event):
            return ()
        choice = choices[0]
        if type(choice) is not dict or choice.get("finish_reason") or choice.get("logprobs"):
            return ()
        index, delta = choice.get("index"), choice.get("delta")
        if type(index) is not int or index not in self._choices or type(delta) is not dict or len(delta) != 1:
            return ()
        text = delta.get("content")
        return (form.TextDelta(index, text),) if type(text) is str and text else ()

    def _read(self, event: dict[str, Any]) -> Sequence[form.StreamEvent]:
        events: list[form.StreamEvent] = []
        choices = dicts(event.get("choices"))
        usage, tier = usage_of(event), service_tier_of(event)
        if not self._started and (choices or usage):  # Azure's first event has neither, and no model
            self._started = True
            events.append(form.Started(_name(event, "id"), _name(event, "model"), None, tier))
        for choice in choices:
            events += self._choice(index_of(choice)).read_delta(choice)
        if choices and event.get("citations") != self._citations:
            self._citations = event["citations"]
            for citation in sources(event):
                events += self._choice(0).cite(citation)
        if usage is not None:
            events.append(form.Used(usage, tier))
        if is_error(event):
            self._ended = True
            events.append(form.Failed(provider_error(event)))
        return events

    def _choice(self, index: int) -> ChoiceReader:
        if index not in self._choices:
            self._choices[index] = ChoiceReader(index, self._next_id)
        return self._choices[index]

    def _close(self) -> Sequence[form.StreamEvent]:
        self._ended = True
        events: list[form.StreamEvent] = [] if self._started else [form.Started(None, None)]
        for index in self._choices or (0,):
            events += self._choice(index).close()
        return [*events, form.Done()]


def _name(event: dict[str, Any], name: str) -> str | None:
    value = event.get(name)
    return value if isinstance(value, str) and value else None
