"""Which headers pass the gateway, in either direction, and how those that decide something are read.

Both directions are allow-lists: a header that nobody thought of stays here. Names are in lower case, as Envoy's are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from extproc.errors import BadRequest, TollgateError, Unauthenticated, UnsupportedMedia

USER = "x-tollgate-user"
PROVIDER = "x-llm-provider"

ATTEMPTS = "x-envoy-attempt-count"  # of a request, which attempt it is; of an answer, how many there were
ANSWERED_BY = "x-tollgate-internal-provider"  # on answers: whose endpoint Envoy asked last

# On replies that Envoy makes itself, or a target: why (the access log's RESPONSE_FLAGS). No caller and no provider sees
# or sets it.
FLAGS = "x-tollgate-internal-flags"

# Envoy's own framing of the message (RFC 9112, 6). Only Envoy can change it.
_FRAMING = frozenset({"content-length", "transfer-encoding"})

# Not to be removed by anybody (RFC 9113, 8.3, and RFC 8441, 4).
_PSEUDO = frozenset({":authority", ":method", ":path", ":protocol", ":scheme", ":status"})

# To a provider: what the body is, and the trace. Not `user-agent`, `x-stainless-*` or addresses, which describe the
# caller; not `openai-beta`, `openai-organization` or `openai-project`, which change what the account does and pays.
_TO_PROVIDER = _PSEUDO | _FRAMING | {"accept", "content-type", "traceparent", "tracestate"}

# … and what belongs to a dialect, where the provider is called in it: another one's would not know it.
_ANTHROPICS = frozenset({"anthropic-version", "anthropic-beta"})
_TO_PROVIDER_OF = dict.fromkeys(("anthropic-messages", "anthropic-count-tokens"), _TO_PROVIDER | _ANTHROPICS)

# To a caller: what the body is, how long it took, and whether to try again. Not `set-cookie`, `location` or `alt-svc`,
# which would lead it past the gateway; not `x-ratelimit-*`, `anthropic-ratelimit-*` or the organization, which describe
# the gateway's account; not the provider's `x-request-id` or `request-id`, since the gateway sets its own.
_TO_CALLER = (
    _PSEUDO
    | _FRAMING
    | {
        "cache-control",
        "content-encoding",
        "content-type",
        "date",
        "openai-processing-ms",
        "retry-after",
        "retry-after-ms",
        "server-timing",  # Google's
        "x-should-retry",  # OpenAI's and Anthropic's: their clients heed it
    }
)

# Where official clients put what they are given as a key: OpenAI's, Anthropic's, Google's.
_CREDENTIALS = ("authorization", "x-api-key", "x-goog-api-key")

# What is between the caller and the gateway: it goes no further than the gate.
CALLERS_ONLY = (*_CREDENTIALS, "proxy-authorization", "x-serverless-authorization", "cookie", USER, PROVIDER)

# Headers that decide something: two values would leave it to chance which one counts.
_SINGLE = frozenset({*_CREDENTIALS, "content-type", "content-encoding", USER, PROVIDER})


def collect(pairs: Collection[tuple[str, str]]) -> dict[str, str]:
    """Name to value. A repeated header's values are joined by commas (RFC 9110, 5.3).

    Raises BadRequest, or Unauthenticated for a credential, where one that decides something is repeated.
    """
    headers = dict(pairs)
    if len(headers) == len(pairs):  # none is repeated, as nearly always
        return headers
    headers = {}
    for name, value in pairs:
        if name not in headers:
            headers[name] = value
        elif name in _SINGLE:
            raise _repeated(name)
        else:
            headers[name] += f", {value}"
    return headers


def credential(headers: Mapping[str, str]) -> str | None:
    """The caller's ID token as a value of `authorization` (`Bearer …`), or None where it sent none.

    Official clients are given the token as their key. Anthropic's sends it in `x-api-key`, and Google's in
    `x-goog-api-key`, which Envoy moves there. Of both, `authorization` counts, and must be right.
    """
    authorization, key = headers.get("authorization"), headers.get("x-api-key")
    return f"Bearer {key}" if authorization is None and key is not None else authorization


def to_remove(names: Iterable[str], native: str | None = None) -> tuple[str, ...]:
    """Those of a request's headers that must not reach a provider, the caller's token among them.

    `native` is the caller's dialect, by name, where the provider is called in it.
    """
    return _others(names, _TO_PROVIDER_OF.get(native or "", _TO_PROVIDER))


def response_to_remove(names: Iterable[str]) -> tuple[str, ...]:
    """Those of a provider's headers that must not reach a caller."""
    return _others(names, _TO_CALLER)


def require_json(content_type: str | None, content_encoding: str | None) -> None:
    """Raises UnsupportedMedia for a body that is not plain JSON in UTF-8."""
    if content_type == "application/json" and content_encoding is None:
        return
    if content_encoding is not None and content_encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMedia("A compressed body is not accepted: send it as it is.", param="content-encoding")
    kind, *parameters = (part.strip().lower() for part in (content_type or "").split(";"))
    if kind != "application/json" or any(p not in ("", "charset=utf-8", 'charset="utf-8"') for p in parameters):
        message = "The body must be JSON in UTF-8: send content-type: application/json."
        raise UnsupportedMedia(message, param="content-type")


def _others(names: Iterable[str], allowed: frozenset[str]) -> tuple[str, ...]:
    """Each name once, in order: a name removed is removed with all its values."""
    return tuple([name for name in dict.fromkeys(names) if name not in allowed])


def _repeated(name: str) -> TollgateError:
    kind = Unauthenticated if name in _CREDENTIALS else BadRequest
    return kind(f"The header {name} must occur only once.", code="repeated_header", param=name)
