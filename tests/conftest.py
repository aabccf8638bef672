"""What the end-to-end tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from tests.checker import Checker
from tests.conformance import conforms, pytest_addoption, pytest_terminal_summary  # noqa: F401 (pytest finds them here)
from tests.rig import Rig

# The same examples in every run, and no judgement of how fast they come: a busy machine is no defect.
settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("same")


@pytest.fixture(scope="module")
def short_directory() -> Iterator[Path]:
    """A directory for a rig: pytest's own are too long for the path of a Unix socket."""
    directory = Path(tempfile.mkdtemp(prefix="tg"))
    yield directory
    shutil.rmtree(directory)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def checker(rig: Rig) -> Checker:
    """The one checker of a module's own rig, made before anything was asked of it."""
    return Checker(rig)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails shows the end of its rig's logs."""
    report = yield
    if report.failed:
        arguments: dict[str, Any] = getattr(item, "funcargs", {})
        for rig in (value for value in arguments.values() if isinstance(value, Rig)):
            report.sections += [(path.name, _tail(path)) for path in sorted(rig.directory.glob("**/[pe]*.log"))]
    return report


def _tail(path: Path, lines: int = 20) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
