"""A trace under one policy, which sees a request only once it has arrived; its TTFT and throughput."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from tuner.online.driven import online_rounds
from tuner.online.settings import OnlineSettings
from tuner.plan.plan import Round
from tuner.policies.named import named_rounds
from tuner.rounds.problem import Problem
from tuner.rounds.round_plan import Bound, RoundPlan
from tuner.rounds.schedule import Evaluation

FEW_REQUESTS = 128
"""Of a longer trace only the beginning is replayed under every policy, unless all are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A trace under one policy, with the rounds that the policy is predicted to run."""

    policy: str
    planned: RoundPlan
    """Its policy with the parameter that was best: `sglang:4096`, `joint:1.5`; of `joint` maybe a simpler policy."""
    tokens_per_s: float
    """New prompt tokens a second from the first arrival to the last TTFT."""
    goodput: float
    """Requests a second of the same time that meet their limits of TTFT and TPOT; all do that have none."""

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


class Runs:
    """A trace on one pipeline: each policy is run once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._bound = Bound(problem)
        self._known: dict[str, Replay] = {}

    def under(self, policy: str) -> Replay:
        """The replay under a policy with its parameters."""
        if policy not in self._known:
            self._known[policy] = _replay(self.problem, policy, self._bound)
        return self._known[policy]

    @cached_property
    def beginning(self) -> Runs:
        """Of the first FEW_REQUESTS requests alone."""
        first = sorted(self.problem.requests, key=lambda request: request.arrival_s)[:FEW_REQUESTS]
        return Runs(replace(self.problem, requests=tuple(first)))


def _replay(problem: Problem, policy: str, bound: Bound) -> Replay:
    started = time.perf_counter()
    rounds = _rounds(problem, policy)
    evaluation = problem.evaluate(rounds)
    planning_s = time.perf_counter() - started
    first = min(request.arrival_s for request in problem.requests)
    tokens = sum(request.new_tokens for request in problem.requests)
    planned = RoundPlan(policy=policy, rounds=tuple(rounds), evaluation=evaluation, bound=bound, planning_s=planning_s)
    span_s = evaluation.makespan_s - first
    goodput = evaluation.num_sla_met / span_s
    return Replay(policy=policy, planned=planned, tokens_per_s=tokens / span_s, goodput=goodput)


def _rounds(problem: Problem, policy: str) -> list[Round]:
    name, _, settings = policy.partition(":")
    if name != "joint":
        return named_rounds(problem, policy)
    return online_rounds(problem, OnlineSettings.parse(settings))
