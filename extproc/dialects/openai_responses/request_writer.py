"""The canonical form into a request of Responses, and what an answer repeats of its request."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import Any

from extproc import form
from extproc.dialects.fields import dumps
from extproc.dialects.openai_parts import PDF, effort, thinks
from extproc.dialects.openai_responses.thoughts import NAME, encrypted
from extproc.form import Choose, Output, Role

LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"


def write_request(request: form.Request, model: str, cap: int | None) -> bytes:
    """The body for a provider. Nothing is stored there: thoughts are asked for encrypted, to come back with them."""
    reasoning = _reasoning(request.reasoning, model)
    will_think = reasoning is not None and reasoning.get("effort") != "none"
    fields = {
        "model": model,
        "input": [item for message in request.messages for item in _items(message)],
        "stream": request.stream or None,
        "max_output_tokens": cap,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_logprobs": request.top_logprobs,
        "include": [LOGPROBS] * request.logprobs + [_ENCRYPTED] * will_think or None,
        "tools": _tools(request.tools) or None,
        "tool_choice": _tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "text": {"format": _format(request.format)} if request.format else None,
        "reasoning": reasoning,
        "store": False,
    }
    return dumps({name: value for name, value in fields.items() if value is not None})


def _items(message: form.Message) -> Iterator[dict[str, Any]]:
    """The items of one message: what is neither text nor an image ends a run of content."""
    content: list[dict[str, Any]] = []
    for part in message.parts:
        item = _item(part)
        if item is None:
            content += _content(part, message.role)
            continue
        yield from _message(message.role, content)
        content = []
        yield from item
    yield from _message(message.role, content)


def _message(role: Role, content: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if content:
        yield {"type": "message", "role": role.value, "content": content}


def _item(part: form.Part) -> Sequence[dict[str, Any]] | None:
    """What is an item of its own, None for the content of a message. Other dialects' thoughts are no item at all."""
    match part:
        case form.Thinking():
            if part.origin != NAME or part.signature is None:
                return ()
            summary = [{"type": "summary_text", "text": part.text}] if part.text else []
            return ({"type": "reasoning", "summary": summary, "encrypted_content": encrypted(part)},)
        case form.ToolCall():
            return ({"type": "function_call", "call_id": part.id, "name": part.name, "arguments": part.arguments},)
        case form.ToolResult():
            return ({"type": "function_call_output", "call_id": part.call_id, "output": _output(part)},)
    return None


def _output(result: form.ToolResult) -> str | list[dict[str, Any]]:
    match result.parts:
        case ():
            return ""
        case (form.Text(text=text),):
            return text
    return [written_part for part in result.parts for written_part in _content(part, Role.USER)]


def _content(part: form.Part, role: Role) -> Iterator[dict[str, Any]]:
    match part:
        case form.Text():
            yield {"type": "output_text" if role is Role.ASSISTANT else "input_text", "text": part.text}
        case form.Refusal():
            yield {"type": "refusal", "refusal": part.text}
        case form.Image():
            url = part.url or f"data:{part.media_type or 'image/png'};base64,{part.data}"
            yield {"type": "input_image", "image_url": url, "detail": part.detail or "auto"}
        case form.Document():
            yield {"type": "input_file", **_file(part)}


def _file(document: form.Document) -> dict[str, Any]:
    """OpenAI wants a name beside data, and tells the kind of a file by it."""
    if document.url is not None:
        return {"file_url": document.url}
    if document.text is not None:
        data, media_type, name = base64.b64encode(document.text.encode()).decode(), "text/plain", "document.txt"
    else:
        data, media_type, name = document.data or "", document.media_type or PDF, "document.pdf"
    return {"filename": document.name or name, "file_data": f"data:{media_type};base64,{data}"}


def _reasoning(reasoning: form.Reasoning | None, model: str) -> dict[str, Any] | None:
    if reasoning is None or not thinks(model):
        return None
    fields = {"effort": effort(reasoning, model), "summary": "auto" if reasoning.visible else None}
    return {name: value for name, value in fields.items() if value is not None} or None


# What an answer repeats, too ------------------------------------------------------------------------------------------


def _tools(tools: Sequence[form.Tool]) -> list[dict[str, Any]]:
    """Here a function is strict unless it says otherwise, in the other dialects only if it says so."""
    return [
        {
            "type": "function",
            "name": tool.name,
            "description": tool.description,
            "parameters": tool.schema,
            "strict": tool.strict or False,
        }
        for tool in tools
    ]


def _tool_choice(choice: form.ToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.choose is Choose.NAMED:
        return {"type": "function", "name": choice.names[0]}
    if not choice.names:
        return choice.choose.value
    allowed = [{"type": "function", "name": name} for name in choice.names]
    return {"type": "allowed_tools", "mode": choice.choose.value, "tools": allowed}


def _format(given: form.Format) -> dict[str, Any]:
    match given.output:
        case Output.TEXT:
            return {"type": "text"}
        case Output.JSON:
            return {"type": "json_object"}
        case Output.SCHEMA:
            fields = {"description": given.description, "strict": given.strict}
            some = {name: value for name, value in fields.items() if value is not None}
            return {"type": "json_schema", "name": given.name or "answer", "schema": given.schema, **some}


def echo(request: form.Request) -> dict[str, Any]:
    """What an answer repeats of its request, with OpenAI's defaults for what was not asked for."""
    reasoning = request.reasoning or form.Reasoning()
    return {
        "background": False,
        "instructions": _instructions(request),
        "max_output_tokens": request.cap,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": request.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.effort, "summary": "auto" if reasoning.visible else None},
        "store": False,
        "temperature": 1.0 if request.temperature is None else request.temperature,
        "text": {"format": _format(request.format or form.Format(Output.TEXT))},
        "tool_choice": _tool_choice(request.tool_choice) or "auto",
        "tools": _tools(request.tools),
        "top_logprobs": request.top_logprobs or 0,
        "top_p": 1.0 if request.top_p is None else request.top_p,
        "truncation": "disabled",
        "user": None,
    }


def _instructions(request: form.Request) -> str | None:
    """Where they were not a message of the input, they are the first one."""
    for message in request.messages[:1]:
        if message.role is Role.SYSTEM:
            return "\n\n".join(part.text for part in message.parts if isinstance(part, form.Text))
    return None
