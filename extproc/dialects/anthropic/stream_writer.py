"""A stream as Anthropic's callers expect it: content blocks one after the other, each begun, filled and ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from extproc import form
from extproc.dialects.anthropic.answers import envelope, stop_fields, write_citation, write_thinking, write_usage
from extproc.dialects.anthropic.errors import render_error_event
from extproc.dialects.dialect import Seed
from extproc.dialects.fields import dumps, parse


class MessageWriter:
    """One stream. A caller of this dialect asks for one choice, so that which one an event is of says nothing here.

    A call's arguments may come between those of another; its block then waits until the other's JSON is whole.
    """

    def __init__(self, seed: Seed) -> None:
        self._seed = seed
        self._blocks = 0  # begun so far: the open one is the last of them
        self._open: str | None = None
        self._call = -1
        self._arguments = ""
        self._waiting: list[form.ToolStarted | form.ToolArguments] = []
        self._called = False
        self._refusal = ""
        self._finished: form.Finished | None = None
        self._used: form.Used | None = None
        self._told = False
        self._tier: str | None = None
        self._started = False
        self._ended = False

    def write(self, event: form.StreamEvent) -> bytes:
        """The bytes of whole events, or none."""
        writer = _WRITERS.get(type(event))
        return b"" if self._ended or writer is None else writer(self, event)

    # The message ------------------------------------------------------------------------------------------------------

    def _start(self, event: form.Started) -> bytes:
        if self._started:
            return b""
        self._started, self._tier = True, event.service_tier
        message = {
            **envelope(event.id, event.model, self._seed),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": write_usage(event.usage, event.service_tier),
        }
        return _event("message_start", message=message)

    def _begun(self) -> bytes:
        """Streams that begin with their first text are given a beginning."""
        return b"" if self._started else self._start(form.Started(None, None))

    def _message_delta(self) -> bytes:
        """Why the answer ended, and its figures. May come again: what it says is cumulative."""
        if self._told:
            return b""
        self._told = True
        finished = self._finished
        delta = stop_fields(
            finished and finished.finish,
            finished and finished.stop_sequence,
            called=self._called,
            refusal=self._refusal,
        )
        usage = write_usage(self._used and self._used.usage, self._tier)
        return self._begun() + self._settled() + _event("message_delta", delta=delta, usage=usage)

    def _refuse(self, event: form.RefusalDelta) -> bytes:
        self._refusal += event.text
        return b""

    def _finish(self, event: form.Finished) -> bytes:
        self._finished, self._told = event, False
        return b""

    def _use(self, event: form.Used) -> bytes:
        self._used, self._told = event, False
        self._tier = event.service_tier or self._tier
        return self._message_delta() if self._finished is not None else b""

    def _fail(self, event: form.Failed) -> bytes:
        self._ended = True
        return render_error_event(event.error, self._used and write_usage(self._used.usage, self._tier))

    def _stop(self, _: form.Done) -> bytes:
        last = self._message_delta()
        self._ended = True
        return last + _event("message_stop")

    # Content blocks ---------------------------------------------------------------------------------------------------

    def _text(self, event: form.TextDelta) -> bytes:
        delta = {"type": "text_delta", "text": event.text}
        return self._delta("text", {"text": ""}, delta) if event.text else b""

    def _thought(self, event: form.ThinkingDelta) -> bytes:
        delta = {"type": "thinking_delta", "thinking": event.text}
        return self._delta("thinking", {"thinking": "", "signature": ""}, delta) if event.text else b""

    def _cite(self, event: form.Cited) -> bytes:
        return self._delta(
            "text", {"text": ""}, {"type": "citations_delta", "citation": write_citation(event.citation)}
        )

    def _delta(self, kind: str, begun: Mapping[str, Any], delta: Mapping[str, Any]) -> bytes:
        """A piece of a block of this kind: the open one, or a new one."""
        opened = b"" if self._open == kind else self._open_block(kind, begun)
        return opened + _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _open_block(self, kind: str, begun: Mapping[str, Any]) -> bytes:
        closed = self._begun() + self._settled()
        self._open = kind
        self._blocks += 1
        return closed + _event("content_block_start", index=self._blocks - 1, content_block={"type": kind, **begun})

    def _close(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._blocks - 1)

    def _signed(self, event: form.ThinkingSigned) -> bytes:
        """Ends the thoughts. Without any before it, it is a block of its own."""
        block = write_thinking(form.Thinking("", event.signature, event.origin, event.redacted))
        if event.redacted:
            kind = block.pop("type")
            return self._open_block(kind, block) + self._close()
        delta = {"type": "signature_delta", "signature": block["signature"]}
        return self._delta("thinking", {"thinking": "", "signature": ""}, delta) + self._close()

    # Calls of tools ---------------------------------------------------------------------------------------------------

    def _tool(self, event: form.ToolStarted | form.ToolArguments) -> bytes:
        self._called = True
        if self._open == "tool_use" and event.call != self._call and not self._whole():
            self._waiting.append(event)
            return b""
        written = self._tool_event(event)
        return written + self._released() if self._waiting else written

    def _tool_event(self, event: form.ToolStarted | form.ToolArguments) -> bytes:
        if isinstance(event, form.ToolStarted):
            opened = self._open_tool(event)
            self._call, self._arguments = event.call, ""
            return opened
        if event.call != self._call or self._open != "tool_use" or not event.json:
            return b""
        self._arguments += event.json
        delta = {"type": "input_json_delta", "partial_json": event.json}
        return _event("content_block_delta", index=self._blocks - 1, delta=delta)

    def _open_tool(self, event: form.ToolStarted) -> bytes:
        closed = self._begun() + self._close()
        self._open = "tool_use"
        self._blocks += 1
        block = {"type": "tool_use", "id": event.id, "name": event.name, "input": {}}
        return closed + _event("content_block_start", index=self._blocks - 1, content_block=block)

    def _whole(self) -> bool:
        """Whether the open call's arguments are JSON by now."""
        if not self._arguments[-1:].isspace() and not self._arguments.endswith("}"):
            return False
        return isinstance(parse(self._arguments.encode("utf-8", "surrogatepass")), dict)

    def _released(self) -> bytes:
        """What waited for the open call, if that is whole: the next call's events, and so on."""
        written = b""
        while self._waiting and self._whole():
            written += self._next_call()
        return written

    def _next_call(self) -> bytes:
        call = self._waiting[0].call
        own = [event for event in self._waiting if event.call == call]
        self._waiting = [event for event in self._waiting if event.call != call]
        return b"".join(map(self._tool_event, own))

    def _settled(self) -> bytes:
        """Closes what is open, whatever waits: something else begins."""
        written = b""
        while self._waiting:
            written += self._next_call()
        return written + self._close()


_WRITERS: Mapping[type, Callable[[MessageWriter, Any], bytes]] = {
    form.Started: MessageWriter._start,
    form.TextDelta: MessageWriter._text,
    form.ThinkingDelta: MessageWriter._thought,
    form.ThinkingSigned: MessageWriter._signed,
    form.Cited: MessageWriter._cite,
    form.ToolStarted: MessageWriter._tool,
    form.ToolArguments: MessageWriter._tool,
    form.RefusalDelta: MessageWriter._refuse,
    form.Finished: MessageWriter._finish,
    form.Used: MessageWriter._use,
    form.Done: MessageWriter._stop,
    form.Failed: MessageWriter._fail,
}


def _event(kind: str, **fields: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), dumps({"type": kind, **fields}))
