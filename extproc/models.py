"""What the gateway must know of a model before it is called, as the providers publish it.

platform.openai.com/docs/models, platform.claude.com/docs/models, ai.google.dev/gemini-api/docs/models,
console.groq.com/docs/models, api-docs.deepseek.com, docs.x.ai and docs.mistral.ai.

A model is the same wherever it is hosted, so its name is enough: OpenRouter's `anthropic/claude-sonnet-4.5` is Vertex's
`claude-sonnet-4-5@20250929`. A name is found by its longest known prefix that ends where a suffix begins, so that
`gpt-4o-2024-08-06` is `gpt-4o`; but `gpt-4.7` is not `gpt-4`, nor is `claude-opus-4-9` `claude-opus-4`.
A rule of the policy overrides what is here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from extproc.limits import MAX_CACHED_TRAITS
from extproc.records import ModelRule, ModelTraits

O200K, CL100K = "o200k_base", "cl100k_base"

# For a name that is not known: taken to think unseen, so that its cap is held for and sent along. The cap is the
# largest that most models accept; `max_output_tokens` in the policy's rule sets another.
UNKNOWN = ModelTraits(16_384, True, O200K)

_FINE_TUNED = "ft:"
_SUFFIX = re.compile(r"(?!-[0-9]{1,2}(?:-|$))[-:@]")  # a short number is a version: another model's name

# Largest answer in tokens, whether it thinks unseen unless it is told not to, encoding (OpenAI's for all, since the
# others publish none): names. Whoever hosts another's model can leave its thoughts out, so that all which think by
# themselves count as unseen. Where only a window that prompt and answer share is published (Mistral, xAI), the cap is
# one that leaves room for a prompt: with a cap of the whole window a call is refused.
_MODELS: tuple[tuple[int, bool, str, str], ...] = (
    (4_096, False, CL100K, "gpt-3.5-0301 gpt-3.5-turbo gpt-35-turbo gpt-4-turbo gpt-4-vision-preview"),
    (4_096, False, CL100K, "gpt-4-1106-preview gpt-4-1106-vision-preview gpt-4-0125-preview"),
    (16_384, False, CL100K, "gpt-3.5-turbo-16k gpt-35-turbo-16k"),
    (8_192, False, CL100K, "gpt-4"),
    (32_768, False, CL100K, "gpt-4-32k"),
    (4_096, False, O200K, "gpt-4o-2024-05-13"),
    (16_384, False, O200K, "gpt-4o gpt-4o-mini chatgpt-4o-latest gpt-audio gpt-4.5-preview gpt-5-chat"),
    (65_536, False, O200K, "gpt-4o:extended"),
    (32_768, False, O200K, "gpt-4.1"),
    (100_000, True, O200K, "o1 o3 o4-mini codex-mini"),
    (32_768, True, O200K, "o1-preview"),
    (65_536, True, O200K, "o1-mini"),
    (128_000, True, O200K, "gpt-5 gpt-5.1 gpt-5.2 gpt-5.3-codex gpt-5.4 gpt-5.5 gpt-5.6 gpt-6 gpt-6.1"),
    (272_000, True, O200K, "gpt-5-pro"),
    (16_384, True, O200K, "gpt-5.1-chat gpt-5.2-chat gpt-5.3 gpt-5.5-chat gpt-chat-latest chat-latest"),
    (1_024, True, O200K, "computer-use"),
    (65_536, True, O200K, "gpt-oss gpt-oss-safeguard"),
    (16_384, True, O200K, "gpt-rosalind"),
    # Anthropic: thinking has to be asked for up to 4.8, and is there by itself from 5 on.
    (4_096, False, O200K, "claude-v1 claude-2 claude-2-0 claude-2-1 claude-3-haiku claude-3-opus claude-3-sonnet"),
    (8_192, False, O200K, "claude-3-5-haiku claude-3-5-sonnet"),
    (32_000, False, O200K, "claude-opus-4 claude-opus-4-0 claude-opus-4-1 claude-4-opus"),
    (64_000, False, O200K, "claude-3-7-sonnet claude-sonnet-4 claude-sonnet-4-0 claude-4-sonnet claude-sonnet-4-5"),
    (64_000, False, O200K, "claude-haiku-4-5 claude-opus-4-5"),
    (64_000, True, O200K, "claude-3-7-sonnet:thinking"),
    (128_000, False, O200K, "claude-opus-4-6 claude-opus-4-7 claude-opus-4-8 claude-sonnet-4-6"),
    (128_000, True, O200K, "claude-sonnet-5 claude-sonnet-5-5 claude-opus-5 claude-opus-5-5 claude-haiku-5-5"),
    (128_000, True, O200K, "claude-fable-5 claude-fable-5-1 claude-fable-5-2 claude-mythos-5 claude-mythos-5-2"),
    # Google
    (8_192, False, O200K, "gemini-pro gemini-1.0-pro gemini-1.5-flash gemini-1.5-pro gemini-flash-1.5 gemini-pro-1.5"),
    (8_192, False, O200K, "gemini-2.0-flash gemini-2.0-flash-lite gemma-2 gemma-3 gemma-3n"),
    (65_536, False, O200K, "gemini-2.5-flash-lite"),
    (65_536, True, O200K, "gemini-2.0-flash-thinking gemini-2.5-flash gemini-2.5-pro gemini-3-flash gemini-3-pro"),
    (65_536, True, O200K, "gemini-3.1-flash gemini-3.1-pro gemini-3.5-flash gemini-3.6-flash gemini-3.7-flash"),
    (65_536, True, O200K, "gemini-3.8-flash gemini-4-argon gemini-4-carbon gemini-4-hydrogen"),
    (65_536, True, O200K, "gemini-flash-latest gemini-flash-lite-latest gemini-pro-latest"),
    # Others, at home and where they are hosted
    (8_192, False, O200K, "deepseek-chat llama-4-maverick llama-4-scout"),
    (65_536, True, O200K, "deepseek-reasoner"),
    (384_000, True, O200K, "deepseek-v4-flash deepseek-v4-pro deepseek-flash"),
    (32_768, False, O200K, "llama-3.3-70b-versatile"),
    (131_072, False, O200K, "llama-3.1-8b-instant"),
    (40_960, True, O200K, "qwen3-32b magistral"),
    (16_384, False, O200K, "kimi-k2-instruct grok-2 grok-2-vision"),
    (65_536, False, O200K, "grok-3 grok-3-fast grok-4-fast-non-reasoning grok-4-1-fast-non-reasoning"),
    (65_536, True, O200K, "grok-3-mini grok-3-mini-fast grok-4 grok-4-fast grok-4-1-fast grok-4.20 grok-4.3 grok-4.5"),
    (65_536, True, O200K, "grok-4.6 grok-4.7 grok-code-fast grok-code-fast-1 grok-build-0.1"),
    (
        16_384,
        False,
        O200K,
        "mistral-7b mistral-tiny mistral-small mistral-medium mistral-large mistral-nemo",
    ),
    (
        16_384,
        False,
        O200K,
        "mistral-saba open-mistral-7b open-mistral-nemo open-mixtral ministral codestral devstral pixtral mixtral",
    ),
)

_BY_NAME = {
    name: ModelTraits(max_output_tokens, reasoning, encoding)
    for max_output_tokens, reasoning, encoding, names in _MODELS
    for name in names.split()
}


def traits(provider: str, model: str, rule: ModelRule | None) -> ModelTraits:
    """What is known of a provider's model, with what the policy's rule says instead. Never fails: see UNKNOWN."""
    known = published(provider, model) or UNKNOWN
    if rule is None:
        return known
    return replace(
        known,
        max_output_tokens=rule.max_output_tokens or known.max_output_tokens,
        reasoning=known.reasoning if rule.reasoning is None else rule.reasoning,
    )


@lru_cache(maxsize=MAX_CACHED_TRAITS)
def published(provider: str, model: str) -> ModelTraits | None:
    """What is published of a model, or None where its name is not known here.

    A server of one's own gives any model any name, and a window of its own: nothing is known of it.
    """
    if provider == "local":
        return None
    name = model.rpartition("/")[2].removeprefix(_FINE_TUNED)
    if name.startswith("claude-"):
        name = name.replace(".", "-")
    ends = [len(name), *(suffix.start() for suffix in reversed(list(_SUFFIX.finditer(name))))]
    return next((_BY_NAME[name[:end]] for end in ends if name[:end] in _BY_NAME), None)
