"""Replaying an arrival trace: every policy sees a request only once it has arrived; TTFT percentiles and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Unpack

import numpy as np

from tuner.cost_model import CostModel
from tuner.online import online_rounds
from tuner.plan import Request
from tuner.planner import POLICIES, fixed_sweep, make_rounds
from tuner.problem import Problem, RoundOptions
from tuner.schedule import Evaluation, Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a policy makes of a trace."""

    policy: str
    evaluation: Evaluation
    num_rounds: int
    tokens_per_s: float
    """New prompt tokens a second from the first arrival to the last TTFT."""

    def ttft_s(self, percentile: float) -> float:
        """A percentile of the TTFTs."""
        return float(np.percentile(self.evaluation.ttft_s, percentile))


def replay(
    cost: CostModel,
    requests: Sequence[Request],
    *,
    policy: str = "joint",
    **options: Unpack[RoundOptions],
) -> Replay:
    """Run a trace under a policy, in the exact recurrence.

    `joint` is the online Planner. The schedulers (`fixed:N`, `sglang`, `ascend`) decide round by round as their
    sources do. The batch policies (`gpipe`, `terapipe`, `dp`) plan all that waits whenever the first stage has run
    dry.
    """
    problem = _problem(cost, requests, options)
    rounds = online_rounds(problem) if policy == "joint" else make_rounds(problem, policy)
    evaluation = problem.evaluate(rounds)
    first = min(request.arrival_s for request in requests)
    tokens = sum(request.new_tokens for request in requests)
    return Replay(
        policy=policy,
        evaluation=evaluation,
        num_rounds=len(rounds),
        tokens_per_s=tokens / (evaluation.makespan_s - first),
    )


def compare_replays(
    cost: CostModel, requests: Sequence[Request], *, least_chunk: int = 1024, **options: Unpack[RoundOptions]
) -> list[Replay]:
    """Replay a trace under every policy, the fixed chunk swept over powers of two from `least_chunk` tokens up."""
    swept = fixed_sweep(requests, _problem(cost, requests, options).chunk_multiple)
    fixed = [name for name in swept if int(name.removeprefix("fixed:")) >= least_chunk]
    return [replay(cost, requests, policy=policy, **options) for policy in [*fixed, *POLICIES[1:]]]


def _problem(cost: CostModel, requests: Sequence[Request], options: RoundOptions) -> Problem:
    """The problem; where the caller names no objective, the mean TTFT's."""
    with_objective: RoundOptions = {"objective": Objective.MEAN_TTFT, **options}
    return Problem.of(cost, requests, **with_objective)
