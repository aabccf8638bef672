"""What the official clients raise, each against its own provider and against foreign ones: whoever refuses or fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from extproc.local.provider import Script
from extproc.records import Outcome, UsageRecord
from tests import voices
from tests.checker import Checker
from tests.clients import CLIENTS, Ask, header_of, shape_of, status_of
from tests.rig import POLICY, Rig, eventually, running
from tests.turns import Turn, replying

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOMAIN = "test.iam.gserviceaccount.com"
TARGETS = {"openai": "gpt-4o", "anthropic": "claude-sonnet-4-5", "gemini": "gemini-2.5-flash-lite"}
CUT_TOKENS = 60
POLICY_HERE = POLICY.replace(
    'models:\n  "*": {targets: ["openai/*"]}\n',
    "models:\n" + "".join(f"  at-{name}: {{targets: [{name}/{model}]}}\n" for name, model in TARGETS.items()),
) + (
    f'  - {{scope: service, id: "poor-*@{DOMAIN}", window: day, limit_tokens: 2}}\n'
    f'  - {{scope: service, id: "cut-*@{DOMAIN}", window: day, limit_tokens: {CUT_TOKENS}}}\n'
)

ways = pytest.mark.parametrize(
    ("name", "provider"),
    [(name, provider) for name, client in CLIENTS.items() for provider in (client.native, *client.foreign)],
)
every_client = pytest.mark.parametrize("name", CLIENTS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    environment = {"TOLLGATE_FIRST_BYTE_TIMEOUT_MS": "700"}
    async with running(short_directory, policy=POLICY_HERE, providers=tuple(TARGETS), environment=environment) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", autouse=True, loop_scope="module")
async def checked(checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


async def raised_by(name: str, status: int | None, ask: Ask) -> Any:
    """The client's own exception, for this status (None: for an event in the midst of a stream)."""
    client = CLIENTS[name]
    expected = client.base if status is None else client.classes[status]
    with pytest.raises(expected) as raised:
        await client.ask(ask)
    if status is not None:
        assert status_of(raised.value) == status
        assert shape_of(raised.value) == name.split(maxsplit=1)[0]
    return raised.value


async def both(name: str, status: int, rig: Rig, **how: Any) -> list[Any]:
    """What is raised for a whole answer and for a stream. Nothing of an answer is heard."""
    heard: list[str] = []
    asks = [Ask(rig, heard, stream=stream, **how) for stream in (False, True)]
    errors = await asyncio.gather(*(raised_by(name, status, ask) for ask in asks))
    assert not heard
    return errors


def caller(prefix: str, name: str, provider: str) -> str:
    return f"{prefix}-{name}-{provider}@{DOMAIN}".replace(" ", "-")


async def rows_of(rig: Rig, email: str, count: int) -> list[UsageRecord]:
    def rows() -> list[UsageRecord]:
        return [row for row in rig.records() if row.service == email]

    await eventually(lambda: len(rows()) >= count, f"{count} rows of {email}")
    assert len(rows()) == count
    return rows()


# --- The gateway's own refusals ---------------------------------------------------------------------------------------


@ways
async def test_an_exhausted_budget(rig: Rig, name: str, provider: str) -> None:
    email = caller("poor", name, provider)
    asked = len(rig.providers[provider].received)
    for error in await both(name, 429, rig, model=f"at-{provider}", email=email):
        assert f"Budget service/{email}/day/tokens has too little left" in CLIENTS[name].message(error)
        assert int(header_of(error, "retry-after") or 0) > 0
        assert header_of(error, "x-should-retry") == "false"
    assert len(rig.providers[provider].received) == asked
    for row in await rows_of(rig, email, 2):
        assert (row.outcome, row.status, row.cost_nanousd) == (Outcome.REFUSED, 429, 0)
        assert row.budget_id == f"service/{email}/day/tokens"


@ways
async def test_a_cut(rig: Rig, name: str, provider: str) -> None:
    """The text before it has arrived."""
    rig.answer(replying(Turn(" ".join(["word"] * 300), completion=300), pause_s=0.001), provider)
    heard: list[str] = []
    email = caller("cut", name, provider)
    error = await raised_by(name, None, Ask(rig, heard, f"at-{provider}", stream=True, email=email))
    assert f"Budget service/{email}/day/tokens was used up while the answer streamed" in CLIENTS[name].message(error)
    words = "".join(heard).split(" ")
    assert 5 < len(words) < CUT_TOKENS
    assert set(words) <= {"word", ""}
    (row,) = await rows_of(rig, email, 1)
    assert row.outcome is Outcome.CUT
    assert row.budget_id == f"service/{email}/day/tokens"


@every_client
async def test_a_token_that_does_not_verify(rig: Rig, name: str) -> None:
    for error in await both(name, 401, rig, model="at-openai", token=f"{rig.token()}x"):
        assert header_of(error, "www-authenticate") == "Bearer"


