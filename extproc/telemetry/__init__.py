"""What the gateway says of itself while it runs: Prometheus metrics, and OpenTelemetry's traces and metrics.

Both are made from finished usage records, where those are written; no request waits for them. docs/telemetry.md has
their names.
"""
