"""Whole answers of Responses, both ways: the items of the output, why it ended, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from extproc import form
from extproc.dialects.dialect import Seed
from extproc.dialects.fields import count, dicts, dumps, parse
from extproc.dialects.openai_responses.request_writer import echo
from extproc.dialects.openai_responses.thoughts import ITEM_PREFIX, encrypted, thinking
from extproc.form import Finish
from extproc.limits import MAX_JSON_DEPTH
from extproc.records import Usage

PARAGRAPH = "\n\n"  # between the parts of a summary

# What the model wrote for the provider's own tools, by their fields. What those answered is not output.
_TOOL_TEXTS = ("name", "input", "arguments", "code", "queries", "action", "operation", "revised_prompt")
_PAGES = ("open_page", "find_in_page")  # done with a search's tool, and not billed as a search


# From a provider ------------------------------------------------------------------------------------------------------


def read_response(body: bytes) -> form.Answer:
    """What a response says. One that failed ends with Finish.ERROR. Raises ValueError where it is not a response."""
    response = parse(body)
    if not isinstance(response, dict) or not isinstance(response.get("output"), list):
        raise ValueError("not a response")
    parts: list[form.Part] = []
    logprobs: list[form.TokenLogprob] = []
    unseen: list[str] = []
    if (thoughts := text_of(response, "reasoning")) is not None:  # mistral.rs, in place of an item
        parts.append(form.Thinking(thoughts))
    items = dicts(response["output"])
    for item in items:
        parts += _parts(item)
        unseen += tool_texts(item)
        for part in dicts(item.get("content")):
            logprobs += read_logprobs(part.get("logprobs"))
    finish = read_finish(
        response,
        called=any(isinstance(part, form.ToolCall) for part in parts),
        refused=any(isinstance(part, form.Refusal) for part in parts),
    )
    return form.Answer(
        id=text_of(response, "id"),
        model=text_of(response, "model"),
        choices=(form.Choice(0, tuple(parts), finish, logprobs=tuple(logprobs)),),
        usage=read_usage(response, count_searches(items)),
        service_tier=text_of(response, "service_tier"),
        unseen=tuple(unseen),
    )


def _parts(item: dict[str, Any]) -> Iterator[form.Part]:
    match item.get("type"):
        case "message":
            yield from filter(None, map(_content, dicts(item.get("content"))))
        case "reasoning":
            text, signature = reasoning_text(item), text_of(item, "encrypted_content")
            if text or signature:
                yield thinking(text, signature)
        case "function_call":
            yield form.ToolCall(call_id(item), text_of(item, "name") or "", arguments(item))


def _content(part: dict[str, Any]) -> form.Part | None:
    if (refusal := text_of(part, "refusal")) is not None:
        return form.Refusal(refusal)
    text = text_of(part, "text")
    if text is None:
        return None
    return form.Text(text, citations=tuple(map(read_citation, dicts(part.get("annotations")))))


def reasoning_text(item: Mapping[str, Any]) -> str:
    """The thoughts of an item: in full, where an open model gives them, and what sums them up."""
    parts = (*dicts(item.get("content")), *dicts(item.get("summary")))
    return PARAGRAPH.join(text for part in parts if (text := text_of(part, "text")))


def call_id(item: Mapping[str, Any]) -> str:
    return text_of(item, "call_id") or text_of(item, "id") or ""


def arguments(item: Mapping[str, Any]) -> str:
    return text_of(item, "arguments") or ""


def read_citation(annotation: dict[str, Any]) -> form.Citation:
    """A page, or, by its name, a file."""
    return form.Citation(
        url=text_of(annotation, "url"),
        title=text_of(annotation, "title") or text_of(annotation, "filename"),
        start=count(annotation, "start_index"),
        end=count(annotation, "end_index"),
    )


def read_logprobs(values: object) -> tuple[form.TokenLogprob, ...]:
    tokens = ((_logprob(value), value) for value in dicts(values))
    return tuple(
        replace(token, top=tuple(filter(None, map(_logprob, dicts(value.get("top_logprobs"))))))
        for token, value in tokens
        if token
    )


def _logprob(value: dict[str, Any]) -> form.TokenLogprob | None:
    token, logprob = value.get("token"), value.get("logprob")
    if not isinstance(token, str) or not isinstance(logprob, (int, float)):
        return None
    return form.TokenLogprob(token, float(logprob))


def tool_texts(item: Mapping[str, Any]) -> list[str]:
    """What the model wrote to use a tool that is no function of the caller's."""
    kind = item.get("type")
    if not isinstance(kind, str) or not kind.endswith("_call") or kind == "function_call":
        return []
    return [text for name in _TOOL_TEXTS for text in _texts(item.get(name))]


