"""What a prompt of OpenAI's Responses may cost, besides the words in it. Holds are made from this: an upper bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from extproc.dialects.fields import Names, invalid, objects, optional, positive, read_content, required
from extproc.dialects.openai_parts import (
    LARGEST_CONTEXT_TOKENS,
    MESSAGE_TOKENS,
    REPLY_TOKENS,
    TOOLS_TOKENS,
    Prompt,
    audio_tokens,
    file_tokens,
    image_tokens,
    prompt_for,
)
from extproc.limits import DEFAULT_TOOL_CALLS, MAX_MESSAGES, MAX_TOOL_CALLS

# Encrypted reasoning is base64 of some five (xAI) to ten bytes (OpenAI) a token. Assumes no less than three.
ENCRYPTED_CHARS_PER_TOKEN = 4
EARLIER_REASONING_TOKENS = 128_000  # thoughts kept at the provider: as long as any model's answer may be
# What the provider runs itself (searches, code, MCP) goes round by round: each reads all that came before it again, and
# is billed for that as input. Recorded: 8,000 to 17,000 tokens for a round of search, 151,000 for a run of code. Held
# for no more than the largest context, so that it is an estimate.
ROUND_TOKENS = 12_000

OWN_TOOLS_TOKENS = 1_000  # instructions for tools of OpenAI's own: 460 for a computer, as many for a search of tools

_PLAIN_TOOLS = frozenset(("function", "custom", "namespace"))
# Tools that the caller runs, or that only find others of the request.
_CALLERS_TOOLS = _PLAIN_TOOLS | {"computer", "computer_use_preview", "local_shell", "apply_patch", "tool_search"}
_NO_SEARCHES = frozenset(("file_search", "tool_search"))  # of the web

_ITEM_FIELDS = Names(("type", "role", "content", "output", "id", "summary", "encrypted_content", "tools"))
_PART_FIELDS = Names(("type", "text", "refusal", "image_url", "file_id", "file_data", "file_url", "input_audio"))
_TOOL_FIELDS = Names(("type", "name", "function"))

# Items that are all text: what was said, called, run and found before.
# fmt: off
_TEXT_ITEMS = frozenset((
    "function_call", "custom_tool_call", "file_search_call", "web_search_call", "code_interpreter_call",
    "computer_call", "local_shell_call", "local_shell_call_output", "shell_call", "shell_call_output",
    "apply_patch_call", "apply_patch_call_output", "tool_search_call", "tool_search_output", "additional_tools",
    "mcp_list_tools", "mcp_call", "mcp_approval_request", "mcp_approval_response", "compaction_trigger",
))
# fmt: on
_TOOL_ITEMS = ("additional_tools", "tool_search_output")  # … of which these bring tools
_OUTPUTS = frozenset(("function_call_output", "custom_tool_call_output", "computer_call_output"))
_TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


@dataclass(slots=True)
class _Prompt(Prompt):
    """`kept`: tokens that lie at the provider, all of them within its context."""

    kept: int = 0


def read_prompt(body: Mapping[str, Any], model: str) -> Prompt:
    """All of a request that the model reads. Raises BadRequest, naming the field."""
    empty = prompt_for(model, REPLY_TOKENS)
    prompt = _Prompt(empty.image_tokens, empty.extra)
    if (instructions := optional(body, "instructions", str)) is not None:
        prompt.texts.append(instructions)
        prompt.extra += MESSAGE_TOKENS
    _read_input(body, prompt)
    _read_tools(body, prompt)
    for name in ("text", "tool_choice"):
        if isinstance(body.get(name), dict):
            prompt.add_json(body[name])
    if optional(body, "previous_response_id", str) is not None:
        prompt.kept = LARGEST_CONTEXT_TOKENS
    prompt.extra += min(prompt.kept, LARGEST_CONTEXT_TOKENS)
    return prompt


def _read_input(body: Mapping[str, Any], prompt: _Prompt) -> None:
    given = body.get("input")
    if isinstance(given, str):
        prompt.texts.append(given)
        prompt.extra += MESSAGE_TOKENS
        return
    items = objects(required(body, "input", list), "input")
    if len(items) > MAX_MESSAGES:
        problem = f"array too long. Expected an array with maximum length {MAX_MESSAGES}"
        raise invalid("input", problem, "array_above_max_length")
    for i, item in enumerate(items):
        _read_item(item, f"input[{i}].", prompt)


def kind_of(item: Mapping[str, Any], where: str) -> str:
    """What an item of the input is. Two kinds may leave out their name."""
    return optional(item, "type", str, where) or ("message" if "role" in item else "item_reference")


def _read_item(item: dict[str, Any], where: str, prompt: _Prompt) -> None:
    """One item. A type whose cost is unknown is refused: what cannot be held for is not sent."""
    _ITEM_FIELDS.refuse_misspelt(item, where)
    kind = kind_of(item, where)
    prompt.extra += MESSAGE_TOKENS
    if kind == "message":
        prompt.texts.append(required(item, "role", str, where))
        _read_content(item.get("content"), where + "content", prompt)
    elif kind == "reasoning":
        _read_reasoning(item, where, prompt)
    elif kind == "compaction":
        prompt.extra += _encrypted_tokens(required(item, "encrypted_content", str, where))
    elif kind == "item_reference":
        required(item, "id", str, where)
        prompt.kept += LARGEST_CONTEXT_TOKENS
    elif kind in _OUTPUTS:
        prompt.add_json({name: value for name, value in item.items() if name != "output"})
        output = item.get("output")
        _read_content([output] if isinstance(output, dict) else output, where + "output", prompt)
    elif kind in _TEXT_ITEMS:
        prompt.add_json(item)
    else:
        raise invalid(where + "type", "items of this type are not offered, since their cost is not known")


def _read_reasoning(item: dict[str, Any], where: str, prompt: _Prompt) -> None:
    """Earlier thoughts: encrypted, in plain text (open models), or kept at the provider under their id."""
    for name in ("summary", "content"):
        _read_content(optional(item, name, list, where), where + name, prompt)
    encrypted = optional(item, "encrypted_content", str, where)
    if encrypted is not None:
        prompt.extra += _encrypted_tokens(encrypted)
    elif not item.get("content"):
        prompt.kept += EARLIER_REASONING_TOKENS


def _encrypted_tokens(encrypted: str) -> int:
    return -(-len(encrypted) // ENCRYPTED_CHARS_PER_TOKEN)


def _read_content(content: object, where: str, prompt: Prompt) -> None:
    read_content(content, where, prompt.texts.append, partial(_read_part, prompt=prompt))


def _read_part(part: dict[str, Any], where: str, prompt: Prompt) -> None:
    _PART_FIELDS.refuse_misspelt(part, where)
    kind = required(part, "type", str, where)
    if kind in _TEXT_PARTS:
        prompt.texts.append(required(part, "text", str, where))
    elif kind == "refusal":
        prompt.texts.append(required(part, "refusal", str, where))
    elif kind in ("input_image", "computer_screenshot"):
        _refuse_stored(part, where)
        required(part, "image_url", str, where)
        prompt.extra += image_tokens(part, where, prompt)
    elif kind == "input_file":
        prompt.extra += _file_tokens(part, where)
    elif kind == "input_audio":
        audio = required(part, kind, dict, where)
        prompt.extra += audio_tokens(required(audio, "data", str, f"{where}{kind}."))
    else:
        expected = "'input_text', 'output_text', 'refusal', 'input_image', 'input_file' and 'input_audio'"
        raise invalid(where + "type", f"expected one of {expected}")


def _file_tokens(part: dict[str, Any], where: str) -> int:
    """A file at some address may be as long as the context."""
    _refuse_stored(part, where)
    if optional(part, "file_url", str, where) is not None:
        return LARGEST_CONTEXT_TOKENS
    return file_tokens(required(part, "file_data", str, where))


def _refuse_stored(part: dict[str, Any], where: str) -> None:
    if part.get("file_id") is not None:
        problem = "files are accepted in the request only, since the cost and owner of a stored one are unknown"
        raise invalid(where + "file_id", problem)


# Tools ----------------------------------------------------------------------------------------------------------------


def _read_tools(body: Mapping[str, Any], prompt: Prompt) -> None:
    tools = _tools(body)
    for where, tool in tools:
        _TOOL_FIELDS.refuse_misspelt(tool, where)
        if required(tool, "type", str, where) == "image_generation":
            raise invalid(where + "type", "images are made by another model, at a price that is not known beforehand")
    if tools:
        prompt.extra += TOOLS_TOKENS
    if given := body.get("tools"):
        prompt.add_json(given)
    if any(tool["type"] not in _PLAIN_TOOLS for _, tool in tools):
        prompt.extra += OWN_TOOLS_TOKENS
    rounds = server_tool_calls(body)
    prompt.extra += min(ROUND_TOKENS * rounds * (rounds + 1) // 2, LARGEST_CONTEXT_TOKENS)


def _tools(body: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """All tools that the model may use, each with where it stands: the call's, and those that come with its input."""
    holders: list[tuple[Mapping[str, Any], str]] = [(body, "")]
    given = body.get("input")
    for i, item in enumerate(given if isinstance(given, list) else ()):
        if item.get("type") in _TOOL_ITEMS:
            holders.append((item, f"input[{i}]."))
    return [
        (f"{where}tools[{i}].", tool)
        for holder, where in holders
        for i, tool in enumerate(objects(optional(holder, "tools", list, where) or [], f"{where}tools"))
    ]


def server_tool_calls(body: Mapping[str, Any]) -> int:
    """How often the provider may run tools of its own in one answer: the caller's bound, or the gateway's."""
    asked = positive(body, "max_tool_calls", at_most=MAX_TOOL_CALLS)
    if all(tool["type"] in _CALLERS_TOOLS for _, tool in _tools(body)):
        return 0
    return asked or DEFAULT_TOOL_CALLS


def web_searches(body: Mapping[str, Any], model: str) -> int:
    """How many web searches may be billed."""
    kinds = [tool["type"] for _, tool in _tools(body)]
    if any("search" in kind and kind not in _NO_SEARCHES for kind in kinds):
        return server_tool_calls(body)
    return int("-search" in model)
