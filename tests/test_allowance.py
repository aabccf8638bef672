"""How far a hold reaches: what is asked for is what is covered, to the token and the nano-USD."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.allowance import MTOK, Allowance
from extproc.pricing import Price, Rates
from extproc.records import NOTHING, Amount

figures = st.integers(0, 10**12)
tokens = st.integers(0, 10**7)


def price(output: int, prompt: int = 0, search: int = 0) -> Price:
    """Nano-USD per million tokens, and per search."""
    return Price("v", (Rates(-1, prompt, prompt, prompt, prompt, output, output),), search)


def allowance(output: int, prompt: int = 0, *, prompt_tokens: int = 9, cap: int = 1_000, lease: int = 10) -> Allowance:
    return Allowance(price(output, prompt), prompt_tokens, cap, lease)


def test_what_was_used_is_the_prompt_and_the_output_rounded_up() -> None:
    dear = allowance(2_500_001, 1_000_000)  # 2.500001 nano-USD a token
    assert dear.used(0) == Amount(9, 9)
    assert dear.used(1) == Amount(9 + 3, 10)
    assert dear.used(2) == Amount(9 + 6, 11)
    assert dear.used(MTOK) == Amount(9 + 2_500_001, MTOK + 9)


@pytest.mark.parametrize(
    ("so_far", "asked"),
    [(0, 20), (1, 21), (970, 990), (985, 1_000), (1_000, 1_000), (1_003, 1_023)],
    ids=["at first", "two leases ahead", "near the cap", "up to the cap", "at the cap", "beyond it"],
)
def test_what_is_asked_for(so_far: int, asked: int) -> None:
    one = allowance(10**6)
    assert one.lease(so_far) == one.used(asked)


def test_the_whole_is_the_cap() -> None:
    one = allowance(10**6, cap=70)
    assert one.whole() == one.used(70)


def test_searches_are_held_for_once() -> None:
    plain, searching = (Allowance(price(10**6, search=500), 9, 100, 10, searches) for searches in (0, 1))
    for count in (0, 1, 100):
        assert searching.used(count).nanousd == plain.used(count).nanousd + 500
    searching.grant(searching.used(30))
    assert searching.covered == 30


def test_nothing_is_covered_before_the_grant_or_by_nothing() -> None:
    one = allowance(10**6, 10**6)
    assert (one.covered, one.held) == (0, NOTHING)
    one.grant(one.used(5))
    assert (one.covered, one.held) == (5, one.used(5))
    one.grant(NOTHING)
    assert (one.covered, one.held) == (0, NOTHING)


@pytest.mark.parametrize(
    ("nanousd", "held_tokens", "covered"),
    [(100, 1_000, 91), (1_000, 50, 41), (8, 1_000, 0), (1_000, 8, 0)],
    ids=["money", "tokens", "too little money for the prompt", "too few tokens for it"],
)
def test_the_scarcer_of_money_and_tokens_decides(nanousd: int, held_tokens: int, covered: int) -> None:
    one = allowance(10**6, 10**6)
    one.grant(Amount(nanousd, held_tokens))
    assert one.covered == covered


def test_what_is_free_is_bounded_by_tokens_alone() -> None:
    free = allowance(0)
    free.grant(Amount(0, 509))
    assert free.covered == 500


@pytest.mark.parametrize(
    ("so_far", "low"), [(0, False), (10, False), (11, True), (20, True)], ids=["at first", "a lease", "less", "none"]
)
def test_more_is_asked_for_where_less_than_a_lease_is_left(so_far: int, low: bool) -> None:
    one = allowance(10**6)
    one.grant(one.used(20))
    assert one.runs_low(so_far) == low


def test_nothing_more_is_asked_for_where_the_cap_is_covered() -> None:
    one = allowance(10**6, cap=20)
    one.grant(one.used(20))
    assert not one.runs_low(20)


@given(output=figures, prompt=figures, prompt_tokens=tokens, count=tokens)
def test_a_hold_covers_exactly_the_tokens_that_it_was_asked_for(
    output: int, prompt: int, prompt_tokens: int, count: int
) -> None:
    one = allowance(output, prompt, prompt_tokens=prompt_tokens)
    one.grant(one.used(count))
    assert one.covered == count


@given(output=figures, prompt=figures, prompt_tokens=tokens, nanousd=figures, held_tokens=tokens)
def test_no_hold_covers_more_than_it_holds(
    output: int, prompt: int, prompt_tokens: int, nanousd: int, held_tokens: int
) -> None:
    one = allowance(output, prompt, prompt_tokens=prompt_tokens)
    one.grant(Amount(nanousd, held_tokens))
    covered = one.used(one.covered)
    if one.covered:
        assert covered.nanousd <= nanousd
        assert covered.tokens <= held_tokens


@given(output=figures, prompt=figures, so_far=tokens, cap=st.integers(1, 10**6), lease=st.integers(1, 10**5))
def test_a_lease_covers_what_has_come_and_more_is_never_less(
    output: int, prompt: int, so_far: int, cap: int, lease: int
) -> None:
    one = allowance(output, prompt, cap=cap, lease=lease)
    one.grant(one.lease(so_far))
    assert one.covered >= so_far
    assert one.lease(so_far + 1).nanousd >= one.lease(so_far).nanousd
