"""Requests to Gemini: into the canonical form, and out of it."""

from __future__ import annotations

import base64
import contextlib
import json
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from google import genai
from google.genai import types
from hypothesis import given
from hypothesis import strategies as st

from extproc.dialects.dialect import Address, ChatDialect
from extproc.dialects.gemini import GeminiGenerate
from extproc.dialects.gemini.schemas import to_json_schema
from extproc.errors import BadRequest
from extproc.form import (
    Audio,
    Choose,
    Document,
    Feature,
    Format,
    Image,
    Message,
    Output,
    Part,
    Reasoning,
    Refusal,
    Request,
    Role,
    Text,
    Thinking,
    Tool,
    ToolCall,
    ToolChoice,
    ToolResult,
    features,
)
from tests.each import each_case
from tests.recordings import Case, protocol_cases

GEMINI: ChatDialect = GeminiGenerate()
MODEL = "gemini-2.5-flash"
HELLO = {"role": "user", "parts": [{"text": "Hello"}]}
PNG, PDF = base64.b64encode(b"\x89PNG\xfb\xff\xfe").decode(), base64.b64encode(b"%PDF").decode()


def read(body: dict[str, Any], model: str = MODEL, *, stream: bool = False) -> Request:
    return GEMINI.read_request(body, Address(model, stream))


def request(**fields: Any) -> dict[str, Any]:
    return {"contents": [HELLO], **fields}


def config(**fields: Any) -> dict[str, Any]:
    return request(generationConfig=fields)


def asked(**fields: Any) -> Request:
    return Request(MODEL, (Message(Role.USER, (Text("Hello"),)),), **fields)


def write(request: Request, model: str = MODEL) -> Any:
    return json.loads(GEMINI.write_request(request, model, request.cap))


# Both ways: what is read, and written again ---------------------------------------------------------------------------

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False}
FIELDS: dict[str, tuple[dict[str, Any], Request]] = {
    "nothing": (request(), asked()),
    "cap": (config(maxOutputTokens=7), asked(cap=7)),
    "choices": (config(candidateCount=2), asked(choices=2)),
    "temperature": (config(temperature=1.5), asked(temperature=1.5)),
    "top_p": (config(topP=0.5), asked(top_p=0.5)),
    "top_k": (config(topK=40), asked(top_k=40)),
    "stop": (config(stopSequences=["a", "b"]), asked(stop=("a", "b"))),
    "seed": (config(seed=7), asked(seed=7)),
    "penalties": (
        config(presencePenalty=0.5, frequencyPenalty=-0.5),
        asked(presence_penalty=0.5, frequency_penalty=-0.5),
    ),
    "logprobs": (config(responseLogprobs=True, logprobs=3), asked(logprobs=True, top_logprobs=3)),
    "JSON": (config(responseMimeType="application/json"), asked(format=Format(Output.JSON))),
    "schema": (
        config(responseMimeType="application/json", responseJsonSchema=SCHEMA),
        asked(format=Format(Output.SCHEMA, SCHEMA)),
    ),
    "thinking budget": (
        config(thinkingConfig={"thinkingBudget": 1_024, "includeThoughts": True}),
        asked(reasoning=Reasoning(budget_tokens=1_024, visible=True)),
    ),
    "no thinking": (config(thinkingConfig={"thinkingBudget": 0}), asked(reasoning=Reasoning(budget_tokens=0))),
    "tools": (
        request(tools=[{"functionDeclarations": [{"name": "f", "description": "d", "parametersJsonSchema": SCHEMA}]}]),
        asked(tools=(Tool("f", "d", SCHEMA),)),
    ),
    "any tool": (
        request(toolConfig={"functionCallingConfig": {"mode": "ANY"}}),
        asked(tool_choice=ToolChoice(Choose.REQUIRED)),
    ),
    "a tool": (
        request(toolConfig={"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f"]}}),
        asked(tool_choice=ToolChoice(Choose.NAMED, ("f",))),
    ),
    "some tools": (
        request(toolConfig={"functionCallingConfig": {"mode": "ANY", "allowedFunctionNames": ["f", "g"]}}),
        asked(tool_choice=ToolChoice(Choose.REQUIRED, ("f", "g"))),
    ),
    "some tools, or none": (
        request(toolConfig={"functionCallingConfig": {"mode": "VALIDATED", "allowedFunctionNames": ["f"]}}),
        asked(tool_choice=ToolChoice(Choose.AUTO, ("f",))),
    ),
    "no tools": (
        request(toolConfig={"functionCallingConfig": {"mode": "NONE"}}),
        asked(tool_choice=ToolChoice(Choose.NONE)),
    ),
    "tools as it likes": (
        request(toolConfig={"functionCallingConfig": {"mode": "AUTO"}}),
        asked(tool_choice=ToolChoice(Choose.AUTO)),
    ),
}


