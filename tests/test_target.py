"""What one attempt sends: its own provider's path and key, whatever an attempt before it has set."""

from __future__ import annotations

import pytest

from extproc.errors import ProtocolViolation
from extproc.events import (
    Closed,
    ContinueRequest,
    Reply,
    RequestBody,
    RequestHeaders,
    ResponseBody,
    ResponseHeaders,
    TimerFired,
)
from extproc.target import Attempt, Targets, provider_path
from tests.exchanges import SECRET

TARGETS = Targets(
    {"openai": "https://api.openai.com/v1", "mine": "http://127.0.0.1:9/openai/v2", "keyless": "https://x.example"},
    lambda provider: None if provider == "keyless" else f"{SECRET}-{provider}",
)


def asked(provider: str | None, *headers: tuple[str, str], path: str = "/v1/chat/completions") -> RequestHeaders:
    return RequestHeaders(((":method", "POST"), (":path", path), *headers), False, provider)


def answer(event: RequestHeaders) -> ContinueRequest:
    (command,) = Attempt(TARGETS).handle(event)
    assert isinstance(command, ContinueRequest)
    return command


def test_path_key_and_encoding_are_the_providers() -> None:
    assert answer(asked("mine")).set_headers == (
        (":path", "/openai/v2/chat/completions"),
        ("authorization", f"Bearer {SECRET}-mine"),
        ("accept-encoding", "identity"),
    )


def test_what_the_caller_or_an_earlier_attempt_sent_is_removed() -> None:
    sent = answer(
        asked(
            "openai",
            ("authorization", f"Bearer {SECRET}-mine"),
            ("x-tollgate-internal-route", "openai"),
            ("user-agent", "curl"),
            ("accept-encoding", "gzip"),
            ("content-type", "application/json"),
            ("content-length", "3"),
            ("traceparent", "00-1"),
        )
    )
    assert sent.remove_headers == ("authorization", "x-tollgate-internal-route", "user-agent", "accept-encoding")
    assert dict(sent.set_headers)["authorization"] == f"Bearer {SECRET}-openai"


@pytest.mark.parametrize("provider", [None, "", "unknown"])
def test_a_provider_that_nobody_configured_is_no_provider(provider: str | None) -> None:
    with pytest.raises(ProtocolViolation):
        Attempt(TARGETS).handle(asked(provider))


def test_without_a_key_nothing_is_sent() -> None:
    assert Attempt(TARGETS).handle(asked("keyless")) == [Reply(503, details="no_provider_key")]


def test_the_key_is_the_one_of_the_moment() -> None:
    keys = iter(["old", "new"])
    targets = Targets({"openai": "https://x.example"}, lambda _: next(keys))
    sent = [Attempt(targets).handle(asked("openai"))[0] for _ in range(2)]
    assert [dict(command.set_headers)["authorization"] for command in sent if isinstance(command, ContinueRequest)] == [
        "Bearer old",
        "Bearer new",
    ]


@pytest.mark.parametrize(
    "event",
    [RequestBody(b"", True), ResponseHeaders((), False), ResponseBody(b"", True), TimerFired()],
    ids=lambda event: type(event).__name__,
)
def test_anything_else_breaks_the_order(event: RequestBody) -> None:
    attempt = Attempt(TARGETS)
    attempt.handle(asked("openai"))
    with pytest.raises(ProtocolViolation):
        attempt.handle(event)


def test_an_attempt_asks_once() -> None:
    attempt = Attempt(TARGETS)
    assert attempt.handle(Closed()) == []
    assert not attempt.done
    attempt.handle(asked("openai"))
    assert attempt.done
    with pytest.raises(ProtocolViolation):
        attempt.handle(asked("openai"))


@pytest.mark.parametrize(
    ("base_url", "path", "expected"),
    [
        ("https://api.openai.com/v1", "/v1/chat/completions", "/v1/chat/completions"),
        ("https://x.example", "/v1/chat/completions", "/chat/completions"),
        ("https://x.example/v1beta/openai", "/v1/chat/completions?a=b", "/v1beta/openai/chat/completions"),
        ("https://x.example/v1", "/v1/v1/x", "/v1/v1/x"),
    ],
    ids=["openai", "no path", "another, and a query", "the prefix once"],
)
def test_provider_path(base_url: str, path: str, expected: str) -> None:
    assert provider_path(base_url, path) == expected
