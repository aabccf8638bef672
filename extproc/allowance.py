"""How far a hold reaches: what one request has used, what it may still use, and when to ask for more. Pure."""

from __future__ import annotations

from extproc.pricing import Price
from extproc.records import NOTHING, Amount

UNBOUNDED = 2**53 - 1
MTOK = 1_000_000


class Allowance:
    """Turns a hold in nano-USD and tokens into one number, the output tokens it covers: a chunk then costs a compare.

    `prompt_tokens` is the estimate that the hold was made with; `cap` bounds the output tokens of all choices.
    `web_searches` are held for from the start.
    """

    __slots__ = ("_base_nanousd", "_held", "_nanousd_per_mtok", "cap", "covered", "lease_tokens", "prompt_tokens")

    def __init__(self, price: Price, prompt_tokens: int, cap: int, lease_tokens: int, web_searches: int = 0) -> None:
        self.prompt_tokens = prompt_tokens
        self.cap = cap
        self.lease_tokens = lease_tokens
        self._base_nanousd = price.hold_cost(prompt_tokens, 0, web_searches)
        self._nanousd_per_mtok = price.rates(prompt_tokens).dearest_output
        self._held = NOTHING
        self.covered = 0

    def used(self, tokens: int) -> Amount:
        """What the request has cost with so many output tokens, rounded up."""
        return Amount(self._base_nanousd - (-tokens * self._nanousd_per_mtok // MTOK), self.prompt_tokens + tokens)

    def lease(self, tokens: int) -> Amount:
        """The hold to ask for when so many output tokens have come: two leases ahead, and not past the cap.

        Two, so that the next can be asked for while one is still left and the stream does not wait for Redis. A stream
        that is past its cap already (its provider takes no notice, or the count runs high) goes on by leases.
        """
        ahead = tokens + 2 * self.lease_tokens
        return self.used(min(ahead, self.cap) if tokens <= self.cap else ahead)

    def whole(self) -> Amount:
        """The hold of a request that cannot be cut, or that may think unseen: all it may ever cost."""
        return self.used(self.cap)

    def grant(self, held: Amount) -> None:
        """Take note of the hold's total, and work out how many output tokens it covers."""
        self._held = held
        by_tokens = held.tokens - self.prompt_tokens
        by_money = UNBOUNDED
        if self._nanousd_per_mtok:
            by_money = (held.nanousd - self._base_nanousd) * MTOK // self._nanousd_per_mtok
        self.covered = max(0, min(by_tokens, by_money))

    @property
    def held(self) -> Amount:
        """The hold's total as last granted."""
        return self._held

    def runs_low(self, tokens: int) -> bool:
        """Whether it is time to ask for more: less than a lease is left, and not all of the cap is held."""
        return tokens > self.covered - self.lease_tokens and (self.covered < self.cap or tokens > self.cap)
