"""Requests of OpenAI's chat completions, read into the canonical form."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from extproc import form
from extproc.dialects.fields import invalid, number, objects, optional, positive, required, strings, wrong_type
from extproc.dialects.openai_chat.calls import read_cap
from extproc.dialects.openai_chat.thoughts import thoughts_of_caller
from extproc.dialects.openai_parts import data_url, document
from extproc.form import Choose, Feature, Output, Role
from extproc.limits import MAX_CHOICES

# What a provider that is asked in this dialect cannot be asked for. The rest, some of them refuse by themselves.
CANNOT = frozenset((Feature.TOP_K, Feature.DOCUMENT_URL, Feature.TOOL_RESULT_MEDIA))

_CONTENT = "messages.content"
FIELDS: Mapping[Feature, str] = {
    Feature.CHOICES: "n",
    Feature.TEMPERATURE_ABOVE_1: "temperature",
    Feature.TOP_K: "top_k",
    Feature.STOP: "stop",
    Feature.SEED: "seed",
    Feature.PRESENCE_PENALTY: "presence_penalty",
    Feature.FREQUENCY_PENALTY: "frequency_penalty",
    Feature.LOGIT_BIAS: "logit_bias",
    Feature.LOGPROBS: "logprobs",
    Feature.TOOL_SUBSET: "tool_choice",
    Feature.SERIAL_TOOL_CALLS: "parallel_tool_calls",
    Feature.JSON_MODE: "response_format",
    Feature.JSON_SCHEMA: "response_format",
    Feature.REASONING: "reasoning_effort",
    Feature.IMAGE: _CONTENT + ".image_url",
    Feature.IMAGE_URL: _CONTENT + ".image_url",
    Feature.DOCUMENT: _CONTENT + ".file",
    Feature.DOCUMENT_URL: _CONTENT + ".file",
    Feature.AUDIO: _CONTENT + ".input_audio",
    Feature.TOOL_RESULT_MEDIA: _CONTENT,
}

# fmt: off
_READ = frozenset((
    "model", "messages", "stream", "n", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "stop",
    "seed", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "tools", "tool_choice",
    "parallel_tool_calls", "response_format", "reasoning_effort", "reasoning", "thinking",
))
# They change what a call costs, how fast it is, or what is remembered of it, and nothing about the answer.
_HINTS = frozenset((
    "user", "metadata", "store", "stream_options", "service_tier", "safety_identifier", "prompt_cache_key",
    "prompt_cache_options", "prompt_cache_retention", "prediction", "usage",
))
# fmt: on
_TEXT_ONLY = ["text"]
_ENABLED = {True: "medium", False: "none", None: None}  # OpenRouter's switch, as efforts


def read_request(body: Mapping[str, Any]) -> form.Request:
    """A request that `read_call` has accepted. Raises BadRequest for what cannot be read, naming the field."""
    extras = [name for name, value in body.items() if value is not None and _is_extra(name, value)]
    given = enumerate(body["messages"])
    messages = [read for i, message in given for read in _message(message, f"messages[{i}]", extras)]
    return form.Request(
        model=body["model"],
        messages=tuple(messages),
        stream=optional(body, "stream", bool) or False,
        cap=read_cap(body),
        choices=positive(body, "n", at_most=MAX_CHOICES),
        temperature=number(body, "temperature"),
        top_p=number(body, "top_p"),
        top_k=optional(body, "top_k", int),
        stop=_stop(body),
        seed=optional(body, "seed", int),
        presence_penalty=number(body, "presence_penalty"),
        frequency_penalty=number(body, "frequency_penalty"),
        logit_bias=optional(body, "logit_bias", dict),
        logprobs=optional(body, "logprobs", bool) or False,
        top_logprobs=optional(body, "top_logprobs", int),
        tools=_tools(body, extras),
        tool_choice=_tool_choice(body, extras),
        parallel_tool_calls=optional(body, "parallel_tool_calls", bool),
        format=_format(body, extras),
        reasoning=_reasoning(body),
        extras=tuple(extras),
    )


def _is_extra(name: str, value: object) -> bool:
    return name not in _READ and name not in _HINTS and not (name == "modalities" and value == _TEXT_ONLY)


def _stop(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop")
    if stop is None or isinstance(stop, str):
        return () if stop is None else (stop,)
    if not isinstance(stop, list):
        raise wrong_type("stop", "one of a string or array of strings", stop)
    return strings(body, "stop")


def _reasoning(body: Mapping[str, Any]) -> form.Reasoning | None:
    """OpenAI's effort, OpenRouter's object, or Anthropic's, which gateways take for Claude."""
    effort = optional(body, "reasoning_effort", str)
    if effort is not None:
        return form.Reasoning(effort=effort)
    if (asked := optional(body, "reasoning", dict)) is not None:
        enabled = optional(asked, "enabled", bool, "reasoning.")
        excluded = optional(asked, "exclude", bool, "reasoning.")
        budget_tokens = optional(asked, "max_tokens", int, "reasoning.")
        return form.Reasoning(
            effort=optional(asked, "effort", str, "reasoning.") or (None if budget_tokens else _ENABLED[enabled]),
            budget_tokens=budget_tokens,
            visible=None if excluded is None else not excluded,
        )
    if (asked := optional(body, "thinking", dict)) is not None:
        off = required(asked, "type", str, "thinking.") == "disabled"
        return form.Reasoning(budget_tokens=0 if off else optional(asked, "budget_tokens", int, "thinking."))
    return None


