"""Anthropic's whole answers, both ways, and what they share with streams: usage, stop reasons, citations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from extproc.dialects.anthropic.vocabulary import ORIGIN, arguments_of, input_of
from extproc.dialects.dialect import Seed
from extproc.dialects.fields import count, dicts, dumps, parse
from extproc.form import (
    Answer,
    Choice,
    Citation,
    Finish,
    Part,
    Refusal,
    Text,
    Thinking,
    ToolCall,
    carry,
)
from extproc.records import Usage

# Finish reasons -------------------------------------------------------------------------------------------------------

_FINISHES = {
    "end_turn": Finish.STOP,
    "stop_sequence": Finish.STOP_SEQUENCE,
    "max_tokens": Finish.LENGTH,
    "model_context_window_exceeded": Finish.LENGTH,
    "tool_use": Finish.TOOL_CALLS,
    "pause_turn": Finish.PAUSE,
    "compaction": Finish.PAUSE,
    "refusal": Finish.REFUSAL,
}
_STOP_REASONS = {
    Finish.STOP: "end_turn",
    Finish.STOP_SEQUENCE: "stop_sequence",
    Finish.LENGTH: "max_tokens",
    Finish.TOOL_CALLS: "tool_use",
    Finish.PAUSE: "pause_turn",
    Finish.REFUSAL: "refusal",
    Finish.CONTENT_FILTER: "refusal",
    Finish.ERROR: "end_turn",
}


def finish_of(stopped: Mapping[str, Any]) -> Finish | None:
    """Why an answer ended, or None where it does not say. A reason that is not known here is an end."""
    reason = stopped.get("stop_reason")
    return _FINISHES.get(reason, Finish.STOP) if isinstance(reason, str) else None


def stop_fields(finish: Finish | None, stop_sequence: str | None, *, called: bool, refusal: str) -> dict[str, Any]:
    """The fields that say why an answer ended. Others end a call or a refusal with a plain stop, Anthropic does not."""
    finish = finish or Finish.STOP  # there is always a reason
    if finish is Finish.STOP and (called or refusal):
        finish = Finish.TOOL_CALLS if called else Finish.REFUSAL
    details = {"type": "refusal", "category": None, "explanation": refusal} if refusal else None
    return {"stop_reason": _STOP_REASONS[finish], "stop_sequence": stop_sequence, "stop_details": details}


def refusal_of(stopped: Mapping[str, Any]) -> str:
    """What the API says for the model where it does not answer."""
    details = stopped.get("stop_details")
    explanation = details.get("explanation") if isinstance(details, dict) else None
    return explanation if isinstance(explanation, str) else ""


# Usage ----------------------------------------------------------------------------------------------------------------

# Sampled beside the answer and not in its own figures: the summary of a long context, and an adviser's turn.
_BESIDE = ("compaction", "advisor_message")
# What Anthropic has no field for, and the gateway must read again: sound, and that whoever answered did not say how
# much was used, or how often the web was searched. Zeros without that would be taken for the bill.
_AUDIO = "audio_tokens"
_UNCOUNTED, _SEARCHES_UNCOUNTED = UNCOUNTED = ("uncounted", "uncounted_web_searches")


def read_usage(usage: dict[str, Any]) -> Usage | None:
    """What is billed, if both figures are there. Anthropic's `input_tokens` are those outside of the cache."""
    prompt, completion = count(usage, "input_tokens"), count(usage, "output_tokens")
    if prompt is None or completion is None or usage.get(_UNCOUNTED) is True:
        return None
    cached, written = count(usage, "cache_read_input_tokens") or 0, _written(usage)
    for beside in dicts(usage.get("iterations")):
        if beside.get("type") in _BESIDE:
            prompt += count(beside, "input_tokens") or 0
            completion += count(beside, "output_tokens") or 0
            cached += count(beside, "cache_read_input_tokens") or 0
            written += _written(beside)
    prompt += cached + written
    details = _details(usage, "output_tokens_details")
    return Usage(
        prompt=prompt,
        completion=completion,
        cached_prompt=cached,
        reasoning=min(count(details, "thinking_tokens") or 0, completion),
        audio_prompt=min(count(_details(usage, "input_tokens_details"), _AUDIO) or 0, prompt),
        audio_completion=min(count(details, _AUDIO) or 0, completion),
        cache_write_prompt=written,
        web_searches=None if usage.get(_SEARCHES_UNCOUNTED) is True else _searches(usage),
    )


