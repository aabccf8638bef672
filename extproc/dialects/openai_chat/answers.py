"""Whole answers of OpenAI's chat completions, both ways, and their figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from extproc import form
from extproc.dialects.dialect import Seed
from extproc.dialects.fields import dicts, dumps, parse
from extproc.dialects.openai_chat.calls import service_tier_of, usage_of
from extproc.dialects.openai_chat.choices import ChoiceReader, call_ids, index_of, sources
from extproc.dialects.openai_chat.thoughts import entry_of
from extproc.form import Finish
from extproc.records import Usage

_Fields = dict[str, Any]


# Read -----------------------------------------------------------------------------------------------------------------


def read_whole(body: bytes, seed: Seed) -> form.Answer:
    """A provider's answer. Raises ValueError where it is none, an error with status 200 included."""
    answer = parse(body)
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise ValueError("not a chat completion")
    next_id = call_ids(seed)
    cited = list(sources(answer))
    choices: list[form.Choice] = []
    unseen: list[str] = []
    for position, choice in enumerate(dicts(answer["choices"])):
        reader = ChoiceReader(index_of(choice, position), next_id)
        events = list(reader.read_message(choice))
        if position == 0:
            events += [event for citation in cited for event in reader.cite(citation)]
        events += reader.close()
        choices.append(_choice(reader.index, events))
        unseen += [event.text for event in events if isinstance(event, form.Unseen)]
    return form.Answer(
        id=_name(answer, "id"),
        model=_name(answer, "model"),
        choices=tuple(choices),
        usage=usage_of(answer),
        service_tier=service_tier_of(answer),
        unseen=tuple(unseen),
    )


def _name(answer: Mapping[str, Any], name: str) -> str | None:
    value = answer.get(name)
    return value if isinstance(value, str) and value else None


def _choice(index: int, events: Iterable[form.StreamEvent]) -> form.Choice:
    parts: list[form.Part] = []
    finished: form.Finished | None = None
    logprobs: tuple[form.TokenLogprob, ...] = ()
    for event in events:
        match event:
            case form.Finished():
                finished = event
            case form.Logprobs():
                logprobs += event.tokens
            case _:
                _add(event, parts)
    whole = (
        replace(part, arguments=part.arguments or "{}") if isinstance(part, form.ToolCall) else part for part in parts
    )
    sequence = finished.stop_sequence if finished else None
    return form.Choice(index, tuple(whole), finished.finish if finished else None, sequence, logprobs)


def _add(event: form.StreamEvent, parts: list[form.Part]) -> None:
    """The events of a whole message are already in order, a call's arguments right behind it."""
    last = parts[-1] if parts else None
    match event, last:
        case form.TextDelta(text=text), form.Text():
            parts[-1] = replace(last, text=last.text + text)
        case form.TextDelta(text=text), _:
            parts.append(form.Text(text))
        case form.ThinkingDelta(text=text), form.Thinking(signature=None):
            parts[-1] = replace(last, text=last.text + text)
        case form.ThinkingDelta(text=text), _:
            parts.append(form.Thinking(text))
        case form.ThinkingSigned(redacted=False), form.Thinking(signature=None):
            parts[-1] = replace(last, signature=event.signature, origin=event.origin)
        case form.ThinkingSigned(), _:
            parts.append(form.Thinking("", event.signature, event.origin, event.redacted))
        case form.RefusalDelta(text=text), _:
            parts.append(form.Refusal(text))
        case form.ToolStarted(id=call_id, name=name), _:
            parts.append(form.ToolCall(call_id, name, ""))
        case form.ToolArguments(json=json), form.ToolCall():
            parts[-1] = replace(last, arguments=last.arguments + json)
        case form.Cited(citation=citation), _:
            _cite(citation, parts)


def _cite(citation: form.Citation, parts: list[form.Part]) -> None:
    for i, part in reversed(list(enumerate(parts))):
        if isinstance(part, form.Text):
            parts[i] = replace(part, citations=(*part.citations, citation))
            return


# Write ----------------------------------------------------------------------------------------------------------------


def write_whole(answer: form.Answer, seed: Seed) -> bytes:
    """The body for a caller."""
    fields = {
        "id": answer.id or f"chatcmpl-{seed.request_id}",
        "object": "chat.completion",
        "created": seed.created_s,
        "model": answer.model or seed.request.model,
        "choices": [_write_choice(choice) for choice in answer.choices],
    }
    if answer.usage is not None:
        fields["usage"] = usage_fields(answer.usage)
    if answer.service_tier is not None:
        fields["service_tier"] = answer.service_tier
    return dumps(fields)


