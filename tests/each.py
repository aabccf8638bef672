"""One test over many recorded cases: what pytest does around a test costs more than most of the cases themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import pytest

from tests.recordings import Case

Test = Callable[..., None]
_GROUP = "cases_of"


def each_case(cases: Iterable[Case | tuple[Case, str]]) -> Callable[[Test], Test]:
    """As `pytest.mark.parametrize` over cases, or over pairs of a case and a word, but one test a provider and word.

    The test's first parameters are the case, and the word. Every case is tried, and each that fails is named.
    """
    groups: dict[str, list[tuple[Case, *tuple[str, ...]]]] = defaultdict(list)
    for one in cases:
        case, *words = one if isinstance(one, tuple) else (one,)
        groups["-".join((case.provider, *words))].append((case, *words))
    width = max((len(one) for group in groups.values() for one in group), default=1)  # the subset may have none

    def over_groups(test: Test) -> Test:
        @wraps(test)
        def grouped(**fixtures: Any) -> None:
            _try_all(test, fixtures.pop(_GROUP), fixtures)

        asked = signature(test)
        others = list(asked.parameters.values())[width:]
        of_group = Parameter(_GROUP, Parameter.POSITIONAL_OR_KEYWORD)
        vars(grouped)["__signature__"] = asked.replace(parameters=[of_group, *others])  # what pytest is to give
        marked: Test = pytest.mark.parametrize(_GROUP, list(groups.values()), ids=list(groups))(grouped)
        return marked

    return over_groups


def _try_all(test: Test, group: Sequence[tuple[Case, *tuple[str, ...]]], fixtures: dict[str, Any]) -> None:
    failures: list[BaseException] = []
    for case, *words in group:
        try:
            test(case, *words, **fixtures)
        except Exception as error:
            failures.append(_named(error, case, words))
        except pytest.fail.Exception as error:
            failures.append(_named(error, case, words))
            break  # it may be the test's time that is up, and the rest would run without a bound
    if failures:
        raise BaseExceptionGroup(f"{len(failures)} of {len(group)} recorded cases", failures)


def _named(error: BaseException, case: Case, words: Sequence[str]) -> BaseException:
    error.add_note(" ".join((case.name, *words)))
    return error
