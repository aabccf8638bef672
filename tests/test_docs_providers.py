"""docs/providers.md against the registry, the dialects and the paths: it cannot say what is not so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from extproc.dialects import CHAT, DIALECTS
from extproc.endpoints import SERVED, find
from extproc.envoy_config import TEMPLATE, chains
from extproc.form import DROPPABLE, Feature
from extproc.policy import doubts
from extproc.providers import PROVIDERS
from extproc.translation import chat_of

DOCS = Path(__file__).parents[1] / "docs" / "providers.md"

APIS = {
    "chat": "openai-chat",
    "responses": "openai-responses",
    "completions": "openai-completions",
    "embeddings": "openai-embeddings",
    "messages": "anthropic-messages",
    "count_tokens": "anthropic-count-tokens",
    "generateContent": "gemini-generate",
    "countTokens": "gemini-count-tokens",
}

FEATURES = {
    "several answers": Feature.CHOICES,
    "a temperature above 1": Feature.TEMPERATURE_ABOVE_1,
    "`top_k`": Feature.TOP_K,
    "stop sequences": Feature.STOP,
    "a seed": Feature.SEED,
    "a presence penalty": Feature.PRESENCE_PENALTY,
    "a frequency penalty": Feature.FREQUENCY_PENALTY,
    "a logit bias": Feature.LOGIT_BIAS,
    "log probabilities": Feature.LOGPROBS,
    "some of the tools only": Feature.TOOL_SUBSET,
    "no parallel tool calls": Feature.SERIAL_TOOL_CALLS,
    "JSON mode": Feature.JSON_MODE,
    "a JSON schema": Feature.JSON_SCHEMA,
    "reasoning effort, thinking": Feature.REASONING,
    "images, as data": Feature.IMAGE,
    "images, by URL": Feature.IMAGE_URL,
    "PDFs, as data": Feature.DOCUMENT,
    "PDFs, by URL": Feature.DOCUMENT_URL,
    "audio": Feature.AUDIO,
    "media in a tool's result": Feature.TOOL_RESULT_MEDIA,
}


def table(heading: str) -> list[list[str]]:
    """The rows of the table whose first column has this heading, and the headings above them."""
    lines = DOCS.read_text().splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [rows[0], *rows[2:]]


def test_every_provider_has_its_row() -> None:
    _, *rows = table("name")
    assert [row[0].strip("`") for row in rows] == list(PROVIDERS)
    for name, _, key, base_url, apis in rows:
        provider = PROVIDERS[name.strip("`")]
        assert key.startswith(f"`{provider.key_variable}`")
        assert ("Google's credentials" in key) == (provider.publisher is not None)
        assert ("if it wants one" in key) == (not provider.needs_key)
        assert base_url == f"`{provider.base_url or provider.base_url_variable}`"
        assert [APIS[api] for api in apis.split(", ")] == list(provider.paths)


def test_every_api_is_answered_by_those_who_can() -> None:
    _, *rows = table("API")
    assert {APIS[row[0]] for row in rows} == set(DIALECTS)
    for api, paths, answered_by in rows:
        assert (answered_by == "every provider") == (APIS[api] in CHAT)
        first, *methods = re.findall(r"`([^`]+)`", paths)
        for path in (first, *(re.sub(r":\w+$", method, first) for method in methods)):
            assert path in SERVED
            endpoint = find(path.replace("{model}", "m"))
            assert endpoint is not None
            assert endpoint.dialect.name == APIS[api]


def test_what_does_not_translate_is_what_the_dialects_say() -> None:
    headings, *rows = table("asked for")
    dialects = [APIS[heading] for heading in headings[1:-1]]
    assert set(dialects) == {chat_of(provider) for provider in PROVIDERS.values()}
    assert [FEATURES[row[0]] for row in rows] == list(Feature)
    for asked, *can, dropped in rows:
        feature = FEATURES[asked]
        assert can == ["no" if feature in CHAT[dialect].cannot else "yes" for dialect in dialects]
        assert (dropped != "no") == (feature in DROPPABLE)


IDENTITY = "identity: {audiences: [a], issuers: [i], allow: ['*']}\n"
EXAMPLES = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.S)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_every_example_is_a_policy_that_envoy_has_chains_for(number: int) -> None:
    assert doubts(IDENTITY + EXAMPLES[number], chains(TEMPLATE.read_text())) == ()
