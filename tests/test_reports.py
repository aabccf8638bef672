from __future__ import annotations

import dataclasses

import orjson
import pytest
from rich.console import Console
from rich.table import Table

from extproc.records import Balance, Budget, Mode, Outcome, Unit, UsageRecord, Window
from extproc.reports import (
    budgets_json,
    budgets_table,
    duration,
    fit,
    moment,
    money,
    quantity,
    report_json,
    report_table,
    usage_json,
    usage_table,
    views_table,
    wide_usage_table,
)
from extproc.usage.views import View
from tests.usage_rows import usage_record

SERVICE = Balance(
    Budget(
        "service/ranker@my-project.iam.gserviceaccount.com/day/usd",
        Unit.NANOUSD,
        5_000_000_000,
        Window.DAY,
        "Europe/Berlin",
        Mode.HARD,
    ),
    posted=1_234_567_890,
    pending=2_750_000,
    resets_at_ms=10_000_000,
)
USER = Balance(
    Budget("user/alice@example.com/total/tokens/soft", Unit.TOKENS, 200_000, Window.TOTAL, "UTC", Mode.SOFT),
    posted=201_000,
    pending=50,
    resets_at_ms=0,
)


def shown(table: Table, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(fit(table, console))
    return capture.get().rstrip("\n").split("\n")


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [
        (0, "$0.000000"),
        (1, "<$0.000001"),
        (999, "<$0.000001"),
        (1_000, "$0.000001"),
        (123_456, "$0.000123"),
        (2_750_000, "$0.002750"),
        (9_999_999_000, "$9.999999"),
        (99_999_999_000, "$99.999999"),
        (100_000_000_000, "$100.00"),
        (2_000_000_000_000, "$2,000.00"),
        (-2_750_000, "-$0.002750"),
        (-1, "-<$0.000001"),
    ],
)
def test_money(nanousd: int, text: str) -> None:
    assert money(nanousd) == text


@pytest.mark.parametrize(
    ("figure", "unit", "text"),
    [(200_000, Unit.TOKENS, "200,000"), (-1_050, Unit.TOKENS, "-1,050"), (2_750_000, Unit.NANOUSD, "$0.002750")],
)
def test_quantity(figure: int, unit: Unit, text: str) -> None:
    assert quantity(figure, unit) == text


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (-1, "0s"),
        (999, "0s"),
        (12_000, "12s"),
        (60_000, "1m 0s"),
        (270_999, "4m 30s"),
        (3_600_000, "1h 0m"),
        (86_399_999, "23h 59m"),
        (86_400_000, "1d 0h"),
        (31 * 86_400_000 - 1, "30d 23h"),
    ],
)
def test_duration(ms: int, text: str) -> None:
    assert duration(ms) == text


@pytest.mark.parametrize(
    ("ts", "text"),
    [("2026-11-23T00:00:00.123Z", "00:00:00"), ("2026-11-22T23:59:59.999Z", "11-22 23:59")],
    ids=["the newest's day", "another day"],
)
def test_moment(ts: str, text: str) -> None:
    assert moment(ts, "2026-11-23T16:00:00.123Z") == text


class TestJson:
    def test_of_usage_has_exactly_the_fields_of_a_usage_record(self) -> None:
        record = usage_record(user=None)
        (value,) = orjson.loads(usage_json([record]))
        assert [*value] == [field.name for field in dataclasses.fields(UsageRecord)]
        assert value == dataclasses.asdict(record)

    def test_of_budgets_has_integers_in_the_budgets_unit(self) -> None:
        assert orjson.loads(budgets_json([SERVICE, USER])) == [
            {
                "id": "service/ranker@my-project.iam.gserviceaccount.com/day/usd",
                "unit": "nanousd",
                "mode": "hard",
                "window": "day",
                "tz": "Europe/Berlin",
                "limit": 5_000_000_000,
                "posted": 1_234_567_890,
                "pending": 2_750_000,
                "left": 3_762_682_110,
                "resets_at_ms": 10_000_000,
            },
            {
                "id": "user/alice@example.com/total/tokens/soft",
                "unit": "tokens",
                "mode": "soft",
                "window": "total",
                "tz": "UTC",
                "limit": 200_000,
                "posted": 201_000,
                "pending": 50,
                "left": -1_050,
                "resets_at_ms": None,
            },
        ]

    def test_of_nothing_is_an_empty_array(self) -> None:
        assert usage_json([]) == budgets_json([]) == "[]"


