"""Every path that is served, and what it means: the whole list. What is not in it is 404.

Envoy has normalised the path before (dot segments, doubled slashes), and refuses an escaped slash. No other spelling
passes here: only a model's name is decoded.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import parse_qsl, unquote

from extproc.dialects import DIALECTS
from extproc.dialects.dialect import NO_ADDRESS, Address, Dialect
from extproc.errors import BadRequest
from extproc.limits import MAX_MODEL_NAME_CHARS

OPENAI, ANTHROPIC, GOOGLE = "openai-chat", "anthropic-messages", "gemini-generate"

_CALLS = {
    "/v1/chat/completions": OPENAI,
    "/v1/responses": "openai-responses",
    "/v1/completions": "openai-completions",
    "/v1/embeddings": "openai-embeddings",
    "/v1/messages": ANTHROPIC,
    "/v1/messages/count_tokens": "anthropic-count-tokens",
}
_GOOGLES_METHODS = {
    "generateContent": GOOGLE,
    "streamGenerateContent": GOOGLE,
    "countTokens": "gemini-count-tokens",
}
_MODELS, _GOOGLES_MODELS = "/v1/models", "/v1beta/models"
_FOLDERS = (_MODELS, _GOOGLES_MODELS)  # Google's newer clients ask for v1, unless they are told otherwise

SERVED = (
    *_CALLS,
    *(f"{folder}/{{model}}:{method}" for folder in _FOLDERS for method in _GOOGLES_METHODS),
    *_FOLDERS,
    *(f"{folder}/{{model}}" for folder in _FOLDERS),
)

# What the official clients always send, by which they are told apart where they share a path.
_SIGNS = {"anthropic-version": ANTHROPIC, "x-goog-api-client": GOOGLE}

# As RFC 3986, 3.3, writes segments.
_SEGMENTS = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})+")

# Google's parameters for credentials (cloud.google.com/apis/docs/system-parameters), which its API takes in the URL.
_CREDENTIALS = frozenset({"key", "access_token", "oauth_token"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a path asks for. `lists`: not a call, but the models, or the one that `address` names (see `offers`)."""

    dialect: Dialect
    address: Address = NO_ADDRESS
    method: str = "POST"
    lists: bool = False


# What is served at these paths, whatever else is in the request.
EXACT = {path: Endpoint(DIALECTS[name]) for path, name in _CALLS.items()}


def find(path: str, names: Collection[str] = ()) -> Endpoint | None:
    """What is served at a request's `:path`, its query included; None for nothing. `names` are its headers'.

    Of a query only `alt` is read. Raises BadRequest for a credential in it, which would end up in logs, and for an
    `alt` that is not spoken: `speaker` says in which dialect to put that.
    """
    bare, _, query = path.partition("?")
    endpoint = EXACT.get(bare) or _models(bare, query, names)
    if endpoint is not None and any(name in _CREDENTIALS for name, _ in _fields(query)):
        message = "A credential in a URL ends up in logs: send the ID token in the header authorization instead."
        raise BadRequest(message, code="credential_in_url", param="key")
    return endpoint


def speaker(path: str, names: Collection[str] = ()) -> Dialect:
    """Whose client sent this, by all that its path says: the dialect of an error that comes before an endpoint."""
    bare = path.partition("?")[0]
    if _under(bare, "/v1beta"):
        return DIALECTS[GOOGLE]
    if _under(bare, "/v1/messages"):
        return DIALECTS[ANTHROPIC]
    if _under(bare, _MODELS):
        signed = (dialect for sign, dialect in _SIGNS.items() if sign in names)
        return DIALECTS[GOOGLE if _method(bare) else next(signed, OPENAI)]
    return DIALECTS[OPENAI]


def _under(bare: str, folder: str) -> bool:
    return bare == folder or bare.startswith(f"{folder}/")


def _method(bare: str) -> str | None:
    """The method of Google's that a path ends with."""
    _, colon, method = bare.rpartition(":")
    return method if colon and method in _GOOGLES_METHODS else None


def _models(bare: str, query: str, names: Collection[str]) -> Endpoint | None:
    folder = next((folder for folder in _FOLDERS if _under(bare, folder)), None)
    if folder is None:
        return None
    dialect = speaker(bare, names)
    if bare == folder:
        return Endpoint(dialect, method="GET", lists=True)
    named = bare.removeprefix(f"{folder}/")
    if (method := _method(named)) is not None:
        return _googles(named.removesuffix(f":{method}"), method, query)
    # To Google a colon begins a method, wherever it is not encoded: an unknown one must not pass for a name.
    model = None if dialect.name == GOOGLE and ":" in named else _name(named)
    return None if model is None else Endpoint(dialect, Address(model), method="GET", lists=True)


def _googles(called: str, method: str, query: str) -> Endpoint | None:
    model = _name(called)
    if model is None:
        return None
    stream = method == "streamGenerateContent"
    return Endpoint(DIALECTS[_GOOGLES_METHODS[method]], Address(model, stream, stream and _array(query)))


def _name(segments: str) -> str | None:
    """A model's name, decoded once, or None for what is nobody's. It may hold slashes: `vendor/model`."""
    if not _SEGMENTS.fullmatch(segments):
        return None
    try:
        name = unquote(segments, errors="strict")
    except UnicodeDecodeError:
        return None
    if len(name) > MAX_MODEL_NAME_CHARS or not name.isprintable():
        return None
    return None if any(segment in ("", ".", "..") for segment in name.split("/")) else name


def _array(query: str) -> bool:
    """Whether a stream comes as one JSON array: Google's form, unless its clients ask for events."""
    alt = {value for name, value in _fields(query) if name == "alt"}
    if alt == {"sse"}:
        return False
    if alt - {"json"}:
        raise BadRequest("Invalid 'alt': a stream comes as json or sse.", code="invalid_value", param="alt")
    return True


def _fields(query: str) -> list[tuple[str, str]]:
    """Google takes its own parameters with and without a dollar sign."""
    return [(name.removeprefix("$"), value) for name, value in parse_qsl(query, keep_blank_values=True)]
