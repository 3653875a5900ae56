"""A policy with its options, applied to any cost model and requests."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, TunedFor
from tuner.policies.joint import draft_choices
from tuner.replays.comparison import compare_replays, replay
from tuner.replays.replay import Replay, Runs
from tuner.rounds.problem import NO_LIMITS, Limits, Problem, RoundOptions, arrive_over_time
from tuner.rounds.round_plan import Bound, RoundPlan, best_first
from tuner.rounds.schedule import FlatRounds, RoundTimes
from tuner.search.planner import best_fixed, compare_policies, draft_plan, plan_rounds
from tuner.workload.objective import MAX_MAKESPAN_INCREASE, Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """A policy and the options of rounds."""

    policy: str = "joint"
    window: int | None = None
    chunk_multiple: int = 64
    limits: Limits = NO_LIMITS
    objective: Objective = Objective.MAKESPAN
    max_makespan_increase: float = MAX_MAKESPAN_INCREASE
    num_trials: int = 0
    """Settings of the online planner that a study tries on a trace."""
    known: dict[Problem, Runs] = field(default_factory=dict, compare=False, repr=False)
    """Traces that were run under policies by these rules, and by all that were made from them."""

    @property
    def options(self) -> RoundOptions:
        """All but the policy."""
        return {
            "window": self.window,
            "chunk_multiple": self.chunk_multiple,
            "limits": self.limits,
            "objective": self.objective,
            "max_makespan_increase": self.max_makespan_increase,
        }

    def tuned_for(self, requests: Sequence[Request]) -> TunedFor:
        """What a plan of these requests is made for."""
        limited = self.objective is not Objective.MAKESPAN and not arrive_over_time(requests)
        most = self.max_makespan_increase if limited and math.isfinite(self.max_makespan_increase) else None
        return TunedFor(objective=self.objective.value, max_makespan_increase=most)

    def plan(self, cost: CostModel, requests: Sequence[Request]) -> RoundPlan:
        """Rounds by the policy; of requests that arrive over time, what it is expected to make of them."""
        if not arrive_over_time(requests):
            return plan_rounds(cost, requests, policy=self.policy, **self.options)
        if self.policy == "joint":
            return self.replays(cost, requests, everything=False)[-1].planned
        return replay(cost, requests, policy=self.policy, known=self.known, **self.options).planned

    def draft(self, cost: CostModel, requests: Sequence[Request]) -> RoundPlan:
        """Rounds by the policy, quickly: to choose a layout and a partition by."""
        return draft_plan(cost, requests, policy=self.policy, **self.options)

    def sketch(
        self, cost: CostModel, like: CostModel, requests: Sequence[Request], most: int, hopeful_s: float
    ) -> RoundPlan:
        """The best under `cost` of the few drafts that are best under costs `like` them, which are quicker to judge.

        Of drafts that take longer than `hopeful_s` even there, only the first is judged.
        """
        problem, started = Problem.of(cost, requests, **self.options), time.perf_counter()
        if self.policy != "joint" or problem.is_timed:
            return self.draft(cost, requests)
        quick = replace(problem, cost=like)
        drafts = draft_choices(quick, most)
        if quick.evaluate(drafts[0]).makespan_s > hopeful_s:
            drafts = drafts[:1]
        rounds = drafts[0]
        evaluation = problem.evaluate(rounds)
        for other in drafts[1:]:
            times = RoundTimes.of(cost, requests, FlatRounds.of(other))
            if self.objective is Objective.MAKESPAN and times.least_makespan_s(cost) >= evaluation.makespan_s:
                continue
            judged = times.evaluation(cost, requests, problem.window)
            if judged.score(self.objective) < evaluation.score(self.objective):
                rounds, evaluation = other, judged
        return RoundPlan(
            policy=self.policy,
            rounds=tuple(rounds),
            evaluation=evaluation,
            bound=Bound(problem),
            planning_s=time.perf_counter() - started,
        )

    def compare(self, cost: CostModel, requests: Sequence[Request]) -> list[RoundPlan]:
        """Rounds by every policy, the best first; this policy with its parameter is one of them."""
        plans = compare_policies(cost, requests, **self.options)
        if all(plan.policy != self.policy for plan in plans):
            plans.append(self.plan(cost, requests))
        own = next(plan for plan in plans if plan.policy == self.policy)
        return self.best_first(plans, ours=own)

    def best_first(self, plans: Sequence[RoundPlan], *, ours: RoundPlan) -> list[RoundPlan]:
        """Plans of one batch by the objective; those beyond the makespan's limit are last, unless `ours` is, too."""
        return best_first(plans, self.objective, ours=ours, max_makespan_increase=self.max_makespan_increase)

    def baseline(self, cost: CostModel, requests: Sequence[Request]) -> RoundPlan:
        """The best fixed chunk: what a scheduler without a plan could do."""
        return best_fixed(cost, requests, **self.options)

    def replays(self, cost: CostModel, requests: Sequence[Request], *, everything: bool) -> list[Replay]:
        """Requests that arrive over time under every policy, or a long trace under the likely ones; this one last."""
        known, trials = self.known, self.num_trials
        replays = compare_replays(cost, requests, everything=everything, num_trials=trials, known=known, **self.options)
        if self.policy == "joint":
            return replays
        own = replay(cost, requests, policy=self.policy, known=known, **self.options)
        return [*(one for one in replays if one.policy != self.policy), own]
