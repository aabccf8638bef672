"""What the gateway must know of a model before it is called, as OpenAI publishes it (platform.openai.com/docs/models).

A name is found by its longest known prefix that ends where a suffix begins, so that `gpt-4o-2024-08-06` is `gpt-4o` and
`gpt-4.7` is not `gpt-4`. A rule of the policy overrides what is here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from extproc.limits import MAX_CACHED_TRAITS
from extproc.records import ModelRule, ModelTraits

O200K, CL100K = "o200k_base", "cl100k_base"

# For a name that is not known: taken to think unseen, so that its cap is held for and sent along. The cap is the
# largest that most models accept; `max_output_tokens` in the policy's rule sets another.
UNKNOWN = ModelTraits(16_384, True, O200K)

_FINE_TUNED = "ft:"
_SUFFIXES = "-:@"

# Largest answer in tokens, whether it thinks unseen, encoding: names.
_OPENAI: tuple[tuple[int, bool, str, str], ...] = (
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
    (131_072, True, O200K, "gpt-oss gpt-oss-safeguard"),
    (16_384, True, O200K, "gpt-rosalind"),
)

_BY_NAME = {
    name: ModelTraits(max_output_tokens, reasoning, encoding)
    for max_output_tokens, reasoning, encoding, names in _OPENAI
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
    """What the provider publishes, or None where the name is not known here."""
    if provider != "openai":
        return None
    name = model.removeprefix(_FINE_TUNED)
    ends = [len(name), *(end for end in range(len(name) - 1, 0, -1) if name[end] in _SUFFIXES)]
    return next((_BY_NAME[name[:end]] for end in ends if name[:end] in _BY_NAME), None)
