"""Plans that nobody could run or wait for are refused before time and memory are spent on them."""

from __future__ import annotations

import pytest

from db.errors import UserError
from tests.tuner.atom import atom
from tuner.plan.cost_model import MAX_STAGES, CostModel
from tuner.plan.plan import MAX_ROUNDS, Chunk, Request, check_rounds, check_window
from tuner.plan.stage_cost import StageCost
from tuner.rounds.problem import MOST_UNIT_STAGES, MOST_UNITS, Problem

ONE_STAGE = CostModel(stages=(StageCost(token_count=(0, 1), token_seconds=(0.0, 1.0)),))


@pytest.mark.parametrize("pp_size", [0, MAX_STAGES + 1, 1_000_000_000])
def test_stages(pp_size: int) -> None:
    assert ONE_STAGE.for_pp_size(MAX_STAGES).pp_size == MAX_STAGES
    with pytest.raises(UserError, match=f"pp_size: {pp_size}; at least 1, at most {MAX_STAGES}"):
        ONE_STAGE.for_pp_size(pp_size)


@pytest.mark.parametrize("window", [0, 10**7, 10**4000])
def test_windows(window: int) -> None:
    with pytest.raises(UserError, match=r"window: .*; at least 1 round, at most 1000000") as caught:
        check_window(window)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("pp_size", "chunk_multiple", "tokens"),
    [(4, 64, MOST_UNITS * 64), (1024, 64, MOST_UNIT_STAGES // 1024 * 64), (4, 1, MOST_UNITS)],
)
def test_tokens_of_a_batch(pp_size: int, chunk_multiple: int, tokens: int) -> None:
    def problem(num_tokens: int) -> Problem:
        half = Request(id="a", prompt_tokens=num_tokens // 2)
        rest = Request(id="b", prompt_tokens=num_tokens - num_tokens // 2)
        return Problem(cost=atom(pp_size), requests=(half, rest), chunk_multiple=chunk_multiple)

    problem(tokens)
    with pytest.raises(UserError, match=f"prompt_tokens of all requests: {tokens + 1}; at most {tokens} with"):
        problem(tokens + 1)


def test_rounds_of_a_plan() -> None:
    count = MAX_ROUNDS + 1
    rounds = [(Chunk(0, index, 1),) for index in range(count)]
    with pytest.raises(UserError, match=f"rounds: {count} entries; at most {MAX_ROUNDS}"):
        check_rounds([Request(id="a", prompt_tokens=count)], rounds)
