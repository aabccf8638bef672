"""What is asked in one dialect of a provider of another, and what must come of each recorded answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import pytest

from extproc.dialects.dialect import Address
from tests.answers import (
    ANTHROPIC,
    CHAT,
    GEMINI,
    RESPONSES,
    Said,
    error_message,
    events,
    raised_for,
    raised_midway,
    received,
    recorded,
)
from tests.recordings import Case

# The gate says of its own key's refusal that the provider failed, and the provider's words stay here.
REPLACED = {401: 502, 403: 502}

# Why a case is not read as it was recorded.
SEVERAL = "several choices, which no caller of that dialect can ask for"
CUT_SHORT = "a call of a tool that the cap has cut off, so that its arguments are no JSON"
UNASKED = (SEVERAL,)
CUT_OFF: dict[tuple[str, str], Any] = {
    ("llamacpp/chat-stream-qwen3-8b-q4-k-m.gguf-tool-call-finish-length-01", ANTHROPIC): (("record", {}),),
    ("llamacpp/chat-stream-qwen3-8b-q4-k-m.gguf-tool-call-finish-length-01", GEMINI): (),
    ("openai/responses-stream-gpt-5-mini-2025-08-07-tool-call-thinking-01", ANTHROPIC): (
        ("__mirascope_formatted_output_tool__", {}),
    ),
    ("openai/responses-stream-gpt-5-mini-2025-08-07-tool-call-thinking-01", GEMINI): (),
}


def exception(case: Case, into: str) -> str | None:
    if into in (RESPONSES, ANTHROPIC) and len(recorded(case).choices) > 1:
        return SEVERAL
    return CUT_SHORT if (case.name, into) in CUT_OFF else None


def whole(case: Case) -> bool:
    """Whether a stream has come to its end, and without an error."""
    return case.complete and "error" not in case.meta


def asked(dialect: str, case: Case, model: str, *, array: bool = False) -> tuple[dict[str, Any], Address]:
    """The least that a caller may have said: for as many choices as came, and with a tool where one is called."""
    said = recorded(case).choices if case.status == 200 else ()
    choices, calls = len(said) or 1, any(choice.calls for choice in said)
    hi = [{"role": "user", "content": "hi"}]
    body: dict[str, Any] = {"model": model, "stream": case.stream}
    match dialect:
        case "openai-chat":
            body |= {"messages": hi} | ({"n": choices} if choices > 1 else {})
            body |= {"stream_options": {"include_usage": True}} if case.stream else {}
            tool: dict[str, Any] = {"type": "function", "function": _FUNCTION}
        case "openai-responses":
            body |= {"input": "hi"}
            tool = {"type": "function", **_FUNCTION}
        case "anthropic-messages":
            body |= {"messages": hi, "max_tokens": 100}
            tool = {"name": "f", "input_schema": _FUNCTION["parameters"]}
        case _:
            body = {"contents": [{"parts": [{"text": "hi"}]}]}
            body |= {"generationConfig": {"candidateCount": choices}} if choices > 1 else {}
            tool = {"functionDeclarations": [_FUNCTION]}
    address = Address(model, case.stream, array) if dialect == GEMINI else Address()
    return body | ({"tools": [tool]} if calls else {}), address


_FUNCTION: dict[str, Any] = {"name": "f", "parameters": {"type": "object", "properties": {}}}


class ArrayAsEvents(Case):
    """A stream that was recorded as one JSON array. No translated call is answered so: Google is asked for events."""

    @cached_property
    def body(self) -> bytes:
        said = json.loads((self.folder / "response.body").read_bytes())
        return b"".join(b"data: %s\r\n\r\n" % json.dumps(event).encode() for event in said)


def as_events(case: Case) -> Case:
    is_array = case.stream and case.body.lstrip().startswith(b"[")
    return ArrayAsEvents(case.folder, {**case.meta, "chunk_sizes": None}) if is_array else case


def expected(case: Case, into: str) -> Said:
    said = recorded(case)
    choices = said.choices
    if into == CHAT:  # it has no word for an answer that needs another turn
        choices = tuple(replace(choice, end="stop" if choice.end == "other" else choice.end) for choice in choices)
    if (case.name, into) in CUT_OFF:
        choices = tuple(replace(choice, calls=CUT_OFF[case.name, into]) for choice in choices)
    return replace(said, choices=choices)


def check_heard(case: Case, into: str, body: bytes) -> None:
    """What a caller of a dialect hears of an answer with status 200 through its official client."""
    if case.stream and not whole(case):
        with pytest.raises(raised_midway(into)) as raised:
            received(into, body, stream=True)
        assert says(raised.value, *said_wrong(case) if "error" in case.meta else ("ended early",))
    else:
        assert received(into, body, stream=case.stream) == expected(case, into)


def check_raised(case: Case, into: str, status: int, body: bytes, *, stream: bool) -> None:
    """… and of an error."""
    with pytest.raises(raised_for(into, status)) as raised:
        received(into, body, stream=stream, status=status)
    assert case.status in REPLACED or says(raised.value, error_message(case))


def said_wrong(case: Case) -> Iterator[str]:
    """The words of a stream's error, which some give in two events."""
    yield case.meta["error"]["message"]
    errors = (event.get("error") or event for event in events(case) if event.get("type") == "error")
    yield from (error["message"] for error in errors)


def says(error: Exception, *words: str) -> bool:
    """Whether a client's exception has one of these, perhaps in the notation of Python."""
    return any(one in str(error) or repr(one)[1:-1] in str(error) for one in words)
