"""The canonical form into a request to Gemini.

Schemas go as JSON Schema (`parametersJsonSchema`, `responseJsonSchema`), so that none has to be changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from extproc import form
from extproc.dialects.fields import parse
from extproc.dialects.gemini.names import OWN, dumps, generation
from extproc.dialects.gemini.parts import write_parts
from extproc.dialects.gemini.prompts import is_public
from extproc.errors import BadRequest
from extproc.form import Choose, Output, Role

# Gemini 3 refuses a call of its own that comes back without its signature; for calls that another model wrote, its
# documentation has this word (https://ai.google.dev/gemini-api/docs/thought-signatures).
_NOT_SIGNED_HERE = "skip_thought_signature_validator"
_SIGNED_FROM = 3

_MODES = {Choose.AUTO: "AUTO", Choose.NONE: "NONE", Choose.REQUIRED: "ANY", Choose.NAMED: "ANY"}
_AUDIO_TYPES = {"pcm16": "audio/l16"}

# Efforts in tokens, as Google's own OpenAI-compatible API has them, for models that know no levels.
_BUDGETS = {"none": 0, "minimal": 1_024, "low": 1_024, "medium": 8_192, "high": 24_576, "xhigh": 24_576}
_LEVELS = {"low": "low", "medium": "medium", "high": "high", "xhigh": "high"}
# The least and most thinking tokens (https://ai.google.dev/gemini-api/docs/thinking). Pro cannot go without.
_BUDGET_BOUNDS = (("pro", 128, 32_768), ("lite", 512, 24_576), ("", 1, 24_576))
_THOUGHTLESS = ("gemini-1.", "gemini-2.0", "gemini-pro")


def write_request(request: form.Request, model: str, cap: int | None) -> bytes:
    """The body for a provider. The path names the model, and whether to stream."""
    contents, system = _contents(request, model)
    written = {
        "contents": contents,
        "systemInstruction": {"parts": system} if system else None,
        "tools": [{"functionDeclarations": [_declaration(tool) for tool in request.tools]}] if request.tools else None,
        "toolConfig": _tool_config(request),
        "generationConfig": _config(request, model, cap) or None,
    }
    return dumps({name: value for name, value in written.items() if value is not None})


# Turns ----------------------------------------------------------------------------------------------------------------


def _contents(request: form.Request, model: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The turns, one after the other by turns, and the instructions, which have one place whenever they were given."""
    names = {part.id: part.name for one in request.messages for part in one.parts if isinstance(part, form.ToolCall)}
    contents: list[dict[str, Any]] = []
    system: list[dict[str, Any]] = []
    for message in request.messages:
        if message.role in (Role.SYSTEM, Role.DEVELOPER):
            system += _user_parts(message.parts, names, model)
            continue
        role = "model" if message.role is Role.ASSISTANT else "user"
        own = message.role is Role.ASSISTANT
        parts = _model_parts(message.parts) if own else list(_user_parts(message.parts, names, model))
        if contents and contents[-1]["role"] == role:
            contents[-1]["parts"] += parts
        elif parts:
            contents.append({"role": role, "parts": parts})
    if generation(model) >= _SIGNED_FROM:
        _sign_calls(contents)
    return (contents, system) if contents else ([{"role": "user", "parts": system}], [])


def _model_parts(parts: tuple[form.Part, ...]) -> list[dict[str, Any]]:
    """Thoughts of other models prove nothing here."""
    return write_parts(part for part in parts if not isinstance(part, form.Thinking) or part.origin == OWN)


def _sign_calls(contents: list[dict[str, Any]]) -> None:
    """The first call of a turn carries the signature for all."""
    for content in contents:
        first = next((part for part in content["parts"] if "functionCall" in part), None)
        if first is not None:
            first.setdefault("thoughtSignature", _NOT_SIGNED_HERE)


def _user_parts(parts: tuple[form.Part, ...], names: Mapping[str, str], model: str) -> Iterator[dict[str, Any]]:
    for part in parts:
        match part:
            case form.Text() | form.Refusal() if part.text:
                yield {"text": part.text}
            case form.Document(text=str(text)):
                yield {"text": text}
            case form.ToolResult():
                yield from _tool_result(part, names.get(part.call_id, part.call_id), model)
            case form.Image() | form.Document() | form.Audio():
                yield _media(part)


def _media(part: form.Image | form.Document | form.Audio) -> dict[str, Any]:
    """Google reads some addresses by its customer's rights, whoever asks. Raises BadRequest for such a one."""
    if isinstance(part, form.Audio):
        media_type = _AUDIO_TYPES.get(part.format, f"audio/{part.format}")
        return {"inlineData": {"mimeType": media_type, "data": part.data}}
    default = "image/jpeg" if isinstance(part, form.Image) else "application/pdf"
    if part.url is not None:
        if not is_public(part.url):
            message = "An image or a document is taken from a public address only, and not from Google's own."
            raise BadRequest(message, code="invalid_value")
        return {"fileData": {"mimeType": part.media_type or _by_name(part.url, default), "fileUri": part.url}}
    return {"inlineData": {"mimeType": part.media_type or default, "data": part.data or ""}}


