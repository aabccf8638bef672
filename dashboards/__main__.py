"""Write every dashboard's JSON: a folder a data source, a file a dashboard."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from dashboards import bigquery, prometheus
from dashboards.panels import dashboard

SETS = {
    "bigquery": (bigquery.SOURCE, bigquery.BOARDS),
    "prometheus": (prometheus.SOURCE, prometheus.BOARDS),
}


def files() -> dict[str, str]:
    """Every file's path, under this folder, and its text."""
    return {
        f"{folder}/{board.uid}.json": json.dumps(dashboard(board, source), cls=JSONEncoder, indent=2, sort_keys=True)
        + "\n"
        for folder, (source, boards) in SETS.items()
        for board in boards
    }


def main(directory: Path) -> None:
    """Write them, over whatever is there under their names."""
    for name, text in files().items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
