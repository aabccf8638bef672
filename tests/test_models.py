"""The catalogue: names as they are published, dated and fine-tuned ones, unknown ones, and the policy's own word."""

from __future__ import annotations

import re

import pytest
import tiktoken
from genai_prices.data_snapshot import get_snapshot

from extproc.models import CL100K, O200K, UNKNOWN, published, traits
from extproc.records import ModelRule, ModelTraits


@pytest.mark.parametrize(
    ("model", "max_output_tokens", "reasoning", "encoding"),
    [
        ("gpt-3.5-turbo", 4_096, False, CL100K),
        ("gpt-3.5-turbo-0125", 4_096, False, CL100K),
        ("gpt-3.5-turbo-16k-0613", 16_384, False, CL100K),
        ("gpt-4", 8_192, False, CL100K),
        ("gpt-4-0613", 8_192, False, CL100K),
        ("gpt-4-32k-0314", 32_768, False, CL100K),
        ("gpt-4-turbo-2024-04-09", 4_096, False, CL100K),
        ("gpt-4-1106-preview", 4_096, False, CL100K),
        ("gpt-4o", 16_384, False, O200K),
        ("gpt-4o-2024-05-13", 4_096, False, O200K),
        ("gpt-4o-2024-11-20", 16_384, False, O200K),
        ("gpt-4o-mini-2024-07-18", 16_384, False, O200K),
        ("chatgpt-4o-latest", 16_384, False, O200K),
        ("gpt-4.1-nano-2025-04-14", 32_768, False, O200K),
        ("o1-2024-12-17", 100_000, True, O200K),
        ("o1-mini-2024-09-12", 65_536, True, O200K),
        ("o1-preview", 32_768, True, O200K),
        ("o3-mini", 100_000, True, O200K),
        ("o4-mini-2025-04-16", 100_000, True, O200K),
        ("gpt-5-2025-08-07", 128_000, True, O200K),
        ("gpt-5-nano", 128_000, True, O200K),
        ("gpt-5-chat-latest", 16_384, False, O200K),
        ("gpt-5-pro-2025-10-06", 272_000, True, O200K),
        ("gpt-5.1-chat-latest", 16_384, True, O200K),
        ("gpt-5.6-sol", 128_000, True, O200K),
        ("gpt-6.1-terra-2026-11-01", 128_000, True, O200K),
        ("ft:gpt-4o-mini-2024-07-18:my-org::abc123", 16_384, False, O200K),
        ("ft:gpt-3.5-turbo:my-org:x:y", 4_096, False, CL100K),
    ],
)
def test_openais_models(model: str, max_output_tokens: int, reasoning: bool, encoding: str) -> None:
    assert traits("openai", model, None) == ModelTraits(max_output_tokens, reasoning, encoding)


@pytest.mark.parametrize(
    "model", ["gpt-4.7", "gpt-4oo", "gpt-45", "gpt", "o", "o11", "llama-3.3-70b", "", "-", "ft:", "GPT-4o", "gpt-5.9"]
)
def test_a_name_that_only_begins_like_a_known_one_is_unknown(model: str) -> None:
    assert published("openai", model) is None
    assert traits("openai", model, None) == UNKNOWN


