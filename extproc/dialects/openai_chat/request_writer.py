"""Requests for a provider of OpenAI's chat completions, written from the canonical form.

What every provider of this dialect takes is preferred to what only OpenAI does: instructions are a system message, a
text alone is a string.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import orjson

from extproc import form
from extproc.dialects.openai_chat.thoughts import ORIGIN, entry_of
from extproc.dialects.openai_parts import PDF, effort, thinks
from extproc.form import Choose, Output, Role

_Fields = dict[str, Any]

_ROLES = {Role.SYSTEM: "system", Role.DEVELOPER: "system", Role.USER: "user"}


def write_request(request: form.Request, model: str, cap: int | None) -> bytes:
    """The body. `cap` bounds each choice's output tokens."""
    fields = {
        "model": model,
        "messages": list(_messages(request.messages)),
        "max_completion_tokens": cap,
        "n": request.choices,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stop": request.stop or None,
        "seed": request.seed,
        "presence_penalty": request.presence_penalty,
        "frequency_penalty": request.frequency_penalty,
        "logit_bias": request.logit_bias,
        "logprobs": request.logprobs or None,
        "top_logprobs": request.top_logprobs,
        "response_format": _format(request.format),
        "reasoning_effort": effort(request.reasoning, model) if request.reasoning and thinks(model) else None,
        "stream": request.stream or None,
        "stream_options": {"include_usage": True} if request.stream else None,
        **_tool_fields(request),
    }
    return orjson.dumps(_given(fields))


def _given(fields: _Fields) -> _Fields:
    return {name: value for name, value in fields.items() if value is not None}


# Messages -------------------------------------------------------------------------------------------------------------


def _messages(messages: Iterable[form.Message]) -> Iterator[_Fields]:
    """Calls of tools must be answered by the very next messages, so that those of one turn are joined."""
    for assistant, turn in groupby(messages, lambda message: message.role is Role.ASSISTANT):
        if not assistant:
            for message in turn:
                yield from _from_others(message)
        elif (written := _assistant(list(turn))) is not None:
            yield written


def _from_others(message: form.Message) -> Iterator[_Fields]:
    """Results of tools are messages of their own, and come before what else was said."""
    rest: list[form.Part] = []
    for part in message.parts:
        if isinstance(part, form.ToolResult):
            yield {"role": "tool", "tool_call_id": part.call_id, "content": _content(part.parts)}
        else:
            rest.append(part)
    if rest or not message.parts:
        yield _given({"role": _ROLES[message.role], "content": _content(rest), "name": message.name})


def _assistant(turn: Sequence[form.Message]) -> _Fields | None:
    """None where only thoughts are left, which nobody takes alone.

    Thoughts go back to those who gave out their signature, and to no others.
    """
    parts = [part for message in turn for part in message.parts]
    texts = ["".join(part.text for part in message.parts if isinstance(part, form.Text)) for message in turn]
    refusals = [part.text for part in parts if isinstance(part, form.Refusal)]
    calls = [_call(part) for part in parts if isinstance(part, form.ToolCall)]
    written = _given(
        {
            "content": "\n\n".join(filter(None, texts)) or None,
            "refusal": "".join(refusals) or None,
            "tool_calls": calls or None,
        }
    )
    if not written:
        return None
    own = [part for part in parts if isinstance(part, form.Thinking) and part.signature and part.origin == ORIGIN]
    thoughts = [{**entry_of(part), "index": i} for i, part in enumerate(own)]
    return _given({"role": "assistant", **written, "name": turn[0].name, "reasoning_details": thoughts or None})


def _call(call: form.ToolCall) -> _Fields:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _content(parts: Iterable[form.Part]) -> str | list[_Fields]:
    written = [one for part in parts if (one := _part(part)) is not None]
    if len(written) == 1 and written[0]["type"] == "text":
        text: str = written[0]["text"]
        return text
    return written or ""


def _part(part: form.Part) -> _Fields | None:
    match part:
        case form.Text(text=text) | form.Document(text=str(text)):
            return {"type": "text", "text": text}
        case form.Image():
            url = part.url or f"data:{part.media_type or 'image/png'};base64,{part.data}"
            return {"type": "image_url", "image_url": _given({"url": url, "detail": part.detail})}
        case form.Document(data=str(data)):
            file_data = f"data:{part.media_type or PDF};base64,{data}"
            return {"type": "file", "file": {"filename": part.name or "document.pdf", "file_data": file_data}}
        case form.Audio():
            return {"type": "input_audio", "input_audio": {"data": part.data, "format": part.format}}
    return None


# Tools and formats ----------------------------------------------------------------------------------------------------


def _tool_fields(request: form.Request) -> _Fields:
    """Without tools, OpenAI refuses what is said about them."""
    if not request.tools:
        return {}
    return {
        "tools": [_tool(tool) for tool in request.tools],
        "tool_choice": _tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
    }


def _tool(tool: form.Tool) -> _Fields:
    fields = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": _given(fields)}


def _tool_choice(choice: form.ToolChoice | None) -> str | Mapping[str, Any] | None:
    if choice is None:
        return None
    named = [{"type": "function", "function": {"name": name}} for name in choice.names]
    if choice.choose is Choose.NAMED:
        return named[0]
    if named:
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.choose.value, "tools": named}}
    return choice.choose.value


def _format(asked: form.Format | None) -> _Fields | None:
    if asked is None or asked.output is Output.TEXT:
        return None
    if asked.output is Output.JSON:
        return {"type": "json_object"}
    fields = {
        "name": asked.name or "answer",
        "description": asked.description,
        "schema": asked.schema,
        "strict": asked.strict,
    }
    return {"type": "json_schema", "json_schema": _given(fields)}
