"""OpenAI's own client against the gateway: recorded streams and answers, its helpers, and its exceptions."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai.types.chat import ChatCompletionToolParam
from pydantic import BaseModel

from extproc.local.provider import Script
from extproc.records import Outcome
from tests.recordings import SUBSET, Case, chat_cases
from tests.rig import DONE, SERVICE, Rig, delta, event, eventually, running, streamed, usage

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUDGETS = """\
  - {scope: service, id: "poor@test.iam.gserviceaccount.com", window: day, limit_tokens: 15}
  - {scope: service, id: "cut-*@test.iam.gserviceaccount.com", window: day, limit_tokens: 60}
"""
POOR = "poor@test.iam.gserviceaccount.com"

MESSAGES: Any = [{"role": "user", "content": "Say something."}]
JSON = (("content-type", "application/json"),)

RECORDED = {case.name: case for case in chat_cases(root=SUBSET)}
STREAMS = [
    "openai/chat-stream-gpt-3.5-turbo-0125-02",
    "openai/chat-stream-gpt-3.5-turbo-0125-n-1-01",
    "openai/chat-stream-gpt-3.5-turbo-0125-parallel-tool-calls-tool-call-01",
    "openai/chat-stream-gpt-3.5-turbo-0613-01",
    "openai/chat-stream-gpt-4o-2024-08-06-refusal-logprobs-01",
    "openai/chat-stream-gpt-5-2025-08-07-01",
    "openai/chat-stream-gpt-audio-1.5-01",
    "openrouter/chat-stream-claude-4.6-sonnet-20260217-01",
    "perplexity/chat-stream-sonar-02",
]
ANSWERS = [
    "openai/chat-json-gpt-3.5-turbo-0301-n-1-01",
    "openai/chat-json-gpt-4-0613-tool-call-01",
    "openai/chat-json-gpt-5-2025-08-07-parallel-tool-calls-tool-call-01",
]

both_clients = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig(short_directory: Path) -> AsyncIterator[Rig]:
    async with running(short_directory, budgets=BUDGETS) as rig:
        yield rig


def settings(rig: Rig, email: str = SERVICE, **options: Any) -> dict[str, Any]:
    return {"base_url": f"{rig.url}/v1", "api_key": rig.token(email), "max_retries": 0, **options}


def client(rig: Rig, email: str = SERVICE, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(**settings(rig, email, **options))


async def create(
    rig: Rig, asynchronous: bool, email: str = SERVICE, chunks: list[Any] | None = None, **request: Any
) -> Any:
    """`chat.completions.create` by either client; a stream's chunks go into `chunks`, also when it fails half-way.

    The synchronous client runs in a thread: the provider is in this one.
    """
    chunks = [] if chunks is None else chunks
    request = {"model": "gpt-4o", "messages": MESSAGES, **request}
    if asynchronous:
        async with openai.AsyncOpenAI(**settings(rig, email)) as a_client:
            answer = await a_client.chat.completions.create(**request)
            if not request.get("stream"):
                return answer
            async for chunk in answer:
                chunks.append(chunk)
            return chunks

    def run() -> Any:
        with openai.OpenAI(**settings(rig, email)) as a_client:
            answer = a_client.chat.completions.create(**request)
            if not request.get("stream"):
                return answer
            for chunk in answer:
                chunks.append(chunk)
            return chunks

    return await asyncio.to_thread(run)


def recorded(case: Case) -> Script:
    kind = "text/event-stream" if case.stream else "application/json"
    return Script(status=case.status, headers=(("content-type", kind),), chunks=case.random_chunks(1))


def recorded_events(case: Case) -> list[Any]:
    data = (line.removeprefix(b"data:").strip() for line in case.body.splitlines() if line.startswith(b"data:"))
    return [json.loads(event) for event in data if event != b"[DONE]"]


# What the client reads ------------------------------------------------------------------------------------------------


@both_clients
@pytest.mark.parametrize("wants_usage", [True, False], ids=["usage asked for", "usage not asked for"])
@pytest.mark.parametrize("name", STREAMS)
async def test_a_recorded_stream(rig: Rig, name: str, wants_usage: bool, asynchronous: bool) -> None:
    case = RECORDED[name]
    rig.answer(recorded(case))
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if wants_usage else {}
    n = 2 if "n>1" in case.features else 1
    chunks = await create(rig, asynchronous, model=case.model, stream=True, n=n, **options)
    events = recorded_events(case)
    if not wants_usage and "usage-only-final-chunk" in case.features:
        events = [event for event in events if event.get("choices") or not event.get("usage")]
    assert [chunk.to_dict() for chunk in chunks] == events
    if wants_usage and case.billed is not None:
        reported = [chunk.usage for chunk in chunks if chunk.usage][-1]
        assert (reported.prompt_tokens, reported.completion_tokens) == case.billed


@both_clients
@pytest.mark.parametrize("name", ANSWERS)
async def test_a_recorded_answer(rig: Rig, name: str, asynchronous: bool) -> None:
    case = RECORDED[name]
    rig.answer(recorded(case))
    completion = await create(rig, asynchronous, model=case.model, n=2 if "n>1" in case.features else 1)
    assert completion.to_dict() == json.loads(case.body)


async def test_a_client_that_hangs_up_at_the_closing_event_got_it_all(rig: Rig) -> None:
    """OpenAI's client closes the connection at `[DONE]`, and some providers close it much later."""
    rig.answer(Script(chunks=[delta("word", finish="stop"), DONE], fault="hang"))
    async with client(rig) as caller:
        response = await caller.chat.completions.with_raw_response.create(
            model="gpt-4o", messages=MESSAGES, stream=True
        )
        assert [chunk.choices[0].delta.content async for chunk in response.parse()] == ["word"]
    record = await rig.record(response.headers["x-request-id"])
    assert (record.outcome, record.completion_tokens) == (Outcome.OK, 1)