@pytest.mark.parametrize(
    ("target", "max_output_tokens", "reasoning"),
    [
        ("anthropic/claude-3-haiku-20240307", 4_096, False),
        ("anthropic/claude-3-5-sonnet-20241022", 8_192, False),
        ("anthropic/claude-opus-4-1-20250805", 32_000, False),
        ("anthropic/claude-sonnet-4-20250514", 64_000, False),
        ("anthropic/claude-opus-4-8", 128_000, False),
        ("anthropic/claude-opus-5", 128_000, True),
        ("anthropic/claude-haiku-5-5", 128_000, True),
        ("vertex-anthropic/claude-sonnet-4-5@20250929", 64_000, False),
        ("vertex-anthropic/claude-3-5-sonnet-v2@20241022", 8_192, False),
        ("openrouter/anthropic/claude-sonnet-4.5", 64_000, False),
        ("openrouter/anthropic/claude-3.7-sonnet:thinking", 64_000, True),
        ("openrouter/openai/gpt-4o:extended", 65_536, False),
        ("openrouter/openai/gpt-4o-mini", 16_384, False),
        ("openrouter/google/gemini-2.5-pro", 65_536, True),
        ("openrouter/deepseek/deepseek-v4-flash", 384_000, True),
        ("gemini/gemini-2.0-flash-001", 8_192, False),
        ("gemini/gemini-2.0-flash-thinking-exp", 65_536, True),
        ("gemini/gemini-2.5-flash", 65_536, True),
        ("gemini/gemini-2.5-flash-lite-preview-09-2025", 65_536, False),
        ("gemini/gemini-3-pro-preview", 65_536, True),
        ("gemini/models/gemini-3.8-flash", 65_536, True),
        ("vertex/gemini-4-argon", 65_536, True),
        ("azure/gpt-5-mini", 128_000, True),
        ("azure/gpt-4o", 16_384, False),
        ("groq/llama-3.3-70b-versatile", 32_768, False),
        ("groq/openai/gpt-oss-120b", 65_536, True),
        ("groq/qwen/qwen3-32b", 40_960, True),
        ("deepseek/deepseek-reasoner", 65_536, True),
        ("mistral/mistral-large-latest", 16_384, False),
        ("mistral/magistral-medium-2509", 40_960, True),
        ("xai/grok-4-0709", 65_536, True),
        ("xai/grok-4-fast-reasoning", 65_536, True),
        ("xai/grok-4-fast-non-reasoning-latest", 65_536, False),
        ("xai/grok-3-mini-beta", 65_536, True),
    ],
)
def test_other_providers_models(target: str, max_output_tokens: int, reasoning: bool) -> None:
    provider, _, model = target.partition("/")
    assert traits(provider, model, None) == ModelTraits(max_output_tokens, reasoning, O200K)


@pytest.mark.parametrize(
    "model",
    [
        "claude-opus-4-9",
        "claude-opus-4-9-20270101",
        "claude-opus-6",
        "claude-3-5",
        "gemini-2.7-pro",
        "grok-4.8",
        "mistral-large-4",
    ],
)
def test_the_next_version_is_another_model(model: str) -> None:
    assert traits("openrouter", model, None) == UNKNOWN


def test_a_server_of_ones_own_calls_its_models_what_it_likes() -> None:
    assert traits("local", "gpt-4o", None) == UNKNOWN
    assert traits("local", "gpt-4o", ModelRule("gpt-4o", (), 500, False)) == ModelTraits(500, False, O200K)


@pytest.mark.parametrize(
    ("max_output_tokens", "reasoning", "expected"),
    [
        (None, None, ModelTraits(16_384, False, O200K)),
        (500, None, ModelTraits(500, False, O200K)),
        (200_000, True, ModelTraits(200_000, True, O200K)),
    ],
)
def test_the_policy_overrides(max_output_tokens: int | None, reasoning: bool | None, expected: ModelTraits) -> None:
    rule = ModelRule("gpt-4o", (), max_output_tokens, reasoning)
    assert traits("openai", "gpt-4o", rule) == expected


def test_the_policy_can_say_that_a_model_does_not_think() -> None:
    assert traits("openai", "o3", ModelRule("o3", (), None, False)).reasoning is False


NOT_CHAT = re.compile(
    r"(text-)?(ada|babbage|curie|davinci)\b.*|.*(image|realtime|transcribe|whisper|tts|moderation|embedding|live).*"
    r"|gemini-(nano-banana|omni|robotics).*|gemma-4.*|grok-voice.*"
)


def _chat_models(*price_ids: str) -> list[str]:
    providers = [provider for provider in get_snapshot().providers if provider.id in price_ids]
    names = [model.id for provider in providers for model in provider.models]
    return sorted({name for name in names if not NOT_CHAT.fullmatch(name)})


@pytest.mark.parametrize("model", _chat_models("openai", "anthropic", "google", "x-ai"))
def test_every_chat_model_with_a_price_is_in_the_catalogue(model: str) -> None:
    assert published("openrouter", model) is not None


@pytest.mark.parametrize(
    "model",
    ["gpt-3.5-turbo", "gpt-4", "gpt-4-turbo", "gpt-4o", "gpt-4o-mini", "gpt-4.1", "gpt-5", "o1", "o3", "o4-mini"],
)
def test_encodings_are_tiktokens(model: str) -> None:
    known = published("openai", model)
    assert known is not None
    assert known.encoding == tiktoken.encoding_name_for_model(model)
