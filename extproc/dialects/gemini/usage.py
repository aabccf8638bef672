"""Gemini's `usageMetadata`, both ways. In a stream it is cumulative.

`promptTokenCount` includes what was cached, and not what Google's own tools read (`toolUsePromptTokenCount`, billed as
prompt). Thoughts are beside `candidatesTokenCount`, and billed as output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from extproc.dialects.fields import count, dicts
from extproc.records import Usage

# Figures of other providers that Google has no field for.
CACHE_WRITES = "cacheWriteTokenCount"
WEB_SEARCHES = "webSearchCount"

_AUDIO = ("AUDIO", 4)  # enumerations may come as numbers
_TRAFFIC = {
    1: "standard",
    2: "provisioned_throughput",
    "ON_DEMAND": "standard",
    "ON_DEMAND_FLEX": "flex",
    "ON_DEMAND_PRIORITY": "priority",
}


def read(answer: Mapping[str, Any], web_searches: int | None = None) -> Usage | None:
    """The figures of an answer or of an event, None where it has none. Zeros are left out of Google's JSON."""
    figures = answer.get("usageMetadata")
    if not isinstance(figures, dict):
        return None
    given, total = count(figures, "promptTokenCount"), count(figures, "totalTokenCount")
    if given is None and total is None:
        return None
    prompt = (given or 0) + (count(figures, "toolUsePromptTokenCount") or 0)
    thoughts = count(figures, "thoughtsTokenCount") or 0
    completion = (count(figures, "candidatesTokenCount") or 0) + thoughts
    unnamed = max(0, (total or 0) - prompt - completion)  # thoughts that are in the total only
    completion += unnamed
    spoken = _audio(figures, "promptTokensDetails") + _audio(figures, "toolUsePromptTokensDetails")
    searches = count(figures, WEB_SEARCHES)
    return Usage(
        prompt=prompt,
        completion=completion,
        cached_prompt=min(count(figures, "cachedContentTokenCount") or 0, prompt),
        reasoning=thoughts or unnamed,
        audio_prompt=min(spoken, prompt),
        audio_completion=min(_audio(figures, "candidatesTokensDetails"), completion),
        cache_write_prompt=min(count(figures, CACHE_WRITES) or 0, prompt),
        web_searches=web_searches if searches is None else searches,
    )


def _audio(figures: dict[str, Any], name: str) -> int:
    return sum(count(one, "tokenCount") or 0 for one in dicts(figures.get(name)) if one.get("modality") in _AUDIO)


def read_tier(answer: Mapping[str, Any]) -> str | None:
    """`serviceTier` of the Gemini API, `trafficType` of Vertex AI."""
    figures = answer.get("usageMetadata")
    if not isinstance(figures, dict):
        return None
    tier = figures.get("serviceTier")
    if isinstance(tier, str) and tier:
        return tier.lower()
    traffic = figures.get("trafficType")
    if not isinstance(traffic, (str, int)) or traffic in (0, "TRAFFIC_TYPE_UNSPECIFIED"):
        return None
    return _TRAFFIC.get(traffic) or str(traffic).lower()


def write(usage: Usage, service_tier: str | None) -> dict[str, Any]:
    """The same figures, as `read` and `read_tier` give them back."""
    figures: dict[str, Any] = {
        "promptTokenCount": usage.prompt,
        "cachedContentTokenCount": usage.cached_prompt,
        "candidatesTokenCount": max(0, usage.completion - usage.reasoning),
        "thoughtsTokenCount": usage.reasoning,
        "totalTokenCount": usage.prompt + usage.completion,
        CACHE_WRITES: usage.cache_write_prompt,
    }
    figures = {name: value for name, value in figures.items() if value or name in _ALWAYS}
    if usage.web_searches is not None:
        figures[WEB_SEARCHES] = usage.web_searches
    if usage.audio_prompt:
        figures["promptTokensDetails"] = _details(usage.prompt, usage.audio_prompt)
    if usage.audio_completion:
        figures["candidatesTokensDetails"] = _details(usage.completion - usage.reasoning, usage.audio_completion)
    if service_tier is not None:
        figures["serviceTier"] = service_tier
    return figures


_ALWAYS = ("promptTokenCount", "candidatesTokenCount", "totalTokenCount")


def _details(tokens: int, audio: int) -> list[dict[str, Any]]:
    text = [{"modality": "TEXT", "tokenCount": tokens - audio}] if tokens > audio else []
    return [*text, {"modality": "AUDIO", "tokenCount": audio}]
