"""The command `tollgate`. What fails is said in one line on stderr, with exit code 1."""

# ruff: noqa: PLC0415 - each command imports what it needs: the quick ones must not wait for what the others load

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import click

from extproc.errors import LedgerUnavailable, PolicyInvalid
from extproc.limits import MAX_TOKEN_LIFETIME_S, MAX_WORKERS
from extproc.records import Balance, BudgetRule, Policy, Principal, Scope
from extproc.settings import Dataset, Settings, SettingsInvalid
from extproc.usage.sinks import SinkUnavailable

if TYPE_CHECKING:
    from rich.table import Table

_TABLE_RECORDS = 20
_ANY_WIDTH = 10_000
_IS_IT_RUNNING = "is the stack running? `tollgate up` starts it"


class _Commands(click.Group):
    """Ends every command that fails for a known reason with that reason alone."""

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
        except BrokenPipeError:
            raise  # click ends quietly when nobody reads on
        except (SettingsInvalid, PolicyInvalid, SinkUnavailable, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands)
def main() -> None:
    """An LLM API gateway that holds budget before a request leaves and cuts the stream when it is used up."""


@main.command()
def up() -> None:
    """Run the whole stack in the foreground."""
    from extproc.local import stack

    stack.run()


@main.command()
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="NAME=VALUE",
    help="A variable in the place of the manifest's, or in addition. May be repeated.",
)
def up_manifest(changes: tuple[str, ...]) -> None:
    """Run the containers of cloudrun-multicontainer.yaml as local processes, in the foreground."""
    from extproc.local import up_manifest

    if malformed := [change for change in changes if not re.match(r"\w+=", change)]:
        raise click.BadParameter(f"{malformed[0]!r} is not NAME=VALUE", param_hint="--set")
    up_manifest.run(dict(change.split("=", 1) for change in changes))


@main.command()
@click.option(
    "--workers",
    type=click.IntRange(1, MAX_WORKERS),
    envvar="TOLLGATE_WORKERS",
    help="Processes; by default half of the cores allowed.",
)
def serve(workers: int | None) -> None:
    """Run the processor that Envoy asks, in as many processes as the CPU limit allows beside Envoy."""
    from extproc import startup

    startup.fast()
    from extproc import workers as pool

    settings = Settings.from_environment(os.environ)
    count = workers or pool.default_workers()
    if settings.envoy_config_path is not None:
        _render(settings, settings.envoy_config_path, count)
    if count == 1 and not settings.ship:
        from extproc.serve import main as run_processor

        run_processor(settings)
    else:
        _policy(settings.policy_path)  # a policy that cannot be used is said once, not by every worker
        pool.run(settings, os.environ, count)


@main.command()
def ship() -> None:
    """Ship the usage journal into the usage store, until SIGTERM."""
    from extproc.usage import ship
    from extproc.usage.shipper import AlreadyShipping

    try:
        ship.main(Settings.from_environment(os.environ), sys.stdout.buffer)
    except AlreadyShipping as error:
        raise click.ClickException(str(error)) from error


@main.group()
def bigquery() -> None:
    """The usage store in BigQuery that TOLLGATE_USAGE_STORE names."""


