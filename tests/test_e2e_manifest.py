"""`tollgate up-manifest`, as `make up-manifest` runs it: a process of its own, from its start to its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from extproc.local.container import CHECKOUT
from extproc.local.valkey import free_port

BODY = {"model": "gpt-4o", "stream": True, "messages": [{"role": "user", "content": "Hello"}]}
_START_S, _STOP_S = 60.0, 20.0


class Up:
    """One of them. `tree` is the checkout's part that the images hold, before anything ran."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.output = folder / "output"
        self.state_dir = folder / "state"
        env = {"PATH": os.environ["PATH"], "PORT": str(self.port), "TOLLGATE_STATE_DIR": str(self.state_dir)}
        (folder / "cwd").mkdir()
        self.tree = written(CHECKOUT / "extproc") | written(CHECKOUT / "envoy")
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "extproc", "up-manifest", "--set", "TOLLGATE_LEASE_TOKENS=50"],
                cwd=folder / "cwd",
                env=env,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self.folder = folder

    @property
    def said(self) -> str:
        return self.output.read_text()

    @property
    def token(self) -> str:
        found = re.search(r"authorization: Bearer (\S+)'", self.said)
        assert found is not None
        return found[1]

    def await_ready(self) -> None:
        deadline = time.monotonic() + _START_S
        while "try it:" not in self.said:
            assert self.process.poll() is None, self.said
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def log(self, name: str) -> str:
        return (self.state_dir / f"{name}.log").read_text()


def written(folder: Path) -> dict[Path, int]:
    """When each file was; less what Python compiles, which `up-manifest` does first, as the image's build does."""
    files = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {path: path.lstat().st_mtime_ns for path in files}


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with tempfile.TemporaryDirectory(prefix="tg") as folder:
        one = Up(Path(folder))
        try:
            one.await_ready()
            yield one
        finally:
            if one.process.poll() is None:
                one.process.terminate()
                one.process.wait(_STOP_S)


def test_it_says_that_it_is_ready_and_where_the_time_went(up: Up) -> None:
    lines = up.said.splitlines()
    assert f"ready http://127.0.0.1:{up.port}" in lines
    assert any(re.fullmatch(r"start to ready: \d+\.\d\d s", line) for line in lines)
    processor = next(line for line in lines if line.startswith("  extproc: "))
    for step in ("imports", "tokenizers", "prices", "Redis", "keys"):
        assert re.search(rf"\b{step} \d+\.\d\d\b", processor), processor
    assert re.search(r"^  envoy: from \d+\.\d\d s to \d+\.\d\d s", up.said, re.MULTILINE)


def test_a_call_and_the_end_of_one_that_streams(up: Up) -> None:
    """SIGTERM reaches both containers at once: the stream goes on through both, and then everything is gone."""
    headers = {"authorization": f"Bearer {up.token}"}
    with httpx.Client(base_url=f"http://127.0.0.1:{up.port}", headers=headers, timeout=30) as client:
        assert client.get("/healthz").json()["lacking"] is None
        with client.stream("POST", "/v1/chat/completions", json=BODY) as answer:
            assert answer.status_code == 200
            parts = answer.iter_raw()
            received = next(parts)
            up.process.send_signal(signal.SIGTERM)
            received += b"".join(parts)
    assert received.endswith(b"data: [DONE]\n\n")
    begun = time.monotonic()
    assert up.process.wait(_STOP_S) == 0
    assert time.monotonic() - begun < _STOP_S
    assert "caught ENVOY_SIGTERM" in up.log("envoy")
    assert "draining" in up.log("extproc")
    assert up.said.rstrip().endswith("stopping")


def test_nothing_was_written_but_on_the_volume(up: Up) -> None:
    """A root file system that is read-only would have done. (What runs after the end: the tests are in order.)"""
    assert up.process.poll() == 0
    assert written(CHECKOUT / "extproc") | written(CHECKOUT / "envoy") == up.tree
    assert list((up.folder / "cwd").iterdir()) == []
    said_of_the_volume = up.log("extproc") + up.log("envoy")
    for directory in set(re.findall(r"/\S*?/tg\w{8}(?=/)", said_of_the_volume)):
        assert not Path(directory).exists() or Path(directory) == up.folder
