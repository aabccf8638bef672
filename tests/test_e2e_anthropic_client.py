"""Anthropic's own client, wherever its model is: at Anthropic, on Vertex AI, at OpenAI, at Google."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anthropic
import pytest
import pytest_asyncio

from extproc.local.provider import Received, Script
from tests.checker import Checker
from tests.rig import POLICY, SERVICE, Rig, running
from tests.turns import JSON, Call, Turn, last_sent, replying

pytestmark = pytest.mark.asyncio(loop_scope="module")

TARGETS = {
    "anthropic": "claude-sonnet-4-5",
    "vertex-anthropic": "claude-sonnet-4-5@20250929",
    "openai": "gpt-5",
    "gemini": "gemini-2.5-flash",
}
NATIVE = ("anthropic", "vertex-anthropic")
MODELS = f"""\
models:
  model: {{targets: [{", ".join(f"{provider}/{model}" for provider, model in TARGETS.items())}]}}
  text-embedding-3-small: {{targets: [openai/text-embedding-3-small]}}
"""

TEXT = "It is sunny in Graz and raining in Linz."
TURN = Turn(TEXT)
ASKED: Any = [{"role": "user", "content": "How is the weather in Graz and in Linz?"}]
OPTIONS: Any = {"model": "model", "max_tokens": 4000, "messages": ASKED}

anywhere = pytest.mark.parametrize("provider", TARGETS)
native = pytest.mark.parametrize("provider", NATIVE)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    policy = POLICY.replace('models:\n  "*": {targets: ["openai/*"]}\n', MODELS) + "  []\n"
    async with running(short_directory, policy=policy, providers=tuple(TARGETS)) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", autouse=True, loop_scope="module")
async def checked(checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


def settings(rig: Rig, provider: str | None = None, **how: Any) -> dict[str, Any]:
    headers = {} if provider is None else {"x-llm-provider": provider}
    credential = how or {"auth_token": rig.token(SERVICE)}
    return {"base_url": rig.url, "max_retries": 0, "default_headers": headers, **credential}


def client(rig: Rig, provider: str | None = None, **how: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(**settings(rig, provider, **how))


def asked(rig: Rig, provider: str) -> dict[str, Any]:
    """What the provider was sent last, with its own key and for its own model."""
    return last_sent(rig, provider, TARGETS[provider])


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


# --- Messages ---------------------------------------------------------------------------------------------------------

VERTEX = "/v1/projects/p/locations/global/publishers/x/models/claude-sonnet-4-5@20250929"
PATHS = {
    "anthropic": ("/v1/messages", "/v1/messages"),
    "vertex-anthropic": (f"{VERTEX}:rawPredict", f"{VERTEX}:streamRawPredict"),
    "openai": ("/v1/chat/completions", "/v1/chat/completions"),
    "gemini": (
        "/v1beta/models/gemini-2.5-flash:generateContent",
        "/v1beta/models/gemini-2.5-flash:streamGenerateContent?alt=sse",
    ),
}


@anywhere
async def test_messages(rig: Rig, provider: str) -> None:
    rig.answer(replying(TURN), provider)
    async with client(rig, provider) as caller:
        whole = await caller.messages.create(**OPTIONS)
        asked(rig, provider)
        events = [event async for event in await caller.messages.create(**OPTIONS, stream=True)]
        async with caller.messages.stream(**OPTIONS) as stream:
            texts = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
    assert [request.target for request in rig.providers[provider].received[-3:-1]] == list(PATHS[provider])
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")
    assert "".join(texts) == TEXT
    for message in (whole, final):
        assert (text_of(message), message.stop_reason) == (TEXT, "end_turn")
        assert (message.usage.input_tokens, message.usage.output_tokens) == (TURN.prompt, TURN.completion)


@anywhere
async def test_messages_by_the_synchronous_client(rig: Rig, provider: str) -> None:
    """In a thread: the provider is in this one. The token is sent as a key is."""
    rig.answer(replying(TURN), provider)

    def run() -> tuple[str, str]:
        with anthropic.Anthropic(**settings(rig, provider, api_key=rig.token())) as caller:
            whole = caller.messages.create(**OPTIONS)
            with caller.messages.stream(**OPTIONS) as stream:
                return text_of(whole), "".join(stream.text_stream)

    assert await asyncio.to_thread(run) == (TEXT, TEXT)
    asked(rig, provider)


async def test_of_two_credentials_the_bearer_counts(rig: Rig) -> None:
    rig.answer(replying(TURN), "anthropic")
    both = {"x-api-key": "sk-ant-of-the-callers-own"}
    async with client(rig, "anthropic") as caller:
        assert text_of(await caller.messages.create(**OPTIONS, extra_headers=both)) == TEXT
    async with client(rig, "anthropic", auth_token="not a token") as caller:
        with pytest.raises(anthropic.AuthenticationError):
            await caller.messages.create(**OPTIONS, extra_headers={"x-api-key": rig.token()})
    assert "of-the-callers-own" not in str(rig.providers["anthropic"].received[-1])


async def test_the_beta_that_a_caller_wants(rig: Rig) -> None:
    """Goes to Anthropic as it came, header and all; nobody else would know it."""
    beta = "context-1m-2025-08-07"
    for provider in ("anthropic", "openai"):
        rig.answer(replying(TURN), provider)
        async with client(rig, provider) as caller:
            message = await caller.beta.messages.create(**OPTIONS, betas=[beta])
        assert message.stop_reason == "end_turn"
        assert rig.providers[provider].received[-1].header("anthropic-beta") == (
            beta if provider == "anthropic" else None
        )


SCHEMA: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: Any = {"name": "weather", "description": "The weather of a city.", "input_schema": SCHEMA}
CALLS = (Call("call_1", "weather", {"city": "Graz"}), Call("call_2", "weather", {"city": "Linz"}))
SIGNATURE = "c2lnbmVkLWJ5LWl0cy1tYWtlcg=="
THINKING: Any = {"thinking": {"type": "enabled", "budget_tokens": 2000}, "tools": [TOOL]}
THOUGHT = Turn(calls=CALLS, thoughts="Two cities.", signature=SIGNATURE, thought_tokens=5)


def results(message: Any) -> list[Any]:
    """The first as a text, the second as blocks, and a failure."""
    first, second = (block.id for block in message.content if block.type == "tool_use")
    return [
        {"type": "tool_result", "tool_use_id": first, "content": "sunny"},
        {
            "type": "tool_result",
            "tool_use_id": second,
            "content": [{"type": "text", "text": "no such city"}],
            "is_error": True,
        },
    ]


@anywhere
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_thoughts_and_parallel_calls_over_two_turns(rig: Rig, provider: str, stream: bool) -> None:
    """What proves the thoughts goes back to their maker unchanged, and to nobody else."""
    rig.answer(replying(THOUGHT), provider)
    async with client(rig, provider) as caller:
        if stream:
            async with caller.messages.stream(**OPTIONS, **THINKING) as events:
                first: Any = await events.get_final_message()
        else:
            first = await caller.messages.create(**OPTIONS, **THINKING)
        assert first.stop_reason == "tool_use"
        calls = [(block.id, block.name, block.input) for block in first.content if block.type == "tool_use"]
        assert calls == [(call.id, call.name, call.arguments) for call in CALLS]
        thought = [block.thinking for block in first.content if block.type == "thinking"]
        assert "".join(thought) == THOUGHT.thoughts
        rig.answer(replying(TURN), provider)
        turns = [*ASKED, {"role": "assistant", "content": first.content}, {"role": "user", "content": results(first)}]
        second = await caller.messages.create(**{**OPTIONS, "messages": turns}, **THINKING)
    assert text_of(second) == TEXT
    body = asked(rig, provider)
    assert results_in(body) == ["sunny", "no such city"]
    if provider in NATIVE:
        block = {"type": "thinking", "thinking": THOUGHT.thoughts, "signature": SIGNATURE}
        assert body["messages"][1]["content"][0] == block
    assert (SIGNATURE in json.dumps(body)) == (provider != "openai")  # whose chat has none
    for other in TARGETS.keys() - {provider}:
        if provider in NATIVE and other in NATIVE:
            continue
        rig.answer(replying(TURN), other)
        async with client(rig, other) as caller:
            await caller.messages.create(**{**OPTIONS, "messages": turns}, **THINKING)
        assert SIGNATURE not in json.dumps(asked(rig, other))


def results_in(body: dict[str, Any]) -> list[str]:
    if "contents" in body:
        parts = [part["functionResponse"]["response"] for part in body["contents"][-1]["parts"]]
        return [text for response in parts for text in response.values()]
    blocks = body["messages"][-1]["content"]
    if isinstance(blocks, str):
        return [message["content"] for message in body["messages"] if message["role"] == "tool"]
    contents = [block["content"] for block in blocks]
    return [content if isinstance(content, str) else content[0]["text"] for content in contents]


async def test_a_prompt_to_be_cached(rig: Rig) -> None:
    """Asked of who can; read and written tokens are in the caller's figures and in the row."""
    cached: Any = [{"type": "text", "text": "A long text. " * 50, "cache_control": {"type": "ephemeral"}}]
    figures = {"cache_creation_input_tokens": 300, "cache_read_input_tokens": 1000}

    def answer(request: Received) -> Script:
        script = replying(TURN)(request)
        said = json.loads(script.chunks[0])
        said["usage"] |= figures
        return Script(headers=JSON, chunks=[json.dumps(said).encode()], whole=True)

    for provider in NATIVE:
        rig.answer(answer, provider)
        async with client(rig, provider) as caller:
            raw = await caller.messages.with_raw_response.create(**OPTIONS, system=cached)
        usage = (await raw.parse()).usage
        assert usage.cache_creation_input_tokens == 300
        assert usage.cache_read_input_tokens == 1000
        assert asked(rig, provider)["system"] == cached
        record = await rig.record(raw.headers["x-request-id"])
        assert (record.prompt_tokens, record.cached_prompt_tokens) == (TURN.prompt + 1300, 1000)
    for provider in ("openai", "gemini"):  # which cache as they like
        rig.answer(replying(TURN), provider)
        async with client(rig, provider) as caller:
            await caller.messages.create(**OPTIONS, system=cached)
        assert "ephemeral" not in json.dumps(asked(rig, provider))


