"""Gemini's whole answers, both ways, and what those that are written share with streams."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from extproc import form
from extproc.dialects.dialect import Seed
from extproc.dialects.gemini import usage
from extproc.dialects.gemini.citations import write_grounding
from extproc.dialects.gemini.names import OWN, dumps
from extproc.dialects.gemini.parts import joined, write_call, write_parts
from extproc.dialects.gemini.stream_reader import StreamReader
from extproc.form import Finish

_FINISH = {
    Finish.STOP: "STOP",
    Finish.STOP_SEQUENCE: "STOP",
    Finish.TOOL_CALLS: "STOP",
    Finish.LENGTH: "MAX_TOKENS",
    Finish.CONTENT_FILTER: "SAFETY",
    Finish.REFUSAL: "SAFETY",
    Finish.PAUSE: "OTHER",
    Finish.ERROR: "OTHER",
}
_MALFORMED = "MALFORMED_FUNCTION_CALL"


# Read -----------------------------------------------------------------------------------------------------------------


def read_whole(body: bytes, request_id: str, unsearched: int | None = None) -> form.Answer:
    """A whole answer. Raises ValueError where it is none, an error with status 200 included."""
    reader = StreamReader(request_id, unsearched)
    events = reader.read(body)
    if not events or isinstance(events[0], form.Failed):
        raise ValueError("not an answer of generateContent")
    return _gathered(events, reader.ends)


@dataclass(slots=True)
class _Gathered:
    """One choice, of its events."""

    parts: list[form.Part] = field(default_factory=list)
    citations: list[form.Citation] = field(default_factory=list)
    logprobs: list[form.TokenLogprob] = field(default_factory=list)

    def choice(self, index: int, finish: Finish | None) -> form.Choice:
        """Citations belong to the last text, and their offsets to the only one."""
        parts = list(joined(self.parts))
        texts = [(i, part) for i, part in enumerate(parts) if isinstance(part, form.Text)]
        if texts and self.citations:
            kept = self.citations if len(texts) == 1 else [replace(c, start=None, end=None) for c in self.citations]
            last, text = texts[-1]
            parts[last] = replace(text, citations=tuple(kept))
        return form.Choice(index, tuple(parts), finish, logprobs=tuple(self.logprobs))


def _gathered(events: Sequence[form.StreamEvent], ends: Mapping[int, Finish | None]) -> form.Answer:
    choices: dict[int, _Gathered] = defaultdict(_Gathered)
    answer = form.Answer(None, None, (), None)
    unseen: list[str] = []
    call = form.ToolCall("", "", "")
    for event in events:
        match event:
            case form.Started():
                answer = replace(answer, id=event.id, model=event.model)
            case form.TextDelta():
                choices[event.choice].parts.append(form.Text(event.text))
            case form.ThinkingDelta():
                choices[event.choice].parts.append(form.Thinking(event.text, None, OWN))
            case form.ThinkingSigned():
                choices[event.choice].parts.append(form.Thinking("", event.signature, event.origin, event.redacted))
            case form.ToolStarted():
                call = form.ToolCall(event.id, event.name, "")
            case form.ToolArguments():  # whole, and right after its beginning
                choices[event.choice].parts.append(replace(call, arguments=event.json))
            case form.Cited():
                choices[event.choice].citations.append(event.citation)
            case form.Logprobs():
                choices[event.choice].logprobs += event.tokens
            case form.Unseen():
                unseen.append(event.text)
            case form.Used():
                answer = replace(answer, usage=event.usage, service_tier=event.service_tier)
    gathered = tuple(choices[index].choice(index, end) for index, end in ends.items())
    return replace(answer, choices=gathered, unseen=tuple(unseen))


# Written --------------------------------------------------------------------------------------------------------------


def write_whole(answer: form.Answer, seed: Seed) -> bytes:
    """The body for a caller."""
    written: dict[str, Any] = {"candidates": [_candidate(choice) for choice in answer.choices]}
    if answer.usage is not None:
        written["usageMetadata"] = usage.write(answer.usage, answer.service_tier)
    written["modelVersion"] = answer.model or seed.request.model
    written["responseId"] = answer.id or seed.request_id
    return dumps(written)


def _candidate(choice: form.Choice) -> dict[str, Any]:
    texts = [part for part in choice.parts if isinstance(part, form.Text)]
    only = texts[0].text if len(texts) == 1 else ""
    cited = [(citation, only) for text in texts for citation in text.citations]
    malformed = [
        part
        for part in choice.parts
        if isinstance(part, form.ToolCall) and write_call(part.id, part.name, part.arguments) is None
    ]
    return {
        "content": write_content(write_parts(choice.parts)),
        **write_finish(choice.finish, [(call.name, call.arguments) for call in malformed]),
        "index": choice.index,
        **write_grounding(cited),
        **write_logprobs(choice.logprobs),
    }


def write_content(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Google's clients want a part in every content."""
    return {"parts": parts or [{"text": ""}], "role": "model"}


def write_finish(finish: Finish | None, malformed: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """A call that is no JSON has its words in the message, as Google does it, so that none that is billed is lost."""
    message = "".join(f"Malformed function call: {name}({arguments})" for name, arguments in malformed)
    if finish is None:
        return {}
    if message:
        return {"finishReason": "MAX_TOKENS" if finish is Finish.LENGTH else _MALFORMED, "finishMessage": message}
    return {"finishReason": _FINISH[finish]}


def write_logprobs(tokens: Sequence[form.TokenLogprob]) -> dict[str, Any]:
    chosen = [_token(token) for token in tokens]
    if not chosen:
        return {}
    likeliest = [{"candidates": [_token(one) for one in token.top]} for token in tokens]
    return {"logprobsResult": {"chosenCandidates": chosen, "topCandidates": likeliest}}


def _token(token: form.TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logProbability": token.logprob}
