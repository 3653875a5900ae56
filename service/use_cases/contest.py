"""A plan beside its rivals: the best fixed chunk, or every policy."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.replays.replay import Replay
from tuner.rounds.deadlines import Impossible, impossible_deadlines
from tuner.rounds.ends.mean_ttft import mean_ttft_bound_s
from tuner.rounds.problem import Problem, arrive_over_time
from tuner.rounds.round_plan import RoundPlan
from tuner.search.rules import Rules
from tuner.workload.objective import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Contest:
    """The plan, and what it is compared with: the best fixed chunk or all policies, the best first."""

    planned: RoundPlan
    policies: list[RoundPlan] = field(default_factory=list)
    """Of a batch."""
    replays: list[Replay] = field(default_factory=list)
    """Of requests that arrive over time."""
    impossible: tuple[Impossible, ...] = ()
    """Deadlines that no plan meets."""
    problem: Problem | None = None
    """Where the mean TTFT is bounded: of requests that arrive over time, and of batches planned for it."""

    @property
    def mean_ttft_bound_s(self) -> float | None:
        """No plan for these requests has a smaller mean TTFT; on tables it takes a while to prove."""
        return None if self.problem is None else mean_ttft_bound_s(self.problem)


def contest(
    cost: CostModel,
    requests: tuple[Request, ...],
    rules: Rules,
    *,
    compare: bool,
    planned: RoundPlan | None = None,
) -> Contest:
    """Plan by the rules, unless that is done, and compare: with every policy, or with the best fixed chunk alone."""

    impossible = tuple(impossible_deadlines(cost, requests, **rules.options))
    problem = Problem.of(cost, requests, **rules.options)
    if arrive_over_time(requests):
        *others, own = rules.replays(cost, requests, everything=compare)
        by_objective = functools.partial(_score, objective=rules.objective)
        if not compare:
            others = [min((one for one in others if one.policy.startswith("fixed:")), key=by_objective)]
        return Contest(
            planned=own.planned,
            replays=sorted([own, *others], key=by_objective),
            impossible=impossible,
            problem=problem,
        )
    bounded = problem if rules.objective is Objective.MEAN_TTFT and len(requests) > 1 else None
    if compare:
        policies = rules.compare(cost, requests)
        planned = next(one for one in policies if one.policy == rules.policy)
        return Contest(planned=planned, policies=policies, impossible=impossible, problem=bounded)
    planned = planned or rules.plan(cost, requests)
    fixed = replace(rules.baseline(cost, requests), bound=planned.bound)
    if rules.policy == "joint" and rules.best_first([planned, fixed], ours=planned)[0] is fixed:
        planned = replace(planned, rounds=fixed.rounds, evaluation=fixed.evaluation)
    rivals = [planned] if planned.policy == fixed.policy else [fixed, planned]  # of equals the simple one is first
    policies = rules.best_first(rivals, ours=planned)
    return Contest(planned=planned, policies=policies, impossible=impossible, problem=bounded)


def _score(replay: Replay, objective: Objective) -> tuple[float, ...]:
    return replay.evaluation.score(objective)
