"""Which budgets apply, where windows begin and end, and what a refusal says."""

from __future__ import annotations

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from extproc.budget import applicable, cut, refusal, window_at
from extproc.errors import TollgateError
from extproc.limits import MAX_BUDGETS_PER_REQUEST
from extproc.records import Amount, Budget, BudgetRule, HoldRefusal, Mode, Principal, Scope, Unit, Window

USD = 10**9
RANKER = Principal("ranker@p.iam", service="ranker@p.iam", team="search", user=None)
HUMAN = Principal("ann@example.com", service=None, team=None, user="ann@example.com")


def rule(
    scope: Scope = Scope.SERVICE,
    id: str = "*",
    *,
    window: Window = Window.DAY,
    unit: Unit = Unit.NANOUSD,
    limit: int = 5 * USD,
    mode: Mode = Mode.HARD,
) -> BudgetRule:
    return BudgetRule(scope, id, window, unit, limit, mode)


def budget(window: Window = Window.DAY, tz: str = "UTC", unit: Unit = Unit.NANOUSD, limit: int = 5 * USD) -> Budget:
    return Budget(f"service/ranker/{window}/x", unit, limit, window, tz, Mode.HARD)


def ms(text: str, tz: str = "UTC", fold: int = 0) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(tz), fold=fold).timestamp() * 1_000)


@pytest.mark.parametrize(
    ("rules", "principal", "expected"),
    [
        pytest.param((rule(Scope.GLOBAL, mode=Mode.SOFT),), HUMAN, ["global/*/day/usd/soft"], id="global"),
        pytest.param((rule(Scope.TEAM),), RANKER, ["team/search/day/usd"], id="team"),
        pytest.param((rule(Scope.SERVICE, mode=Mode.SHADOW),), RANKER, ["service/ranker@p.iam/day/usd/shadow"], id="s"),
        pytest.param((rule(Scope.USER, unit=Unit.TOKENS),), HUMAN, ["user/ann@example.com/day/tokens"], id="user"),
        pytest.param((rule(Scope.MODEL, "gpt-*"),), HUMAN, ["model/gpt-4o/day/usd"], id="model-pattern"),
        pytest.param((rule(Scope.MODEL, "GPT-*"),), HUMAN, [], id="case-matters"),
        pytest.param((rule(Scope.MODEL, "gpt"),), HUMAN, [], id="the-whole-name"),
        pytest.param((rule(Scope.SERVICE), rule(Scope.TEAM)), HUMAN, [], id="no-name-is-no-match"),
        pytest.param((rule(Scope.USER),), RANKER, [], id="a-service-is-no-user"),
        pytest.param(
            (rule(window=Window.DAY), rule(window=Window.MONTH)),
            RANKER,
            ["service/ranker@p.iam/day/usd", "service/ranker@p.iam/month/usd"],
            id="windows-are-apart",
        ),
        pytest.param((), RANKER, [], id="none"),
    ],
)
def test_applicable_names_the_balances(
    rules: tuple[BudgetRule, ...], principal: Principal, expected: list[str]
) -> None:
    assert [found.id for found in applicable(rules, principal, "gpt-4o")] == expected


@pytest.mark.parametrize(
    ("ids", "winner"),
    [
        pytest.param(("*", "ranker@p.iam"), 1, id="exact-beats-star"),
        pytest.param(("ranker@p.iam", "*"), 0, id="whatever-the-order"),
        pytest.param(("ranker@*.iam********", "ranker@p.iam"), 1, id="exact-beats-a-longer-pattern"),
        pytest.param(("*@p.iam", "*"), 0, id="longer-beats-shorter"),
        pytest.param(("r*@p.iam", "*@p.iam"), 0, id="longer-beats-shorter-first"),
        pytest.param(("ranker*", "*@p.iam"), 0, id="equal-length-the-first"),
        pytest.param(("*", "other@p.iam"), 0, id="what-does-not-match-does-not-count"),
    ],
)
def test_the_most_specific_rule_applies(ids: tuple[str, str], winner: int) -> None:
    rules = tuple(rule(id=pattern, limit=place) for place, pattern in enumerate(ids))
    (found,) = applicable(rules, RANKER, "m")
    assert found == Budget("service/ranker@p.iam/day/usd", Unit.NANOUSD, winner, Window.DAY, "UTC", Mode.HARD)