def _written(usage: dict[str, Any]) -> int:
    """Written to the cache, for however long."""
    total = count(usage, "cache_creation_input_tokens")
    if total is not None:
        return total
    by_ttl = _details(usage, "cache_creation")
    return sum(count(by_ttl, name) or 0 for name in by_ttl)


def _searches(usage: Mapping[str, Any]) -> int:
    return count(_details(usage, "server_tool_use"), "web_search_requests") or 0


def _details(usage: Mapping[str, Any], name: str) -> dict[str, Any]:
    details = usage.get(name)
    return details if isinstance(details, dict) else {}


def read_service_tier(usage: Mapping[str, Any]) -> str | None:
    """What the answer is priced by: a speed of its own, or the service tier."""
    for tier in (usage.get("speed"), usage.get("service_tier")):
        if isinstance(tier, str) and tier not in ("", "standard"):
            return tier
    return "standard" if "standard" in (usage.get("speed"), usage.get("service_tier")) else None


def write_usage(usage: Usage | None, service_tier: str | None) -> dict[str, Any]:
    """The same figures in Anthropic's words, and under names beside them where it has none."""
    if usage is None:
        return {"input_tokens": 0, "output_tokens": 0, _UNCOUNTED: True}
    written: dict[str, Any] = {
        "input_tokens": max(0, usage.prompt - usage.cached_prompt - usage.cache_write_prompt),
        "cache_creation_input_tokens": usage.cache_write_prompt,
        "cache_read_input_tokens": usage.cached_prompt,
        "output_tokens": usage.completion,
    }
    details = {"thinking_tokens": usage.reasoning} | (
        {_AUDIO: usage.audio_completion} if usage.audio_completion else {}
    )
    if any(details.values()):
        written["output_tokens_details"] = details
    if usage.audio_prompt:
        written["input_tokens_details"] = {_AUDIO: usage.audio_prompt}
    if usage.web_searches is None:
        written[_SEARCHES_UNCOUNTED] = True
    elif usage.web_searches:
        written["server_tool_use"] = {"web_search_requests": usage.web_searches, "web_fetch_requests": 0}
    if service_tier is not None:
        written["service_tier"] = service_tier
    return written


# Citations ------------------------------------------------------------------------------------------------------------


def read_citation(citation: object) -> Citation | None:
    """What a text rests on. Anthropic's offsets are in the document, not in the answer."""
    if not isinstance(citation, dict):
        return None
    url = _str(citation, "url") or (_str(citation, "source") if "search_result_index" in citation else None)
    return Citation(url, _str(citation, "title") or _str(citation, "document_title"), _str(citation, "cited_text"))


def write_citation(citation: Citation) -> dict[str, Any]:
    """A citation of the web, or else of a document, of which no more than the words that were quoted is known."""
    quote = citation.quote or ""
    if citation.url is not None:
        where = {"type": "web_search_result_location", "url": citation.url, "title": citation.title}
        return {**where, "cited_text": quote, "encrypted_index": ""}
    document = {"type": "char_location", "document_index": 0, "document_title": citation.title, "file_id": None}
    return {**document, "cited_text": quote, "start_char_index": 0, "end_char_index": len(quote)}


def _str(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) else None


# What Anthropic runs itself -------------------------------------------------------------------------------------------


def is_run_there(kind: object) -> bool:
    """Whether a block is a call of a tool that the provider runs."""
    return kind in ("server_tool_use", "mcp_tool_use")


