"""The health service: SERVING only while the gateway could take a request."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import grpc_testing
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from extproc.health import LIVE, Health, HealthServer

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]
CHECK = SERVICE.methods_by_name["Check"]
STATES = health_pb2.HealthCheckResponse


def check(lacking: str | None, service: str = "", *, alive: bool = True) -> tuple[int | None, grpc.StatusCode]:
    server = grpc_testing.server_from_dictionary(
        {SERVICE: Health(lambda: lacking, lambda: alive)}, grpc_testing.strict_real_time()
    )
    call = server.invoke_unary_unary(CHECK, (), health_pb2.HealthCheckRequest(service=service), None)
    response, _, code, _ = call.termination()
    return (response.status if response is not None else None), code


@pytest.mark.parametrize(
    ("lacking", "status"), [(None, STATES.SERVING), ("Redis cannot be used", STATES.NOT_SERVING)], ids=str
)
def test_a_check(lacking: str | None, status: int) -> None:
    assert check(lacking) == (status, grpc.StatusCode.OK)


@pytest.mark.parametrize(("alive", "status"), [(True, STATES.SERVING), (False, STATES.NOT_SERVING)])
def test_what_lacks_something_lives_all_the_same(alive: bool, status: int) -> None:
    assert check("Redis cannot be used", LIVE, alive=alive) == (status, grpc.StatusCode.OK)


def test_a_service_that_is_not_here_is_not_found() -> None:
    assert check(None, "envoy.service.ext_proc.v3.ExternalProcessor") == (None, grpc.StatusCode.NOT_FOUND)


@pytest.fixture
def lacking() -> list[str]:
    return []


@pytest.fixture
def stub(lacking: list[str]) -> Iterator[health_pb2_grpc.HealthStub]:
    server = HealthServer(lambda: lacking[0] if lacking else None, lambda: True, 0)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield health_pb2_grpc.HealthStub(channel)
    server.close()


def test_over_a_port_it_says_how_things_are_now(stub: health_pb2_grpc.HealthStub, lacking: list[str]) -> None:
    request = health_pb2.HealthCheckRequest()
    assert stub.Check(request, timeout=10).status == STATES.SERVING
    lacking.append("it is shutting down")
    assert stub.Check(request, timeout=10).status == STATES.NOT_SERVING


def test_a_closed_server_takes_no_more_probes() -> None:
    server = HealthServer(lambda: None, lambda: True, 0)
    server.start()
    server.close()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel, pytest.raises(grpc.RpcError) as raised:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert raised.value.code() == grpc.StatusCode.UNAVAILABLE


def test_checks_do_not_run_in_the_main_thread() -> None:
    threads: list[str] = []

    def ready() -> None:
        threads.append(threading.current_thread().name)

    server = HealthServer(ready, lambda: True, 0)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    server.close()
    assert threads[0].startswith("health")


def test_a_taken_port_is_refused_in_one_line() -> None:
    server = HealthServer(lambda: None, lambda: True, 0)
    with pytest.raises(OSError, match=rf"^TOLLGATE_HEALTH_PORT {server.port} [^\n]+$"):
        HealthServer(lambda: None, lambda: True, server.port)
    server.close()
