"""What a prompt of Anthropic's may cost, besides the words in it. Holds are made from this: an upper bound, or it says.

Prices and sizes: https://platform.claude.com/docs/en/build-with-claude/{vision,pdf-support,token-counting}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from math import ceil
from typing import Any

import orjson

from extproc.dialects.fields import Names, dicts, invalid, objects, optional, read_content, required
from extproc.errors import BadRequest
from extproc.limits import DEFAULT_TOOL_CALLS, MAX_MESSAGES, MAX_TOOL_CALLS

MESSAGE_TOKENS = 5  # the role and the turn's marks
PROMPT_TOKENS = 8  # every prompt's own beginning and end
TOOLS_TOKENS = 1_000  # the system prompt that goes with tools: 313 to 804, by model and choice ("Tool use: pricing")
TOOL_SEARCH_TOKENS = 1_000  # a search for tools is explained, and what it finds is read again
CITATIONS_TOKENS = 750  # how to cite, once; 600 in the recorded answers
SCHEMA_TOKENS = 300  # how to keep to a schema; 60 to 180 there
THINKING_TOKENS = 48  # how to think; 16 to 30 there
# Texts are counted with OpenAI's encodings, which find fewer tokens than Claude's: up to half as many again are added,
# at four characters a token. Learned factors are about answers, whose texts are others.
CHARS_PER_EXTRA_TOKEN = 8
IMAGE_TOKENS = 4_784  # the most that one image may cost, in the models of the highest resolution
# A PDF is billed for its text and an image of each page. Assumes no more than a token a byte; never above the largest
# context that Anthropic sells, which is also what a document at some address is held for.
DOCUMENT_TOKENS = 5_000
LARGEST_CONTEXT_TOKENS = 1_000_000
# What Anthropic runs itself (searches, fetches, code, MCP) goes round by round: each reads all of the rounds before it
# again, and is billed for that as input. A turn of ten searches was recorded at 404,500 tokens. Ten rounds is where a
# turn is paused ("Server tools"). An estimate: neither a page's length nor the prompt that is read again is known.
SERVER_ROUNDS = 10
ROUND_TOKENS = 12_000

_MESSAGE_FIELDS = Names(("role", "content"))
_BLOCK_FIELDS = Names(("type", "text", "source", "content"))
_SOURCE_FIELDS = Names(("type", "data", "url", "file_id", "content", "media_type"))
_ROLES = ("user", "assistant", "system")


@dataclass(slots=True)
class Prompt:
    """What the provider will read, as it is found: texts to count, and tokens of all that is not text."""

    texts: list[str] = field(default_factory=list)
    extra: int = PROMPT_TOKENS

    def add(self, text: str) -> None:
        self.texts.append(text)
        self.extra += ceil(len(text) / CHARS_PER_EXTRA_TOKEN)

    def add_json(self, value: object) -> None:
        self.add(orjson.dumps(value).decode())


def read_prompt(body: Mapping[str, Any]) -> Prompt:
    """All of a request that the model reads. Raises BadRequest, naming the field."""
    prompt = Prompt()
    _read_content(body.get("system"), "system", prompt)
    messages = objects(required(body, "messages", list), "messages")
    if not messages:
        raise invalid("messages", "at least one message is required", "empty_array")
    if len(messages) > MAX_MESSAGES:
        raise invalid("messages", f"at most {MAX_MESSAGES} messages are accepted", "array_above_max_length")
    for i, message in enumerate(messages):
        _read_message(message, f"messages[{i}].", prompt)
    _read_tools(body, prompt)
    _read_settings(body, prompt)
    return prompt


def _read_settings(body: Mapping[str, Any], prompt: Prompt) -> None:
    """What is asked for beside the conversation, each with words of Anthropic's own."""
    for name in ("output_config", "output_format"):
        if (definition := optional(body, name, dict)) is not None:
            prompt.add_json(definition)
            prompt.extra += SCHEMA_TOKENS
    if optional(body, "thinking", dict) is not None:
        prompt.extra += THINKING_TOKENS
    management = optional(body, "context_management", dict) or {}
    if any("compact" in str(edit.get("type")) for edit in dicts(management.get("edits"))):
        prompt.texts *= 2  # to be summed up, the conversation is read once more
        prompt.extra *= 2


def _read_message(message: Mapping[str, Any], where: str, prompt: Prompt) -> None:
    _MESSAGE_FIELDS.refuse_misspelt(message, where)
    if required(message, "role", str, where) not in _ROLES:
        raise invalid(where + "role", "expected one of 'user', 'assistant' and 'system'")
    prompt.extra += MESSAGE_TOKENS
    if message.get("content") is None:
        required(message, "content", list, where)
    _read_content(message["content"], where + "content", prompt)


def _read_content(content: object, where: str, prompt: Prompt) -> None:
    read_content(content, where, prompt.add, partial(_read_block, prompt=prompt))


