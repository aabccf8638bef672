"""Google's own client, wherever its model is: the Gemini API, Vertex AI, Anthropic, OpenAI."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from google import genai
from google.genai import errors, types
from pydantic import BaseModel

from extproc.local.provider import Script
from tests.checker import Checker
from tests.rig import POLICY, SERVICE, Rig, running
from tests.turns import JSON, Call, Turn, last_sent, replying

pytestmark = pytest.mark.asyncio(loop_scope="module")

TARGETS = {
    "gemini": "gemini-2.5-flash",
    "vertex": "gemini-3-flash-preview",
    "anthropic": "claude-sonnet-4-5",
    "openai": "gpt-5",
}
NATIVE = ("gemini", "vertex")
MODELS = f"""\
models:
  model: {{targets: [{", ".join(f"{provider}/{model}" for provider, model in TARGETS.items())}]}}
"""

TEXT = "It is sunny in Graz and raining in Linz."
TURN = Turn(TEXT)
ASKED = "How is the weather in Graz and in Linz?"

anywhere = pytest.mark.parametrize("provider", TARGETS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    policy = POLICY.replace('models:\n  "*": {targets: ["openai/*"]}\n', MODELS) + "  []\n"
    async with running(short_directory, policy=policy, providers=tuple(TARGETS)) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", autouse=True, loop_scope="module")
async def checked(checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


def settings(rig: Rig, provider: str | None = None, version: str | None = None) -> dict[str, Any]:
    headers = {} if provider is None else {"x-llm-provider": provider}
    options = types.HttpOptions(base_url=rig.url, headers=headers, api_version=version)
    return {"api_key": rig.token(SERVICE), "http_options": options}


@asynccontextmanager
async def client(rig: Rig, provider: str | None = None, version: str | None = None) -> AsyncIterator[Any]:
    async with genai.Client(**settings(rig, provider, version)).aio as caller:
        yield caller


def asked(rig: Rig, provider: str) -> dict[str, Any]:
    """What the provider was sent last, with its own key and for its own model."""
    return last_sent(rig, provider, TARGETS[provider])


# --- generateContent --------------------------------------------------------------------------------------------------

PATHS = {
    "gemini": "/v1beta/models/gemini-2.5-flash",
    "vertex": "/v1/projects/p/locations/global/publishers/x/models/gemini-3-flash-preview",
}


@anywhere
@pytest.mark.parametrize("version", [None, "v1beta"])
async def test_generate(rig: Rig, provider: str, version: str | None) -> None:
    """The client's newer versions ask for v1 by themselves."""
    rig.answer(replying(TURN), provider)
    async with client(rig, provider, version) as caller:
        whole = await caller.models.generate_content(model="model", contents=ASKED)
        asked(rig, provider)
        stream = await caller.models.generate_content_stream(model="model", contents=ASKED)
        chunks = [chunk async for chunk in stream]
    if provider in NATIVE:
        first, second = (request.target for request in rig.providers[provider].received[-2:])
        assert first == f"{PATHS[provider]}:generateContent"
        assert second == f"{PATHS[provider]}:streamGenerateContent?alt=sse"
    assert (whole.text, whole.candidates[0].finish_reason) == (TEXT, types.FinishReason.STOP)
    assert "".join(chunk.text or "" for chunk in chunks) == TEXT
    assert chunks[-1].candidates[0].finish_reason == types.FinishReason.STOP
    for usage in (whole.usage_metadata, chunks[-1].usage_metadata):
        assert (usage.prompt_token_count, usage.candidates_token_count) == (TURN.prompt, TURN.completion)


@anywhere
async def test_generate_by_the_synchronous_client(rig: Rig, provider: str) -> None:
    """In a thread: the provider is in this one."""
    rig.answer(replying(TURN), provider)

    def run() -> tuple[str | None, str]:
        with genai.Client(**settings(rig, provider)) as caller:
            whole = caller.models.generate_content(model="model", contents=ASKED)
            stream = caller.models.generate_content_stream(model="model", contents=ASKED)
            return whole.text, "".join(chunk.text or "" for chunk in stream)

    assert await asyncio.to_thread(run) == (TEXT, TEXT)


@anywhere
async def test_a_stream_as_one_array(rig: Rig, provider: str) -> None:
    """What no client asks for, and Google sends where no events are wanted."""
    if provider in NATIVE:
        events = replying(TURN)
        rig.answer(lambda request: as_array(events(request)), provider)
    else:
        rig.answer(replying(TURN), provider)
    contents = [{"role": "user", "parts": [{"text": ASKED}]}]
    path = "/v1beta/models/model:streamGenerateContent"
    told = await rig.ask(path=path, headers={"x-llm-provider": provider}, contents=contents)
    assert (told.status, told.broken) == (200, None)
    assert told.headers["content-type"].startswith("application/json")
    said = [part["text"] for one in json.loads(told.body) for part in one["candidates"][0]["content"].get("parts", [])]
    assert "".join(said) == TEXT
    record = await rig.record(told.request_id)
    assert (record.stream, record.prompt_tokens, record.completion_tokens) == (True, TURN.prompt, TURN.completion)


def as_array(script: Script) -> Script:
    elements = [chunk.removeprefix(b"data: ").strip() for chunk in script.chunks]
    return Script(headers=JSON, chunks=[b"[" + elements[0], *(b",\r\n" + one for one in elements[1:]), b"]"])