@pytest.mark.parametrize(("body", "expected"), FIELDS.values(), ids=FIELDS)
def test_fields(body: dict[str, Any], expected: Request) -> None:
    assert read(body) == expected
    assert write(expected) == body


READ: dict[str, tuple[dict[str, Any], Request]] = {
    "snake": (
        request(generation_config={"max_output_tokens": 7, "thinking_config": {"thinking_budget": 9}}),
        asked(cap=7, reasoning=Reasoning(budget_tokens=9)),
    ),
    "top_k as Google's client sends it": (config(topK=40.0), asked(top_k=40)),
    "a level": (config(thinkingConfig={"thinkingLevel": "LOW"}), asked(reasoning=Reasoning("low"))),
    "thinking as it likes": (config(thinkingConfig={"thinkingBudget": -1}), asked()),
    "plain text": (config(responseMimeType="text/plain", responseModalities=["TEXT"]), asked()),
    "hints": (request(labels={"a": "b"}, serviceTier="flex"), asked()),
    "Google's schema": (
        config(response_mime_type="application/json", response_schema={"type": "STRING", "nullable": True}),
        asked(format=Format(Output.SCHEMA, {"type": ["string", "null"]})),
    ),
    "parameters": (
        request(tools=[{"function_declarations": [{"name": "f", "parameters": {"type": "OBJECT"}}]}]),
        asked(tools=(Tool("f", None, {"type": "object"}),)),
    ),
    "mode in small letters": (
        request(tool_config={"function_calling_config": {"mode": "any"}}),
        asked(tool_choice=ToolChoice(Choose.REQUIRED)),
    ),
    "a null": (request(tools=None, toolConfig=None, systemInstruction=None, safetySettings=None), asked()),
}


@pytest.mark.parametrize(("body", "expected"), READ.values(), ids=READ)
def test_read(body: dict[str, Any], expected: Request) -> None:
    assert read(body) == expected


def test_the_path_says_more() -> None:
    assert read(request(), "gemini-x", stream=True) == replace(asked(), model="gemini-x", stream=True)


EXTRAS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "safety settings": (request(safetySettings=[{}]), ("safetySettings",)),
    "what is new": (request(hologram=1), ("hologram",)),
    "speech": (config(speechConfig={}), ("generationConfig.speechConfig",)),
    "pictures": (config(responseModalities=["IMAGE"]), ("generationConfig.responseModalities",)),
    "an enumeration": (config(responseMimeType="text/x.enum"), ("generationConfig.responseMimeType",)),
    "search": (request(tools=[{"functionDeclarations": []}, {"googleSearch": {}}]), ("tools[1].googleSearch",)),
    "retrieval": (request(toolConfig={"retrievalConfig": {}}), ("toolConfig.retrievalConfig",)),
    "what a function gives back": (request(tools=[{"functionDeclarations": [{"name": "f", "response": {}}]}]), ()),
    "how a function is called": (
        request(tools=[{"functionDeclarations": [{"name": "f", "behavior": "NON_BLOCKING"}]}]),
        ("tools[0].functionDeclarations[0].behavior",),
    ),
    "video": (
        request(contents=[{"parts": [{"inlineData": {"mimeType": "video/mp4", "data": ""}}]}]),
        ("contents[0].parts[0].inlineData",),
    ),
    "code": (
        request(contents=[HELLO, {"role": "model", "parts": [{"executableCode": {"code": "1"}}]}]),
        ("contents[1].parts[0].executableCode",),
    ),
}