class Person(BaseModel):
    name: str
    age: int


PERSON = '{"name": "Ada", "age": 36}'
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "weather",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


def streamed_call() -> Script:
    def part(**function: str) -> bytes:
        call = {"index": 0, "id": "call_1", "type": "function", "function": function}
        choice = {"index": 0, "delta": {"role": "assistant", "tool_calls": [call]}, "finish_reason": None}
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o"}
        return event({**chunk, "choices": [choice]})

    parts = [part(name="weather", arguments=""), part(arguments='{"city"'), part(arguments=': "Graz"}')]
    return Script(chunks=[*parts, delta("", finish="tool_calls"), usage(50, 9), DONE])


async def test_the_stream_helper_with_a_schema(rig: Rig) -> None:
    pieces = [PERSON[:9], PERSON[9:20], PERSON[20:]]
    rig.answer(Script(chunks=[*map(delta, pieces), delta("", finish="stop"), usage(40, 12), DONE]))
    async with (
        client(rig) as caller,
        caller.chat.completions.stream(
            model="gpt-4o", messages=MESSAGES, response_format=Person, stream_options={"include_usage": True}
        ) as stream,
    ):
        deltas = [event.delta async for event in stream if event.type == "content.delta"]
        final = await stream.get_final_completion()
    assert deltas == pieces
    assert final.choices[0].message.parsed == Person(name="Ada", age=36)
    assert final.usage is not None
    assert final.usage.completion_tokens == 12


async def test_the_stream_helper_with_a_tool(rig: Rig) -> None:
    rig.answer(streamed_call())
    async with (
        client(rig) as caller,
        caller.chat.completions.stream(model="gpt-4o", messages=MESSAGES, tools=[TOOL]) as stream,
    ):
        calls = [event async for event in stream if event.type == "tool_calls.function.arguments.done"]
        final = await stream.get_final_completion()
    assert [(call.name, call.parsed_arguments) for call in calls] == [("weather", {"city": "Graz"})]
    assert final.choices[0].finish_reason == "tool_calls"


async def test_the_stream_helper_with_a_refusal(rig: Rig) -> None:
    case = RECORDED["openai/chat-stream-gpt-4o-2024-08-06-refusal-logprobs-01"]
    rig.answer(recorded(case))
    async with (
        client(rig) as caller,
        caller.chat.completions.stream(
            model="gpt-4o", messages=MESSAGES, response_format=Person, logprobs=True
        ) as stream,
    ):
        refusals = [event.refusal async for event in stream if event.type == "refusal.done"]
    choices = (choice for event in recorded_events(case) for choice in event["choices"])
    assert refusals == ["".join(choice["delta"].get("refusal") or "" for choice in choices)]


async def test_the_parse_helper(rig: Rig) -> None:
    message = {"role": "assistant", "content": PERSON, "refusal": None}
    answer = {
        **{"id": "chatcmpl-1", "object": "chat.completion", "created": 1, "model": "gpt-4o"},
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": {"prompt_tokens": 40, "completion_tokens": 12, "total_tokens": 52},
    }
    rig.answer(Script(headers=JSON, chunks=[json.dumps(answer).encode()], whole=True))
    async with client(rig) as caller:
        completion = await caller.chat.completions.parse(model="gpt-4o", messages=MESSAGES, response_format=Person)
    assert completion.choices[0].message.parsed == Person(name="Ada", age=36)
    schema = json.loads(rig.provider.received[-1].body)["response_format"]["json_schema"]
    assert (schema["name"], schema["strict"], schema["schema"]["required"]) == ("Person", True, ["name", "age"])


# What the client raises -----------------------------------------------------------------------------------------------


@both_clients
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_parameter_that_is_wrong(rig: Rig, stream: bool, asynchronous: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="integer below minimum value") as raised:
        await create(rig, asynchronous, n=0, stream=stream)
    assert (raised.value.param, raised.value.code) == ("n", "integer_below_min_value")
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id


async def test_a_token_that_does_not_verify(rig: Rig) -> None:
    async with client(rig, api_key=f"{rig.token()}x") as caller:
        with pytest.raises(openai.AuthenticationError) as raised:
            await caller.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert raised.value.response.headers["www-authenticate"] == "Bearer"


