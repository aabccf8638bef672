"""The catalogue: names as OpenAI publishes them, dated and fine-tuned ones, unknown ones, and the policy's own word."""

from __future__ import annotations

import re

import pytest
import tiktoken
from genai_prices.data_snapshot import get_snapshot
from genai_prices.types import ModelInfo

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
def test_known_models(model: str, max_output_tokens: int, reasoning: bool, encoding: str) -> None:
    assert traits("openai", model, None) == ModelTraits(max_output_tokens, reasoning, encoding)


@pytest.mark.parametrize(
    "model", ["gpt-4.7", "gpt-4oo", "gpt-45", "gpt", "o", "o11", "llama-3.3-70b", "", "-", "ft:", "GPT-4o", "gpt-5.9"]
)
def test_a_name_that_only_begins_like_a_known_one_is_unknown(model: str) -> None:
    assert published("openai", model) is None
    assert traits("openai", model, None) == UNKNOWN


def test_another_providers_model_is_not_looked_up_among_openais() -> None:
    assert traits("anthropic", "gpt-4o", None) == UNKNOWN


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
)


def _openai() -> list[ModelInfo]:
    return next(provider for provider in get_snapshot().providers if provider.id == "openai").models


@pytest.mark.parametrize("model", [model.id for model in _openai() if not NOT_CHAT.fullmatch(model.id)])
def test_every_chat_model_with_a_price_is_in_the_catalogue(model: str) -> None:
    assert published("openai", model) is not None


@pytest.mark.parametrize(
    "model",
    ["gpt-3.5-turbo", "gpt-4", "gpt-4-turbo", "gpt-4o", "gpt-4o-mini", "gpt-4.1", "gpt-5", "o1", "o3", "o4-mini"],
)
def test_encodings_are_tiktokens(model: str) -> None:
    known = published("openai", model)
    assert known is not None
    assert known.encoding == tiktoken.encoding_name_for_model(model)
