"""What the local stack's provider answers: recorded answers, at a human pace."""

from __future__ import annotations

from importlib import resources

import orjson

from extproc.local.provider import Received, Script

PAUSE_S = 0.02  # about 50 events a second, as models write

_RECORDINGS = resources.files("extproc.local") / "recordings"
_JSON = (("content-type", "application/json"),)


def choose(request: Received) -> Script:
    """A recorded stream or whole answer, with a tool call where tools are offered."""
    try:
        body = orjson.loads(request.body)
    except orjson.JSONDecodeError:
        return _refusal("the body is not JSON")
    if request.header("authorization") is None:
        return _refusal("there is no key")
    suffix = "-tools" if body.get("tools") else ""
    if not body.get("stream"):
        return Script(headers=_JSON, chunks=(_recorded(f"answer{suffix}"),), whole=True, first_pause_s=0.3)
    events = _recorded(f"stream{suffix}").split(b"\n\n")
    return Script(chunks=[event + b"\n\n" for event in events if event], pause_s=PAUSE_S)


def _recorded(name: str) -> bytes:
    return (_RECORDINGS / name).read_bytes()


def _refusal(message: str) -> Script:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return Script(status=400, headers=_JSON, chunks=(orjson.dumps({"error": error}),), whole=True)