def _by_name(url: str, default: str) -> str:
    """Vertex AI wants a type for every address."""
    ending = url.partition("?")[0].partition("#")[0].rpartition(".")[2].lower()
    return f"image/{ending}" if ending in ("png", "webp", "gif", "heic", "heif", "bmp") else default


def _tool_result(result: form.ToolResult, name: str, model: str) -> Iterator[dict[str, Any]]:
    """Gemini 3 takes media in the response itself; those before it, beside it."""
    texts = [part.text for part in result.parts if isinstance(part, (form.Text, form.Document)) and part.text]
    media = list(_user_parts(_media_of(result), {}, model))
    inside = {"parts": media} if media and generation(model) >= _SIGNED_FROM else {}
    response = _response("\n".join(texts), is_error=result.is_error)
    yield {"functionResponse": {"id": result.call_id, "name": name, "response": response, **inside}}
    if not inside:
        yield from media


def _media_of(result: form.ToolResult) -> tuple[form.Part, ...]:
    return tuple(
        part
        for part in result.parts
        if isinstance(part, (form.Image, form.Audio)) or (isinstance(part, form.Document) and part.text is None)
    )


def _response(text: str, *, is_error: bool) -> dict[str, Any]:
    """An object, which Google wants: the result itself if it is one."""
    value = parse(text.encode("utf-8", "replace")) if text.startswith("{") else None
    if isinstance(value, dict) and (not is_error or list(value) == ["error"]):
        return value
    return {"error" if is_error else "result": text}


# The other fields -----------------------------------------------------------------------------------------------------


def _declaration(tool: form.Tool) -> dict[str, Any]:
    declared = {"name": tool.name, "description": tool.description, "parametersJsonSchema": tool.schema}
    return {name: value for name, value in declared.items() if value is not None}


def _tool_config(request: form.Request) -> dict[str, Any] | None:
    """Which functions may be called while none must be, only VALIDATED can say."""
    choice = request.tool_choice
    if choice is None:
        return None
    mode = "VALIDATED" if choice.choose is Choose.AUTO and choice.names else _MODES[choice.choose]
    names = {"allowedFunctionNames": list(choice.names)} if choice.names else {}
    return {"functionCallingConfig": {"mode": mode, **names}}


def _config(request: form.Request, model: str, cap: int | None) -> dict[str, Any]:
    config = {
        "maxOutputTokens": cap,
        "candidateCount": request.choices,
        "temperature": request.temperature,
        "topP": request.top_p,
        "topK": request.top_k,
        "stopSequences": list(request.stop) or None,
        "seed": request.seed,
        "presencePenalty": request.presence_penalty,
        "frequencyPenalty": request.frequency_penalty,
        "responseLogprobs": True if request.logprobs or request.top_logprobs else None,
        "logprobs": request.top_logprobs or None,
        "thinkingConfig": _thinking(request.reasoning, model) or None,
        **_format(request.format),
    }
    return {name: value for name, value in config.items() if value is not None}


def _format(asked: form.Format | None) -> dict[str, Any]:
    if asked is None or asked.output is Output.TEXT:
        return {}
    schema = {"responseJsonSchema": asked.schema} if asked.output is Output.SCHEMA else {}
    return {"responseMimeType": "application/json", **schema}


def _thinking(reasoning: form.Reasoning | None, model: str) -> dict[str, Any]:
    """Levels from Gemini 3 on, tokens before; older models do not think."""
    if reasoning is None or model.startswith(_THOUGHTLESS):
        return {}
    shown = {} if reasoning.visible is None else {"includeThoughts": reasoning.visible}
    return {**shown, **_how_much(reasoning, model)}


def _how_much(reasoning: form.Reasoning, model: str) -> dict[str, Any]:
    effort = "none" if reasoning.budget_tokens == 0 else reasoning.effort
    if generation(model) >= _SIGNED_FROM and reasoning.budget_tokens in (None, 0):
        least = "low" if "pro" in model else "minimal"
        return {} if effort is None else {"thinkingLevel": _LEVELS.get(effort, least)}
    budget = _BUDGETS.get(effort or "") if reasoning.budget_tokens is None else reasoning.budget_tokens
    if budget is None:
        return {}
    _, least_tokens, most_tokens = next(bounds for bounds in _BUDGET_BOUNDS if bounds[0] in model)
    if budget == 0 and "pro" not in model:
        return {"thinkingBudget": 0}
    return {"thinkingBudget": min(max(budget, least_tokens), most_tokens)}
