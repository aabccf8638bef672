"""The dashboards over the usage log in BigQuery: exact, by whatever the log knows.

Every query filters `usage` by `ts`, with Grafana's macro or a constant, so that it reads those days' partitions alone.
A time series has the columns `time` and `name`, and one of figures.
"""

from __future__ import annotations

from grafana_foundation_sdk.builders import bigquery
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models.bigquery import EditorMode, QueryFormat

from dashboards.panels import Board, Kind, Panel, Source, datasource

PLUGIN = "grafana-bigquery-datasource"
DATASET = "${dataset:raw}"

_BY_NAME = "${__field.labels.name}"
_TODAY = "ts >= TIMESTAMP_TRUNC(CURRENT_TIMESTAMP(), DAY)"
_CHOSEN = "$__timeFilter(ts)"


def target(sql: str, panel: Panel, ref_id: str) -> bigquery.Dataquery:
    """A query of the BigQuery plugin, as its code editor keeps it."""
    return (
        bigquery.Dataquery()
        .datasource(datasource(PLUGIN))
        .ref_id(ref_id)
        .editor_mode(EditorMode.CODE)
        .raw_query(True)
        .raw_sql(sql)
        .format(QueryFormat.TIMESERIES if panel.kind.over_time else QueryFormat.TABLE)
    )


SOURCE = Source(
    PLUGIN,
    tabular=True,
    target=target,
    variables=(
        builders.TextBoxVariable("dataset")
        .label("Dataset")
        .description("project.dataset of TOLLGATE_USAGE_STORE")
        .default_value("my-project.tollgate"),
    ),
)


def _rows(columns: str, where: str, group_by: str, order_by: str, limit: int = 100) -> str:
    return (
        f"SELECT {columns}\nFROM `{DATASET}.usage`\nWHERE {where}\n"
        f"GROUP BY {group_by}\nORDER BY {order_by}\nLIMIT {limit}"
    )


def _hourly(name: str, figures: str, where: str = "TRUE") -> str:
    return (
        f"SELECT TIMESTAMP_TRUNC(ts, HOUR) AS time, {name} AS name, {figures}\nFROM `{DATASET}.usage`\n"
        f"WHERE {_CHOSEN} AND {where}\nGROUP BY time, name\nORDER BY time"
    )


_USD = "SUM(cost_nanousd) / 1e9 AS usd"


def _spend_by(column: str, title: str, width: int) -> Panel:
    figures = f"{_USD}, COUNT(*) AS requests, SUM(prompt_tokens) AS tokens_in, SUM(completion_tokens) AS tokens_out"
    return Panel(
        title,
        "In the chosen time.",
        Kind.TABLE,
        (_rows(f"`{column}`, {figures}", f"{_CHOSEN} AND `{column}` IS NOT NULL", f"`{column}`", "usd DESC"),),
        width=width,
        columns=(("usd", "currencyUSD"),),
    )


SPEND = Board(
    "tollgate-spend",
    "Tollgate: spend",
    "Who spends what, on which models.",
    (
        Panel(
            "Spent today, by service",
            "Since midnight UTC. Persons who call without a service are under users.",
            Kind.STAT,
            (_rows(f"service, {_USD}", f"{_TODAY} AND service IS NOT NULL", "service", "usd DESC", 24),),
            unit="currencyUSD",
            width=18,
            height=6,
        ),
        Panel(
            "Spent today",
            "Since midnight UTC, by everyone.",
            Kind.STAT,
            (f"SELECT COALESCE(SUM(cost_nanousd), 0) / 1e9 AS usd\nFROM `{DATASET}.usage`\nWHERE {_TODAY}",),
            unit="currencyUSD",
            width=6,
            height=6,
        ),
        Panel(
            "Spend an hour, by service",
            "Persons without a service together.",
            Kind.BARS,
            (_hourly("COALESCE(service, 'persons')", _USD),),
            unit="currencyUSD",
            legend=_BY_NAME,
        ),
        Panel(
            "Spend an hour, by model",
            "Of the model that answered.",
            Kind.BARS,
            (_hourly("COALESCE(model, 'none')", _USD),),
            unit="currencyUSD",
            legend=_BY_NAME,
        ),
        _spend_by("team", "By team", 8),
        _spend_by("user", "By user", 8),
        _spend_by("model", "By model", 8),
        Panel(
            "Saved by providers' caches, an hour",
            "What cached input took off the bill. Below nothing where writing to a cache cost more.",
            Kind.BARS,
            (_hourly("COALESCE(model, 'none')", "SUM(cache_savings_nanousd) / 1e9 AS usd", "attempts > 0"),),
            unit="currencyUSD",
            legend=_BY_NAME,
        ),
        Panel(
            "Paid for streams that did not end well",
            "Cut at a budget, left by the caller, broken by the provider.",
            Kind.TABLE,
            (
                _rows(
                    f"outcome, COALESCE(service, `user`) AS caller, model, {_USD}, COUNT(*) AS streams",
                    f"{_CHOSEN} AND stream AND outcome IN ('cut', 'client_gone', 'upstream_error')",
                    "outcome, caller, model",
                    "usd DESC",
                ),
            ),
            columns=(("usd", "currencyUSD"),),
        ),
    ),
)

_USED = "(posted + pending) / NULLIF(limit_amount, 0)"
_SERIES = "TIMESTAMP_TRUNC(ts, MINUTE) AS time, budget_id AS name"
_WHERE_STOPPED = f"{_CHOSEN} AND outcome IN ('refused', 'cut')"

