"""The recorded cases that the other tests stand on."""

from __future__ import annotations

from tests.each import each_case
from tests.recordings import SUBSET, Case, cases, chat_cases

SUBSET_CASES = chat_cases(root=SUBSET)


TRAPS = """
audio-in audio-out azure-prompt-filter chunk-boundaries crlf error-body legacy-function-call logprobs n>1 no-DONE
no-space-after-colon no-usage non-sse-lines parallel-tool-calls reasoning-tokens refusal sse-comments stream-error
text:emoji thinking usage-before-last usage-every-chunk usage-only-final-chunk usage-with-final-choice x_groq-usage
"""


def test_the_subset_has_every_trap() -> None:
    assert frozenset().union(*(case.features for case in SUBSET_CASES)) >= frozenset(TRAPS.split())


def test_the_subset_is_small_and_licensed() -> None:
    assert sum(path.stat().st_size for path in SUBSET.rglob("*") if path.is_file()) < 800_000
    licences = {path.stem for path in (SUBSET / "LICENCES").iterdir()}
    assert licences == {str(case.meta["source"]["repo"]).replace("/", "+") for case in cases(SUBSET)}


def test_the_readme_names_every_case() -> None:
    readme = (SUBSET / "README.md").read_text()
    assert [case.name for case in SUBSET_CASES if f"| {case.name} |" not in readme] == []


def test_all_cases_hold_the_subset() -> None:
    assert {case.name for case in chat_cases()} >= {case.name for case in SUBSET_CASES}


def test_streams_and_others_are_told_apart() -> None:
    streams, others = chat_cases(True), chat_cases(False)
    assert all(case.stream for case in streams)
    assert not any(case.stream for case in others)
    assert {case.name for case in streams + others} == {case.name for case in chat_cases()}


@each_case(SUBSET_CASES)
def test_a_case_is_what_its_meta_says(case: Case) -> None:
    assert len(case.body) == case.meta["body_bytes"]
    assert case.provider == case.meta["provider"]
    assert b"".join(case.recorded_chunks()) == case.body
    assert [len(chunk) for chunk in case.recorded_chunks()] == (case.meta.get("chunk_sizes") or [len(case.body)])


def test_random_chunks_are_the_body_and_repeatable() -> None:
    case = SUBSET_CASES[-1]
    assert b"".join(case.random_chunks(7)) == case.body
    assert case.random_chunks(7) == case.random_chunks(7) != case.random_chunks(8)
    assert max(map(len, case.random_chunks(7, largest=20))) <= 20
