"""Every API that is spoken here. A dialect is one folder, or file, and one line in this registry.

`dialect.py` is what each one does, `fields.py` how JSON is read. The folders of chat all have

    calls.py            what the gate asks: checks of a request, what its native provider gets, pieces to meter
    prompts.py          what a prompt costs besides its words
    request_reader.py   a caller's request into the canonical form
    request_writer.py   the canonical form into a provider's request
    answers.py          whole answers, both ways
    stream_reader.py    a provider's stream into the canonical form
    stream_writer.py    the canonical form into a caller's stream
    errors.py           errors, both ways (for OpenAI's APIs in `openai_parts.py`)

and beside them what only this API needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from extproc.dialects.anthropic import AnthropicCountTokens, AnthropicMessages
from extproc.dialects.dialect import ChatDialect, Dialect
from extproc.dialects.gemini import GeminiCountTokens, GeminiGenerate
from extproc.dialects.openai_chat import OpenAIChat
from extproc.dialects.openai_completions import OpenAICompletions
from extproc.dialects.openai_embeddings import OpenAIEmbeddings
from extproc.dialects.openai_responses import OpenAIResponses

_CHAT: tuple[ChatDialect, ...] = (
    OpenAIChat(),
    OpenAIResponses(),
    AnthropicMessages(),
    GeminiGenerate(),
)
_OTHERS: tuple[Dialect, ...] = (
    OpenAICompletions(),
    OpenAIEmbeddings(),
    AnthropicCountTokens(),
    GeminiCountTokens(),
)

# By name: those that have the canonical form, so that each can be answered by each; and all.
CHAT: Mapping[str, ChatDialect] = MappingProxyType({dialect.name: dialect for dialect in _CHAT})
DIALECTS: Mapping[str, Dialect] = MappingProxyType({dialect.name: dialect for dialect in (*_CHAT, *_OTHERS)})