def _texts(value: object, depth: int = MAX_JSON_DEPTH) -> Iterator[str]:
    """The words in a value: an action's queries, addresses, commands. A query is given twice, alone and listed."""
    match value:
        case str() if value:
            yield value
        case list() if depth:
            for member in value:
                yield from _texts(member, depth - 1)
        case dict() if depth:
            for name, member in value.items():
                if name not in ("type", "sources", "env") and not (name == "query" and value.get("queries")):
                    yield from _texts(member, depth - 1)


def read_finish(response: Mapping[str, Any], *, called: bool, refused: bool) -> Finish:
    """Why it ended. What it needs another turn for, beside the two reasons of OpenAI's, is not told apart."""
    status = response.get("status")
    if status in ("failed", "cancelled"):
        return Finish.ERROR
    if status == "incomplete":
        details = response.get("incomplete_details")
        reason = details.get("reason") if isinstance(details, dict) else None
        return _REASONS.get(reason, Finish.PAUSE) if isinstance(reason, str) else Finish.PAUSE
    if called:
        return Finish.TOOL_CALLS
    return Finish.REFUSAL if refused else Finish.STOP


_REASONS = {"max_output_tokens": Finish.LENGTH, "content_filter": Finish.CONTENT_FILTER}


# Usage ----------------------------------------------------------------------------------------------------------------


def read_usage(response: Mapping[str, Any], searches: int) -> Usage | None:
    """What is billed. `searches` are the web searches that were seen, for providers that do not count them.

    OpenAI counts them in `tool_usage`, xAI within `usage`, as the gateway does, where `null` is: not counted.
    """
    usage = response.get("usage")
    if not isinstance(usage, dict):
        return None
    prompt, completion = count(usage, "input_tokens"), count(usage, "output_tokens")
    if prompt is None or completion is None:
        return None
    completion = max(completion, (count(usage, "total_tokens") or 0) - prompt)
    given, made = _details(usage, "input_tokens_details"), _details(usage, "output_tokens_details")
    return Usage(
        prompt=prompt,
        completion=completion,
        cached_prompt=min(count(given, "cached_tokens") or 0, prompt),
        reasoning=min(count(made, "reasoning_tokens") or 0, completion),
        audio_prompt=min(count(given, "audio_tokens") or 0, prompt),
        audio_completion=min(count(made, "audio_tokens") or 0, completion),
        cache_write_prompt=min(count(given, "cache_write_tokens") or 0, prompt),
        web_searches=_searches(response, usage, searches),
    )


def _searches(response: Mapping[str, Any], usage: dict[str, Any], seen: int) -> int | None:
    if "server_side_tool_usage_details" in usage:
        details = usage["server_side_tool_usage_details"]
        if not isinstance(details, dict):
            return None
        return (count(details, "web_search_calls") or 0) + (count(details, "x_search_calls") or 0)
    counted = count(_details(_details(response, "tool_usage"), "web_search"), "num_requests")
    return seen if counted is None else counted


def count_searches(items: list[dict[str, Any]]) -> int:
    """The web searches among some items. Opening a page is none (OpenAI's reference: `tool_usage.web_search`)."""
    return sum(
        item.get("type") == "web_search_call" and _details(item, "action").get("type") not in _PAGES for item in items
    )


def write_usage(usage: Usage | None) -> dict[str, Any] | None:
    """In OpenAI's fields, and what costs money and has none in others beside them: read back by `read_usage`."""
    if usage is None:
        return None
    given = {"cached_tokens": usage.cached_prompt, "cache_write_tokens": usage.cache_write_prompt}
    made = {"reasoning_tokens": usage.reasoning}
    if usage.audio_prompt:
        given["audio_tokens"] = usage.audio_prompt
    if usage.audio_completion:
        made["audio_tokens"] = usage.audio_completion
    searches = usage.web_searches
    return {
        "input_tokens": usage.prompt,
        "input_tokens_details": given,
        "output_tokens": usage.completion,
        "output_tokens_details": made,
        "total_tokens": usage.prompt + usage.completion,
        "server_side_tool_usage_details": None if searches is None else {"web_search_calls": searches},
    }


# To a caller ----------------------------------------------------------------------------------------------------------


class Items:
    """Items of one answer's output, as they are begun and done. The ids are the request's."""

    def __init__(self, seed: Seed) -> None:
        self._id = seed.request_id
        self.response_id = f"resp_{seed.request_id}"

    def message_id(self, index: int) -> str:
        return f"msg_{self._id}_{index}"

    def reasoning_id(self, index: int) -> str:
        return f"{ITEM_PREFIX}{self._id}_{index}"

    def call_id(self, index: int) -> str:
        return f"fc_{self._id}_{index}"

    def message(self, index: int, content: list[dict[str, Any]], status: str) -> dict[str, Any]:
        item = {"id": self.message_id(index), "type": "message", "status": status}
        return {**item, "role": "assistant", "content": content}

    def reasoning(self, index: int, text: str, encrypted_content: str | None) -> dict[str, Any]:
        summary = [summary_part(text)] if text else []
        item: dict[str, Any] = {"id": self.reasoning_id(index), "type": "reasoning", "summary": summary}
        return item if encrypted_content is None else {**item, "encrypted_content": encrypted_content}

    def call(self, index: int, call_id: str, name: str, json: str, status: str) -> dict[str, Any]:
        call = {"id": self.call_id(index), "type": "function_call", "status": status}
        return {**call, "call_id": call_id, "name": name, "arguments": json}