@bigquery.command()
@click.option("--location", default="US", show_default=True, help="Where a new dataset is created.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
def apply(location: str, dry_run: bool) -> None:
    """Create the dataset, its tables and views, or bring them up to this version: add columns, update views."""
    from extproc.usage.bigquery_schema import changes
    from extproc.usage.sinks.bigquery import FAILURES, connect, one_line

    settings = _stack_settings()
    dataset = _dataset(settings)
    done = 0
    try:
        for change in changes(connect(dataset, settings.bigquery_endpoint), dataset, location):
            if change.make is None:
                click.echo(f"left as it is: {change.what}")
                continue
            if not dry_run:
                change.make()
            click.echo(f"{'would ' if dry_run else ''}{change.what}")
            done += 1
    except FAILURES as error:
        raise click.ClickException(f"{dataset}: {one_line(error)}") from error
    if not done:
        click.echo(f"{dataset}: nothing to do")


@bigquery.command()
@click.argument("file", type=click.File("rb"))
def load(file: BinaryIO) -> None:
    """Store the usage rows that went out as log lines, from a log, an export of Cloud Logging, or `rejected.jsonl`.

    Rows that the store has already change nothing, so that a file may be loaded twice.
    """
    from extproc.usage import loading
    from extproc.usage.sinks.bigquery import connect

    settings = _stack_settings()
    dataset = _dataset(settings)
    try:
        loaded = loading.load(file, dataset, lambda: connect(dataset, settings.bigquery_endpoint))
    except ValueError as error:
        raise click.ClickException(str(error)) from error
    for problem in loaded.problems:
        click.echo(problem, err=True)
    click.echo(f"{loaded.rows} rows loaded; {loaded.without} lines had none")
    if loaded.problems:
        raise SystemExit(1)


@main.command()
@click.option("--email", required=True, help="Whose token: a person's or a service's.")
@click.option("--aud", help="The audience; the policy's first by default.")
@click.option(
    "--ttl",
    default=3600,
    type=click.IntRange(1, MAX_TOKEN_LIFETIME_S),
    show_default=True,
    help="Seconds until it expires.",
)
def token(email: str, aud: str | None, ttl: int) -> None:
    """Print an ID token of the local stack's development issuer."""
    from extproc.local.issuer import KEY_FILE, DevIssuer

    settings = _stack_settings()
    if not (settings.state_dir / KEY_FILE).exists():
        raise click.ClickException(f"there is no local stack in {settings.state_dir}: {_IS_IT_RUNNING}")
    audience = aud or _policy(settings.policy_path).identity.audiences[0]
    try:
        issuer = DevIssuer.open(settings.state_dir)
    except ValueError as error:
        raise click.ClickException(f"{settings.state_dir / KEY_FILE} is not the development issuer's key") from error
    click.echo(issuer.mint(email, audience, ttl, time.time()))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON array of usage records.")
@click.option("--wide", is_flag=True, help="Every field.")
@click.option("--last", type=click.IntRange(min=1), help=f"How many; {_TABLE_RECORDS} by default, with --json all.")
def usage(as_json: bool, wide: bool, last: int | None) -> None:
    """Print what requests used and cost, the newest last."""
    from extproc import reports
    from extproc.usage.sinks.duckdb import read_usage

    records = read_usage(_local_store("usage"), last or (None if as_json else _TABLE_RECORDS))
    if as_json:
        click.echo(reports.usage_json(records))
    elif not records:
        click.echo("no requests yet")
    else:
        _print(reports.wide_usage_table(records) if wide else reports.usage_table(records), wide=wide)


@main.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="A JSON array, with every column.")
@click.option("--days", type=click.IntRange(1, 3_650), default=7, show_default=True, help="Up to today, in UTC.")
def report(name: str | None, as_json: bool, days: int) -> None:
    """Print one of the views of usage; without NAME, list them."""
    from extproc import reports
    from extproc.usage import views

    names = [view.name for view in views.load()]
    if name is None:
        _print(reports.views_table(views.load()), wide=True)
    elif name not in names:
        raise click.ClickException(f"there is no report {name!r}; there are {', '.join(sorted(names))}")
    else:
        _report(name, as_json, days)


def _report(name: str, as_json: bool, days: int) -> None:
    from extproc import reports
    from extproc.usage.sinks.duckdb import read_view

    found = read_view(_local_store(name), name, days)
    if as_json:
        click.echo(reports.report_json(found.columns, found.rows))
    elif not found.rows:
        click.echo("nothing to report")
    else:
        _print(reports.report_table(found.columns, found.rows), wide=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="A JSON array, figures in the budget's unit.")
def budgets(as_json: bool) -> None:
    """Print every budget: its limit, what is posted, held and left, and when it resets."""
    from extproc import reports

    settings = _stack_settings()
    now_ms = time.time_ns() // 1_000_000
    balances = with_untouched(_balances(settings, now_ms), _policy(settings.policy_path), now_ms)
    if not as_json and find_spec("rich") is None:
        raise click.ClickException("tables need the package rich, which is not installed here: --json")
    if as_json:
        click.echo(reports.budgets_json(balances))
    elif not balances:
        click.echo("no budgets in use")
    else:
        _print(reports.budgets_table(balances, now_ms))


@main.command()
@click.argument("path", required=False, type=click.Path(path_type=Path))
@click.option("--envoy", type=click.Path(path_type=Path), help="Envoy's configuration; the repository's by default.")
def check(path: Path | None, envoy: Path | None) -> None:
    """Check the policy (PATH, or the one in use) and Envoy's configuration."""
    from extproc import envoy_config
    from extproc.local import envoy_check
    from extproc.policy import doubts

    path = path or _stack_settings().policy_path
    envoy = envoy or envoy_config.TEMPLATE
    chains: frozenset[tuple[str, ...]] | None = None
    refused: list[str] = []
    try:
        refused = envoy_check.problems(envoy)
        chains = None if refused else envoy_config.chains(envoy.read_text())
    except ImportError:
        click.echo(f"{envoy}: not checked, because Envoy is not installed here", err=True)
    try:
        _policy(path)
        problems = [_located(path, doubt) for doubt in doubts(path.read_text(), chains)]
    except PolicyInvalid as error:
        problems = list(error.problems)
    problems += refused
    for problem in problems:
        click.echo(problem)
    if problems:
        raise SystemExit(1)
    click.echo(f"{path}: no problems")


