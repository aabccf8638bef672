"""Every API that is spoken here. A dialect is one folder, or file, and one line in this registry."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from extproc.dialects.dialect import Dialect
from extproc.dialects.openai_chat import OpenAIChatCalls

# By exact path: what is not here is not served.
DIALECTS: Mapping[str, Dialect] = MappingProxyType({"/v1/chat/completions": OpenAIChatCalls()})

SPOKEN = frozenset({"openai"})  # the providers that are called in one of them
