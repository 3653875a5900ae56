"""The bound of stages of several groups against every cut and every order; plans for them are complete and above it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.tuner.oracle import UNIT
from tests.tuner.passes_oracle import best_of_all_s, best_order_s, random_passes
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, check_rounds
from tuner.plan.stage_cost import StageCost
from tuner.plan.stage_order import StageOrder
from tuner.plan.task_order import task_order
from tuner.policies.ramp import ramps
from tuner.rounds.bound import makespan_bound_s
from tuner.rounds.problem import Problem
from tuner.rounds.schedule import FlatRounds, RoundTimes, evaluate
from tuner.search.planner import plan_rounds


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_no_cut_and_no_order_is_below_the_bound(first: int) -> None:
    for seed in range(first, first + 50):
        one = random_passes(seed, most_units=4)
        problem = Problem(cost=one.cost, requests=one.requests, window=one.window, chunk_multiple=UNIT)
        assert makespan_bound_s(problem) <= best_of_all_s(one) * (1.0 + 1e-9), seed


def test_the_rule_is_the_best_order_of_equal_rounds() -> None:
    """Four rounds on two stages: none of all orders ends sooner."""
    group = StageCost(token_count=(0, 8), token_seconds=(0.0, 8.0))
    cost = CostModel(stages=(group,) * 4, virtual_stages=2)
    seconds = [[1.0] * 4 for _ in range(4)]
    order = task_order(4, 2, 2, StageOrder.LOOP)
    requests = [Request(id=f"r{i}", prompt_tokens=1) for i in range(4)]
    rounds = plan_rounds(cost, requests, policy="fixed:1", chunk_multiple=1).rounds
    ours = evaluate(cost, requests, rounds).makespan_s
    assert len(order.rounds) == 16 and ours == best_order_s(cost, seconds, [0.0] * 4, None, 1e9) == 9.0


@pytest.mark.parametrize("objective", ["makespan", "mean-ttft"])
def test_every_policy_plans_for_several_groups(objective: str) -> None:
    for seed in range(6):
        rng = random.Random(seed)
        one = random_passes(seed, most_units=4)
        requests = [replace(r, prompt_tokens=r.prompt_tokens + rng.randint(0, 4000)) for r in one.requests]
        if seed % 3 == 0:
            requests = [replace(r, arrival_s=rng.uniform(0.0, 0.1)) for r in requests]
        for policy in ("fixed:512", "gpipe", "sglang", "ascend", "terapipe", "dp", "joint"):
            plan = plan_rounds(
                one.cost, requests, policy=policy, window=one.window, chunk_multiple=UNIT, objective=objective
            )
            check_rounds(requests, plan.rounds)
            assert plan.lower_bound_s <= plan.makespan_s * (1.0 + 1e-9)
            times = RoundTimes.of(one.cost, requests, FlatRounds.of(plan.rounds))
            assert times.round_s.sum() / one.cost.pp_size <= times.least_makespan_s(one.cost) * (1.0 + 1e-9)
            assert times.least_makespan_s(one.cost) <= plan.makespan_s * (1.0 + 1e-9)


def test_ramps_run_every_token_once_and_stay_on_the_grid() -> None:
    requests = [Request(id="a", prompt_tokens=5000, cached_tokens=37), Request(id="b", prompt_tokens=900)]
    cost = CostModel(stages=(StageCost(token_count=(0, 8), token_seconds=(0.0, 8.0)),))
    rounds = plan_rounds(cost, requests, policy="fixed:1024", chunk_multiple=64).rounds
    found = [ramp for width in (1, 2) for ramp in ramps(requests, rounds, 64, width)]
    assert max(len(ramp) for ramp in found) > len(rounds) + 4
    for ramp in found:
        check_rounds(requests, ramp)
        for chunks in ramp:
            for chunk in chunks:
                request = requests[chunk.request]
                assert chunk.end == request.prompt_tokens or (chunk.end - request.cached_tokens) % 64 == 0