@anywhere
async def test_a_chat(rig: Rig, provider: str) -> None:
    async with client(rig, provider) as caller:
        chat = caller.chats.create(model="model", config={"system_instruction": "Be brief."})
        rig.answer(replying(Turn("Hello there.")), provider)
        assert (await chat.send_message("Hi.")).text == "Hello there."
        rig.answer(replying(TURN), provider)
        stream = await chat.send_message_stream(ASKED)
        assert "".join([chunk.text or "" async for chunk in stream]) == TEXT
        await chat.send_message("And tomorrow?")
    said = json.dumps(asked(rig, provider))
    places = [said.index(text) for text in ("Hi.", "Hello there.", ASKED, "And tomorrow?")]
    assert places == sorted(places)
    assert "raining" in said
    assert "Be brief." in said


class Weather(BaseModel):
    city: str
    sunny: bool


@anywhere
async def test_an_answer_of_a_schema(rig: Rig, provider: str) -> None:
    rig.answer(replying(Turn('{"city": "Graz", "sunny": true}')), provider)
    config = {"response_mime_type": "application/json", "response_schema": Weather}
    async with client(rig, provider) as caller:
        answer = await caller.models.generate_content(model="model", contents=ASKED, config=config)
    assert answer.parsed == Weather(city="Graz", sunny=True)
    assert '"sunny"' in json.dumps(asked(rig, provider))


CALLS = (Call("call_1", "weather", {"city": "Graz"}), Call("call_2", "weather", {"city": "Linz"}))
SIGNATURE = "c2lnbmVkLWJ5LWl0cy1tYWtlcg=="
THOUGHT = Turn(calls=CALLS, thoughts="Two cities.", signature=SIGNATURE, completion=25, thought_tokens=5)
FUNCTION: Any = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "OBJECT", "properties": {"city": {"type": "STRING"}}, "required": ["city"]},
}
CONFIG: Any = {
    "tools": [{"function_declarations": [FUNCTION]}],
    "automatic_function_calling": {"disable": True},
    "thinking_config": {"thinking_budget": 2000, "include_thoughts": True},
    "max_output_tokens": 5000,
}


@anywhere
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_thoughts_and_functions_over_two_turns(rig: Rig, provider: str, stream: bool) -> None:
    """What proves the thoughts goes back to their maker unchanged, and to nobody else."""
    rig.answer(replying(THOUGHT), provider)
    question = types.Content(role="user", parts=[types.Part(text=ASKED)])
    async with client(rig, provider) as caller:
        options: Any = {"model": "model", "config": CONFIG}
        if stream:
            chunks = [one async for one in await caller.models.generate_content_stream(contents=[question], **options)]
            contents = [chunk.candidates[0].content for chunk in chunks if chunk.candidates[0].content.parts]
            usage = chunks[-1].usage_metadata
        else:
            first = await caller.models.generate_content(contents=[question], **options)
            contents, usage = [first.candidates[0].content], first.usage_metadata
        parts = [part for content in contents for part in content.parts]
        calls = [part.function_call for part in parts if part.function_call]
        assert [(call.name, call.args) for call in calls] == [(call.name, call.arguments) for call in CALLS]
        thought = [part.text for part in parts if part.thought and part.text]
        assert thought == [THOUGHT.thoughts]
        assert (usage.candidates_token_count or 0) + (usage.thoughts_token_count or 0) == THOUGHT.completion
        rig.answer(replying(TURN), provider)
        results = [
            types.Part(function_response=types.FunctionResponse(id=call.id, name=call.name, response={"result": said}))
            for call, said in zip(calls, ("sunny", "raining"), strict=True)
        ]
        turns = [question, *contents, types.Content(role="user", parts=results)]
        second = await caller.models.generate_content(contents=turns, **options)
    assert second.text == TEXT
    body = asked(rig, provider)
    said = json.dumps(body)
    assert said.count('"sunny"') == said.count('"raining"') == 1
    if provider in NATIVE:
        signed = [part for content in body["contents"] for part in content["parts"] if "thoughtSignature" in part]
        assert [part["functionCall"]["name"] for part in signed] == ["weather"]
        assert signed[0]["thoughtSignature"] == SIGNATURE
    assert (SIGNATURE in said) == (provider != "openai")  # whose chat has none
    for other in TARGETS.keys() - {provider}:
        if provider in NATIVE and other in NATIVE:
            continue
        rig.answer(replying(TURN), other)
        async with client(rig, other) as caller:
            await caller.models.generate_content(contents=turns, **options)
        assert SIGNATURE not in json.dumps(asked(rig, other))


# --- The others -------------------------------------------------------------------------------------------------------


async def test_count_tokens(rig: Rig) -> None:
    """Free, and asked of the provider; only who speaks the dialect counts."""
    for provider in NATIVE:
        rig.answer(Script(headers=JSON, chunks=[b'{"totalTokens": 11}'], whole=True), provider)
        async with client(rig, provider) as caller:
            counted = await caller.models.count_tokens(model="model", contents=ASKED)
        assert counted.total_tokens == 11
        assert rig.providers[provider].received[-1].target == f"{PATHS[provider]}:countTokens"
    async with client(rig, "openai") as caller:
        with pytest.raises(errors.ClientError, match="do not offer this API") as raised:
            await caller.models.count_tokens(model="model", contents=ASKED)
    assert raised.value.code == 400


@pytest.mark.parametrize("version", [None, "v1beta"])
async def test_models(rig: Rig, version: str | None) -> None:
    async with client(rig, version=version) as caller:
        names = [model.name async for model in await caller.models.list()]
        one = await caller.models.get(model="model")
        with pytest.raises(errors.ClientError) as raised:
            await caller.models.get(model="gemini-9")
    assert names == ["models/model"]
    assert one.name == "models/model"
    assert (raised.value.code, raised.value.status) == (404, "NOT_FOUND")
