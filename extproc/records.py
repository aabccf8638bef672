"""What passes between modules: frozen, slotted dataclasses. Money is integer nano-USD, time integer milliseconds.

What is made for every event of a stream is a named tuple instead, which costs a third to make.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple


class Scope(StrEnum):
    """Whose spending a budget limits."""

    GLOBAL = "global"
    TEAM = "team"
    SERVICE = "service"
    USER = "user"
    MODEL = "model"


class Window(StrEnum):
    """The period after which a budget starts again from zero."""

    MINUTE = "minute"
    HOUR = "hour"
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"


class Unit(StrEnum):
    """What a budget counts."""

    NANOUSD = "nanousd"
    TOKENS = "tokens"


class Mode(StrEnum):
    """What happens at the limit: hard refuses and cuts, soft tells the caller, shadow only records."""

    HARD = "hard"
    SOFT = "soft"
    SHADOW = "shadow"


class Outcome(StrEnum):
    """How a request ended."""

    OK = "ok"
    CUT = "cut"
    REFUSED = "refused"
    CLIENT_GONE = "client_gone"
    UPSTREAM_ERROR = "upstream_error"
    CACHE_EXACT = "cache_exact"
    CACHE_SEMANTIC = "cache_semantic"


class UsageSource(StrEnum):
    """Whose token figures a usage record holds."""

    PROVIDER = "provider"
    COUNTED = "counted"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. `email` is the verified token's; a human's token has no service, only a user."""

    email: str
    service: str | None
    team: str | None
    user: str | None


