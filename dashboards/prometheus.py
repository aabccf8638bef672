"""The dashboards over /metrics: at once, and by the second. What a counter gained is estimated, so spend is not exact.

Every instance counts what it did itself, so counters are summed; all of them show the same budgets, so those are not.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import prometheus
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from dashboards.panels import Board, Kind, Panel, Source, datasource

PLUGIN = "prometheus"


def target(expression: str, panel: Panel, ref_id: str) -> prometheus.Dataquery:
    """A range query for what is drawn over time, else an instant one."""
    query = prometheus.Dataquery().datasource(datasource(PLUGIN)).ref_id(ref_id).expr(expression)
    if panel.kind.over_time:
        return query.range().legend_format(panel.legend)
    table = PromQueryFormat.TABLE if panel.kind is Kind.TABLE else PromQueryFormat.TIME_SERIES
    return query.instant().format(table).legend_format(panel.legend)


SOURCE = Source(PLUGIN, tabular=False, target=target)

_COST = "tollgate_cost_nanousd_total"


def _spent(by: str) -> str:
    return f'sum by ({by}) (increase({_COST}{{{by}!=""}}[$__range])) / 1e9'


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def _named(label: str) -> str:
    return f"{{{{{label}}}}}"


def _top(by: str, title: str) -> Panel:
    about = "In the chosen time, the greatest first."
    return Panel(title, about, Kind.TABLE, (f"sort_desc({_spent(by)})",), unit="currencyUSD", width=8)


SPEND = Board(
    "tollgate-spend-prometheus",
    "Tollgate: spend (Prometheus)",
    "Who spends what, on which models, as it happens. The exact figures are in the usage log.",
    (
        Panel(
            "Spent today, by service",
            "Since midnight UTC. Persons who call without a service are under users.",
            Kind.STAT,
            (f"sort_desc({_spent('service')})",),
            unit="currencyUSD",
            legend=_named("service"),
            width=18,
            height=6,
            relative_time="now/d",
        ),
        Panel(
            "Spent today",
            "Since midnight UTC, by everyone.",
            Kind.STAT,
            (f"sum(increase({_COST}[$__range])) / 1e9",),
            unit="currencyUSD",
            width=6,
            height=6,
            relative_time="now/d",
        ),
        Panel(
            "Spend an hour, by service",
            "At the speed of each moment.",
            Kind.LINES,
            (f"{_rate(_COST, 'service')} * 3600 / 1e9",),
            unit="currencyUSD",
            legend=_named("service"),
        ),
        Panel(
            "Spend an hour, by model",
            "At the speed of each moment.",
            Kind.LINES,
            (f"{_rate(_COST, 'model')} * 3600 / 1e9",),
            unit="currencyUSD",
            legend=_named("model"),
        ),
        _top("team", "By team"),
        _top("user", "By user"),
        _top("model", "By model"),
        Panel(
            "Tokens a second",
            "Cached input is part of the input, reasoning of the output.",
            Kind.LINES,
            (_rate("tollgate_tokens_total", "type"),),
            legend=_named("type"),
            width=8,
        ),
        Panel(
            "Saved by providers' caches, an hour",
            "What cached input took off the bill.",
            Kind.LINES,
            (f"{_rate('tollgate_cache_savings_nanousd_total', 'model')} * 3600 / 1e9",),
            unit="currencyUSD",
            legend=_named("model"),
            width=8,
        ),
        Panel(
            "Paid for what did not end well, an hour",
            "Cut at a budget, left by the caller, broken by the provider.",
            Kind.LINES,
            (f"{_rate('tollgate_aborted_cost_nanousd_total', 'outcome')} * 3600 / 1e9",),
            unit="currencyUSD",
            legend=_named("outcome"),
            width=8,
        ),
    ),
    time_from="now-24h",
)


def _budget(figure: str) -> str:
    return f"max by (budget) (tollgate_budget_{figure})"


_USED = f"({_budget('posted')} + {_budget('pending')}) / ({_budget('limit')} > 0)"
_LEFT = f"clamp_min({_budget('limit')} - {_budget('posted')} - {_budget('pending')}, 0)"
_SPEED_PER_S = "(max by (budget) (deriv(tollgate_budget_posted[1h])) > 0)"
_EXHAUSTED_S = f"(time() + {_LEFT} / {_SPEED_PER_S})"
_RESETS_S = _budget("resets_at_seconds")

BUDGETS = Board(
    "tollgate-budgets-prometheus",
    "Tollgate: budgets (Prometheus)",
    "What is left, when it will be gone, and what was stopped.",
    (
        Panel(
            "Burn-down",
            "The part of each limit that is used or held; the red line is the limit.",
            Kind.LINES,
            (_USED,),
            unit="percentunit",
            legend=_named("budget"),
            width=16,
            height=10,
            limit=1,
        ),
        Panel(
            "Exhausted",
            "At the speed of the last hour. Only budgets that will not reset before.",
            Kind.STAT,
            (f"1000 * (({_EXHAUSTED_S} < {_RESETS_S}) or ({_EXHAUSTED_S} unless {_RESETS_S}))",),
            unit="dateTimeFromNow",
            legend=_named("budget"),
            width=8,
            height=10,
        ),
        Panel(
            "Refused and cut, a second",
            "Refused before the provider heard of it; cut while the answer streamed.",
            Kind.LINES,
            (_rate('tollgate_requests_total{outcome=~"refused|cut"}', "outcome, status"),),
            unit="reqps",
            legend=f"{_named('outcome')} {_named('status')}",
        ),
        Panel(
            "Resets",
            "When each budget begins again.",
            Kind.STAT,
            (f"1000 * {_RESETS_S}",),
            unit="dateTimeFromNow",
            legend=_named("budget"),
        ),
    ),
    time_from="now-24h",
)


_FAILED = 'tollgate_requests_total{outcome="upstream_error"}'


def _percentiles(metric: str, title: str, about: str) -> Panel:
    expressions = tuple(
        f'label_replace(histogram_quantile({share}, {_rate(f"{metric}_bucket", "le")}), "p", "p{name}", "", "")'
        for name, share in ((50, 0.5), (95, 0.95), (99, 0.99))
    )
    return Panel(title, about, Kind.LINES, expressions, unit="s", legend=_named("p"), width=8)


RELIABILITY = Board(
    "tollgate-reliability-prometheus",
    "Tollgate: reliability (Prometheus)",
    "How requests end, how long they take, who stood in for whom, and how the gateway itself is.",
    (
        Panel(
            "Requests a second, by outcome",
            "How requests ended.",
            Kind.LINES,
            (_rate("tollgate_requests_total", "outcome"),),
            unit="reqps",
            legend=_named("outcome"),
        ),
        Panel(
            "Errors, by provider",
            "The part of what was sent to a provider, the last that was tried, that failed.",
            Kind.LINES,
            (f"{_rate(_FAILED, 'provider')} / {_rate('tollgate_requests_total', 'provider')}",),
            unit="percentunit",
            legend=_named("provider"),
        ),
        _percentiles("tollgate_request_duration_seconds", "Duration", "Of requests that were answered."),
        _percentiles("tollgate_time_to_first_token_seconds", "Time to first token", "Until the answer began."),
        _percentiles("tollgate_overhead_seconds", "Overhead", "The processor's part, waits for Redis included."),
        Panel(
            "Failovers",
            "Requests in the chosen time that took more than one attempt, and who answered in the end.",
            Kind.TABLE,
            ("sort_desc(sum by (requested_model, provider) (increase(tollgate_failovers_total[$__range])))",),
        ),
        Panel(
            "Attempts a request",
            "More than one is a provider that failed.",
            Kind.LINES,
            (
                f"{_rate('tollgate_attempts_total', 'provider')}"
                f" / {_rate('tollgate_request_duration_seconds_count', 'provider')}",
            ),
            legend=_named("provider"),
        ),
        Panel(
            "Open streams",
            "Over all instances.",
            Kind.LINES,
            ("sum(tollgate_open_streams)",),
            legend="open",
            width=8,
        ),
        Panel(
            "Not shipped yet",
            "Usage rows that wait in each instance's journal.",
            Kind.LINES,
            ("sum by (instance) (tollgate_journal_bytes)",),
            unit="bytes",
            legend=_named("instance"),
            width=8,
        ),
        Panel(
            "The gateway itself",
            "Instances that do not take requests, looks at Redis that failed, keys that could not be fetched.",
            Kind.LINES,
            (
                'label_replace(count(tollgate_ready == 0) or vector(0), "what", "not ready", "", "")',
                'label_replace(sum(increase(tollgate_ledger_unavailable_total[5m])), "what", "Redis", "", "")',
                "label_replace("
                'sum(increase(tollgate_secret_refreshes_total{result="failed"}[5m])), "what", "keys", "", "")',
            ),
            legend=_named("what"),
            width=8,
        ),
    ),
    time_from="now-6h",
)

BOARDS = (SPEND, BUDGETS, RELIABILITY)
