"""The providers, a line each: all that differs between them. Pure.

A caller names a model and a provider's name at most; where a call goes comes from here and from the settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import quote, urlsplit


class Auth(NamedTuple):
    """How a key is sent: in which header, and what stands before it there."""

    header: str
    prefix: str = ""


class Paths(NamedTuple):
    """Where a dialect is spoken, below a provider's base URL: whole answers, streams, and the query for SSE."""

    whole: str
    stream: str
    sse_query: str = ""


@dataclass(frozen=True, slots=True)
class Provider:
    """One provider. `base_url` is None where it is each customer's own, and must be set.

    `paths` are by dialect: what is not there, the provider does not speak. `headers` are what its API always needs.
    `renames` are fields that it knows by another name only, and would refuse or overlook.
    `body_fields` are added to every body; where a path names the model, the body must not (see `model_in_path`).
    `price_id` is its name in genai-prices, None where a call costs nothing but the machine. `publisher` is whose models
    these are on Vertex AI, where a key is an access token of Google's.
    """

    name: str
    base_url: str | None
    paths: Mapping[str, Paths]
    auth: Auth
    price_id: str | None
    headers: tuple[tuple[str, str], ...] = ()
    renames: tuple[tuple[str, str], ...] = ()
    body_fields: tuple[tuple[str, str], ...] = ()
    publisher: str | None = None
    needs_key: bool = True

    @property
    def key_variable(self) -> str:
        """The name of the environment variable, or file, of the key."""
        return f"{self._prefix}_API_KEY"

    @property
    def secret_variable(self) -> str:
        """The name of the environment variable of the key's name in Secret Manager."""
        return f"{self.key_variable}_SECRET"

    @property
    def base_url_variable(self) -> str:
        """The name of the environment variable of the base URL."""
        return f"{self._prefix}_BASE_URL"

    @property
    def _prefix(self) -> str:
        return self.name.upper().replace("-", "_")

    def auth_headers(self, key: str) -> tuple[tuple[str, str], ...]:
        """The header that carries the key, or none for the empty key of a provider that needs none."""
        return ((self.auth.header, self.auth.prefix + key),) if key else ()

    def model_in_path(self, dialect: str) -> bool:
        """Whether the path names the model of such a call. Raises KeyError for a dialect that is not spoken."""
        return _MODEL in self.paths[dialect].whole


_MODEL = "{model}"

_BEARER = Auth("authorization", "Bearer ")

_OPENAI_PATHS = {
    "openai-chat": "/chat/completions",
    "openai-responses": "/responses",
    "openai-completions": "/completions",
    "openai-embeddings": "/embeddings",
}


def _same(paths: Mapping[str, str]) -> Mapping[str, Paths]:
    return MappingProxyType({dialect: Paths(path, path) for dialect, path in paths.items()})


def _openai(*names: str) -> Mapping[str, Paths]:
    return _same({f"openai-{name}": _OPENAI_PATHS[f"openai-{name}"] for name in names})


def _gemini(models: str) -> Mapping[str, Paths]:
    """Without `alt=sse` a stream is one JSON array, whose elements come as they are generated."""
    path, count = f"{models}/{_MODEL}", f"{models}/{_MODEL}:countTokens"
    return MappingProxyType(
        {
            "gemini-generate": Paths(f"{path}:generateContent", f"{path}:streamGenerateContent", "?alt=sse"),
            "gemini-count-tokens": Paths(count, count),
        }
    )


_ANTHROPIC = _same({"anthropic-messages": "/v1/messages", "anthropic-count-tokens": "/v1/messages/count_tokens"})

_VERTEX_ANTHROPIC = MappingProxyType(
    {
        "anthropic-messages": Paths(f"/models/{_MODEL}:rawPredict", f"/models/{_MODEL}:streamRawPredict"),
        "anthropic-count-tokens": Paths("/models/count-tokens:rawPredict", "/models/count-tokens:rawPredict"),
    }
)