@pytest.mark.parametrize(("body", "expected"), EXTRAS.values(), ids=EXTRAS)
def test_extras(body: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert read(body).extras == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "temperature": (config(temperature="1"), "generationConfig.temperature"),
    "a boolean": (config(topP=True), "generationConfig.topP"),
    "half a token": (config(topK=0.5), "generationConfig.topK"),
    "seed": (config(seed=1.5), "generationConfig.seed"),
    "stop": (config(stopSequences=[1]), "generationConfig.stopSequences[0]"),
    "level": (config(thinkingConfig={"thinkingLevel": "most"}), "generationConfig.thinkingConfig.thinkingLevel"),
    "budget": (config(thinkingConfig={"thinkingBudget": -2}), "generationConfig.thinkingConfig.thinkingBudget"),
    "two schemas": (config(responseSchema={}, responseJsonSchema={}), "generationConfig.responseJsonSchema"),
    "mode": (
        request(toolConfig={"functionCallingConfig": {"mode": "SOME"}}),
        "toolConfig.functionCallingConfig.mode",
    ),
    "names": (
        request(toolConfig={"functionCallingConfig": {"allowedFunctionNames": [1]}}),
        "toolConfig.functionCallingConfig.allowedFunctionNames[0]",
    ),
    "a nameless function": (
        request(tools=[{"functionDeclarations": [{}]}]),
        "tools[0].functionDeclarations[0].name",
    ),
    "role": (request(contents=[{"role": "system", "parts": []}]), "contents[0].role"),
    "a nameless call": (
        request(contents=[{"role": "model", "parts": [{"functionCall": {}}]}]),
        "contents[0].parts[0].functionCall.name",
    ),
    "a nameless response": (
        request(contents=[{"parts": [{"functionResponse": {}}]}]),
        "contents[0].parts[0].functionResponse.name",
    ),
    "no base64": (
        request(contents=[{"parts": [{"inlineData": {"mimeType": "text/plain", "data": "!"}}]}]),
        "contents[0].parts[0].inlineData.data",
    ),
}


@pytest.mark.parametrize(("body", "param"), REFUSED.values(), ids=REFUSED)
def test_refused(body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(body)
    assert refused.value.param == param


# Turns ----------------------------------------------------------------------------------------------------------------


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "parts": list(parts)}


def model(*parts: Any) -> dict[str, Any]:
    return {"role": "model", "parts": list(parts)}


def inline(kind: str, data: str) -> dict[str, Any]:
    return {"inlineData": {"mimeType": kind, "data": data}}


PARTS: dict[str, tuple[dict[str, Any], Part]] = {
    "text": ({"text": "a"}, Text("a")),
    "image": (inline("image/png", PNG), Image(PNG, "image/png")),
    "PDF": (inline("application/pdf", PDF), Document(PDF, "application/pdf")),
    "audio": (inline("audio/mp3", PNG), Audio(PNG, "mp3")),
}


@pytest.mark.parametrize(("part", "expected"), PARTS.values(), ids=PARTS)
def test_parts(part: dict[str, Any], expected: Part) -> None:
    assert read({"contents": [user(part)]}).messages == (Message(Role.USER, (expected,)),)
    assert write(Request(MODEL, (Message(Role.USER, (expected,)),)))["contents"] == [user(part)]


PARTS_READ: dict[str, tuple[dict[str, Any], Part]] = {
    "base64 as Google's client writes it": (
        {"inline_data": {"mime_type": "image/png", "data": PNG.translate(str.maketrans("+/", "-_")).rstrip("=")}},
        Image(PNG, "image/png"),
    ),
    "image by address": (
        {"fileData": {"fileUri": "https://example.org/a.png", "mimeType": "image/png"}},
        Image(url="https://example.org/a.png"),
    ),
    "a text file": (inline("text/csv", base64.b64encode(b"a,b").decode()), Document(text="a,b")),
    "wave": (inline("audio/x-wav;rate=1", PNG), Audio(PNG, "wav")),
}


@pytest.mark.parametrize(("part", "expected"), PARTS_READ.values(), ids=PARTS_READ)
def test_parts_read(part: dict[str, Any], expected: Part) -> None:
    assert read({"contents": [user(part)]}).messages == (Message(Role.USER, (expected,)),)


