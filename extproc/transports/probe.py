"""The health service (grpc.health.v1) beside ext_proc, for whoever spreads streams over processors."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

SERVICE = "grpc.health.v1.Health"
LIVE = "live"  # the service name of a liveness check: answering it is the proof
Lacking = Callable[[], str | None]  # what the gateway lacks to take requests, or None


def check(request: bytes, lacking: Lacking) -> bytes | None:
    """Answer `Check`, from and to its wire format. None where it asks for a service that is not here (NOT_FOUND).

    Envoy asks for LIVE: a processor that lacks Redis still answers callers better than Envoy would.
    """
    try:
        service = health_pb2.HealthCheckRequest.FromString(request).service
    except DecodeError:
        return None
    if service not in ("", LIVE):
        return None
    states = health_pb2.HealthCheckResponse
    serving = service == LIVE or lacking() is None
    answer = states(status=states.SERVING if serving else states.NOT_SERVING)
    return bytes(answer.SerializeToString())
