"""The table of what conforms, by protocol, as a run of the tests has found it.

A test says which recorded case it tries, and in which column of the table that counts; it conforms if what is asserted
of it holds. The table is at the end of the run's output; `--conformance PATH` also writes it to a file.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.recordings import COLLECTION, SUBSET, Case, cases

Conforms = Callable[..., AbstractContextManager[None]]

_PROPERTY = "conformance"
_NATIVE, _ERRORS, _THROUGH = "native", "error classes", "through the gateway"

HEADING = """\
# What conforms

Every recorded answer of every API that is spoken here, as the tests have found it. `native`: through Envoy to a caller
of the same API, byte for byte, with the recorded usage written down. `into …`: translated, at any chunk boundaries, and
read by the official client of that API: the same text, calls of tools, end and usage. `error classes`: the official
clients of the other APIs raise the class that stands for the status. `through the gateway`: translated, through Envoy,
for callers of two other APIs, with the same demands; whoever speaks Responses is asked by them in OpenAI's chat. A cell
is what passed, of what was tried; no cell, nothing to try.

Made by no hand: `pytest tests/test_translation.py tests/test_e2e_recordings.py tests/test_e2e_matrix.py --conformance
docs/conformance.md`.
"""


@dataclass
class _Cell:
    passed: int = 0
    tried: int = 0

    def __str__(self) -> str:
        return f"{self.passed}/{self.tried}" if self.tried else ""


@dataclass
class Table:
    """Cells by protocol and column, and why some cases are not as the others."""

    cells: dict[tuple[str, str], _Cell] = field(default_factory=lambda: defaultdict(_Cell))
    exceptions: set[tuple[str, str, str]] = field(default_factory=set)  # reason, case, column
    failures: set[tuple[str, str]] = field(default_factory=set)  # column, case

    def add(self, protocol: str, column: str, case: str, why_not: str, *, passed: bool) -> None:
        """`why_not`: a case that is not tried as the others are, or not at all, and why. Not counted as passed."""
        if why_not:
            self.exceptions.add((why_not, case, column))
            return
        cell = self.cells[protocol, column]
        cell.tried += 1
        cell.passed += passed
        if not passed:
            self.failures.add((column, case))

    def lines(self) -> Iterator[str]:
        """As Markdown."""
        columns = sorted({column for _, column in self.cells}, key=_place)
        counts = _counts()
        yield from _row(("protocol", "cases", *columns))
        yield from _row(("---", *("---:" for _ in ("", *columns))))
        for protocol in sorted({protocol for protocol, _ in self.cells}):
            cells = (self.cells.get((protocol, column), "") for column in columns)
            yield from _row((protocol, str(counts[protocol]), *map(str, cells)))
        for reason in sorted({reason for reason, _, _ in self.exceptions}):
            yield ""
            yield f"Exceptions, for {reason}:"
            yield ""
            names = defaultdict(list)
            for _, case, column in sorted(one for one in self.exceptions if one[0] == reason):
                names[case].append(column)
            yield from (f"- {case}: {', '.join(columns)}" for case, columns in names.items())
        if self.failures:
            yield ""
            yield "Failed:"
            yield ""
            yield from (f"- {case}: {column}" for column, case in sorted(self.failures))


def _place(column: str) -> tuple[int, str]:
    return (1 if column.startswith("into ") else (_NATIVE, "", _ERRORS, _THROUGH).index(column), column)


def _row(cells: Iterable[str]) -> Iterator[str]:
    yield f"| {' | '.join(cells)} |"


def _counts() -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for case in cases(COLLECTION) or cases(SUBSET):
        counts[case.protocol] += 1
    return counts


@pytest.fixture
def conforms(record_property: Callable[[str, object], None]) -> Conforms:
    """`with conforms(case, column, why_not)`: what is tried within."""

    @contextmanager
    def note(case: Case, column: str, why_not: str | None = None) -> Iterator[None]:
        passed = False
        try:
            yield
            passed = True
        finally:
            record_property(_PROPERTY, [case.protocol, column, case.name, why_not or "", passed])

    return note


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance", type=Path, help="write the table of what conforms to this file")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What this run has tried, which may be a part of it all."""
    table = Table()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name, value in report.user_properties:
                if name == _PROPERTY and report.when == "call":
                    *noted, passed = value
                    table.add(*noted, passed=passed)
    if not table.cells:
        return
    terminalreporter.section("what conforms")
    terminalreporter.write_line("\n".join(table.lines()))
    if (path := config.getoption("--conformance")) is not None:
        path.write_text("\n".join((HEADING, *table.lines(), "")))
