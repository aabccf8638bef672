"""Gemini's requests into the canonical form. https://ai.google.dev/api/generate-content."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from extproc import form
from extproc.dialects.dialect import Address
from extproc.dialects.fields import invalid, missing, number, optional, required, strings, wrong_type
from extproc.dialects.gemini.calls import asks_for_media, read_config
from extproc.dialects.gemini.names import (
    BLOB,
    BODY,
    CONTENT,
    FILE,
    FUNCTION_RESPONSE,
    PART,
    THINKING,
    TOOL,
    Spelling,
    dumps,
    message,
    messages,
)
from extproc.dialects.gemini.parts import joined, read_part
from extproc.dialects.gemini.schemas import to_json_schema
from extproc.form import Choose, Feature, Output, Role

CANNOT = frozenset({Feature.LOGIT_BIAS, Feature.SERIAL_TOOL_CALLS})
_CONFIG = "generationConfig."
FIELDS: Mapping[Feature, str] = MappingProxyType(
    {
        Feature.CHOICES: _CONFIG + "candidateCount",
        Feature.TEMPERATURE_ABOVE_1: _CONFIG + "temperature",
        Feature.TOP_K: _CONFIG + "topK",
        Feature.STOP: _CONFIG + "stopSequences",
        Feature.SEED: _CONFIG + "seed",
        Feature.PRESENCE_PENALTY: _CONFIG + "presencePenalty",
        Feature.FREQUENCY_PENALTY: _CONFIG + "frequencyPenalty",
        Feature.LOGIT_BIAS: "logitBias",
        Feature.LOGPROBS: _CONFIG + "responseLogprobs",
        Feature.TOOL_SUBSET: "toolConfig.functionCallingConfig.allowedFunctionNames",
        Feature.SERIAL_TOOL_CALLS: "toolConfig",
        Feature.JSON_MODE: _CONFIG + "responseMimeType",
        Feature.JSON_SCHEMA: _CONFIG + "responseJsonSchema",
        Feature.REASONING: _CONFIG + "thinkingConfig",
        Feature.IMAGE: "contents.parts.inlineData",
        Feature.IMAGE_URL: "contents.parts.fileData",
        Feature.DOCUMENT: "contents.parts.inlineData",
        Feature.DOCUMENT_URL: "contents.parts.fileData",
        Feature.AUDIO: "contents.parts.inlineData",
        Feature.TOOL_RESULT_MEDIA: "contents.parts.functionResponse.parts",
    }
)

_DECLARATION = Spelling("name", "description", "parameters", "parametersJsonSchema", "response", "responseJsonSchema")
_TOOL_CONFIG = Spelling("functionCallingConfig", "retrievalConfig", "includeServerSideToolInvocations")
_CALLING = Spelling("mode", "allowedFunctionNames")

# What has a place in the canonical form, and what changes nothing about the answer.
_PLACED_FIELDS = frozenset(("model", "contents", "systemInstruction", "tools", "toolConfig", "generationConfig"))
_HINTS = frozenset(("labels", "store", "serviceTier"))
_PLACED_CONFIG = frozenset(
    (
        "candidateCount",
        "maxOutputTokens",
        "temperature",
        "topP",
        "topK",
        "stopSequences",
        "seed",
        "presencePenalty",
        "frequencyPenalty",
        "responseLogprobs",
        "logprobs",
        "responseMimeType",
        "responseSchema",
        "responseJsonSchema",
        "thinkingConfig",
    )
)
# Google's client tells of each function what it gives back: the model is to know, and does without.
_PLACED_DECLARATION = frozenset(
    ("name", "description", "parameters", "parametersJsonSchema", "response", "responseJsonSchema")
)
_PLACED_PART = frozenset(("text", "thought", "thoughtSignature", "functionCall", "partMetadata"))
_PLACED_USER_PART = _PLACED_PART | {"inlineData", "fileData", "functionResponse"}

_ROLES = {None: Role.USER, "": Role.USER, "user": Role.USER, "function": Role.USER, "tool": Role.USER}
_LEVELS = frozenset(("minimal", "low", "medium", "high", "xhigh"))
_AUDIO_FORMATS = {"mpeg": "mp3", "x-wav": "wav", "wave": "wav", "vnd.wave": "wav", "l16": "pcm16"}
_FROM_URL_SAFE = str.maketrans("-_", "+/")
_RESULTS = ("result", "output")  # under which a function's text stands alone


def read_request(body: Mapping[str, Any], address: Address) -> form.Request:
    """A request that `read_call` has accepted. Raises BadRequest for what cannot be read, naming the field."""
    fields = BODY.read(body)
    config = read_config(fields)
    if address.model is None:
        raise missing("model")
    turns = _Turns()
    turns.read(fields)
    tools = tuple(_tools(fields, turns.extras))
    turns.extras += _unplaced(fields, _PLACED_FIELDS | _HINTS, "")
    turns.extras += _unplaced(config, _PLACED_CONFIG | _text_only(config), _CONFIG)
    request = _sampled(config, form.Request(address.model, tuple(turns.messages), stream=address.stream))
    return replace(
        request,
        tools=tools,
        tool_choice=_tool_choice(fields, turns.extras),
        format=_format(config, turns.extras),
        reasoning=_reasoning(config),
        extras=tuple(turns.extras),
    )


def _unplaced(fields: Mapping[str, Any], placed: frozenset[str], where: str) -> list[str]:
    return [where + name for name, value in fields.items() if value is not None and name not in placed]


def _text_only(config: Mapping[str, Any]) -> frozenset[str]:
    """Text is what every dialect answers with."""
    return frozenset() if asks_for_media(config) else frozenset({"responseModalities"})


# Turns ----------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Turns:
    """The messages as they are read. `open_calls` are calls without an answer, which may name their call or not."""

    messages: list[form.Message] = field(default_factory=list)
    extras: list[str] = field(default_factory=list)
    open_calls: list[tuple[str, str]] = field(default_factory=list)
    calls: int = 0

    def read(self, fields: Mapping[str, Any]) -> None:
        system = CONTENT.read(optional(fields, "systemInstruction", dict) or {}, "systemInstruction.")
        if instructions := tuple(self._user_parts(system, "systemInstruction.")):
            self.messages.append(form.Message(Role.SYSTEM, instructions))
        for i, content in enumerate(messages(fields, "contents")):
            self._read_content(CONTENT.read(content, f"contents[{i}]."), f"contents[{i}].")

    def _read_content(self, content: dict[str, Any], where: str) -> None:
        """A model's turn may have come in pieces, as Google's client keeps a stream's: they are one."""
        name = optional(content, "role", str, where)
        if name == "model":
            parts = list(self._model_parts(content, where))
            if self.messages and self.messages[-1].role is Role.ASSISTANT:
                parts = [*self.messages.pop().parts, *parts]
            if whole := joined(parts):
                self.messages.append(form.Message(Role.ASSISTANT, whole))
        elif name not in _ROLES:
            raise invalid(where + "role", "expected one of 'user' and 'model'")
        elif given := tuple(self._user_parts(content, where)):
            self.messages.append(form.Message(Role.USER, given))

    def _model_parts(self, content: dict[str, Any], where: str) -> Iterator[form.Part]:
        for part, path in _parts(content, where):
            self.extras += _unplaced(part, _PLACED_PART, path)
            if (call := optional(part, "functionCall", dict, path)) is not None:
                required(call, "name", str, f"{path}functionCall.")
                optional(call, "args", dict, f"{path}functionCall.")
                optional(call, "id", str, f"{path}functionCall.")
            for said in read_part(part, f"call_{self.calls}"):
                if isinstance(said, form.ToolCall):
                    self.calls += 1
                    self.open_calls.append((said.id, said.name))
                yield said

    def _user_parts(self, content: dict[str, Any], where: str) -> Iterator[form.Part]:
        for part, path in _parts(content, where):
            self.extras += _unplaced(part, _PLACED_USER_PART, path)
            if text := optional(part, "text", str, path):
                yield form.Text(text)
            yield from self._media(part, path)
            if part.get("functionResponse") is not None:
                yield self._tool_result(message(part, "functionResponse", FUNCTION_RESPONSE, path), path)

    def _media(self, part: dict[str, Any], where: str) -> Iterator[form.Part]:
        if part.get("inlineData") is not None:
            blob = message(part, "inlineData", BLOB, where)
            if (media := _blob(blob, f"{where}inlineData.")) is not None:
                yield media
            else:
                self.extras.append(f"{where}inlineData")
        if part.get("fileData") is not None:
            file = message(part, "fileData", FILE, where)
            url: str = required(file, "fileUri", str, f"{where}fileData.")
            kind = optional(file, "mimeType", str, f"{where}fileData.") or ""
            yield form.Image(url=url) if kind.startswith("image/") else form.Document(url=url, media_type=kind or None)

    def _tool_result(self, given: dict[str, Any], where: str) -> form.ToolResult:
        where = f"{where}functionResponse."
        name: str = required(given, "name", str, where)
        response = optional(given, "response", dict, where) or {}
        text, is_error = _result(response)
        media = [
            found
            for i, part in enumerate(messages(given, "parts", where))
            for found in self._media(PART.read(part, f"{where}parts[{i}]."), f"{where}parts[{i}].")
        ]
        said = (form.Text(text),) if text else ()
        return form.ToolResult(self._answered(optional(given, "id", str, where), name), (*said, *media), is_error)

    def _answered(self, call_id: str | None, name: str) -> str:
        """The call that a function's response answers: by its id, else the first open one of its name."""
        matching = [call for call in self.open_calls if call[0] == call_id] if call_id else []
        matching = matching or [call for call in self.open_calls if call[1] == name]
        if matching:
            self.open_calls.remove(matching[0])
            return matching[0][0]
        return call_id or name


