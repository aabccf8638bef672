"""What an answer says: in a recording, by the recording's own JSON, and to a caller, by its dialect's official client.

Neither way is the gateway's: two readings that agree are not one mistake made twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import anthropic
import httpx2
import openai
from google import genai
from google.genai import errors as google_errors
from google.genai import types

from tests.recordings import Case

Calls = tuple[tuple[str, Any], ...]  # name, and arguments as a JSON value
Figures = tuple[int, int, int, int]  # prompt, completion, and of these cached and reasoning

CHAT, RESPONSES, ANTHROPIC, GEMINI = "openai-chat", "openai-responses", "anthropic-messages", "gemini-generate"
DIALECT_OF = {CHAT: CHAT, RESPONSES: RESPONSES, ANTHROPIC: ANTHROPIC, "gemini": GEMINI}  # by a recording's protocol


@dataclass(frozen=True)
class Choice:
    """One choice. A refusal is text, too: only how it ended, `end`, tells it from an answer.

    `end`: stop, length, tool_calls, blocked (by the model or a filter), or other.
    """

    text: str
    calls: Calls
    end: str


@dataclass(frozen=True)
class Said:
    """A whole answer."""

    choices: tuple[Choice, ...]
    usage: Figures | None


@dataclass
class _Heard:
    """One choice, while it is put together."""

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)
    end: str | None = None
    refused: bool = False

    def done(self, unsaid: str = "other") -> Choice:
        """OpenAI and Google end a call that was forced, and a refusal, like any text."""
        calls = tuple((name, _value(arguments)) for name, arguments in self.calls)
        end = self.end or unsaid
        if end == "stop" and (calls or self.refused):
            end = "tool_calls" if calls else "blocked"
        return Choice(self.text, calls, end)


def _value(arguments: str) -> Any:
    """What no parser takes is its text."""
    try:
        return json.loads(arguments or "{}")
    except ValueError:
        return arguments


# A recording, by hand -------------------------------------------------------------------------------------------------


def recorded(case: Case) -> Said:
    """What a recorded answer with status 200 says."""
    told = events(case)
    heard = (
        _chat(told, "delta" if case.stream else "message") if case.protocol == CHAT else _READERS[case.protocol](told)
    )
    # Some close a stream, or give an answer, without a reason: it is an end like any other.
    return Said(tuple(choice.done(unsaid="stop") for choice in heard), case.figures)


def events(case: Case) -> list[Any]:
    """All JSON in the body: of a stream, in the order of its events."""
    if not case.stream or case.body.lstrip().startswith(b"["):
        said = json.loads(case.body)
        return said if isinstance(said, list) else [said]
    lines = (line.removeprefix(b"data:").strip() for line in case.body.splitlines() if line.startswith(b"data:"))
    return [json.loads(line) for line in lines if line.startswith(b"{")]


def error_message(case: Case) -> str:
    """The provider's own words, empty where it has none that are any dialect's."""
    try:
        said = json.loads(case.body)
    except ValueError:
        return ""
    said = said[0] if isinstance(said, list) else said
    error = said.get("error") if isinstance(said, dict) else None
    return str(error.get("message") or "") if isinstance(error, dict) else ""


_CHAT_ENDS: Mapping[object, str] = {
    **{"stop": "stop", "eos": "stop", "length": "length", "model_length": "length"},
    **{"tool_calls": "tool_calls", "function_call": "tool_calls", "content_filter": "blocked"},
}


def _chat(told: list[Any], where: str) -> list[_Heard]:
    """`where` a choice says it. Perplexity's streams have both, and in `message` all that was said before."""
    choices: dict[int, _Heard] = {}
    at: dict[tuple[int, Any], tuple[int, str]] = {}  # (choice, index) to the call there and its id
    for said in (choice for event in told for choice in event.get("choices") or ()):
        number = said.get("index") or 0
        heard = choices.setdefault(number, _Heard())
        message = said.get(where) or {}
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        heard.text += "".join(part.get("text") or "" for part in parts) + (message.get("refusal") or "")
        heard.refused = heard.refused or bool(message.get("refusal"))
        calls = list(message.get("tool_calls") or ())
        calls += [{"function": message["function_call"]}] if message.get("function_call") else []
        for position, call in enumerate(calls):
            _add_call(heard, at, (number, position if where == "message" else call.get("index")), call)
        if said.get("finish_reason"):
            heard.refused = heard.refused or said.get("native_finish_reason") == "refusal"
            heard.end = _CHAT_ENDS.get(said["finish_reason"], "other")
    return [heard for _, heard in sorted(choices.items())]