@pytest.mark.parametrize(
    "address",
    [
        "gs://bucket/a.png",
        "https://generativelanguage.googleapis.com/v1beta/files/abc",
        "https://storage.googleapis.com/bucket/a.png",
        "https://www.youtube.com/watch?v=abc",
        "//example.org/a.png",
    ],
)
@pytest.mark.parametrize("kind", [Image, Document])
def test_an_address_that_google_reads_by_its_customers_rights_is_refused(kind: type, address: str) -> None:
    """Stored files of others, and videos of any length, would pass as another dialect's image."""
    part = ToolResult("c", (kind(url=address),)) if kind is Image else kind(url=address)
    with pytest.raises(BadRequest) as refused:
        GEMINI.write_request(Request(MODEL, (Message(Role.USER, (part,)),)), MODEL, None)
    assert refused.value.code == "invalid_value"


PARTS_WRITTEN: dict[str, tuple[Part, dict[str, Any]]] = {
    "image by address": (
        Image(url="https://example.org/a.PNG?b.gif"),
        {"fileData": {"mimeType": "image/png", "fileUri": "https://example.org/a.PNG?b.gif"}},
    ),
    "image of no name": (
        Image(url="https://example.org/a"),
        {"fileData": {"mimeType": "image/jpeg", "fileUri": "https://example.org/a"}},
    ),
    "PDF by address": (
        Document(url="https://example.org/a"),
        {"fileData": {"mimeType": "application/pdf", "fileUri": "https://example.org/a"}},
    ),
    "a text file": (Document(text="a,b"), {"text": "a,b"}),
    "a refusal": (Refusal("no"), {"text": "no"}),
}


@pytest.mark.parametrize(("part", "expected"), PARTS_WRITTEN.values(), ids=PARTS_WRITTEN)
def test_parts_written(part: Part, expected: dict[str, Any]) -> None:
    assert write(Request(MODEL, (Message(Role.USER, (part,)),)))["contents"] == [user(expected)]


def test_instructions_have_one_place() -> None:
    messages = (
        Message(Role.SYSTEM, (Text("a"),)),
        Message(Role.USER, (Text("b"),)),
        Message(Role.DEVELOPER, (Text("c"),)),
    )
    written = write(Request(MODEL, messages))
    assert written == {
        "contents": [user({"text": "b"})],
        "systemInstruction": {"parts": [{"text": "a"}, {"text": "c"}]},
    }
    assert read(written).messages == (Message(Role.SYSTEM, (Text("a"), Text("c"))), messages[1])


def test_instructions_alone_are_what_is_asked() -> None:
    assert write(Request(MODEL, (Message(Role.SYSTEM, (Text("a"),)),))) == {"contents": [user({"text": "a"})]}


def test_turns_of_one_role_are_joined() -> None:
    """A tool's results and what follows them are one turn."""
    messages = (
        Message(Role.USER, (Text("a"),)),
        Message(Role.ASSISTANT, (Text("b"),)),
        Message(Role.ASSISTANT, (ToolCall("1", "f", "{}"), ToolCall("2", "g", '{"a":1}'))),
        Message(Role.USER, (ToolResult("1", (Text("x"),)),)),
        Message(Role.USER, (ToolResult("2", (Text("y"),)), Text("c"), Text(""))),
    )
    assert write(Request(MODEL, messages))["contents"] == [
        user({"text": "a"}),
        model(
            {"text": "b"},
            {"functionCall": {"id": "1", "name": "f", "args": {}}},
            {"functionCall": {"id": "2", "name": "g", "args": {"a": 1}}},
        ),
        user(
            {"functionResponse": {"id": "1", "name": "f", "response": {"result": "x"}}},
            {"functionResponse": {"id": "2", "name": "g", "response": {"result": "y"}}},
            {"text": "c"},
        ),
    ]


RESULTS: dict[str, tuple[dict[str, Any], str, bool]] = {
    "text": ({"result": "x"}, "x", False),
    "an object": ({"a": 1}, '{"a":1}', False),
    "a number": ({"result": 5}, '{"result":5}', False),
    "more than a result": ({"result": "x", "a": 1}, '{"result":"x","a":1}', False),
    "an error": ({"error": "x"}, "x", True),
    "an error's object": ({"error": {"a": 1}}, '{"error":{"a":1}}', True),
}


