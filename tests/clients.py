"""The official clients, each asking for one text: what they are given, what they raise, and where each looks for it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import anthropic
import openai
from google import genai
from google.genai import errors, types

from tests.rig import SERVICE, Rig

PROMPT = "Say something."


@dataclass
class Ask:
    """One call. What is heard goes into `heard`, also where the answer ends half-way. `more` are other fields."""

    rig: Rig
    heard: list[str]
    model: str = "model"
    stream: bool = False
    email: str = SERVICE
    token: str | None = None
    path: str = ""  # below the gateway's address, where there should be nothing
    prompt: str = PROMPT
    more: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        return self.token or self.rig.token(self.email)


async def _by_chat(ask: Ask) -> None:
    async with openai.AsyncOpenAI(base_url=f"{ask.rig.url}{ask.path}/v1", api_key=ask.key, max_retries=0) as client:
        options: Any = {"model": ask.model, "messages": [{"role": "user", "content": ask.prompt}], **(ask.more or {})}
        answer: Any = await client.chat.completions.create(**options, stream=ask.stream)
        if not ask.stream:
            ask.heard.append(answer.choices[0].message.content)
            return
        async for chunk in answer:
            ask.heard.extend(choice.delta.content or "" for choice in chunk.choices)


async def _by_responses(ask: Ask) -> None:
    async with openai.AsyncOpenAI(base_url=f"{ask.rig.url}{ask.path}/v1", api_key=ask.key, max_retries=0) as client:
        options: Any = {"model": ask.model, "input": ask.prompt, **(ask.more or {})}
        answer: Any = await client.responses.create(**options, stream=ask.stream)
        if not ask.stream:
            ask.heard.append(answer.output_text)
            return
        async for event in answer:
            if event.type == "response.output_text.delta":
                ask.heard.append(event.delta)
            elif event.type == "error":  # which OpenAI's client hands on as it hands on any other
                raise openai.APIError(event.message, body=event.model_dump(), request=answer.response.request)


async def _by_messages(ask: Ask) -> None:
    async with anthropic.AsyncAnthropic(base_url=ask.rig.url + ask.path, auth_token=ask.key, max_retries=0) as client:
        turns = [{"role": "user", "content": ask.prompt}]
        options: Any = {"model": ask.model, "max_tokens": 4000, "messages": turns, **(ask.more or {})}
        if not ask.stream:
            answer = await client.messages.create(**options)
            ask.heard.extend(block.text for block in answer.content if block.type == "text")
            return
        async with client.messages.stream(**options) as stream:
            async for text in stream.text_stream:
                ask.heard.append(text)


async def _by_generate(ask: Ask) -> None:
    options = types.HttpOptions(base_url=ask.rig.url + ask.path, retry_options=types.HttpRetryOptions(attempts=1))
    async with genai.Client(api_key=ask.key, http_options=options).aio as client:
        asked: Any = {"model": ask.model, "contents": ask.prompt, "config": ask.more}
        if not ask.stream:
            ask.heard.append((await client.models.generate_content(**asked)).text or "")
            return
        async for chunk in await client.models.generate_content_stream(**asked):
            ask.heard.append(chunk.text or "")


def _openais(error: Any) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message)


@dataclass(frozen=True)
class Client:
    """One official client, and API of its. `classes` are its exceptions by status, `base` all of them.

    `message` is an exception's own words from the gateway, `native` the provider of its dialect.
    """

    ask: Callable[[Ask], Awaitable[None]]
    native: str
    foreign: tuple[str, ...]
    classes: Mapping[int, type[Exception]]
    base: type[Exception]
    message: Callable[[Any], str]


_OPENAI: dict[int, type[Exception]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    404: openai.NotFoundError,
    413: openai.APIStatusError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
    504: openai.InternalServerError,
    529: openai.InternalServerError,
}
_ANTHROPIC: dict[int, type[Exception]] = {
    400: anthropic.BadRequestError,
    401: anthropic.AuthenticationError,
    404: anthropic.NotFoundError,
    413: anthropic.APIStatusError,
    429: anthropic.RateLimitError,
    500: anthropic.InternalServerError,
    503: anthropic.InternalServerError,
    504: anthropic.InternalServerError,
    529: anthropic.InternalServerError,
}
_GOOGLE: dict[int, type[Exception]] = {
    **dict.fromkeys((400, 401, 404, 413, 429), errors.ClientError),
    **dict.fromkeys((500, 503, 504, 529), errors.ServerError),
}

CLIENTS: Mapping[str, Client] = {
    "openai chat": Client(_by_chat, "openai", ("anthropic", "gemini"), _OPENAI, openai.APIError, _openais),
    "openai responses": Client(_by_responses, "openai", ("anthropic", "gemini"), _OPENAI, openai.APIError, _openais),
    "anthropic": Client(
        _by_messages,
        "anthropic",
        ("openai", "gemini"),
        _ANTHROPIC,
        anthropic.APIError,
        lambda error: str((error.body or {}).get("error", {}).get("message") or error.message),
    ),
    "google": Client(
        _by_generate,
        "gemini",
        ("openai", "anthropic"),
        _GOOGLE,
        errors.APIError,
        lambda error: str(error.message),
    ),
}


def status_of(error: Any) -> int | None:
    """The HTTP status that an exception tells, whichever client's it is."""
    status = getattr(error, "status_code", None)
    return status if status is not None else getattr(error, "code", None)


def header_of(error: Any, name: str) -> str | None:
    """A header of the answer that it was."""
    value: str | None = error.response.headers.get(name)
    return value


def shape_of(error: Any) -> str:
    """Whose error the answer's body is."""
    said = error.response.json() if hasattr(error.response, "json") else json.loads(error.response.body_segments[0])
    if said.get("type") == "error":
        return "anthropic"
    return "google" if isinstance(said["error"].get("code"), int) else "openai"
