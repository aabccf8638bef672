"""Envoy's configuration against envoy-data-plane's types. Envoy's own validation is the judge; this says on which line.

The types' own `from_dict` is not used: it knows no lines, stops at the first problem, and misreads names like
`consecutive_5xx`.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import yaml

_BOOTSTRAP = "envoy.config.bootstrap.v3.Bootstrap"
_ANY_PREFIX = "type.googleapis.com/"
_WELL_KNOWN = "google.protobuf"
_FREE_FORM = ("Struct", "Value", "ListValue")
_NOTHING = yaml.MappingNode("tag:yaml.org,2002:map", [])  # an empty file
_DURATION = re.compile(r"-?\d+(\.\d{1,9})?s")
_INTEGER = re.compile(r"-?\d+")
_CAMEL = re.compile(r"(?<=[a-z0-9])[A-Z]")


def problems(text: str) -> list[str]:
    """Unknown fields and wrong values as `line N: path: what`. Raises ImportError without envoy-data-plane."""
    root = yaml.compose(text, Loader=yaml.SafeLoader) or _NOTHING
    found: dict[tuple[int, str], str] = {}  # a block that aliases repeat is one node: it is named at its first place
    for node, path, what in _message(root, _class(_BOOTSTRAP), ""):
        found.setdefault((id(node), what), f"line {node.start_mark.line + 1}: {path}: {what}")
    return list(found.values())


def duplicates(text: str) -> list[str]:
    """Names that occur twice in one object, in the same form: Envoy takes one of them, and says nothing."""
    found: set[tuple[int, str]] = set()  # an alias leads to the same lines again
    pending: list[yaml.Node] = [yaml.compose(text, Loader=yaml.SafeLoader) or _NOTHING]
    while pending:
        node = pending.pop()
        if isinstance(node, yaml.SequenceNode):
            pending.extend(node.value)
        elif isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                if key.value in seen:
                    found.add((key.start_mark.line + 1, key.value))
                seen.add(key.value)
                pending.append(value)
    return [f"line {line}: {name}: it occurs twice" for line, name in sorted(found)]


_Problem = tuple[yaml.Node, str, str]


def _class(name: str) -> Any:
    """A message's class by its full protobuf name. Raises ImportError or AttributeError for one that is unknown."""
    package, _, message = name.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic's, about the generated code
        return getattr(import_module(f"envoy_data_plane.{package}"), message)


def _message(node: yaml.Node, kind: Any, path: str) -> Iterator[_Problem]:
    if kind.__module__.endswith(_WELL_KNOWN):
        yield from _well_known(node, kind, path)
        return
    if not isinstance(node, yaml.MappingNode):
        yield node, path, "must be an object"
        return
    meta, kinds = kind._betterproto.meta_by_field_name, kind._betterproto.cls_by_field
    for key, value in node.value:
        name = _CAMEL.sub(lambda match: f"_{match[0].lower()}", key.value)
        name = name if name in meta else f"{name}_"  # as in `from_`: a word of Python's
        where = f"{path}.{key.value}" if path else key.value
        if key.value == "@type":
            continue
        if name not in meta:
            yield key, where, f"there is no such field in {kind.__name__}"
        elif meta[name].map_meta is not None:
            yield from _map(value, meta[name].map_meta[1], kinds[f"{name}.value"], where)
        elif meta[name].repeated:
            yield from _list(value, meta[name], kinds[name], where)
        else:
            yield from _value(value, meta[name], kinds[name], where)


def _map(node: yaml.Node, meta: Any, kind: Any, path: str) -> Iterator[_Problem]:
    if not isinstance(node, yaml.MappingNode):
        yield node, path, "must be an object"
        return
    for key, value in node.value:
        yield from _value(value, meta, kind, f"{path}[{key.value}]")


def _list(node: yaml.Node, meta: Any, kind: Any, path: str) -> Iterator[_Problem]:
    if not isinstance(node, yaml.SequenceNode):
        yield node, path, "must be a list"
        return
    for position, value in enumerate(node.value):
        yield from _value(value, meta, kind, f"{path}[{position}]")


def _value(node: yaml.Node, meta: Any, kind: Any, path: str) -> Iterator[_Problem]:
    if node.tag == "tag:yaml.org,2002:null":
        return  # as good as absent, in protobuf's JSON
    if meta.proto_type == "message":
        yield from _message(node, meta.unwrap() if meta.unwrap else kind, path)
    elif not isinstance(node, yaml.ScalarNode):
        yield node, path, "must be a single value"
    elif meta.proto_type == "enum":
        names = {member.proto_name or member.name for member in kind}
        if node.value not in names and not _INTEGER.fullmatch(node.value):
            yield node, path, f"must be one of {', '.join(sorted(names))}, not {node.value}"
    elif (expected := _expected(node, meta.proto_type)) is not None:
        yield node, path, f"must be {expected}, not {node.value or 'nothing'}"


def _expected(node: yaml.ScalarNode, proto_type: str) -> str | None:
    """What a plain value should have been, or None where it is."""
    tag = node.tag.rpartition(":")[2]
    if proto_type == "bool":
        return None if tag == "bool" else "true or false"
    if proto_type in ("string", "bytes"):
        return None if tag == "str" else "a text (in quotes)"
    if proto_type in ("double", "float"):
        return None if tag in ("int", "float") else "a number"
    if not _INTEGER.fullmatch(node.value):
        return "a whole number"
    return "a whole number from 0" if proto_type.startswith("u") and node.value.startswith("-") else None


def _well_known(node: yaml.Node, kind: Any, path: str) -> Iterator[_Problem]:
    if kind.__name__ in _FREE_FORM:
        return
    if kind.__name__ == "Any":
        yield from _any(node, path)
    elif kind.__name__ == "Duration":
        if not isinstance(node, yaml.ScalarNode) or not _DURATION.fullmatch(node.value):
            yield node, path, "must be a duration, such as 0.5s"
    elif "value" in (meta := kind._betterproto.meta_by_field_name):  # BoolValue, UInt32Value and so on
        yield from _value(node, meta["value"], None, path)


def _any(node: yaml.Node, path: str) -> Iterator[_Problem]:
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    url = next((value for key, value in pairs if key.value == "@type"), None)
    if url is None:
        yield node, path, 'must have a "@type"'
        return
    try:
        kind = _class(url.value.removeprefix(_ANY_PREFIX))
    except (ImportError, AttributeError):
        yield url, path, f"there is no type {url.value}"
        return
    yield from _message(node, kind, path)