@pytest.mark.parametrize(("response", "text", "is_error"), RESULTS.values(), ids=RESULTS)
def test_results(response: dict[str, Any], text: str, is_error: bool) -> None:
    called = model({"functionCall": {"id": "1", "name": "f", "args": {}}})
    body = {"contents": [HELLO, called, user({"functionResponse": {"id": "1", "name": "f", "response": response}})]}
    again = read(body)
    assert again.messages[-1].parts == (ToolResult("1", (Text(text),), is_error),)
    assert write(again)["contents"] == body["contents"]


def test_a_result_under_googles_own_name() -> None:
    body = {"contents": [user({"functionResponse": {"name": "f", "response": {"output": "x"}}})]}
    assert read(body).messages[0].parts == (ToolResult("f", (Text("x"),)),)


def test_responses_find_their_calls() -> None:
    """By id, else in order by name: older models give no ids."""
    call = {"functionCall": {"name": "f"}}
    response = {"functionResponse": {"name": "f", "response": {}}}
    contents = [model(call, {"functionCall": {"name": "g", "id": "x"}}, call), user(response, response)]
    late = user({"functionResponse": {"name": "g", "id": "x", "response": {}}})
    messages = read({"contents": [HELLO, *contents, late]}).messages
    assert [part.id for part in messages[1].parts if isinstance(part, ToolCall)] == ["call_0", "x", "call_2"]
    results = [part.call_id for message in messages[2:] for part in message.parts if isinstance(part, ToolResult)]
    assert results == ["call_0", "call_2", "x"]


@pytest.mark.parametrize(("name", "inside"), [("gemini-2.5-pro", False), ("gemini-3-pro", True)])
def test_pictures_in_results(name: str, inside: bool) -> None:
    """Only Gemini 3 takes them within."""
    result = ToolResult("1", (Text("x"), Image(PNG, "image/png")))
    written = write(Request(name, (Message(Role.USER, (result,)),)), name)["contents"][0]["parts"]
    picture = inline("image/png", PNG)
    assert written[0]["functionResponse"].get("parts") == ([picture] if inside else None)
    assert written[1:] == ([] if inside else [picture])
    assert Feature.TOOL_RESULT_MEDIA not in GEMINI.cannot


# Thoughts -------------------------------------------------------------------------------------------------------------

OWN = (Thinking("hm", "c2ln", "gemini"), Text("a"), Thinking("", "bmFs", "gemini"), ToolCall("1", "f", "{}"))


def test_own_signatures_go_back_to_where_they_were() -> None:
    messages = (Message(Role.USER, (Text("q"),)), Message(Role.ASSISTANT, OWN))
    written = write(Request(MODEL, messages))
    assert written["contents"][1] == model(
        {"text": "hm", "thought": True},
        {"text": "a", "thoughtSignature": "c2ln"},
        {"functionCall": {"id": "1", "name": "f", "args": {}}, "thoughtSignature": "bmFs"},
    )
    assert read(written).messages == messages


def test_other_models_thoughts_are_left_out() -> None:
    thoughts = (Thinking("hm", "sig", "anthropic"), Thinking("hm"), Thinking("", "x", "anthropic", redacted=True))
    assert write(Request(MODEL, (Message(Role.ASSISTANT, (*thoughts, Text("a"))),)))["contents"] == [
        model({"text": "a"})
    ]


@pytest.mark.parametrize(
    ("name", "said"), [("gemini-2.5-pro", None), ("gemini-3-pro", "skip"), ("gemini-latest", "skip")]
)
def test_calls_of_other_models_say_so(name: str, said: str | None) -> None:
    """The first of a turn: Gemini 3 refuses a call without a signature."""
    calls = Message(Role.ASSISTANT, (ToolCall("1", "f", "{}"), ToolCall("2", "g", "{}")))
    first, second = write(Request(name, (calls,)), name)["contents"][0]["parts"]
    assert first.get("thoughtSignature", "").startswith(said or "")
    assert ("thoughtSignature" in first) == (said is not None)
    assert "thoughtSignature" not in second


