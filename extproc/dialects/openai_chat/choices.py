"""What a provider's choice says, whole or in pieces: one reader for both, since the same things stand in both.

Providers differ in all that OpenAI has not named; each difference is named beside its rule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from extproc import form
from extproc.dialects.dialect import Seed
from extproc.dialects.fields import dicts, dumps
from extproc.dialects.openai_chat.thoughts import thoughts_of_provider
from extproc.form import Finish
from extproc.limits import MAX_CHOICES

_FINISHES = {
    "stop": Finish.STOP,
    "eos": Finish.STOP,  # Together
    "length": Finish.LENGTH,
    "model_length": Finish.LENGTH,  # Mistral
    "tool_calls": Finish.TOOL_CALLS,
    "function_call": Finish.TOOL_CALLS,
    "content_filter": Finish.CONTENT_FILTER,
    "error": Finish.ERROR,  # OpenRouter, Mistral
    "insufficient_system_resource": Finish.ERROR,  # DeepSeek
}
# OpenRouter says beside OpenAI's word what the provider behind it said.
_NATIVE_FINISHES = {"refusal": Finish.REFUSAL, "pause_turn": Finish.PAUSE, "error": Finish.ERROR}


def call_ids(seed: Seed) -> Callable[[], str]:
    """Ids for the calls of one answer that came without: the same ones for the same request."""
    count = 0

    def next_id() -> str:
        nonlocal count
        count += 1
        return f"call_{seed.request_id[:12]}_{count - 1}"

    return next_id


def index_of(choice: dict[str, Any], default: int = 0) -> int:
    index = choice.get("index")
    return index if type(index) is int and 0 <= index < MAX_CHOICES else default


class _Call:
    """A call of a tool. Until its name has come, its arguments wait."""

    __slots__ = ("given_id", "id", "named", "number", "waiting")

    def __init__(self, number: int, call_id: str, given_id: str | None) -> None:
        self.number = number
        self.id = call_id
        self.given_id = given_id
        self.named = False
        self.waiting = ""


class ChoiceReader:
    """One choice. `next_id` gives ids to calls without one."""

    __slots__ = ("_by_index", "_calls", "_cited", "_ending", "_next_id", "_refused", "index")

    def __init__(self, index: int, next_id: Callable[[], str]) -> None:
        self.index = index
        self._ending: dict[str, Any] | None = None
        self._next_id = next_id
        self._calls: list[_Call] = []
        self._by_index: dict[int, _Call] = {}
        self._cited: set[form.Citation] = set()
        self._refused = False

    @property
    def finished(self) -> bool:
        """Whether the provider has said why it ended."""
        return self._ending is not None

    def read_delta(self, choice: dict[str, Any]) -> Iterator[form.StreamEvent]:
        """What a chunk says of this choice."""
        delta = choice.get("delta")
        if isinstance(delta, dict):
            yield from self._read(delta, [call.get("index") for call in dicts(delta.get("tool_calls"))])
        yield from self._read_end(choice)

    def read_message(self, choice: dict[str, Any]) -> Iterator[form.StreamEvent]:
        """What a whole choice says."""
        message = choice.get("message")
        if isinstance(message, dict):
            yield from self._read(message, list(range(len(dicts(message.get("tool_calls"))))))
        yield from self._read_end(choice)

    def cite(self, citation: form.Citation) -> Iterator[form.StreamEvent]:
        """Once: some repeat all of them in every event."""
        if citation not in self._cited:
            self._cited.add(citation)
            yield form.Cited(self.index, citation)

    def close(self) -> Iterator[form.StreamEvent]:
        """Why it ended. Once all has come: Together says it after every call, and OpenRouter again with the figures."""
        for call in self._calls:
            yield from _unseen(call.waiting)  # never named, and billed all the same
        ending = self._ending or {}
        finish = _NATIVE_FINISHES.get(_text(ending, "native_finish_reason"))
        finish = finish or _FINISHES.get(_text(ending, "finish_reason"), Finish.STOP)
        sequence = _text(ending, "stop_reason") or _text(ending, "matched_stop")  # vLLM's and SGLang's
        if finish is not Finish.STOP:
            yield form.Finished(self.index, finish)
        elif any(call.named for call in self._calls):  # so does OpenAI end a call that was forced
            yield form.Finished(self.index, Finish.TOOL_CALLS)
        elif self._refused:
            yield form.Finished(self.index, Finish.REFUSAL)
        else:
            yield form.Finished(self.index, Finish.STOP_SEQUENCE if sequence else finish, sequence or None)

    def _read(self, message: dict[str, Any], indices: list[Any]) -> Iterator[form.StreamEvent]:
        index = self.index
        for thinking in thoughts_of_provider(message):
            if thinking.text:
                yield form.ThinkingDelta(index, thinking.text)
            if thinking.signature and thinking.origin:
                yield form.ThinkingSigned(index, thinking.signature, thinking.origin, thinking.redacted)
        content = message.get("content")
        if isinstance(content, str):
            if content:
                yield form.TextDelta(index, content)
        elif content:
            yield from self._read_parts(content)
        refusal = message.get("refusal")
        if isinstance(refusal, str) and refusal:
            self._refused = True
            yield form.RefusalDelta(index, refusal)
        for given, call_index in zip(dicts(message.get("tool_calls")), indices, strict=True):
            yield from self._read_call(given, call_index)
        yield from self._read_rest(message)

    def _read_rest(self, message: dict[str, Any]) -> Iterator[form.StreamEvent]:
        """What few answers have: OpenAI's first form of calls, sound, sources."""
        function = message.get("function_call")
        if isinstance(function, dict) and (function.get("name") or function.get("arguments")):
            yield from self._read_call({"function": function}, 0)
        audio = message.get("audio")
        if isinstance(audio, dict):
            yield from _unseen(audio.get("transcript"))
        for annotation in dicts(message.get("annotations")):
            cited = annotation.get("url_citation")
            if isinstance(cited, dict):
                yield from self.cite(_citation(cited))

    def _read_parts(self, parts: object) -> Iterator[form.StreamEvent]:
        """Mistral's reasoning models answer in parts: `text`, and `thinking` with parts of its own."""
        for part in dicts(parts):
            for thought in dicts(part.get("thinking")):
                if text := _text(thought, "text"):
                    yield form.ThinkingDelta(self.index, text)
            if text := _text(part, "text"):
                yield form.TextDelta(self.index, text)

    # Calls of tools ---------------------------------------------------------------------------------------------------

    def _read_call(self, given: dict[str, Any], call_index: object) -> Iterator[form.StreamEvent]:
        custom = given.get("custom")
        if isinstance(custom, dict):  # a tool without a schema, which no other dialect has
            yield from _unseen(custom.get("name"))
            yield from _unseen(custom.get("input"))
        function = given.get("function")
        if not isinstance(function, dict):
            return
        name = _text(function, "name")
        call = self._call(call_index, _text(given, "id"), name)
        arguments = function.get("arguments")
        written = arguments if isinstance(arguments, str) else dumps(arguments).decode() if arguments else ""
        if name and not call.named:
            call.named = True
            yield form.ToolStarted(self.index, call.number, call.id, name)
            written, call.waiting = call.waiting + written, ""
        if not call.named:
            call.waiting += written
        elif written:
            yield form.ToolArguments(self.index, call.number, written)

    def _call(self, index: object, call_id: str, name: str) -> _Call:
        """The call that a piece belongs to.

        By its index; where it has none (Mistral), by its id, else the last one. A piece that begins like a call, under
        an index that is taken by a call of another id, is a new one.
        """
        if type(index) is int:
            call = self._by_index.get(index)
            if call is not None and name and call_id and call.given_id and call_id != call.given_id:
                call = None
        elif call_id:
            call = next((call for call in self._calls if call.given_id == call_id), None)
        else:
            call = self._calls[-1] if self._calls and not name else None
        if call is None:
            call = _Call(len(self._calls), call_id or self._next_id(), call_id or None)
            self._calls.append(call)
        if type(index) is int:
            self._by_index[index] = call
        return call

    def _read_end(self, choice: dict[str, Any]) -> Iterator[form.StreamEvent]:
        logprobs = choice.get("logprobs")
        if isinstance(logprobs, dict):
            tokens = (*_tokens(logprobs.get("content")), *_tokens(logprobs.get("refusal")))
            if tokens:
                yield form.Logprobs(self.index, tokens)
        if choice.get("finish_reason"):
            self._ending = choice


