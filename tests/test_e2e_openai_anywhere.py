"""OpenAI's own client, wherever its model is: at OpenAI, at Groq in the same dialect, at Anthropic, at Google."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from pydantic import BaseModel

from extproc.local.provider import Received, Script
from tests.checker import Checker
from tests.rig import POLICY, SERVICE, Rig, running
from tests.turns import JSON, Call, Turn, body_of, last_sent, replying

pytestmark = pytest.mark.asyncio(loop_scope="module")

TARGETS = {
    "openai": "gpt-4o",
    "groq": "llama-3.3-70b-versatile",
    "anthropic": "claude-sonnet-4-5",
    "gemini": "gemini-2.5-flash",
}
MODELS = f"""\
models:
  model: {{targets: [{", ".join(f"{provider}/{model}" for provider, model in TARGETS.items())}]}}
  embedder: {{targets: [openai/text-embedding-3-small]}}
  completer: {{targets: [openai/gpt-3.5-turbo-instruct]}}
"""

TEXT = "It is sunny in Graz and raining in Linz."
TURN = Turn(TEXT)
ASKED: Any = [{"role": "user", "content": "How is the weather in Graz and in Linz?"}]

anywhere = pytest.mark.parametrize("provider", TARGETS)
translated = pytest.mark.parametrize("provider", ["anthropic", "gemini"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    policy = POLICY.replace('models:\n  "*": {targets: ["openai/*"]}\n', MODELS) + "  []\n"
    async with running(short_directory, policy=policy, providers=tuple(TARGETS)) as rig:
        yield rig


@pytest_asyncio.fixture(scope="module", autouse=True, loop_scope="module")
async def checked(checker: Checker) -> AsyncIterator[None]:
    yield
    await checker.check()


def client(rig: Rig, provider: str | None = None) -> openai.AsyncOpenAI:
    headers = {} if provider is None else {"x-llm-provider": provider}
    return openai.AsyncOpenAI(
        base_url=f"{rig.url}/v1", api_key=rig.token(SERVICE), max_retries=0, default_headers=headers
    )


def asked(rig: Rig, provider: str) -> dict[str, Any]:
    """What the provider was sent last, with its own key and for its own model."""
    return last_sent(rig, provider, TARGETS[provider])


# --- Chat -------------------------------------------------------------------------------------------------------------

PATHS = {
    "openai": "/v1/chat/completions",
    "groq": "/openai/v1/chat/completions",
    "anthropic": "/v1/messages",
    "gemini": "/v1beta/models/gemini-2.5-flash:generateContent",
}


@anywhere
async def test_chat(rig: Rig, provider: str) -> None:
    rig.answer(replying(TURN), provider)
    async with client(rig, provider) as caller:
        whole = await caller.chat.completions.create(model="model", messages=ASKED)
        assert rig.providers[provider].received[-1].target == PATHS[provider]
        asked(rig, provider)
        stream = await caller.chat.completions.create(
            model="model", messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        async with caller.chat.completions.stream(model="model", messages=ASKED) as events:
            deltas = [event.delta async for event in events if event.type == "content.delta"]
            final = await events.get_final_completion()
    (choice,) = whole.choices
    assert (choice.message.content, choice.finish_reason) == (TEXT, "stop")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == TEXT
    assert chunks[-1].usage is not None
    for usage in (whole.usage, chunks[-1].usage):
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (TURN.prompt, TURN.completion)
    assert "".join(deltas) == final.choices[0].message.content == TEXT


@anywhere
async def test_chat_by_the_synchronous_client(rig: Rig, provider: str) -> None:
    """In a thread: the provider is in this one."""
    rig.answer(replying(TURN), provider)

    def run() -> tuple[str | None, str]:
        settings: Any = {"base_url": f"{rig.url}/v1", "api_key": rig.token(), "max_retries": 0}
        with openai.OpenAI(**settings, default_headers={"x-llm-provider": provider}) as caller:
            whole = caller.chat.completions.create(model="model", messages=ASKED)
            chunks = caller.chat.completions.create(model="model", messages=ASKED, stream=True)
            return whole.choices[0].message.content, "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    assert await asyncio.to_thread(run) == (TEXT, TEXT)


async def test_a_policy_redirects_a_model_at_once(rig: Rig) -> None:
    for provider in TARGETS:
        rig.answer(replying(Turn(f"By {provider}.")), provider)
    policy = rig.policy_path.read_text()
    async with client(rig) as caller:
        first = await caller.chat.completions.create(model="model", messages=ASKED)
        order = ", ".join(f"{name}/{model}" for name, model in TARGETS.items())
        await rig.set_policy(policy.replace(f"[{order}]", "[anthropic/claude-sonnet-4-5]"))
        second = await caller.chat.completions.create(model="model", messages=ASKED)
        await rig.set_policy(policy)
    assert [answer.choices[0].message.content for answer in (first, second)] == ["By openai.", "By anthropic."]


class Weather(BaseModel):
    city: str
    sunny: bool


@anywhere
async def test_parse(rig: Rig, provider: str) -> None:
    rig.answer(replying(Turn('{"city": "Graz", "sunny": true}')), provider)
    async with client(rig, provider) as caller:
        answer = await caller.chat.completions.parse(model="model", messages=ASKED, response_format=Weather)
    assert answer.choices[0].message.parsed == Weather(city="Graz", sunny=True)
    assert '"sunny"' in json.dumps(asked(rig, provider))


def _tool(*required: str) -> Any:
    properties = {name: {"type": "string"} for name in required}
    return {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": list(required),
            "additionalProperties": False,
        },
        "strict": True,
    }


TOOL: Any = {"type": "function", "function": _tool("city")}
CALLS = (Call("call_1", "weather", {"city": "Graz"}), Call("call_2", "weather", {"city": "Linz"}))
RESULTS = {"call_1": "sunny", "call_2": "raining"}


@anywhere
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_parallel_calls_of_a_tool_over_two_turns(rig: Rig, provider: str, stream: bool) -> None:
    rig.answer(replying(Turn(calls=CALLS)), provider)
    async with client(rig, provider) as caller:
        if stream:
            async with caller.chat.completions.stream(model="model", messages=ASKED, tools=[TOOL]) as events:
                first: Any = await events.get_final_completion()
        else:
            first = await caller.chat.completions.create(model="model", messages=ASKED, tools=[TOOL])
        assert first.choices[0].finish_reason == "tool_calls"
        calls = first.choices[0].message.tool_calls
        assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
            (call.name, call.arguments) for call in CALLS
        ]
        assert [call.id for call in calls] == list(RESULTS)
        rig.answer(replying(TURN), provider)
        results = [{"role": "tool", "tool_call_id": call.id, "content": RESULTS[call.id]} for call in calls]
        turns: Any = [*ASKED, first.choices[0].message, *results]
        second = await caller.chat.completions.create(model="model", messages=turns, tools=[TOOL])
    assert second.choices[0].message.content == TEXT
    assert results_in(asked(rig, provider)) == RESULTS


def results_in(body: dict[str, Any]) -> dict[str, str]:
    """The tools' results that a provider was given, in whatever dialect, by their calls' ids."""
    found: dict[str, str] = {}
    for one in _objects(body):
        if one.get("role") == "tool":
            found[one["tool_call_id"]] = one["content"]
        elif one.get("type") == "tool_result":
            found[one["tool_use_id"]] = "".join(block["text"] for block in one["content"])
        elif one.get("type") == "function_call_output":
            found[one["call_id"]] = one["output"]
        elif "functionResponse" in one:
            found[one["functionResponse"]["id"]] = one["functionResponse"]["response"]["result"]
    return found


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _objects(inner)


PIXEL = base64.b64encode(b"\x89PNG of one pixel").decode()
PDF = base64.b64encode(b"%PDF-1.4 of one page").decode()
URL = "https://example.com/pixel.png"
MEDIA: Any = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "What are these?"},
            {"type": "image_url", "image_url": {"url": URL}},
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PIXEL}"}},
            {"type": "file", "file": {"filename": "page.pdf", "file_data": f"data:application/pdf;base64,{PDF}"}},
        ],
    }
]
MEDIA_SENT: dict[str, Any] = {
    "anthropic": [
        {"type": "text", "text": "What are these?"},
        {"type": "image", "source": {"type": "url", "url": URL}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXEL}},
        {
            "type": "document",
            "source": {"type": "base64", "media_type": "application/pdf", "data": PDF},
            "title": "page.pdf",
        },
    ],
    "gemini": [
        {"text": "What are these?"},
        {"fileData": {"mimeType": "image/png", "fileUri": URL}},
        {"inlineData": {"mimeType": "image/png", "data": PIXEL}},
        {"inlineData": {"mimeType": "application/pdf", "data": PDF}},
    ],
}


@anywhere
async def test_images_and_a_pdf(rig: Rig, provider: str) -> None:
    rig.answer(replying(TURN), provider)
    async with client(rig, provider) as caller:
        await caller.chat.completions.create(model="model", messages=MEDIA)
    body = asked(rig, provider)
    match provider:
        case "anthropic":
            assert body["messages"][0]["content"] == MEDIA_SENT[provider]
        case "gemini":
            assert body["contents"][0]["parts"] == MEDIA_SENT[provider]
        case _:
            assert body["messages"] == MEDIA


THOUGHT = Turn(TEXT, thoughts="Two cities.", signature="c2lnbmVkLWJ5LWl0cy1tYWtlcg==", thought_tokens=5)


@anywhere
async def test_thoughts_over_two_turns(rig: Rig, provider: str) -> None:
    """Shown where the provider shows them. What proves them goes back to their maker, and to nobody else."""
    rig.answer(replying(THOUGHT), provider)
    options: Any = {"model": "model", "messages": ASKED, "max_completion_tokens": 4000}
    if provider in MEDIA_SENT:
        options["reasoning_effort"] = "low"
    async with client(rig, provider) as caller:
        whole: Any = await caller.chat.completions.create(**options)
        async with caller.chat.completions.stream(**options) as events:
            streamed: Any = await events.get_final_completion()
        for message in (whole.choices[0].message, streamed.choices[0].message):
            assert (message.content, message.reasoning_content) == (TEXT, THOUGHT.thoughts)
        said = whole.choices[0].message.model_dump(exclude_none=True)
        options["messages"] = [*ASKED, said, {"role": "user", "content": "And in Wels?"}]
        await caller.chat.completions.create(**options)
    signed = THOUGHT.signature in json.dumps(asked(rig, provider))
    assert signed == (provider in MEDIA_SENT)
    for other in TARGETS.keys() - {provider}:
        rig.answer(replying(TURN), other)
        async with client(rig, other) as caller:
            await caller.chat.completions.create(model="model", messages=options["messages"])
        # Providers of the caller's own dialect get the request as it is.
        if other in MEDIA_SENT:
            assert THOUGHT.signature not in json.dumps(asked(rig, other))


# --- Responses --------------------------------------------------------------------------------------------------------


@anywhere
async def test_responses(rig: Rig, provider: str) -> None:
    rig.answer(replying(TURN), provider)
    async with client(rig, provider) as caller:
        whole = await caller.responses.create(model="model", input="How is the weather?", instructions="Be brief.")
        asked(rig, provider)
        if provider in ("openai", "groq"):
            assert rig.providers[provider].received[-1].target.endswith("/v1/responses")
        stream = await caller.responses.create(model="model", input="How is the weather?", stream=True)
        kinds = [(event.type, getattr(event, "delta", "")) async for event in stream]
        async with caller.responses.stream(model="model", input="How is the weather?") as events:
            deltas = [event.delta async for event in events if event.type == "response.output_text.delta"]
            final = await events.get_final_response()
    assert (whole.output_text, whole.status) == (TEXT, "completed")
    assert "".join(delta for kind, delta in kinds if kind == "response.output_text.delta") == TEXT
    assert (kinds[0][0], kinds[-1][0]) == ("response.created", "response.completed")
    assert "".join(deltas) == final.output_text == TEXT
    for usage in (whole.usage, final.usage):
        assert usage is not None
        assert (usage.input_tokens, usage.output_tokens) == (TURN.prompt, TURN.completion)


@anywhere
async def test_responses_parse(rig: Rig, provider: str) -> None:
    rig.answer(replying(Turn('{"city": "Graz", "sunny": true}')), provider)
    async with client(rig, provider) as caller:
        answer = await caller.responses.parse(model="model", input="How is Graz?", text_format=Weather)
    assert answer.output_parsed == Weather(city="Graz", sunny=True)
    assert '"sunny"' in json.dumps(asked(rig, provider))


@anywhere
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_responses_with_tools_and_earlier_turns(rig: Rig, provider: str, stream: bool) -> None:
    """What was said before comes back as items, thoughts included."""
    rig.answer(replying(Turn(calls=CALLS, thoughts="Two.", signature=THOUGHT.signature, thought_tokens=5)), provider)
    tool: Any = {"type": "function", **_tool("city")}
    options: Any = {"model": "model", "tools": [tool], "store": False, "include": ["reasoning.encrypted_content"]}
    options |= {"reasoning": {"effort": "low"}, "max_output_tokens": 4000}
    async with client(rig, provider) as caller:
        if stream:
            async with caller.responses.stream(input=ASKED, **options) as events:
                first: Any = await events.get_final_response()
        else:
            first = await caller.responses.create(input=ASKED, **options)
        calls = [item for item in first.output if item.type == "function_call"]
        assert [(call.call_id, call.name, json.loads(call.arguments)) for call in calls] == [
            (call.id, call.name, call.arguments) for call in CALLS
        ]
        rig.answer(replying(TURN), provider)
        turns = [*ASKED, *(item.model_dump(exclude_none=True) for item in first.output)]
        turns += [
            {"type": "function_call_output", "call_id": call.call_id, "output": RESULTS[call.call_id]} for call in calls
        ]
        second = await caller.responses.create(input=turns, **options)
    assert second.output_text == TEXT
    body = asked(rig, provider)
    assert results_in(body) == RESULTS
    assert THOUGHT.signature in json.dumps(body)
    for other in {"anthropic", "gemini"} - {provider}:
        rig.answer(replying(TURN), other)
        async with client(rig, other) as caller:
            await caller.responses.create(input=turns, **options)
        assert THOUGHT.signature not in json.dumps(asked(rig, other))


# --- The others -------------------------------------------------------------------------------------------------------


def _json(said: dict[str, Any]) -> Script:
    return Script(headers=JSON, chunks=[json.dumps(said).encode()], whole=True)


async def test_embeddings(rig: Rig) -> None:
    def embed(request: Received) -> Script:
        vector: Any = [0.5, -0.25]
        if body_of(request)["encoding_format"] == "base64":
            vector = base64.b64encode(b"\x00\x00\x00\x3f\x00\x00\x80\xbe").decode()
        data = [{"object": "embedding", "index": 0, "embedding": vector}]
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        return _json({"object": "list", "data": data, "model": "text-embedding-3-small", "usage": usage})

    rig.answer(embed)
    async with client(rig) as caller:
        raw = await caller.embeddings.with_raw_response.create(model="embedder", input="a word")
        plain = await caller.embeddings.create(model="embedder", input=["a word"], encoding_format="float")
    for answer in (raw.parse(), plain):
        assert answer.data[0].embedding == [0.5, -0.25]
    assert body_of(rig.provider.received[-1])["model"] == "text-embedding-3-small"
    record = await rig.record(raw.headers["x-request-id"])
    assert (record.prompt_tokens, record.completion_tokens) == (3, 0)
    assert record.cost_nanousd > 0


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_completions(rig: Rig, stream: bool) -> None:
    same = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "gpt-3.5-turbo-instruct"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}

    def choices(text: str, finish: str | None) -> list[dict[str, Any]]:
        return [{"index": 0, "text": text, "finish_reason": finish, "logprobs": None}]

    said = [{**same, "choices": choices("Once", None)}, {**same, "choices": choices(" upon", "stop")}]
    said.append({**same, "choices": [], "usage": usage})
    events = [f"data: {json.dumps(one)}\n\n".encode() for one in said]
    whole = _json({**same, "choices": choices("Once upon", "stop"), "usage": usage})
    rig.answer(Script(chunks=[*events, b"data: [DONE]\n\n"]) if stream else whole)
    async with client(rig) as caller:
        answer: Any = await caller.completions.create(model="completer", prompt="Tell.", stream=stream)
        texts = [chunk.choices[0].text async for chunk in answer] if stream else [answer.choices[0].text]
    assert "".join(texts) == "Once upon"


@translated
async def test_what_another_provider_has_no_api_for(rig: Rig, provider: str) -> None:
    async with client(rig, provider) as caller:
        with pytest.raises(openai.BadRequestError, match="do not offer this API"):
            await caller.embeddings.create(model="model", input="a word")
        with pytest.raises(openai.BadRequestError, match="do not offer this API"):
            await caller.completions.create(model="model", prompt="Tell.")


async def test_models(rig: Rig) -> None:
    async with client(rig) as caller:
        names = [model.id async for model in caller.models.list()]
        one = await caller.models.retrieve("model")
        with pytest.raises(openai.NotFoundError):
            await caller.models.retrieve("gpt-9")
        with pytest.raises(openai.BadRequestError):  # it writes the slash as %2F: docs/failures.md
            await caller.models.retrieve("vendor/model")
    assert names == ["completer", "embedder", "model"]
    assert (one.id, one.owned_by) == ("model", "openai")
