"""The planner's door: make rounds by a named policy, evaluate them exactly, bound any plan, compare policies."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Unpack

from db.errors import UserError
from db.numbers import whole_number
from tuner.bound import makespan_bound_s
from tuner.cost_model import MAX_TOKENS, CostModel
from tuner.plan import Request, Round
from tuner.policies.arrivals import batch_by_batch
from tuner.policies.ascend import ascend_rounds
from tuner.policies.dp import dp_rounds
from tuner.policies.fixed import fixed_rounds, gpipe_rounds
from tuner.policies.joint import joint_rounds
from tuner.policies.sglang import sglang_rounds
from tuner.policies.terapipe import terapipe_rounds
from tuner.problem import Limits, Problem, RoundOptions
from tuner.schedule import Evaluation, Objective

__all__ = ["POLICIES", "Limits", "Objective", "RoundPlan", "compare_policies", "plan_rounds"]

POLICIES = ("fixed:N", "gpipe", "sglang", "ascend", "terapipe", "dp", "joint")
BASED = {"sglang": sglang_rounds, "ascend": ascend_rounds}
"""Policies whose base chunk the user sets (`sglang:N`); without N the best power of two is taken."""
MOST_ROUNDS = 16_384
"""The fixed sweep leaves out chunks so short that a plan would have more rounds."""
MOST_BASES = 10
"""Base chunks that are tried, the largest ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundPlan:
    """Rounds, what they are expected to take, and how far from the best they can be at most."""

    policy: str
    rounds: tuple[Round, ...]
    evaluation: Evaluation
    lower_bound_s: float
    """No plan for these requests on this cost model has a smaller makespan (`tuner.bound` says why)."""
    planning_s: float
    """Seconds that making the rounds and the bound took."""

    @property
    def makespan_s(self) -> float:
        """Seconds until the last request has its first token."""
        return self.evaluation.makespan_s

    @property
    def gap(self) -> float:
        """makespan / lower bound - 1: the plan is at most this far above the best possible makespan."""
        return self.evaluation.makespan_s / self.lower_bound_s - 1.0 if self.lower_bound_s else 0.0


def plan_rounds(
    cost: CostModel,
    requests: Sequence[Request],
    *,
    policy: str = "joint",
    **options: Unpack[RoundOptions],
) -> RoundPlan:
    """Decide the rounds of a batch.

    `cost` has one entry a stage (`CostModel.for_pp_size`). Raises UserError for an unknown policy, an empty batch, a
    window of 0 or limits under which no plan exists.
    """
    problem = Problem.of(cost, requests, **options)
    return _plan(problem, policy, *_timed_bound(problem))


def _timed_bound(problem: Problem) -> tuple[float, float]:
    """The bound, and the seconds that it took."""
    started = time.perf_counter()
    return makespan_bound_s(problem), time.perf_counter() - started


def _plan(problem: Problem, policy: str, bound_s: float, bounding_s: float) -> RoundPlan:
    started = time.perf_counter()
    rounds = tuple(make_rounds(problem, policy, bound_s))
    evaluation = problem.evaluate(rounds)
    return RoundPlan(
        policy=policy,
        rounds=rounds,
        evaluation=evaluation,
        lower_bound_s=bound_s,
        planning_s=bounding_s + time.perf_counter() - started,
    )


def make_rounds(problem: Problem, policy: str, bound_s: float = 0.0) -> list[Round]:
    """Rounds by a named policy. Raises UserError for an unknown one."""
    name, _, argument = policy.partition(":")
    if name == "fixed":
        return fixed_rounds(problem, _num_tokens(policy, argument, problem.chunk_multiple))
    if name in BASED and argument:
        return BASED[name](problem, _num_tokens(policy, argument, problem.chunk_multiple))
    if name in BASED:
        return _best_base(problem, BASED[name])
    rules: dict[str, Callable[[Problem], list[Round]]] = {
        "gpipe": gpipe_rounds,
        "terapipe": terapipe_rounds,
        "dp": dp_rounds,
        "joint": lambda problem: joint_rounds(problem, bound_s),
    }
    if argument or name not in rules:
        raise UserError("policy", policy, f"one of {', '.join(POLICIES)}")
    if problem.is_timed and name != "joint":
        return batch_by_batch(problem, rules[name])
    return rules[name](problem)


def _best_base(problem: Problem, rule: Callable[[Problem, int], list[Round]]) -> list[Round]:
    """A policy that leaves its base chunk to the user, at the best of the powers of two: tuned, not its default."""
    sizes = [int(name.removeprefix("fixed:")) for name in fixed_sweep(problem.requests, problem.chunk_multiple)]
    plans = [rule(problem, size) for size in sizes[-MOST_BASES:]]
    return min(plans, key=lambda rounds: problem.evaluate(rounds).score(problem.objective))


def _num_tokens(policy: str, argument: str, chunk_multiple: int) -> int:
    name = policy.partition(":")[0]
    try:
        return whole_number("policy", argument, least=chunk_multiple, most=MAX_TOKENS)
    except UserError:
        allowed = f"{name}:N with N at least {chunk_multiple} tokens (chunk_multiple)"
        raise UserError("policy", policy, allowed) from None


def compare_policies(cost: CostModel, requests: Sequence[Request], **options: Unpack[RoundOptions]) -> list[RoundPlan]:
    """Plan by every policy, the fixed chunk swept over powers of two of `chunk_multiple`; the best first."""
    problem = Problem.of(cost, requests, **options)
    policies = [*fixed_sweep(requests, problem.chunk_multiple), *POLICIES[1:]]
    bound = _timed_bound(problem)  # of any plan: one for all policies
    plans = [_plan(problem, policy, *bound) for policy in policies]
    return sorted(plans, key=lambda plan: plan.evaluation.score(problem.objective))


def fixed_sweep(requests: Sequence[Request], chunk_multiple: int) -> list[str]:
    """`fixed:N` for chunk_multiple times each power of two, up to the first that holds the longest prompt.

    Sizes that would cut the batch into more than MOST_ROUNDS rounds are left out.
    """
    longest = max((request.new_tokens for request in requests), default=0)
    total = sum(request.new_tokens for request in requests)
    sizes = [chunk_multiple]
    while sizes[-1] < longest:
        sizes.append(2 * sizes[-1])
    return [f"fixed:{size}" for size in sizes if total <= size * MOST_ROUNDS or size == sizes[-1]]
