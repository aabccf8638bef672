"""OpenAI's chat completions, which most other providers speak too."""

from extproc.dialects.openai_chat.calls import OpenAIChatCalls

__all__ = ["OpenAIChatCalls"]
