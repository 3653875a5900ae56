"""Rounds filled by worth: valid on any tables, better than rules by time alone where kernels fill a card in steps."""

from __future__ import annotations

import random
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tuner.rounds.test_grid_bound import jagged_instance
from tests.tuner.strategies import batches, cost_models
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, Round, check_rounds
from tuner.plan.stage_cost import StageCost, TableAttention
from tuner.policies.sweep import Search
from tuner.rounds.packing.worth import WorthPacker
from tuner.rounds.problem import Limits, Problem
from tuner.rounds.relaxation import Work
from tuner.rounds.uneven import busiest_stage
from tuner.search.planner import plan_rounds


def check_on_grid(problem: Problem, rounds: list[Round]) -> None:
    """Every token runs once, in order, in chunks that end on the grid or with their prompt."""
    check_rounds(problem.requests, rounds)
    for chunk in (chunk for each in rounds for chunk in each):
        request = problem.requests[chunk.request]
        assert chunk.end == request.prompt_tokens or (chunk.end - request.cached_tokens) % problem.chunk_multiple == 0


@settings(max_examples=60, deadline=None)
@given(
    cost=cost_models(),
    requests=batches(),
    multiple=st.sampled_from([1, 16, 64]),
    longest_s=st.sampled_from([0.0, 0.01, 1.0]),
    outer=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_rounds_are_a_plan(
    cost: CostModel, requests: list[Request], multiple: int, longest_s: float, outer: float
) -> None:
    problem = Problem(cost=cost, requests=tuple(requests), chunk_multiple=multiple)
    check_on_grid(problem, WorthPacker(problem, longest_s).pack(outer * longest_s, 10.0 * longest_s))


@pytest.mark.parametrize("seed", range(20))
def test_rounds_keep_to_the_longest_and_to_the_limit_of_tokens(seed: int) -> None:
    one, most = jagged_instance(seed), 64 * random.Random(seed).randint(1, 6)
    problem = Problem(cost=one.cost, requests=one.requests, chunk_multiple=64, limits=Limits(max_round_tokens=most))
    stage = one.cost.stages[busiest_stage(one.cost, Work.of(one.requests, most))]
    longest_s = stage.round_overhead_s + float(stage.tokens_s(192)) + 2.0
    rounds = WorthPacker(problem, longest_s).pack(longest_s, longest_s)
    check_on_grid(problem, rounds)
    for chunks in rounds:
        assert sum(chunk.tokens for chunk in chunks) <= most
        ends = [chunk.end == one.requests[chunk.request].prompt_tokens for chunk in chunks]
        seconds = stage.seconds([(c.tokens, c.start, final) for c, final in zip(chunks, ends, strict=True)])
        is_shortest = len(chunks) == 1 and chunks[0].tokens <= 64  # runs whatever it takes
        assert is_shortest or seconds <= longest_s * (1.0 + 1e-9)


@pytest.mark.parametrize("slower", [0.0, 0.03])
def test_batches_on_steps_take_less_with_rounds_filled_by_worth(slower: float) -> None:
    count = tuple(range(256, 4097, 256))
    in_step = [1.0 if n % 512 == 0 else 1.25 for n in count]
    stage = StageCost(
        token_count=(0, *count, 65536),
        token_seconds=(0.0, *(7e-6 * n * (1.0 + 160.0 / n) for n in count), 7e-6 * 65696),
        attention=TableAttention(
            count=count,
            base_s=tuple(np.maximum.accumulate([4e-7 * n * each for n, each in zip(count, in_step, strict=True)])),
            context_s=tuple(np.maximum.accumulate([3e-10 * n * each for n, each in zip(count, in_step, strict=True)])),
        ),
    )
    one = CostModel(stages=(stage,))
    cost = CostModel(stages=(stage, *(one.scaled(1.0 - slower).stages * 3)))
    requests = [Request(id=f"r{i}", prompt_tokens=n) for i, n in enumerate((53279, 2058, 11463, 548, 31272))]
    found = plan_rounds(cost, requests, chunk_multiple=256)
    with patch.object(Search, "sweep_by_worth"):
        without = plan_rounds(cost, requests, chunk_multiple=256)
    assert found.makespan_s < 0.998 * without.makespan_s


def test_long_prompts_are_filled_on_a_coarser_grid() -> None:
    stage = StageCost(token_count=(0, 512, 65536), token_seconds=(0.0, 0.004, 0.45), round_overhead_s=0.001)
    requests = tuple(Request(id=f"r{i}", prompt_tokens=n) for i, n in enumerate((500_000, 300_001)))
    problem = Problem(cost=CostModel(stages=(stage,)), requests=requests, chunk_multiple=64)
    rounds = WorthPacker(problem, 1e9).pack(1e9, 1e9)
    check_on_grid(problem, rounds)
    assert {chunk.start % 512 for each in rounds for chunk in each} == {0}
