"""Providers' keys from the environment and from files, and that no value is shown anywhere."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest

from extproc.limits import MAX_SECRET_BYTES, SECRET_REREAD_INTERVAL_S
from extproc.providers import PROVIDERS as REGISTRY
from extproc.redaction import Redactor
from extproc.secrets import EnvironmentSource, FileSource, FirstOf, Secrets, SecretStore, variable_of
from extproc.settings import SettingsInvalid
from tests.rig import eventually

PROVIDERS = ("openai", "anthropic", "gemini")
CANARY = "sk-canary-0123456789"


def environment(**env: str) -> EnvironmentSource:
    return EnvironmentSource(env, PROVIDERS)


def files(directory: Path) -> FileSource:
    return FileSource(directory, PROVIDERS)


def test_keys_of_the_environment() -> None:
    store: Secrets = SecretStore([environment(OPENAI_API_KEY=CANARY, GEMINI_API_KEY="", OTHER_API_KEY="sk-2")])
    assert [store.key(provider) for provider in (*PROVIDERS, "other")] == [CANARY, None, None, None]
    assert store.values() == (CANARY,)


@pytest.mark.parametrize(
    ("data", "key"),
    [
        (b"sk-1", "sk-1"),
        (b"sk-1\n", "sk-1"),
        (b"sk-1\r\n", "sk-1"),
        (b"x" * MAX_SECRET_BYTES, "x" * MAX_SECRET_BYTES),
    ],
    ids=["plain", "lf", "crlf", "longest"],
)
def test_key_in_a_file(tmp_path: Path, data: bytes, key: str) -> None:
    (tmp_path / "OPENAI_API_KEY").write_bytes(data)
    store = SecretStore([files(tmp_path)])
    assert (store.key("openai"), store.key("gemini")) == (key, None)


BAD = {
    "space": CANARY + " x",
    "line-inside": CANARY + "\nx-header: 1",
    "line-end-and-space": CANARY + "\n ",
    "tab": CANARY + "\t",
    "control": CANARY + "\x07",
    "outside-ascii": CANARY + "é",
    "too-long": CANARY * (MAX_SECRET_BYTES // len(CANARY) + 1),
}


@pytest.mark.parametrize("value", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize("kind", ["environment", "file"])
def test_a_bad_key_is_refused_by_the_name_of_its_variable(tmp_path: Path, kind: str, value: str) -> None:
    (tmp_path / "OPENAI_API_KEY").write_text(value)
    source = files(tmp_path) if kind == "file" else environment(OPENAI_API_KEY=value)
    with pytest.raises(SettingsInvalid, match="OPENAI_API_KEY") as refusal:
        SecretStore([source])
    assert "canary" not in str(refusal.value)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "OPENAI_API_KEY").write_text("\n")
    with pytest.raises(SettingsInvalid, match="OPENAI_API_KEY"):
        SecretStore([files(tmp_path)])


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "OPENAI_API_KEY").mkdir()
    with pytest.raises(SettingsInvalid, match="OPENAI_API_KEY"):
        SecretStore([files(tmp_path)])


def test_a_directory_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="TOLLGATE_SECRETS_DIR"):
        SecretStore([files(tmp_path / "missing")])


def test_files_win_over_the_environment(tmp_path: Path) -> None:
    (tmp_path / "OPENAI_API_KEY").write_text("sk-file-0123456789")
    store = SecretStore(
        [files(tmp_path), environment(OPENAI_API_KEY="sk-env-0123456789", GEMINI_API_KEY="g-env-0123456789")]
    )
    assert (store.key("openai"), store.key("gemini")) == ("sk-file-0123456789", "g-env-0123456789")
    assert sorted(store.values()) == ["g-env-0123456789", "sk-file-0123456789"]


async def test_a_changed_file_is_read_again_and_the_old_key_still_redacted(tmp_path: Path) -> None:
    file = tmp_path / "OPENAI_API_KEY"
    file.write_text("sk-old-0123456789")
    store = SecretStore([files(tmp_path), environment(OPENAI_API_KEY="sk-env-0123456789")])
    redactor = Redactor(store.values)
    file.write_text("sk-new-0123456789")
    assert store.key("openai") == "sk-old-0123456789"
    await store.refresh()
    await store.refresh()
    assert store.key("openai") == "sk-new-0123456789"
    assert redactor.redact(b"sk-old-0123456789 sk-new-0123456789") == b"[redacted] [redacted]"
    file.unlink()
    await store.refresh()
    assert store.key("openai") == "sk-env-0123456789"
    assert redactor.redact(b"sk-new-0123456789 sk-env-0123456789") == b"[redacted] [redacted]"


async def test_a_broken_file_leaves_everything_as_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "OPENAI_API_KEY"
    file.write_text("sk-old-0123456789")
    store = SecretStore([files(tmp_path)])
    file.write_text(CANARY + " x")
    with caplog.at_level(logging.DEBUG):
        await store.refresh()
    assert store.key("openai") == "sk-old-0123456789"
    assert "OPENAI_API_KEY" in caplog.text
    assert "canary" not in caplog.text


async def test_the_background_task_reads_again_until_it_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("extproc.secrets._REFRESH_S", 0.001)
    file = tmp_path / "OPENAI_API_KEY"
    file.write_text("sk-old-0123456789")
    store = SecretStore([files(tmp_path)])
    store.start()
    file.with_suffix(".new").write_text("sk-new-0123456789")
    file.with_suffix(".new").rename(file)
    while store.key("openai") != "sk-new-0123456789":  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    await store.close()
    assert [task for task in asyncio.all_tasks() if task is not asyncio.current_task()] == []


async def test_a_broken_file_does_not_keep_another_source_back(tmp_path: Path) -> None:
    (tmp_path / "OPENAI_API_KEY").write_text("sk-old-0123456789")
    env = {"GEMINI_API_KEY": "gemini-old-0123456789"}
    store = SecretStore([files(tmp_path), EnvironmentSource(env, PROVIDERS)])
    (tmp_path / "OPENAI_API_KEY").write_text("two words")
    env["GEMINI_API_KEY"] = "gemini-new-0123456789"
    await store.refresh()
    assert (store.key("openai"), store.key("gemini")) == ("sk-old-0123456789", "gemini-new-0123456789")


async def test_a_refused_key_has_the_files_read_at_once_and_not_too_often() -> None:
    now_s, reads = 0.0, 0

    class Counted:
        def read(self) -> Mapping[str, str]:
            nonlocal reads
            reads += 1
            return {}

    store = SecretStore([Counted()], lambda: now_s)
    store.start()
    for _ in range(100):
        store.refused()
    await eventually(lambda: reads == 2, "the files to be read")
    now_s += SECRET_REREAD_INTERVAL_S
    store.refused()
    await eventually(lambda: reads == 3, "the files to be read again")
    await store.close()


def test_no_value_is_shown(tmp_path: Path) -> None:
    (tmp_path / "GEMINI_API_KEY").write_text(CANARY)
    sources = (files(tmp_path), environment(OPENAI_API_KEY=CANARY))
    shown = f"{SecretStore(sources)} {SecretStore(sources)!r} {sources!r}"
    assert "canary" not in shown
    assert "SecretStore(gemini, openai)" in shown


@pytest.mark.parametrize("placeholder", ["none", "EMPTY", "scripted", "x"])
def test_a_placeholder_is_a_key_but_no_secret(placeholder: str) -> None:
    """A server without keys is given some word for one; answers that hold this word must stay whole."""
    store = SecretStore([environment(OPENAI_API_KEY=placeholder, GEMINI_API_KEY=CANARY)])
    assert store.key("openai") == placeholder
    assert store.values() == (CANARY,)


def test_a_file_wins_over_the_environment(tmp_path: Path) -> None:
    env = {"OPENAI_API_KEY": "sk-environment", "GEMINI_API_KEY": "sk-gemini"}
    (tmp_path / "OPENAI_API_KEY").write_text(CANARY)
    with_files, without = (SecretStore.of(directory, env, PROVIDERS) for directory in (tmp_path, None))
    assert (with_files.key("openai"), with_files.key("gemini")) == (CANARY, "sk-gemini")
    assert (without.key("openai"), without.key("gemini")) == ("sk-environment", "sk-gemini")


# Providers of every kind ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("provider", REGISTRY)
def test_every_provider_has_a_variable_of_its_own(provider: str) -> None:
    store = SecretStore.of(None, {variable_of(provider): CANARY}, REGISTRY)
    assert {name: store.key(name) for name in REGISTRY if store.key(name) is not None} == {provider: CANARY}


@pytest.mark.parametrize(
    ("env", "key"),
    [
        pytest.param({}, None, id="not set up"),
        pytest.param({"LOCAL_BASE_URL": ""}, None, id="an empty variable"),
        pytest.param({"OPENAI_BASE_URL": "http://o"}, None, id="another provider"),
        pytest.param({"LOCAL_BASE_URL": "http://l"}, "", id="set up, without a key"),
        pytest.param({"LOCAL_BASE_URL": "http://l", "LOCAL_API_KEY": CANARY}, CANARY, id="with a key"),
        pytest.param({"LOCAL_API_KEY": CANARY}, CANARY, id="with a key, where it is by default"),
    ],
)
def test_a_provider_that_needs_no_key_is_there_once_it_is_set_up(env: dict[str, str], key: str | None) -> None:
    store = SecretStore.of(None, env, REGISTRY)
    assert store.key("local") == key
    assert store.key("openai") is None
    assert store.values() == ((CANARY,) if key else ())


def test_the_first_store_that_has_a_key_wins_and_all_are_redacted() -> None:
    one = SecretStore([environment(OPENAI_API_KEY="sk-one-0123456789")])
    two = SecretStore([environment(OPENAI_API_KEY="sk-two-0123456789", GEMINI_API_KEY="sk-gem-0123456789")])
    both: Secrets = FirstOf(one, two)
    assert [both.key(provider) for provider in PROVIDERS] == ["sk-one-0123456789", None, "sk-gem-0123456789"]
    assert set(both.values()) == {"sk-one-0123456789", "sk-two-0123456789", "sk-gem-0123456789"}
