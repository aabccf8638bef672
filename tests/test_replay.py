"""The local stack's providers, as they answer for want of a key: recordings of each dialect, in its own framing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from extproc.dialects import DIALECTS
from extproc.local import replay
from extproc.local.provider import Received, Script
from extproc.providers import PROVIDERS, upstream_path
from extproc.sse import SseParser

RECORDINGS = Path(replay.__file__).parent / "recordings"
MODEL = "vendor/a-model"

CALLS = [(name, dialect) for name in replay.REPLAYED for dialect in PROVIDERS[name].paths]
WITH_TOOLS = ("openai-chat", "openai-responses", "anthropic-messages", "gemini-generate")
STREAMED = (*WITH_TOOLS, "openai-completions")


def ask(
    name: str, dialect: str, *, stream: bool = False, sse: bool = True, key: bool = True, body: object = None
) -> Script:
    """What a target's call is answered."""
    provider = PROVIDERS[name]
    path = upstream_path(provider, dialect, MODEL, replay.base_url(1, name), stream=stream, sse=sse)
    said = {"stream": stream} if body is None and not provider.model_in_path(dialect) else body or {}
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    return replay.choose(Received("POST", path, provider.auth_headers("scripted") if key else (), text))


def recorded(dialect: str, name: str) -> bytes:
    return (RECORDINGS / dialect / name).read_bytes()


@pytest.mark.parametrize(("name", "dialect"), CALLS)
def test_a_whole_answer_is_byte_for_byte_what_was_recorded(name: str, dialect: str) -> None:
    script = ask(name, dialect)
    assert (script.status, script.whole, dict(script.headers)) == (200, True, {"content-type": "application/json"})
    assert b"".join(script.chunks) == recorded(dialect, "answer")


@pytest.mark.parametrize(("name", "dialect"), [call for call in CALLS if call[1] in STREAMED])
def test_a_stream_is_byte_for_byte_what_was_recorded_an_event_at_a_time(name: str, dialect: str) -> None:
    script = ask(name, dialect, stream=True)
    assert (script.status, dict(script.headers)) == (200, {"content-type": "text/event-stream"})
    assert b"".join(script.chunks) == recorded(dialect, "stream")
    assert all(len(SseParser().feed(chunk)) == 1 for chunk in script.chunks)
    assert script.pause_s > 0


@pytest.mark.parametrize("tools", [False, True], ids=["text", "tools"])
def test_gemini_streams_an_array_where_nobody_asks_for_events(tools: bool) -> None:
    script = ask("gemini", "gemini-generate", stream=True, sse=False, body={"tools": [{}]} if tools else None)
    assert dict(script.headers) == {"content-type": "application/json"}
    events = SseParser().feed(recorded("gemini-generate", "stream-tools" if tools else "stream"))
    assert json.loads(b"".join(script.chunks)) == [json.loads(event.data or b"") for event in events]
    assert len(script.chunks) == len(events) + 1, "an element at a time, and the bracket"


RESULTS: dict[str, dict[str, object]] = {
    "openai-chat": {"messages": [{"role": "tool", "tool_call_id": "c", "content": "42"}]},
    "openai-responses": {"input": [{"type": "function_call_output", "call_id": "c", "output": "42"}]},
    "anthropic-messages": {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c"}]}]},
    "gemini-generate": {"contents": [{"role": "user", "parts": [{"functionResponse": {"name": "f"}}]}]},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize(("name", "dialect"), [call for call in CALLS if call[1] in WITH_TOOLS])
def test_tools_are_called_until_one_has_answered(name: str, dialect: str, stream: bool) -> None:
    file = "stream" if stream else "answer"
    offered: dict[str, object] = {
        "stream": stream,
        "tools": [{}],
        "messages": [{"role": "user", "content": 'say "role": "tool"'}],
    }
    assert b"".join(ask(name, dialect, stream=stream, body=offered).chunks) == recorded(dialect, f"{file}-tools")
    answered = {**offered, **RESULTS[dialect]}
    assert b"".join(ask(name, dialect, stream=stream, body=answered).chunks) == recorded(dialect, file)


@pytest.mark.parametrize(("name", "dialect"), CALLS)
def test_a_dialect_without_recorded_tools_answers_as_ever(name: str, dialect: str) -> None:
    has_tools = (RECORDINGS / dialect / "answer-tools").exists()
    assert has_tools == (dialect in WITH_TOOLS)
    file = "answer-tools" if has_tools else "answer"
    assert b"".join(ask(name, dialect, body={"tools": [{}]}).chunks) == recorded(dialect, file)


KINDS = {
    "openai": ("authentication_error", "invalid_request_error"),
    "anthropic": ("authentication_error", "invalid_request_error"),
    "gemini": ("UNAUTHENTICATED", "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize(("name", "dialect"), CALLS)
def test_what_is_no_call_is_refused_in_the_providers_own_shape(name: str, dialect: str) -> None:
    keyless, malformed = ask(name, dialect, key=False), ask(name, dialect, body=b"[]")
    assert [script.status for script in (keyless, malformed)] == [401, 400]
    for script, kind in zip((keyless, malformed), KINDS[name], strict=True):
        body = json.loads(b"".join(script.chunks))
        assert body["error"]["status" if name == "gemini" else "type"] == kind
        assert body.get("type") == ("error" if name == "anthropic" else None)
    assert f"no key in {PROVIDERS[name].auth.header}" in json.loads(b"".join(keyless.chunks))["error"]["message"]
    assert ask(name, dialect, body=b"{").status == 400


@pytest.mark.parametrize(
    "target",
    ["/", "/openai", "/openai/models", "/anthropic/v1/messages/batches", "/gemini/v1beta/models/g:embedContent", "x"],
)
def test_another_path_is_not_found(target: str) -> None:
    assert replay.choose(Received("POST", target, (("authorization", "Bearer x"),), b"{}")).status == 404


@pytest.mark.parametrize(("name", "dialect"), CALLS)
def test_the_recordings_are_answers_of_their_dialect(name: str, dialect: str) -> None:
    answer = DIALECTS[dialect].read_answer(recorded(dialect, "answer"))
    assert answer.usage is not None


def test_every_recording_names_its_source() -> None:
    table = (RECORDINGS / "README.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines() if "| `" in line]
    folders = [row[0] for row in rows]
    for number, folder in enumerate(folders):
        folders[number] = folder or folders[number - 1]
    named = {f"{folder}/{row[1]}" for folder, row in zip(folders, rows, strict=True)}
    present = {str(path.relative_to(RECORDINGS)) for path in RECORDINGS.glob("*-*/*")}
    assert named == present
    licences = {path.stem.replace("+", "/", 1) for path in (RECORDINGS / "LICENCES").iterdir()}
    assert {row[3] for row in rows} == licences