def test_pieces_of_a_turn_are_one() -> None:
    """Google's client keeps each event of a stream as a content of its own."""
    pieces = [
        {"text": "h", "thought": True},
        {"text": "m", "thought": True},
        {"text": "a"},
        {"text": "b"},
        {"text": ""},
    ]
    assert read({"contents": [HELLO, *map(model, pieces)]}).messages[1:] == (
        Message(Role.ASSISTANT, (Thinking("hm", None, "gemini"), Text("ab"))),
    )


EFFORTS: dict[str, tuple[str, Reasoning, dict[str, Any]]] = {
    "low, in tokens": ("gemini-2.5-flash", Reasoning("low"), {"thinkingBudget": 1_024}),
    "high, in tokens": (
        "gemini-2.5-pro",
        Reasoning("high", visible=True),
        {"includeThoughts": True, "thinkingBudget": 24_576},
    ),
    "none": ("gemini-2.5-flash", Reasoning("none"), {"thinkingBudget": 0}),
    "none, where there must be some": ("gemini-2.5-pro", Reasoning("none"), {"thinkingBudget": 128}),
    "a budget above the most": ("gemini-2.5-flash", Reasoning(budget_tokens=99_999), {"thinkingBudget": 24_576}),
    "a budget below the least": ("gemini-2.5-flash-lite", Reasoning(budget_tokens=7), {"thinkingBudget": 512}),
    "a level": ("gemini-3-flash-preview", Reasoning("medium"), {"thinkingLevel": "medium"}),
    "more than there is": ("gemini-3-pro", Reasoning("xhigh"), {"thinkingLevel": "high"}),
    "the least": ("gemini-3-flash-preview", Reasoning("none"), {"thinkingLevel": "minimal"}),
    "the least of pro": ("gemini-3-pro", Reasoning(budget_tokens=0), {"thinkingLevel": "low"}),
    "a budget, still taken": ("gemini-3-pro", Reasoning(budget_tokens=2_000), {"thinkingBudget": 2_000}),
    "shown only": ("gemini-3-pro", Reasoning(visible=True), {"includeThoughts": True}),
}


@pytest.mark.parametrize(("name", "reasoning", "expected"), EFFORTS.values(), ids=EFFORTS)
def test_efforts(name: str, reasoning: Reasoning, expected: dict[str, Any]) -> None:
    assert write(asked(reasoning=reasoning), name)["generationConfig"]["thinkingConfig"] == expected


def test_older_models_do_not_think() -> None:
    assert "generationConfig" not in write(asked(reasoning=Reasoning("high")), "gemini-2.0-flash")


def test_what_cannot_be_said() -> None:
    cannot = asked(logit_bias={"1": 1}, parallel_tool_calls=False, tools=(Tool("f"),))
    assert features(cannot) == GEMINI.cannot
    assert set(GEMINI.fields) == set(Feature)


# Schemas --------------------------------------------------------------------------------------------------------------

SCHEMAS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "JSON Schema already": (SCHEMA, SCHEMA),
    "types": (
        {"type": "ARRAY", "items": {"type": "STRING"}, "minItems": "1"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
    ),
    "properties of such names": (
        {"properties": {"type": {"type": "NUMBER"}, "nullable": {"type": "BOOLEAN", "nullable": True}}},
        {"properties": {"type": {"type": "number"}, "nullable": {"type": ["boolean", "null"]}}},
    ),
    "snake": (
        {"any_of": [{"type": "STRING"}, {"type": "INTEGER"}], "max_length": "5"},
        {"anyOf": [{"type": "string"}, {"type": "integer"}], "maxLength": 5},
    ),
    "nullable choices": ({"anyOf": [{}], "nullable": True}, {"anyOf": [{}, {"type": "null"}]}),
    "nullable enumeration": (
        {"type": "STRING", "enum": ["a"], "nullable": True},
        {"type": ["string", "null"], "enum": ["a", None]},
    ),
    "not nullable": ({"type": "STRING", "nullable": False}, {"type": "string"}),
    "hints": ({"property_ordering": ["a"], "example": 1, "title": "T"}, {"title": "T"}),
}


