"""There is no way around a budget: not by any path, and not by thoughts that nobody sees."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio

from extproc.endpoints import SERVED
from extproc.local.provider import Received, Script
from extproc.records import Outcome
from tests import voices
from tests.checker import LEASE_TOKENS, Checker
from tests.rig import POLICY, Rig, Told, running, whole
from tests.turns import Turn, body_of, cap_of, script

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOMAIN = "test.iam.gserviceaccount.com"
SPENT, SPENT_TOKENS = f"spent@{DOMAIN}", 50
LIMIT_TOKENS = 3_000
MODELS = """\
models:
  gpt-4o: {targets: [openai/gpt-4o]}
  o3: {targets: [openai/o3]}
  asked-to-think: {targets: [anthropic/claude-sonnet-4-5]}
  thinking: {targets: [anthropic/claude-sonnet-5]}
  gemini: {targets: [gemini/gemini-2.5-pro]}
  flash: {targets: [gemini/gemini-2.5-flash]}
"""
BUDGETS = f"""\
  - {{scope: service, id: "{SPENT}", window: day, limit_tokens: {SPENT_TOKENS}}}
  - {{scope: service, id: "thinker-*@{DOMAIN}", window: day, limit_tokens: {LIMIT_TOKENS}}}
"""
PROVIDERS = ("openai", "anthropic", "gemini")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    policy = POLICY.replace('models:\n  "*": {targets: ["openai/*"]}\n', MODELS) + BUDGETS
    async with running(short_directory, policy=policy, providers=PROVIDERS) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", autouse=True, loop_scope="module")
async def checked(checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


# --- By any path ------------------------------------------------------------------------------------------------------

_ASKED: Any = [{"role": "user", "content": "Say something."}]
_CONTENTS: Any = {"contents": [{"role": "user", "parts": [{"text": "Say something."}]}]}

# Each path that is served and leads to a provider, with what it needs.
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "gpt-4o", "messages": _ASKED},
    "/v1/responses": {"model": "gpt-4o", "input": "Say something."},
    "/v1/completions": {"model": "gpt-4o", "prompt": "Say something."},
    "/v1/embeddings": {"model": "gpt-4o", "input": "Say something."},
    "/v1/messages": {"model": "asked-to-think", "messages": _ASKED, "max_tokens": 100},
    "/v1/messages/count_tokens": {"model": "asked-to-think", "messages": _ASKED},
    "/v1/models/{model}:generateContent": _CONTENTS,
    "/v1/models/{model}:streamGenerateContent": _CONTENTS,
    "/v1/models/{model}:countTokens": _CONTENTS,
    "/v1beta/models/{model}:generateContent": _CONTENTS,
    "/v1beta/models/{model}:streamGenerateContent": _CONTENTS,
    "/v1beta/models/{model}:streamGenerateContent?alt=sse": _CONTENTS,
    "/v1beta/models/{model}:countTokens": _CONTENTS,
}
STREAMS = ("/v1/chat/completions", "/v1/responses", "/v1/completions", "/v1/messages")
LISTS = ("/v1/models", "/v1beta/models", "/v1/models/{model}", "/v1beta/models/{model}")

# What providers have, or once had, and other spellings of what is served.
ELSEWHERE = """
/ /v1 /v1/ /v1beta /v1/chat /v1/chat/completions/ /v1/chat/completions/abc /V1/chat/completions /v2/chat/completions
/chat/completions /v1/engines/gpt-4o/completions /v1/edits /v1/moderations /v1/images/generations /v1/images/edits
/v1/audio/speech /v1/audio/transcriptions /v1/audio/translations /v1/files /v1/uploads /v1/batches
/v1/fine_tuning/jobs /v1/assistants /v1/threads /v1/threads/runs /v1/vector_stores /v1/realtime /v1/realtime/sessions
/v1/videos /v1/responses/ /v1/responses/resp_1 /v1/responses/resp_1/cancel /v1/responses/compact
/v1/responses/input_tokens /v1/conversations /v1/containers /v1/evals /v1/organization/costs /v1/embeddings/
/v1/completions/1 /v1/rerank /v1/complete /v1/messages/ /v1/messages/batches /v1/messages/batches/1
/v1/messages/count_tokens/ /v1/skills /v1beta/models/gemini:embedContent /v1beta/models/gemini:batchEmbedContents
/v1beta/models/gemini:predict /v1beta/models/gemini:batchGenerateContent /v1beta/models/gemini:asyncBatchEmbedContent
/v1beta/models/gemini:generateText /v1beta/models/gemini:predictLongRunning /v1beta/models/gemini:generateContent/
/v1beta/models/gemini:GenerateContent /v1beta/tunedModels/gemini:generateContent /v1beta/cachedContents /v1beta/files
/upload/v1beta/files /v1beta/batches /v1beta/interactions /v1beta/openai/chat/completions
/v1alpha/models/gemini:generateContent /v1beta2/models
/v1beta1/projects/p/locations/global/publishers/google/models/gemini:generateContent /v1beta1/models/gemini:rawPredict
/v1/projects/p/locations/global/publishers/anthropic/models/thinking:rawPredict /api/v1/chat/completions
/openai/deployments/gpt-4o/chat/completions /openai/v1/chat/completions /openai/v1/responses /tollgate /metrics /stats
"""


def named(path: str) -> str:
    return path.replace("{model}", "gemini")


async def send(client: httpx.AsyncClient, method: str, path: str, body: object) -> httpx.Response:
    content = None if body is None else json.dumps(body)
    return await client.request(method, path, content=content, headers={"content-type": "application/json"})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def spent(rig: Rig) -> None:
    """One call that costs more than all there is: usage is a fact."""
    rig.answer(whole("Much.", prompt=10, completion=SPENT_TOKENS))
    assert (await rig.ask(SPENT, max_completion_tokens=20)).status == 200


def asked(rig: Rig) -> int:
    return sum(len(provider.received) for provider in rig.providers.values())


@pytest.mark.usefixtures("spent")
async def test_an_exhausted_budget_ends_every_way(rig: Rig) -> None:
    """Also counting, which is free, and goes to a provider all the same."""
    assert {path.partition("?")[0] for path in BODIES} | set(LISTS) == set(SERVED)
    before = asked(rig)
    async with rig.client(SPENT) as client:
        for path, fields in BODIES.items():
            streams = ({}, {"stream": True}) if path in STREAMS else ({},)
            for more in streams:
                answer = await send(client, "POST", named(path), {**fields, **more})
                assert answer.status_code == 429, (path, answer.text)
                assert f"Budget service/{SPENT}/day/tokens has too little left" in answer.text
                record = await rig.record(answer.headers["x-request-id"])
                assert (record.outcome, record.status, record.cost_nanousd) == (Outcome.REFUSED, 429, 0)
                assert record.budget_id == f"service/{SPENT}/day/tokens"
                assert record.stream == (bool(more) or ":stream" in path)
            for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS"):
                answer = await send(client, method, named(path), fields)
                assert (answer.status_code, answer.headers["allow"]) == (405, "POST"), (method, path)
        for path in LISTS:
            assert (await send(client, "GET", named(path), None)).status_code == 200
            assert (await send(client, "POST", named(path), _CONTENTS)).status_code == 405
    assert asked(rig) == before
    posted = (await rig.settled())[f"service/{SPENT}/day/tokens"].posted
    assert posted == 10 + SPENT_TOKENS


async def test_nothing_else_is_served(rig: Rig) -> None:
    before = asked(rig)
    body = {"model": "gpt-4o", "messages": _ASKED, **_CONTENTS}
    async with rig.client() as client:
        for path, method in itertools.product(ELSEWHERE.split(), ("POST", "GET")):
            answer = await send(client, method, path, body if method == "POST" else None)
            assert answer.status_code in (404, 405), (method, path, answer.status_code)
            assert answer.headers["content-type"] == "application/json"
            record = await rig.record(answer.headers["x-request-id"])
            assert (record.outcome, record.status) == (Outcome.REFUSED, answer.status_code)
    assert asked(rig) == before


@pytest.mark.usefixtures("spent")
async def test_other_spellings_come_to_the_same_budget(rig: Rig) -> None:
    before = asked(rig)
    async with rig.client(SPENT) as client:
        for path in ("//v1//chat/completions", "/v1/x/../chat/completions", "/v1/%63hat/completions"):
            answer = await client.post(path, json=BODIES["/v1/chat/completions"])
            assert answer.status_code in (404, 429), path
        answer = await client.post("/v1/chat%2Fcompletions", json=BODIES["/v1/chat/completions"])
        assert answer.status_code == 400
    assert asked(rig) == before


# --- By thoughts that nobody sees -------------------------------------------------------------------------------------

FITS, TOO_MUCH = 2_500, 5_000  # caps, under LIMIT_TOKENS and over it
EFFORTS = ("by itself", "asked to", "told not to")


@dataclass(frozen=True)
class Case:
    """One stream: of a caller's dialect, for a model."""

    dialect: str
    model: str
    effort: str
    cap: int | None

    @property
    def email(self) -> str:
        name = f"thinker-{self.dialect}-{self.model}-{self.effort}-{self.cap}"
        return f"{name}@{DOMAIN}".replace(" ", "-").lower()

    async def ask(self, rig: Rig) -> Told:
        path, fields = _WAYS[self.dialect](self, f"From {self.email}: think.")
        return await rig.ask(self.email, path=path, **{name: value for name, value in fields.items() if value})


