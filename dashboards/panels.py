"""What a dashboard is made of, whatever is asked for its data; and how that becomes Grafana's own model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.builders import stat, table, timeseries
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.cog.variants import Dataquery
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models

_TILES = 24  # of one panel


class Kind(Enum):
    """How a panel shows its figures. A stat and a table have rows, lines and bars a time series."""

    STAT = "stat"
    TABLE = "table"
    LINES = "lines"
    BARS = "bars"

    @property
    def over_time(self) -> bool:
        """Whether it draws time series."""
        return self in (Kind.LINES, Kind.BARS)


@dataclass(frozen=True, slots=True)
class Panel:
    """`queries` in the data source's language. `legend` names a series: Grafana's, or Prometheus's, placeholders.

    `width` is of 24 columns, `unit` Grafana's name of one; `columns` are units of a table's columns that differ from
    it. `limit` is where a line is drawn. `relative_time` shows another time than the dashboard's.
    """

    title: str
    about: str
    kind: Kind
    queries: tuple[str, ...]
    unit: str = "short"
    legend: str = ""
    width: int = 12
    height: int = 8
    columns: tuple[tuple[str, str], ...] = ()
    limit: float | None = None
    relative_time: str | None = None


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard: its panels are laid out in order, each line of them 24 columns wide."""

    uid: str
    title: str
    about: str
    panels: tuple[Panel, ...]
    time_from: str = "now-7d"
    time_to: str = "now"


@dataclass(frozen=True, slots=True)
class Source:
    """Where data comes from. `target` makes a query of its plugin: text, panel and reference id in.

    `tabular`: what it finds are rows of one table, which a text column names, and not a series each with its legend.
    """

    plugin: str
    tabular: bool
    target: Callable[[str, Panel, str], Builder[Dataquery]]
    variables: tuple[Builder[models.VariableModel], ...] = ()


DATASOURCE = "datasource"  # the variable by which every panel names its data source


def datasource(plugin: str) -> models.DataSourceRef:
    """The data source that whoever looks has chosen."""
    return models.DataSourceRef(type_val=plugin, uid=f"${{{DATASOURCE}}}")


def dashboard(board: Board, source: Source) -> models.Dashboard:
    """The board in Grafana's model."""
    built = (
        builders.Dashboard(board.title)
        .uid(board.uid)
        .description(board.about)
        .tags(["tollgate"])
        .timezone("utc")
        .editable()
        .time(board.time_from, board.time_to)
        .with_variable(builders.DatasourceVariable(DATASOURCE).label("Data source").type(source.plugin))
    )
    for variable in source.variables:
        built = built.with_variable(variable)
    for number, panel in enumerate(board.panels, start=1):
        built = built.with_panel(_panel(panel, source).id(number))
    return built.build()


_Visual = stat.Panel | table.Panel | timeseries.Panel


def _panel(panel: Panel, source: Source) -> _Visual:
    visual: _Visual = _stat(source.tabular) if panel.kind is Kind.STAT else _VISUALS[panel.kind]()
    visual = (
        visual.title(panel.title)
        .description(panel.about)
        .datasource(datasource(source.plugin))
        .unit(panel.unit)
        .span(panel.width)
        .height(panel.height)
    )
    for place, query in enumerate(panel.queries):
        visual = visual.with_target(source.target(query, panel, chr(ord("A") + place)))
    if panel.legend and source.tabular:
        visual = visual.display_name(panel.legend)
    for column, unit in panel.columns:
        visual = visual.override_by_name(column, [models.DynamicConfigValue("unit", unit)])
    if panel.relative_time is not None:
        visual = visual.time_from(panel.relative_time)
    if panel.limit is not None and isinstance(visual, timeseries.Panel):
        visual = _with_limit(visual, panel.limit)
    return visual


def _stat(tabular: bool) -> stat.Panel:
    """A tile a row, or a tile a series with its last value."""
    reduce = common_builders.ReduceDataOptions()
    reduce = reduce.values(True).limit(_TILES) if tabular else reduce.values(False).calcs(["lastNotNull"])
    return (
        stat.Panel()
        .text_mode(common.BigValueTextMode.VALUE_AND_NAME)
        .graph_mode(common.BigValueGraphMode.NONE)
        .reduce_options(reduce)
    )


def _lines() -> timeseries.Panel:
    return timeseries.Panel().show_points(common.VisibilityMode.AUTO).span_nulls(True)


def _bars() -> timeseries.Panel:
    stacked = common_builders.StackingConfig().mode(common.StackingMode.NORMAL)
    return timeseries.Panel().draw_style(common.GraphDrawStyle.BARS).fill_opacity(80).stacking(stacked)


_VISUALS: dict[Kind, Callable[[], _Visual]] = {
    Kind.TABLE: table.Panel,
    Kind.LINES: _lines,
    Kind.BARS: _bars,
}


def _with_limit(visual: timeseries.Panel, limit: float) -> timeseries.Panel:
    steps = [models.Threshold(color="green"), models.Threshold(value=limit, color="red")]
    line = common_builders.GraphThresholdsStyleConfig().mode(common.GraphThresholdsStyleMode.LINE)
    return visual.thresholds(
        builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps)
    ).thresholds_style(line)
