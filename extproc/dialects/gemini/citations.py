"""What an answer rests on: Gemini's `groundingMetadata` and `citationMetadata`, both ways.

Google's offsets are bytes of UTF-8, those of the canonical form characters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from extproc.dialects.fields import count, dicts
from extproc.form import Citation

_SOURCES = ("web", "retrievedContext", "maps", "image")


def read_citations(candidate: Mapping[str, Any], text: str) -> Iterator[Citation]:
    """The citations of a candidate whose text is `text`. A source that supports no passage is named once."""
    grounding = candidate.get("groundingMetadata")
    if isinstance(grounding, dict):
        yield from _read_grounding(grounding, text)
    attributed = candidate.get("citationMetadata")
    if isinstance(attributed, dict):  # `citationSources` in the Gemini API, `citations` in Vertex AI
        for name in ("citationSources", "citations"):
            for source in dicts(attributed.get(name)):
                start, end = _span(source, text)
                yield Citation(_text(source, "uri"), _text(source, "title"), None, start, end)


def _read_grounding(grounding: dict[str, Any], text: str) -> Iterator[Citation]:
    sources = [_source(chunk) for chunk in dicts(grounding.get("groundingChunks"))]
    supporting: set[int] = set()
    for support in dicts(grounding.get("groundingSupports")):
        segment = support.get("segment")
        segment = segment if isinstance(segment, dict) else {}
        start, end = _span(segment, text)
        indices = support.get("groundingChunkIndices")
        for index in indices if isinstance(indices, list) else ():
            if type(index) is int and 0 <= index < len(sources):
                supporting.add(index)
                yield Citation(*sources[index], _text(segment, "text"), start, end)
    yield from (Citation(*source) for index, source in enumerate(sources) if index not in supporting)


def _source(chunk: dict[str, Any]) -> tuple[str | None, str | None]:
    for kind in _SOURCES:
        source = chunk.get(kind)
        if isinstance(source, dict):
            return _text(source, "uri") or _text(source, "sourceUri"), _text(source, "title")
    return None, None


def _span(segment: dict[str, Any], text: str) -> tuple[int | None, int | None]:
    """Characters from bytes; nothing where the offsets are not of this text. A start of 0 is left out."""
    whole, start, end = text.encode("utf-8", "replace"), count(segment, "startIndex") or 0, count(segment, "endIndex")
    if end is None or not start < end <= len(whole) or segment.get("partIndex"):
        return None, None
    quote = _text(segment, "text")
    if quote is not None and whole[start:end] != quote.encode("utf-8", "replace"):
        return None, None
    first = len(whole[:start].decode("utf-8", "ignore"))
    return first, first + len(whole[start:end].decode("utf-8", "ignore"))


def _text(fields: Mapping[str, Any], name: str) -> str | None:
    value = fields.get(name)
    return value if isinstance(value, str) and value else None


def write_grounding(cited: Sequence[tuple[Citation, str]]) -> dict[str, Any]:
    """The same as members of a candidate; none where there is nothing. Each citation comes with its text."""
    chunks: list[dict[str, Any]] = []
    supports: list[dict[str, Any]] = []
    for citation, text in cited:
        source = {"uri": citation.url, "title": citation.title}
        kind = "retrievedContext" if citation.url is None else "web"
        chunk = {kind: {name: value for name, value in source.items() if value is not None}}
        if chunk not in chunks:
            chunks.append(chunk)
        if segment := _segment(citation, text):
            supports.append({"segment": segment, "groundingChunkIndices": [chunks.index(chunk)]})
    if not chunks:
        return {}
    return {"groundingMetadata": {"groundingChunks": chunks, "groundingSupports": supports}}


def _segment(citation: Citation, text: str) -> dict[str, Any]:
    """A passage by its offsets, or by its words alone."""
    start, end = citation.start, citation.end
    if start is None or end is None or not 0 <= start < end <= len(text):
        return {} if citation.quote is None else {"text": citation.quote}
    first = len(text[:start].encode("utf-8", "replace"))
    passage = text[start:end]
    return {"startIndex": first, "endIndex": first + len(passage.encode("utf-8", "replace")), "text": passage}
