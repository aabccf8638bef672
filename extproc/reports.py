"""What `tollgate usage`, `tollgate budgets` and `tollgate report` show: records to tables and JSON. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from operator import attrgetter
from typing import Any

import orjson

with suppress(ModuleNotFoundError):  # in the processor's image: what is printed there is JSON
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.measure import Measurement
    from rich.table import Table
    from rich.text import Text

from extproc.records import Balance, Outcome, Unit, UsageRecord
from extproc.usage.views import View

_NANOUSD_PER_USD = 10**9
_NANOUSD_PER_MICROUSD = 1_000
_FINE_BELOW_NANOUSD = 100 * _NANOUSD_PER_USD
_AS_WISHED = (Outcome.OK, Outcome.CACHE_EXACT, Outcome.CACHE_SEMANTIC)
_ANY_WIDTH = 10_000
_MONEY = "_nanousd"


# Figures --------------------------------------------------------------------------------------------------------------


def money(nanousd: int) -> str:
    """`$0.000123`; from 100 USD on with cents only. What rounds to nothing but is not nothing says so."""
    sign, nanousd = ("-" if nanousd < 0 else ""), abs(nanousd)
    if 0 < nanousd < _NANOUSD_PER_MICROUSD:
        return f"{sign}<$0.000001"
    decimals = 6 if nanousd < _FINE_BELOW_NANOUSD else 2
    return f"{sign}${nanousd / _NANOUSD_PER_USD:,.{decimals}f}"


def quantity(figure: int, unit: Unit) -> str:
    """A budget's figure in its unit: `$1.234567` or `200,000`."""
    return money(figure) if unit is Unit.NANOUSD else f"{figure:,}"


def duration(ms: int) -> str:
    """The two largest units: `14d 3h`, `3h 12m`, `4m 30s`, `12s`."""
    seconds = max(0, ms) // 1_000
    days, hours, minutes = seconds // 86_400, seconds // 3_600 % 24, seconds // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes}m"
    return f"{minutes}m {seconds % 60}s" if minutes else f"{seconds}s"


def moment(ts: str, newest: str) -> str:
    """The time of a record; for another day than the newest record's, its date and hour."""
    at = datetime.fromisoformat(ts)
    return f"{at:%H:%M:%S}" if at.date() == datetime.fromisoformat(newest).date() else f"{at:%m-%d %H:%M}"


# JSON -----------------------------------------------------------------------------------------------------------------


def usage_json(records: Sequence[UsageRecord]) -> str:
    """An array of UsageRecord's fields, one record a line."""
    return _array([orjson.dumps(record) for record in records])


def budgets_json(balances: Sequence[Balance]) -> str:
    """An array, one budget a line; figures in the budget's unit, `resets_at_ms` null for a total."""
    return _array([orjson.dumps(_balance(balance)) for balance in balances])


