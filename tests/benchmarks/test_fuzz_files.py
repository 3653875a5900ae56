"""A thousand bad files, each read or refused in one line; files that once were not are kept below as a table."""

from __future__ import annotations

import pytest

from benchmarks.fuzz_files import FORMATS, try_cases

FOUND: tuple[tuple[str, int, int], ...] = ()


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", FORMATS)
def test_bad_files_are_refused_in_one_line(name: str) -> None:
    outcome = try_cases(name, 90, seed=7)
    assert outcome.failures == []
    assert 0 < outcome.read < outcome.cases


def test_cases_repeat_with_their_seed() -> None:
    one, other = (try_cases("index", 30, seed=3) for _ in range(2))
    assert (one.cases, one.read) == (other.cases, other.read) == (30, one.read)
