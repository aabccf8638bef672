"""The small HTTP server, spoken to by a real client and by raw sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest

from extproc.local.http import Request, Response, Server, serve


async def echo(request: Request) -> Response:
    if request.target == "/fail":
        raise RuntimeError("no answer")
    headers = dict(request.headers)
    return Response(201, (("x-echo", headers.get("x-name", "")),), request.method.encode() + b" " + request.body)


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = await serve(echo)
    yield server
    await server.close()


async def talk(server: Server, data: bytes) -> bytes:
    """All that the server answers to raw bytes before it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(data)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


async def test_requests_share_a_connection(server: Server) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", trust_env=False) as client:
        for body in (b"one", b"x" * 200_000, b""):
            response = await client.post("/path?q=1", content=body, headers={"X-Name": "value"})
            assert (response.status_code, response.headers["x-echo"]) == (201, "value")
            assert response.content == b"POST " + body
        assert len(server._connections) == 1


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (b"", 0),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\n", 1),
        (b"GET / HTTP/1.1\r\nhost: a\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n", 2),
        (b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n", 1),
        (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nab", 0),
        (b"\x00\x01nonsense\r\n\r\n", 0),
    ],
    ids=["nothing", "one", "pipelined", "close", "cut-body", "nonsense"],
)
async def test_raw_bytes(server: Server, data: bytes, statuses: int) -> None:
    assert (await talk(server, data)).count(b"HTTP/1.1 201") == statuses


async def test_a_failing_handler_is_a_500(server: Server) -> None:
    assert (await talk(server, b"GET /fail HTTP/1.1\r\nhost: a\r\n\r\n")).startswith(b"HTTP/1.1 500")


async def test_a_body_over_the_bound_ends_the_connection(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("extproc.local.http.MAX_REQUEST_BYTES", 4)
    head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n"
    assert b"201" in await talk(server, head % 4 + b"abcd")
    assert await talk(server, head % 5 + b"abcde") == b""


async def test_close_ends_open_connections() -> None:
    server = await serve(echo)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    assert await reader.readline() == b"HTTP/1.1 201 \r\n"
    await server.close()
    await reader.read()
    writer.close()
    with pytest.raises(OSError, match=r"refused|Connect"):
        await asyncio.open_connection("127.0.0.1", server.port)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
async def test_listens_on_loopback_only(host: str) -> None:
    with pytest.raises(ValueError, match="loopback"):
        await serve(echo, host)
