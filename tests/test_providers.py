"""The registry of providers: where a call goes, with which headers, and that no name of a model leads elsewhere."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.providers import PROVIDERS, upstream_path, vertex_base_url

VERTEX = "https://aiplatform.googleapis.com/v1/projects/p/locations/global/publishers/google"
VERTEX_PATH = "/v1/projects/p/locations/global/publishers/google"
CLAUDE_PATH = "/v1/projects/p/locations/global/publishers/anthropic"
BASE_URLS = {
    **{name: provider.base_url for name, provider in PROVIDERS.items()},
    "vertex": VERTEX,
    "vertex-anthropic": vertex_base_url("anthropic", "p", "global"),
    "azure": "https://my.openai.azure.com/openai/v1",
}

DIALECTS = {
    "openai-chat",
    "openai-responses",
    "openai-completions",
    "openai-embeddings",
    "anthropic-messages",
    "anthropic-count-tokens",
    "gemini-generate",
    "gemini-count-tokens",
}

# Provider, dialect, model, and the paths of a whole answer and of a stream.
PATHS = [
    ("openai", "openai-chat", "gpt-4o", "/v1/chat/completions", "/v1/chat/completions"),
    ("openai", "openai-responses", "gpt-4o", "/v1/responses", "/v1/responses"),
    ("openai", "openai-completions", "gpt-4o", "/v1/completions", "/v1/completions"),
    ("openai", "openai-embeddings", "e", "/v1/embeddings", "/v1/embeddings"),
    ("anthropic", "anthropic-messages", "claude", "/v1/messages", "/v1/messages"),
    ("anthropic", "anthropic-count-tokens", "claude", "/v1/messages/count_tokens", "/v1/messages/count_tokens"),
    (
        "gemini",
        "gemini-generate",
        "gemini-2.5-pro",
        "/v1beta/models/gemini-2.5-pro:generateContent",
        "/v1beta/models/gemini-2.5-pro:streamGenerateContent?alt=sse",
    ),
    ("gemini", "gemini-count-tokens", "g", "/v1beta/models/g:countTokens", "/v1beta/models/g:countTokens"),
    (
        "vertex",
        "gemini-generate",
        "gemini-2.5-pro",
        f"{VERTEX_PATH}/models/gemini-2.5-pro:generateContent",
        f"{VERTEX_PATH}/models/gemini-2.5-pro:streamGenerateContent?alt=sse",
    ),
    (
        "vertex",
        "gemini-count-tokens",
        "g",
        f"{VERTEX_PATH}/models/g:countTokens",
        f"{VERTEX_PATH}/models/g:countTokens",
    ),
    (
        "vertex-anthropic",
        "anthropic-messages",
        "claude-sonnet-4-5@20250929",
        f"{CLAUDE_PATH}/models/claude-sonnet-4-5@20250929:rawPredict",
        f"{CLAUDE_PATH}/models/claude-sonnet-4-5@20250929:streamRawPredict",
    ),
    (
        "vertex-anthropic",
        "anthropic-count-tokens",
        "claude-sonnet-4-5@20250929",
        f"{CLAUDE_PATH}/models/count-tokens:rawPredict",
        f"{CLAUDE_PATH}/models/count-tokens:rawPredict",
    ),
    ("azure", "openai-responses", "mine", "/openai/v1/responses", "/openai/v1/responses"),
    ("groq", "openai-chat", "m", "/openai/v1/chat/completions", "/openai/v1/chat/completions"),
    ("mistral", "openai-embeddings", "m", "/v1/embeddings", "/v1/embeddings"),
    ("deepseek", "openai-chat", "m", "/v1/chat/completions", "/v1/chat/completions"),
    ("xai", "openai-responses", "m", "/v1/responses", "/v1/responses"),
    ("together", "openai-completions", "m", "/v1/completions", "/v1/completions"),
    ("openrouter", "openai-chat", "openai/gpt-4o", "/api/v1/chat/completions", "/api/v1/chat/completions"),
    ("local", "openai-chat", "m", "/v1/chat/completions", "/v1/chat/completions"),
]


def path(provider: str, dialect: str, model: str, *, stream: bool = False, sse: bool = True) -> str:
    base_url = BASE_URLS[provider]
    assert base_url is not None
    return upstream_path(PROVIDERS[provider], dialect, model, base_url, stream=stream, sse=sse)


@pytest.mark.parametrize(
    ("provider", "dialect", "model", "whole", "stream"), PATHS, ids=[f"{row[0]}-{row[1]}" for row in PATHS]
)
def test_where_a_call_goes(provider: str, dialect: str, model: str, whole: str, stream: str) -> None:
    assert path(provider, dialect, model) == whole
    assert path(provider, dialect, model, stream=True) == stream


def test_a_stream_of_geminis_may_be_a_json_array() -> None:
    expected = "/v1beta/models/g:streamGenerateContent"
    assert path("gemini", "gemini-generate", "g", stream=True, sse=False) == expected
    assert path("gemini", "gemini-generate", "g", sse=True) == "/v1beta/models/g:generateContent"


def test_a_base_url_may_end_in_a_slash_or_have_no_path() -> None:
    for base_url in ("http://h", "http://h/"):
        assert (
            upstream_path(PROVIDERS["anthropic"], "anthropic-messages", "m", base_url, stream=False) == "/v1/messages"
        )


def test_a_dialect_that_is_not_spoken_has_no_path() -> None:
    with pytest.raises(KeyError):
        path("anthropic", "openai-chat", "m")


IN_PATH = [
    (name, dialect)
    for name, provider in PROVIDERS.items()
    for dialect in provider.paths
    if provider.model_in_path(dialect)
]


def test_which_paths_name_the_model() -> None:
    assert IN_PATH == [
        ("gemini", "gemini-generate"),
        ("gemini", "gemini-count-tokens"),
        ("vertex", "gemini-generate"),
        ("vertex", "gemini-count-tokens"),
        ("vertex-anthropic", "anthropic-messages"),
    ]


HOSTILE = [
    "../../evil",
    "..",
    "a/../../b",
    "a?key=b",
    "a#b",
    "a%2fb",
    "%2e%2e%2f",
    "a:streamGenerateContent?alt=sse&x=",
    "a:countTokens",
    "a\r\nhost: evil",
    "a b",
    "",
    "é\u2028",
    "\ud800",
    "\\..\\",
    ";a",
    "{model}",
]


@pytest.mark.parametrize("model", HOSTILE, ids=ascii)
@pytest.mark.parametrize(("provider", "dialect"), IN_PATH)
def test_a_hostile_name_stays_in_its_segment(provider: str, dialect: str, model: str) -> None:
    check_in_its_segment(provider, dialect, model)


@given(st.sampled_from(IN_PATH), st.text())
def test_any_name_stays_in_its_segment(where: tuple[str, str], model: str) -> None:
    check_in_its_segment(*where, model)


def check_in_its_segment(provider: str, dialect: str, model: str) -> None:
    before, after = path(provider, dialect, "MODEL").split("MODEL")
    sent = path(provider, dialect, model)
    assert sent.startswith(before)
    assert sent.endswith(after)
    name = sent[len(before) : len(sent) - len(after)]
    assert name.isascii()
    assert not set(name) & set("/?#:;&=\\ \r\n")
    assert unquote(name, errors="strict") == model.encode(errors="replace").decode()


# The registry ---------------------------------------------------------------------------------------------------------


def test_only_known_dialects_are_spoken_and_every_one_somewhere() -> None:
    assert {dialect for provider in PROVIDERS.values() for dialect in provider.paths} == DIALECTS


@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_is_complete(name: str) -> None:
    provider = PROVIDERS[name]
    assert provider.name == name
    assert "/" not in name
    assert provider.paths
    for paths in provider.paths.values():
        assert paths.whole.startswith("/")
        assert paths.stream.startswith("/")
    if provider.base_url is not None and provider.needs_key:
        assert urlsplit(provider.base_url).scheme == "https"


def test_variables_are_each_providers_own() -> None:
    names = [name for one in PROVIDERS.values() for name in (one.key_variable, one.base_url_variable)]
    assert len(names) == len(set(names)) == 2 * len(PROVIDERS)
    assert PROVIDERS["vertex-anthropic"].key_variable == "VERTEX_ANTHROPIC_API_KEY"
    assert PROVIDERS["openai"].base_url_variable == "OPENAI_BASE_URL"


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        ("openai", ("authorization", "Bearer k")),
        ("anthropic", ("x-api-key", "k")),
        ("gemini", ("x-goog-api-key", "k")),
        ("vertex", ("authorization", "Bearer k")),
        ("vertex-anthropic", ("authorization", "Bearer k")),
        ("azure", ("api-key", "k")),
        ("groq", ("authorization", "Bearer k")),
        ("local", ("authorization", "Bearer k")),
    ],
)
def test_how_a_key_is_sent(provider: str, expected: tuple[str, str]) -> None:
    assert PROVIDERS[provider].auth_headers("k") == (expected,)
    assert PROVIDERS[provider].auth_headers("") == ()


def test_what_anthropics_apis_always_need() -> None:
    assert PROVIDERS["anthropic"].headers == (("anthropic-version", "2023-06-01"),)
    assert PROVIDERS["vertex-anthropic"].body_fields == (("anthropic_version", "vertex-2023-10-16"),)


@pytest.mark.parametrize(
    ("location", "host"),
    [
        ("global", "aiplatform.googleapis.com"),
        ("us", "aiplatform.us.rep.googleapis.com"),
        ("eu", "aiplatform.eu.rep.googleapis.com"),
        ("europe-west4", "europe-west4-aiplatform.googleapis.com"),
    ],
)
def test_where_vertex_is(location: str, host: str) -> None:
    expected = f"https://{host}/v1/projects/p/locations/{location}/publishers/google"
    assert vertex_base_url("google", "p", location) == expected