def _tokens(values: object) -> Iterator[form.TokenLogprob]:
    for value in dicts(values):
        token, logprob = value.get("token"), value.get("logprob")
        if isinstance(token, str) and isinstance(logprob, (int, float)):
            yield form.TokenLogprob(token, float(logprob), tuple(_tokens(value.get("top_logprobs"))))


def _citation(cited: dict[str, Any]) -> form.Citation:
    start, end = cited.get("start_index"), cited.get("end_index")
    return form.Citation(
        url=_text(cited, "url") or None,
        title=_text(cited, "title") or None,
        quote=_text(cited, "content") or None,
        start=start if type(start) is int else None,
        end=end if type(end) is int else None,
    )


def _unseen(text: object) -> Iterator[form.StreamEvent]:
    if isinstance(text, str) and text:
        yield form.Unseen(text)


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    return value if isinstance(value, str) else ""


def sources(answer: dict[str, Any]) -> Iterator[form.Citation]:
    """What Perplexity's answers rest on: addresses, and what was found there."""
    found = {_text(result, "url"): result for result in dicts(answer.get("search_results"))}
    urls = answer.get("citations")
    for url in urls if isinstance(urls, list) else ():
        if isinstance(url, str) and url:
            result = found.get(url, {})
            yield form.Citation(url=url, title=_text(result, "title") or None, quote=_text(result, "snippet") or None)
