"""Every recorded case of every API through a whole gateway: as it is to a caller of the same API, and translated for
callers of others, whose official clients read what came.

OpenAI's chat to its own callers is in `test_e2e_recordings.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio

from extproc.dialects import CHAT as CHAT_DIALECTS
from extproc.dialects import DIALECTS
from extproc.dialects.dialect import Address
from extproc.errors import BadRequest
from extproc.local.provider import Script
from extproc.providers import PROVIDERS
from extproc.records import Outcome, UsageSource
from tests.answers import ANTHROPIC, CHAT, DIALECT_OF, RESPONSES, raised_for, received
from tests.conformance import Conforms
from tests.recordings import Case, protocol_cases
from tests.replays import (
    ENVOYS_HEADERS,
    PASSED_HEADERS,
    Replays,
    Run,
    Seen,
    is_array,
    recorded_headers,
    script,
    shredded,
)
from tests.rig import POLICY, Rig, key_of, running
from tests.translated import REPLACED, UNASKED, as_events, asked, check_heard, check_raised, exception, whole

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

STAND_INS = ("openai", "anthropic", "gemini", "vertex", "vertex-anthropic", "azure", "deepseek")
TARGETS = ", ".join(f'"{name}/*"' for name in STAND_INS)
BUDGETS = "  - {scope: global, window: total, limit_usd: 1000000}\n"

# By a recording's protocol: the dialect of its API.
DIALECT = {
    **DIALECT_OF,
    **{name: name for name in ("openai-completions", "openai-embeddings", "anthropic-count-tokens")},
    "gemini-count-tokens": "gemini-count-tokens",
}
PATHS = {
    CHAT: "/v1/chat/completions",
    RESPONSES: "/v1/responses",
    ANTHROPIC: "/v1/messages",
    "openai-completions": "/v1/completions",
    "openai-embeddings": "/v1/embeddings",
    "anthropic-count-tokens": "/v1/messages/count_tokens",
}
PIECES = 6  # of a translated stream, beside those of one byte
UNREADABLE = 502
NO_ANSWERS = ("openai/completions-json-unknown-01",)  # a list of an account's usage
UNBILLED = ("anthropic-count-tokens", "gemini-count-tokens")


def provider_of(case: Case) -> str:
    """Whose stand-in answers: where it was recorded, or who else speaks that API."""
    if case.provider in ("vertex", "vertex-anthropic"):
        return case.provider
    if case.provider.startswith("azure") and case.protocol.startswith("openai"):
        return "azure"
    return case.protocol.partition("-")[0]


def model_of(case: Case) -> str:
    """As it is called in a path, too."""
    return case.model.removeprefix("models/").strip("/")


def path_to(dialect: str, model: str, *, stream: bool, array: bool) -> str:
    if dialect in PATHS:
        return PATHS[dialect]
    method = "countTokens" if "count" in dialect else "streamGenerateContent" if stream else "generateContent"
    return f"/v1beta/models/{quote(model)}:{method}" + ("?alt=sse" if stream and not array else "")


@dataclass(frozen=True)
class Native:
    """A case for a caller of its own API: the recorded request, or a small one where the gateway would refuse that."""

    case: Case

    @property
    def provider(self) -> str:
        return provider_of(self.case)

    @property
    def dialect(self) -> str:
        return DIALECT[self.case.protocol]

    @property
    def path(self) -> str:
        return path_to(self.dialect, model_of(self.case), stream=self.case.stream, array=is_array(self.case))

    @cached_property
    def request(self) -> Mapping[str, Any]:
        model, in_path = model_of(self.case), self.case.protocol.startswith("gemini")
        recorded = {**({} if in_path else {"model": model}), **(self.case.request or {})}
        try:
            DIALECTS[self.dialect].read_call(recorded, Address(model, self.case.stream) if in_path else Address())
        except BadRequest:
            if self.dialect in CHAT_DIALECTS:
                return asked(self.dialect, self.case, model)[0]
            return {"model": model, "prompt": "hi", "stream": self.case.stream}
        return recorded

    @property
    def streams(self) -> bool:
        return self.case.stream or bool(self.request.get("stream"))

    @property
    def script(self) -> Script:
        case = self.case
        return script(case, shredded(case.body, 1) if case.stream else [case.body], cut=case.stream)


@dataclass(frozen=True)
class Translated:
    """A case for a caller of another dialect of chat."""

    case: Case
    into: str

    @property
    def provider(self) -> str:
        """For callers of Responses one who speaks no Responses: OpenAI would be asked in it, and not translated."""
        return "deepseek" if self.into == RESPONSES and self.case.protocol == CHAT else provider_of(self.case)

    @property
    def path(self) -> str:
        return path_to(self.into, model_of(self.case), stream=self.case.stream, array=False)

    @property
    def request(self) -> Mapping[str, Any]:
        return asked(self.into, self.case, model_of(self.case))[0]

    @property
    def script(self) -> Script:
        case = as_events(self.case)
        return script(case, shredded(case.body, 2, PIECES) if case.stream else [case.body], cut=case.stream)


NATIVE = [case for protocol in DIALECT if protocol != CHAT for case in protocol_cases(protocol)]


def pairs() -> Iterator[tuple[Case, str]]:
    """Each case for callers of two other dialects: which two goes round. Whoever speaks Responses speaks OpenAI's chat,
    too, and is asked in that: answers of Responses are translated in `test_translation.py` only.
    """
    for protocol, own in DIALECT_OF.items():
        if own == RESPONSES:
            continue
        others = [name for name in CHAT_DIALECTS if name != own]
        for number, case in enumerate(protocol_cases(protocol)):
            for into in (others[number % 3], others[(number + 1) % 3]):
                if case.status != 200 or exception(case, into) not in UNASKED:
                    yield case, into


PAIRS = list(pairs())


def run_of(case: Case, into: str | None = None) -> tuple[str, Run]:
    return (f"{case.name}/{into}", Translated(case, into)) if into else (f"{case.name}/native", Native(case))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    policy = POLICY.replace('"openai/*"', TARGETS) + BUDGETS
    async with running(short_directory, policy=policy, providers=STAND_INS) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def replays(rig: Rig, request: pytest.FixtureRequest) -> AsyncIterator[Replays]:
    calls = (getattr(item, "callspec", None) for item in request.session.items if item.path == request.path)
    selected = dict(run_of(**call.params) for call in calls if call is not None)
    async with rig.client() as client:
        replays = Replays(rig, client, selected)
        yield replays
        await replays.cancel()


# What must come of it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", NATIVE, ids=lambda case: case.name)
async def test_to_a_caller_of_the_same_api(replays: Replays, conforms: Conforms, case: Case) -> None:
    with conforms(case, "native"):
        name, _ = run_of(case)
        run, seen = Native(case), await replays.of(name)
        check_key(run, seen)
        assert seen.status == REPLACED.get(case.status, case.status)
        assert set(seen.headers) <= PASSED_HEADERS | ENVOYS_HEADERS
        check_headers(case, seen)
        if case.status in REPLACED:
            assert b"did not accept" in seen.body
        elif not case.stream or whole(case) or "error" in case.meta:
            assert seen.body == case.body
        else:
            events = whole_events(case.body)
            assert seen.body.startswith(events)
            assert b"ended early" in seen.body.removeprefix(events)
        check_record(run, seen)


@pytest.mark.parametrize(("case", "into"), PAIRS, ids=[f"{case.name}-{into}" for case, into in PAIRS])
async def test_to_a_caller_of_another_dialect(replays: Replays, conforms: Conforms, case: Case, into: str) -> None:
    with conforms(case, "through the gateway"):
        name, _ = run_of(case, into)
        error_as_answer = case.status == 200 and not case.stream and "error" in case.meta
        try:
            run, seen = Translated(case, into), await replays.of(name)
        except httpx.RemoteProtocolError:
            assert error_as_answer  # whose headers may have gone on before it was read: then it breaks off
            return
        check_key(run, seen)
        assert set(seen.headers) <= PASSED_HEADERS | ENVOYS_HEADERS
        check_headers(case, seen)
        if error_as_answer:
            assert seen.status == UNREADABLE
            with pytest.raises(raised_for(into, UNREADABLE)):
                received(into, seen.body, stream=False, status=UNREADABLE)
        elif case.status != 200:
            assert seen.status == REPLACED.get(case.status, case.status)
            check_raised(case, into, seen.status, seen.body, stream=case.stream)
        else:
            assert seen.status == 200
            check_heard(as_events(case), into, seen.body)
        check_record(run, seen)


def check_key(run: Run, seen: Seen) -> None:
    (header,) = PROVIDERS[run.provider].auth_headers(key_of(run.provider))
    assert header in seen.sent.headers


def check_headers(case: Case, seen: Seen) -> None:
    given = dict(recorded_headers(case))
    if case.status != 200 and case.status not in REPLACED:
        assert seen.headers.get("retry-after") == given.get("retry-after")


def whole_events(body: bytes) -> bytes:
    """Up to the last blank line."""
    lines = body.splitlines(keepends=True)
    while lines and lines[-1].strip():
        lines.pop()
    return b"".join(lines)


def check_record(run: Native | Translated, seen: Seen) -> None:
    case, record = run.case, seen.record
    failed = not whole(case) if case.stream else "error" in case.meta or case.status != 200 or case.name in NO_ANSWERS
    assert record.outcome == (Outcome.UPSTREAM_ERROR if failed else Outcome.OK)
    assert record.status == seen.status
    assert record.stream == (run.streams if isinstance(run, Native) else case.stream)
    assert record.provider == run.provider
    assert record.model == (model_of(case) if ":" in run.path else run.request["model"])
    figures = (record.prompt_tokens, record.completion_tokens, record.cached_prompt_tokens, record.reasoning_tokens)
    if seen.status != 200 or case.protocol in UNBILLED:
        assert (figures, record.cost_nanousd) == ((0, 0, 0, 0), 0)
    elif (
        case.figures is not None and case.stream and not whole(case)
    ):  # what came after the last figures is billed, too
        assert record.completion_tokens >= case.figures[1]
    elif case.figures is not None:
        assert figures == case.figures
        assert record.usage_source is UsageSource.PROVIDER
    else:
        assert record.usage_source is UsageSource.COUNTED


async def test_what_was_posted_is_what_the_rows_say(rig: Rig, replays: Replays) -> None:
    await replays.check_posted()
