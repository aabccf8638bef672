"""What runs is what was asked for: the hot path compiled, or every module of it as it is written."""

from __future__ import annotations

import importlib
import os
import runpy
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest
import setuptools  # type: ignore[import-untyped]

from extproc.local.container import CHECKOUT


@pytest.fixture(scope="module")
def hot_path() -> Sequence[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        patch.delenv("TOLLGATE_COMPILE", raising=False)
        return tuple(runpy.run_path(str(CHECKOUT / "setup.py"))["HOT_PATH"])


def test_every_module_is_what_was_asked_for(hot_path: Sequence[str]) -> None:
    compiled = os.environ.get("TOLLGATE_COMPILED") == "1"
    assert hot_path
    for path in hot_path:
        name = str(PurePosixPath(path).with_suffix("")).replace("/", ".")
        file = importlib.import_module(name).__file__
        assert file is not None
        assert file.endswith(".so") is compiled, f"{name} is {file}"


def test_what_is_compiled_is_there(hot_path: Sequence[str]) -> None:
    assert all((CHECKOUT / path).is_file() for path in hot_path)
    assert not [path for path in hot_path if Path(path).name == "__init__.py"], "mypyc cannot compile it in a group"
