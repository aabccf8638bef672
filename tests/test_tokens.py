"""Token counters: the shipped files, and nothing but them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.tokens import BPE_DIR, BPE_FILES, EncodingUnusable, check_file, counter

COUNTS = [
    ("o200k_base", "Hello, world!", 4),
    ("o200k_base", "", 0),
    ("o200k_base", "안녕하세요", 2),
    ("cl100k_base", "tiktoken is great!", 6),
    ("cl100k_base", "안녕하세요", 5),
]


@pytest.mark.parametrize(("encoding", "text", "expected"), COUNTS)
def test_count(encoding: str, text: str, expected: int) -> None:
    assert counter(encoding)(text) == expected


def test_special_tokens_are_text() -> None:
    assert counter("o200k_base")("<|endoftext|>") > 1


@pytest.mark.parametrize("encoding", BPE_FILES)
@given(text=st.text(st.characters(exclude_categories=()), max_size=200))
def test_any_text_is_counted(encoding: str, text: str) -> None:
    """Half surrogate pairs included: providers send them, and Python's strings hold them."""
    assert 0 <= counter(encoding)(text) <= 4 * len(text)


def test_half_of_an_emoji_counts() -> None:
    assert counter("o200k_base")("\ud83d") >= 1


def test_loaded_once() -> None:
    assert counter("o200k_base") is counter("o200k_base")


def test_an_encoding_that_is_not_shipped() -> None:
    with pytest.raises(EncodingUnusable, match="'p50k_base' is not shipped; there are o200k_base, cl100k_base"):
        counter("p50k_base")


@pytest.mark.parametrize("encoding", BPE_FILES)
def test_a_changed_file_is_refused_and_stays(encoding: str, tmp_path: Path) -> None:
    name, sha256 = BPE_FILES[encoding]
    shutil.copy(BPE_DIR / name, tmp_path)
    check_file(encoding, tmp_path)
    with (tmp_path / name).open("ab") as file:
        file.write(b"\n")
    with pytest.raises(EncodingUnusable, match=f"has the SHA-256 [0-9a-f]{{64}}, not {sha256}"):
        check_file(encoding, tmp_path)
    assert (tmp_path / name).exists()


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EncodingUnusable, match="cannot be read: No such file"):
        check_file("o200k_base", tmp_path)


def test_a_counter_checks_its_file_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.tokens.BPE_DIR", tmp_path)
    with pytest.raises(EncodingUnusable):
        counter.__wrapped__("o200k_base")


OFFLINE = f"""
import socket, sys
def refuse(*args, **kwargs):
    sys.exit("a connection was tried")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from extproc.tokens import counter
print(*[counter(encoding)("Hello, world!") for encoding in {list(BPE_FILES)}])
"""


def test_nothing_is_downloaded() -> None:
    """In a process of its own, where no encoding has been loaded before and the environment names no cache."""
    result = subprocess.run([sys.executable, "-c", OFFLINE], env={}, capture_output=True, text=True, check=False)
    assert (result.stdout, result.stderr, result.returncode) == ("4 4\n", "", 0)


def test_the_readme_has_the_sums() -> None:
    readme = (BPE_DIR / "README.md").read_text()
    for encoding, (name, sha256) in BPE_FILES.items():
        assert f"| {encoding} | `{name}` | `{sha256}` |" in readme