def unseen_of(block: Mapping[str, Any]) -> Iterator[str]:
    """What of a whole block was written by a model, and is for no other dialect."""
    kind = block.get("type")
    content = block.get("content")
    if is_run_there(kind):
        yield _str(block, "name") or ""
        yield arguments_of(block)
    elif kind == "compaction" and isinstance(content, str):
        yield content
    elif kind == "advisor_tool_result" and isinstance(content, dict):
        yield _str(content, "text") or ""


# Whole answers --------------------------------------------------------------------------------------------------------


def read_message(body: bytes) -> Answer:
    """A provider's whole answer. Raises ValueError where it is none, an error with status 200 included."""
    message = parse(body)
    if not isinstance(message, dict) or not isinstance(message.get("content"), list):
        raise ValueError("not a message")
    blocks = dicts(message["content"])
    parts = [part for block in blocks for part in _read_block(block)]
    if refusal := refusal_of(message):
        parts.append(Refusal(refusal))
    usage = message.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    choice = Choice(0, tuple(parts), finish_of(message), stop_sequence=_str(message, "stop_sequence"))
    return Answer(
        id=_str(message, "id"),
        model=_str(message, "model"),
        choices=(choice,),
        usage=read_usage(usage),
        service_tier=read_service_tier(usage),
        unseen=tuple(text for block in blocks for text in unseen_of(block) if text),
    )


def _read_block(block: Mapping[str, Any]) -> Iterator[Part]:
    match block.get("type"):
        case "text":
            citations = (read_citation(citation) for citation in dicts(block.get("citations")))
            yield Text(_str(block, "text") or "", citations=tuple(filter(None, citations)))
        case "thinking":
            signature = _str(block, "signature") or None
            yield Thinking(_str(block, "thinking") or "", signature, ORIGIN if signature else None)
        case "redacted_thinking":
            yield Thinking("", _str(block, "data") or "", ORIGIN, redacted=True)
        case "tool_use":
            yield ToolCall(_str(block, "id") or "", _str(block, "name") or "", arguments_of(block))


def write_message(answer: Answer, seed: Seed) -> bytes:
    """A whole answer for a caller: its first choice, since a caller of this dialect cannot ask for more."""
    choice = answer.choices[0] if answer.choices else Choice(0, (), None)
    refusal = "".join(part.text for part in choice.parts if isinstance(part, Refusal))
    called = any(isinstance(part, ToolCall) for part in choice.parts)
    message = {
        **envelope(answer.id, answer.model, seed),
        "content": [block for part in choice.parts if (block := _write_part(part)) is not None],
        **stop_fields(choice.finish, choice.stop_sequence, called=called, refusal=refusal),
        "usage": write_usage(answer.usage, answer.service_tier),
    }
    return dumps(message)


def envelope(id_: str | None, model: str | None, seed: Seed) -> dict[str, Any]:
    """What every message says of itself."""
    return {
        "id": id_ or f"msg_{seed.request_id}",
        "type": "message",
        "role": "assistant",
        "model": model or seed.request.model,
    }


def _write_part(part: Part) -> dict[str, Any] | None:
    match part:
        case Text():
            citations = {"citations": [*map(write_citation, part.citations)]} if part.citations else {}
            return {"type": "text", "text": part.text, **citations}
        case Thinking():
            return write_thinking(part)
        case ToolCall():
            return {"type": "tool_use", "id": part.id, "name": part.name, "input": input_of(part.arguments)}
    return None


def write_thinking(part: Thinking) -> dict[str, Any]:
    """Thoughts as a caller sees them: the signature of another dialect travels in the place of Anthropic's own."""
    signature = carry(part.signature, part.origin, ORIGIN) if part.signature else ""
    if part.redacted:
        return {"type": "redacted_thinking", "data": signature}
    return {"type": "thinking", "thinking": part.text, "signature": signature}
