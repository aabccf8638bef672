"""Google's own kind of schema, a part of OpenAPI 3.0, as the JSON Schema that every other provider takes.

https://ai.google.dev/api/caching#Schema: types in capitals, `nullable`, integers as text, either spelling of names.
The other way is not needed: Google takes JSON Schema in `parametersJsonSchema` and `responseJsonSchema`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc.dialects.gemini.names import snake

_INTEGERS = ("minItems", "maxItems", "minProperties", "maxProperties", "minLength", "maxLength")
_SCHEMAS = ("items", "additionalProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "defs", "$defs")
_HINTS = frozenset(("nullable", "propertyOrdering", "example"))  # of no other provider's
_CAMEL = {snake(name): name for name in (*_INTEGERS, *_SCHEMAS, *_LISTS, *_MAPS, *_HINTS)}


def to_json_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` as JSON Schema. What is one already stays as it is; what is no schema is left as it is."""
    named = {_CAMEL.get(name, name): value for name, value in schema.items()}
    converted = {name: _convert(name, value) for name, value in named.items() if name not in _HINTS}
    return _nullable(converted) if named.get("nullable") is True else converted


def _convert(name: str, value: Any) -> Any:
    if name == "type":
        return value.lower() if isinstance(value, str) else value
    if name in _INTEGERS and isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    if name in _SCHEMAS and isinstance(value, dict):
        return to_json_schema(value)
    if name in _LISTS and isinstance(value, list):
        return [to_json_schema(one) if isinstance(one, dict) else one for one in value]
    if name in _MAPS and isinstance(value, dict):
        return {key: to_json_schema(one) if isinstance(one, dict) else one for key, one in value.items()}
    return value


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    kind = schema.get("type")
    if not isinstance(kind, str):
        choices = schema.get("anyOf")
        return {**schema, "anyOf": [*choices, {"type": "null"}]} if isinstance(choices, list) else schema
    nullable = {**schema, "type": [kind, "null"]}
    if isinstance(schema.get("enum"), list):
        nullable["enum"] = [*schema["enum"], None]
    return nullable
