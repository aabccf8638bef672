"""What the bench says of the running count holds: over the whole collection, since the subset has no such streams."""

from __future__ import annotations

import pytest
import pytest_asyncio

from bench import accuracy
from tests.recordings import COLLECTION, cases

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not cases(COLLECTION), reason="the whole collection of recordings is not here"),
]

Rows = dict[str, dict[str, accuracy.Row]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def found() -> accuracy.Accuracy:
    return await accuracy.measure(COLLECTION)


@pytest.fixture(scope="module")
def rows(found: accuracy.Accuracy) -> Rows:
    return {name: {row.about: row for row in accuracy.rows(errors)} for name, errors in found.figures.items()}


@pytest.mark.parametrize("learned", [accuracy.FAMILY, accuracy.MODEL])
async def test_openai_is_within_2_percent_in_every_split(rows: Rows, learned: str) -> None:
    assert {about for about in rows[learned] if about.startswith("OpenAI")} == {"OpenAI, chat", "OpenAI, Responses"}
    assert all(row.worst_split <= 0.02 for about, row in rows[learned].items() if about.startswith("OpenAI"))


@pytest.mark.parametrize("learned", [accuracy.FAMILY, accuracy.MODEL])
@pytest.mark.parametrize("about", ["Anthropic", "Gemini"])
async def test_anthropic_and_gemini_are_within_5_percent_at_the_median(rows: Rows, learned: str, about: str) -> None:
    assert rows[learned][about].median <= 0.05


async def test_so_are_geminis_answers_whose_thoughts_are_billed_apart(rows: Rows) -> None:
    assert rows[accuracy.APART]["Gemini"].median <= 0.05


async def test_nothing_is_left_out_but_what_holds_something_billed_and_not_shown(found: accuracy.Accuracy) -> None:
    assert {stream.case.name for stream in found.hidden} == {
        "gemini/generate-stream-gemini-2.5-flash-lite-long-output-01",
        "openai/responses-stream-gpt-4.1-2025-04-14-long-output-01",
    }
    measured = {error.stream for error in found.figures[accuracy.FAMILY]}
    assert measured == {stream for stream in found.streams if accuracy.plain(stream)} - set(found.hidden)


async def test_no_stream_is_measured_with_what_it_taught(found: accuracy.Accuracy) -> None:
    """Each is once in every split: on the side that it is not learned from."""
    per_stream = [error.stream for error in found.figures[accuracy.FAMILY]]
    assert all(per_stream.count(stream) == accuracy.SPLITS for stream in set(per_stream))


async def test_the_page_names_every_stream(found: accuracy.Accuracy) -> None:
    page = str(found)
    assert all(error.stream.case.name in page for error in found.figures[accuracy.FAMILY])
    assert all(f"- {stream.case.name}, " in page for stream in found.hidden)