def text_part(text: str, citations: list[dict[str, Any]], logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": citations, "logprobs": logprobs}


def refusal_part(text: str) -> dict[str, Any]:
    return {"type": "refusal", "refusal": text}


def summary_part(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}


def write_citation(citation: form.Citation, base: int = 0) -> dict[str, Any]:
    """A page or, without an address, a file. `base` is where the part begins in the text that offsets are about."""
    start, end = (max((offset or 0) - base, 0) for offset in (citation.start, citation.end))
    place, title = {"start_index": start, "end_index": end}, citation.title or ""
    if citation.url is not None:
        return {"type": "url_citation", "url": citation.url, "title": title, **place}
    if citation.start is None:
        return {"type": "file_citation", "file_id": title, "filename": title, "index": end}
    return {"type": "container_file_citation", "container_id": "", "file_id": title, "filename": title, **place}


def write_logprobs(tokens: tuple[form.TokenLogprob, ...]) -> list[dict[str, Any]]:
    return [
        {
            "token": token.token,
            "logprob": token.logprob,
            "bytes": list(token.token.encode("utf-8", "replace")),
            "top_logprobs": write_logprobs(token.top),
        }
        for token in tokens
    ]


def write_response(answer: form.Answer, seed: Seed) -> bytes:
    """An answer as one response. Of several choices, which nobody can ask for here, the first."""
    choice = answer.choices[0] if answer.choices else form.Choice(0, (), None)
    ending = ending_of(choice.finish, any(isinstance(part, form.Refusal) for part in choice.parts))
    items = Items(seed)
    output = _output(choice, items, "completed" if ending["status"] == "completed" else "incomplete")
    return dumps(
        snapshot(
            seed,
            items.response_id,
            answer.model,
            output,
            ending,
            usage=answer.usage,
            service_tier=answer.service_tier,
        )
    )


def _output(choice: form.Choice, items: Items, status: str) -> list[dict[str, Any]]:
    """The items. Texts and refusals that follow each other are parts of one message."""
    output: list[dict[str, Any]] = []
    logprobs = write_logprobs(choice.logprobs)
    for part in choice.parts:
        match part:
            case form.Text() | form.Refusal():
                if not output or output[-1]["type"] != "message":
                    output.append(items.message(len(output), [], "completed"))
                output[-1]["content"].append(_written(part, logprobs))
                logprobs = []
            case form.Thinking():
                output.append(items.reasoning(len(output), part.text, encrypted(part)))
            case form.ToolCall():
                output.append(items.call(len(output), part.id, part.name, part.arguments, "completed"))
    if output and "status" in output[-1]:
        output[-1]["status"] = status
    return output


def _written(part: form.Text | form.Refusal, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if isinstance(part, form.Refusal):
        return refusal_part(part.text)
    return text_part(part.text, [write_citation(citation) for citation in part.citations], logprobs)


def ending_of(finish: Finish | None, refused: bool) -> dict[str, Any]:
    """`status`, and the details of what did not end well. A refusal without words is a filter's."""
    if finish is Finish.REFUSAL and not refused:
        finish = Finish.CONTENT_FILTER
    reason: str | None = None
    match finish:
        case Finish.LENGTH:
            reason = "max_output_tokens"
        case Finish.CONTENT_FILTER:
            reason = "content_filter"
        case Finish.PAUSE:
            pass
        case Finish.ERROR:
            return {
                "status": "failed",
                "error": {"code": "server_error", "message": "The model's answer could not be read."},
                "incomplete_details": None,
            }
        case _:
            return {"status": "completed", "error": None, "incomplete_details": None}
    return {"status": "incomplete", "error": None, "incomplete_details": {"reason": reason}}


IN_PROGRESS: Mapping[str, Any] = {"status": "in_progress", "error": None, "incomplete_details": None}


def snapshot(
    seed: Seed,
    response_id: str,
    model: str | None,
    output: list[dict[str, Any]],
    ending: Mapping[str, Any],
    *,
    usage: Usage | None = None,
    service_tier: str | None = None,
) -> dict[str, Any]:
    """The response as it stands, with what the caller asked for."""
    return {
        "id": response_id,
        "object": "response",
        "created_at": seed.created_s,
        **ending,
        "model": model or seed.request.model,
        "output": output,
        **echo(seed.request),
        "service_tier": service_tier,
        "usage": write_usage(usage),
    }


def _details(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    details = fields.get(name)
    return details if isinstance(details, dict) else {}


def text_of(fields: Mapping[str, Any], name: str) -> str | None:
    """A field's text, None where there is none."""
    value = fields.get(name)
    return value if isinstance(value, str) and value else None
