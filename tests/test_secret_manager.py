"""Keys by Google's own client from a Secret Manager on loopback: rotated, pinned, through outages, never shown."""

from __future__ import annotations

import asyncio
import base64
import logging
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager

import grpc
import pytest

from extproc.limits import MAX_SECRET_BYTES, SECRET_REFETCH_INTERVAL_S
from extproc.local.valkey import free_port
from extproc.redaction import Redactor
from extproc.secret_manager import SecretManager
from extproc.secrets import SecretStore
from tests.rig import eventually
from tests.secret_manager_server import SecretManagerServer

CANARY = "sk-canary-0123456789"
LATEST = "projects/p/secrets/openai/versions/latest"
OFTEN_S = 0.02
SELDOM_S = 3600.0


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def server() -> Iterator[SecretManagerServer]:
    one = SecretManagerServer().start()
    one.add("openai", f"{CANARY}-1")
    yield one
    one.stop()


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.secret_manager.MIN_SECRET_BACKOFF_S", 0.02)
    monkeypatch.setattr("extproc.secret_manager.MAX_SECRET_BACKOFF_S", 0.05)
    monkeypatch.setattr("extproc.secret_manager._CHANNEL_OPTIONS", (("grpc.initial_reconnect_backoff_ms", 100),))


@asynccontextmanager
async def running(
    endpoint: str,
    refresh_s: float = OFTEN_S,
    clock: Callable[[], float] = lambda: 0.0,
    versions: Mapping[str, str] | None = None,
) -> AsyncIterator[tuple[SecretStore, SecretManager]]:
    """A store with these secrets, OpenAI's latest by default."""
    manager = SecretManager(versions or {"openai": LATEST}, refresh_s=refresh_s, endpoint=endpoint, clock_s=clock)
    store = SecretStore([manager])
    loop = asyncio.get_running_loop()
    store.start()
    manager.start(lambda: loop.call_soon_threadsafe(store.reread))
    try:
        yield store, manager
    finally:
        manager.close()
        await store.close()


async def has(store: SecretStore, key: str, provider: str = "openai") -> None:
    await eventually(lambda: store.key(provider) == key, f"the key {key[-2:]} of {provider}")


async def asked_again(server: SecretManagerServer, times: int = 2) -> None:
    before = len(server.asked)
    await eventually(lambda: len(server.asked) >= before + times, "more fetches")