def _chat(case: Case, prompt: str) -> tuple[str, dict[str, Any]]:
    effort = {"asked to": "high", "told not to": "none"}.get(case.effort)
    fields = {"messages": [{"role": "user", "content": prompt}], "max_completion_tokens": case.cap}
    return "/v1/chat/completions", {**fields, "model": case.model, "stream": True, "reasoning_effort": effort}


def _responses(case: Case, prompt: str) -> tuple[str, dict[str, Any]]:
    effort = {"asked to": {"effort": "high"}, "told not to": {"effort": "none"}}.get(case.effort)
    fields = {"input": prompt, "max_output_tokens": case.cap, "reasoning": effort}
    return "/v1/responses", {**fields, "model": case.model, "stream": True}


def _messages(case: Case, prompt: str) -> tuple[str, dict[str, Any]]:
    thinking = {"asked to": {"type": "enabled", "budget_tokens": 1_024}, "told not to": {"type": "disabled"}}
    fields = {"messages": [{"role": "user", "content": prompt}], "max_tokens": case.cap or 60_000}
    return "/v1/messages", {**fields, "model": case.model, "stream": True, "thinking": thinking.get(case.effort)}


def _generate(case: Case, prompt: str) -> tuple[str, dict[str, Any]]:
    budget = {"asked to": {"thinkingBudget": 1_024}, "told not to": {"thinkingBudget": 0}}.get(case.effort)
    config = {"maxOutputTokens": case.cap, "thinkingConfig": budget}
    fields = {"contents": [{"role": "user", "parts": [{"text": prompt}]}]}
    given = {name: value for name, value in config.items() if value}
    return f"/v1beta/models/{case.model}:streamGenerateContent?alt=sse", {**fields, "generationConfig": given}


