"""The policy's format: what it becomes, and every way in which it is refused, with its line."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

import pytest

from extproc import limits
from extproc.errors import PolicyInvalid
from extproc.policy import doubts, most_specific, parse_policy
from extproc.providers import PROVIDERS
from extproc.records import (
    BudgetRule,
    IdentityRules,
    Mode,
    ModelRule,
    PriceRule,
    Scope,
    Target,
    Unit,
    Window,
)

LOCAL_POLICY = Path(__file__).parents[1] / "extproc" / "local" / "policy.yaml"

# The example of the design, word for word.
DESIGN = """\
identity:
  audiences: [https://tollgate.example]
  issuers: [https://accounts.google.com]          # the local stack adds its development issuer
  allow: ["*@my-project.iam.gserviceaccount.com"]
  delegates: [frontend@my-project.iam.gserviceaccount.com]
  teams: {search: [ranker@my-project.iam.gserviceaccount.com]}
models:
  gpt-4o: {targets: [openai/gpt-4o, anthropic/claude-sonnet-4-5]}      # order of attempts
  "*": {targets: ["openai/*"]}                                         # any other name, as it is
prices:
  "*": {input_usd_per_mtok: 10, output_usd_per_mtok: 30}               # ceiling where no price is known
budgets:
  - {scope: service, id: "*", window: day, limit_usd: 5}               # each service its own
  - {scope: user, id: "*", window: day, limit_tokens: 200000}
  - {scope: global, window: month, limit_usd: 2000, mode: soft}
"""

IDENTITY = "identity: {audiences: [a], issuers: [i], allow: [x]}\n"
MODELS = 'models: {"*": {targets: ["openai/*"]}}\n'
LEAST = IDENTITY + MODELS


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyInvalid) as caught:
        parse_policy(text)
    assert str(caught.value) == "\n".join(caught.value.problems)
    return list(caught.value.problems)


def test_the_designs_example() -> None:
    policy = parse_policy(DESIGN)
    assert policy.version == sha256(DESIGN.encode()).hexdigest()[:12]
    assert policy.identity == IdentityRules(
        audiences=("https://tollgate.example",),
        issuers=("https://accounts.google.com",),
        allow=("*@my-project.iam.gserviceaccount.com",),
        delegates=("frontend@my-project.iam.gserviceaccount.com",),
        teams=(("search", ("ranker@my-project.iam.gserviceaccount.com",)),),
    )
    assert policy.models == (
        ModelRule("gpt-4o", (Target("openai", "gpt-4o"), Target("anthropic", "claude-sonnet-4-5"))),
        ModelRule("*", (Target("openai", "*"),)),
    )
    assert policy.prices == (PriceRule("*", 10 * 10**9, 30 * 10**9),)
    assert policy.budgets == (
        BudgetRule(Scope.SERVICE, "*", Window.DAY, Unit.NANOUSD, 5 * 10**9),
        BudgetRule(Scope.USER, "*", Window.DAY, Unit.TOKENS, 200_000),
        BudgetRule(Scope.GLOBAL, "*", Window.MONTH, Unit.NANOUSD, 2000 * 10**9, Mode.SOFT),
    )


def test_the_local_stacks_policy_is_good() -> None:
    policy = parse_policy(LOCAL_POLICY.read_text())
    assert "https://dev.tollgate.local" in policy.identity.issuers


def test_the_optional_fields() -> None:
    policy = parse_policy(
        IDENTITY
        + "models:\n"
        + "  o9: {targets: [openai/org/o9], max_output_tokens: 1_000, reasoning: true, drop_unsupported: true}\n"
        + "prices: {o9: {input_usd_per_mtok: 0.15, output_usd_per_mtok: 0, cached_input_usd_per_mtok: 0.075}}\n"
        + "budgets: [{scope: team, id: search, window: total, limit_tokens: 1, mode: shadow, time_zone: Asia/Tokyo}]\n"
    )
    assert policy.models == (ModelRule("o9", (Target("openai", "org/o9"),), 1_000, True, True),)
    assert policy.prices == (PriceRule("o9", 150_000_000, 0, 75_000_000),)
    assert policy.budgets == (
        BudgetRule(Scope.TEAM, "search", Window.TOTAL, Unit.TOKENS, 1, Mode.SHADOW, "Asia/Tokyo"),
    )


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_target_at_every_provider(provider: str) -> None:
    policy = parse_policy(IDENTITY + f"models: {{a: {{targets: [{provider}/vendor/a]}}}}\n")
    assert policy.models == (ModelRule("a", (Target(provider, "vendor/a"),)),)


@pytest.mark.parametrize(
    ("usd", "nanousd"),
    [
        ("5", 5_000_000_000),
        ("0.1", 100_000_000),
        ("0.000000001", 1),
        ("1.10", 1_100_000_000),
        ("1_000.5", 1_000_500_000_000),
        ("8999999.999999999", limits.MAX_NANOUSD - 1),  # as a float it would be another amount
        ("9000000", limits.MAX_NANOUSD),
    ],
)
def test_amounts_are_exact(usd: str, nanousd: int) -> None:
    policy = parse_policy(LEAST + f"budgets: [{{scope: global, window: day, limit_usd: {usd}}}]\n")
    assert policy.budgets[0].limit == nanousd


@pytest.mark.parametrize(
    "usd",
    [
        "0", "-1", "0.0", "1.0000000001", "0.0000000001", "9000000.000000001", "99999999999999999999999999999999999999",
        ".inf", ".nan", "1e3", "0x10", "010", "1:30", "true", '"5"', "five", "", "[5]",
    ],
)  # fmt: skip
def test_amounts_that_are_refused(usd: str) -> None:
    (problem,) = problems(LEAST + f"budgets:\n  - scope: global\n    window: day\n    limit_usd: {usd}\n")
    # An empty value is no value: it is the budget, not the amount, that lacks something.
    assert problem.startswith("line 4: budgets[0]: " if usd == "" else "line 6: budgets[0].limit_usd: ")


def _budget(fields: str) -> str:
    return LEAST + f"budgets:\n  - {{{fields}}}\n"


NO_PROVIDER = f"must be provider/model, with one of the providers {', '.join(PROVIDERS)}"

PROBLEMS = {
    "empty": ("", ["line 1: the policy is empty"]),
    "only comments": ("# nothing\n", ["line 1: the policy is empty"]),
    "a list": ("- 1\n", ["line 1: must be a mapping"]),
    "two documents": (LEAST + "---\na: 1\n", ["line 3: not valid YAML: but found another document"]),
    "a tab": ("identity:\n\ta: 1\n", ["line 2: not valid YAML: found character that cannot start any token"]),
    "no sections": ("prices: {}\n", ["line 1: identity: is missing", "line 1: models: is missing"]),
    "no models": (IDENTITY + "models: {}\n", ["line 2: models: must not be empty"]),
    "nobody may call": (
        "identity: {audiences: [a], issuers: [i], allow: []}\n" + MODELS,
        ["line 1: identity.allow: must not be empty: nobody could call"],
    ),
    "nobody is named": (
        "identity: {audiences: [a], issuers: [i]}\n" + MODELS,
        ["line 1: identity.allow: must not be empty: nobody could call"],
    ),
    "no audience": (
        "identity: {audiences: [], issuers: [i], allow: [x]}\n" + MODELS,
        ["line 1: identity.audiences: must not be empty"],
    ),
    "a number for text": (
        "identity:\n  audiences: [a]\n  issuers: [i]\n  allow:\n    - x\n    - 5\n" + MODELS,
        ["line 6: identity.allow[1]: must be text: put it in quotes"],
    ),
    "an unknown section": (LEAST + "budget: []\n", ["line 3: budget: is not a field; did you mean budgets?"]),
    "an unknown field": (
        IDENTITY + "models:\n  a:\n    targets: [openai/a]\n    max_tokens: 5\n",
        ["line 5: models.a.max_tokens: is not a field; did you mean max_output_tokens?"],
    ),
    "nothing like a field": (
        IDENTITY + "models: {a: {targets: [openai/a], zzz: 5}}\n",
        ["line 2: models.a.zzz: is not a field: there are targets, max_output_tokens, reasoning, drop_unsupported"],
    ),
    "a name twice": (
        IDENTITY + "models:\n  a: {targets: [openai/a]}\n  b: {targets: [openai/b]}\n  a: {targets: [openai/c]}\n",
        ["line 5: models.a: occurs twice"],
    ),
    "an unknown provider": (
        IDENTITY + "models: {a: {targets: [acme/a]}}\n",
        [f"line 2: models.a.targets[0]: {NO_PROVIDER}"],
    ),
    "no provider": (
        IDENTITY + "models: {a: {targets: [gpt-4o]}}\n",
        [f"line 2: models.a.targets[0]: {NO_PROVIDER}"],
    ),
    "a pattern as a target": (
        IDENTITY + 'models: {a: {targets: ["openai/gpt-*"]}}\n',
        ["line 2: models.a.targets[0]: must name one model, or * for the requested one"],
    ),
    "no targets": (IDENTITY + "models: {a: {targets: []}}\n", ["line 2: models.a.targets: must not be empty"]),
    "a cap of nothing": (
        IDENTITY + "models: {a: {targets: [openai/a], max_output_tokens: 0}}\n",
        ["line 2: models.a.max_output_tokens: must be more than 0"],
    ),
    "yes for true": (
        IDENTITY + "models: {a: {targets: [openai/a], reasoning: yes}}\n",
        ["line 2: models.a.reasoning: must be true or false"],
    ),
    "a price with a part missing": (
        LEAST + "prices: {a: {input_usd_per_mtok: 1}}\n",
        ["line 3: prices.a.output_usd_per_mtok: is missing"],
    ),
    "a negative price": (
        LEAST + "prices: {a: {input_usd_per_mtok: -1, output_usd_per_mtok: 1}}\n",
        ["line 3: prices.a.input_usd_per_mtok: must not be negative"],
    ),
    "no limit": (
        _budget("scope: global, window: day"),
        ["line 4: budgets[0]: must have exactly one of limit_usd and limit_tokens"],
    ),
    "two limits": (
        _budget("scope: global, window: day, limit_usd: 1, limit_tokens: 1"),
        ["line 4: budgets[0]: must have exactly one of limit_usd and limit_tokens"],
    ),
    "too many tokens": (
        _budget("scope: global, window: day, limit_tokens: 9007199254740992"),
        ["line 4: budgets[0].limit_tokens: is above the largest amount that can be counted"],
    ),
    "half a token": (
        _budget("scope: global, window: day, limit_tokens: 0.5"),
        ["line 4: budgets[0].limit_tokens: must be a whole number"],
    ),
    "an unknown scope": (
        _budget("scope: company, window: day, limit_usd: 1"),
        ["line 4: budgets[0].scope: must be one of: 'global', 'team', 'service', 'user' or 'model'"],
    ),
    "an unknown window": (
        _budget("scope: global, window: week, limit_usd: 1"),
        ["line 4: budgets[0].window: must be one of: 'minute', 'hour', 'day', 'month' or 'total'"],
    ),
    "an unknown mode": (
        _budget("scope: global, window: day, limit_usd: 1, mode: dry"),
        ["line 4: budgets[0].mode: must be one of: 'hard', 'soft' or 'shadow'"],
    ),
    "no id": (
        _budget("scope: team, window: day, limit_usd: 1"),
        ['line 4: budgets[0]: must have an id: the name of a team, or "*" for each its own'],
    ),
    "an id for all": (
        _budget("scope: global, id: search, window: day, limit_usd: 1"),
        ["line 4: budgets[0]: must have no id: there is one global budget"],
    ),
    "an unknown time zone": (
        _budget("scope: global, window: day, limit_usd: 1, time_zone: Mars/Base"),
        ["line 4: budgets[0].time_zone: must be a time zone's IANA name, such as Europe/Prague"],
    ),
    "a path for a time zone": (
        _budget("scope: global, window: day, limit_usd: 1, time_zone: ../../etc/passwd"),
        ["line 4: budgets[0].time_zone: must be a time zone's IANA name, such as Europe/Prague"],
    ),
    "a folder for a time zone": (
        _budget("scope: global, window: day, limit_usd: 1, time_zone: Europe"),
        ["line 4: budgets[0].time_zone: must be a time zone's IANA name, such as Europe/Prague"],
    ),
    "the same limit twice": (
        _budget("scope: user, id: x, window: day, limit_usd: 1")
        + "  - {scope: user, id: y, window: day, limit_usd: 1}\n"
        + "  - {scope: user, id: x, window: day, limit_usd: 2, time_zone: Asia/Tokyo}\n",
        ["line 6: budgets[2]: limits the same as budgets[0]"],
    ),
    "a control character": (
        IDENTITY + 'models: {"a\\n": {targets: [openai/a]}}\n',
        ["line 2: models.a\n: must not have control characters"],
    ),
    "a tag": (
        LEAST + "budgets: !!python/object/apply:os.system [x]\n",
        [
            "line 3: budgets: the tag tag:yaml.org,2002:python/object/apply:os.system is not allowed",
            "line 3: budgets[0]: must be a mapping",
        ],
    ),
    "a merge key": (
        LEAST + "prices:\n  <<: {a: 1}\n",
        ["line 4: prices: a field's name must be plain text"],
    ),
    "an alias within itself": (
        "a: &a [*a]\n",
        ["line 1: the policy has too many values, or nests them too deep"],
    ),
    "everything at once, in the file's order": (
        "models:\n  a: {targets: [x/y]}\n  a: {}\nbudgets:\n  - {scope: x, window: y}\nidentity: {alow: [x]}\n",
        [
            f"line 2: models.a.targets[0]: {NO_PROVIDER}",
            "line 3: models.a: occurs twice",
            "line 5: budgets[0].scope: must be one of: 'global', 'team', 'service', 'user' or 'model'",
            "line 5: budgets[0].window: must be one of: 'minute', 'hour', 'day', 'month' or 'total'",
            "line 6: identity.audiences: is missing",
            "line 6: identity.issuers: is missing",
            "line 6: identity.allow: must not be empty: nobody could call",
            "line 6: identity.alow: is not a field; did you mean allow?",
        ],
    ),
}


@pytest.mark.parametrize(("text", "expected"), PROBLEMS.values(), ids=PROBLEMS.keys())
def test_problems(text: str, expected: list[str]) -> None:
    assert problems(text) == expected


@pytest.mark.parametrize(
    "other",
    ["scope: user, id: y", "scope: service, id: x", "window: hour", "mode: soft", "limit_tokens: 5"],
)
def test_budgets_that_differ_are_two(other: str) -> None:
    fields = {"scope": "user", "id": "x", "window": "day", "limit_usd": "1"}
    first = ", ".join(f"{name}: {value}" for name, value in fields.items())
    changed = dict(pair.split(": ") for pair in other.split(", "))
    if "limit_tokens" in changed:
        del fields["limit_usd"]
    second = ", ".join(f"{name}: {value}" for name, value in {**fields, **changed}.items())
    assert len(parse_policy(_budget(first) + f"  - {{{second}}}\n").budgets) == 2


def test_an_alias_is_expanded() -> None:
    policy = parse_policy(IDENTITY + "models:\n  a: &a {targets: [openai/a]}\n  b: *a\n")
    assert policy.models[0].targets == policy.models[1].targets


def test_aliases_that_multiply_are_bounded() -> None:
    lines = ["a: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"]
    lines += [f"b{i}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(8)]
    (problem,) = problems("\n".join(lines))
    assert "too many values" in problem


@pytest.mark.parametrize("text", ["[" * 50_000, "{a: " * 50_000, "- " * 50_000], ids=["lists", "mappings", "items"])
def test_depth_is_bounded(text: str) -> None:
    (problem,) = problems(text)
    assert problem.startswith("line 1: ")


def test_size_is_bounded() -> None:
    assert parse_policy(LEAST + "#" * (limits.MAX_POLICY_BYTES - len(LEAST)))
    (problem,) = problems(LEAST + "#" * (limits.MAX_POLICY_BYTES - len(LEAST) + 1))
    assert "larger" in problem


def test_a_change_of_any_byte_is_another_version() -> None:
    assert parse_policy(LEAST).version != parse_policy(LEAST + " ").version


@pytest.mark.parametrize(
    ("patterns", "names", "expected"),
    [
        pytest.param(["*", "a*", "ab"], ["ab"], "ab", id="exact"),
        pytest.param(["ab****", "ab"], ["ab"], "ab", id="exact before longer"),
        pytest.param(["*", "a*"], ["ab"], "a*", id="longer pattern"),
        pytest.param(["a?", "a*"], ["ab"], "a?", id="first of two as long"),
        pytest.param(["m", "p/m"], ["p/m", "m"], "p/m", id="the longer of two exact names"),
        pytest.param(["p/*", "m"], ["p/m", "m"], "m", id="exact short name before pattern"),
        pytest.param(["A*"], ["ab"], None, id="case matters"),
        pytest.param(["b"], ["ab"], None, id="the whole name"),
        pytest.param([], ["ab"], None, id="no rules"),
    ],
)
def test_most_specific(patterns: list[str], names: list[str], expected: str | None) -> None:
    found = most_specific([ModelRule(pattern, ()) for pattern in patterns], *names)
    assert (found.pattern if found else None) == expected


CHAINS = frozenset({("openai",), ("gemini",), ("anthropic",), ("openai", "gemini"), ("gemini", "anthropic", "openai")})


@pytest.mark.parametrize(
    ("targets", "doubt"),
    [
        ("openai/o", None),
        ("openai/o, gemini/g", None),
        ("gemini/g, anthropic/c, openai/o", None),
        ("openai/o, openai/p", None),
        ("gemini/g, openai/o", "no chain gemini,openai in envoy.yaml: only gemini would be asked"),
        ("gemini/g, anthropic/c", "no chain gemini,anthropic in envoy.yaml: only gemini would be asked"),
        ("openai/o, openai/p, gemini/g", "no chain openai,openai,gemini in envoy.yaml: only openai would be asked"),
        ("groq/l", "envoy.yaml has no route to groq"),
        ("xai/x, openai/o, groq/l", "envoy.yaml has no route to xai, groq"),
    ],
    ids=[
        *("one", "a pair", "three", "one, twice", "another order", "a part of a chain", "twice within a chain"),
        *("no cluster", "no clusters"),
    ],
)
def test_a_rule_whose_targets_envoy_has_no_chain_for_is_doubted(targets: str, doubt: str | None) -> None:
    text = f"{IDENTITY}models:\n  fine: {{targets: [openai/o]}}\n  mine: {{targets: [{targets}]}}\n"
    assert doubts(text, CHAINS) == ((f"line 4: models.mine: {doubt}",) if doubt else ())
    assert doubts(text, None) == (), "nothing is known of Envoy"


def test_budgets_beyond_the_bound_are_doubted_beside_models() -> None:
    models = "models:\n  both: {targets: [openai/o, gemini/g]}\n  other: {targets: [gemini/g, openai/o]}\n"
    rows = [
        f"  - {{scope: {scope}, id: x, window: {window}, limit_tokens: 1}}\n"
        for scope in ("service", "user", "team", "model")
        for window in Window
    ]
    count = limits.MAX_BUDGETS_PER_REQUEST
    text = IDENTITY + models + "budgets:\n" + "".join(rows[:count])
    same_kinds = "".join(row.replace("id: x", "id: y") for row in rows[:count])
    model = "line 4: models.other: no chain gemini,openai in envoy.yaml: only gemini would be asked"
    assert doubts(text + same_kinds, CHAINS) == (model,)
    budget = f"line {5 + count + 1}: budgets[{count}]: is one too many: "
    found = doubts(text + rows[count] + rows[count + 1], CHAINS)
    assert [doubt.startswith(start) for doubt, start in zip(found, (model, budget), strict=True)] == [True, True]