async def test_the_key_comes_with_its_version_in_the_log(
    server: SecretManagerServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(server.endpoint) as (store, _):
        await has(store, f"{CANARY}-1")
        assert store.key("gemini") is None
        await asked_again(server)
    line = f"OPENAI_API_KEY_SECRET ({LATEST}): projects/123456/secrets/openai/versions/1 is in use"
    assert caplog.text.count(line) == 1


async def test_all_secrets_are_fetched_at_once(server: SecretManagerServer) -> None:
    server.add("gemini", "gemini-canary-0123456789")
    server.answering.clear()
    versions = {"openai": LATEST, "gemini": "projects/p/secrets/gemini/versions/latest"}
    async with running(server.endpoint, versions=versions) as (store, _):
        await eventually(lambda: len(server.asked) == 2, "both to be asked for")
        server.answering.set()
        await has(store, f"{CANARY}-1")
        await has(store, "gemini-canary-0123456789", "gemini")


async def test_one_that_does_not_come_does_not_keep_the_others_back(server: SecretManagerServer) -> None:
    versions = {"openai": LATEST, "gemini": "projects/p/secrets/gemini/versions/latest"}
    async with running(server.endpoint, versions=versions) as (store, _):
        await has(store, f"{CANARY}-1")
        assert store.key("gemini") is None
        server.add("gemini", "gemini-canary-0123456789")
        await has(store, "gemini-canary-0123456789", "gemini")


async def test_a_server_that_comes_later_is_found(
    server: SecretManagerServer, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    async with running(f"127.0.0.1:{port}") as (store, _):
        await eventually(lambda: "attempt 2 failed, there is no key yet" in caplog.text, "failures")
        assert "Secret Manager cannot be reached" in caplog.text
        server.stop()
        server.start(port)
        await has(store, f"{CANARY}-1")


async def test_the_latest_version_moves_and_the_old_key_is_still_redacted(server: SecretManagerServer) -> None:
    async with running(server.endpoint) as (store, _):
        await has(store, f"{CANARY}-1")
        redactor = Redactor(store.values)
        server.add("openai", f"{CANARY}-2\n")
        await has(store, f"{CANARY}-2")
        assert redactor.redact(f"{CANARY}-1 {CANARY}-2".encode()) == b"[redacted] [redacted]"


async def test_a_pinned_version_stays(server: SecretManagerServer) -> None:
    server.add("openai", f"{CANARY}-2")
    async with running(server.endpoint, versions={"openai": "projects/p/secrets/openai/versions/1"}) as (store, _):
        await has(store, f"{CANARY}-1")
        await asked_again(server)
        assert store.key("openai") == f"{CANARY}-1"


FAULTS = {
    "permission": (
        grpc.StatusCode.PERMISSION_DENIED,
        "permission denied: roles/secretmanager.secretAccessor is needed",
    ),
    "unavailable": (grpc.StatusCode.UNAVAILABLE, "Secret Manager cannot be reached"),
    "not found": (grpc.StatusCode.NOT_FOUND, "there is no such version"),
    "credentials": (grpc.StatusCode.UNAUTHENTICATED, "the credentials were not accepted"),
    "quota": (grpc.StatusCode.RESOURCE_EXHAUSTED, "ResourceExhausted"),
    "anything": (grpc.StatusCode.INTERNAL, "InternalServerError"),
}


@pytest.mark.parametrize(("status", "said"), FAULTS.values(), ids=FAULTS)
async def test_the_last_key_serves_through_an_outage(
    server: SecretManagerServer, caplog: pytest.LogCaptureFixture, status: grpc.StatusCode, said: str
) -> None:
    async with running(server.endpoint) as (store, _):
        await has(store, f"{CANARY}-1")
        server.error = status
        server.add("openai", f"{CANARY}-2")
        await eventually(lambda: f"attempt 2 failed, the old key stays in use: {said}" in caplog.text, said)
        assert store.key("openai") == f"{CANARY}-1"
        server.error = None
        await has(store, f"{CANARY}-2")
    assert "canary" not in caplog.text


BAD = {
    "disabled": (None, "the version is disabled or destroyed"),
    "a space inside": (f"{CANARY} 2", "must be 1 to"),
    "a line inside": (f"{CANARY}\nx-header: 1", "must be 1 to"),
    "empty": ("", "must be 1 to"),
    "too long": ("x" * (MAX_SECRET_BYTES + 1), "must be 1 to"),
    "no text": (b"\xff\x00", "must be 1 to"),
}


@pytest.mark.parametrize(("value", "said"), BAD.values(), ids=BAD)
async def test_what_is_no_key_leaves_the_old_one(
    server: SecretManagerServer, caplog: pytest.LogCaptureFixture, value: bytes | str | None, said: str
) -> None:
    async with running(server.endpoint) as (store, _):
        await has(store, f"{CANARY}-1")
        server.add("openai", value)
        await eventually(lambda: "the old key stays in use" in caplog.text, "the refusal")
        assert said in caplog.text
        assert store.key("openai") == f"{CANARY}-1"
        server.add("openai", f"{CANARY}-3")
        await has(store, f"{CANARY}-3")
    assert "canary" not in caplog.text


async def test_a_corrupted_payload_leaves_the_old_key_and_is_fetched_again(
    server: SecretManagerServer, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(server.endpoint) as (store, _):
        await has(store, f"{CANARY}-1")
        server.corrupted = True
        server.add("openai", f"{CANARY}-2")
        await eventually(lambda: "attempt 2 failed" in caplog.text, "the refusal")
        assert "the payload's CRC-32C does not match" in caplog.text
        assert store.key("openai") == f"{CANARY}-1"
        server.corrupted = False
        await has(store, f"{CANARY}-2")


async def test_an_answer_that_is_too_slow_is_asked_for_again(
    server: SecretManagerServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extproc.secret_manager.SECRET_FETCH_TIMEOUT_S", 0.1)
    async with running(server.endpoint) as (store, _):
        await has(store, f"{CANARY}-1")
        server.answering.clear()
        await eventually(lambda: "Secret Manager does not answer in time" in caplog.text, "the deadline")
        assert store.key("openai") == f"{CANARY}-1"
        server.add("openai", f"{CANARY}-2")
        server.answering.set()
        await has(store, f"{CANARY}-2")


async def test_many_refusals_cause_one_fetch_and_a_later_one_another(server: SecretManagerServer) -> None:
    clock = Clock()
    async with running(server.endpoint, SELDOM_S, clock) as (store, manager):
        await has(store, f"{CANARY}-1")
        server.add("openai", f"{CANARY}-2")
        manager.refused("openai")  # it was fetched just now
        clock.now_s += SECRET_REFETCH_INTERVAL_S
        for _ in range(100):
            manager.refused("openai")
        await has(store, f"{CANARY}-2")
        for _ in range(100):  # of answers to the old key, which come late
            manager.refused("openai")
        server.add("openai", f"{CANARY}-3")
        clock.now_s += SECRET_REFETCH_INTERVAL_S
        manager.refused("openai")
        await has(store, f"{CANARY}-3")
        assert len(server.asked) == 3


async def test_closing_does_not_wait_for_an_answer(
    server: SecretManagerServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.answering.clear()
    async with running(server.endpoint):
        await eventually(lambda: server.asked, "the call")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("secret-")]
    assert caplog.text == ""


async def test_no_value_is_shown_whatever_is_logged(
    server: SecretManagerServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    logging.getLogger("google").setLevel(logging.DEBUG)
    async with running(server.endpoint) as (store, manager):
        await has(store, f"{CANARY}-1")
        server.add("openai", f"{CANARY} no key")
        await eventually(lambda: "attempt 1 failed" in caplog.text, "the refusal")
        shown = f"{caplog.text} {store!r} {manager!r} {manager._secrets}"
    assert "canary" not in shown
    assert base64.b64encode(CANARY.encode()).decode().rstrip("=")[:-2] not in shown


def test_without_names_there_is_no_thread_and_googles_client_is_not_loaded() -> None:
    code = (
        "import sys, threading, extproc.serve\n"
        "from extproc.secret_manager import SecretManager\n"
        "manager = SecretManager({}, refresh_s=1)\n"
        "manager.start(lambda: None)\n"
        "manager.close()\n"
        "assert manager.read() == {}\n"
        "assert not [t for t in threading.enumerate() if t.name.startswith('secret-')]\n"
        "assert not [m for m in sys.modules if m.startswith(('google.cloud.secretmanager', 'google.api_core'))]\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_refusals_that_follow_one_another_ask_once_in_an_interval() -> None:
    clock = Clock()
    manager = SecretManager({"openai": LATEST}, refresh_s=SELDOM_S, clock_s=clock)
    wanted = manager._secrets["openai"].wanted
    for _ in range(2):
        manager.refused("openai")
        assert wanted.is_set()
        wanted.clear()
        manager.refused("openai")
        assert not wanted.is_set()
        clock.now_s += SECRET_REFETCH_INTERVAL_S


def test_all_secrets_that_hang_together_hold_up_the_end_no_longer_than_one(monkeypatch: pytest.MonkeyPatch) -> None:
    never = threading.Event()
    monkeypatch.setattr("extproc.secret_manager._connect", lambda _: never.wait())  # a metadata server that is silent
    monkeypatch.setattr("extproc.secret_manager.SECRETS_CLOSE_TIMEOUT_S", 0.1)
    waits: list[float] = []

    def join(_: threading.Thread, timeout: float) -> None:
        waits.append(timeout)
        never.wait(timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    manager = SecretManager(dict.fromkeys(("openai", "anthropic", "gemini"), LATEST), refresh_s=SELDOM_S)
    manager.start(lambda: None)
    manager.close()
    assert len(waits) == 3
    assert sum(waits) <= 0.1
    never.set()