@pytest.mark.parametrize(("schema", "expected"), SCHEMAS.values(), ids=SCHEMAS)
def test_schemas(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    assert to_json_schema(schema) == expected
    assert to_json_schema(expected) == expected


# Recorded requests, and Google's client -------------------------------------------------------------------------------

STORED = "vertex/generate-json-gemini-2.0-flash-audio-in-01"  # a file of its caller's, which the gate refuses
ANSWERED = [case for case in protocol_cases("gemini") if case.request and case.status == 200 and case.name != STORED]


def texts_of(request: Request) -> str:
    parts = [part for message in request.messages for part in message.parts]
    return "".join(part.text or "" for part in parts if isinstance(part, (Text, Document)))


@each_case(ANSWERED)
def test_recorded_requests(case: Case) -> None:
    """What is read and written is read the same again, but for what became one turn, or text."""
    assert case.request is not None
    first = read(case.request, case.model, stream=case.stream)
    written = GEMINI.write_request(first, case.model, first.cap)
    second = read(json.loads(written), case.model, stream=case.stream)
    assert replace(first, extras=(), messages=()) == replace(second, messages=())
    assert texts_of(second) == texts_of(first)
    assert GEMINI.write_request(second, case.model, second.cap) == written


def test_the_clients_requests_are_read() -> None:
    bodies: list[dict[str, Any]] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        bodies.append(json.loads(request.content))
        return httpx2.Response(200, json={"candidates": [{"content": {"parts": [{"text": "{}"}]}}]})

    http = httpx2.Client(transport=httpx2.MockTransport(answer))
    options = types.HttpOptions(httpx_client=http, base_url="http://gateway.test")
    client = genai.Client(api_key="key", http_options=options)

    def weather(city: str, days: int = 1) -> str:
        """The weather."""
        return f"{city} {days}"

    client.models.generate_content(
        model=MODEL,
        contents=["Look", types.Part.from_bytes(data=base64.b64decode(PNG), mime_type="image/png")],
        config=types.GenerateContentConfig(
            system_instruction="Be brief.",
            temperature=0,
            top_k=40,
            max_output_tokens=9,
            stop_sequences=["x"],
            tools=[weather],
            tool_config=types.ToolConfig(
                function_calling_config=types.FunctionCallingConfig(mode=types.FunctionCallingConfigMode.ANY)
            ),
            thinking_config=types.ThinkingConfig(include_thoughts=True, thinking_budget=7),
        ),
    )
    request = read(bodies[0])
    assert request == Request(
        MODEL,
        (Message(Role.SYSTEM, (Text("Be brief."),)), Message(Role.USER, (Text("Look"), Image(PNG, "image/png")))),
        cap=9,
        temperature=0.0,
        top_k=40,
        stop=("x",),
        tools=request.tools,
        tool_choice=ToolChoice(Choose.REQUIRED),
        reasoning=Reasoning(budget_tokens=7, visible=True),
    )
    (tool,) = request.tools
    assert (tool.name, tool.description) == ("weather", "The weather.")
    assert tool.schema is not None
    assert tool.schema["properties"]["city"] == {"type": "string"}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(FIELDS)), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("where", ["systemInstruction", "tools", "toolConfig", "generationConfig", "contents"])
@given(st.data())
def test_anything_is_read_or_refused(where: str, data: st.DataObject) -> None:
    names = {
        "tools": ["functionDeclarations", "name", "parameters", "parametersJsonSchema"],
        "toolConfig": ["functionCallingConfig", "mode", "allowedFunctionNames"],
        "generationConfig": ["topK", "stopSequences", "thinkingConfig", "thinkingLevel", "responseSchema", "seed"],
    }.get(where, ["parts", "text", "role", "inlineData", "mimeType", "data", "functionResponse", "name", "response"])
    value = data.draw(
        st.recursive(JSON, lambda i: st.dictionaries(st.sampled_from(names), i, max_size=3) | st.lists(i, max_size=2))
    )
    body = request(**{where: value})
    with contextlib.suppress(BadRequest):
        GEMINI.read_call(body, Address(MODEL))
        GEMINI.write_request(read(body), MODEL, 1)
