"""What `tollgate bigquery apply` makes: the dataset, two tables, and the views of extproc/usage/sql.

Nothing is ever taken away: a table gets the columns that it lacks, a view its new text, and the rest is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from google.api_core.exceptions import NotFound
from google.cloud import bigquery

from extproc.settings import Dataset
from extproc.usage import views
from extproc.usage.sinks.bigquery import SNAPSHOTS_TABLE, USAGE_TABLE

_TIMEOUT_S = 20.0
# Google's own retry of what may be repeated, for half a minute in place of ten.
_RETRY = bigquery.DEFAULT_RETRY.with_timeout(30.0)


@dataclass(frozen=True, slots=True)
class Table:
    """Columns and their types, partitioned by the day of `ts`; `required` are those that are never null."""

    name: str
    columns: Mapping[str, str]
    clustered_by: tuple[str, ...]
    required: frozenset[str]

    def fields(self) -> list[bigquery.SchemaField]:
        """All of them, as a new table has them."""
        return [
            bigquery.SchemaField(name, type_, "REQUIRED" if name in self.required else "NULLABLE")
            for name, type_ in self.columns.items()
        ]


TABLES = (
    Table(
        USAGE_TABLE,
        {
            "request_id": "STRING",
            "ts": "TIMESTAMP",
            "service": "STRING",
            "user": "STRING",
            "team": "STRING",
            "requested_model": "STRING",
            "provider": "STRING",
            "model": "STRING",
            "route": "STRING",
            "attempts": "INTEGER",
            "stream": "BOOLEAN",
            "status": "INTEGER",
            "outcome": "STRING",
            "prompt_tokens": "INTEGER",
            "cached_prompt_tokens": "INTEGER",
            "completion_tokens": "INTEGER",
            "reasoning_tokens": "INTEGER",
            "usage_source": "STRING",
            "cost_nanousd": "INTEGER",
            "price_version": "STRING",
            "ttft_ms": "INTEGER",
            "duration_ms": "INTEGER",
            "overhead_us": "INTEGER",
            "budget_id": "STRING",
            "cache_savings_nanousd": "INTEGER",
            "orphan": "BOOLEAN",
        },
        clustered_by=("service", "user", "model", "provider"),
        required=frozenset({"request_id", "ts"}),
    ),
    Table(
        SNAPSHOTS_TABLE,
        {
            "ts": "TIMESTAMP",
            "budget_id": "STRING",
            "scope": "STRING",
            "period": "STRING",
            "unit": "STRING",
            "mode": "STRING",
            "limit_amount": "INTEGER",
            "posted": "INTEGER",
            "pending": "INTEGER",
            "resets_at": "TIMESTAMP",
        },
        clustered_by=("budget_id",),
        required=frozenset({"ts", "budget_id"}),
    ),
)

# BigQuery has two names for each of these, and answers with the older one.
_OLDER_NAMES = {"INT64": "INTEGER", "BOOL": "BOOLEAN"}


@dataclass(frozen=True, slots=True)
class Change:
    """One step, in words that complete "would" or stand alone; `make` is None for what is only remarked."""

    what: str
    make: Callable[[], object] | None


def changes(client: bigquery.Client, dataset: Dataset, location: str) -> Iterator[Change]:
    """What is to be done, in order. Reads as it goes and changes nothing itself; raises what Google's client does."""
    reference = bigquery.DatasetReference(dataset.project, dataset.name)
    yield from _dataset_changes(client, reference, location)
    for table in TABLES:
        yield from _table_changes(client, reference.table(table.name), table)
    for view in views.load():
        yield from _view_changes(client, reference.table(view.name), views.for_bigquery(view, str(dataset)))


def _dataset_changes(client: bigquery.Client, reference: bigquery.DatasetReference, location: str) -> Iterator[Change]:
    try:
        client.get_dataset(reference, retry=_RETRY, timeout=_TIMEOUT_S)
    except NotFound:
        dataset = bigquery.Dataset(reference)
        dataset.location = location
        create = _step(client.create_dataset, dataset)
        yield Change(f"create dataset {reference.project}.{reference.dataset_id} in {location}", create)


def _table_changes(client: bigquery.Client, reference: bigquery.TableReference, table: Table) -> Iterator[Change]:
    found = _get(client, reference)
    if found is None:
        new = bigquery.Table(reference, schema=table.fields())
        new.time_partitioning = bigquery.TimePartitioning(field="ts")
        new.clustering_fields = list(table.clustered_by)
        yield Change(f"create table {table.name}", _step(client.create_table, new))
        return
    there = {field.name.lower(): field for field in found.schema}
    missing = [name for name in table.columns if name not in there]
    if missing:
        added = [bigquery.SchemaField(name, table.columns[name], "NULLABLE") for name in missing]
        found.schema = [*found.schema, *added]
        yield Change(f"add to table {table.name}: {', '.join(missing)}", _step(client.update_table, found, ["schema"]))
    for remark in _remarks(found, there, table):
        yield Change(f"table {table.name}: {remark}", None)


def _remarks(found: bigquery.Table, there: Mapping[str, bigquery.SchemaField], table: Table) -> Iterator[str]:
    """What is not as it would be made now, and is left so."""
    for name, type_ in table.columns.items():
        field = there.get(name)
        if field is not None and _OLDER_NAMES.get(field.field_type, field.field_type) != type_:
            yield f"{name} is {field.field_type}, not {type_}"
    partitioning = found.time_partitioning
    if partitioning is None or partitioning.field != "ts":
        yield "it is not partitioned by ts"


def _view_changes(client: bigquery.Client, reference: bigquery.TableReference, sql: str) -> Iterator[Change]:
    found = _get(client, reference)
    if found is None:
        new = bigquery.Table(reference)
        new.view_query = sql
        yield Change(f"create view {reference.table_id}", _step(client.create_table, new))
    elif found.table_type != "VIEW":
        yield Change(f"view {reference.table_id}: a {found.table_type.lower()} has its name", None)
    elif found.view_query != sql:
        found.view_query = sql
        yield Change(f"update view {reference.table_id}", _step(client.update_table, found, ["view_query"]))


def _get(client: bigquery.Client, reference: bigquery.TableReference) -> bigquery.Table | None:
    try:
        return client.get_table(reference, retry=_RETRY, timeout=_TIMEOUT_S)
    except NotFound:
        return None


def _step(call: Callable[..., object], what: object, fields: Sequence[str] | None = None) -> Callable[[], object]:
    arguments = (what,) if fields is None else (what, fields)
    return lambda: call(*arguments, retry=_RETRY, timeout=_TIMEOUT_S)
