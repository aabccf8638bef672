"""Which budgets a request is under, where their windows begin and end, and what a caller is told at their limit."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from fnmatch import translate
from functools import lru_cache
from zoneinfo import ZoneInfo

from extproc.errors import BudgetExhausted, TollgateError
from extproc.limits import MAX_BUDGETS_PER_REQUEST, MAX_CACHED_MATCHES, MAX_CACHED_WINDOWS
from extproc.policy import Same
from extproc.records import Amount, Budget, BudgetRule, BudgetWindow, HoldRefusal, Mode, Principal, Scope, Unit, Window

_MINUTE_MS = 60_000
_PENDING_RETRY_S = 5  # open requests end in seconds
_NANOUSD_PER_USD = 10**9
_UNIT_WORDS = {Unit.NANOUSD: "usd", Unit.TOKENS: "tokens"}


def applicable(rules: tuple[BudgetRule, ...], principal: Principal, model: str) -> tuple[Budget, ...]:
    """The budgets of one request, in the policy's order; `model` is the requested name.

    A rule's id is a shell-style pattern, matched on the whole name and with case, and each name that it matches has a
    balance of its own. Of the rules that share scope, window, unit and mode the most specific one applies: the exact
    name before any pattern, then the longest pattern, then the first. A scope that the caller has no name for (a
    service's token names no user) is no limit to it.

    Raises TollgateError above `limits.MAX_BUDGETS_PER_REQUEST`: leaving one out would leave it unenforced.
    """
    return _applicable(Same(rules), principal.team, principal.service, principal.user, model)


def window_at(budget: Budget, now_ms: int) -> BudgetWindow:
    """The budget's window at a time: `start_ms <= now_ms < end_ms`, or 0 and 0 for a total.

    Days and months begin at the zone's midnight, so that a day may have 23 or 25 hours; hours follow the zone's
    offset, so that they begin on its half hours where it has them.
    """
    return BudgetWindow(budget, *_bounds(budget.window, budget.tz, now_ms // _MINUTE_MS))


def refusal(refused: HoldRefusal, least: Amount) -> BudgetExhausted:
    """What a caller is told whose request was not let through; `least` is what it had to hold.

    Where only open requests stand in its way it may try again in a moment.
    """
    budget = refused.budget
    must_hold = least.of(budget.unit)
    what = f"has too little left for this request, which must hold {_readable(must_hold, budget.unit)}"
    if must_hold > budget.limit:
        what += " (a lower cap of its output tokens lets it hold less)"
    return _exhausted(refused, what, may_clear=budget.limit - refused.posted >= must_hold)


def cut(refused: HoldRefusal) -> BudgetExhausted:
    """What a caller is told whose stream was ended at the limit."""
    return _exhausted(refused, "was used up while the answer streamed")


@lru_cache(maxsize=MAX_CACHED_MATCHES)
def _applicable(
    same: Same[tuple[BudgetRule, ...]], team: str | None, service: str | None, user: str | None, model: str
) -> tuple[Budget, ...]:
    names = {Scope.GLOBAL: "*", Scope.TEAM: team, Scope.SERVICE: service, Scope.USER: user, Scope.MODEL: model}
    best: dict[tuple[Scope, Window, Unit, Mode], BudgetRule] = {}
    for rule in same.part:
        name = names[rule.scope]
        if name is None or not _matches(rule.id, name):
            continue
        key = (rule.scope, rule.window, rule.unit, rule.mode)
        if key not in best or _specificity(rule, name) > _specificity(best[key], name):
            best[key] = rule
    if len(best) > MAX_BUDGETS_PER_REQUEST:
        raise TollgateError(f"more than {MAX_BUDGETS_PER_REQUEST} budgets of the policy apply to this request")
    return tuple(_budget(rule, names[rule.scope] or "") for rule in best.values())


def _matches(pattern: str, name: str) -> bool:
    # The exact name first: a name may hold a pattern's own characters.
    return pattern == name or _compiled(pattern).match(name) is not None


@lru_cache(maxsize=MAX_CACHED_MATCHES)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def _specificity(rule: BudgetRule, name: str) -> tuple[bool, int]:
    return (rule.id == name, len(rule.id))


def _budget(rule: BudgetRule, name: str) -> Budget:
    mode = "" if rule.mode is Mode.HARD else f"/{rule.mode}"
    budget_id = f"{rule.scope}/{name}/{rule.window}/{_UNIT_WORDS[rule.unit]}{mode}"
    return Budget(budget_id, rule.unit, rule.limit, rule.window, rule.tz, rule.mode)


@lru_cache(maxsize=MAX_CACHED_WINDOWS)
def _bounds(window: Window, tz: str, minute: int) -> tuple[int, int]:
    """Start and end in milliseconds. Cached by minute: zones change their offset on whole minutes only."""
    if window is Window.TOTAL:
        return 0, 0
    local = datetime.fromtimestamp(minute * 60, ZoneInfo(tz))
    midnight = local.replace(hour=0, minute=0, fold=0)
    match window:
        case Window.MINUTE:
            return _span(minute, 1)
        case Window.HOUR:
            return _span(minute - local.minute, 60)
        case Window.DAY:
            return _instant(midnight), _instant(midnight + timedelta(days=1))
        case Window.MONTH:
            first = midnight.replace(day=1)
            # Any day 31 days after the first is in the next month.
            return _instant(first), _instant((first + timedelta(days=31)).replace(day=1))


def _span(minute: int, minutes: int) -> tuple[int, int]:
    return minute * _MINUTE_MS, (minute + minutes) * _MINUTE_MS


def _instant(local: datetime) -> int:
    # fold=0 is the first of two equal midnights, and, of a midnight that the zone skips, the moment of the change.
    return round(local.timestamp()) * 1_000


def _exhausted(refused: HoldRefusal, what: str, may_clear: bool = False) -> BudgetExhausted:
    budget = refused.budget
    used = _readable(refused.posted, budget.unit)
    held = f" and {_readable(refused.pending, budget.unit)} is held by open requests" if refused.pending else ""
    limit = _readable(budget.limit, budget.unit)
    return BudgetExhausted(
        f"Budget {budget.id} {what}: its limit is {limit}, of which {used} is used{held}; {_reset(refused)}.",
        budget_id=budget.id,
        retry_after_s=_PENDING_RETRY_S if may_clear else _retry_after_s(refused),
        may_clear=may_clear,
    )


def _readable(figure: int, unit: Unit) -> str:
    """`4.9987 USD` or `200,000 tokens`: exact, with cents at least."""
    if unit is Unit.TOKENS:
        return f"{figure:,} tokens"
    dollars, nanos = divmod(figure, _NANOUSD_PER_USD)
    return f"{dollars:,}.{f'{nanos:09}'.rstrip('0'):0<2} USD"


def _reset(refused: HoldRefusal) -> str:
    if not refused.resets_at_ms:
        return "it never resets"
    moment = datetime.fromtimestamp(refused.resets_at_ms // 1_000, UTC)
    return f"it resets at {moment.astimezone(ZoneInfo(refused.budget.tz)).isoformat()}"


def _retry_after_s(refused: HoldRefusal) -> int | None:
    if not refused.resets_at_ms:
        return None
    return max(1, -((refused.now_ms - refused.resets_at_ms) // 1_000))
