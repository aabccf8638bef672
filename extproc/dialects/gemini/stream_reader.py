"""A provider's answer of Gemini's into the canonical form: the events of a stream, and whole ones, which look the same.

https://ai.google.dev/api/generate-content#generatecontentresponse. Answers of older models, of both APIs and of image
models differ; the recorded ones in `tests/streams` show how.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from extproc import form
from extproc.dialects.fields import dicts, parse
from extproc.dialects.gemini import errors, usage
from extproc.dialects.gemini.citations import read_citations
from extproc.dialects.gemini.names import OWN, dumps, generation
from extproc.dialects.gemini.parts import read_part
from extproc.form import Finish

_CALL_ID_CHARS = 12  # of the request's id
_SAYING = ("candidates", "promptFeedback", "usageMetadata")

_FINISH = {
    "STOP": Finish.STOP,
    "MAX_TOKENS": Finish.LENGTH,
    "SAFETY": Finish.CONTENT_FILTER,
    "RECITATION": Finish.CONTENT_FILTER,
    "LANGUAGE": Finish.CONTENT_FILTER,
    "BLOCKLIST": Finish.CONTENT_FILTER,
    "PROHIBITED_CONTENT": Finish.CONTENT_FILTER,
    "SPII": Finish.CONTENT_FILTER,
    "IMAGE_SAFETY": Finish.CONTENT_FILTER,
    "IMAGE_PROHIBITED_CONTENT": Finish.CONTENT_FILTER,
    "IMAGE_RECITATION": Finish.CONTENT_FILTER,
    "MODEL_ARMOR": Finish.CONTENT_FILTER,
    "MALFORMED_FUNCTION_CALL": Finish.ERROR,
    "MALFORMED_RESPONSE": Finish.ERROR,
    "UNEXPECTED_TOOL_CALL": Finish.ERROR,
    "TOO_MANY_TOOL_CALLS": Finish.ERROR,
    "MISSING_THOUGHT_SIGNATURE": Finish.ERROR,
    "NO_IMAGE": Finish.ERROR,
    "IMAGE_OTHER": Finish.ERROR,
    "OTHER": Finish.ERROR,
}
# As numbers, on which both APIs agree up to 5; from there to 8 all are filters in both.
_NUMBERED = {
    1: Finish.STOP,
    2: Finish.LENGTH,
    3: Finish.CONTENT_FILTER,
    4: Finish.CONTENT_FILTER,
    5: Finish.ERROR,
    6: Finish.CONTENT_FILTER,
    7: Finish.CONTENT_FILTER,
    8: Finish.CONTENT_FILTER,
}
_LOGPROB_BOUND = 1e9  # far beyond any, and what a float holds
_UNFINISHED = (None, "", 0, "FINISH_REASON_UNSPECIFIED")


@dataclass(slots=True)
class _Candidate:
    """What has come of one choice."""

    calls: int = 0
    finish: Finish | None = None
    text: list[str] = field(default_factory=list)
    cited: set[form.Citation] = field(default_factory=set)

    @property
    def ended(self) -> Finish | None:
        """Google says STOP where tools are called, too."""
        return Finish.TOOL_CALLS if self.finish is Finish.STOP and self.calls else self.finish


class StreamReader:
    """Gemini's stream into the canonical form; a whole answer is a stream of one event.

    Older models say STOP in every event, so that a choice's end is told once the stream has ended.
    `request_id` makes the ids of calls that have none. `unsearched` is how many searches are billed where none is
    named: Google names all, and so for the bill none was made.
    """

    def __init__(self, request_id: str, unsearched: int | None = None) -> None:
        self.blocked = False
        self._unsearched = unsearched
        self._id_prefix = f"call_{request_id[:_CALL_ID_CHARS]}"
        self._calls = 0
        self._candidates: dict[int, _Candidate] = {}
        self._searches: set[str] = set()
        self._started = False
        self._failed = False

    @property
    def finished(self) -> tuple[int, ...]:
        """The choices that have ended, as far as is known."""
        return tuple(index for index, one in self._candidates.items() if one.finish is not None)

    def read(self, data: bytes) -> Sequence[form.StreamEvent]:
        """What one event says. What is not understood says nothing."""
        answer = parse(data)
        if (error := errors.error_in(answer)) is not None:
            self._failed = True
            return (form.Failed(errors.read_event(error)),)
        if not isinstance(answer, dict) or not any(name in answer for name in _SAYING):
            return ()
        return tuple(self._read(answer))

    @property
    def ends(self) -> dict[int, Finish | None]:
        """How each choice has ended. Where the prompt is blocked, there may be none, and one stands for all."""
        blocked = Finish.CONTENT_FILTER if self.blocked else None
        ends = {index: one.ended or blocked for index, one in sorted(self._candidates.items())}
        return ends or ({0: blocked} if blocked else {})

    def finish(self) -> Sequence[form.StreamEvent]:
        """There is no closing event: the stream is whole if each choice was, or if the prompt was blocked."""
        ended = [form.Finished(index, end) for index, end in self.ends.items() if end is not None]
        whole = ended and len(ended) == len(self.ends) and not self._failed
        return (*ended, form.Done()) if whole else ()

    def _read(self, answer: dict[str, Any]) -> Iterator[form.StreamEvent]:
        model = _text(answer, "modelVersion")
        if not self._started:
            self._started = True
            yield form.Started(_text(answer, "responseId"), model)
        feedback = answer.get("promptFeedback")
        self.blocked = self.blocked or bool(isinstance(feedback, dict) and feedback.get("blockReason"))
        for position, candidate in enumerate(dicts(answer.get("candidates"))):
            index = candidate.get("index")
            yield from self._read_candidate(candidate, index if type(index) is int and index >= 0 else position)
            self._note_searches(candidate)
        searches = self._billed_searches(model or "") if self._searches else self._unsearched
        if (figures := usage.read(answer, searches)) is not None:
            yield form.Used(figures, usage.read_tier(answer))

    def _read_candidate(self, candidate: dict[str, Any], index: int) -> Iterator[form.StreamEvent]:
        state = self._candidates.setdefault(index, _Candidate())
        content = candidate.get("content")
        for part in dicts(content.get("parts")) if isinstance(content, dict) else ():
            yield from self._read_part(part, index, state)
            yield from map(form.Unseen, _unseen_texts(part))
        if tokens := _logprobs(candidate.get("logprobsResult")):
            yield form.Logprobs(index, tokens)
        yield from self._read_citations(candidate, index, state)
        reason = candidate.get("finishReason")
        if reason not in _UNFINISHED:
            state.finish = _finish(reason)
        elif content is None and "content" in candidate:
            yield form.Unseen("")  # some text is billed and left out
        message = _text(candidate, "finishMessage") or ""
        if reason == "MALFORMED_FUNCTION_CALL" or message.startswith("Malformed function call"):
            yield form.Unseen(message)  # holds the call that the model wrote

    def _read_citations(self, candidate: dict[str, Any], index: int, state: _Candidate) -> Iterator[form.StreamEvent]:
        """Each once: they are repeated from event to event."""
        if "groundingMetadata" in candidate or "citationMetadata" in candidate:
            for citation in read_citations(candidate, "".join(state.text)):
                if citation not in state.cited:
                    state.cited.add(citation)
                    yield form.Cited(index, citation)

    def _read_part(self, part: dict[str, Any], index: int, state: _Candidate) -> Iterator[form.StreamEvent]:
        for said in read_part(part, f"{self._id_prefix}_{self._calls}"):
            match said:
                case form.Text():
                    state.text.append(said.text)
                    yield form.TextDelta(index, said.text)
                case form.Thinking():
                    if said.text:
                        yield form.ThinkingDelta(index, said.text)
                    if said.signature is not None:
                        yield form.ThinkingSigned(index, said.signature, said.origin or OWN, said.redacted)
                case form.ToolCall():
                    yield form.ToolStarted(index, state.calls, said.id, said.name)
                    yield form.ToolArguments(index, state.calls, said.arguments)
                    state.calls += 1
                    self._calls += 1

    def _note_searches(self, candidate: dict[str, Any]) -> None:
        grounding = candidate.get("groundingMetadata")
        queries = grounding.get("webSearchQueries") if isinstance(grounding, dict) else None
        if isinstance(queries, list):
            self._searches.update(query for query in queries if isinstance(query, str))

    def _billed_searches(self, model: str) -> int:
        """Up to Gemini 2 a prompt with searches is billed, from Gemini 3 on each of them."""
        return len(self._searches) if generation(model) >= 3 else 1


def _unseen_texts(part: Mapping[str, Any]) -> Iterator[str]:
    """What is billed as output and is Google's own: code and its output, calls of its tools, streamed arguments."""
    for name, kept in (("executableCode", "code"), ("codeExecutionResult", "output")):
        value = part.get(name)
        if isinstance(value, dict) and isinstance(value.get(kept), str) and value[kept]:
            yield value[kept]
    call = part.get("toolCall")
    if isinstance(call, dict) and isinstance(call.get("args"), dict):
        yield dumps(call["args"]).decode()
    function = part.get("functionCall")
    for piece in dicts(function.get("partialArgs")) if isinstance(function, dict) else ():
        if isinstance(piece.get("stringValue"), str) and piece["stringValue"]:
            yield piece["stringValue"]


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) and value else None


def _finish(reason: object) -> Finish:
    """A reason that is new is an end like any other."""
    if type(reason) is int:
        return _NUMBERED.get(reason, Finish.ERROR)
    return _FINISH.get(str(reason), Finish.STOP)


def _logprobs(result: object) -> tuple[form.TokenLogprob, ...]:
    if not isinstance(result, dict):
        return ()
    likeliest = [tuple(_tokens(top.get("candidates"))) for top in dicts(result.get("topCandidates"))]
    chosen = _tokens(result.get("chosenCandidates"))
    return tuple(replace(token, top=top) for token, top in zip_longest(chosen, likeliest, fillvalue=()) if token)


def _tokens(values: object) -> Iterator[form.TokenLogprob]:
    for value in dicts(values):
        token, logprob = value.get("token"), value.get("logProbability", 0.0)
        if isinstance(token, str) and type(logprob) in (int, float) and abs(logprob) < _LOGPROB_BOUND:
            yield form.TokenLogprob(token, float(logprob))