def _write_choice(choice: form.Choice) -> _Fields:
    message = _message(choice.parts)
    logprobs = logprob_fields(choice.logprobs, refused=bool(message["refusal"])) if choice.logprobs else None
    finish = choice.finish or (Finish.TOOL_CALLS if "tool_calls" in message else Finish.STOP)
    finished = finish_fields(finish, choice.stop_sequence, refused=bool(message["refusal"]))
    return {"index": choice.index, "message": message, "logprobs": logprobs, **finished}


def _message(parts: Iterable[form.Part]) -> _Fields:
    texts: list[form.Text] = []
    refusals: list[str] = []
    calls: list[_Fields] = []
    thoughts: list[_Fields] = []
    reasoning: list[str] = []
    unbound: list[_Fields] = []  # the signatures since the last part that is no thought
    for part in parts:
        match part:
            case form.Thinking():
                reasoning.append(part.text)
                thoughts.append({**entry_of(part), "index": len(thoughts)})
                unbound += thoughts[-1:] if part.signature else []
                continue
            case form.Text():
                texts.append(part)
            case form.Refusal():
                refusals.append(part.text)
            case form.ToolCall():
                function = {"name": part.name, "arguments": part.arguments}
                calls.append({"id": part.id, "type": "function", "function": function})
                for entry in unbound:
                    entry.setdefault("id", part.id)
        unbound = []
    content = "".join(part.text for part in texts)
    message: _Fields = {"role": "assistant", "content": content if texts or not (calls or refusals) else None}
    message["refusal"] = "".join(refusals) or None
    if annotations := _annotations(texts):
        message["annotations"] = annotations
    if thoughts:
        message |= {"reasoning_content": "".join(reasoning) or None, "reasoning_details": thoughts}
    if calls:
        message["tool_calls"] = calls
    return message


def _annotations(texts: Iterable[form.Text]) -> list[_Fields]:
    """Offsets are into the whole content, of which each text is a part."""
    before = 0
    annotations: list[_Fields] = []
    for part in texts:
        annotations += (annotation_of(citation, before) for citation in part.citations)
        before += len(part.text)
    return annotations


def annotation_of(citation: form.Citation, before: int = 0) -> _Fields:
    """`before` is how long the content was before the text that cites."""
    fields: _Fields = {"url": citation.url or "", "title": citation.title or ""}
    if citation.start is not None and citation.end is not None:
        fields |= {"start_index": citation.start + before, "end_index": citation.end + before}
    if citation.quote is not None:
        fields["content"] = citation.quote
    return {"type": "url_citation", "url_citation": fields}


def finish_fields(finish: Finish, stop_sequence: str | None, *, refused: bool) -> _Fields:
    """OpenAI's words, and beside them OpenRouter's and vLLM's names for what they do not tell.

    A refusal that the message holds ends like any text; one without words must not look like a whole answer.
    """
    filtered = finish is Finish.REFUSAL and not refused
    fields: _Fields = {"finish_reason": "content_filter" if filtered else _FINISHES.get(finish, "stop")}
    if finish in _NATIVE_FINISHES:
        fields["native_finish_reason"] = _NATIVE_FINISHES[finish]
    if stop_sequence is not None:
        fields["stop_reason"] = stop_sequence
    return fields


_FINISHES = {Finish.LENGTH: "length", Finish.TOOL_CALLS: "tool_calls", Finish.CONTENT_FILTER: "content_filter"}
_NATIVE_FINISHES = {Finish.REFUSAL: "refusal", Finish.PAUSE: "pause_turn", Finish.ERROR: "error"}


def logprob_fields(tokens: Iterable[form.TokenLogprob], *, refused: bool) -> _Fields:
    """They are either the content's or the refusal's."""
    written = [{**_token(token), "top_logprobs": [_token(top) for top in token.top]} for token in tokens]
    return {"content": None, "refusal": written} if refused else {"content": written, "refusal": None}


def _token(token: form.TokenLogprob) -> _Fields:
    return {"token": token.token, "logprob": token.logprob, "bytes": None}


def usage_fields(usage: Usage) -> _Fields:
    """What OpenAI has no name for has OpenRouter's."""
    fields: _Fields = {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_prompt,
            "cache_write_tokens": usage.cache_write_prompt,
            "audio_tokens": usage.audio_prompt,
        },
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning,
            "audio_tokens": usage.audio_completion,
        },
    }
    if usage.web_searches is not None:
        fields["server_tool_use_details"] = {"web_search_requests": usage.web_searches}
    return fields