# --- The others -------------------------------------------------------------------------------------------------------


async def test_count_tokens(rig: Rig) -> None:
    """Free, and asked of the provider; only who speaks the dialect counts."""
    for provider in NATIVE:
        rig.answer(Script(headers=JSON, chunks=[b'{"input_tokens": 14}'], whole=True), provider)
        async with client(rig, provider) as caller:
            raw = await caller.messages.with_raw_response.count_tokens(model="model", messages=ASKED)
        assert (await raw.parse()).input_tokens == 14
        record = await rig.record(raw.headers["x-request-id"])
        assert (record.prompt_tokens, record.completion_tokens, record.cost_nanousd) == (0, 0, 0)
        assert rig.providers[provider].received[-1].target.endswith(("/count_tokens", "/count-tokens:rawPredict"))
    async with client(rig, "openai") as caller:
        with pytest.raises(anthropic.BadRequestError, match="do not offer this API"):
            await caller.messages.count_tokens(model="model", messages=ASKED)


async def test_models(rig: Rig) -> None:
    async with client(rig) as caller:
        page = await caller.models.list()
        names = [model.id async for model in page]
        one = await caller.models.retrieve("model")
        with pytest.raises(anthropic.NotFoundError):
            await caller.models.retrieve("claude-9")
    assert names == ["model"]  # what only makes vectors is not for this API
    assert (one.id, one.type) == ("model", "model")