def test_hard_and_soft_of_one_name_both_apply() -> None:
    rules = (rule(limit=10), rule(limit=5, mode=Mode.SOFT))
    assert [found.limit for found in applicable(rules, RANKER, "m")] == [10, 5]


def test_a_name_with_a_pattern_s_characters_matches_its_own_rule() -> None:
    assert applicable((rule(Scope.MODEL, "m[1]"),), HUMAN, "m[1]")[0].id == "model/m[1]/day/usd"


def test_more_budgets_than_the_bound_are_an_error_and_not_left_out() -> None:
    every = tuple(
        rule(scope, window=window, unit=unit)
        for scope in (Scope.GLOBAL, Scope.SERVICE)
        for window in Window
        for unit in Unit
    )
    assert len(applicable(every[:MAX_BUDGETS_PER_REQUEST], RANKER, "m")) == MAX_BUDGETS_PER_REQUEST
    with pytest.raises(TollgateError, match="more than 16 budgets"):
        applicable(every, RANKER, "m")


def test_rules_that_were_reloaded_are_matched_again() -> None:
    assert applicable((rule(limit=1),), RANKER, "m")[0].limit == 1
    assert applicable((rule(limit=2),), RANKER, "m")[0].limit == 2


@pytest.mark.parametrize(
    ("window", "tz", "now", "start", "end"),
    [
        pytest.param("minute", "UTC", "2026-11-23T10:20:30.5", "2026-11-23T10:20", "2026-11-23T10:21", id="minute"),
        pytest.param("hour", "UTC", "2026-11-23T10:20:30", "2026-11-23T10:00", "2026-11-23T11:00", id="hour"),
        pytest.param("hour", "Asia/Kolkata", "2026-11-23T10:20", "2026-11-23T09:30", "2026-11-23T10:30", id="+05:30"),
        pytest.param("hour", "Asia/Kathmandu", "2026-11-23T10:20", "2026-11-23T10:15", "2026-11-23T11:15", id="+05:45"),
        pytest.param("day", "UTC", "2026-11-23T00:00", "2026-11-23T00:00", "2026-11-24T00:00", id="first-moment"),
        pytest.param("day", "UTC", "2026-11-23T23:59:59.999", "2026-11-23T00:00", "2026-11-24T00:00", id="last-moment"),
        pytest.param("day", "Asia/Tokyo", "2026-11-23T15:00", "2026-11-23T15:00", "2026-11-24T15:00", id="ahead"),
        pytest.param("day", "Europe/Zurich", "2026-03-29T12:00", "2026-03-28T23:00", "2026-03-29T22:00", id="23-hours"),
        pytest.param("day", "Europe/Zurich", "2026-10-25T12:00", "2026-10-24T22:00", "2026-10-25T23:00", id="25-hours"),
        pytest.param(
            "day", "America/Havana", "2026-03-08T12:00", "2026-03-08T05:00", "2026-03-09T04:00", id="no-midnight"
        ),
        pytest.param(
            "day", "America/Havana", "2026-11-01T05:30", "2026-11-01T04:00", "2026-11-02T05:00", id="two-midnights"
        ),
        pytest.param("month", "UTC", "2028-02-29T12:00", "2028-02-01T00:00", "2028-03-01T00:00", id="leap-february"),
        pytest.param("month", "UTC", "2026-12-31T23:59", "2026-12-01T00:00", "2027-01-01T00:00", id="december"),
        pytest.param(
            "month", "Europe/Zurich", "2026-03-31T21:59", "2026-02-28T23:00", "2026-03-31T22:00", id="month-over-dst"
        ),
        pytest.param(
            "hour", "Australia/Lord_Howe", "2026-04-04T15:10", "2026-04-04T14:30", "2026-04-04T15:30", id="half-dst"
        ),
    ],
)
def test_window_bounds(window: str, tz: str, now: str, start: str, end: str) -> None:
    found = window_at(budget(Window(window), tz), ms(now))
    assert (found.start_ms, found.end_ms) == (ms(start), ms(end))


