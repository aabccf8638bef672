"""How a Claude is told to think, which changed twice: by a budget, by a budget or an effort, by an effort alone.

https://platform.claude.com/docs/en/build-with-claude/{extended-thinking,adaptive-thinking,effort}.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from extproc.form import Reasoning

MIN_BUDGET_TOKENS = 1_024

# Efforts in tokens, and back. A budget that is made up leaves at least half of the bound to the answer.
_BUDGETS = {"minimal": 1_024, "low": 2_048, "medium": 8_192, "high": 16_384, "xhigh": 32_768}
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "xhigh"}

# `claude-3-7-sonnet-20250219`, `claude-opus-4-20250514`, `us.anthropic.claude-opus-4-5@20251101`, `claude-sonnet-5`.
_NAME = re.compile(r"claude-(?:(?P<line>[a-z]+)-)?(?P<major>\d{1,2})(?:[-.](?P<minor>\d{1,2}))?(?!\d)")
_ALWAYS_THINKING = ("fable", "mythos")
_NEWEST = (99, 0)


@dataclass(frozen=True, slots=True)
class Generation:
    """What a model accepts. A name that is not understood is taken for a new model, which accepts the least."""

    version: tuple[int, int]
    line: str | None = None

    @property
    def samples(self) -> bool:
        """Whether it takes a temperature and the like."""
        return self.version < (4, 7)

    @property
    def samples_one_way(self) -> bool:
        """Whether it refuses a temperature beside `top_p`."""
        return self.version >= (4, 5) or (self.version == (4, 1) and self.line == "opus")

    @property
    def thinks(self) -> bool:
        return self.version >= (3, 7)

    @property
    def by_budget(self) -> bool:
        return (3, 7) <= self.version <= (4, 6)

    @property
    def by_effort(self) -> bool:
        return self.version >= (4, 6)

    @property
    def may_stop_thinking(self) -> bool:
        return self.thinks and self.line not in _ALWAYS_THINKING

    @property
    def follows_schemas(self) -> bool:
        """Whether tools may be `strict`."""
        return self.version >= (4, 5)


def generation(model: str) -> Generation:
    """By the model's name."""
    found = _NAME.search(model)
    if found is None:
        return Generation(_NEWEST, next((line for line in _ALWAYS_THINKING if line in model), None))
    return Generation((int(found["major"]), int(found["minor"] or 0)), found["line"])


@dataclass(frozen=True, slots=True)
class Thoughts:
    """The fields of a request about thinking. `on`: it will think, and then takes neither temperature nor forced tools.

    `needs_thoughts`: a turn that goes on after a tool's result must begin with the thoughts that led to the call.
    """

    thinking: dict[str, Any] | None = None
    effort: str | None = None
    on: bool = False
    needs_thoughts: bool = False


def thoughts(reasoning: Reasoning | None, model: str, max_tokens: int) -> Thoughts:
    """What to send for `reasoning`. Less than Anthropic's least budget below `max_tokens` is no thinking."""
    which = generation(model)
    if reasoning is None or not which.thinks:
        return Thoughts()
    if reasoning.effort == "none" or reasoning.budget_tokens == 0:
        return Thoughts({"type": "disabled"}) if which.may_stop_thinking else Thoughts(effort="low")
    display = {} if reasoning.visible is None else {"display": "summarized" if reasoning.visible else "omitted"}
    if which.by_budget and (reasoning.budget_tokens is not None or not which.by_effort):
        budget_tokens = _budget(reasoning, max_tokens)
        if budget_tokens < MIN_BUDGET_TOKENS:
            return Thoughts()
        return Thoughts(
            {"type": "enabled", "budget_tokens": budget_tokens, **display}, None, on=True, needs_thoughts=True
        )
    return Thoughts({"type": "adaptive", **display}, _effort(reasoning, which), on=True)


def _budget(reasoning: Reasoning, max_tokens: int) -> int:
    if reasoning.budget_tokens is not None:
        return min(max(reasoning.budget_tokens, MIN_BUDGET_TOKENS), max_tokens - 1)
    return min(_BUDGETS.get(reasoning.effort or "medium", _BUDGETS["medium"]), max_tokens // 2)


def _effort(reasoning: Reasoning, which: Generation) -> str | None:
    """In words; the widest effort is younger than efforts are."""
    effort = reasoning.effort
    if effort is None and reasoning.budget_tokens is not None:
        tokens = reasoning.budget_tokens
        effort = next((word for word, budget in _BUDGETS.items() if tokens <= budget), "xhigh")
    said = _EFFORTS.get(effort) if effort is not None else None
    return "high" if said == "xhigh" and which.version < (4, 7) else said
