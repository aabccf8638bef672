"""One turn of a model, its thoughts and calls of tools too, as each provider writes it: whole or streamed, as asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from extproc.local.provider import Received, Script
from extproc.providers import PROVIDERS
from tests.rig import DONE, Rig, event, key_of

JSON = (("content-type", "application/json"),)

_Fields = dict[str, Any]


@dataclass(frozen=True)
class Call:
    """A call of a tool."""

    id: str
    name: str
    arguments: Mapping[str, Any]

    @property
    def json(self) -> str:
        return json.dumps(self.arguments)


@dataclass(frozen=True)
class Turn:
    """`thoughts` are shown, `thought_tokens` billed, within `completion`. `signature` is what proves the thoughts."""

    text: str = ""
    calls: Sequence[Call] = ()
    thoughts: str = ""
    signature: str = ""
    prompt: int = 21
    completion: int = 17
    thought_tokens: int = 0
    model: str = "a-model"

    @property
    def words(self) -> list[str]:
        """The text in pieces, each with the space before it."""
        head, *rest = self.text.split(" ")
        return [head, *(f" {word}" for word in rest)] if self.text else []


def replying(turn: Turn, **how: Any) -> Callable[[Received], Script]:
    """What a provider of any dialect answers: in the one that it is asked in."""
    return lambda request: script(request, turn, **how)


def script(request: Received, turn: Turn, **how: Any) -> Script:
    """The answer to `request`."""
    whole, streamed = _DIALECTS[dialect_of(request)]
    if not streams(request):
        return Script(headers=JSON, chunks=[json.dumps(whole(turn)).encode()], whole=True, **how)
    return Script(chunks=list(streamed(turn)), **how)


def dialect_of(request: Received) -> str:
    """By its path."""
    path = request.target.partition("?")[0]
    ends = {"/chat/completions": "chat", "/responses": "responses", "/messages": "anthropic", "RawPredict": "anthropic"}
    ends |= {":rawPredict": "anthropic", "enerateContent": "gemini"}
    return next(dialect for end, dialect in ends.items() if path.endswith(end))


def streams(request: Received) -> bool:
    """By its path or its body."""
    return ":stream" in request.target or body_of(request).get("stream") is True


def body_of(request: Received) -> _Fields:
    """What a provider was sent."""
    body: _Fields = json.loads(request.body)
    return body


def last_sent(rig: Rig, provider: str, model: str) -> _Fields:
    """What the provider was sent last; it was sent with its own key, for its own model."""
    request = rig.providers[provider].received[-1]
    ((header, key),) = PROVIDERS[provider].auth_headers(key_of(provider))
    assert request.header(header) == key
    assert model in (body_of(request).get("model") or request.target)
    assert not any(name.startswith("x-goog-") and name != header for name, _ in request.headers)
    return body_of(request)


def cap_of(request: Received) -> int | None:
    """The bound on output tokens that a provider was told."""
    body = body_of(request)
    names = ("max_completion_tokens", "max_output_tokens", "max_tokens")
    found = [body.get(name) for name in names] + [body.get("generationConfig", {}).get("maxOutputTokens")]
    return next((cap for cap in found if cap is not None), None)


# OpenAI's chat --------------------------------------------------------------------------------------------------------


def _chat_usage(turn: Turn) -> _Fields:
    return {
        "prompt_tokens": turn.prompt,
        "completion_tokens": turn.completion,
        "total_tokens": turn.prompt + turn.completion,
        "completion_tokens_details": {"reasoning_tokens": turn.thought_tokens},
    }


def _chat_call(call: Call, arguments: str) -> _Fields:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def _chat_thoughts(turn: Turn) -> _Fields:
    return {"reasoning_content": turn.thoughts} if turn.thoughts else {}


def _chat(turn: Turn) -> _Fields:
    message: _Fields = {"role": "assistant", "content": turn.text or None, "refusal": None, **_chat_thoughts(turn)}
    if turn.calls:
        message["tool_calls"] = [_chat_call(call, call.json) for call in turn.calls]
    choice = {"index": 0, "message": message, "finish_reason": _chat_finish(turn), "logprobs": None}
    return {
        **{"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": turn.model, "choices": [choice]},
        "usage": _chat_usage(turn),
    }


def _chat_finish(turn: Turn) -> str:
    return "tool_calls" if turn.calls else "stop"


def _chat_events(turn: Turn) -> Iterator[bytes]:
    same = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": turn.model}

    def chunk(delta: _Fields, finish: str | None = None) -> bytes:
        return event({**same, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})

    yield chunk({"role": "assistant", "content": "", **_chat_thoughts(turn)})
    yield from (chunk({"content": word}) for word in turn.words)
    for index, call in enumerate(turn.calls):
        yield chunk({"tool_calls": [{"index": index, **_chat_call(call, "")}]})
        for part in _halves(call.json):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": part}}]})
    yield chunk({}, _chat_finish(turn))
    yield event({**same, "choices": [], "usage": _chat_usage(turn)})
    yield DONE


def _halves(text: str) -> tuple[str, str]:
    return text[: len(text) // 2], text[len(text) // 2 :]


# OpenAI's Responses ---------------------------------------------------------------------------------------------------


def _items(turn: Turn) -> Iterator[_Fields]:
    if turn.thoughts or turn.signature:
        summary = [{"type": "summary_text", "text": turn.thoughts}] if turn.thoughts else []
        signed = {"encrypted_content": turn.signature or None}
        yield {"id": "rs_1", "type": "reasoning", "summary": summary, **signed}
    if turn.text:
        part = {"type": "output_text", "text": turn.text, "annotations": [], "logprobs": []}
        yield {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    for number, call in enumerate(turn.calls):
        said = {"call_id": call.id, "name": call.name, "arguments": call.json, "status": "completed"}
        yield {"id": f"fc_{number}", "type": "function_call", **said}


def _response(turn: Turn) -> _Fields:
    return {
        **{"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": turn.model},
        **{"error": None, "incomplete_details": None, "instructions": None, "metadata": {}, "temperature": 1.0},
        **{"parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "top_p": 1.0},
        "output": list(_items(turn)),
        "usage": {
            "input_tokens": turn.prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": turn.completion,
            "output_tokens_details": {"reasoning_tokens": turn.thought_tokens},
            "total_tokens": turn.prompt + turn.completion,
        },
    }


def _response_events(turn: Turn) -> Iterator[bytes]:
    response = _response(turn)
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    said = [{"type": "response.created", "response": begun}]
    for index, item in enumerate(response["output"]):
        said += _item_events(turn, index, item)
    said.append({"type": "response.completed", "response": response})
    yield from (_named({**one, "sequence_number": number}) for number, one in enumerate(said))


def _item_events(turn: Turn, index: int, item: _Fields) -> Iterator[_Fields]:
    at = {"output_index": index, "item_id": item["id"]}
    empty: _Fields = {"message": {"content": []}, "function_call": {"arguments": ""}, "reasoning": {"summary": []}}
    yield {"type": "response.output_item.added", "output_index": index, "item": {**item, **empty[item["type"]]}}
    if item["type"] == "message":
        at |= {"content_index": 0}
        (part,) = item["content"]
        yield {"type": "response.content_part.added", **at, "part": {**part, "text": ""}}
        for word in turn.words:
            yield {"type": "response.output_text.delta", **at, "delta": word, "logprobs": []}
        yield {"type": "response.output_text.done", **at, "text": turn.text, "logprobs": []}
        yield {"type": "response.content_part.done", **at, "part": part}
    elif item["type"] == "function_call":
        for piece in _halves(item["arguments"]):
            yield {"type": "response.function_call_arguments.delta", **at, "delta": piece}
        done = {"name": item["name"], "arguments": item["arguments"]}
        yield {"type": "response.function_call_arguments.done", **at, **done}
    else:
        for number, part in enumerate(item["summary"]):
            at |= {"summary_index": number}
            yield {"type": "response.reasoning_summary_part.added", **at, "part": {**part, "text": ""}}
            yield {"type": "response.reasoning_summary_text.delta", **at, "delta": part["text"]}
            yield {"type": "response.reasoning_summary_text.done", **at, "text": part["text"]}
            yield {"type": "response.reasoning_summary_part.done", **at, "part": part}
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _named(payload: _Fields) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (payload["type"].encode(), json.dumps(payload).encode())


# Anthropic's messages -------------------------------------------------------------------------------------------------


def _blocks(turn: Turn) -> Iterator[_Fields]:
    if turn.signature:
        yield {"type": "thinking", "thinking": turn.thoughts, "signature": turn.signature}
    if turn.text:
        yield {"type": "text", "text": turn.text}
    for call in turn.calls:
        yield {"type": "tool_use", "id": call.id, "name": call.name, "input": dict(call.arguments)}


def _message(turn: Turn) -> _Fields:
    return {
        **{"id": "msg_1", "type": "message", "role": "assistant", "model": turn.model, "content": list(_blocks(turn))},
        **{"stop_reason": "tool_use" if turn.calls else "end_turn", "stop_sequence": None},
        "usage": {"input_tokens": turn.prompt, "output_tokens": turn.completion},
    }


def _message_events(turn: Turn) -> Iterator[bytes]:
    message = _message(turn)
    begun = {**message, "content": [], "stop_reason": None, "usage": {"input_tokens": turn.prompt, "output_tokens": 1}}
    yield _named({"type": "message_start", "message": begun})
    for index, block in enumerate(message["content"]):
        empty, deltas = _block_deltas(turn, block)
        yield _named({"type": "content_block_start", "index": index, "content_block": empty})
        yield from (_named({"type": "content_block_delta", "index": index, "delta": delta}) for delta in deltas)
        yield _named({"type": "content_block_stop", "index": index})
    ended = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    yield _named({"type": "message_delta", "delta": ended, "usage": {"output_tokens": turn.completion}})
    yield _named({"type": "message_stop"})


def _block_deltas(turn: Turn, block: _Fields) -> tuple[_Fields, list[_Fields]]:
    match block["type"]:
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": word} for word in turn.words]
        case "tool_use":
            parts = _halves(json.dumps(block["input"]))
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": part} for part in parts]
        case _:
            thought = {"type": "thinking_delta", "thinking": block["thinking"]}
            signed = {"type": "signature_delta", "signature": block["signature"]}
            return {**block, "thinking": "", "signature": ""}, [thought, signed]


# Gemini's generateContent ---------------------------------------------------------------------------------------------


def _parts(turn: Turn, texts: Sequence[str]) -> Iterator[_Fields]:
    """The signature belongs to the first part that follows the thoughts."""
    if turn.thoughts:
        yield {"text": turn.thoughts, "thought": True}
    said: list[_Fields] = [{"text": text} for text in texts]
    said += [{"functionCall": {"id": call.id, "name": call.name, "args": dict(call.arguments)}} for call in turn.calls]
    if turn.signature and said:
        said[0] = {**said[0], "thoughtSignature": turn.signature}
    yield from said


def _content(turn: Turn, parts: list[_Fields], finish: str | None) -> _Fields:
    candidate = {"index": 0, "content": {"role": "model", "parts": parts}}
    figures = {"promptTokenCount": turn.prompt, "candidatesTokenCount": turn.completion - turn.thought_tokens}
    if turn.thought_tokens:
        figures["thoughtsTokenCount"] = turn.thought_tokens
    return {
        "candidates": [{**candidate, "finishReason": finish} if finish else candidate],
        "usageMetadata": {**figures, "totalTokenCount": turn.prompt + turn.completion},
        **{"modelVersion": turn.model, "responseId": "r1"},
    }


def _generated(turn: Turn) -> _Fields:
    return _content(turn, list(_parts(turn, [turn.text] if turn.text else [])), "STOP")


def _generated_events(turn: Turn) -> Iterator[bytes]:
    parts = list(_parts(turn, turn.words))
    for number, part in enumerate(parts[:-1], 1):  # a token each
        yield event(_content(replace(turn, completion=turn.thought_tokens + number), [part], None))
    yield event(_content(turn, parts[-1:], "STOP"))


_DIALECTS: Mapping[str, tuple[Callable[[Turn], _Fields], Callable[[Turn], Iterator[bytes]]]] = {
    "chat": (_chat, _chat_events),
    "responses": (_response, _response_events),
    "anthropic": (_message, _message_events),
    "gemini": (_generated, _generated_events),
}