# Messages -------------------------------------------------------------------------------------------------------------

_ROLES = {"system": Role.SYSTEM, "developer": Role.DEVELOPER, "user": Role.USER}


def _message(message: dict[str, Any], where: str, extras: list[str]) -> Iterator[form.Message]:
    """None at all for what only this dialect has, which goes to `extras`."""
    role = message["role"]
    name = optional(message, "name", str, where + ".")
    if role == "tool":
        yield form.Message(Role.USER, (_tool_result(message, where, extras),))
    elif role == "assistant":
        yield form.Message(Role.ASSISTANT, tuple(_assistant(message, where, extras)), name)
    elif role in _ROLES:
        yield form.Message(_ROLES[role], _content(message, where, extras), name)
    elif role == "function":
        extras.append(f"{where}.role")
    else:
        problem = "expected one of 'system', 'developer', 'user', 'assistant' and 'tool'"
        raise invalid(f"{where}.role", problem)


def _content(message: dict[str, Any], where: str, extras: list[str]) -> tuple[form.Part, ...]:
    content = message.get("content")
    ttl = _cache_ttl(message)
    if not isinstance(content, list):
        return (form.Text(content, ttl),) if content else ()
    parts: list[form.Part] = []
    for i, given in enumerate(content):
        last_ttl = ttl if i == len(content) - 1 else None
        part = _PARTS[given["type"]](given, f"{where}.content[{i}].", _cache_ttl(given) or last_ttl)
        if part is None:
            extras.append(f"{where}.content[{i}].{given['type']}")
        else:
            parts.append(part)
    return tuple(parts)


def _tool_result(message: dict[str, Any], where: str, extras: list[str]) -> form.ToolResult:
    call_id = required(message, "tool_call_id", str, where + ".")
    parts = _content(message, where, extras)
    return form.ToolResult(call_id, parts, cache_ttl=_cache_ttl(message))


def _assistant(message: dict[str, Any], where: str, extras: list[str]) -> Iterator[form.Part]:
    """In the order in which it was written: thoughts, text, calls; but where thoughts name their call, before that."""
    calls = [
        call
        for i, given in enumerate(optional(message, "tool_calls", list, where + ".") or [])
        if (call := _tool_call(given, f"{where}.tool_calls[{i}]", extras)) is not None
    ]
    for name in ("function_call", "audio"):
        if message.get(name) is not None:
            extras.append(f"{where}.{name}")
    thoughts = thoughts_of_caller(message)
    ids = {call.id for call in calls}
    yield from (thinking for thinking, call_id in thoughts if call_id not in ids)
    yield from _content(message, where, extras)
    if refusal := optional(message, "refusal", str, where + "."):
        yield form.Refusal(refusal)
    for call in calls:
        yield from (thinking for thinking, call_id in thoughts if call_id == call.id)
        yield call


def _tool_call(call: dict[str, Any], where: str, extras: list[str]) -> form.ToolCall | None:
    if (optional(call, "type", str, where + ".") or "function") != "function":
        extras.append(where)
        return None
    function = required(call, "function", dict, where + ".")
    return form.ToolCall(
        id=required(call, "id", str, where + "."),
        name=required(function, "name", str, where + ".function."),
        arguments=optional(function, "arguments", str, where + ".function.") or "{}",
    )


def _cache_ttl(fields: Mapping[str, Any]) -> str | None:
    """Anthropic's, which OpenRouter, LiteLLM and Vercel take on parts, messages and tools; or OpenAI's."""
    control = fields.get("cache_control") or fields.get("prompt_cache_breakpoint")
    if not isinstance(control, dict):
        return None
    return "1h" if control.get("ttl") == "1h" else "5m"


