"""The bound on the chunk grid, with measured-looking tables, against every plan of small batches."""

from __future__ import annotations

import random

import pytest

from tests.tuner.oracle import UNIT, Instance, best_makespan_s
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.plan.stage_cost import StageCost, TableAttention
from tuner.rounds.bound import makespan_bound_s
from tuner.rounds.problem import Problem


def _jagged(rng: random.Random, points: list[int], step_s: float) -> tuple[float, ...]:
    """Times that rise in jumps of any size, level in between."""
    seconds, found = step_s * rng.random(), []
    for _ in points:
        seconds += step_s * rng.choice([0.0, 0.0, 0.2, 1.0, 3.0]) * rng.random()
        found.append(seconds)
    return tuple(found)


def jagged_instance(seed: int) -> Instance:
    """One to three requests on stages with tables of any shape, alike or a few percent apart as cards are."""
    rng = random.Random(seed)
    points = sorted(rng.sample(range(1, 14 * UNIT), rng.randint(3, 12)))
    stage = StageCost(
        token_count=(0, *points),
        token_seconds=(0.0, *_jagged(rng, points, 4.0)),
        attention=TableAttention(
            count=tuple(points),
            base_s=_jagged(rng, points, rng.choice([0.0, 1.0, 4.0])),
            context_s=tuple(each / 1000.0 for each in _jagged(rng, points, rng.choice([0.1, 1.0, 3.0]))),
        ),
        round_overhead_s=rng.choice([0.0, 0.3, 2.0]),
        chunk_s=rng.choice([0.0, 0.4]),
        final_s=rng.choice([0.0, 0.5]),
    )
    pp_size = rng.randint(1, 5)
    one = CostModel(stages=(stage,), hop_latency_s=rng.choice([0.0, 0.2]), hop_token_s=rng.choice([0.0, 1e-4]))
    spread = rng.choice([0.0, 0.03, 0.3])
    stages = tuple(one.scaled(1.0 - spread * rng.random()).stages[0] for _ in range(pp_size))
    cost = CostModel(stages=stages, hop_latency_s=one.hop_latency_s, hop_token_s=one.hop_token_s)
    units = rng.choice([[rng.randint(1, 14)], [rng.randint(1, 14)], [rng.randint(1, 6), rng.randint(1, 6)], [2, 3, 2]])
    requests = []
    for index, count in enumerate(units):
        cached = rng.choice([0, 0, UNIT * rng.randint(1, 30), rng.randint(1, 300)])
        tokens = cached + count * UNIT - rng.choice([0, rng.randint(0, UNIT - 1)])
        requests.append(Request(id=f"r{index}", prompt_tokens=tokens, cached_tokens=cached))
    return Instance(cost=cost, requests=tuple(requests), window=None)


@pytest.mark.parametrize("first", range(0, 100, 50))
def test_no_plan_is_below_the_bound_of_any_tables(first: int) -> None:
    tight = 0
    for seed in range(first, first + 50):
        one = jagged_instance(seed)
        problem = Problem(cost=one.cost, requests=one.requests, chunk_multiple=UNIT)
        bound_s, best_s = makespan_bound_s(problem), best_makespan_s(one)
        assert bound_s <= best_s * (1.0 + 1e-9), seed
        tight += bound_s >= 0.98 * best_s
    assert tight >= 10  # it is no bound that says little


def test_prompts_that_end_before_the_first_grid_point_have_a_bound() -> None:
    stage = StageCost(token_count=(0, 128, 512), token_seconds=(0.0, 0.00128, 0.00512), round_overhead_s=0.0064)
    requests = (Request(id="a", prompt_tokens=18), Request(id="b", prompt_tokens=68))
    one = Instance(cost=CostModel(stages=(stage,)).for_pp_size(6), requests=requests, window=None)
    bound_s = makespan_bound_s(Problem(cost=one.cost, requests=requests, chunk_multiple=UNIT))
    assert 0.98 * best_makespan_s(one) <= bound_s <= best_makespan_s(one) * (1.0 + 1e-9)
