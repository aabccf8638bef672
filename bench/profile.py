"""`python -m bench.profile`: where the processor's own time goes, without Envoy and without a transport.

A whole processor with its Valkey, in this process, is fed the messages that Envoy sends, through sessions. The first
figures are without the profiler, as CPU of the event loop's thread; the profiler makes Python's calls look dearer
than C's, so take the table for what to look at, and the figures for what it would gain.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import io
import os
import pstats
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import uvloop

from bench.gateways import POLICY
from bench.provider import WHOLE_ANSWER, stream_event
from extproc.local.issuer import CERTIFICATES_PATH, DevIssuer, serve_certificates
from extproc.local.valkey import LocalValkey
from extproc.pb import ext_proc_pb2 as pb
from extproc.serve import Processor
from extproc.session import Session
from extproc.settings import Settings
from extproc.startup import Startup

_AT_ONCE = 32  # requests under way, so that the ledger's commands share pipelines as they do under load
_WHOLE, _STREAM = "application/json", "text/event-stream"
_ID, _NAMESPACE = "x-request-id", "tollgate"
_FILTER = "envoy.filters.http.ext_proc"
_METADATA = 'filter_metadata { key: "tollgate" value { fields { key: "provider" value { string_value: "openai" } } } }'


def _headers(pairs: dict[str, str]) -> pb.HeaderMap:
    return pb.HeaderMap(headers=[pb.HeaderValue(key=name, raw_value=value.encode()) for name, value in pairs.items()])


class Messages:
    """What Envoy sends for one request, as bytes; only the request's id differs from one to the next."""

    def __init__(self, token: str) -> None:
        self._sent = {
            ":authority": "127.0.0.1:8080",
            ":path": "/v1/chat/completions",
            ":method": "POST",
            ":scheme": "http",
            "authorization": f"Bearer {token}",
            "content-type": "application/json",
            "content-length": "113",
            "user-agent": "OpenAI/Python 1.50.0",
            "accept": "application/json",
            "x-forwarded-proto": "http",
        }
        self.stream_body = self._body(b',"stream":true')
        self.body = self._body(b"")
        self.requests: deque[tuple[bytes, bytes]] = deque()
        self._itinerary = self._itinerary_of = "-"
        self.responses = {kind: self._response(kind) for kind in (_WHOLE, _STREAM)}
        self.answer = pb.ProcessingRequest(
            response_body=pb.HttpBody(body=WHOLE_ANSWER, end_of_stream=True)
        ).SerializeToString()
        self.chunk = pb.ProcessingRequest(response_body=pb.HttpBody(body=stream_event(1))).SerializeToString()

    def _body(self, options: bytes) -> bytes:
        body = b'{"model":"gpt-4o","messages":[{"role":"user","content":"Hello, how are you?"}],"max_tokens":4000%s}'
        message = pb.HttpBody(body=body % options, end_of_stream=True)
        return bytes(pb.ProcessingRequest(request_body=message).SerializeToString())

    def prepare(self, count: int) -> None:
        """The headers of so many requests, as the gate gets them and as the target does, outside what is measured."""
        self.requests.extend(self._request() for _ in range(count))

    def _request(self) -> tuple[bytes, bytes]:
        pairs = self._sent | {"x-request-id": str(uuid4())}
        gate = pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=_headers(pairs)))
        pairs["x-tollgate-internal-route"] = "openai"
        target = pb.ProcessingRequest(request_headers=pb.HttpHeaders(headers=_headers(pairs)))
        target.attributes[_FILTER].fields["xds.upstream_host_metadata"].string_value = _METADATA
        itinerary = self._itinerary.replace(self._itinerary_of, pairs["x-request-id"])
        target.metadata_context.filter_metadata[_NAMESPACE].update({"itinerary": itinerary})
        return gate.SerializeToString(), target.SerializeToString()

    async def learn_itinerary(self, processor: Processor) -> None:
        """What the gate tells the target, as it says it for one request: the next ones differ by their id alone."""
        gate_headers, _ = self._request()
        request = pb.ProcessingRequest.FromString(gate_headers).request_headers.headers.headers
        gate = Call(processor, "gate")
        await gate.feed(gate_headers)
        await gate.feed(self.body)
        metadata = pb.ProcessingResponse.FromString(gate.last).dynamic_metadata
        said = metadata.fields[_NAMESPACE].struct_value.fields["itinerary"].string_value
        gate.session.close()
        self._itinerary, self._itinerary_of = said, next(h.raw_value.decode() for h in request if h.key == _ID)

    def _response(self, content_type: str) -> bytes:
        pairs = {":status": "200", "content-type": content_type, "x-envoy-attempt-count": "1"}
        message = pb.HttpHeaders(headers=_headers(pairs))
        return bytes(pb.ProcessingRequest(response_headers=message).SerializeToString())


class Call:
    """One session, and whoever waits for what it says."""

    def __init__(self, processor: Processor, role: str) -> None:
        self._waiting: asyncio.Future[None] | None = None
        self.said = 0
        self.last = b""
        session = processor._open(role, self._send, self._end)
        assert session is not None
        self.session: Session = session

    def _send(self, message: bytes) -> None:
        self.said += 1
        self.last = message
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def _end(self, reason: str | None) -> None:
        assert reason is None, reason

    async def feed(self, message: bytes) -> None:
        """Feed it, and wait for its answer if that is not there at once."""
        before = self.said
        self.session.feed(message)
        if self.said == before:
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting


