"""What the local stack answers in the place of providers without a key: recorded answers, at a human pace.

Each provider has its own base URL at the one scripted server: its name is the first segment of the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

from extproc.dialects import DIALECTS
from extproc.errors import BadRequest, NotFound, TollgateError, Unauthenticated
from extproc.local.provider import Received, Script
from extproc.providers import PROVIDERS, Provider
from extproc.sse import SseParser

REPLAYED = ("openai", "anthropic", "gemini")  # those that there are recordings of

PAUSE_S = 0.02  # about 50 events a second, as models write

_RECORDINGS = resources.files("extproc.local") / "recordings"
_JSON = (("content-type", "application/json"),)

# A tool's result, in any of the dialects. Within a text its quotes would be escaped.
_TOOL_RESULT = re.compile(rb'"(?:function_call_output|tool_result|function_?[rR]esponse)"|"role":\s*"tool"')


class _Place(NamedTuple):
    """What a path is of. `streams` where the path says so, and not the body."""

    path: re.Pattern[str]
    provider: Provider
    dialect: str
    streams: bool


def base_url(port: int, provider: str) -> str:
    """Where the scripted server that listens on `port` stands for this provider."""
    return f"http://127.0.0.1:{port}/{provider}"


def choose(request: Received) -> Script:
    """A recorded stream or whole answer, with a tool call where tools are offered and none has answered yet."""
    url = urlsplit(request.target)
    place = next((place for place in _PLACES if place.path.fullmatch(url.path)), None)
    if place is None:
        name = next((name for name in REPLAYED if url.path.startswith(f"/{name}/")), REPLAYED[0])
        return _refusal(PROVIDERS[name], NotFound("There is no such path here."))
    try:
        body = _checked(request, place.provider)
    except TollgateError as error:
        return _refusal(place.provider, error)
    suffix = "-tools" if body.get("tools") and not _TOOL_RESULT.search(request.body) else ""
    if not (place.streams or body.get("stream")):
        answer = _recorded(place.dialect, "answer", suffix)
        return Script(headers=_JSON, chunks=(answer,), whole=True, first_pause_s=0.3)
    stream = _recorded(place.dialect, "stream", suffix)
    if place.streams and "alt=sse" not in url.query:
        return Script(headers=_JSON, chunks=_as_array(stream), pause_s=PAUSE_S)
    return Script(chunks=[event.raw for event in SseParser().feed(stream)], pause_s=PAUSE_S)


def _places() -> Iterator[_Place]:
    for provider in map(PROVIDERS.__getitem__, REPLAYED):
        for dialect, paths in provider.paths.items():
            for path in {paths.whole, paths.stream}:
                pattern = re.escape(f"/{provider.name}{path}").replace(re.escape("{model}"), "[^/]+")
                yield _Place(re.compile(pattern), provider, dialect, streams=path != paths.whole)


_PLACES = tuple(_places())


def _checked(request: Received, provider: Provider) -> dict[str, Any]:
    if request.header(provider.auth.header) is None:
        raise Unauthenticated(f"There is no key in {provider.auth.header}.")
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        body = None
    if not isinstance(body, dict):
        raise BadRequest("The body is not a JSON object.")
    return body


def _recorded(dialect: str, name: str, suffix: str) -> bytes:
    """Not every dialect has tools."""
    folder = _RECORDINGS / dialect
    with_suffix = folder / f"{name}{suffix}"
    return (with_suffix if with_suffix.is_file() else folder / name).read_bytes()


def _as_array(stream: bytes) -> list[bytes]:
    """The same answer as Gemini sends it to who does not ask for events."""
    elements = [event.data for event in SseParser().feed(stream) if event.data]
    return [(b",\r\n" if number else b"[") + element for number, element in enumerate(elements)] + [b"]"]


def _refusal(provider: Provider, error: TollgateError) -> Script:
    dialect = DIALECTS[next(iter(provider.paths))]
    return Script(status=error.status, headers=_JSON, chunks=(dialect.render_error(error),), whole=True)