def report_json(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """An array of a view's rows, one a line."""
    return _array([orjson.dumps(dict(zip(columns, row, strict=True))) for row in rows])


def _array(items: Sequence[bytes]) -> str:
    return "[" + ",\n".join(item.decode() for item in items) + "]"


def _balance(balance: Balance) -> dict[str, Any]:
    budget = balance.budget
    return {
        "id": budget.id,
        "unit": budget.unit,
        "mode": budget.mode,
        "window": budget.window,
        "tz": budget.tz,
        "limit": budget.limit,
        "posted": balance.posted,
        "pending": balance.pending,
        "left": _left(balance),
        "resets_at_ms": balance.resets_at_ms or None,
    }


def _left(balance: Balance) -> int:
    return balance.budget.limit - balance.posted - balance.pending


# Tables ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Column:
    """`value` takes what a row is made of. A flexible column gives way where the terminal is narrow."""

    title: str
    value: Callable[[Any], object]
    right: bool = False
    flexible: bool = False


def usage_table(records: Sequence[UsageRecord]) -> Table:
    """One line a record, the newest last: what fits 80 columns."""
    newest = records[-1].ts if records else ""
    columns = (
        _Column("time", lambda record: moment(record.ts, newest)),
        _Column("caller", lambda record: record.user or record.service, flexible=True),
        _Column("model", lambda record: record.model or record.requested_model, flexible=True),
        _Column("outcome", _outcome),
        _Column("in", lambda record: record.prompt_tokens, right=True),
        _Column("out", lambda record: record.completion_tokens, right=True),
        _Column("cost", lambda record: money(record.cost_nanousd), right=True),
        _Column("ms", lambda record: record.duration_ms, right=True),
    )
    return _table(columns, records)


def wide_usage_table(records: Sequence[UsageRecord]) -> Table:
    """One line a record with every field, as wide as it is."""
    names = [field.name for field in dataclasses.fields(UsageRecord)]
    return _table([_Column(name, attrgetter(name)) for name in names], records)


def budgets_table(balances: Sequence[Balance], now_ms: int) -> Table:
    """One line a budget."""
    columns = (
        _Column("budget", lambda balance: _Shortened(_printable(balance.budget.id)), flexible=True),
        _Column("mode", lambda balance: balance.budget.mode),
        _Column("limit", lambda balance: quantity(balance.budget.limit, balance.budget.unit), right=True),
        _Column("posted", lambda balance: quantity(balance.posted, balance.budget.unit), right=True),
        _Column("pending", lambda balance: quantity(balance.pending, balance.budget.unit), right=True),
        _Column("left", lambda balance: quantity(_left(balance), balance.budget.unit), right=True),
        _Column("resets in", lambda balance: _resets_in(balance, now_ms), right=True),
    )
    return _table(columns, balances)


def views_table(views: Sequence[View]) -> Table:
    """One line a view: its name, and what it says."""
    columns = (_Column("report", attrgetter("name")), _Column("what it says", attrgetter("summary")))
    return _table(columns, sorted(views, key=attrgetter("name")))


def report_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """One line a row of a view. Money is shown once, from the column that is exact."""
    places = {name: place for place, name in enumerate(columns)}
    unit = places.get("unit")
    shown = [_report_column(name, place, unit, rows) for name, place in places.items() if name != "usd"]
    return _table(shown, rows)


def _report_column(name: str, place: int, unit: int | None, rows: Sequence[Sequence[Any]]) -> _Column:
    def value(row: Sequence[Any]) -> object:
        figure = row[place]
        if isinstance(figure, bool) or not isinstance(figure, int | float):
            return figure
        if unit is not None:
            return quantity(round(figure), Unit(row[unit]))
        if isinstance(figure, float):
            return f"{figure:.4g}"
        return money(figure) if name.endswith(_MONEY) else f"{figure:,}"

    figures = any(isinstance(row[place], int | float) and not isinstance(row[place], bool) for row in rows)
    return _Column(name.removesuffix(_MONEY), value, right=figures)


def fit(table: Table, console: Console) -> Table:
    """Let the flexible columns share what the others leave, where the whole is wider than the terminal."""
    natural = Measurement.get(console, console.options.update(max_width=_ANY_WIDTH), table).maximum
    table.expand = natural > console.width
    return table


def _table(columns: Sequence[_Column], items: Sequence[object]) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            column.title,
            justify="right" if column.right else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if column.flexible else None,
        )
    for item in items:
        table.add_row(*(_cell(column.value(item)) for column in columns))
    return table


def _cell(value: object) -> RenderableType:
    if isinstance(value, Text | _Shortened):
        return value
    return Text("-" if value is None else _printable(str(value)))


def _outcome(record: UsageRecord) -> Text:
    if record.outcome in _AS_WISHED:
        return Text(record.outcome)
    text = f"{record.outcome} {record.status}" if record.outcome is Outcome.REFUSED else record.outcome
    return Text(text, style="red")


def _resets_in(balance: Balance, now_ms: int) -> str:
    return duration(balance.resets_at_ms - now_ms) if balance.resets_at_ms else "never"


def _printable(text: str) -> str:
    """Callers choose some names: one must not move the cursor, nor turn the text around."""
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


@dataclass(frozen=True, slots=True)
class _Shortened:
    """A budget's id: where it is too long its middle gives way, since its two ends say whose it is and for how long."""

    text: str

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, len(self.text))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        spare = options.max_width - 1
        head = (spare + 1) // 2
        fits = len(self.text) <= options.max_width
        yield Text(self.text if fits else f"{self.text[:head]}…{self.text[len(self.text) - (spare - head) :]}")