def _add_call(heard: _Heard, at: dict[tuple[int, Any], tuple[int, str]], key: tuple[int, Any], call: Any) -> None:
    """A call begins with its name. Some providers give every call the same index, but never the same id."""
    function, call_id = call.get("function") or {}, call.get("id") or ""
    arguments = function.get("arguments") or ""
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
    known = at.get(key)
    if function.get("name") and (known is None or (call_id and call_id != known[1])):
        at[key] = (len(heard.calls), call_id)
        heard.calls.append((function["name"], arguments))
    elif known is not None or heard.calls:
        number = known[0] if known is not None else -1
        name, earlier = heard.calls[number]
        heard.calls[number] = (name, earlier + arguments)


def _responses(told: list[Any]) -> list[_Heard]:
    """The output as it ends, item by item: some leave it out of the last event."""
    heard = _Heard()
    ended = next((event for event in reversed(told) if "response" in event), told[-1])
    response = ended.get("response") or ended
    items = response.get("output") or [event["item"] for event in told if "item" in event and "done" in event["type"]]
    for item in items:
        for part in item.get("content") or () if item.get("type") == "message" else ():
            heard.text += part.get("text") or part.get("refusal") or ""
            heard.refused = heard.refused or bool(part.get("refusal"))
        if item.get("type") == "function_call":
            heard.calls.append((item["name"], item["arguments"]))
    reason = (response.get("incomplete_details") or {}).get("reason")
    ends: Mapping[object, str] = {"max_output_tokens": "length", "content_filter": "blocked"}
    heard.end = "stop" if response.get("status") == "completed" else ends.get(reason, "other")
    return [heard]


_ANTHROPIC_ENDS: Mapping[object, str] = {
    **{"end_turn": "stop", "stop_sequence": "stop", "tool_use": "tool_calls", "refusal": "blocked"},
    **{"max_tokens": "length", "model_context_window_exceeded": "length"},
}


def _anthropic(told: list[Any]) -> list[_Heard]:
    heard = _Heard()
    blocks = {event["index"]: event["content_block"] for event in told if event["type"] == "content_block_start"}
    deltas = [(event["index"], event["delta"]) for event in told if event["type"] == "content_block_delta"]
    whole = [event for event in told if event["type"] == "message"]
    for number, block in blocks.items() if not whole else enumerate(whole[0]["content"]):
        own = [delta for index, delta in deltas if index == number]
        if block["type"] == "text":
            heard.text += block["text"] + "".join(delta.get("text", "") for delta in own)
        elif block["type"] == "tool_use":
            written = "".join(delta.get("partial_json", "") for delta in own)
            heard.calls.append((block["name"], written or json.dumps(block["input"])))
    for stopped in (*whole, *(event["delta"] for event in told if event["type"] == "message_delta")):
        reason = stopped.get("stop_reason")
        heard.end = _ANTHROPIC_ENDS.get(reason, "other") if reason else heard.end
        heard.text += (stopped.get("stop_details") or {}).get("explanation") or ""
    return [heard]


_GEMINI_ENDS: Mapping[object, str] = {
    **{"STOP": "stop", 1: "stop", "FAKE_ENUM": "stop", "MAX_TOKENS": "length"},
    **dict.fromkeys(("OTHER", "MALFORMED_FUNCTION_CALL", "UNEXPECTED_TOOL_CALL"), "other"),
}


