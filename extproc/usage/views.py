"""The views over the usage store: `sql/*.sql`, one view a file, in BigQuery's dialect. DuckDB runs the same files."""

from __future__ import annotations

import re
from dataclasses import dataclass
from graphlib import TopologicalSorter
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlglot import exp

_REFERENCE = re.compile(r"\$\{dataset\}\.(\w+)")


@dataclass(frozen=True, slots=True)
class View:
    """`sql` is one SELECT after comments, the first of which says what a row is; tables are `${dataset}.usage_log`."""

    name: str
    sql: str

    @property
    def summary(self) -> str:
        """The first sentence of the first comment."""
        return self.sql.split("\n", 1)[0].removeprefix("-- ").split(". ")[0].rstrip(".")


def load() -> tuple[View, ...]:
    """Every view, each after those that it reads from."""
    files = (file for file in resources.files("extproc.usage").joinpath("sql").iterdir() if file.name.endswith(".sql"))
    views = {view.name: view for view in (View(file.name.removesuffix(".sql"), file.read_text()) for file in files)}
    reads = {name: sorted({*_REFERENCE.findall(views[name].sql)} & views.keys()) for name in sorted(views)}
    return tuple(views[name] for name in TopologicalSorter(reads).static_order())


def for_bigquery(view: View, dataset: str) -> str:
    """The view's query for `dataset`, which is `project.dataset`."""
    return _REFERENCE.sub(rf"`{dataset}.\1`", view.sql)


def for_duckdb(view: View) -> str:
    """The view's query for DuckDB; it reads tables and views of the current schema, in a session whose zone is UTC."""
    return to_duckdb(_REFERENCE.sub(r"\1", view.sql))


def to_duckdb(sql: str) -> str:
    """A query of BigQuery's dialect in DuckDB's. Its approximate percentiles become exact ones of the same kind."""
    import sqlglot  # noqa: PLC0415 - takes 0.2 s to load, and the processor never needs it

    return sqlglot.parse_one(sql, read="bigquery").transform(_exact_quantile).sql("duckdb")


def _exact_quantile(node: exp.Expr) -> exp.Expr:
    """`APPROX_QUANTILES(x, 100)[OFFSET(95)]` as `QUANTILE_DISC(x, 0.95)`: both answer with one of the values."""
    from sqlglot import exp  # noqa: PLC0415 - likewise

    if not (isinstance(node, exp.Bracket) and isinstance(node.this, exp.ApproxQuantiles)):
        return node
    share = int(node.expressions[0].name) / int(node.this.expression.name)
    return exp.func("QUANTILE_DISC", node.this.this, exp.Literal.number(share))
