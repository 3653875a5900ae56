"""Rounds with their predicted times and their gap to the lower bound, also as the content of a plan file."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property

from profiler.sequence.kind import SequenceCut
from tuner.plan.layout import Layout
from tuner.plan.plan import Parallel, Plan, Predicted, Request, Round, TunedFor
from tuner.rounds.bound import ROUNDING, makespan_bound_s
from tuner.rounds.grid.relaxation import is_curved
from tuner.rounds.problem import Problem
from tuner.rounds.schedule import Evaluation
from tuner.workload.objective import MAX_MAKESPAN_INCREASE, Objective


class Bound:
    """The lower bounds of a problem, proven when they are first asked for."""

    def __init__(self, problem: Problem | Callable[[], Problem]) -> None:
        self._given, self._searched_s = problem, 0.0

    @cached_property
    def _problem(self) -> Problem:
        return self._given if isinstance(self._given, Problem) else self._given()

    @property
    def seconds(self) -> float:
        """No plan has a smaller makespan: by a relaxation (`rounds.bound` says why), or since all plans of a small
        batch were searched. On tables the former takes longer than a quick plan."""
        return self._searched_s or self._relaxed_s

    @cached_property
    def _relaxed_s(self) -> float:
        return makespan_bound_s(self._problem)

    def raise_to(self, makespan_s: float) -> None:
        """An exact search has found that no plan has a smaller makespan."""
        self._searched_s = makespan_s * (1.0 - ROUNDING)

    @property
    def while_planning_s(self) -> float:
        """What tells a search when to stop; 0 for tables and stages that differ, whose bounds take longer to prove than
        plans to improve."""
        kinds = self._problem.cost.kinds
        return 0.0 if len(kinds) > 1 or is_curved(kinds) else self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """Rounds of a policy and their prediction."""

    policy: str
    rounds: tuple[Round, ...]
    evaluation: Evaluation
    bound: Bound = field(repr=False, compare=False)
    planning_s: float
    """Seconds that making the rounds took."""

    @property
    def makespan_s(self) -> float:
        """Seconds until the last request has its first token."""
        return self.evaluation.makespan_s

    @property
    def lower_bound_s(self) -> float:
        """No plan for these requests on this cost model has a smaller makespan."""
        return self.bound.seconds

    @property
    def gap(self) -> float:
        """makespan / lower bound - 1: the plan is at most this far above the best possible makespan."""
        return self.evaluation.makespan_s / self.lower_bound_s - 1.0 if self.lower_bound_s else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Another way to run the same requests: its layout and rounds, or why it cannot run."""

    layout: Layout
    rounds: RoundPlan | None = None
    refusal: str | None = None

    def to_json(self, objective: Objective) -> dict[str, object]:
        """For programs."""
        planned = self.rounds
        return {
            "layout": str(self.layout),
            "policy": planned and planned.policy,
            "makespan_s": planned and planned.makespan_s,
            "mean_ttft_s": planned and planned.evaluation.mean_ttft_s,
            "sought": planned and planned.evaluation.sought(objective),
            "refusal": self.refusal,
        }


def best_first(
    plans: Iterable[RoundPlan],
    objective: Objective,
    *,
    ours: RoundPlan,
    max_makespan_increase: float = MAX_MAKESPAN_INCREASE,
) -> list[RoundPlan]:
    """Plans of one batch by the objective.

    For another objective than the makespan, those that give up more than that share of the least makespan are last,
    unless their makespan is no longer than that of `ours`.
    """
    plans = list(plans)
    slack = math.inf if objective is Objective.MAKESPAN else 1.0 + max_makespan_increase
    limit_s = max(slack * min(plan.makespan_s for plan in plans), ours.makespan_s)
    return sorted(plans, key=lambda plan: (max(plan.makespan_s - limit_s, 0.0), *plan.evaluation.score(objective)))


def rounds_to_plan(
    planned: RoundPlan,
    *,
    requests: tuple[Request, ...],
    model: dict[str, object],
    precision: str,
    parallel: Parallel,
    window: int | None,
    cost_model: dict[str, object],
    threads_per_rank: int | None = None,
    tuned_for: TunedFor | None = None,
    uncertainty: float | None = None,
    cuts: tuple[SequenceCut, ...] = (),
) -> Plan:
    """Rounds with their prediction as a plan."""
    evaluation = planned.evaluation
    return Plan(
        model=model,
        precision=precision,
        parallel=parallel,
        window=window,
        threads_per_rank=threads_per_rank,
        requests=requests,
        rounds=planned.rounds,
        cuts=cuts,
        policy=planned.policy,
        tuned_for=tuned_for,
        cost_model=cost_model,
        predicted=Predicted(
            makespan_s=planned.makespan_s,
            lower_bound_s=planned.lower_bound_s,
            gap=planned.gap,
            ttft_s=tuple(float(seconds) for seconds in evaluation.ttft_s),
            planning_s=planned.planning_s,
            round_s=tuple(tuple(row) for row in evaluation.round_s.tolist()),
            uncertainty=uncertainty,
        ),
    )


@contextmanager
def no_cycles() -> Iterator[None]:
    """Python's search for cycles of objects is off meanwhile.

    Candidates are many small objects without cycles, and looking for some takes up to a fifth of the planning time.
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()
