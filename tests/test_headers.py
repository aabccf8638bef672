"""Which headers pass, and how those that decide something are read."""

from __future__ import annotations

import pytest

from extproc import headers
from extproc.errors import BadRequest, TollgateError, Unauthenticated, UnsupportedMedia


@pytest.mark.parametrize(
    "name",
    [
        "content-type",
        "accept",
        "content-length",
        "transfer-encoding",
        "traceparent",
        "tracestate",
        ":path",
        ":authority",
    ],
)
def test_a_provider_gets(name: str) -> None:
    assert headers.to_remove([name]) == ()


@pytest.mark.parametrize(
    "name",
    [
        "authorization", "cookie", "user-agent", "x-request-id", "x-api-key", "api-key", "x-goog-api-key",
        "openai-organization", "openai-project", "openai-beta", "x-stainless-os", "accept-encoding", "x-llm-provider",
        "x-tollgate-user", "x-tollgate-route", "x-envoy-original-host", "x-forwarded-for", "x-forwarded-proto",
        "x-serverless-authorization", "proxy-authorization", "forwarded", "via", "baggage", "anything-else",
        "anthropic-version", "anthropic-beta", "x-goog-api-client", "x-goog-user-project",
    ],
)  # fmt: skip
def test_a_provider_does_not_get(name: str) -> None:
    assert headers.to_remove([":method", name, "accept"]) == (name,)


@pytest.mark.parametrize("dialect", ["anthropic-messages", "anthropic-count-tokens"])
def test_a_provider_called_as_anthropic_is_gets_what_belongs_to_that(dialect: str) -> None:
    names = ["anthropic-version", "anthropic-beta", "anthropic-organization", "x-api-key", "accept"]
    assert headers.to_remove(names, dialect) == ("anthropic-organization", "x-api-key")


@pytest.mark.parametrize("dialect", ["openai-chat", "gemini-generate", "", None])
def test_a_provider_of_another_dialect_does_not(dialect: str | None) -> None:
    assert headers.to_remove(["anthropic-version", "anthropic-beta"], dialect) == (
        "anthropic-version",
        "anthropic-beta",
    )


CREDENTIALS: dict[str, tuple[dict[str, str], str | None]] = {
    "none": ({"accept": "*/*"}, None),
    "OpenAI's": ({"authorization": "Bearer t"}, "Bearer t"),
    "Anthropic's": ({"x-api-key": "t"}, "Bearer t"),
    "both": ({"x-api-key": "other", "authorization": "Bearer t"}, "Bearer t"),
    "an empty one, beside a key": ({"x-api-key": "t", "authorization": ""}, ""),
    "another scheme, beside a key": ({"x-api-key": "t", "authorization": "Basic x"}, "Basic x"),
    "Google's, before Envoy moves it": ({"x-goog-api-key": "t"}, None),
}


@pytest.mark.parametrize(("given", "expected"), CREDENTIALS.values(), ids=CREDENTIALS)
def test_credential(given: dict[str, str], expected: str | None) -> None:
    assert headers.credential(given) == expected


@pytest.mark.parametrize("name", ["authorization", "x-api-key", "x-goog-api-key", "cookie", "x-tollgate-user"])
def test_what_is_the_callers_goes_no_further_than_the_gate(name: str) -> None:
    assert name in headers.CALLERS_ONLY


@pytest.mark.parametrize(
    "name",
    [
        "content-type", "content-length", "transfer-encoding", "content-encoding", "cache-control", "date",
        "retry-after", "retry-after-ms", "openai-processing-ms", "server-timing", "x-should-retry", ":status",
    ],
)  # fmt: skip
def test_a_caller_gets(name: str) -> None:
    assert headers.response_to_remove([name]) == ()


@pytest.mark.parametrize(
    "name",
    [
        "set-cookie", "location", "alt-svc", "server", "openai-organization", "openai-project", "x-request-id",
        "x-ratelimit-remaining-tokens", "x-envoy-upstream-service-time", "x-tollgate-attempt", "cf-ray",
        "strict-transport-security", "www-authenticate", "anything-else", "request-id", "anthropic-organization-id",
        "anthropic-ratelimit-tokens-remaining", "anthropic-ratelimit-unified-status", "x-goog-request-id",
    ],
)  # fmt: skip
def test_a_caller_does_not_get(name: str) -> None:
    assert headers.response_to_remove(["content-type", name]) == (name,)


def test_a_repeated_header_is_removed_once() -> None:
    assert headers.to_remove(["cookie", "accept", "cookie", "via"]) == ("cookie", "via")


def test_collects_by_name_and_joins_what_may_be_repeated() -> None:
    pairs = [(":path", "/v1"), ("accept", "a"), ("authorization", "Bearer x"), ("accept", "b")]
    assert headers.collect(pairs) == {":path": "/v1", "accept": "a, b", "authorization": "Bearer x"}


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("authorization", Unauthenticated),
        ("x-api-key", Unauthenticated),
        ("x-goog-api-key", Unauthenticated),
        ("content-type", BadRequest),
        ("content-encoding", BadRequest),
        ("x-tollgate-user", BadRequest),
        ("x-llm-provider", BadRequest),
    ],
)
@pytest.mark.parametrize("second", ["same", "other"])
def test_a_header_that_decides_something_must_not_be_repeated(
    name: str, error: type[TollgateError], second: str
) -> None:
    with pytest.raises(error) as caught:
        headers.collect([(name, "same"), ("accept", "x"), (name, second)])
    assert type(caught.value) is error
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("content_type", "content_encoding"),
    [
        ("application/json", None),
        ("Application/JSON", ""),
        ("application/json; charset=utf-8", "identity"),
        ('application/json;charset="UTF-8"', "Identity"),
        ("application/json;", None),
    ],
)
def test_plain_json_is_accepted(content_type: str, content_encoding: str | None) -> None:
    headers.require_json(content_type, content_encoding)


@pytest.mark.parametrize(
    ("content_type", "content_encoding", "param"),
    [
        (None, None, "content-type"),
        ("", None, "content-type"),
        ("text/plain", None, "content-type"),
        ("application/json, text/plain", None, "content-type"),
        ("application/jsonp", None, "content-type"),
        ("application/x-www-form-urlencoded", None, "content-type"),
        ("application/json; charset=utf-16", None, "content-type"),
        ("application/json; charset=utf-8; charset=utf-7", None, "content-type"),
        ("application/json; boundary=x", None, "content-type"),
        ("application/json", "gzip", "content-encoding"),
        ("application/json", "identity, br", "content-encoding"),
        ("application/json", "zstd", "content-encoding"),
    ],
)
def test_anything_else_is_not(content_type: str | None, content_encoding: str | None, param: str) -> None:
    with pytest.raises(UnsupportedMedia) as caught:
        headers.require_json(content_type, content_encoding)
    assert caught.value.param == param