BUDGETS = Board(
    "tollgate-budgets",
    "Tollgate: budgets",
    "What is left, how fast it goes, when it will be gone, and who was stopped.",
    (
        Panel(
            "Budgets now",
            "In each budget's own unit. exhausted_at: at the speed of the last hour; empty where it resets before.",
            Kind.TABLE,
            (
                f"SELECT budget_id, mode, {_USED} AS used,\n"
                "  CASE WHEN unit = 'nanousd' THEN left_amount / 1e9 END AS left_usd,\n"
                "  CASE WHEN unit = 'tokens' THEN left_amount END AS left_tokens,\n"
                "  exhausted_at, resets_at\n"
                f"FROM `{DATASET}.budget_burn_down`\nORDER BY used DESC\nLIMIT 100",
            ),
            width=24,
            columns=(
                ("used", "percentunit"),
                ("left_usd", "currencyUSD"),
                ("exhausted_at", "dateTimeAsIso"),
                ("resets_at", "dateTimeAsIso"),
            ),
        ),
        Panel(
            "Burn-down",
            "The part of each limit that is used or held; the red line is the limit. What lies ahead of now is drawn "
            "to where the budget will be exhausted at the speed of the last hour.",
            Kind.LINES,
            (
                f"SELECT {_SERIES}, MAX({_USED}) AS used\n"
                f"FROM `{DATASET}.budget_snapshots`\nWHERE {_CHOSEN}\nGROUP BY time, name\nORDER BY time",
                f"SELECT ts AS time, CONCAT(budget_id, ' ahead') AS name, {_USED} AS used\n"
                f"FROM `{DATASET}.budget_burn_down`\nWHERE exhausted_at IS NOT NULL\nUNION ALL\n"
                "SELECT exhausted_at AS time, CONCAT(budget_id, ' ahead') AS name, 1.0 AS used\n"
                f"FROM `{DATASET}.budget_burn_down`\nWHERE exhausted_at > ts\nORDER BY time",
            ),
            unit="percentunit",
            legend=_BY_NAME,
            width=24,
            height=10,
            limit=1,
        ),
        Panel(
            "Refused and cut, an hour",
            "Refused before the provider heard of it; cut while the answer streamed.",
            Kind.BARS,
            (_hourly("outcome", "COUNT(*) AS requests", "outcome IN ('refused', 'cut')"),),
            legend=_BY_NAME,
        ),
        Panel(
            "Who was stopped, by what",
            "429 is a budget's; 401 and 403 are a caller's who is not let in.",
            Kind.TABLE,
            (
                _rows(
                    "budget_id, COALESCE(service, `user`) AS caller, outcome, status, COUNT(*) AS requests",
                    _WHERE_STOPPED,
                    "budget_id, caller, outcome, status",
                    "requests DESC",
                ),
            ),
        ),
    ),
    time_from="now-24h",
    time_to="now+6h",
)


def _percentiles(column: str, title: str, about: str, per_unit: str, unit: str) -> Panel:
    """Three lines, an hour, over all providers and models."""
    figures = ",\n  ".join(
        f"APPROX_QUANTILES({column}, 100)[SAFE_OFFSET({percent})] / {per_unit} AS p{percent}"
        for percent in (50, 95, 99)
    )
    sql = (
        f"SELECT TIMESTAMP_TRUNC(ts, HOUR) AS time,\n  {figures}\nFROM `{DATASET}.usage`\n"
        f"WHERE {_CHOSEN} AND outcome = 'ok' AND attempts > 0\nGROUP BY time\nORDER BY time"
    )
    return Panel(title, about, Kind.LINES, (sql,), unit=unit, width=8)


RELIABILITY = Board(
    "tollgate-reliability",
    "Tollgate: reliability",
    "How requests end, how long they take, and who stood in for whom.",
    (
        Panel(
            "Outcomes, an hour",
            "How requests ended.",
            Kind.BARS,
            (_hourly("outcome", "COUNT(*) AS requests"),),
            legend=_BY_NAME,
        ),
        Panel(
            "Errors, by provider",
            "The part of what was sent to a provider, the last that was tried, that failed.",
            Kind.LINES,
            (_hourly("provider", "COUNTIF(outcome = 'upstream_error') / COUNT(*) AS share", "attempts > 0"),),
            unit="percentunit",
            legend=_BY_NAME,
        ),
        _percentiles("duration_ms", "Duration", "Of answers that came whole.", "1e3", "s"),
        _percentiles("ttft_ms", "Time to first token", "Until the answer's first event.", "1e3", "s"),
        _percentiles("overhead_us", "Overhead", "The processor's part, waits for Redis included.", "1e6", "s"),
        Panel(
            "Latency, by model",
            "Of answers that came whole, in the chosen time.",
            Kind.TABLE,
            (
                _rows(
                    "provider, model, COUNT(*) AS requests,\n"
                    "  APPROX_QUANTILES(duration_ms, 100)[SAFE_OFFSET(50)] AS p50,\n"
                    "  APPROX_QUANTILES(duration_ms, 100)[SAFE_OFFSET(95)] AS p95,\n"
                    "  APPROX_QUANTILES(ttft_ms, 100)[SAFE_OFFSET(95)] AS first_token_p95",
                    f"{_CHOSEN} AND outcome = 'ok' AND attempts > 0",
                    "provider, model",
                    "requests DESC",
                ),
            ),
            columns=(("p50", "ms"), ("p95", "ms"), ("first_token_p95", "ms")),
        ),
        Panel(
            "Failovers",
            "Requests that took more than one attempt, and who answered in the end.",
            Kind.TABLE,
            (
                _rows(
                    "requested_model, provider, model, COUNT(*) AS requests",
                    f"{_CHOSEN} AND attempts > 1 AND outcome IN ('ok', 'cut', 'client_gone')",
                    "requested_model, provider, model",
                    "requests DESC",
                ),
            ),
        ),
    ),
    time_from="now-24h",
)

BOARDS = (SPEND, BUDGETS, RELIABILITY)
