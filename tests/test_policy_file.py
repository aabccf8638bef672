"""The policy file on disk: read, replaced in every way in which editors and mounts do it, broken, gone."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from extproc import policy_file
from extproc.errors import PolicyInvalid
from extproc.limits import MAX_POLICY_BYTES
from extproc.policy import parse_policy
from extproc.policy_file import PolicyFile
from extproc.records import Policy

GOOD = 'identity: {audiences: [a], issuers: [i], allow: [x]}\nmodels: {"*": {targets: ["openai/*"]}}\n'
OTHER = GOOD.replace("[x]", "[y]")  # of the same length
BROKEN = "identity: {}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(GOOD)
    return path


def opened(path: Path) -> tuple[PolicyFile, list[Policy]]:
    changes: list[Policy] = []
    return PolicyFile(path, parse_policy, changes.append), changes


def test_reads_at_the_start(path: Path) -> None:
    file, changes = opened(path)
    assert file.policy == parse_policy(GOOD)
    assert changes == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        pytest.param(None, "the file cannot be read: No such file or directory", id="absent"),
        pytest.param(BROKEN.encode(), "line 1: identity.audiences: is missing", id="broken"),
        pytest.param(b"\xff", "the file is not UTF-8 at byte 0", id="not UTF-8"),
        pytest.param(b"#" * (MAX_POLICY_BYTES + 5), "larger", id="too large"),
    ],
)
def test_does_not_start_without_a_good_policy(path: Path, content: bytes | None, reason: str) -> None:
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(PolicyInvalid, match=reason):
        opened(path)


def write_in_place(path: Path, text: str) -> None:
    path.write_text(text)


def rename_over(path: Path, text: str) -> None:
    """As editors save: the same size and time, but another file."""
    status = path.stat()
    new = path.with_suffix(".new")
    new.write_text(text)
    os.utime(new, ns=(status.st_atime_ns, status.st_mtime_ns))
    new.replace(path)


def move_link(path: Path, text: str) -> None:
    """As mounted config maps change: a link among the path's folders points elsewhere."""
    folder = path.parent / f"data-{len(list(path.parent.iterdir()))}"
    folder.mkdir()
    (folder / "policy.yaml").write_text(text)
    link = path.parent / "link"
    link.symlink_to(folder / "policy.yaml")
    link.replace(path)


@pytest.mark.parametrize("change", [write_in_place, rename_over, move_link])
async def test_a_change_is_seen(path: Path, change: Callable[[Path, str], None]) -> None:
    file, changes = opened(path)
    change(path, OTHER)
    assert await file.reload_now()
    assert file.policy == parse_policy(OTHER)
    assert changes == [file.policy]
    assert not await file.reload_now()


def break_it(path: Path, breakage: str) -> None:
    path.unlink()
    if breakage == "broken":
        path.write_text(BROKEN)
    if breakage == "a folder":
        path.mkdir()


def mend_it(path: Path) -> None:
    path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    path.write_text(OTHER)


async def test_a_touch_is_no_change(path: Path) -> None:
    file, changes = opened(path)
    os.utime(path, ns=(1, 1))
    assert not await file.reload_now()
    assert changes == []


@pytest.mark.parametrize("breakage", ["broken", "gone", "a folder"])
async def test_the_old_policy_stays_and_the_reason_is_logged_once(
    path: Path, breakage: str, caplog: pytest.LogCaptureFixture
) -> None:
    file, changes = opened(path)
    before = file.policy
    break_it(path, breakage)
    for _ in range(3):
        assert not await file.reload_now()
    assert file.policy is before
    assert changes == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    reason = {"broken": "line 1: identity.allow", "gone": "No such file", "a folder": "Is a directory"}[breakage]
    assert reason in record.getMessage()

    mend_it(path)
    assert await file.reload_now()
    assert changes == [parse_policy(OTHER)]


async def test_polls_until_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_file, "POLICY_POLL_S", 0.001)
    changed = asyncio.Event()
    file = PolicyFile(path, parse_policy, lambda _: changed.set())
    file.start()
    write_in_place(path, OTHER)
    await changed.wait()
    await file.close()
    await file.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_defect_does_not_end_the_polling(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(policy_file, "POLICY_POLL_S", 0.001)
    calls: asyncio.Queue[Policy] = asyncio.Queue()

    def fail(policy: Policy) -> None:
        calls.put_nowait(policy)
        raise RuntimeError("a defect")

    file = PolicyFile(path, parse_policy, fail)
    file.start()
    for text in (OTHER, GOOD):
        rename_over(path, text)
        assert await calls.get() == parse_policy(text)
    await file.close()
    assert "could not be reloaded" in caplog.text