# What the commands share ----------------------------------------------------------------------------------------------


def stack_environment(env: Mapping[str, str]) -> dict[str, str]:
    """`env`, over what a running local stack has written to `stack.env` in its state directory."""
    path = Path(env.get("TOLLGATE_STATE_DIR", ".tollgate")) / "stack.env"
    lines = path.read_text().splitlines() if path.exists() else []
    return dict(line.split("=", 1) for line in lines if "=" in line) | dict(env)


def with_untouched(balances: tuple[Balance, ...], policy: Policy, now_ms: int) -> tuple[Balance, ...]:
    """The balances, and before them the policy's budgets that are for one name and that nobody has used yet."""
    from extproc.budget import applicable, window_at

    used = {balance.budget.id for balance in balances}
    untouched = (
        Balance(budget, posted=0, pending=0, resets_at_ms=window_at(budget, now_ms).end_ms)
        for rule in policy.budgets
        if rule.scope is Scope.GLOBAL or not re.search(r"[*?\[]", rule.id)
        for budget in applicable((rule,), _named(rule), rule.id)
        if budget.id not in used
    )
    return (*untouched, *balances)


def _named(rule: BudgetRule) -> Principal:
    return Principal(email=rule.id, service=rule.id, team=rule.id, user=rule.id)


def _render(settings: Settings, path: Path, workers: int) -> None:
    """Envoy's configuration, for a container of its own."""
    from extproc import envoy_config
    from extproc.providers import PROVIDERS
    from extproc.secrets import SecretStore
    from extproc.workers import worker_socket

    keys = SecretStore.of(settings.secrets_dir, os.environ, PROVIDERS)
    with_key = {name for name in PROVIDERS if keys.key(name) is not None}
    sockets = [worker_socket(settings.socket_path, number) for number in range(workers)]
    envoy_config.write(path, sockets, envoy_config.in_use(settings.base_urls, os.environ, with_key))


def _dataset(settings: Settings) -> Dataset:
    if settings.dataset is None:
        raise click.ClickException("TOLLGATE_USAGE_STORE names no dataset: set it to bigquery://PROJECT/DATASET")
    return settings.dataset


def _stack_settings() -> Settings:
    return Settings.from_environment(stack_environment(os.environ))


def _local_store(view: str) -> Path:
    """The usage store's file, which must be there. `view` is where the same is found in BigQuery."""
    settings = _stack_settings()
    if settings.dataset is not None:
        raise click.ClickException(f"usage goes to BigQuery: ask the view `{settings.dataset}.{view}`")
    if not settings.usage_db_path.exists():
        raise click.ClickException(f"there is no usage store at {settings.usage_db_path}: {_IS_IT_RUNNING}")
    return settings.usage_db_path


def _policy(path: Path) -> Policy:
    """Raises PolicyInvalid with problems as `file:line: field: what`."""
    from extproc.policy import parse_policy
    from extproc.policy_file import PolicyFile

    try:
        return PolicyFile(path, parse_policy, lambda policy: None).policy
    except PolicyInvalid as error:
        raise PolicyInvalid(tuple(_located(path, problem) for problem in error.problems)) from error


def _located(path: Path, problem: str) -> str:
    line = re.match(r"line (\d+): ", problem)
    return f"{path}:{line[1]}: {problem[line.end() :]}" if line else f"{path}: {problem}"


def _balances(settings: Settings, now_ms: int) -> tuple[Balance, ...]:
    from extproc.usage.snapshots import read_balances

    try:
        return read_balances(settings, now_ms)
    except (LedgerUnavailable, ValueError) as error:  # ValueError: what redis-py says of an address
        raise click.ClickException(f"the ledger cannot be read ({error}): {_IS_IT_RUNNING}") from error


def _print(table: Table, *, wide: bool = False) -> None:
    from rich.console import Console

    from extproc.reports import fit

    console = Console(width=_ANY_WIDTH if wide else None)
    console.print(fit(table, console))
