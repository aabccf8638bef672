"""Secrets are taken out of whatever leaves."""

from __future__ import annotations

import pytest

from extproc.redaction import Redactor


@pytest.mark.parametrize(
    ("values", "data", "expected"),
    [
        ((), b"sk-1 stays", b"sk-1 stays"),
        (("sk-1",), b"", b""),
        (("sk-1",), b"sk-2", b"sk-2"),
        (("sk-1",), b"sk-1", b"[redacted]"),
        (("sk-1",), b'{"key":"sk-1","again":"xsk-1x"}', b'{"key":"[redacted]","again":"x[redacted]x"}'),
        (("sk-1", "sk-12"), b"sk-1 sk-12", b"[redacted] [redacted]"),
        (("a.c",), b"abc a.c", b"abc [redacted]"),
        (("", "sk-1"), b"x sk-1", b"x [redacted]"),
        (("sk-1",), b"\xff sk-1", b"\xff [redacted]"),
    ],
    ids=["none", "nothing", "other", "all", "inside", "prefix", "literal", "empty-value", "binary"],
)
def test_redact(values: tuple[str, ...], data: bytes, expected: bytes) -> None:
    redactor = Redactor(lambda: values)
    assert redactor.redact(data) == expected
    assert redactor.redact(data) == expected


def test_follows_the_secrets() -> None:
    values = ["sk-old"]
    redactor = Redactor(lambda: tuple(values))
    assert redactor.redact(b"sk-old sk-new") == b"[redacted] sk-new"
    values[:] = ["sk-new"]
    assert redactor.redact(b"sk-old sk-new") == b"sk-old [redacted]"
    values.clear()
    assert redactor.redact(b"sk-old sk-new") == b"sk-old sk-new"


def test_shows_no_value() -> None:
    redactor = Redactor(lambda: ("sk-canary",))
    redactor.redact(b"x")
    assert "sk-canary" not in f"{redactor} {redactor!r}"
