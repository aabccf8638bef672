"""What the gate tells the targets of a call: where it may go, and what it is. Pure.

It travels beside the request, in Envoy's metadata: each attempt reads it, on whichever worker, and no provider sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from extproc.dialects.dialect import Address
from extproc.records import Target


class Leg(NamedTuple):
    """One place that an attempt may go to. `cap` bounds each choice's output tokens there; None where nothing must."""

    target: Target
    cap: int | None


@dataclass(frozen=True, slots=True)
class Itinerary:
    """One call, in the order of its attempts.

    `dialect` is the caller's, by name. `body_bytes` is the length of the body as every attempt gets it, and `written`
    says that it is the first leg's already: that one may go on as it is. `drop` is the policy's word on what a target
    cannot do.
    """

    request_id: str
    dialect: str
    address: Address
    stream: bool
    legs: tuple[Leg, ...]
    body_bytes: int
    written: bool
    drop: bool

    def leg(self, provider: str, attempt: int) -> int | None:
        """The number of the leg that an attempt (from 1) at `provider` is; None where the call has no business there.

        Envoy's order decides: it leaves out who does not answer, so that the attempt's number says only which of two
        legs with one provider is meant.
        """
        return pick([leg.target for leg in self.legs], provider, attempt)

    def encode(self) -> str:
        """As one short text."""
        legs = [(leg.target.provider, leg.target.model, leg.cap) for leg in self.legs]
        address = (self.address.model, self.address.stream, self.address.array)
        return orjson.dumps(
            (self.request_id, self.dialect, address, self.stream, legs, self.body_bytes, self.written, self.drop)
        ).decode()

    @classmethod
    def decode(cls, text: str) -> Itinerary:
        """What `encode` wrote. Raises ValueError for anything else."""
        try:
            request_id, dialect, address, stream, legs, body_bytes, written, drop = orjson.loads(text)
            return cls(
                request_id,
                dialect,
                Address(*address),
                stream,
                tuple(Leg(Target(provider, model), cap) for provider, model, cap in legs),
                body_bytes,
                written,
                drop,
            )
        except TypeError as error:
            raise ValueError("not an itinerary") from error


def pick(targets: Sequence[Target], provider: str, attempt: int) -> int | None:
    """Which of `targets` an attempt (from 1) at `provider` means. The gate and every target must say the same."""
    if attempt <= len(targets) and targets[attempt - 1].provider == provider:
        return attempt - 1
    return next((number for number, target in enumerate(targets) if target.provider == provider), None)