def _read_block(block: Mapping[str, Any], where: str, prompt: Prompt) -> None:
    """One block. One that is not known here is taken at its JSON's length: it is text, or a reference to what was."""
    _BLOCK_FIELDS.refuse_misspelt(block, where)
    match required(block, "type", str, where):
        case "text":
            prompt.add(required(block, "text", str, where))
        case "image":
            _read_source(block, where, prompt)
        case "document":
            for name in ("title", "context"):
                prompt.add(optional(block, name, str, where) or "")
            if optional(block, "citations", dict, where) is not None:
                prompt.extra += CITATIONS_TOKENS
            _read_source(block, where, prompt)
        case "tool_result":
            prompt.add(required(block, "tool_use_id", str, where))
            _read_content(block.get("content"), where + "content", prompt)
        case "container_upload":
            raise _stored(where + "file_id")
        case _:
            prompt.add_json(block)


def _read_source(block: Mapping[str, Any], where: str, prompt: Prompt) -> None:
    """What an image or a document costs. A file given by id lies at the provider, of unknown size and owner."""
    source = required(block, "source", dict, where)
    where += "source."
    _SOURCE_FIELDS.refuse_misspelt(source, where)
    kind, is_image = required(source, "type", str, where), block["type"] == "image"
    if kind == "base64":
        data = required(source, "data", str, where)
        prompt.extra += IMAGE_TOKENS if is_image else min(DOCUMENT_TOKENS + len(data) * 3 // 4, LARGEST_CONTEXT_TOKENS)
    elif kind == "url":
        required(source, "url", str, where)
        prompt.extra += IMAGE_TOKENS if is_image else LARGEST_CONTEXT_TOKENS
    elif kind == "text" and not is_image:
        prompt.add(required(source, "data", str, where))
    elif kind == "content" and not is_image:
        _read_content(source.get("content"), where + "content", prompt)
    elif kind == "file":
        raise _stored(where + "file_id")
    else:
        expected = "'base64' and 'url'" if is_image else "'base64', 'url', 'text' and 'content'"
        raise invalid(where + "type", f"expected one of {expected}")


def _stored(where: str) -> BadRequest:
    return invalid(
        where, "files are accepted in the request only, since the cost and owner of a stored one are unknown"
    )


# Tools ----------------------------------------------------------------------------------------------------------------

_TOOL_FIELDS = Names(("type", "name", "max_uses", "model"))

# Tools with a type of Anthropic's own that the caller runs, and the search for tools, which are in the request anyway.
_CALLERS_TOOLS = ("bash_", "text_editor_", "computer_", "memory_", "browser_", "tool_search_")


def _read_tools(body: Mapping[str, Any], prompt: Prompt) -> None:
    tools = objects(optional(body, "tools", list) or [], "tools")
    servers = objects(optional(body, "mcp_servers", list) or [], "mcp_servers")
    for i, tool in enumerate(tools):
        where = f"tools[{i}]."
        _TOOL_FIELDS.refuse_misspelt(tool, where)
        optional(tool, "type", str, where)
        if tool.get("model") is not None:  # an advisor is another model, at a price of its own
            message = "tools that ask another model are not offered: which models answer is this gateway's policy"
            raise invalid(where + "model", message, "unsupported_parameter")
        prompt.add_json(tool)
        prompt.extra += TOOL_SEARCH_TOKENS * str(tool.get("type")).startswith("tool_search_")
    if tools or servers:
        prompt.extra += TOOLS_TOKENS
    used = sum(_rounds(tool, f"tools[{i}].") for i, tool in enumerate(tools))
    rounds = SERVER_ROUNDS if servers else min(SERVER_ROUNDS, used)
    prompt.extra += ROUND_TOKENS * rounds * (rounds + 1) // 2


def _rounds(tool: Mapping[str, Any], where: str) -> int:
    """How often the provider may run a tool in one turn."""
    if is_custom(tool) or tool["type"].startswith(_CALLERS_TOOLS):
        return 0
    return max_uses(tool, where)


def is_custom(tool: Mapping[str, Any]) -> bool:
    """Whether a tool is a function of the caller's own."""
    return tool.get("type") in (None, "custom")


def max_uses(tool: Mapping[str, Any], where: str) -> int:
    """How often a tool of Anthropic's may be used: what the caller says, or what is assumed."""
    uses: int | None = optional(tool, "max_uses", int, where)
    if uses is not None and not 1 <= uses <= MAX_TOOL_CALLS:
        raise invalid(where + "max_uses", f"expected an integer of 1 to {MAX_TOOL_CALLS}")
    return DEFAULT_TOOL_CALLS if uses is None else uses


def web_searches(body: Mapping[str, Any]) -> int:
    """How many web searches may be billed."""
    tools = enumerate(body.get("tools") or ())
    return sum(max_uses(tool, f"tools[{i}].") for i, tool in tools if str(tool.get("type")).startswith("web_search_"))
