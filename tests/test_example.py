"""What `tollgate up` prints to try it with must be let through, whatever the policy is."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from extproc.local import example
from extproc.models import traits
from extproc.policy import parse_policy
from extproc.records import Policy


def policy(allow: str = '["*"]', models: str = '{"*": {targets: ["openai/*"]}}') -> Policy:
    return parse_policy(f"identity: {{audiences: [a], issuers: [i], allow: {allow}}}\nmodels: {models}\n")


@pytest.mark.parametrize(
    ("patterns", "address"),
    [
        (["*@example.com", "*@other.example"], "dev@example.com"),
        (["*"], "dev@example.com"),
        (["alice@example.com"], "alice@example.com"),
        (["*@*"], "dev@x"),
        (["*.example"], "dev@example.com.example"),
        (["Team-?@X.example"], "team-x@x.example"),
        (["[ab]c@x.example"], "ac@x.example"),
        (["[!a]c@x.example", "*@y.example"], "dev@y.example"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_a_caller_is_one_that_is_admitted(patterns: list[str], address: str) -> None:
    assert example.caller(policy(allow=str(patterns))) == address
    assert any(fnmatchcase(address, pattern.lower()) for pattern in patterns)
    assert address.count("@") == 1


@pytest.mark.parametrize(
    ("models", "model"),
    [
        ('{"*": {targets: ["openai/*"]}}', "gpt-4o"),
        ('{"gpt-4*": {targets: ["openai/*"]}, mini: {targets: [openai/gpt-4o-mini]}}', "gpt-4o"),
        ('{"gpt-5*": {targets: ["openai/*"]}, mini: {targets: [openai/gpt-4o-mini]}}', "mini"),
        ("{gpt-4o: {targets: [gemini/x]}, mini: {targets: [openai/gpt-4o-mini]}}", "mini"),
        ("{claude: {targets: [anthropic/claude]}}", "gpt-4o"),
    ],
    ids=["all", "a pattern", "a name", "of a provider that is called", "none"],
)
def test_a_model_is_one_that_is_offered(models: str, model: str) -> None:
    assert example.model(policy(models=models), {"openai"}) == model


def test_the_local_policy_fails_over_to_a_model_whose_stream_can_be_cut() -> None:
    """One target that thinks unseen, and each stream would hold its whole cap: two of them a day's budget."""
    local = parse_policy((Path(example.__file__).parent / "policy.yaml").read_text())
    (rule,) = (rule for rule in local.models if rule.pattern == "gpt-4o")
    assert len(rule.targets) > 1
    assert not any(traits(target.provider, target.model, rule).reasoning for target in rule.targets)