def _gemini(told: list[Any]) -> list[_Heard]:
    choices: dict[int, _Heard] = {}
    for event in told:
        if (event.get("promptFeedback") or {}).get("blockReason"):
            choices.setdefault(0, _Heard()).end = "blocked"
        for said in event.get("candidates") or ():
            heard = choices.setdefault(said.get("index") or 0, _Heard())
            for part in (said.get("content") or {}).get("parts") or ():
                heard.text += part.get("text") or "" if not part.get("thought") else ""
                if "functionCall" in part:
                    call = part["functionCall"]
                    heard.calls.append((call["name"], json.dumps(call.get("args") or {})))
            if said.get("finishReason"):
                heard.end = _GEMINI_ENDS.get(said["finishReason"], "blocked")
    return [heard for _, heard in sorted(choices.items())]


_READERS: Mapping[str, Callable[[list[Any]], list[_Heard]]] = {
    RESPONSES: _responses,
    ANTHROPIC: _anthropic,
    "gemini": _gemini,
}


# A caller's, by its official client -----------------------------------------------------------------------------------


class _Replayed(httpx2.BaseTransport):
    """Answers with what it was given, so that one client reads many answers."""

    def __init__(self) -> None:
        self.answer = httpx2.Response(200)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        return self.answer


_TRANSPORT = _Replayed()
_HTTP = httpx2.Client(transport=_TRANSPORT)
_OPENAI = openai.OpenAI(api_key="x", base_url="http://gateway", http_client=_HTTP, max_retries=0)
_CLAUDE = anthropic.Anthropic(api_key="x", base_url="http://gateway", http_client=_HTTP, max_retries=0)
_GOOGLE = genai.Client(api_key="x", http_options=types.HttpOptions(httpx_client=_HTTP, base_url="http://gateway"))


def received(dialect: str, body: bytes, *, stream: bool, status: int = 200) -> Said:
    """What the dialect's official client makes of an answer. Raises what the client raises."""
    kind = "text/event-stream" if stream and status == 200 else "application/json"
    _TRANSPORT.answer = httpx2.Response(status, headers={"content-type": kind}, content=body)
    said = _RECEIVED[dialect, stream]()
    return replace(said, choices=tuple(said.choices))


_HI: Any = [{"role": "user", "content": "hi"}]


def _chat_whole() -> Said:
    return _of_completion(_OPENAI.chat.completions.create(model="m", messages=_HI))


def _chat_stream() -> Said:
    with _OPENAI.chat.completions.stream(model="m", messages=_HI) as stream:
        for _ in stream:
            pass
        return _of_completion(stream.current_completion_snapshot)


def _of_completion(answer: Any) -> Said:
    choices = []
    for choice in answer.choices:
        message = choice.message
        heard = _Heard((message.content or "") + (message.refusal or ""), refused=bool(message.refusal))
        heard.calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        heard.end = _CHAT_ENDS.get(choice.finish_reason, "other")
        choices.append(heard.done())
    usage = answer.usage
    if usage is None:
        return Said(tuple(choices), None)
    cached, reasoning = usage.prompt_tokens_details.cached_tokens, usage.completion_tokens_details.reasoning_tokens
    return Said(tuple(choices), (usage.prompt_tokens, usage.completion_tokens, cached, reasoning))


def _responses_whole() -> Said:
    return _of_response(_OPENAI.responses.create(model="m", input="hi"))


def _responses_stream() -> Said:
    last: Any = None
    with _OPENAI.responses.stream(model="m", input="hi") as stream:
        for number, event in enumerate(stream):
            assert event.sequence_number == number
            last = event
    assert last.type in ("response.completed", "response.incomplete", "response.failed")
    return _of_response(last.response)


def _of_response(response: Any) -> Said:
    (heard,) = _responses([response.to_dict()])
    usage = response.usage
    if usage is None:
        return Said((heard.done(),), None)
    cached, reasoning = usage.input_tokens_details.cached_tokens, usage.output_tokens_details.reasoning_tokens
    return Said((heard.done(),), (usage.input_tokens, usage.output_tokens, cached, reasoning))


