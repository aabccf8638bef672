"""A running gateway whose keys are in Secret Manager: it waits for them, and follows a rotation by itself."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio

from extproc.local.provider import Received, Script
from tests.rig import PROVIDER_KEY, Rig, Told, eventually, running, streamed
from tests.secret_manager_server import SecretManagerServer

pytestmark = pytest.mark.asyncio(loop_scope="module")

OLD, NEW = "sk-canary-old-0123456789", "sk-canary-new-0123456789"
MISSING = "the key of openai has not come from Secret Manager"
GEMINI_OLD, GEMINI_NEW = "canary-gemini-old-0123456789", "canary-gemini-new-0123456789"
POLICY = """\
identity:
  audiences: [https://tollgate.test]
  issuers: [https://accounts.google.com]
  allow: ["*@test.iam.gserviceaccount.com"]
models:
  at-gemini: {targets: [gemini/gemini-2.5-flash]}
  "*": {targets: ["openai/*"]}
prices:
  "*": {input_usd_per_mtok: 10, output_usd_per_mtok: 30}
budgets:
  - {scope: global, window: total, limit_usd: 1000}
"""
REFUSED = Script(401, (("content-type", "application/json"),), [b'{"error": {"message": "Incorrect API key"}}'])
NOT_VALID = b'{"error": {"code": 400, "message": "API key not valid. Please pass a valid API key."}}'
GEMINI_REFUSED = Script(400, (("content-type", "application/json"),), [NOT_VALID])


class Account:
    """OpenAI's side: the one key that is accepted now."""

    key = OLD

    def answer(self, request: Received) -> Script:
        return streamed(3) if request.header("authorization") == f"Bearer {self.key}" else REFUSED


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[SecretManagerServer]:
    """One that denies everything at first."""
    one = SecretManagerServer(error=grpc.StatusCode.PERMISSION_DENIED).start()
    one.add("openai-key", OLD)
    one.add("gemini-key", GEMINI_OLD)
    yield one
    one.stop()


async def permit_once_missed(server: SecretManagerServer, envoy: dict[str, Any]) -> None:
    """Grant the permission once /healthz names the key that is missing."""

    async def missed() -> bool:
        with suppress(httpx.HTTPError, KeyError):
            (listener,) = envoy["static_resources"]["listeners"]
            port = listener["address"]["socket_address"]["port_value"]
            async with httpx.AsyncClient() as client:
                answer = await client.get(f"http://127.0.0.1:{port}/healthz")
            return answer.status_code == 503 and MISSING in answer.text
        return False

    await eventually(missed, "/healthz to name the key")
    server.error = None


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path, server: SecretManagerServer) -> AsyncIterator[Rig]:
    """Not ready until its keys have come; those of its environment are not to be used. Nothing has a key in the end."""
    environment = {
        "OPENAI_API_KEY_SECRET": "projects/p/secrets/openai-key/versions/latest",
        "GEMINI_API_KEY_SECRET": "projects/p/secrets/gemini-key",
        "TOLLGATE_SECRET_MANAGER_ENDPOINT": server.endpoint,
    }
    envoy: dict[str, Any] = {}
    permitting = asyncio.create_task(permit_once_missed(server, envoy))
    gateway = running(
        short_directory,
        policy=POLICY,
        providers=("openai", "gemini"),
        environment=environment,
        tune=envoy.update,
    )
    async with gateway as rig:
        await permitting
        yield rig
        await rig.settled()
        written = rig.everything_written() + "".join(f"{told.headers} {told.body!r}" for told in rig.told)
        assert "canary" not in written
        assert all(request.header("authorization") != f"Bearer {PROVIDER_KEY}" for request, _ in rig.played)


async def test_a_rotated_key_is_followed_without_a_restart(rig: Rig, server: SecretManagerServer) -> None:
    account = Account()
    rig.answer(account.answer)
    assert (await rig.ask(stream=True)).status == 200
    server.add("openai-key", NEW)
    account.key = NEW  # from here on the old one is refused
    answers: list[Told] = []

    async def answered() -> bool:
        answers.append(await rig.ask(stream=True))
        return answers[-1].status == 200

    fetched = len(server.asked)
    await eventually(answered, "the new key to be used")
    assert {told.status for told in answers[:-1]} == {502}
    assert server.asked[fetched:] == ["projects/p/secrets/openai-key/versions/latest"]
    assert "projects/123456/secrets/openai-key/versions/2 is in use" in rig.processors[0].log


async def test_gemini_refuses_a_key_with_400_and_in_words(rig: Rig, server: SecretManagerServer) -> None:
    rig.answer(GEMINI_REFUSED, "gemini")
    server.add("gemini-key", GEMINI_NEW)

    async def sent() -> bool:
        assert (await rig.ask(model="at-gemini", stream=True)).status == 400
        return rig.providers["gemini"].received[-1].header("x-goog-api-key") == GEMINI_NEW

    await eventually(sent, "the new key to be sent")
