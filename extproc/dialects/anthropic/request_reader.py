"""A caller's request in Anthropic's form into the canonical one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from extproc.dialects.anthropic.prompts import is_custom
from extproc.dialects.anthropic.vocabulary import ORIGIN, arguments_of
from extproc.dialects.fields import invalid, number, optional, required, strings
from extproc.form import (
    Choose,
    Document,
    Format,
    Image,
    Message,
    Output,
    Part,
    Reasoning,
    Request,
    Role,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    uncarry,
)

# Fields that have a place in the canonical form, and those that change nothing about the answer.
# fmt: off
_READ = frozenset((
    "model", "messages", "system", "max_tokens", "stream", "temperature", "top_p", "top_k", "stop_sequences", "tools",
    "tool_choice", "thinking", "output_config", "output_format",
))
_HINTS = frozenset((
    "metadata", "service_tier", "speed", "cache_control", "diagnostics", "user_profile_id", "workspace_id",
    "anthropic_version", "anthropic_beta", "betas",
))
# fmt: on


def read_request(body: Mapping[str, Any]) -> Request:
    """A request that `read_call` has accepted. Raises BadRequest for what cannot be read, naming the field."""
    reader = _Reader()
    messages = (*reader.system(body), *reader.messages(body))
    tools = tuple(reader.tools(body))
    tool_choice, parallel_tool_calls = _tool_choice(body)
    reasoning = reader.reasoning(body)
    format_ = reader.format(body)
    reader.extras += [name for name, value in body.items() if value is not None and name not in _READ | _HINTS]
    return Request(
        model=required(body, "model", str),
        messages=messages,
        stream=optional(body, "stream", bool) or False,
        cap=max(1, required(body, "max_tokens", int)),
        temperature=number(body, "temperature"),
        top_p=number(body, "top_p"),
        top_k=optional(body, "top_k", int),
        stop=strings(body, "stop_sequences"),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
        format=format_,
        reasoning=reasoning,
        extras=tuple(reader.extras),
    )


def _tool_choice(body: Mapping[str, Any]) -> tuple[ToolChoice | None, bool | None]:
    """(which tools, whether several at once)."""
    choice = optional(body, "tool_choice", dict)
    if choice is None:
        return None, None
    where = "tool_choice."
    serial = optional(choice, "disable_parallel_tool_use", bool, where)
    parallel = None if serial is None else not serial
    match required(choice, "type", str, where):
        case "auto":
            return ToolChoice(Choose.AUTO), parallel
        case "any":
            return ToolChoice(Choose.REQUIRED), parallel
        case "none":
            return ToolChoice(Choose.NONE), parallel
        case "tool":
            return ToolChoice(Choose.NAMED, (required(choice, "name", str, where),)), parallel
    raise invalid("tool_choice.type", "expected one of 'auto', 'any', 'tool' and 'none'")


def _cache_ttl(holder: Mapping[str, Any], where: str) -> str | None:
    control = optional(holder, "cache_control", dict, where)
    return None if control is None else optional(control, "ttl", str, where + "cache_control.") or "5m"


class _Reader:
    """Reads, and notes what has no place in the canonical form."""

    def __init__(self) -> None:
        self.extras: list[str] = []

    # Messages ---------------------------------------------------------------------------------------------------------

    def system(self, body: Mapping[str, Any]) -> Iterator[Message]:
        if parts := self._content(body.get("system"), "system"):
            yield Message(Role.SYSTEM, parts)

    def messages(self, body: Mapping[str, Any]) -> Iterator[Message]:
        for i, message in enumerate(body["messages"]):
            yield Message(Role(message["role"]), self._content(message["content"], f"messages[{i}].content"))

    def _content(self, content: object, where: str) -> tuple[Part, ...]:
        if isinstance(content, str):
            return (Text(content),) if content else ()
        blocks = content if isinstance(content, list) else []
        return tuple(part for i, block in enumerate(blocks) for part in self._block(block, f"{where}[{i}]"))

    def _block(self, block: Mapping[str, Any], path: str) -> Iterator[Part]:
        where = path + "."
        match block["type"]:
            case "text":
                yield Text(block["text"], _cache_ttl(block, where))
            case "image":
                yield self._image(block, where)
            case "document":
                yield from self._document(block, where)
            case "search_result":
                self._note_citations(block, where)
                yield Document(text=self._joined(block, where), name=optional(block, "title", str, where))
            case "tool_use":
                optional(block, "input", dict, where)
                yield ToolCall(
                    required(block, "id", str, where), required(block, "name", str, where), arguments_of(block)
                )
            case "tool_result":
                yield self._tool_result(block, where)
            case "thinking":
                signature, origin = uncarry(optional(block, "signature", str, where) or "", ORIGIN)
                yield Thinking(
                    required(block, "thinking", str, where), signature or None, origin if signature else None
                )
            case "redacted_thinking":
                signature, origin = uncarry(required(block, "data", str, where), ORIGIN)
                yield Thinking("", signature, origin, redacted=True)
            case _:
                self.extras.append(path)

    def _image(self, block: Mapping[str, Any], where: str) -> Image:
        source, ttl = block["source"], _cache_ttl(block, where)
        if source["type"] == "url":
            return Image(url=source["url"], cache_ttl=ttl)
        return Image(source["data"], required(source, "media_type", str, where + "source."), cache_ttl=ttl)

    def _document(self, block: Mapping[str, Any], where: str) -> Iterator[Part]:
        self._note_citations(block, where)
        source, ttl, name = block["source"], _cache_ttl(block, where), optional(block, "title", str, where)
        if context := optional(block, "context", str, where):
            yield Text(context)
        match source["type"]:
            case "base64":
                media_type = required(source, "media_type", str, where + "source.")
                yield Document(source["data"], media_type, name=name, cache_ttl=ttl)
            case "url":
                yield Document(url=source["url"], name=name, cache_ttl=ttl)
            case "text":
                yield Document(text=source["data"], name=name, cache_ttl=ttl)
            case _:
                yield Document(text=self._joined(source, where + "source."), name=name, cache_ttl=ttl)

    def _joined(self, holder: Mapping[str, Any], where: str) -> str:
        """The text of a document that is itself made of blocks; a picture among them has no place."""
        parts = self._content(holder.get("content"), where + "content")
        if not all(isinstance(part, Text) for part in parts):
            self.extras.append(where + "content")
        return "\n".join(part.text for part in parts if isinstance(part, Text))

    def _note_citations(self, block: Mapping[str, Any], where: str) -> None:
        citations = optional(block, "citations", dict, where)
        if citations is not None and citations.get("enabled"):
            self.extras.append(where + "citations")

    def _tool_result(self, block: Mapping[str, Any], where: str) -> ToolResult:
        return ToolResult(
            block["tool_use_id"],
            self._content(block.get("content"), where + "content"),
            optional(block, "is_error", bool, where) or False,
            _cache_ttl(block, where),
        )

    # Tools, thinking, format ------------------------------------------------------------------------------------------

    def tools(self, body: Mapping[str, Any]) -> Iterator[Tool]:
        for i, tool in enumerate(body.get("tools") or ()):
            where = f"tools[{i}]."
            if not is_custom(tool):
                self.extras.append(where[:-1])
                continue
            callers = optional(tool, "allowed_callers", list, where)
            if callers is not None and "direct" not in callers:
                self.extras.append(where + "allowed_callers")
            yield Tool(
                required(tool, "name", str, where),
                optional(tool, "description", str, where),
                optional(tool, "input_schema", dict, where),
                optional(tool, "strict", bool, where),
                _cache_ttl(tool, where),
            )

    def reasoning(self, body: Mapping[str, Any]) -> Reasoning | None:
        effort = optional(optional(body, "output_config", dict) or {}, "effort", str, "output_config.")
        effort = "xhigh" if effort == "max" else effort
        thinking = optional(body, "thinking", dict)
        if thinking is None:
            return None if effort is None else Reasoning(effort)
        display = optional(thinking, "display", str, "thinking.")
        visible = None if display is None else display != "omitted"
        match required(thinking, "type", str, "thinking."):
            case "disabled":
                return Reasoning("none")
            case "enabled":
                return Reasoning(effort, required(thinking, "budget_tokens", int, "thinking."), visible)
            case "adaptive":
                return Reasoning(effort, None, visible)
        self.extras.append("thinking.type")
        return Reasoning(effort, None, visible)

    def format(self, body: Mapping[str, Any]) -> Format | None:
        """`output_format` is what `output_config.format` was called in its beta."""
        config = optional(body, "output_config", dict) or {}
        self.extras += [f"output_config.{name}" for name in config if name not in ("effort", "format")]
        where, asked = "output_config.format.", optional(config, "format", dict, "output_config.")
        if asked is None:
            where, asked = "output_format.", optional(body, "output_format", dict)
        if asked is None:
            return None
        if required(asked, "type", str, where) != "json_schema":
            raise invalid(where + "type", "expected 'json_schema'")
        return Format(Output.SCHEMA, required(asked, "schema", dict, where))
