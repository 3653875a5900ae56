"""Replaying an arrival trace: every policy sees a request only once it has arrived; TTFT percentiles and throughput."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Unpack

import numpy as np

from db.errors import UserError
from tuner.online.online_planner import online_rounds
from tuner.online.settings import OnlineSettings
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, Round
from tuner.policies.named import BASED, POLICIES, base_sizes, fixed_sweep, named_rounds
from tuner.rounds.problem import Problem, RoundOptions
from tuner.rounds.round_plan import Bound, RoundPlan
from tuner.rounds.schedule import Evaluation, Objective

TRIED = (
    OnlineSettings(),
    OnlineSettings(foresight=0.3),
    OnlineSettings(foresight=4.0),
    OnlineSettings(foresight=1000.0),
    OnlineSettings(aging=0.1),
    OnlineSettings(aging=1.0),
    OnlineSettings(aging=1.0, foresight=4.0),
    OnlineSettings(aging=1.0, foresight=1000.0),
)
"""Settings of the online planner that are tried."""
FEW_REQUESTS = 128
"""Of a longer trace only the beginning is replayed under every policy, unless all are asked for."""
NEARLY = 1.2
"""Policies whose mean TTFT there is within this factor of the least are replayed in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a policy makes of a trace. The policy is the plan: its rounds are what it is expected to do."""

    policy: str
    planned: RoundPlan
    """Its policy with the parameter that was best: `sglang:4096`, `joint:1.5`; of `joint` maybe a simpler policy."""
    tokens_per_s: float
    """New prompt tokens a second from the first arrival to the last TTFT."""

    @property
    def evaluation(self) -> Evaluation:
        """What the cost model says of the rounds."""
        return self.planned.evaluation

    @property
    def num_rounds(self) -> int:
        """Number of rounds."""
        return len(self.planned.rounds)

    def ttft_s(self, percentile: float) -> float:
        """A percentile of the TTFTs."""
        return float(np.percentile(self.evaluation.ttft_s, percentile))


def replay(
    cost: CostModel, requests: Sequence[Request], *, policy: str = "joint", **options: Unpack[RoundOptions]
) -> Replay:
    """Run a trace under a policy, in the exact recurrence.

    `joint` is the online planner, its caps scaled by S in `joint:S`. The schedulers (`fixed:N`, `sglang`, `ascend`)
    decide round by round as their sources do. The batch policies (`gpipe`, `terapipe`, `dp`) plan all that waits
    whenever the first stage has run dry. A parameter that is left open is the best one by the objective.
    """
    problem = _problem(cost, requests, options)
    return _best(problem, policy, _names(problem, policy), Bound(problem))


def compare_replays(
    cost: CostModel,
    requests: Sequence[Request],
    *,
    least_chunk: int = 1024,
    everything: bool = True,
    **options: Unpack[RoundOptions],
) -> list[Replay]:
    """Replay a trace under every policy, the fixed chunk swept over powers of two from `least_chunk` tokens up.

    The last is `joint`: the online planner, or a simpler policy that is better by the objective.
    everything: or else a trace of more than FEW_REQUESTS only under the online planner, the best fixed chunk and what
    is NEARLY as good on the trace's beginning.
    """
    problem = _problem(cost, requests, options)
    bound = Bound(problem)
    swept = fixed_sweep(requests, problem.chunk_multiple)
    fixed = [name for name in swept if int(name.removeprefix("fixed:")) >= least_chunk] or swept[-1:]
    policies = {policy: _names(problem, policy) for policy in [*fixed, *POLICIES[1:]]}
    if not everything and len(requests) > FEW_REQUESTS:
        policies = _shortlist(problem, policies)
    replays = [_best(problem, policy, names, bound) for policy, names in policies.items()]
    best = min(reversed(replays), key=lambda one: one.evaluation.score(problem.objective))
    return [*replays[:-1], replace(best, policy="joint")]


def every_replay(
    cost: CostModel, requests: Sequence[Request], *, least_chunk: int = 1024, **options: Unpack[RoundOptions]
) -> list[Replay]:
    """Replay a trace under every policy with every parameter that is tried."""
    problem = _problem(cost, requests, options)
    bound = Bound(problem)
    swept = fixed_sweep(requests, problem.chunk_multiple)
    fixed = [name for name in swept if int(name.removeprefix("fixed:")) >= least_chunk] or swept[-1:]
    names = [name for policy in [*fixed, *POLICIES[1:]] for name in _names(problem, policy)]
    return [_replay(problem, name, bound) for name in names]


def _names(problem: Problem, policy: str) -> list[str]:
    """The policy with each of the parameters that it leaves open."""
    if policy == "joint":
        return [f"joint:{settings}" for settings in TRIED]
    return [f"{policy}:{base}" for base in base_sizes(problem)] if policy in BASED else [policy]


def _shortlist(problem: Problem, policies: dict[str, list[str]]) -> dict[str, list[str]]:
    """Policies under the parameter that is best on the trace's beginning, those far from the best left out."""
    first = sorted(problem.requests, key=lambda request: request.arrival_s)[:FEW_REQUESTS]
    beginning = replace(problem, requests=tuple(first))
    bound = Bound(beginning)
    tried = {policy: _best(beginning, policy, names, bound) for policy, names in policies.items()}

    def mean_s(policy: str) -> float:
        return tried[policy].evaluation.mean_ttft_s

    fixed = min((policy for policy in tried if policy.startswith("fixed:")), key=mean_s)
    most_s, latest_s = NEARLY * min(map(mean_s, tried)), tried["joint"].evaluation.makespan_s
    return {
        policy: [one.planned.policy]
        for policy, one in tried.items()
        if policy in (fixed, "joint") or mean_s(policy) <= most_s or one.evaluation.makespan_s < latest_s / NEARLY
    }


def _best(problem: Problem, policy: str, names: Sequence[str], bound: Bound) -> Replay:
    """The policy under the parameter that is best by the objective."""
    replays = [_replay(problem, name, bound) for name in names]
    best = min(replays, key=lambda one: one.evaluation.score(problem.objective))
    return replace(best, policy=policy)


def _replay(problem: Problem, policy: str, bound: Bound) -> Replay:
    started = time.perf_counter()
    rounds = _rounds(problem, policy)
    evaluation = problem.evaluate(rounds)
    planning_s = time.perf_counter() - started
    first = min(request.arrival_s for request in problem.requests)
    tokens = sum(request.new_tokens for request in problem.requests)
    planned = RoundPlan(policy=policy, rounds=tuple(rounds), evaluation=evaluation, bound=bound, planning_s=planning_s)
    return Replay(policy=policy, planned=planned, tokens_per_s=tokens / (evaluation.makespan_s - first))


def _rounds(problem: Problem, policy: str) -> list[Round]:
    name, _, settings = policy.partition(":")
    if name != "joint":
        return named_rounds(problem, policy)
    return online_rounds(problem, OnlineSettings.parse(settings))


def _problem(cost: CostModel, requests: Sequence[Request], options: RoundOptions) -> Problem:
    """The problem; where the caller names no objective, the mean TTFT's."""
    with_objective: RoundOptions = {"objective": Objective.MEAN_TTFT, **options}
    return Problem.of(cost, requests, **with_objective)
