"""Access tokens by google-auth's own client from a token server on loopback: ahead, through an outage, rotated."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator
from functools import cache
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from google.auth import jwt

from extproc.google_tokens import GoogleTokens
from extproc.limits import GOOGLE_TOKEN_AHEAD_S, MAX_GOOGLE_TOKEN_BACKOFF_S, MIN_GOOGLE_TOKEN_WAIT_S
from extproc.local.http import Request, Response, Server, serve
from extproc.redaction import Redactor

LIFETIME_S = 3_600
CANARY = "ya29.canary-0123456789"
SCOPE = "https://www.googleapis.com/auth/cloud-platform"


@cache
def private_key() -> str:
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


class TokenServer:
    """An OAuth token endpoint whose next answer can be changed."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.token = f"{CANARY}-1"
        self.status = 200
        self.expires_in = LIFETIME_S

    async def answer(self, request: Request) -> Response:
        self.requests.append(request)
        body = {"access_token": self.token, "expires_in": self.expires_in, "token_type": "Bearer"}
        if self.status != 200:
            body = {"error": "invalid_grant", "error_description": f"the token {self.token} is not known"}
        return Response(self.status, (("content-type", "application/json"),), json.dumps(body).encode())


class Rig:
    """Tokens, their server, and how far the tokens' clock is ahead of google-auth's."""

    def __init__(self, server: Server, source: TokenServer) -> None:
        self.server = server
        self.source = source
        self.ahead_s = 0.0
        self.tokens = GoogleTokens(["vertex", "vertex-anthropic"], lambda: time.time() + self.ahead_s)

    async def refresh(self) -> float:
        return await asyncio.to_thread(self.tokens.refresh)


KINDS = ("service_account", "external_account")


def credentials(kind: str, url: str, directory: Path) -> Path:
    """A file as Google's console writes it, with its token server on loopback."""
    written: dict[str, object] = {"type": kind}
    if kind == "service_account":
        written |= {"client_email": "a@b.iam.gserviceaccount.com", "private_key": private_key(), "token_uri": url}
    else:
        subject = directory / "subject-token"
        subject.write_text("subject")
        written |= {
            "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/q",
            "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
            "token_url": url,
            "credential_source": {"file": str(subject)},
        }
    path = directory / f"{kind}.json"
    path.write_text(json.dumps(written))
    return path


@pytest.fixture(params=KINDS)
async def rig(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    source = TokenServer()
    server = await serve(source.answer)
    path = credentials(request.param, f"http://127.0.0.1:{server.port}/token", tmp_path)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "my-project")
    rig = Rig(server, source)
    yield rig
    rig.tokens.close()
    await server.close()


async def test_a_token_is_the_key_of_the_providers_on_vertex_only(rig: Rig) -> None:
    assert rig.tokens.key("vertex") is None
    await rig.refresh()
    assert [rig.tokens.key(name) for name in ("vertex", "vertex-anthropic", "openai")] == [rig.source.token] * 2 + [
        None
    ]


async def test_the_scope_is_the_clouds(rig: Rig) -> None:
    await rig.refresh()
    form = parse_qs(rig.source.requests[0].body.decode())
    asked = form if "scope" in form else {"scope": [claims(form["assertion"][0])["scope"]]}
    assert asked["scope"] == [SCOPE]


def claims(assertion: str) -> dict[str, str]:
    """Of what a service account signs to be given a token."""
    decoded: dict[str, str] = jwt.decode(assertion, verify=False)  # type: ignore[no-untyped-call]
    return decoded


async def test_a_token_is_renewed_well_ahead_of_its_end(rig: Rig) -> None:
    wait_s = await rig.refresh()
    assert LIFETIME_S - GOOGLE_TOKEN_AHEAD_S - 60 < wait_s <= LIFETIME_S - GOOGLE_TOKEN_AHEAD_S
    rig.ahead_s = wait_s
    assert rig.tokens.key("vertex") == rig.source.token


async def test_a_token_server_that_hands_out_the_same_token_is_not_asked_all_the_time(rig: Rig) -> None:
    rig.source.expires_in = GOOGLE_TOKEN_AHEAD_S - 1
    assert await rig.refresh() == MIN_GOOGLE_TOKEN_WAIT_S


async def test_the_new_token_is_used_and_both_are_redacted(rig: Rig) -> None:
    await rig.refresh()
    redactor = Redactor(rig.tokens.values)
    old, rig.source.token = rig.source.token, f"{CANARY}-2"
    await rig.refresh()
    await rig.refresh()
    assert rig.tokens.key("vertex") == f"{CANARY}-2"
    assert redactor.redact(f"{old} {CANARY}-2".encode()) == b"[redacted] [redacted]"


async def test_the_last_token_serves_through_an_outage_until_it_expires(rig: Rig) -> None:
    await rig.refresh()
    rig.source.status = 400
    rig.ahead_s = LIFETIME_S - 60
    await rig.refresh()
    assert rig.tokens.key("vertex") == f"{CANARY}-1"
    rig.ahead_s = LIFETIME_S + 1
    await rig.refresh()
    assert rig.tokens.key("vertex") is None
    assert rig.tokens.values() == (f"{CANARY}-1",)
    rig.ahead_s, rig.source.status, rig.source.token = 0, 200, f"{CANARY}-2"
    await rig.refresh()
    assert rig.tokens.key("vertex") == f"{CANARY}-2"


async def test_attempts_back_off_and_begin_again_after_a_success(rig: Rig) -> None:
    rig.source.status = 400
    waits_s = [await rig.refresh() for _ in range(6)]
    assert waits_s == [5, 10, 20, 40, MAX_GOOGLE_TOKEN_BACKOFF_S, MAX_GOOGLE_TOKEN_BACKOFF_S]
    rig.source.status = 200
    assert await rig.refresh() > MAX_GOOGLE_TOKEN_BACKOFF_S
    rig.source.status = 400
    assert await rig.refresh() == MIN_GOOGLE_TOKEN_WAIT_S


async def test_a_token_server_that_is_down_is_an_outage_like_any_other(rig: Rig) -> None:
    await rig.refresh()
    await rig.server.close()
    assert await rig.refresh() == MIN_GOOGLE_TOKEN_WAIT_S
    assert rig.tokens.key("vertex") == f"{CANARY}-1"


async def test_no_token_is_shown(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        await rig.refresh()
        rig.source.status = 400  # its message has the token
        await rig.refresh()
    assert "no new access token, attempt 1" in caplog.text
    assert "canary" not in f"{caplog.text} {rig.tokens} {rig.tokens!r}"


async def test_without_credentials_it_says_why(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/does/not/exist.json")
    await rig.refresh()
    assert "/does/not/exist.json was not found" in caplog.text
    assert rig.tokens.key("vertex") is None


async def test_the_thread_fetches_until_it_is_closed(rig: Rig) -> None:
    rig.tokens.start()
    while rig.tokens.key("vertex") is None:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    rig.tokens.close()
    while "google-tokens" in {thread.name for thread in threading.enumerate()}:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert len(rig.source.requests) == 1


def test_without_providers_there_is_no_thread() -> None:
    tokens = GoogleTokens([])
    tokens.start()
    tokens.close()
    assert "google-tokens" not in {thread.name for thread in threading.enumerate()}
    assert tokens.key("vertex") is None
    assert tokens.values() == ()
