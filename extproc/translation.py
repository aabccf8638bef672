"""One attempt at a provider that speaks another dialect than the caller: its body there, and its answer back. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc import form
from extproc.dialects import CHAT
from extproc.dialects.dialect import Address, ChatDialect, Seed
from extproc.errors import BadRequest, ProviderError
from extproc.providers import Provider
from extproc.sse import SseParser


class Translation:
    """From `caller`'s dialect to `provider`'s, and back.

    Reads the caller's body at once; raises BadRequest as its dialect does. What the provider's dialect cannot say has
    been refused at the gate, or, with `drop`, is left out here.
    """

    def __init__(
        self,
        caller: ChatDialect,
        provider: ChatDialect,
        body: Mapping[str, Any],
        address: Address,
        *,
        drop: bool,
        request_id: str,
        created_s: int,
    ) -> None:
        asked = caller.read_request(body, address)
        self._request = within(asked, provider) if drop else asked
        self._provider = provider
        self._caller = caller
        self._seed = Seed(request_id, created_s, asked, address.array)
        self._parser = SseParser()
        self._reader = provider.stream_reader(self._seed)
        self._writer = caller.stream_writer(self._seed)

    def body(self, model: str, cap: int | None) -> bytes:
        """The request as the provider gets it."""
        return self._provider.write_request(self._request, model, cap)

    def whole(self, body: bytes) -> bytes:
        """A whole answer. Raises ValueError where it is none."""
        return self._caller.write_whole(self._provider.read_whole(body, self._seed), self._seed)

    def error(self, status: int, body: bytes) -> bytes:
        """A provider's error."""
        return self._caller.render_error(self._provider.read_error(status, body))

    def chunk(self, data: bytes, end: bool) -> bytes:
        """The next piece of a stream: what its whole events become. Raises StreamTooLarge."""
        events = [event for block in self._parser.feed(data) if block.data for event in self._reader.read(block.data)]
        if end:
            events += self._end()
        return b"".join(map(self._writer.write, events))

    def broken_off(self, error: ProviderError) -> bytes:
        """The event that tells the caller why its stream does not go on."""
        return self._writer.write(form.Failed(error))

    def _end(self) -> list[form.StreamEvent]:
        """Some providers leave out the last line ends, and some streams have no closing event."""
        rest = SseParser().feed(self._parser.finish() + b"\n\n")
        late = [event for block in rest if block.data for event in self._reader.read(block.data)]
        return [*late, *self._reader.finish()]


def chat_of(provider: Provider) -> str | None:
    """The dialect in which a provider is asked what the caller asked in another: its first that can be translated."""
    return next((name for name in provider.paths if name in CHAT), None)


def within(request: form.Request, provider: ChatDialect) -> form.Request:
    """The request without what this dialect cannot say: for a policy that has it dropped."""
    return form.without(request, form.features(request) & provider.cannot)


def refusal(caller: ChatDialect, provider: ChatDialect, request: form.Request, *, drop: bool) -> BadRequest | None:
    """Why a provider of this dialect cannot take the call, naming the field as the caller knows it; None if it can."""
    lacking = form.features(request) & provider.cannot
    extras = request.extras
    if drop:
        lacking -= form.DROPPABLE
        extras = ()
    field = next(iter(extras), None) or next((caller.fields[feature] for feature in sorted(lacking)), None)
    if field is None:
        return None
    message = f"Unsupported parameter: '{field}' is not supported by the providers of this model."
    return BadRequest(message, code="unsupported_parameter", param=field)
