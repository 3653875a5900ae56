from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from tuner.plan.kv_rows import assign_rows
from tuner.plan.plan import Chunk, Request, Round


def requests(*lengths: int, cached: int = 0) -> list[Request]:
    return [Request(id=f"r{i}", prompt_tokens=length, cached_tokens=cached) for i, length in enumerate(lengths)]


def one_after_another(*lengths: int) -> list[Round]:
    return [(Chunk(i, 0, length),) for i, length in enumerate(lengths)]


def test_requests_one_after_another_take_the_rows_of_the_longest() -> None:
    rows = assign_rows(requests(5, 9, 2), one_after_another(5, 9, 2), max_new_tokens=1)
    assert rows.start == (0, 0, 0)
    assert rows.total == 10


def test_requests_that_decode_or_were_cached_keep_their_rows() -> None:
    rows = assign_rows(requests(5, 9, 2), one_after_another(5, 9, 2), max_new_tokens=2)
    assert rows.start == (0, 7, 18)
    assert rows.total == 22
    assert assign_rows(requests(5, 9, 2, cached=1), one_after_another(5, 9, 2), max_new_tokens=1).total == 19


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=12))
def test_no_two_requests_hold_a_row_in_the_same_round(given_requests: list[tuple[int, int, int]]) -> None:
    asked = requests(*(length + 4 for length, _, _ in given_requests))
    rounds: list[list[Chunk]] = [[] for _ in range(9)]
    for index, (_, first, length) in enumerate(given_requests):
        for step in range(length + 1):
            rounds[first + step].append(Chunk(index, step, 1))
    rows = assign_rows(asked, [tuple(chunks) for chunks in rounds], max_new_tokens=1)
    for one, two in combinations(range(len(asked)), 2):
        (_, begin_one, more_one), (_, begin_two, more_two) = given_requests[one], given_requests[two]
        apart = begin_one + more_one < begin_two or begin_two + more_two < begin_one
        below = rows.start[one] + asked[one].prompt_tokens < rows.start[two]
        above = rows.start[two] + asked[two].prompt_tokens < rows.start[one]
        assert apart or below or above
    assert rows.total >= max(rows.start[i] + asked[i].prompt_tokens for i in range(len(asked)))
