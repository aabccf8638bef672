"""Grafana's dashboards as code: `python -m dashboards` writes their JSON. Nothing of the gateway needs it."""