async def _begin(processor: Processor, messages: Messages, body: bytes, content_type: str) -> Call:
    """A request whose answer has begun."""
    gate_headers, target_headers = messages.requests.popleft()
    gate = Call(processor, "gate")
    await gate.feed(gate_headers)
    await gate.feed(body)
    target = Call(processor, "target")
    await target.feed(target_headers)
    target.session.close()
    await gate.feed(messages.responses[content_type])
    return gate


async def whole_requests(processor: Processor, messages: Messages, count: int) -> None:
    """So many whole answers."""

    async def some(number: int) -> None:
        for _ in range(number):
            gate = await _begin(processor, messages, messages.body, _WHOLE)
            await gate.feed(messages.answer)
            assert gate.session.done
            gate.session.close()

    await asyncio.gather(*(some(count // _AT_ONCE) for _ in range(_AT_ONCE)))


async def chunks(processor: Processor, messages: Messages, count: int) -> None:
    """So many chunks of one stream each, in turn, as streams of many callers come."""
    gates = [await _begin(processor, messages, messages.stream_body, _STREAM) for _ in range(_AT_ONCE)]
    for _ in range(count // _AT_ONCE):
        for gate in gates:
            gate.session.feed(messages.chunk)
        await asyncio.sleep(0)
    for gate in gates:
        while gate.said < count // _AT_ONCE + 3:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        gate.session.close()


@asynccontextmanager
async def _processor() -> AsyncIterator[tuple[Processor, Messages]]:
    with tempfile.TemporaryDirectory(prefix="tg") as name:
        directory = Path(name)
        issuer = DevIssuer.open(directory)
        keys = await serve_certificates(issuer)
        valkey = LocalValkey(directory / "valkey", appendonly=True).start()
        policy = directory / "policy.yaml"
        policy.write_text(POLICY)
        environment = {
            "TOLLGATE_POLICY": str(policy),
            "TOLLGATE_STATE_DIR": str(directory),
            "TOLLGATE_SOCKET": str(directory / "s"),
            "TOLLGATE_HEALTH_PORT": "0",
            "TOLLGATE_ISSUER_KEYS": f"{issuer.issuer}=http://127.0.0.1:{keys.port}{CERTIFICATES_PATH}",
            "REDIS_URL": valkey.url,
        }
        os.environ["OPENAI_API_KEY"] = "sk-bench-0123456789abcdef"  # keys are read from the environment itself
        processor = Processor(Settings.from_environment(environment), Startup())
        stop = asyncio.Event()
        running = asyncio.create_task(processor.run(stop))
        while processor.lacking() is not None:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        token = issuer.mint("ranker@test.iam.gserviceaccount.com", "https://tollgate.test", 3600, time.time())
        try:
            yield processor, Messages(token)
        finally:
            stop.set()
            await running
            valkey.stop()
            await keys.close()


Work = Callable[[Processor, Messages, int], Awaitable[None]]


async def _measure(title: str, work: Work, count: int, lines: int) -> None:
    async with _processor() as (processor, messages):
        await messages.learn_itinerary(processor)
        messages.prepare(3 * count if work is whole_requests else 3 * _AT_ONCE)
        await work(processor, messages, count // 4)
        loop_s, all_s = time.thread_time(), time.process_time()
        await work(processor, messages, count)
        loop_us, all_us = (time.thread_time() - loop_s) / count * 1e6, (time.process_time() - all_s) / count * 1e6
        print(f"{title}: {loop_us:.1f} µs of the event loop's thread, {all_us:.1f} µs of all threads, each\n")
        profiler = cProfile.Profile(
            time.thread_time
        )  # CPU: waiting for a core or for another thread is no cost of ours
        profiler.enable()
        await work(processor, messages, count)
        profiler.disable()
        print(_table(profiler, count, lines))


def _table(profiler: cProfile.Profile, count: int, lines: int) -> str:
    stats = pstats.Stats(profiler, stream=io.StringIO())
    rows = sorted(stats.stats.items(), key=lambda row: -row[1][2])  # type: ignore[attr-defined]
    said = ["| own µs | with callees µs | calls | function |", "|---|---|---|---|"]
    for (file, line, name), (_, calls, own, whole, _) in rows[:lines]:
        where = name if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} {name}"
        said.append(f"| {own / count * 1e6:.2f} | {whole / count * 1e6:.2f} | {calls / count:.2f} | {where} |")
    return "\n".join(said) + "\n"


def main() -> None:
    """Both paths, each with a processor of its own."""
    parser = argparse.ArgumentParser(prog="bench.profile", description=__doc__)
    parser.add_argument("--count", type=int, default=6400, help="of requests; of chunks ten times as many")
    parser.add_argument("--lines", type=int, default=40, help="of each table")
    given = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {_AT_ONCE} at once\n")
    uvloop.run(_measure("A whole request", whole_requests, given.count, given.lines))
    uvloop.run(_measure("A streamed chunk", chunks, given.count * 10, given.lines))


if __name__ == "__main__":
    main()
