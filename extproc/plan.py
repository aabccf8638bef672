"""What the gate decides of a request before it holds anything: where it goes, at what price, under which budgets."""

from __future__ import annotations

from dataclasses import dataclass

from extproc import budget
from extproc.dialects.dialect import Dialect
from extproc.gate import Gate
from extproc.intake import parse_json
from extproc.models import traits
from extproc.pricing import Price
from extproc.records import Budget, Call, ModelTraits, Principal, Route, Target
from extproc.routing import route, rule_of


@dataclass(frozen=True, slots=True)
class Plan:
    """One admitted request. `cap` bounds one choice's output tokens: the least of caller's, model's and policy's.

    `raw` is the body as the caller sent it.
    """

    call: Call
    raw: bytes
    route: Route
    target: Target
    traits: ModelTraits
    price: Price
    cap: int
    budgets: tuple[Budget, ...]

    @property
    def cuttable(self) -> bool:
        """Whether the answer can be ended at the limit. A whole one cannot, nor what is billed and cannot be counted:
        thoughts that nobody sees, and sound.
        """
        speaks = "audio" in (self.call.body.get("modalities") or ())
        return self.call.stream and not self.traits.reasoning and not speaks

    @property
    def sent_cap(self) -> int | None:
        """The cap to tell the provider: what is held for must be enforced; a cuttable stream needs none."""
        return self.cap if not self.cuttable or self.call.cap is not None else None


def make_plan(gate: Gate, dialect: Dialect, principal: Principal, body: bytes, forced_provider: str | None) -> Plan:
    """Parse and decide. Raises BadRequest, naming the field, and what routing and pricing raise."""
    call = dialect.read_call(parse_json(body))
    way = route(gate.policy, call.model, forced_provider, gate.providers())
    target = way.targets[0]
    known = traits(target.provider, target.model, rule_of(gate.policy, way))
    return Plan(
        call=call,
        raw=body,
        route=way,
        target=target,
        traits=known,
        price=gate.prices.price(target, call.service_tier),
        cap=min(call.cap or known.max_output_tokens, known.max_output_tokens),
        budgets=budget.applicable(gate.policy.budgets, principal, call.model),
    )