# What the client has a field for and the other provider has not: the field as the client's own API calls it.
UNSUPPORTED: list[tuple[str, str, Mapping[str, Any], str]] = [
    ("openai chat", "anthropic", {"seed": 7}, "seed"),
    ("openai chat", "anthropic", {"n": 2}, "n"),
    ("openai chat", "gemini", {"logit_bias": {"50256": -100}}, "logit_bias"),
    ("openai responses", "anthropic", {"top_logprobs": 3, "include": ["message.output_text.logprobs"]}, "top_logprobs"),
    ("openai responses", "gemini", {"tools": [{"type": "web_search"}]}, "tools[0]"),
    ("anthropic", "openai", {"extra_body": {"top_k": 5}}, "top_k"),
    ("anthropic", "gemini", {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
    ("google", "openai", {"top_k": 5}, "generationConfig.topK"),
    ("google", "anthropic", {"seed": 7}, "generationConfig.seed"),
    ("google", "anthropic", {"tools": [{"google_search": {}}]}, "tools[0].googleSearch"),
]


@pytest.mark.parametrize(("name", "provider", "more", "field"), UNSUPPORTED)
async def test_a_field_that_the_provider_has_not(
    rig: Rig, name: str, provider: str, more: Mapping[str, Any], field: str
) -> None:
    asked = len(rig.providers[provider].received)
    for error in await both(name, 400, rig, model=f"at-{provider}", more=more):
        assert f"Unsupported parameter: '{field}'" in CLIENTS[name].message(error)
    assert len(rig.providers[provider].received) == asked


@every_client
async def test_a_model_that_is_not_offered(rig: Rig, name: str) -> None:
    for error in await both(name, 400, rig, model="gpt-9"):
        assert "'gpt-9' is not offered" in CLIENTS[name].message(error)


@every_client
async def test_a_path_where_there_is_nothing(rig: Rig, name: str) -> None:
    """Nothing says whose API an unknown path is: OpenAI's shape, of which every client reads status and message."""
    heard: list[str] = []
    with pytest.raises(CLIENTS[name].classes[404]) as raised:
        await CLIENTS[name].ask(Ask(rig, heard, "at-openai", path="/v2"))
    assert status_of(raised.value) == 404


# --- The providers' failures ------------------------------------------------------------------------------------------


@ways
async def test_a_providers_errors(rig: Rig, name: str, provider: str) -> None:
    for status, headers in ((404, {}), (429, {"retry-after": "7"}), (500, {}), (529, {})):
        failed = voices.failed(provider, status, f"Not now, {status}.", **headers)
        rig.answer(failed, provider)
        for error in await both(name, status, rig, model=f"at-{provider}"):
            assert f"Not now, {status}." in CLIENTS[name].message(error)
            assert header_of(error, "retry-after") == headers.get("retry-after")


@ways
async def test_a_providers_error_in_the_midst_of_a_stream(rig: Rig, name: str, provider: str) -> None:
    def answer(request: Any) -> Script:
        begun = replying(Turn("Half of an answer that was meant"))(request).chunks
        failed = voices.error_event(provider)
        if request.target.endswith("/responses"):
            failed = (
                b'event: error\ndata: {"type": "error", "code": "server_error", "message": "Overloaded.", '
                b'"param": null, "sequence_number": 99}\n\n'
            )
        return Script(chunks=[*begun[:6], failed], pause_s=0.005)

    rig.answer(answer, provider)
    heard: list[str] = []
    email = caller("overloaded", name, provider)
    error = await raised_by(name, None, Ask(rig, heard, f"at-{provider}", stream=True, email=email))
    assert "Overloaded." in CLIENTS[name].message(error)
    assert "".join(heard).startswith("Half of")
    (row,) = await rows_of(rig, email, 1)
    assert row.outcome is Outcome.UPSTREAM_ERROR
    assert row.completion_tokens > 0


@ways
async def test_a_stream_that_ends_too_early(rig: Rig, name: str, provider: str) -> None:
    def answer(request: Any) -> Script:
        return Script(chunks=replying(Turn("Half of an answer that was meant"))(request).chunks[:6], pause_s=0.005)

    rig.answer(answer, provider)
    heard: list[str] = []
    await raised_by(name, None, Ask(rig, heard, f"at-{provider}", stream=True))
    assert "".join(heard).startswith("Half of")


# --- Envoy's own ------------------------------------------------------------------------------------------------------


@every_client
async def test_a_provider_that_cannot_be_reached(rig: Rig, name: str) -> None:
    async with rig.down("openai"):
        for error in await both(name, 503, rig, model="at-openai"):
            assert CLIENTS[name].message(error) == "The request could not be passed on."


async def test_a_provider_that_does_not_begin(rig: Rig) -> None:
    rig.answer(Script(first_pause_s=30), "openai")

    async def wait(name: str) -> None:
        error = await raised_by(name, 504, Ask(rig, [], "at-openai", stream=True))
        assert CLIENTS[name].message(error) == "The gateway or the provider did not answer in time."

    await asyncio.gather(*map(wait, CLIENTS))


PATHS = {
    "openai": "/v1/chat/completions",
    "anthropic": "/v1/messages",
    "google": "/v1beta/models/at-gemini:generateContent",
}


@pytest.mark.parametrize(("shape", "path"), PATHS.items(), ids=PATHS)
async def test_a_body_that_is_too_large(rig: Rig, shape: str, path: str) -> None:
    """By its length the gate refuses it, unread; without one, Envoy, when its buffer is full."""
    line = "".join(f"{name}: {value}\r\n" for name, value in LARGE.items())
    reader, writer = await asyncio.open_connection("127.0.0.1", rig.port)
    writer.write(f"POST {path} HTTP/1.1\r\n{line}authorization: Bearer {rig.token()}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    told = httpx.Response(int(head.split()[1]), content=await reader.readexactly(length))
    writer.close()

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(33):
            yield b"x" * (1 << 20)

    async with rig.client(headers={"content-type": "application/json"}) as client:
        answer = await client.post(path, content=endless())
    for response in (told, answer):
        assert response.status_code == 413
        assert shape_of(_Raised(response)) == shape
        assert "larger than 32 MiB" in response.text


LARGE = {"host": "gateway", "content-type": "application/json", "content-length": 33 << 20}


class _Raised(Exception):
    def __init__(self, response: httpx.Response) -> None:
        self.response = response
