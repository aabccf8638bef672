"""The gRPC health service (grpc.health.v1), for probes: whether the gateway is ready, and whether it lives."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

LIVE = "live"  # the service name of a liveness check


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers `Check` for the server as a whole (the empty service name), and for LIVE."""

    def __init__(self, unready: Callable[[], str | None], alive: Callable[[], bool]) -> None:
        self._unready = unready
        self._alive = alive

    def Check(  # noqa: N802 (the service's name)
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """SERVING or NOT_SERVING; NOT_FOUND for a service that is not here, as the protocol asks."""
        if request.service not in ("", LIVE):
            context.abort(grpc.StatusCode.NOT_FOUND, f"only the server as a whole and {LIVE!r} are known")
        serving = self._alive() if request.service else self._unready() is None
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if serving else states.NOT_SERVING)


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
