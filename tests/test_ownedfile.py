from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from extproc import ownedfile

OWNER = """
import sys
from pathlib import Path
from extproc import ownedfile
assert ownedfile.create(Path(sys.argv[1])) is not None
print("owned", flush=True)
sys.stdin.read()
"""


def test_a_file_is_owned_until_its_owner_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    arguments = [sys.executable, "-c", OWNER, str(path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        with path.open("rb") as file:
            assert not ownedfile.take(file.fileno())
            owner.kill()
            owner.wait()
            assert ownedfile.take(file.fileno())


def test_a_name_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"text")
    assert ownedfile.create(path) is None
    assert path.read_bytes() == b"text"


def test_a_file_deleted_before_it_is_owned_is_created_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipper may come between the creation of a segment and its lock."""
    path = tmp_path / "file"
    real_flock = fcntl.flock
    deletions = iter([path.unlink])

    def flock(fd: int, operation: int) -> None:
        for delete in deletions:
            delete()
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    fd = ownedfile.create(path)
    assert fd is not None
    os.write(fd, b"kept")
    os.close(fd)
    assert path.read_bytes() == b"kept"
