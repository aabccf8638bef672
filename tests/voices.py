"""What providers and callers of each dialect say, in few words: answers as scripts, and answers as official clients
read them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import anthropic
import httpx2
import openai

from extproc.local.provider import Script
from tests.rig import CHAT_PATH, DONE, Told, delta, usage
from tests.rig import whole as openai_whole

JSON = (("content-type", "application/json"),)
MODELS = {
    "openai": "gpt-4o",
    "azure": "gpt-4o",
    "anthropic": "claude-sonnet-4-5",
    "gemini": "gemini-2.5-flash",
}


# Providers ------------------------------------------------------------------------------------------------------------


def _named(payload: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (payload["type"].encode(), json.dumps(payload).encode())


def _openai_events(words: Sequence[str], prompt: int, completion: int) -> list[bytes]:
    return [*map(delta, words), delta("", finish="stop"), usage(prompt, completion), DONE]


def _anthropic_message(content: list[Any], stop: str | None, prompt: int, completion: int) -> dict[str, Any]:
    return {
        **{"id": "msg_1", "type": "message", "role": "assistant", "model": MODELS["anthropic"], "content": content},
        **{"stop_reason": stop, "stop_sequence": None},
        "usage": {"input_tokens": prompt, "output_tokens": completion},
    }


def _anthropic_events(words: Sequence[str], prompt: int, completion: int) -> list[bytes]:
    text = {"type": "text", "text": ""}
    return [
        _named({"type": "message_start", "message": _anthropic_message([], None, prompt, 1)}),
        _named({"type": "content_block_start", "index": 0, "content_block": text}),
        *(
            _named({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}})
            for word in words
        ),
        _named({"type": "content_block_stop", "index": 0}),
        _named(
            {
                "type": "message_delta",
                "delta": {"stop_reason": "end_turn", "stop_sequence": None},
                "usage": {"output_tokens": completion},
            }
        ),
        _named({"type": "message_stop"}),
    ]


def _gemini_answer(text: str, prompt: int, completion: int, finish: str | None = "STOP") -> dict[str, Any]:
    figures = {"promptTokenCount": prompt, "candidatesTokenCount": completion, "totalTokenCount": prompt + completion}
    candidate: dict[str, Any] = {"index": 0, "content": {"role": "model", "parts": [{"text": text}]}}
    if finish:
        candidate["finishReason"] = finish
    return {"candidates": [candidate], "usageMetadata": figures, "modelVersion": MODELS["gemini"], "responseId": "r1"}


def _gemini_events(words: Sequence[str], prompt: int, completion: int) -> list[bytes]:
    last = len(words) - 1
    return [
        b"data: %s\r\n\r\n"
        % json.dumps(_gemini_answer(word, prompt, completion, "STOP" if number == last else None)).encode()
        for number, word in enumerate(words)
    ]


def streamed(provider: str, words: Sequence[str], prompt: int, completion: int, **how: Any) -> Script:
    """A whole stream, an event for each word."""
    events = {"anthropic": _anthropic_events, "gemini": _gemini_events}.get(provider, _openai_events)
    return Script(chunks=events(words, prompt, completion), **how)


def whole(provider: str, text: str, prompt: int, completion: int, **how: Any) -> Script:
    """A whole answer."""
    if provider == "anthropic":
        content = [{"type": "text", "text": text}]
        said = _anthropic_message(content, "end_turn", prompt, completion)
    elif provider == "gemini":
        said = _gemini_answer(text, prompt, completion)
    else:
        said = json.loads(openai_whole(text, prompt=prompt, completion=completion).chunks[0])
    return Script(headers=JSON, chunks=[json.dumps(said).encode()], whole=True, **how)


def _error(provider: str, status: int, message: str) -> dict[str, Any]:
    if provider == "anthropic":
        kind = {429: "rate_limit_error", 529: "overloaded_error"}.get(status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    if provider == "gemini":
        name = {429: "RESOURCE_EXHAUSTED", 503: "UNAVAILABLE"}.get(status, "INTERNAL")
        return {"error": {"code": status, "message": message, "status": name}}
    return {"error": {"message": message, "type": "server_error", "param": None, "code": None}}


def failed(provider: str, status: int, message: str = "Not now.", **headers: str) -> Script:
    """An error in the provider's own form."""
    body = json.dumps(_error(provider, status, message)).encode()
    pairs = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return Script(status=status, headers=(*JSON, *pairs), chunks=[body], whole=True)


def error_event(provider: str, message: str = "Overloaded.") -> bytes:
    """An error in the midst of a stream."""
    said = json.dumps(_error(provider, 529, message)).encode()
    return b"event: error\ndata: %s\n\n" % said if provider == "anthropic" else b"data: %s\n\n" % said


# Callers --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heard:
    """What an official client makes of an answer."""

    text: str
    prompt: int
    completion: int
    finish: str | None


@dataclass(frozen=True)
class Caller:
    """One dialect's: where it calls, what it sends, how its official client reads, and what that raises."""

    path: str
    fields: Callable[[str, bool], dict[str, Any]]  # of a prompt, and whether to stream
    hear: Callable[[Told, bool], Heard]
    error: type[Exception]


def _replayed(told: Told) -> httpx2.Client:
    """A transport that answers with what the gateway said, so that the client reads the very bytes."""
    headers = [(name, value) for name, value in told.headers.multi_items() if name != "transfer-encoding"]
    return httpx2.Client(
        transport=httpx2.MockTransport(lambda _: httpx2.Response(told.status, headers=headers, content=told.body))
    )


def _openai_fields(prompt: str, stream: bool) -> dict[str, Any]:
    return {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": 60,
        "stream": stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    }


def _openai_hears(told: Told, stream: bool) -> Heard:
    with openai.OpenAI(api_key="x", base_url="http://x", http_client=_replayed(told), max_retries=0) as client:
        if not stream:
            answer = client.chat.completions.create(model="x", messages=[])
            (choice,) = answer.choices
            assert answer.usage is not None
            figures = answer.usage.prompt_tokens, answer.usage.completion_tokens
            return Heard(choice.message.content or "", *figures, choice.finish_reason)
        chunks = list(client.chat.completions.create(model="x", messages=[], stream=True))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    (reported,) = [chunk.usage for chunk in chunks if chunk.usage]
    (finish,) = [choice.finish_reason for choice in choices if choice.finish_reason]
    text = "".join(choice.delta.content or "" for choice in choices)
    return Heard(text, reported.prompt_tokens, reported.completion_tokens, finish)


def _anthropic_fields(prompt: str, stream: bool) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}], "max_tokens": 60, "stream": stream}


def _anthropic_hears(told: Told, stream: bool) -> Heard:
    options: Any = {"model": "x", "messages": [], "max_tokens": 1}
    with anthropic.Anthropic(api_key="x", base_url="http://x", http_client=_replayed(told), max_retries=0) as client:
        if stream:
            with client.messages.stream(**options) as events:
                message = events.get_final_message()
        else:
            message = client.messages.create(**options)
    text = "".join(block.text for block in message.content if block.type == "text")
    return Heard(text, message.usage.input_tokens, message.usage.output_tokens, message.stop_reason)


CALLERS: Mapping[str, Caller] = {
    "openai": Caller(CHAT_PATH, _openai_fields, _openai_hears, openai.APIError),
    "anthropic": Caller("/v1/messages", _anthropic_fields, _anthropic_hears, anthropic.APIError),
}
FINISHED = {"openai": "stop", "anthropic": "end_turn"}