_WAYS = {"chat": _chat, "responses": _responses, "messages": _messages, "generate": _generate}


def thoughtful(provider: str) -> Any:
    """Thinks as long as it may, in silence, and says a word; told not to, it says it at once, or refuses."""

    def answer(request: Received) -> Script:
        thinks = _thinks(request)
        if thinks is None:
            return voices.failed(provider, 400, "This model cannot go without thinking.")
        completion = (cap_of(request) or 30_000) if thinks else 1
        turn = Turn("Well.", prompt=8, completion=completion, thought_tokens=completion - 1)
        return script(request, turn)

    return answer


def _thinks(request: Received) -> bool | None:
    """None: the model refuses to be told not to."""
    body = body_of(request)
    if "claude" in str(body.get("model")):
        kind = (body.get("thinking") or {}).get("type")
        return kind in ("enabled", "adaptive") or (body["model"] == "claude-sonnet-5" and kind != "disabled")
    if "contents" in body:
        told_not_to = body.get("generationConfig", {}).get("thinkingConfig", {}).get("thinkingBudget") == 0
        if told_not_to:
            return False if "flash" in request.target else None
        return True
    effort = body.get("reasoning_effort") or (body.get("reasoning") or {}).get("effort")
    return None if effort == "none" else True


@pytest.mark.parametrize("model", ["o3", "asked-to-think", "thinking", "gemini", "flash"])
@pytest.mark.parametrize("dialect", _WAYS)
async def test_thoughts_end_at_the_limit(rig: Rig, dialect: str, model: str) -> None:
    """Refused, or sent with a bound that the hold covers."""
    for provider in PROVIDERS:
        rig.answer(thoughtful(provider), provider)
    cases = [Case(dialect, model, *rest) for rest in itertools.product(EFFORTS, (None, FITS, TOO_MUCH))]
    told = dict(zip(cases, await asyncio.gather(*(case.ask(rig) for case in cases)), strict=True))
    balances = await rig.settled()
    thought = 0
    for case, one in told.items():
        assert one.status in (200, 400, 429), (case, one.body)
        posted = balances[f"service/{case.email}/day/tokens"].posted if one.status == 200 else 0
        assert posted <= LIMIT_TOKENS + LEASE_TOKENS, case
        sent = [request for provider in PROVIDERS for request in _sent(rig, provider, case)]
        if one.status == 429:
            assert not sent
        for request in sent:
            if _thinks(request):
                assert (cap_of(request) or TOO_MUCH) <= FITS, case
                assert posted > FITS
                thought += 1
    assert thought >= (1 if model == "asked-to-think" else 2)  # so many were let through, to think


def _sent(rig: Rig, provider: str, case: Case) -> list[Received]:
    return [request for request in rig.providers[provider].received if f"From {case.email}:".encode() in request.body]
