"""The gRPC health service (grpc.health.v1), for probes: whether the gateway is ready, and whether it lives."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVE = "live"  # the service name of a liveness check
_PATIENCE_S, _POLL_S = 0.9, 0.02  # less than a probe's shortest timeout, which is a second


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers `Check` for the server as a whole (the empty service name), and for LIVE."""

    def __init__(self, unready: Callable[[], str | None], alive: Callable[[], bool]) -> None:
        self._unready = unready
        self._alive = alive
        self._was_ready = False

    def Check(  # noqa: N802 (the service's name)
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """SERVING or NOT_SERVING; NOT_FOUND for a service that is not here, as the protocol asks."""
        if request.service not in ("", LIVE):
            context.abort(grpc.StatusCode.NOT_FOUND, f"only the server as a whole and {LIVE!r} are known")
        serving = self._alive() if request.service else self._is_ready()
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if serving else states.NOT_SERVING)

    def _is_ready(self) -> bool:
        """Now, or soon: before the first time a startup probe, which comes once a second, waits for it."""
        patience_s = 0.0 if self._was_ready else _PATIENCE_S
        deadline_s = time.monotonic() + patience_s
        while (unready := self._unready()) is not None and time.monotonic() < deadline_s:
            time.sleep(_POLL_S)
        self._was_ready |= unready is None
        return unready is None


class HealthServer:
    """Serves Health. Port 0 takes a free one. A probe from outside of the container does not reach loopback."""

    def __init__(
        self, unready: Callable[[], str | None], alive: Callable[[], bool], port: int, host: str = "127.0.0.1"
    ) -> None:
        """Raises OSError where the port is taken."""
        # Checks run in a thread of their own: a probe must not wait behind the event loop's work, nor add to it.
        # Without SO_REUSEPORT: two servers would share a port, and a probe would reach either.
        threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="health")
        self._server = grpc.server(threads, options=(("grpc.so_reuseport", 0),))
        health_pb2_grpc.add_HealthServicer_to_server(Health(unready, alive), self._server)
        try:
            self.port = self._server.add_insecure_port(f"{f'[{host}]' if ':' in host else host}:{port}")
        except RuntimeError as error:  # what grpcio raises for it
            raise OSError(f"TOLLGATE_HEALTH_PORT {port} cannot be listened on: it may be taken") from error

    def start(self) -> None:
        """Answer probes from now on."""
        self._server.start()

    def close(self) -> None:
        """Stop at once."""
        self._server.stop(None)