def _parts(content: dict[str, Any], where: str) -> Iterator[tuple[dict[str, Any], str]]:
    for i, part in enumerate(messages(content, "parts", where)):
        path = f"{where}parts[{i}]."
        yield PART.read(part, path), path


def _blob(blob: dict[str, Any], where: str) -> form.Part | None:
    """None for what has no place: video, and files that are neither PDF nor text."""
    media_type: str = required(blob, "mimeType", str, where)
    data = _standard(required(blob, "data", str, where))
    kind, _, subtype = media_type.partition(";")[0].strip().lower().partition("/")
    name = optional(blob, "displayName", str, where)
    if kind == "image":
        return form.Image(data=data, media_type=f"image/{subtype}")
    if kind == "audio":
        return form.Audio(data, _AUDIO_FORMATS.get(subtype, subtype))
    if (kind, subtype) == ("application", "pdf"):
        return form.Document(data=data, media_type="application/pdf", name=name)
    if kind == "text" or (kind, subtype) == ("application", "json"):
        return form.Document(text=_decoded(data, where + "data"), name=name)
    return None


def _standard(data: str) -> str:
    """Google's Python client sends base64 in the alphabet for addresses, which other providers do not read."""
    return data.translate(_FROM_URL_SAFE) + "=" * (-len(data) % 4)