_MESSAGE: Any = {"model": "m", "max_tokens": 1, "messages": _HI}


def _anthropic_whole() -> Said:
    return _of_message(_CLAUDE.messages.create(**_MESSAGE))


def _anthropic_stream() -> Said:
    told = []
    with _CLAUDE.messages.stream(**_MESSAGE) as stream:
        told = list(stream)
        assert (told[0].type, told[-1].type) == ("message_start", "message_stop")
        last = next(event.usage for event in reversed(told) if event.type == "message_delta")
        return _of_message(stream.get_final_message(), uncounted="uncounted" in last.to_dict())


def _of_message(message: Any, *, uncounted: bool | None = None) -> Said:
    """The client adds up what a stream says of its usage, so that what was not known at first stays there."""
    (heard,) = _anthropic([message.to_dict()])
    usage = message.usage.to_dict()
    if usage.get("uncounted") if uncounted is None else uncounted:
        return Said((heard.done(),), None)
    cached, written = usage.get("cache_read_input_tokens") or 0, usage.get("cache_creation_input_tokens") or 0
    reasoning = (usage.get("output_tokens_details") or {}).get("thinking_tokens", 0)
    figures = (usage["input_tokens"] + cached + written, usage["output_tokens"], cached, reasoning)
    return Said((heard.done(),), figures)


def _gemini_whole() -> Said:
    return _of_responses(iter([_GOOGLE.models.generate_content(model="m", contents="hi")]))


def _gemini_stream() -> Said:
    return _of_responses(_GOOGLE.models.generate_content_stream(model="m", contents="hi"))


def _of_responses(answers: Iterator[types.GenerateContentResponse]) -> Said:
    choices: dict[int, _Heard] = {}
    usage: Figures | None = None
    for answer in answers:
        for candidate in answer.candidates or ():
            heard = choices.setdefault(candidate.index or 0, _Heard())
            for part in (candidate.content and candidate.content.parts) or ():
                heard.text += (part.text or "") if not part.thought else ""
                if part.function_call is not None:
                    call = part.function_call
                    heard.calls.append((call.name or "", json.dumps(call.args or {})))
            if candidate.finish_reason is not None:
                heard.end = _GEMINI_ENDS.get(candidate.finish_reason.value, "blocked")
        if (figures := answer.usage_metadata) is not None:
            thoughts = figures.thoughts_token_count or 0
            completion = (figures.candidates_token_count or 0) + thoughts
            usage = (figures.prompt_token_count or 0, completion, figures.cached_content_token_count or 0, thoughts)
    return Said(tuple(heard.done() for _, heard in sorted(choices.items())), usage)


_RECEIVED: Mapping[tuple[str, bool], Callable[[], Said]] = {
    (CHAT, False): _chat_whole,
    (CHAT, True): _chat_stream,
    (RESPONSES, False): _responses_whole,
    (RESPONSES, True): _responses_stream,
    (ANTHROPIC, False): _anthropic_whole,
    (ANTHROPIC, True): _anthropic_stream,
    (GEMINI, False): _gemini_whole,
    (GEMINI, True): _gemini_stream,
}


# What the clients raise -----------------------------------------------------------------------------------------------

_CLASSES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    409: "ConflictError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
}


def raised_for(dialect: str, status: int) -> type[Exception]:
    """The class of the official client for an error's status."""
    if dialect == GEMINI:
        return google_errors.ServerError if status >= 500 else google_errors.ClientError
    client: Any = anthropic if dialect == ANTHROPIC else openai
    kind: type[Exception] = getattr(client, _CLASSES.get(status, "InternalServerError"))
    return kind


def raised_midway(dialect: str) -> type[Exception]:
    """The class of the official client for an error in the midst of a stream."""
    if dialect == GEMINI:
        return google_errors.APIError
    return anthropic.APIStatusError if dialect == ANTHROPIC else openai.APIError
