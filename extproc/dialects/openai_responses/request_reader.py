"""A caller's request in Responses into the canonical form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from extproc import form
from extproc.dialects.fields import invalid, number, objects, optional, required, wrong_type
from extproc.dialects.openai_parts import data_url, document
from extproc.dialects.openai_responses.prompts import kind_of
from extproc.dialects.openai_responses.request_writer import LOGPROBS
from extproc.dialects.openai_responses.thoughts import thinking
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
        temperature=number(body, "temperature"),
        top_p=number(body, "top_p"),
        logprobs=LOGPROBS in (optional(body, "include", list) or ()),
        top_logprobs=optional(body, "top_logprobs", int) or None,
        tools=tools,
        tool_choice=_tool_choice(body, extras),
        parallel_tool_calls=optional(body, "parallel_tool_calls", bool),
        format=_format(body, extras),
        reasoning=_reasoning(body, extras),
        extras=tuple(extras),
    )


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
    name = optional(part, "filename", str, where)
    if (url := optional(part, "file_url", str, where)) is not None:
        return form.Document(url=url, name=name, cache_ttl=cache_ttl)
    data = required(part, "file_data", str, where)
    return replace(document(data, where + "file_data"), name=name, cache_ttl=cache_ttl)


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
