"""The bound on the mean TTFT is below the best of all plans, and close to it where a stage is busy."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from tests.tuner.atom import atom
from tests.tuner.online.arrivals import stream
from tests.tuner.oracle import UNIT, Instance, random_instance
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Chunk, Request, Round
from tuner.plan.stage_cost import StageCost, scaled_stage
from tuner.plan.stage_order import StageOrder
from tuner.replays.comparison import replay
from tuner.rounds.bound import makespan_bound_s
from tuner.rounds.ends import mean_ttft
from tuner.rounds.ends.kth_ends import kth_ends_s
from tuner.rounds.ends.mean_ttft import mean_ttft_bound_s
from tuner.rounds.problem import Problem
from tuner.search.planner import plan_rounds
from tuner.workload.objective import Objective


def every_plan(instance: Instance, done: tuple[int, ...]) -> Iterator[list[Round]]:
    """All sequences of rounds from so many units of each request on."""
    units = [-(-request.new_tokens // UNIT) for request in instance.requests]
    if list(done) == units:
        yield []
        return
    for upto in itertools.product(*(range(a, b + 1) for a, b in zip(done, units, strict=True))):
        if upto == done:
            continue
        chunks = []
        for i, (request, a, b) in enumerate(zip(instance.requests, done, upto, strict=True)):
            if b > a:
                first = request.cached_tokens + a * UNIT
                end = min(request.cached_tokens + b * UNIT, request.prompt_tokens)
                chunks.append(Chunk(i, first, end - first))
        for rest in every_plan(instance, upto):
            yield [tuple(chunks), *rest]


@pytest.mark.parametrize("seed", range(24))
def test_no_plan_is_below_the_bound(seed: int) -> None:
    rng = random.Random(seed)
    instance = random_instance(seed, most_units=5)
    alone_s = instance.cost.stages[0].seconds([(UNIT, 0, True)])
    weights = [1.0] * 3 if seed % 2 else [rng.choice([0.5, 1.0, 4.0]) for _ in range(3)]
    requests = tuple(
        replace(request, arrival_s=rng.choice([0.0, 1.0, 2.5]) * alone_s, weight=weight)
        for request, weight in zip(instance.requests, weights, strict=False)
    )
    problem = Problem(cost=instance.cost, requests=requests, window=instance.window, chunk_multiple=UNIT)
    best_s = min(problem.evaluate(rounds).mean_ttft_s for rounds in every_plan(instance, (0,) * len(requests)))
    assert 0.0 < mean_ttft_bound_s(problem) <= best_s * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(100, 130))
def test_no_plan_of_a_batch_is_below_the_bounds(seed: int) -> None:
    """Neither any of its ends in their order, nor their weighted mean, with a head on the last stage or on all."""
    rng = random.Random(seed)
    instance = random_instance(seed, most_units=5)
    *first, last = instance.cost.stages
    head_s = rng.choice([0.0, 0.5]) * last.seconds([(UNIT, 0, False)])
    cost = replace(instance.cost, stages=(*first, replace(last, final_s=last.final_s + head_s)))
    weights = [rng.choice([0.5, 1.0, 4.0]) if seed % 2 else 1.0 for _ in instance.requests]
    requests = tuple(replace(one, weight=weight) for one, weight in zip(instance.requests, weights, strict=True))
    problem = Problem(cost=cost, requests=requests, window=instance.window, chunk_multiple=UNIT)
    assert not problem.is_timed
    found = [problem.evaluate(rounds) for rounds in every_plan(instance, (0,) * len(requests))]
    least_s = np.sort([one.ttft_s for one in found], axis=1).min(axis=0)
    assert (kth_ends_s(problem) <= least_s * (1 + 1e-9)).all()
    assert 0.0 < mean_ttft_bound_s(problem) <= min(one.mean_ttft_s for one in found) * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_no_plan_is_below_the_bound_where_stages_hold_several_groups(seed: int) -> None:
    """A stage waits for what is before its first group only, and only what is behind its last one follows."""
    rng = random.Random(seed)
    stage = StageCost(token_count=(0, UNIT), token_seconds=(0.0, 1.0), round_overhead_s=rng.choice([0.0, 0.1]))
    factors = [rng.choice([0.5, 1.0, 1.0]) for _ in range(4)]
    cost = CostModel(
        stages=tuple(scaled_stage(stage, factor) for factor in factors),
        virtual_stages=2,
        stage_order=rng.choice([StageOrder.LOOP, StageOrder.V]),
    )
    lengths = rng.choice([[UNIT * 4], [2 * UNIT, 2 * UNIT - 5], [UNIT, 3 * UNIT]])
    requests = tuple(Request(id=f"r{i}", prompt_tokens=tokens) for i, tokens in enumerate(lengths))
    problem = Problem(cost=cost, requests=requests, chunk_multiple=UNIT)
    instance = Instance(cost=cost, requests=requests, window=None)
    best_s = min(problem.evaluate(rounds).mean_ttft_s for rounds in every_plan(instance, (0,) * len(requests)))
    assert 0.0 < mean_ttft_bound_s(problem) <= best_s * (1 + 1e-9)


@pytest.mark.parametrize(("pp_size", "most"), [(2, 0.01), (4, 0.02), (8, 0.03)])
def test_the_gap_of_a_batch_is_small_on_several_stages(pp_size: int, most: float) -> None:
    """One busy machine leaves 35, 61 and 74 %."""
    requests = [Request(id=f"r{i}", prompt_tokens=32768) for i in range(4)]
    cost = atom(pp_size)
    mean_s = plan_rounds(cost, requests, objective=Objective.MEAN_TTFT).evaluation.mean_ttft_s
    assert mean_s <= (1.0 + most) * mean_ttft_bound_s(Problem.of(cost, requests))


def test_few_rounds_and_early_ends_are_weighed() -> None:
    """Four prompts on one stage whose rounds cost as much as a prompt: in two rounds of two they end at 3 and 6 s."""
    stage = StageCost(token_count=(0, 1000), token_seconds=(0.0, 1.0), round_overhead_s=1.0)
    requests = [Request(id=f"r{i}", prompt_tokens=1000) for i in range(4)]
    problem = Problem.of(CostModel(stages=(stage,)), requests)
    assert mean_ttft_bound_s(problem) == pytest.approx(4.5, rel=1e-6)


@pytest.mark.parametrize(("weight", "share"), [(1.0, 1.0), (3.0, 0.97)])
def test_it_is_the_truth_on_one_busy_stage(weight: float, share: float) -> None:
    """Two prompts on one stage that rounds cost nothing: the short one passes the long one. Weights cost some of it."""
    stage = StageCost(token_count=(0, 1000), token_seconds=(0.0, 1.0))
    requests = (
        Request(id="long", prompt_tokens=3200),
        Request(id="short", prompt_tokens=640, arrival_s=0.64, weight=weight),
    )
    problem = Problem(cost=CostModel(stages=(stage,)), requests=requests, objective=Objective.MEAN_TTFT)
    best_s = (3.84 + weight * 0.64) / (1.0 + weight)
    assert share * best_s - 1e-9 <= mean_ttft_bound_s(problem) <= best_s + 1e-9


def test_the_gap_of_a_stream_near_saturation_is_small_on_few_stages() -> None:
    stage = StageCost(token_count=(0, 1000), token_seconds=(0.0, 0.01), round_overhead_s=1e-4)
    cost = CostModel(stages=(stage, stage))
    requests = stream(8192, 0.07, 40)  # 82 ms of work every 70 ms
    mean_s = replay(cost, requests, policy="joint").evaluation.mean_ttft_s
    bound_s = mean_ttft_bound_s(Problem.of(cost, requests, objective=Objective.MEAN_TTFT))
    assert bound_s <= mean_s <= 1.15 * bound_s


@pytest.mark.parametrize("gap_s", [0.07, 1.0])
def test_what_requests_take_alone_is_proven_only_where_it_counts(gap_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is the same as with that proven for all: under load a stage's is larger than whatever they reach."""
    stage = StageCost(token_count=(0, 1000), token_seconds=(0.0, 0.01), round_overhead_s=1e-4)
    problem = Problem.of(CostModel(stages=(stage, stage)), stream(8192, gap_s, 40), objective=Objective.MEAN_TTFT)
    proven: list[Problem] = []

    def counted(one: Problem) -> float:
        proven.append(one)
        return makespan_bound_s(one)

    monkeypatch.setattr(mean_ttft, "makespan_bound_s", counted)
    bound_s = mean_ttft_bound_s(problem)
    assert bool(proven) == (gap_s == 1.0)
    monkeypatch.setattr(mean_ttft, "_reached_alone_s", lambda problem: np.full(len(problem.requests), np.inf))
    assert mean_ttft_bound_s(problem) == bound_s
    assert proven
