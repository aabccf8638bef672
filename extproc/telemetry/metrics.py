"""What one processor counts, in Prometheus's form, from the usage records that it writes.

Several workers share a directory, where each has files of its own: prometheus_client's multiprocess mode. A worker's
files are named for its place and not for its process, so that the one that takes its place counts on from there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values

from extproc.limits import MAX_CALLER_SERIES, MAX_MODEL_SERIES, METRICS_FILE_BYTES
from extproc.records import Outcome, UsageRecord

SHARED_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own variable, which it reads when it is imported
OTHER = "other"

_DURATION_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_FIRST_TOKEN_S = (0.05, 0.1, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 20, 30, 60)
_OVERHEAD_S = (0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1)

_CALLERS_CHOICE = frozenset({"model", "requested_model", "service", "team", "user"})
_ABORTED = (Outcome.CUT, Outcome.CLIENT_GONE, Outcome.UPSTREAM_ERROR)

M = TypeVar("M", Counter, Histogram)


def share(worker: str) -> None:
    """Count where the other workers do. Once, before any metric is made; `worker` is nobody else's name meanwhile.

    Raises OSError where the disk has no room for it.
    """
    if (directory := shared_directory()) is not None:
        for kind in ("counter", "gauge_sum", "histogram"):
            _reserve(directory / f"{kind}_{worker}.db")
    values.ValueClass = values.MultiProcessValue(lambda: worker)  # type: ignore[no-untyped-call]


def _reserve(path: Path) -> None:
    """Room for a file that is mapped into memory: on a disk that is full by then, writing would kill the worker."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        os.posix_fallocate(fd, 0, METRICS_FILE_BYTES)
    finally:
        os.close(fd)


class Metrics:
    """Every metric that a processor counts. `record` takes 10 to 20 µs, once the request has ended."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # The multiprocess mode has none, and one worker says what several do.
        disable_created_metrics()  # type: ignore[no-untyped-call]

        def counter(name: str, about: str, *labels: str, most: int = MAX_MODEL_SERIES) -> _Bounded[Counter]:
            return _Bounded(Counter(f"tollgate_{name}", about, labels, registry=registry), labels, most)

        def histogram(name: str, about: str, buckets: Sequence[float], *labels: str) -> _Bounded[Histogram]:
            metric = Histogram(f"tollgate_{name}_seconds", about, labels, buckets=buckets, registry=registry)
            return _Bounded(metric, labels, MAX_MODEL_SERIES)

        of_model = ("provider", "model")
        self._requests = counter("requests", "Requests, by how they ended.", *of_model, "outcome", "status")
        self._attempts = counter("attempts", "Attempts of requests that were answered.", *of_model)
        self._failovers = counter(
            "failovers", "Requests that took more than one attempt, by who answered.", "requested_model", "provider"
        )
        self._tokens = counter("tokens", "Cached ones are input too, reasoning is output too.", *of_model, "type")
        self._cost = counter(
            "cost_nanousd",
            "What requests cost, in nano-USD.",
            *("service", "team", "user", "model", "provider"),
            most=MAX_CALLER_SERIES,
        )
        self._savings = counter("cache_savings_nanousd", "What providers' caches took off, in nano-USD.", *of_model)
        self._aborted = counter("aborted_cost_nanousd", "The cost of what did not end well.", "outcome", "model")
        self._duration = histogram("request_duration", "Of requests that were answered.", _DURATION_S, *of_model)
        self._first_token = histogram("time_to_first_token", "Until the answer began.", _FIRST_TOKEN_S, *of_model)
        self._overhead = histogram("overhead", "The time that the gateway itself took of a request.", _OVERHEAD_S)()
        self._open = Gauge("tollgate_open_streams", "Envoy's open streams.", registry=registry, multiprocess_mode="sum")
        self._open.set(0)  # whatever the worker before had open
        self._ledger_unavailable = counter("ledger_unavailable", "Looks at Redis, once a second, that failed.")()
        self._secret_refreshes = counter("secret_refreshes", "Fetches of providers' keys.", "result")

    def record(self, record: UsageRecord) -> None:
        """Count a request that has ended. Rows of orphans are not counted: whether one has its own is not known."""
        provider, model = record.provider or "", record.model or ""
        self._requests(provider, model, record.outcome.value, str(record.status)).inc()
        self._overhead.observe(record.overhead_us / 1e6)
        if record.attempts:
            self._count_answer(record, provider, model)
        if record.prompt_tokens or record.completion_tokens:
            self._count_usage(record, provider, model)

    def _count_answer(self, record: UsageRecord, provider: str, model: str) -> None:
        self._attempts(provider, model).inc(record.attempts)
        if record.attempts > 1:
            self._failovers(record.requested_model or "", provider).inc()
        self._duration(provider, model).observe(record.duration_ms / 1e3)
        if record.ttft_ms is not None:
            self._first_token(provider, model).observe(record.ttft_ms / 1e3)

    def _count_usage(self, record: UsageRecord, provider: str, model: str) -> None:
        self._tokens(provider, model, "input").inc(record.prompt_tokens)
        self._tokens(provider, model, "output").inc(record.completion_tokens)
        if record.cached_prompt_tokens:
            self._tokens(provider, model, "cached_input").inc(record.cached_prompt_tokens)
        if record.reasoning_tokens:
            self._tokens(provider, model, "reasoning").inc(record.reasoning_tokens)
        cost_nanousd = record.cost_nanousd
        self._cost(record.service or "", record.team or "", record.user or "", model, provider).inc(cost_nanousd)
        if record.outcome in _ABORTED:
            self._aborted(record.outcome.value, model).inc(cost_nanousd)
        if record.cache_savings_nanousd > 0:  # what is written to a cache may cost more than it saves
            self._savings(provider, model).inc(record.cache_savings_nanousd)

    def watch(self, open_streams: int, *, ledger: bool) -> None:
        """What was seen when the processor last looked: `ledger` is whether Redis could be used."""
        self._open.set(open_streams)
        if not ledger:
            self._ledger_unavailable.inc()

    def secrets_refreshed(self, result: str) -> None:
        """A provider's key was fetched, or could not be. `result` is one of a few words of ours."""
        self._secret_refreshes(result).inc()


class _Bounded(Generic[M]):
    """A metric's children, by their labels' values in order. Beyond `most`, what callers choose is `other`.

    A policy with a wildcard lets a caller make up names of models, and each would be a time series for good.
    """

    def __init__(self, metric: M, labels: Sequence[str], most: int) -> None:
        self._metric: M = metric
        self._chosen = tuple(name in _CALLERS_CHOICE for name in labels)
        self._most = most
        self._children: dict[tuple[str, ...], M] = {}

    def __call__(self, *labels: str) -> M:
        child = self._children.get(labels)
        if child is not None:
            return child
        if len(self._children) >= self._most:
            labels = tuple(OTHER if chosen else label for label, chosen in zip(labels, self._chosen, strict=True))
        made: M = self._metric.labels(*labels) if labels else self._metric
        self._children[labels] = made
        return made


def shared_directory() -> Path | None:
    """Where this worker counts together with others, if it does."""
    directory = os.environ.get(SHARED_DIRECTORY)
    return Path(directory) if directory else None
