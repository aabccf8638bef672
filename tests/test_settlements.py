from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from extproc.records import Amount, Budget, BudgetWindow, Mode, Settlement, Unit, Window
from extproc.settlements import SettlementLog

BUDGET = Budget("global/*/day/usd", Unit.NANOUSD, 5 * 10**9, Window.DAY, "Europe/Berlin", Mode.HARD)
START_MS = 1_763_852_400_000


def settlement(request_id: str) -> Settlement:
    return Settlement(request_id, (BudgetWindow(BUDGET, START_MS, START_MS + 86_400_000),), Amount(2_750_000, 1050))


def opened(directory: Path, clock_ms: int = 1) -> SettlementLog:
    return SettlementLog(directory, clock=lambda: clock_ms)


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


A, B, C = settlement("a"), settlement("b"), settlement("c")


def test_a_new_log_has_nothing_pending(tmp_path: Path) -> None:
    log = opened(tmp_path / "log")
    assert log.pending() == ()
    log.close()


def test_what_was_added_and_not_done_is_pending_in_order(tmp_path: Path) -> None:
    log = opened(tmp_path)
    for each in (A, B, C):
        log.add(each)
    log.done("b")
    log.done("unknown")
    assert log.pending() == (A, C)
    log.close()


def test_the_next_log_adopts_what_was_pending_and_the_file(tmp_path: Path) -> None:
    first = opened(tmp_path, 1)
    for each in (A, B, C):
        first.add(each)
    first.done("b")
    first.close()
    second = opened(tmp_path, 2)
    assert second.pending() == (A, C)
    assert files(tmp_path) == [f"settlements-2-{os.getpid()}.jsonl"]
    second.done("a")
    second.close()
    third = opened(tmp_path, 3)
    assert third.pending() == (C,)
    third.close()


def test_a_living_owners_file_is_left_alone(tmp_path: Path) -> None:
    living = opened(tmp_path, 1)
    living.add(A)
    other = opened(tmp_path, 2)
    assert other.pending() == ()
    assert len(files(tmp_path)) == 2
    other.close()
    living.close()


def test_the_file_is_emptied_when_all_are_done(tmp_path: Path) -> None:
    log = opened(tmp_path)
    log.add(A)
    log.add(B)
    log.done("a")
    log.done("b")
    log.close()
    assert [path.stat().st_size for path in tmp_path.iterdir()] == [0]


def test_one_added_just_after_all_were_done_is_kept(tmp_path: Path) -> None:
    first = opened(tmp_path, 1)
    for _ in range(50):
        first.add(A)
        first.done("a")
        first.add(B)
        first.done("b")
    first.add(C)
    first.close()
    second = opened(tmp_path, 2)
    assert second.pending() == (C,)
    second.close()


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99], ids=["at its start", "in the middle", "before its end"])
def test_a_torn_line_spoils_no_other(tmp_path: Path, kept: float) -> None:
    first = opened(tmp_path, 1)
    first.add(A)
    first.close()
    path = tmp_path / files(tmp_path)[0]
    line = path.read_bytes()
    path.write_bytes(line + line[: int(len(line) * kept)] + line.replace(b'"a"', b'"b"') + b"\x00\x00\n5\n[]\n")
    second = opened(tmp_path, 2)
    assert second.pending() == (A, B)
    second.close()


def test_a_disk_that_refuses_leaves_it_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(fd: int, data: memoryview) -> int:
        raise OSError("No space left on device")

    log = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        log.add(A)
        log.close()
    assert log.pending() == (A,)
    assert "could not be written" in caplog.text


OWNER = """
import sys, time
from pathlib import Path
from extproc.settlements import SettlementLog
from tests.test_settlements import settlement
log = SettlementLog(Path(sys.argv[1]), clock=lambda: 1)
for number in range(1000):
    log.add(settlement(f"r{number}"))
log._disk.submit(print, "written", flush=True)
time.sleep(600)
"""


def test_what_a_killed_process_had_written_is_adopted(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        owner.kill()
    log = opened(tmp_path, 2)
    assert log.pending() == tuple(settlement(f"r{number}") for number in range(1000))
    log.close()
    assert len(files(tmp_path)) == 1