class TestUsageTable:
    def test_at_80_columns_only_names_are_shortened(self) -> None:
        records = [
            usage_record(ts="2026-11-22T09:00:00Z"),
            usage_record(outcome=Outcome.UPSTREAM_ERROR, cost_nanousd=12_345_678_901, prompt_tokens=128_000),
            usage_record(service=None, user="alice@example.com", model=None, requested_model="gpt-4o"),
        ]
        assert shown(usage_table(records), 80) == [
            "time        caller        model        outcome            in out       cost   ms",
            "11-22 09:00 ranker@my-pr… gpt-4o-2024… ok               1000  50  $0.002750 1543",
            "16:00:00    ranker@my-pr… gpt-4o-2024… upstream_error 128000  50 $12.345679 1543",
            "16:00:00    alice@exampl… gpt-4o       ok               1000  50  $0.002750 1543",
        ]

    def test_is_no_wider_than_it_needs_to_be(self) -> None:
        assert shown(usage_table([usage_record(service="a@b.c", model="m")]), 200) == [
            "time     caller model outcome   in out      cost   ms",
            "16:00:00 a@b.c  m     ok      1000  50 $0.002750 1543",
        ]

    def test_a_caller_that_is_not_known_is_a_dash(self) -> None:
        record = usage_record(service=None, model=None, requested_model=None, outcome=Outcome.REFUSED, status=401)
        assert shown(usage_table([record]), 80)[1].split()[1:5] == ["-", "-", "refused", "401"]

    @pytest.mark.parametrize("name", ["\x1b[31mred", "a\nb", "a\u202eb", "a\x9bb"])
    def test_a_callers_text_does_not_reach_the_terminal_as_control(self, name: str) -> None:
        for table in (usage_table([usage_record(model=name)]), wide_usage_table([usage_record(model=name)])):
            lines = shown(table, 1000)
            assert len(lines) == 2
            assert "\ufffd" in lines[1]
            assert all(line.isprintable() for line in lines)

    def test_a_callers_text_is_not_markup(self) -> None:
        assert "[bold]x" in shown(usage_table([usage_record(model="[bold]x")]), 120)[1]

    def test_wide_has_every_field_whole(self) -> None:
        header, row = shown(wide_usage_table([usage_record()]), 1000)
        assert header.split() == [field.name for field in dataclasses.fields(UsageRecord)]
        assert "…" not in row
        assert "service/ranker@my-project.iam.gserviceaccount.com/day/usd" in row


class TestBudgetsTable:
    def test_at_80_columns_the_middle_of_an_id_is_left_out(self) -> None:
        assert shown(budgets_table([SERVICE, USER], now_ms=0), 80) == [
            "budget                    mode     limit    posted   pending      left resets in",
            "service/rank….com/day/usd hard $5.000000 $1.234568 $0.002750 $3.762682    2h 46m",
            "user/alice@e…/tokens/soft soft   200,000   201,000        50    -1,050     never",
        ]

    def test_is_whole_where_there_is_room(self) -> None:
        assert shown(budgets_table([USER], now_ms=0), 120) == [
            "budget                                   mode   limit  posted pending   left resets in",
            "user/alice@example.com/total/tokens/soft soft 200,000 201,000      50 -1,050     never",
        ]

    @pytest.mark.parametrize("width", range(20, 120, 7))
    def test_is_one_line_a_budget_at_any_width(self, width: int) -> None:
        lines = shown(budgets_table([SERVICE, USER], now_ms=0), width)
        assert len(lines) == 3
        assert all(len(line) <= width for line in lines)


class TestReport:
    COLUMNS = ("day", "user", "requests", "cost_nanousd", "usd", "share")
    ROWS = (
        ("2026-11-23", None, 1_234, 123_456_000, 0.123456, 1 / 3),
        ("2026-11-24", "a\x1b@b.c", 1, 1, 1e-9, 1.0),
    )

    def test_json_has_every_column_as_it_is(self) -> None:
        first, second = orjson.loads(report_json(self.COLUMNS, self.ROWS))
        assert first == dict(zip(self.COLUMNS, self.ROWS[0], strict=True))
        assert second["cost_nanousd"] == 1

    def test_table_says_money_once(self) -> None:
        assert shown(report_table(self.COLUMNS, self.ROWS), 80) == [
            "day        user   requests       cost  share",
            "2026-11-23 -         1,234  $0.123456 0.3333",
            "2026-11-24 a\ufffd@b.c        1 <$0.000001      1",
        ]

    def test_a_budgets_figures_are_in_its_unit(self) -> None:
        rows = [("nanousd", 5 * 10**9, 2.5e9, "2026-11-23T00:00:00Z"), ("tokens", 200_000, None, None)]
        assert shown(report_table(("unit", "limit_amount", "speed_per_hour", "resets_at"), rows), 80) == [
            "unit    limit_amount speed_per_hour resets_at           ",
            "nanousd    $5.000000      $2.500000 2026-11-23T00:00:00Z",
            "tokens       200,000              - -                   ",
        ]

    def test_views_are_listed_by_name(self) -> None:
        listed = views_table([View("b", "-- What b says. More.\nSELECT 1"), View("a", "-- What a says.\nSELECT 1")])
        assert [line.rstrip() for line in shown(listed, 80)] == [
            "report what it says",
            "a      What a says",
            "b      What b says",
        ]