def test_a_total_never_begins_or_ends() -> None:
    found = window_at(budget(Window.TOTAL), ms("2026-11-23T10:20"))
    assert (found.start_ms, found.end_ms) == (0, 0)


@pytest.mark.parametrize("tz", ["UTC", "Europe/Zurich", "America/Havana", "Asia/Kolkata", "America/St_Johns"])
@pytest.mark.parametrize("window", [Window.MINUTE, Window.HOUR, Window.DAY, Window.MONTH])
def test_windows_follow_each_other_without_a_gap(window: Window, tz: str) -> None:
    now = ms("2026-01-01T00:30", tz)
    for _ in range(800):
        found = window_at(budget(window, tz), now)
        assert found.start_ms <= now < found.end_ms
        assert window_at(budget(window, tz), found.end_ms - 1) == found
        assert window_at(budget(window, tz), found.end_ms).start_ms == found.end_ms
        now = found.end_ms


def refused(posted: int, pending: int, window: Window = Window.DAY, **given: object) -> HoldRefusal:
    limited = budget(window, **given)  # type: ignore[arg-type]
    now = ms("2026-11-23T22:59:58.5")
    return HoldRefusal(limited, posted, pending, window_at(limited, now).end_ms, now)


def test_a_refusal_says_which_budget_how_much_and_until_when() -> None:
    error = refusal(refused(4_998_700_000, 1_300_000, tz="Europe/Zurich"), Amount(2_000_000, 50))
    assert error.message == (
        "Budget service/ranker/day/x has too little left for this request, which must hold 0.002 USD: its limit is "
        "5.00 USD, of which 4.9987 USD is used and 0.0013 USD is held by open requests; "
        "it resets at 2026-11-24T00:00:00+01:00."
    )
    assert (error.status, error.code, error.budget_id) == (429, "insufficient_quota", "service/ranker/day/x")
    assert (error.retry_after_s, error.may_clear) == (2, False)


def test_what_only_open_requests_hold_may_clear_in_seconds() -> None:
    error = refusal(refused(0, 5 * USD), Amount(5 * USD, 50))
    assert (error.retry_after_s, error.may_clear) == (5, True)
    assert not refusal(refused(1, 5 * USD), Amount(5 * USD, 50)).may_clear


def test_a_request_that_never_fits_is_told_what_would_help() -> None:
    message = refusal(refused(0, 0, unit=Unit.TOKENS, limit=200_000), Amount(1, 272_000)).message
    hint = "a lower cap of its output tokens lets it hold less"
    assert f"must hold 272,000 tokens ({hint}): its limit is 200,000" in message


def test_a_cut_says_that_the_budget_was_used_up_while_streaming() -> None:
    error = cut(refused(200_000, 0, unit=Unit.TOKENS, limit=200_000))
    assert error.message == (
        "Budget service/ranker/day/x was used up while the answer streamed: its limit is 200,000 tokens, of which "
        "200,000 tokens is used; it resets at 2026-11-24T00:00:00+00:00."
    )
    assert error.retry_after_s == 3602


def test_a_total_has_no_time_to_retry_after() -> None:
    error = refusal(refused(5 * USD, 0, Window.TOTAL), Amount(1, 1))
    assert error.message.endswith("of which 5.00 USD is used; it never resets.")
    assert error.retry_after_s is None


@pytest.mark.parametrize("late_ms", [0, 1, 10_000], ids=str)
def test_retry_after_is_a_second_at_least(late_ms: int) -> None:
    now = ms("2026-11-23T22:59:58")
    assert refusal(HoldRefusal(budget(), 5 * USD, 0, now - late_ms, now), Amount(1, 1)).retry_after_s == 1


@pytest.mark.parametrize(
    ("nanousd", "text"),
    [(0, "0.00 USD"), (1, "0.000000001 USD"), (USD // 2, "0.50 USD"), (1_234 * USD + 5 * 10**7, "1,234.05 USD")],
    ids=str,
)
def test_money_is_readable_and_exact(nanousd: int, text: str) -> None:
    assert f"its limit is {text}, " in refusal(HoldRefusal(budget(limit=nanousd), 0, 0, 0, 0), Amount(1, 1)).message