def _decoded(data: str, where: str) -> str:
    try:
        return base64.b64decode(data, validate=True).decode()
    except (binascii.Error, ValueError) as error:
        raise invalid(where, "expected base64 of UTF-8") from error


def _result(response: dict[str, Any]) -> tuple[str, bool]:
    """A function's result as text: its text where there is nothing else, else the JSON."""
    for name in (*_RESULTS, "error"):
        if list(response) == [name] and isinstance(response[name], str):
            return response[name], name == "error"
    return dumps(response).decode(), list(response) == ["error"]


# The other fields -----------------------------------------------------------------------------------------------------


def _sampled(config: Mapping[str, Any], request: form.Request) -> form.Request:
    return replace(
        request,
        cap=optional(config, "maxOutputTokens", int, _CONFIG),
        choices=optional(config, "candidateCount", int, _CONFIG),
        temperature=number(config, "temperature", _CONFIG),
        top_p=number(config, "topP", _CONFIG),
        top_k=_whole_number(config, "topK"),
        stop=strings(config, "stopSequences", _CONFIG),
        seed=optional(config, "seed", int, _CONFIG),
        presence_penalty=number(config, "presencePenalty", _CONFIG),
        frequency_penalty=number(config, "frequencyPenalty", _CONFIG),
        logprobs=optional(config, "responseLogprobs", bool, _CONFIG) or False,
        top_logprobs=optional(config, "logprobs", int, _CONFIG),
    )