_VERSION = (("anthropic-version", "2023-06-01"),)
_VERTEX_VERSION = (("anthropic_version", "vertex-2023-10-16"),)

# Their references have OpenAI's older name for the cap alone: a cap that is overlooked is held for and not kept.
_OLD_CAP = (("max_completion_tokens", "max_tokens"),)

# What each speaks is what its own reference lists, deprecated APIs left out.
# fmt: off
_REGISTRY = (
    Provider("openai", "https://api.openai.com/v1", _openai("chat", "responses", "completions", "embeddings"), _BEARER, "openai"),  # noqa: E501
    Provider("anthropic", "https://api.anthropic.com", _ANTHROPIC, Auth("x-api-key"), "anthropic", headers=_VERSION),
    Provider("gemini", "https://generativelanguage.googleapis.com", _gemini("/v1beta/models"), Auth("x-goog-api-key"), "google"),  # noqa: E501
    Provider("vertex", None, _gemini("/models"), _BEARER, "google", publisher="google"),
    Provider("vertex-anthropic", None, _VERTEX_ANTHROPIC, _BEARER, "google", body_fields=_VERTEX_VERSION, publisher="anthropic"),  # noqa: E501
    Provider("azure", None, _openai("chat", "responses", "completions", "embeddings"), Auth("api-key"), "azure"),
    Provider("groq", "https://api.groq.com/openai/v1", _openai("chat", "responses"), _BEARER, "groq"),
    Provider("mistral", "https://api.mistral.ai/v1", _openai("chat", "embeddings"), _BEARER, "mistral", renames=_OLD_CAP),  # noqa: E501
    Provider("deepseek", "https://api.deepseek.com/v1", _openai("chat"), _BEARER, "deepseek", renames=_OLD_CAP),
    Provider("xai", "https://api.x.ai/v1", _openai("chat", "responses"), _BEARER, "x-ai"),
    Provider("together", "https://api.together.xyz/v1", _openai("chat", "completions", "embeddings"), _BEARER, "together", renames=_OLD_CAP),  # noqa: E501
    Provider("openrouter", "https://openrouter.ai/api/v1", _openai("chat", "responses", "completions", "embeddings"), _BEARER, "openrouter"),  # noqa: E501
    Provider("local", "http://127.0.0.1:8000/v1", _openai("chat", "responses", "completions", "embeddings"), _BEARER, None, needs_key=False),  # noqa: E501
)
# fmt: on

PROVIDERS: Mapping[str, Provider] = MappingProxyType({provider.name: provider for provider in _REGISTRY})

_MULTI_REGIONS = ("us", "eu")


def vertex_base_url(publisher: str, project: str, location: str) -> str:
    """Where a publisher's models are on Vertex AI. `location` is `global`, a multi-region, or a region.

    Hosts: cloud.google.com/vertex-ai/generative-ai/docs/learn/locations, and as Google's and Anthropic's clients do.
    """
    if location == "global":
        host = "aiplatform.googleapis.com"
    elif location in _MULTI_REGIONS:
        host = f"aiplatform.{location}.rep.googleapis.com"
    else:
        host = f"{location}-aiplatform.googleapis.com"
    return f"https://{host}/v1/projects/{project}/locations/{location}/publishers/{publisher}"


def upstream_path(
    provider: Provider, dialect: str, model: str, base_url: str, *, stream: bool, sse: bool = True
) -> str:
    """The `:path`, with its query, of a call below `base_url`. `sse` is how a stream is framed, where that is a choice.

    `model` may be a caller's text: encoded (RFC 3986, 3.3), it stays in its segment whatever it holds.
    Raises KeyError for a dialect that the provider does not speak.
    """
    paths = provider.paths[dialect]
    path = paths.stream + (paths.sse_query if sse else "") if stream else paths.whole
    if _MODEL in path:
        # Vertex's names have an @ before their date. A lone surrogate cannot be encoded, and is in no model's name.
        path = path.replace(_MODEL, quote(model, safe="@", errors="replace"))
    return urlsplit(base_url).path.rstrip("/") + path
