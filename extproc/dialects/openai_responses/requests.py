"""Requests of Responses, both ways, and what an answer repeats of its request."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from extproc import form
from extproc.dialects.fields import dumps, invalid, is_a, objects, optional, required, wrong_type
from extproc.dialects.openai_parts import data_url, effort, thinks
from extproc.dialects.openai_responses.prompts import kind_of
from extproc.dialects.openai_responses.thoughts import NAME, encrypted, thinking
from extproc.form import Choose, Output, Role

# fmt: off
_READ = frozenset((
    "model", "input", "instructions", "stream", "max_output_tokens", "temperature", "top_p", "top_logprobs", "include",
    "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "truncation",
))
# What changes nothing about the answer, or, like the bound on the provider's own tools, nothing by itself.
_HINTS = frozenset((
    "user", "metadata", "store", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
    "safety_identifier", "service_tier", "stream_options", "background", "background_options", "max_tool_calls",
))
# fmt: on
_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"
_PDF = "application/pdf"

# From a caller --------------------------------------------------------------------------------------------------------


def read_request(body: Mapping[str, Any]) -> form.Request:
    """A request that `read_call` has accepted. Raises BadRequest for what cannot be read, naming the field."""
    extras = [name for name, value in body.items() if value is not None and name not in _READ | _HINTS]
    if optional(body, "truncation", str) not in (None, "disabled"):
        extras.append("truncation")
    tools = tuple(_tools(body, extras))
    return form.Request(
        model=required(body, "model", str),
        messages=tuple(_messages(body, extras)),
        stream=optional(body, "stream", bool) or False,
        cap=optional(body, "max_output_tokens", int),
        temperature=_number(body, "temperature"),
        top_p=_number(body, "top_p"),
        logprobs=_LOGPROBS in (optional(body, "include", list) or ()),
        top_logprobs=optional(body, "top_logprobs", int) or None,
        tools=tools,
        tool_choice=_tool_choice(body, extras),
        parallel_tool_calls=optional(body, "parallel_tool_calls", bool),
        format=_format(body, extras),
        reasoning=_reasoning(body, extras),
        extras=tuple(extras),
    )


def _number(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None or is_a(value, int) or is_a(value, float):
        return value
    raise wrong_type(name, "a decimal number", value)


def _messages(body: Mapping[str, Any], extras: list[str]) -> Iterator[form.Message]:
    if (instructions := optional(body, "instructions", str)) is not None:
        yield form.Message(Role.SYSTEM, (form.Text(instructions),))
    given = body.get("input")
    if isinstance(given, str):
        yield form.Message(Role.USER, (form.Text(given),))
        return
    for i, item in enumerate(objects(required(body, "input", list), "input")):
        message = _item(item, f"input[{i}]", extras)
        if message is not None:
            yield message


def _item(item: dict[str, Any], path: str, extras: list[str]) -> form.Message | None:
    """One item as a message of its own. What only a provider of this dialect understands is one of the extras."""
    where = path + "."
    match kind_of(item, where):
        case "message":
            return form.Message(_role(item, where), _parts(item.get("content"), where + "content"))
        case "reasoning":
            thoughts = _thoughts(item, where)
            return form.Message(Role.ASSISTANT, (thoughts,)) if thoughts.text or thoughts.signature else None
        case "function_call":
            call_id, name = required(item, "call_id", str, where), required(item, "name", str, where)
            call = form.ToolCall(call_id, name, required(item, "arguments", str, where))
            return form.Message(Role.ASSISTANT, (call,))
        case "function_call_output":
            call_id = required(item, "call_id", str, where)
            result = form.ToolResult(call_id, _parts(item.get("output"), where + "output"))
            return form.Message(Role.USER, (result,))
    extras.append(path)
    return None


def _role(item: Mapping[str, Any], where: str) -> Role:
    try:
        return Role(required(item, "role", str, where))
    except ValueError:
        raise invalid(where + "role", "expected one of 'user', 'assistant', 'system' and 'developer'") from None


def _thoughts(item: Mapping[str, Any], where: str) -> form.Thinking:
    """In full, where an open model gave them so, and what sums them up. Those that a provider keeps stay there."""
    parts = [
        part
        for name in ("content", "summary")
        for part in objects(optional(item, name, list, where) or [], where + name)
    ]
    text = "\n\n".join(required(part, "text", str, where) for part in parts)
    return thinking(text, optional(item, "encrypted_content", str, where))


def _parts(content: object, where: str) -> tuple[form.Part, ...]:
    if content is None:
        return ()
    if isinstance(content, str):
        return (form.Text(content),)
    if not isinstance(content, list):
        raise wrong_type(where, "one of a string or array of objects", content)
    return tuple(_part(part, f"{where}[{i}].") for i, part in enumerate(objects(content, where)))


def _part(part: dict[str, Any], where: str) -> form.Part:
    cache_ttl = "5m" if part.get("prompt_cache_breakpoint") else None
    match required(part, "type", str, where):
        case "refusal":
            return form.Refusal(required(part, "refusal", str, where))
        case "input_image":
            url, detail = required(part, "image_url", str, where), optional(part, "detail", str, where)
            if (found := data_url(url)) is None:
                return form.Image(url=url, detail=detail, cache_ttl=cache_ttl)
            return form.Image(data=found[1], media_type=found[0], detail=detail, cache_ttl=cache_ttl)
        case "input_file":
            return _document(part, where, cache_ttl)
        case "input_audio":
            audio, inside = required(part, "input_audio", dict, where), where + "input_audio."
            return form.Audio(required(audio, "data", str, inside), required(audio, "format", str, inside))
    return form.Text(required(part, "text", str, where), cache_ttl)


def _document(part: dict[str, Any], where: str, cache_ttl: str | None) -> form.Document:
    """Data is a PDF unless its URL says otherwise. Plain text is read, for those who take documents as PDFs only."""
    name = optional(part, "filename", str, where)
    if (url := optional(part, "file_url", str, where)) is not None:
        return form.Document(url=url, name=name, cache_ttl=cache_ttl)
    data = required(part, "file_data", str, where)
    media_type, data = data_url(data) or (_PDF, data)
    if not media_type.startswith("text/"):
        return form.Document(data=data, media_type=media_type, name=name, cache_ttl=cache_ttl)
    try:
        text = base64.b64decode(data).decode()
    except (binascii.Error, ValueError):
        raise invalid(where + "file_data", "expected text in UTF-8, in base64") from None
    return form.Document(text=text, name=name, cache_ttl=cache_ttl)


def _tools(body: Mapping[str, Any], extras: list[str]) -> Iterator[form.Tool]:
    """Functions. Some clients nest what describes them, as in chat completions."""
    for i, tool in enumerate(objects(optional(body, "tools", list) or [], "tools")):
        where = f"tools[{i}]."
        if required(tool, "type", str, where) != "function":
            extras.append(f"tools[{i}]")
            continue
        if tool.get("defer_loading"):
            extras.append(where + "defer_loading")
        function = {**(optional(tool, "function", dict, where) or {}), **tool}
        yield form.Tool(
            name=required(function, "name", str, where),
            description=optional(function, "description", str, where),
            schema=optional(function, "parameters", dict, where),
            strict=optional(function, "strict", bool, where),
        )


def _tool_choice(body: Mapping[str, Any], extras: list[str]) -> form.ToolChoice | None:
    choice = body.get("tool_choice")
    if choice is None:
        return None
    if isinstance(choice, str):
        return form.ToolChoice(_choose(choice, "tool_choice"))
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", "one of a string or object", choice)
    kind = required(choice, "type", str, "tool_choice.")
    if kind == "function":
        function = {**(optional(choice, "function", dict, "tool_choice.") or {}), **choice}
        return form.ToolChoice(Choose.NAMED, (required(function, "name", str, "tool_choice."),))
    if kind == "allowed_tools":
        allowed = objects(required(choice, "tools", list, "tool_choice."), "tool_choice.tools")
        if all(tool.get("type") == "function" for tool in allowed):
            names = (required(tool, "name", str, f"tool_choice.tools[{i}].") for i, tool in enumerate(allowed))
            mode = _choose(required(choice, "mode", str, "tool_choice."), "tool_choice.mode")
            return form.ToolChoice(mode, tuple(names))
    extras.append("tool_choice")
    return None


def _choose(word: str, where: str) -> Choose:
    if word not in ("none", "auto", "required"):
        raise invalid(where, "expected one of 'none', 'auto' and 'required'")
    return Choose(word)


def _format(body: Mapping[str, Any], extras: list[str]) -> form.Format | None:
    text = optional(body, "text", dict) or {}
    extras += [f"text.{name}" for name, value in text.items() if name != "format" and value is not None]
    given = optional(text, "format", dict, "text.")
    if given is None:
        return None
    where = "text.format."
    match required(given, "type", str, where):
        case "text":
            return form.Format(Output.TEXT)
        case "json_object":
            return form.Format(Output.JSON)
        case "json_schema":
            return form.Format(
                Output.SCHEMA,
                schema=required(given, "schema", dict, where),
                name=optional(given, "name", str, where),
                description=optional(given, "description", str, where),
                strict=optional(given, "strict", bool, where),
            )
    raise invalid(where + "type", "expected one of 'text', 'json_object' and 'json_schema'")


def _reasoning(body: Mapping[str, Any], extras: list[str]) -> form.Reasoning | None:
    given = optional(body, "reasoning", dict) or {}
    known = ("effort", "summary", "generate_summary")
    extras += [f"reasoning.{name}" for name, value in given.items() if name not in known and value is not None]
    how_much = optional(given, "effort", str, "reasoning.")
    summary = optional(given, "summary", str, "reasoning.") or optional(given, "generate_summary", str, "reasoning.")
    if how_much is None and summary is None:
        return None
    return form.Reasoning(effort=how_much, visible=True if summary else None)


# To a provider --------------------------------------------------------------------------------------------------------


def write_request(request: form.Request, model: str, cap: int | None) -> bytes:
    """The body for a provider. Nothing is stored there: thoughts are asked for encrypted, to come back with them."""
    reasoning = _write_reasoning(request.reasoning, model)
    will_think = reasoning is not None and reasoning.get("effort") != "none"
    fields = {
        "model": model,
        "input": [item for message in request.messages for item in _items(message)],
        "stream": request.stream or None,
        "max_output_tokens": cap,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "top_logprobs": request.top_logprobs,
        "include": [_LOGPROBS] * request.logprobs + [_ENCRYPTED] * will_think or None,
        "tools": write_tools(request.tools) or None,
        "tool_choice": write_tool_choice(request.tool_choice),
        "parallel_tool_calls": request.parallel_tool_calls,
        "text": {"format": write_format(request.format)} if request.format else None,
        "reasoning": reasoning,
        "store": False,
    }
    return dumps({name: value for name, value in fields.items() if value is not None})


def _items(message: form.Message) -> Iterator[dict[str, Any]]:
    """The items of one message: what is neither text nor an image ends a run of content."""
    content: list[dict[str, Any]] = []
    for part in message.parts:
        item = _write_item(part)
        if item is None:
            content += _write_content(part, message.role)
            continue
        yield from _message(message.role, content)
        content = []
        yield from item
    yield from _message(message.role, content)


def _message(role: Role, content: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    if content:
        yield {"type": "message", "role": role.value, "content": content}


def _write_item(part: form.Part) -> Sequence[dict[str, Any]] | None:
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
            return ({"type": "function_call_output", "call_id": part.call_id, "output": _write_output(part)},)
    return None


def _write_output(result: form.ToolResult) -> str | list[dict[str, Any]]:
    match result.parts:
        case ():
            return ""
        case (form.Text(text=text),):
            return text
    return [written_part for part in result.parts for written_part in _write_content(part, Role.USER)]


def _write_content(part: form.Part, role: Role) -> Iterator[dict[str, Any]]:
    match part:
        case form.Text():
            yield {"type": "output_text" if role is Role.ASSISTANT else "input_text", "text": part.text}
        case form.Refusal():
            yield {"type": "refusal", "refusal": part.text}
        case form.Image():
            url = part.url or f"data:{part.media_type or 'image/png'};base64,{part.data}"
            yield {"type": "input_image", "image_url": url, "detail": part.detail or "auto"}
        case form.Document():
            yield {"type": "input_file", **_write_file(part)}


def _write_file(document: form.Document) -> dict[str, Any]:
    """OpenAI wants a name beside data, and tells the kind of a file by it."""
    if document.url is not None:
        return {"file_url": document.url}
    if document.text is not None:
        data, media_type, name = base64.b64encode(document.text.encode()).decode(), "text/plain", "document.txt"
    else:
        data, media_type, name = document.data or "", document.media_type or _PDF, "document.pdf"
    return {"filename": document.name or name, "file_data": f"data:{media_type};base64,{data}"}


def _write_reasoning(reasoning: form.Reasoning | None, model: str) -> dict[str, Any] | None:
    if reasoning is None or not thinks(model):
        return None
    fields = {"effort": effort(reasoning, model), "summary": "auto" if reasoning.visible else None}
    return {name: value for name, value in fields.items() if value is not None} or None


# Both, and what an answer repeats -------------------------------------------------------------------------------------


def write_tools(tools: Sequence[form.Tool]) -> list[dict[str, Any]]:
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


def write_tool_choice(choice: form.ToolChoice | None) -> str | dict[str, Any] | None:
    if choice is None:
        return None
    if choice.choose is Choose.NAMED:
        return {"type": "function", "name": choice.names[0]}
    if not choice.names:
        return choice.choose.value
    allowed = [{"type": "function", "name": name} for name in choice.names]
    return {"type": "allowed_tools", "mode": choice.choose.value, "tools": allowed}


def write_format(given: form.Format) -> dict[str, Any]:
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
        "text": {"format": write_format(request.format or form.Format(Output.TEXT))},
        "tool_choice": write_tool_choice(request.tool_choice) or "auto",
        "tools": write_tools(request.tools),
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
