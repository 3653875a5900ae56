"""Policies by name, `joint` left out: the field's and `dp`, and which of them could still beat a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from db.errors import UserError
from tuner.plan import Request, Round
from tuner.policies.arrivals import batch_by_batch
from tuner.policies.ascend import ascend_rounds
from tuner.policies.dp import dp_rounds
from tuner.policies.fixed import fixed_rounds, gpipe_rounds
from tuner.policies.sglang import sglang_rounds
from tuner.policies.terapipe import terapipe_rounds
from tuner.problem import Problem
from tuner.relaxation import Envelope, Work, envelopes, least_sum
from tuner.schedule import Objective

POLICIES = ("fixed:N", "gpipe", "sglang", "ascend", "terapipe", "dp", "joint")
BATCHES: dict[str, Callable[[Problem], list[Round]]] = {
    "gpipe": gpipe_rounds,
    "terapipe": terapipe_rounds,
    "dp": dp_rounds,
}
"""Policies that plan a batch at once."""
BASED: dict[str, Callable[[Problem, int], list[Round]]] = {"sglang": sglang_rounds, "ascend": ascend_rounds}
"""Policies whose base chunk the user sets (`sglang:N`); without N the best power of two is taken."""
MOST_ROUNDS = 16_384
"""The fixed sweep leaves out chunks so short that a plan would have more rounds."""
MOST_BASES = 10
"""Base chunks that are tried, the largest ones."""


def named_rounds(problem: Problem, policy: str) -> list[Round]:
    """Rounds by a policy other than `joint`. Raises UserError for an unknown one."""
    name, _, argument = policy.partition(":")
    if name == "fixed":
        return fixed_rounds(problem, _num_tokens(policy, argument, problem.chunk_multiple))
    if name in BASED and argument:
        return BASED[name](problem, _num_tokens(policy, argument, problem.chunk_multiple))
    if name in BASED:
        plans = [BASED[name](problem, base) for base in base_sizes(problem)]
        return min(plans, key=lambda rounds: problem.evaluate(rounds).score(problem.objective))
    if argument or name not in BATCHES:
        raise UserError("policy", policy, f"one of {', '.join(POLICIES)}")
    return batch_by_batch(problem, BATCHES[name]) if problem.is_timed else BATCHES[name](problem)


def simpler_rounds(problem: Problem, best: float) -> Iterator[list[Round]]:
    """The rounds of every policy but `joint`, less those that provably are no better than `best` by the objective."""
    floor = Floor(problem)
    names = fixed_sweep(problem.requests, problem.chunk_multiple)
    names += [f"{name}:{base}" for base in base_sizes(problem) for name in BASED]
    yield from (named_rounds(problem, name) for name in names if floor.score(name) < best)
    yield from (named_rounds(problem, name) for name in BATCHES)


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


def base_sizes(problem: Problem) -> list[int]:
    """Base chunks that are tried for a policy that leaves its own to the user."""
    sizes = [int(name.removeprefix("fixed:")) for name in fixed_sweep(problem.requests, problem.chunk_multiple)]
    return sizes[-MOST_BASES:]


class Floor:
    """What policies of rounds of at most N tokens reach of a problem's objective at least, by the work of one stage.

    The makespan is at least the sum of the rounds. For the mean TTFT each request's tokens bear their share of the
    rounds' overhead, and least work for its weight first is the best order there is (Smith's rule). Of deadlines
    nothing is known. The schedulers align their rounds to 64 tokens, so shorter ones count as that.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._work = Work.of(problem.requests, problem.limits.max_round_tokens)
        self._lines = [line for kind in problem.cost.kinds for line in envelopes([kind], self._work)]

    def score(self, policy: str) -> float:
        """The floor of `policy:N`."""
        if self._problem.objective is Objective.SLA:
            return -math.inf
        round_tokens = max(float(policy.partition(":")[2]), 64.0)
        work = replace(self._work, max_round_tokens=min(self._work.max_round_tokens, round_tokens))
        if self._problem.objective is Objective.MAKESPAN:
            return max(least_sum(line, work) for line in self._lines)
        return max(_least_mean_s(line, work, self._problem.requests) for line in self._lines)


def _least_mean_s(envelope: Envelope, work: Work, requests: Sequence[Request]) -> float:
    """The least mean of when requests end that run one after the other from the start; arrivals count against it."""
    new = work.prompt - work.cached
    pairs = (work.prompt * (work.prompt + 1.0) - work.cached * (work.cached + 1.0)) / 2.0
    token_s = envelope.token_s + envelope.round_s / work.max_round_tokens
    seconds = token_s * new + envelope.pair_s * pairs + envelope.chunk_s + envelope.final_s
    weights = np.array([request.weight for request in requests])
    weights = weights if weights.any() else np.ones(len(weights))
    order = np.argsort(seconds / np.maximum(weights, 1e-300))
    arrival = np.array([request.arrival_s for request in requests])
    return float((np.cumsum(seconds[order]) @ weights[order] - arrival @ weights) / weights.sum())


def _num_tokens(policy: str, argument: str, chunk_multiple: int) -> int:
    if not argument.isdecimal() or int(argument) < chunk_multiple:
        name = policy.partition(":")[0]
        raise UserError("policy", policy, f"{name}:N with N at least {chunk_multiple} tokens (chunk_multiple)")
    return int(argument)
