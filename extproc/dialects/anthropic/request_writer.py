"""The canonical form of a request into Anthropic's."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from extproc.dialects.anthropic.thinking import Generation, Thoughts, generation, thoughts
from extproc.dialects.anthropic.vocabulary import ORIGIN, input_of
from extproc.dialects.fields import dumps
from extproc.form import (
    Choose,
    Document,
    Feature,
    Image,
    Message,
    Output,
    Part,
    Refusal,
    Request,
    Role,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
)
from extproc.models import traits

CANNOT = frozenset(
    (
        Feature.CHOICES,
        Feature.TEMPERATURE_ABOVE_1,
        Feature.SEED,
        Feature.PRESENCE_PENALTY,
        Feature.FREQUENCY_PENALTY,
        Feature.LOGIT_BIAS,
        Feature.LOGPROBS,
        Feature.JSON_MODE,
        Feature.AUDIO,
    )
)

_Block = dict[str, Any]

_SYSTEM = (Role.SYSTEM, Role.DEVELOPER)
_CHOICES = {Choose.AUTO: "auto", Choose.NONE: "none", Choose.REQUIRED: "any", Choose.NAMED: "tool"}
_NOT_IN_IDS = re.compile(r"[^a-zA-Z0-9_-]")  # other providers' ids hold dots and colons


def write_request(request: Request, model: str, cap: int | None) -> bytes:
    """The body for a provider. Anthropic demands a bound: `cap`, else the caller's, else the model's own largest."""
    max_tokens = cap or request.cap or traits("anthropic", model, None).max_output_tokens
    which = generation(model)
    turns = _turns(request.messages)
    system = [block for message in request.messages if message.role in _SYSTEM for block in _texts(message.parts)]
    if not turns and system:  # others answer to instructions alone
        turns, system = [{"role": "user", "content": system}], []
    think = _thoughts(request, model, max_tokens, turns)
    wishes = {
        "system": system,
        "stream": request.stream,
        "stop_sequences": list(request.stop),
        "tools": [_tool(tool, which) for tool in _offered(request)],
        "tool_choice": _tool_choice(request),
        "thinking": think.thinking,
        "output_config": _output_config(request, think),
        **(_sampling(request, which) if not think.on else {}),
    }
    asked = {name: value for name, value in wishes.items() if _said(value)}
    return dumps({"model": model, "max_tokens": max_tokens, "messages": turns, **asked})


def _said(value: object) -> bool:
    """0 is a temperature; nothing, no and none are what goes without saying."""
    return value is not None and value is not False and value not in ([], {})


def _sampling(request: Request, which: Generation) -> dict[str, float | None]:
    """A model that thinks chooses its tokens by itself; newer models always do, and some take one way at a time."""
    if not which.samples:
        return {}
    temperature = None if request.temperature is None else min(request.temperature, 1.0)
    top_p = None if temperature is not None and which.samples_one_way else request.top_p
    return {"temperature": temperature, "top_p": top_p, "top_k": request.top_k}


def _thoughts(request: Request, model: str, max_tokens: int, turns: Sequence[_Block]) -> Thoughts:
    """No thinking where Anthropic refuses it: with a tool that must be called, or after a call without its thoughts."""
    think = thoughts(request.reasoning, model, max_tokens)
    choice = request.tool_choice
    forced = choice is not None and choice.choose in (Choose.REQUIRED, Choose.NAMED)
    if think.on and (forced or (think.needs_thoughts and _lacks_thoughts(turns))):
        return Thoughts()
    return think


def _lacks_thoughts(turns: Sequence[_Block]) -> bool:
    """Whether the calls that are now answered were made without thoughts, or by another model."""
    if len(turns) < 2 or turns[-1]["content"][0]["type"] != "tool_result":
        return False
    return turns[-2]["content"][0]["type"] not in ("thinking", "redacted_thinking")


def _output_config(request: Request, think: Thoughts) -> _Block:
    format_ = request.format
    if format_ is None or format_.output is not Output.SCHEMA:
        return {"effort": think.effort} if think.effort else {}
    schema = {"format": {"type": "json_schema", "schema": format_.schema or {"type": "object"}}}
    return schema | ({"effort": think.effort} if think.effort else {})


# Tools ----------------------------------------------------------------------------------------------------------------


def _offered(request: Request) -> Iterable[Tool]:
    """All tools, or those that may be called: Anthropic has no other word for a part of them."""
    choice = request.tool_choice
    if choice is None or choice.choose is Choose.NAMED or not choice.names:
        return request.tools
    return (tool for tool in request.tools if tool.name in choice.names)


def _tool(tool: Tool, which: Generation) -> _Block:
    block = {
        "name": tool.name,
        "description": tool.description,
        "input_schema": {"type": "object", **(tool.schema or {"properties": {}})},
        "strict": tool.strict if which.follows_schemas else None,
    }
    return _cached({name: value for name, value in block.items() if value is not None}, tool.cache_ttl)


def _tool_choice(request: Request) -> _Block | None:
    if not request.tools:
        return None
    choice, parallel = request.tool_choice, request.parallel_tool_calls
    if choice is None and parallel is None:
        return None
    choice = choice or ToolChoice(Choose.AUTO)
    block: _Block = {"type": _CHOICES[choice.choose]}
    if choice.choose is Choose.NAMED:
        block["name"] = choice.names[0]
    if parallel is not None and choice.choose is not Choose.NONE:
        block["disable_parallel_tool_use"] = not parallel
    return block


# Messages -------------------------------------------------------------------------------------------------------------


def _turns(messages: Sequence[Message]) -> list[_Block]:
    """Turns that alternate. Results come first in theirs, as they must, and so directly after the calls."""
    spoken = (message for message in messages if message.role not in _SYSTEM)
    turns: list[_Block] = []
    for role, said in groupby(spoken, key=lambda message: message.role):
        blocks = [block for message in said for part in message.parts for block in _blocks(part)]
        blocks.sort(key=lambda block: block["type"] != "tool_result")
        if blocks and turns and turns[-1]["role"] == role.value:  # what was between them was empty
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role.value, "content": blocks})
    if turns and turns[-1]["role"] == Role.ASSISTANT.value and (last := turns[-1]["content"][-1])["type"] == "text":
        last["text"] = last["text"].rstrip()  # an answer that is begun for the model must not end in white space
    return turns


def _texts(parts: Iterable[Part]) -> Iterator[_Block]:
    for part in parts:
        if isinstance(part, Text):
            yield from _blocks(part)


def _blocks(part: Part) -> Iterator[_Block]:
    """One block, or none: empty texts, sound, and thoughts that are not Anthropic's own are not taken."""
    match part:
        case Text(text=text, cache_ttl=ttl) if text.strip():
            yield _cached({"type": "text", "text": text}, ttl)
        case Refusal(text=text) if text.strip():
            yield {"type": "text", "text": text}
        case Image():
            yield _cached({"type": "image", "source": _source(part)}, part.cache_ttl)
        case Document():
            title = {"title": part.name} if part.name else {}
            yield _cached({"type": "document", "source": _source(part), **title}, part.cache_ttl)
        case Thinking(signature=str(signature), origin=origin) if origin == ORIGIN:
            if part.redacted:
                yield {"type": "redacted_thinking", "data": signature}
            else:
                yield {"type": "thinking", "thinking": part.text, "signature": signature}
        case ToolCall():
            yield {"type": "tool_use", "id": _id(part.id), "name": part.name, "input": input_of(part.arguments)}
        case ToolResult():
            yield _result(part)


def _result(result: ToolResult) -> _Block:
    content = [block for part in result.parts for block in _blocks(part)]
    block: _Block = {"type": "tool_result", "tool_use_id": _id(result.call_id)}
    if content:
        block["content"] = content
    if result.is_error:
        block["is_error"] = True
    return _cached(block, result.cache_ttl)


def _source(part: Image | Document) -> _Block:
    if part.url is not None:
        return {"type": "url", "url": part.url}
    if isinstance(part, Document) and part.text is not None:
        return {"type": "text", "media_type": "text/plain", "data": part.text}
    default = "image/png" if isinstance(part, Image) else "application/pdf"
    return {"type": "base64", "media_type": part.media_type or default, "data": part.data}


def _id(call_id: str) -> str:
    return _NOT_IN_IDS.sub("_", call_id)


def _cached(block: _Block, ttl: str | None) -> _Block:
    if ttl is None:
        return block
    return {**block, "cache_control": {"type": "ephemeral"} | ({} if ttl == "5m" else {"ttl": ttl})}