@dataclass(frozen=True, slots=True)
class Target:
    """One place that an attempt may go to: `openai/gpt-4o`."""

    provider: str
    model: str


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call may go, in order of attempts. `name` is the policy's pattern that matched."""

    name: str
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True)
class IdentityRules:
    """Who may call. Patterns are shell-style (`*@project.iam.gserviceaccount.com`), matched on the whole address."""

    audiences: tuple[str, ...]
    issuers: tuple[str, ...]
    allow: tuple[str, ...]
    delegates: tuple[str, ...] = ()
    teams: tuple[tuple[str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True, slots=True)
class ModelRule:
    """Where the models of a name or pattern go. A target's model `*` is the requested name.

    `max_output_tokens` and `reasoning` override what the catalogue of models knows. `drop_unsupported`: a field that a
    target cannot take is left out for it; else such a target is skipped, and with no other the call is refused.
    """

    pattern: str
    targets: tuple[Target, ...]
    max_output_tokens: int | None = None
    reasoning: bool | None = None
    drop_unsupported: bool = False


@dataclass(frozen=True, slots=True)
class PriceRule:
    """A price that overrides the price data, or, for the pattern `*`, the ceiling where no price is known.

    Nano-USD per million tokens. `pattern` is matched on `provider/model` and on `model`.
    """

    pattern: str
    input_nanousd_per_mtok: int
    output_nanousd_per_mtok: int
    cached_input_nanousd_per_mtok: int | None = None


@dataclass(frozen=True, slots=True)
class BudgetRule:
    """One line of the policy's budgets. With a pattern as `id`, each that matches has a budget of its own."""

    scope: Scope
    id: str
    window: Window
    unit: Unit
    limit: int
    mode: Mode = Mode.HARD
    tz: str = "UTC"


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy file, checked. `version` is a short hash of its text."""

    version: str
    identity: IdentityRules
    models: tuple[ModelRule, ...]
    prices: tuple[PriceRule, ...]
    budgets: tuple[BudgetRule, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """One request, parsed. `body` is what was parsed, and what is sent on is made from it, never from the bytes.

    `cap` is the caller's own bound on output tokens, if it gave one. `prompt_texts` are counted with the model's
    encoding; `prompt_extra` is what the rest of the prompt may cost in tokens (images, message overhead).
    `web_searches` is how many may be billed; `thinks` whether it asks for thoughts or for none, where it says so;
    `unseen` whether the answer may hold what is billed and is no text: sound, pictures. A count of tokens is not
    `billed`. `teaches`: what is counted of the answer is what is billed of it, so that the model's factor is learned.
    """

    model: str
    stream: bool
    wants_usage: bool
    choices: int
    cap: int | None
    prompt_texts: tuple[str, ...]
    prompt_extra: int
    service_tier: str | None
    web_searches: int
    body: Mapping[str, Any]
    thinks: bool | None = None
    unseen: bool = False
    billed: bool = True
    teaches: bool = True


@dataclass(frozen=True, slots=True)
class ModelTraits:
    """What the gateway must know of a model: its largest answer, whether it thinks unseen, how it counts text."""

    max_output_tokens: int
    reasoning: bool
    encoding: str


@dataclass(frozen=True, slots=True)
class Amount:
    """Money and tokens side by side, since one request may be under budgets of both units."""

    nanousd: int
    tokens: int

    def of(self, unit: Unit) -> int:
        """The figure that a budget of this unit counts."""
        return self.nanousd if unit is Unit.NANOUSD else self.tokens


NOTHING = Amount(0, 0)


@dataclass(frozen=True, slots=True)
class Budget:
    """One balance that a request is under: a rule of the policy, applied to one caller or model.

    `id` names it in refusals, records and Redis keys: `service/ranker@…/day/usd`, `global/*/month/usd/soft`.
    `limit` is in `unit` (nano-USD or tokens); `tz` is an IANA zone, which decides where days and months begin.
    """

    id: str
    unit: Unit
    limit: int
    window: Window
    tz: str
    mode: Mode


@dataclass(frozen=True, slots=True)
class BudgetWindow:
    """A budget in the window that was fixed at the hold. `end_ms` is 0 for a window that never ends."""

    budget: Budget
    start_ms: int
    end_ms: int


@dataclass(frozen=True, slots=True)
class HoldAsk:
    """What a request asks of the ledger: at best `ask`, and nothing under `least`.

    `used` is the first checkpoint: what the prompt costs once it is sent. `note` is stored beside the hold, so that a
    record can be written for a request whose processor died.
    """

    request_id: str
    budgets: tuple[Budget, ...]
    ask: Amount
    least: Amount
    used: Amount = NOTHING
    note: bytes = b""


@dataclass(frozen=True, slots=True)
class Hold:
    """A granted hold. `held` may be less than was asked; `over` names the soft budgets already past their limit."""

    request_id: str
    windows: tuple[BudgetWindow, ...]
    held: Amount
    over: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class HoldRefusal:
    """The first hard budget that has too little left. `resets_at_ms` is 0 for a window that never ends."""

    budget: Budget
    posted: int
    pending: int
    resets_at_ms: int
    now_ms: int


@dataclass(frozen=True, slots=True)
class Lease:
    """The answer to an extension. `held` is the hold's new total: nothing where it is `gone`, and no longer exists.

    `limited_by` is the budget that gave less than was asked, if one did.
    """

    held: Amount
    gone: bool = False
    limited_by: HoldRefusal | None = None


@dataclass(frozen=True, slots=True)
class Settlement:
    """The end of a hold: what the request really cost. Carries the windows, so that it can be posted without a hold.

    `row` is the request's line of the usage journal, which the ledger keeps until a usage store has it; "" for none.
    """

    request_id: str
    windows: tuple[BudgetWindow, ...]
    actual: Amount
    row: str = ""


@dataclass(frozen=True, slots=True)
class Orphan:
    """A hold that expired with nobody to settle it: its processor died. `posted` is its last checkpoint."""

    request_id: str
    posted: Amount
    note: bytes


@dataclass(frozen=True, slots=True)
class Balance:
    """One budget's figures now, in its unit, for `tollgate budgets`. `resets_at_ms` is 0 for a total."""

    budget: Budget
    posted: int
    pending: int
    resets_at_ms: int


@dataclass(frozen=True, slots=True)
class BudgetSnapshot:
    """One budget's figures at a time, in its unit. The names are the columns of every usage store's `budget_snapshots`.

    `ts` and `resets_at` are RFC 3339 in UTC; `resets_at` is None for a total.
    """

    ts: str
    budget_id: str
    scope: Scope
    period: Window
    unit: Unit
    mode: Mode
    limit_amount: int
    posted: int
    pending: int
    resets_at: str | None


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer. `prompt` includes `cached_prompt` (read from the provider's cache), `cache_write_prompt`
    (written to it, at a price of its own) and audio; `completion` includes `reasoning` and audio. `web_searches` is
    None where the provider does not count them.
    """

    prompt: int
    completion: int
    cached_prompt: int = 0
    reasoning: int = 0
    audio_prompt: int = 0
    audio_completion: int = 0
    cache_write_prompt: int = 0
    web_searches: int | None = None


class Piece(NamedTuple):
    """What one event of a stream says. `texts` is everything that is billed as output and can be seen.

    `usage_only`: the event holds usage and no choices, and a caller that did not ask for it must not see it.
    `started` and `finished` are indices of choices. `done` is the dialect's closing event, `error` an error event.
    `unseen`: something is billed with it that cannot be seen, such as the framing of a tool's call, or a citation's.
    """

    texts: tuple[str, ...] = ()
    usage: Usage | None = None
    usage_only: bool = False
    started: tuple[int, ...] = ()
    finished: tuple[int, ...] = ()
    done: bool = False
    error: bool = False
    unseen: bool = False
    service_tier: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a whole answer (not streamed) says. `usage` is None where the provider reported none."""

    texts: tuple[str, ...]
    usage: Usage | None
    service_tier: str | None = None


class Metered(NamedTuple):
    """One event of a stream after counting: its exact bytes, whether the caller sees it, and the running estimate.

    `tokens` is the estimate of output tokens so far, this event included, after the model's factor.
    """

    raw: bytes
    hidden: bool
    tokens: int


@dataclass(frozen=True, slots=True)
class UsageRecord:
    """One request, as it is logged. The names are fixed: they are the columns of every usage store."""

    request_id: str
    ts: str
    service: str | None
    user: str | None
    team: str | None
    requested_model: str | None
    provider: str | None
    model: str | None
    route: str | None
    attempts: int
    stream: bool
    status: int
    outcome: Outcome
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    usage_source: UsageSource
    cost_nanousd: int
    price_version: str | None
    ttft_ms: int | None
    duration_ms: int
    overhead_us: int
    budget_id: str | None
    cache_savings_nanousd: int = 0
