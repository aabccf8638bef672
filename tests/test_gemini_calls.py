"""What the gate asks of Gemini's dialect: what is accepted, what it may cost, and what is sent on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from extproc import limits
from extproc.dialects.dialect import Address, Dialect
from extproc.dialects.gemini import GeminiCountTokens, GeminiGenerate, prompts
from extproc.errors import BadRequest, BudgetExhausted
from extproc.jsonarray import last_element
from extproc.metering import count_texts
from extproc.records import Answer, Piece, Usage
from extproc.tokens import counter
from tests.each import each_case
from tests.recordings import Case, protocol_cases

GEMINI: Dialect = GeminiGenerate()
COUNT: Dialect = GeminiCountTokens()
MODEL = "gemini-2.5-flash"
HELLO = {"role": "user", "parts": [{"text": "Hello"}]}


def request(**fields: Any) -> dict[str, Any]:
    return {"contents": [HELLO], **fields}


def config(**fields: Any) -> dict[str, Any]:
    return request(generationConfig=fields)


def with_part(**part: Any) -> dict[str, Any]:
    return request(contents=[{"role": "user", "parts": [part]}])


def read(body: dict[str, Any], model: str = MODEL, *, stream: bool = False) -> Any:
    return GEMINI.read_call(body, Address(model, stream))


# What is read ---------------------------------------------------------------------------------------------------------


def test_a_plain_call() -> None:
    body = request()
    call = read(body, stream=True)
    assert call.body is body
    assert (call.model, call.stream, call.wants_usage, call.choices, call.cap) == (MODEL, True, True, 1, None)
    assert (call.service_tier, call.web_searches, call.thinks, call.unseen, call.billed) == (None, 0, None, False, True)
    assert call.prompt_texts == ("Hello",)
    assert call.prompt_extra == prompts.CONTENT_TOKENS


READ: dict[str, tuple[dict[str, Any], str, object]] = {
    "choices": (config(candidateCount=3), "choices", 3),
    "choices, snake": (request(generation_config={"candidate_count": 3}), "choices", 3),
    "cap": (config(maxOutputTokens=7), "cap", 7),
    "cap, snake": (request(generation_config={"max_output_tokens": 7}), "cap", 7),
    "cap null": (config(maxOutputTokens=None), "cap", None),
    "config null": (request(generationConfig=None), "cap", None),
    "service tier": (request(serviceTier="flex"), "service_tier", "flex"),
    "service tier, in capitals": (request(service_tier="SERVICE_TIER_FLEX"), "service_tier", "flex"),
    "no thoughts": (config(thinkingConfig={"thinkingBudget": 0}), "thinks", False),
    "no thoughts, snake": (config(thinking_config={"thinking_budget": 0}), "thinks", False),
    "thoughts": (config(thinkingConfig={"thinkingBudget": 128}), "thinks", True),
    "thoughts as it likes": (config(thinkingConfig={"thinkingBudget": -1}), "thinks", True),
    "a level": (config(thinkingConfig={"thinkingLevel": "minimal"}), "thinks", True),
    "thoughts shown": (config(thinkingConfig={"includeThoughts": True}), "thinks", True),
    "thoughts not shown": (config(thinkingConfig={"includeThoughts": False}), "thinks", None),
    "search": (request(tools=[{"googleSearch": {}}]), "web_searches", 1),
    "search, snake, one tool": (request(tools={"google_search": {}}), "web_searches", 1),
    "a function is no search": (request(tools=[{"functionDeclarations": [{"name": "search"}]}]), "web_searches", 0),
    "pictures": (config(responseModalities=["TEXT", "IMAGE"]), "unseen", True),
    "text only": (config(responseModalities=["TEXT"]), "unseen", False),
}


@pytest.mark.parametrize(("body", "name", "expected"), READ.values(), ids=READ)
def test_read(body: dict[str, Any], name: str, expected: object) -> None:
    assert getattr(read(body), name) == expected


def test_each_search_of_newer_models_is_held_for() -> None:
    assert read(request(tools=[{"googleSearch": {}}]), "gemini-3.5-flash").web_searches == prompts.SEARCHES
    assert read(request(tools=[{"googleSearch": {}}]), "gemini-flash-latest").web_searches == prompts.SEARCHES


def test_models_that_answer_in_pictures_or_sound_need_not_be_asked() -> None:
    assert read(request(), "gemini-2.5-flash-image").unseen
    assert read(request(), "gemini-2.5-flash-preview-tts").unseen


PROMPTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "system": (request(systemInstruction={"parts": [{"text": "sys"}]}), ["sys"]),
    "system, snake, one part": (request(system_instruction={"parts": {"text": "sys"}}), ["sys"]),
    "one content": ({"contents": {"parts": {"text": "Hi"}}}, ["Hi"]),
    "a call": (with_part(functionCall={"name": "f", "args": {"a": 1}}), ['"name":"f"', '"args":{"a":1}']),
    "a response": (with_part(function_response={"name": "f", "response": {"r": 2}}), ['"response":{"r":2}']),
    "code": (with_part(executableCode={"code": "1+1"}), ["1+1"]),
    "its output": (with_part(codeExecutionResult={"output": "42"}), ["42"]),
    "a tool of Google's": (with_part(toolResponse={"response": {"a": "x"}}), ['"a":"x"']),
    "functions": (request(tools=[{"function_declarations": [{"name": "f"}]}]), ['[{"name":"f"}]']),
    "a schema": (config(responseSchema={"type": "OBJECT"}), ['{"type":"OBJECT"}']),
    "a JSON schema": (config(response_json_schema={"type": "object"}), ['{"type":"object"}']),
}


@pytest.mark.parametrize(("body", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_prompt_texts(body: dict[str, Any], expected: list[str]) -> None:
    texts = read(body).prompt_texts
    assert [text for text in expected if not any(text in found for found in texts)] == []


def blob(kind: str, size_bytes: int, **more: Any) -> dict[str, Any]:
    return with_part(inlineData={"mimeType": kind, "data": "A" * (size_bytes * 4 // 3)}, **more)


PICTURE = {"fileUri": "https://example.org/a.png", "mimeType": "image/png"}
EXTRAS: dict[str, tuple[dict[str, Any], int]] = {
    "a turn": (request(contents=[HELLO, HELLO]), prompts.CONTENT_TOKENS),
    "digits": (with_part(text="1234567890"), 7),
    "text": (with_part(text="a" * 100), 5),
    "image": (blob("image/png", 300), prompts.IMAGE_TOKENS),
    "image, in capitals": (blob("IMAGE/PNG", 300), prompts.IMAGE_TOKENS),
    "image by address": (with_part(fileData=PICTURE), prompts.IMAGE_TOKENS),
    "image in a response": (
        with_part(functionResponse={"name": "", "parts": [{"inlineData": {"mimeType": "image/png", "data": ""}}]}),
        prompts.IMAGE_TOKENS,
    ),
    "audio": (blob("audio/wav", 3_100 * 3), prompts.AUDIO_TOKENS + 300),
    "video": (blob("video/mp4", 3_900), prompts.VIDEO_TOKENS + 300),
    "video, more frames": (blob("video/mp4", 3_900, videoMetadata={"fps": 2}), prompts.VIDEO_TOKENS + 600),
    "video, fewer frames": (blob("video/mp4", 3_900, videoMetadata={"fps": 0.1}), prompts.VIDEO_TOKENS + 300),
    "PDF": (blob("application/pdf", 3_000), prompts.FILE_TOKENS + 3_000),
    "a large PDF": (blob("application/pdf", 3_000_000), prompts.LARGEST_CONTEXT_TOKENS),
    "a signature": (with_part(thoughtSignature="x" * 40), 10),
    "a tool of Google's": (request(tools=[{"codeExecution": {}}]), prompts.SERVER_TOOL_TOKENS),
}


@pytest.mark.parametrize(("body", "expected"), EXTRAS.values(), ids=EXTRAS)
def test_prompt_extra(body: dict[str, Any], expected: int) -> None:
    plain = read(with_part(text="")).prompt_extra
    assert read(body).prompt_extra - plain == expected


# What is refused ------------------------------------------------------------------------------------------------------


def file(uri: object, kind: str = "image/png") -> dict[str, Any]:
    return with_part(fileData={"fileUri": uri, "mimeType": kind})


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "no contents": ({}, "contents", "missing_required_parameter"),
    "contents empty": ({"contents": []}, "contents", "invalid_value"),
    "contents a string": ({"contents": "hi"}, "contents", "invalid_type"),
    "a content a string": ({"contents": ["hi"]}, "contents[0]", "invalid_type"),
    "too many": ({"contents": [{}] * (limits.MAX_MESSAGES + 1)}, "contents", "invalid_value"),
    "role a number": ({"contents": [{"role": 1}]}, "contents[0].role", "invalid_type"),
    "parts a string": ({"contents": [{"parts": "hi"}]}, "contents[0].parts", "invalid_type"),
    "text a number": (with_part(text=1), "contents[0].parts[0].text", "invalid_type"),
    "a part of unknown cost": (with_part(hologram={}), "contents[0].parts[0].hologram", "unsupported_parameter"),
    "system a string": (request(systemInstruction="x"), "systemInstruction", "invalid_type"),
    "another model": (request(model="models/gemini-2.5-pro"), "model", "invalid_value"),
    "cached content": (request(cachedContent="cachedContents/1"), "cachedContent", "unsupported_parameter"),
    "cached content, snake": (request(cached_content="cachedContents/1"), "cachedContent", "unsupported_parameter"),
    "stored files": (request(tools=[{"fileSearch": {}}]), "tools[0].fileSearch", "unsupported_parameter"),
    "stored data": (request(tools=[{"retrieval": {}}]), "tools[0].retrieval", "unsupported_parameter"),
    "routing": (config(routingConfig={}), "generationConfig.routingConfig", "unsupported_parameter"),
    "model selection": (
        config(model_selection_config={}),
        "generationConfig.modelSelectionConfig",
        "unsupported_parameter",
    ),
    "config a list": (request(generationConfig=[]), "generationConfig", "invalid_type"),
    "cap a string": (config(maxOutputTokens="7"), "generationConfig.maxOutputTokens", "invalid_type"),
    "cap a decimal": (config(maxOutputTokens=7.0), "generationConfig.maxOutputTokens", "invalid_type"),
    "cap zero": (config(maxOutputTokens=0), "generationConfig.maxOutputTokens", "integer_below_min_value"),
    "cap huge": (config(maxOutputTokens=2**60), "generationConfig.maxOutputTokens", "integer_above_max_value"),
    "choices zero": (config(candidateCount=0), "generationConfig.candidateCount", "integer_below_min_value"),
    "budget a string": (
        config(thinkingConfig={"thinkingBudget": "0"}),
        "generationConfig.thinkingConfig.thinkingBudget",
        "invalid_type",
    ),
    "two names": (
        config(maxOutputTokens=1, max_output_tokens=9),
        "generationConfig.maxOutputTokens",
        "invalid_value",
    ),
    "two names, one null": (
        request(tools=None, generationConfig={}, generation_config=None),
        "generationConfig",
        "invalid_value",
    ),
    "misspelt": (request(GenerationConfig={}), "GenerationConfig", "unknown_parameter"),
    "misspelt below": (config(maxoutputtokens=9), "generationConfig.maxoutputtokens", "unknown_parameter"),
    "misspelt in a part": (with_part(Text="x"), "contents[0].parts[0].Text", "unknown_parameter"),
    "misspelt budget": (
        config(thinkingConfig={"thinking-budget": 0}),
        "generationConfig.thinkingConfig.thinking-budget",
        "unknown_parameter",
    ),
    "blob without a type": (
        with_part(inlineData={"data": ""}),
        "contents[0].parts[0].inlineData.mimeType",
        "missing_required_parameter",
    ),
    "blob without data": (
        with_part(inlineData={"mimeType": "image/png"}),
        "contents[0].parts[0].inlineData.data",
        "missing_required_parameter",
    ),
    "frames": (
        blob("video/mp4", 9, videoMetadata={"fps": 1_000}),
        "contents[0].parts[0].videoMetadata.fps",
        "invalid_value",
    ),
    "a PDF by address": (
        file("https://example.org/a.pdf", "application/pdf"),
        "contents[0].parts[0].fileData",
        "unsupported_parameter",
    ),
    "a file of no type": (
        with_part(fileData={"fileUri": "https://example.org/a"}),
        "contents[0].parts[0].fileData",
        "unsupported_parameter",
    ),
    "a file at Google": (
        file("https://generativelanguage.googleapis.com/v1beta/files/abc"),
        "contents[0].parts[0].fileData",
        "unsupported_parameter",
    ),
    "a file at Google, in a response": (
        with_part(
            functionResponse={"name": "f", "parts": [{"fileData": {"fileUri": "gs://b/a", "mimeType": "image/png"}}]}
        ),
        "contents[0].parts[0].functionResponse.parts[0].fileData",
        "unsupported_parameter",
    ),
    "fileUri a number": (file(1), "contents[0].parts[0].fileData.fileUri", "invalid_type"),
}


@pytest.mark.parametrize(("body", "param", "code"), REFUSED.values(), ids=REFUSED)
def test_refused(body: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(BadRequest) as refused:
        read(body)
    assert (refused.value.param, refused.value.code) == (param, code)


@pytest.mark.parametrize("model", [None, "", "m" * (limits.MAX_MODEL_NAME_CHARS + 1)], ids=["none", "empty", "long"])
def test_the_path_names_a_model(model: str | None) -> None:
    with pytest.raises(BadRequest):
        GEMINI.read_call(request(), Address(model))


ADDRESSES = {
    "https://example.org/a.png": True,
    "http://example.org:8080/a.png": True,
    "gs://bucket/a.png": False,
    "https://storage.googleapis.com/b/a.png": False,
    "https://STORAGE.GOOGLEAPIS.COM./b/a.png": False,
    "https://example.org@files.googleapis.com/a.png": False,
    "https://files.googleapis.com\\@example.org/a.png": False,
    "https://files.googleapis.com#@example.org/a.png": False,
    "https://notgoogleapis.com/a.png": True,
    "https://www.youtube.com/watch?v=1": False,
    "https://youtu.be/1": False,
    "https://": False,
    "https://[": False,
    "files/abc": False,
    "https://exämple.org/a.png": False,
}


@pytest.mark.parametrize(("address", "public"), ADDRESSES.items(), ids=ADDRESSES)
def test_public_addresses(address: str, public: bool) -> None:
    assert prompts.is_public(address) == public


# What is sent on ------------------------------------------------------------------------------------------------------


def sent(body: dict[str, Any] | bytes, cap: int | None = None, model: str = MODEL) -> Any:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return json.loads(GEMINI.upstream_body(read(json.loads(raw)), raw, model, cap))


SENT: dict[str, tuple[dict[str, Any], int | None, dict[str, Any]]] = {
    "as it is": (request(), None, request()),
    "a cap": (request(), 7, config(maxOutputTokens=7)),
    "a cap beside others": (config(topK=1), 7, config(topK=1, maxOutputTokens=7)),
    "a lower cap": (config(maxOutputTokens=9), 7, config(maxOutputTokens=7)),
    "under the caller's names": (
        request(generation_config={"max_output_tokens": 9, "topK": 1}),
        7,
        request(generation_config={"max_output_tokens": 7, "topK": 1}),
    ),
    "config null": (request(generationConfig=None), 7, config(maxOutputTokens=7)),
    "the path names the model": (request(model=f"models/{MODEL}"), None, request()),
}


@pytest.mark.parametrize(("body", "cap", "expected"), SENT.values(), ids=SENT)
def test_sent(body: dict[str, Any], cap: int | None, expected: dict[str, Any]) -> None:
    assert sent(body, cap) == expected


def test_what_need_not_change_stays_byte_for_byte() -> None:
    raw = b'{ "contents":[{"parts":[{"text":"\\u0041"}]}], "generationConfig":{"topP":1.0,"maxOutputTokens":7 }}'
    call = read(json.loads(raw))
    assert GEMINI.upstream_body(call, raw, "another", 7) is raw
    changed = GEMINI.upstream_body(call, raw, "another", 5)
    assert b'"contents":[{"parts":[{"text":"\\u0041"}]}]' in changed
    assert b'"topP":1.0' in changed


# Recorded requests ----------------------------------------------------------------------------------------------------

# Stored files, whose cost and owner are not known.
STORED = {
    "gemini/generate-stream-gemini-2.5-pro-01",
    "gemini/generate-stream-gemini-3-flash-preview-01",
    "vertex/generate-json-gemini-2.0-flash-audio-in-01",
}
ASKED = [case for case in protocol_cases("gemini") if case.request]


@each_case(ASKED)
def test_recorded_requests_are_read(case: Case) -> None:
    """And held for."""
    assert case.request is not None
    address = Address(case.model, case.stream)
    if case.name in STORED:
        with pytest.raises(BadRequest):
            GEMINI.read_call(case.request, address)
        return
    call = GEMINI.read_call(case.request, address)
    raw = json.dumps(case.request).encode()
    assert json.loads(GEMINI.upstream_body(call, raw, case.model, call.cap)) == {
        name: value for name, value in case.request.items() if name != "model"
    }
    if "input" in case.usage:
        held = count_texts(call.prompt_texts, counter("o200k_base")) + call.prompt_extra
        assert case.usage["input"] + case.usage.get("tool_use_prompt", 0) <= held


# Counting tokens ------------------------------------------------------------------------------------------------------

COUNTED = protocol_cases("gemini-count-tokens")


@each_case(COUNTED)
def test_recorded_counts(case: Case) -> None:
    assert case.request is not None
    call = COUNT.read_call(case.request, Address(case.model))
    assert (call.model, call.stream, call.billed, call.prompt_texts, call.prompt_extra) == (
        case.model,
        False,
        False,
        (),
        0,
    )
    raw = json.dumps(case.request).encode()
    assert json.loads(COUNT.upstream_body(call, raw, case.model, 7)) == case.request
    if case.status == 200:
        assert COUNT.read_answer(case.body) == Answer((), Usage(0, 0))
    else:
        with pytest.raises(ValueError, match="not a count"):
            COUNT.read_answer(case.body)


def test_a_whole_request_to_be_counted_names_its_model() -> None:
    body = {"generate_content_request": {"model": f"models/{MODEL}", **request()}}
    call = COUNT.read_call(body, Address(MODEL))
    assert json.loads(COUNT.upstream_body(call, json.dumps(body).encode(), "gemini-x", None)) == {
        "generate_content_request": {**request(), "model": "models/gemini-x"}
    }


def test_what_is_counted_is_checked() -> None:
    for body in (request(cachedContent="x"), {"generateContentRequest": request(cachedContent="x")}, {}):
        with pytest.raises(BadRequest):
            COUNT.read_call(body, Address(MODEL))


# Refusals -------------------------------------------------------------------------------------------------------------

EXHAUSTED = BudgetExhausted("Daily budget is used up.", budget_id="b", retry_after_s=60)
GOOGLE = "type.googleapis.com/google.rpc."


@pytest.mark.parametrize("api", [GEMINI, COUNT], ids=["generate", "count"])
def test_error(api: Dialect) -> None:
    assert json.loads(api.render_error(EXHAUSTED)) == {
        "error": {
            "code": 429,
            "message": "Daily budget is used up.",
            "status": "RESOURCE_EXHAUSTED",
            "details": [
                {"@type": f"{GOOGLE}ErrorInfo", "reason": "INSUFFICIENT_QUOTA", "domain": "tollgate"},
                {"@type": f"{GOOGLE}RetryInfo", "retryDelay": "60s"},
            ],
        }
    }
    assert api.render_error_event(EXHAUSTED) == b"data: " + api.render_error(EXHAUSTED) + b"\r\n\r\n"


@pytest.mark.parametrize("sent_before", [b"", b"[{}", b"[{}\n,\n{}"], ids=["nothing", "one", "two"])
def test_a_cut_array_is_legal_json(sent_before: bytes) -> None:
    *_, last = json.loads(sent_before + last_element(GEMINI.render_error(EXHAUSTED), first=not sent_before))
    assert last["error"]["status"] == "RESOURCE_EXHAUSTED"


def test_a_count_has_no_stream() -> None:
    assert COUNT.piece_reader()(b"{}") == Piece()