# Parts: `read_call` has seen to it that each has its fields -----------------------------------------------------------


def _text(part: dict[str, Any], where: str, ttl: str | None) -> form.Part | None:
    return form.Text(part["text"], ttl)


def _refusal(part: dict[str, Any], where: str, ttl: str | None) -> form.Part | None:
    return form.Refusal(part["refusal"])


def _image(part: dict[str, Any], where: str, ttl: str | None) -> form.Part | None:
    image = part["image_url"]
    fields = {"url": image} if isinstance(image, str) else image
    url, detail = fields["url"], fields.get("detail")
    if (data := data_url(url)) is not None:
        return form.Image(media_type=data[0], data=data[1], detail=detail, cache_ttl=ttl)
    return form.Image(url=url, detail=detail, cache_ttl=ttl)


def _audio(part: dict[str, Any], where: str, ttl: str | None) -> form.Part | None:
    """Mistral's bare string does not say what it is."""
    audio = part["input_audio"]
    if isinstance(audio, str):
        return None
    return form.Audio(audio["data"], required(audio, "format", str, where + "input_audio."))


def _file(part: dict[str, Any], where: str, ttl: str | None) -> form.Part | None:
    file = part["file"]
    given, name = file["file_data"], optional(file, "filename", str, where + "file.")
    if given.startswith(("https://", "http://")):  # OpenRouter's
        return form.Document(url=given, name=name, cache_ttl=ttl)
    return replace(document(given, where + "file.file_data"), name=name, cache_ttl=ttl)


_PARTS: Mapping[str, Callable[[dict[str, Any], str, str | None], form.Part | None]] = {
    "text": _text,
    "refusal": _refusal,
    "image_url": _image,
    "input_audio": _audio,
    "file": _file,
}


# Tools and formats ----------------------------------------------------------------------------------------------------


def _tools(body: Mapping[str, Any], extras: list[str]) -> tuple[form.Tool, ...]:
    tools = [
        _tool(tool, f"tools[{i}]", extras)
        for i, tool in enumerate(objects(optional(body, "tools", list) or [], "tools"))
    ]
    return tuple(tool for tool in tools if tool is not None)


def _tool(tool: dict[str, Any], where: str, extras: list[str]) -> form.Tool | None:
    if required(tool, "type", str, where + ".") != "function":
        extras.append(where)
        return None
    function = required(tool, "function", dict, where + ".")
    where += ".function."
    return form.Tool(
        name=required(function, "name", str, where),
        description=optional(function, "description", str, where),
        schema=optional(function, "parameters", dict, where),
        strict=optional(function, "strict", bool, where),
        cache_ttl=_cache_ttl(tool) or _cache_ttl(function),
    )


_CHOICES = {"auto": Choose.AUTO, "none": Choose.NONE, "required": Choose.REQUIRED, "any": Choose.REQUIRED}  # Mistral's


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
        return form.ToolChoice(Choose.NAMED, (_function_name(choice, "tool_choice."),))
    if kind == "allowed_tools":
        return _allowed_tools(required(choice, kind, dict, "tool_choice."))
    extras.append("tool_choice")
    return None


def _choose(word: str, where: str) -> Choose:
    if word not in _CHOICES:
        raise invalid(where, "expected one of 'none', 'auto' and 'required'")
    return _CHOICES[word]


def _allowed_tools(allowed: dict[str, Any]) -> form.ToolChoice:
    where = "tool_choice.allowed_tools."
    choose = _choose(required(allowed, "mode", str, where), where + "mode")
    tools = objects(required(allowed, "tools", list, where), where + "tools")
    return form.ToolChoice(choose, tuple(_function_name(tool, f"{where}tools[{i}].") for i, tool in enumerate(tools)))


def _function_name(fields: dict[str, Any], where: str) -> str:
    name: str = required(required(fields, "function", dict, where), "name", str, where + "function.")
    return name


def _format(body: Mapping[str, Any], extras: list[str]) -> form.Format | None:
    given = optional(body, "response_format", dict)
    if given is None:
        return None
    kind = required(given, "type", str, "response_format.")
    if kind == "text":
        return form.Format(Output.TEXT)
    if kind == "json_object":
        return form.Format(Output.JSON)
    if kind != "json_schema":
        extras.append("response_format")
        return None
    where = "response_format.json_schema."
    described = required(given, kind, dict, "response_format.")
    return form.Format(
        Output.SCHEMA,
        schema=optional(described, "schema", dict, where),
        name=optional(described, "name", str, where),
        description=optional(described, "description", str, where),
        strict=optional(described, "strict", bool, where),
    )