def _whole_number(config: Mapping[str, Any], name: str) -> int | None:
    """Google's client sends 40.0."""
    value = number(config, name, _CONFIG)
    if value is not None and not float(value).is_integer():
        raise wrong_type(_CONFIG + name, "an integer", value)
    return None if value is None else int(value)


def _tools(fields: Mapping[str, Any], extras: list[str]) -> Iterator[form.Tool]:
    for i, given in enumerate(messages(fields, "tools")):
        tool = TOOL.read(given, f"tools[{i}].")
        extras += _unplaced(tool, frozenset({"functionDeclarations"}), f"tools[{i}].")
        for j, declared in enumerate(messages(tool, "functionDeclarations", f"tools[{i}].")):
            where = f"tools[{i}].functionDeclarations[{j}]."
            declaration = _DECLARATION.read(declared, where)
            extras += _unplaced(declaration, _PLACED_DECLARATION, where)
            yield form.Tool(
                required(declaration, "name", str, where),
                optional(declaration, "description", str, where) or None,
                _schema(declaration, "parameters", "parametersJsonSchema", where),
            )


def _schema(fields: Mapping[str, Any], googles: str, standard: str, where: str) -> dict[str, Any] | None:
    openapi, schema = optional(fields, googles, dict, where), optional(fields, standard, dict, where)
    if openapi is not None and schema is not None:
        raise invalid(where + standard, f"given beside '{googles}'")
    return schema if openapi is None else to_json_schema(openapi)


def _tool_choice(fields: Mapping[str, Any], extras: list[str]) -> form.ToolChoice | None:
    config = message(fields, "toolConfig", _TOOL_CONFIG)
    extras += _unplaced(config, frozenset({"functionCallingConfig"}), "toolConfig.")
    if config.get("functionCallingConfig") is None:
        return None
    where = "toolConfig.functionCallingConfig."
    calling = message(config, "functionCallingConfig", _CALLING, "toolConfig.")
    extras += _unplaced(calling, frozenset({"mode", "allowedFunctionNames"}), where)
    mode = (optional(calling, "mode", str, where) or "AUTO").upper()
    names = strings(calling, "allowedFunctionNames", where)
    match mode, names:
        case "AUTO" | "VALIDATED" | "MODE_UNSPECIFIED", _:
            return form.ToolChoice(Choose.AUTO, names)
        case "NONE", _:
            return form.ToolChoice(Choose.NONE)
        case "ANY", (_,):
            return form.ToolChoice(Choose.NAMED, names)
        case "ANY", _:
            return form.ToolChoice(Choose.REQUIRED, names)
    raise invalid(where + "mode", "expected one of 'AUTO', 'ANY', 'NONE' and 'VALIDATED'")


def _format(config: Mapping[str, Any], extras: list[str]) -> form.Format | None:
    kind = optional(config, "responseMimeType", str, _CONFIG)
    schema = _schema(config, "responseSchema", "responseJsonSchema", _CONFIG)
    if kind not in (None, "", "text/plain", "application/json"):
        extras.append(_CONFIG + "responseMimeType")
    elif kind == "application/json" or schema is not None:
        return form.Format(Output.JSON) if schema is None else form.Format(Output.SCHEMA, schema)
    return None


def _reasoning(config: Mapping[str, Any]) -> form.Reasoning | None:
    where = _CONFIG + "thinkingConfig."
    thinking = message(config, "thinkingConfig", THINKING, _CONFIG)
    level = (optional(thinking, "thinkingLevel", str, where) or "").lower().removeprefix("thinking_level_")
    budget = optional(thinking, "thinkingBudget", int, where)
    if level not in ("", "unspecified") and level not in _LEVELS:
        raise invalid(where + "thinkingLevel", "expected one of 'minimal', 'low', 'medium' and 'high'")
    if budget is not None and budget < -1:
        raise invalid(where + "thinkingBudget", "expected -1 or more")
    reasoning = form.Reasoning(
        effort=level if level in _LEVELS else None,
        budget_tokens=None if budget == -1 else budget,  # -1: as the model likes
        visible=optional(thinking, "includeThoughts", bool, where),
    )
    return None if reasoning == form.Reasoning() else reasoning
