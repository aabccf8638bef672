"""The gRPC health service (grpc.health.v1), for probes: true only while the gateway could take a request."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Answers `Check` for the server as a whole (the empty service name)."""

    def __init__(self, unready: Callable[[], str | None]) -> None:
        self._unready = unready

    def Check(  # noqa: N802 (the service's name)
        self, request: health_pb2.HealthCheckRequest, context: grpc.ServicerContext
    ) -> health_pb2.HealthCheckResponse:
        """SERVING or NOT_SERVING; NOT_FOUND for a service that is not here, as the protocol asks."""
        if request.service:
            context.abort(grpc.StatusCode.NOT_FOUND, "only the server as a whole is known")
        ready = self._unready() is None
        states = health_pb2.HealthCheckResponse
        return states(status=states.SERVING if ready else states.NOT_SERVING)


class HealthServer:
    """Serves Health on loopback, where Cloud Run's probes reach it. Port 0 takes a free one."""

    def __init__(self, unready: Callable[[], str | None], port: int) -> None:
        """Raises OSError where the port is taken."""
        # Checks run in a thread of their own: a probe must not wait behind the event loop's work, nor add to it.
        # Without SO_REUSEPORT: two servers would share a port, and a probe would reach either.
        threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="health")
        self._server = grpc.server(threads, options=(("grpc.so_reuseport", 0),))
        health_pb2_grpc.add_HealthServicer_to_server(Health(unready), self._server)
        try:
            self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        except RuntimeError as error:  # what grpcio raises for it
            raise OSError(f"TOLLGATE_HEALTH_PORT {port} cannot be listened on: it may be taken") from error

    def start(self) -> None:
        """Answer probes from now on."""
        self._server.start()

    def close(self) -> None:
        """Stop at once."""
        self._server.stop(None)
