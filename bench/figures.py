"""What was measured: every round's value of every figure of every gateway."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field


def quantile(ordered: list[float], part: float) -> float:
    """Of sorted values."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * part))]


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some rounds, and the least and the most of them."""

    median: float
    least: float
    most: float

    def __str__(self) -> str:
        if self.least == self.most:
            return _short(self.median)
        return f"{_short(self.median)} ({_short(self.least)} – {_short(self.most)})"


def _short(value: float) -> str:
    """Three digits that count, and no more after the point than needed."""
    decimals = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{decimals}f}"


@dataclass
class Figures:
    """By figure, gateway and round. A figure's name may end with the process that it is of: `cpu_event/Envoy`."""

    values: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)  # (part, gateway): the first reason

    def note(self, figure: str, gateway: str, number: int, value: float) -> None:
        self.values.setdefault((figure, gateway), {})[number] = value

    def spread(self, figure: str, gateway: str) -> Spread | None:
        """None where it was not measured."""
        return _spread(list(self.values.get((figure, gateway), {}).values()))

    def median(self, figure: str, gateway: str) -> float | None:
        spread = self.spread(figure, gateway)
        return None if spread is None else spread.median

    def added(self, figure: str, gateway: str, base: str) -> Spread | None:
        """What a gateway adds to another, by the rounds in which both were measured."""
        mine, theirs = self.values.get((figure, gateway), {}), self.values.get((figure, base), {})
        return _spread([mine[number] - theirs[number] for number in mine if number in theirs])

    def ratio(self, figure: str, base: str, gateway: str) -> Spread | None:
        """One figure over another of the same gateway, round by round."""
        mine, theirs = self.values.get((figure, gateway), {}), self.values.get((base, gateway), {})
        return _spread([mine[number] / theirs[number] for number in mine if theirs.get(number)])


def _spread(values: list[float]) -> Spread | None:
    return Spread(statistics.median(values), min(values), max(values)) if values else None
