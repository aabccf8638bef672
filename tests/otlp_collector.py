"""A collector of OTLP over HTTP, which keeps what it is sent."""

from __future__ import annotations

from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import HistogramDataPoint, Metric
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from extproc.local.http import Request, Response, Server, serve


class Collector:
    """What was exported, in order."""

    def __init__(self) -> None:
        self.traces: list[ExportTraceServiceRequest] = []
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.headers: list[dict[str, str]] = []
        self._server: Server

    async def start(self) -> None:
        self._server = await serve(self._take)

    async def close(self) -> None:
        await self._server.close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.port}"

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for export in self.traces
            for of_resource in export.resource_spans
            for of_scope in of_resource.scope_spans
            for span in of_scope.spans
        ]

    @property
    def resources(self) -> list[dict[str, Any]]:
        """The attributes of every resource that said something, each time."""
        said = [of_resource.resource for export in self.traces for of_resource in export.resource_spans]
        said += [of_resource.resource for export in self.metrics for of_resource in export.resource_metrics]
        return [attributes(resource) for resource in said]

    def points(self, name: str) -> list[HistogramDataPoint]:
        """A histogram's points, as they were exported last by each instance."""
        last: dict[str, Metric] = {}
        for export in self.metrics:
            for of_resource in export.resource_metrics:
                instance = attributes(of_resource.resource)["service.instance.id"]
                for of_scope in of_resource.scope_metrics:
                    for metric in of_scope.metrics:
                        if metric.name == name:
                            last[instance] = metric
        return [point for metric in last.values() for point in metric.histogram.data_points]

    async def _take(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        if request.target == "/v1/traces":
            self.traces.append(ExportTraceServiceRequest.FromString(request.body))
        else:
            assert request.target == "/v1/metrics"
            self.metrics.append(ExportMetricsServiceRequest.FromString(request.body))
        return Response(200)


def attributes(owner: Any) -> dict[str, Any]:
    """Of a span, a point or a resource."""
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in owner.attributes}