async def test_a_caller_that_is_not_allowed(rig: Rig) -> None:
    async with client(rig, "stranger@elsewhere.example") as caller:
        with pytest.raises(openai.PermissionDeniedError):
            await caller.chat.completions.create(model="gpt-4o", messages=MESSAGES)


async def test_a_path_that_is_not_served(rig: Rig) -> None:
    async with client(rig) as caller:
        with pytest.raises(openai.NotFoundError, match="/v1/chat/completions"):
            await caller.moderations.create(input="word")
        with pytest.raises(openai.NotFoundError):
            await caller.files.list()


@both_clients
async def test_an_exhausted_budget_is_not_retried(rig: Rig, asynchronous: bool) -> None:
    """The client retries a 429 by itself, which would only be refused again: `x-should-retry: false` stops it."""
    before = len(refused(rig))
    with pytest.raises(openai.RateLimitError, match=r"Budget service/poor@\S+ has too little left") as raised:
        await create_with_retries(rig, asynchronous)
    assert raised.value.code == raised.value.type == "insufficient_quota"
    assert 0 < int(raised.value.response.headers["retry-after"]) <= 24 * 3600
    await eventually(lambda: len(refused(rig)) > before, "the refusal's record")
    assert len(refused(rig)) == before + 1


async def create_with_retries(rig: Rig, asynchronous: bool) -> None:
    long: Any = [{"role": "user", "content": "word " * 40}]
    if asynchronous:
        async with client(rig, POOR, max_retries=3) as caller:
            await caller.chat.completions.create(model="gpt-4o", messages=long, stream=True)
    else:
        with openai.OpenAI(**settings(rig, POOR, max_retries=3)) as a_client:
            await asyncio.to_thread(a_client.chat.completions.create, model="gpt-4o", messages=long, stream=True)


def refused(rig: Rig) -> list[str]:
    return [record.request_id for record in rig.records() if record.service == POOR]


@both_clients
async def test_a_cut_is_an_error_that_says_why(rig: Rig, asynchronous: bool) -> None:
    rig.answer(streamed(300, pause_s=0.001))
    chunks: list[Any] = []
    email = f"cut-{asynchronous}@test.iam.gserviceaccount.com"
    with pytest.raises(
        openai.APIError, match=r"Budget service/cut-\S+ was used up while the answer streamed"
    ) as raised:
        await create(rig, asynchronous, email, chunks, stream=True)
    assert raised.value.code == raised.value.type == "insufficient_quota"
    assert "its limit is 60 tokens" in raised.value.message
    assert "it resets at" in raised.value.message
    assert 0 < len(chunks) < 60
    assert {chunk.choices[0].delta.content for chunk in chunks} == {" word"}


@both_clients
async def test_a_stream_that_ends_early_is_an_error(rig: Rig, asynchronous: bool) -> None:
    rig.answer(streamed(3, end=False))
    chunks: list[Any] = []
    with pytest.raises(openai.APIError, match="ended early") as raised:
        await create(rig, asynchronous, chunks=chunks, stream=True)
    assert raised.value.type == "upstream_error"
    assert len(chunks) == 3


def failed(status: int, **fields: str) -> Script:
    body = json.dumps({"error": {"message": "Not now.", "type": "server_error", "param": None, "code": None}})
    return Script(status=status, headers=(*JSON, *fields.items()), chunks=[body.encode()], whole=True)


async def test_the_providers_own_limit_is_passed_on(rig: Rig) -> None:
    rig.answer(failed(429, **{"retry-after": "7", "x-ratelimit-limit-requests": "500"}))
    async with client(rig) as caller:
        with pytest.raises(openai.RateLimitError, match=r"Not now\.") as raised:
            await caller.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    headers = raised.value.response.headers
    assert headers["retry-after"] == "7"
    assert not {"x-should-retry", "x-ratelimit-limit-requests"} & set(headers)


async def test_a_failure_of_the_providers_is_retried_and_each_try_is_recorded(rig: Rig) -> None:
    failure = failed(503, **{"retry-after-ms": "1"})
    scripts = [failure, failure, recorded(RECORDED[ANSWERS[0]])]  # the gateway's own second try fails, too
    rig.answer(lambda _: scripts.pop(0))
    email = "persistent@test.iam.gserviceaccount.com"
    async with client(rig, email, max_retries=2) as caller:
        await caller.chat.completions.create(model="gpt-4o", messages=MESSAGES)

    def outcomes() -> list[tuple[int, Outcome]]:
        return [(r.status, r.outcome) for r in rig.records() if r.service == email]

    await eventually(lambda: len(outcomes()) == 2, "two records")
    assert outcomes() == [(503, Outcome.UPSTREAM_ERROR), (200, Outcome.OK)]


async def test_the_gateways_own_key_refused_is_no_fault_of_the_callers(rig: Rig) -> None:
    case = RECORDED["openai/chat-json-gpt-4o-mini-401-01"]
    rig.answer(recorded(case))
    async with client(rig) as caller:
        with pytest.raises(openai.InternalServerError) as raised:
            await caller.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert raised.value.status_code == 502
    assert "sk-" not in raised.value.message
