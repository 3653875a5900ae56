"""Entry points of the planner: make rounds by a named policy, evaluate and bound them, compare policies."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, Round
from tuner.policies.joint import draft_rounds, joint_rounds
from tuner.policies.named import POLICIES, Floor, fixed_sweep, named_rounds
from tuner.rounds.problem import Limits, Problem, RoundOptions
from tuner.rounds.round_plan import Bound, RoundPlan, best_first, no_cycles
from tuner.workload.objective import Objective

__all__ = [
    "POLICIES",
    "Limits",
    "Objective",
    "RoundPlan",
    "best_fixed",
    "compare_policies",
    "draft_plan",
    "plan_rounds",
]


def plan_rounds(
    cost: CostModel, requests: Sequence[Request], *, policy: str = "joint", **options: Unpack[RoundOptions]
) -> RoundPlan:
    """Decide the rounds of a batch.

    `cost` has one entry a stage (`CostModel.for_pp_size`). Raises UserError for an unknown policy, an empty batch, a
    window of 0 or limits under which no plan exists.
    """
    problem = Problem.of(cost, requests, **options)
    return _plan(problem, policy, Bound(problem))


def draft_plan(
    cost: CostModel, requests: Sequence[Request], *, policy: str = "joint", **options: Unpack[RoundOptions]
) -> RoundPlan:
    """As `plan_rounds`, but `joint` without its slow steps: bound, comparison with other policies, local search.

    For the choice among layouts and partitions, which needs many plans.
    """
    problem = Problem.of(cost, requests, **options)
    if policy != "joint":
        return _plan(problem, policy, Bound(problem))
    started = time.perf_counter()
    with no_cycles():
        rounds = draft_rounds(problem)
    return _judged(problem, policy, rounds, Bound(problem), started)


def compare_policies(cost: CostModel, requests: Sequence[Request], **options: Unpack[RoundOptions]) -> list[RoundPlan]:
    """Plan by every policy, the fixed chunk swept over powers of two of `chunk_multiple`; the best first.

    `joint` takes over a simpler policy's rounds where they are better: where its own are near the bound it does not
    look at theirs.
    """
    problem = Problem.of(cost, requests, **options)
    bound = Bound(problem)

    policies = [*fixed_sweep(requests, problem.chunk_multiple), *POLICIES[1:-1]]
    simpler = [_plan(problem, policy, bound) for policy in policies]
    ours = _plan(problem, "joint", bound)
    most = problem.max_makespan_increase
    best, *_ = best_first([ours, *simpler], problem.objective, ours=ours, max_makespan_increase=most)
    ours = replace(ours, rounds=best.rounds, evaluation=best.evaluation)
    return best_first([ours, *simpler], problem.objective, ours=ours, max_makespan_increase=most)


def best_fixed(cost: CostModel, requests: Sequence[Request], **options: Unpack[RoundOptions]) -> RoundPlan:
    """The best of the swept fixed chunks: the simple baseline. Chunks too short to win are not tried."""
    problem = Problem.of(cost, requests, **options)
    bound, floor, best = Bound(problem), Floor(problem), None
    for policy in reversed(fixed_sweep(requests, problem.chunk_multiple)):
        if best and floor.score(policy) >= best.evaluation.score(problem.objective)[0]:
            break
        plan = _plan(problem, policy, bound)
        if best is None or plan.evaluation.score(problem.objective) < best.evaluation.score(problem.objective):
            best = plan
    assert best is not None
    return best


def make_rounds(problem: Problem, policy: str, bound: Bound | None = None) -> list[Round]:
    """Rounds by a named policy. Raises UserError for an unknown one."""
    return joint_rounds(problem, bound or Bound(problem)) if policy == "joint" else named_rounds(problem, policy)


def _plan(problem: Problem, policy: str, bound: Bound) -> RoundPlan:
    started = time.perf_counter()
    with no_cycles():
        rounds = make_rounds(problem, policy, bound)
    return _judged(problem, policy, rounds, bound, started)


def _judged(problem: Problem, policy: str, rounds: Sequence[Round], bound: Bound, started: float) -> RoundPlan:
    evaluation = problem.evaluate(rounds)
    planning_s = time.perf_counter() - started
    return RoundPlan(policy=policy, rounds=tuple(rounds), evaluation=evaluation, bound=bound, planning_s=planning_s)
