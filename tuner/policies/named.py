"""Policies by name, `joint` left out: the field's and `dp`, and which of them could still beat a plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from db.errors import UserError
from db.files.numbers import whole_number
from tuner.plan.plan import Request, Round
from tuner.plan.stage_cost import MAX_TOKENS, StageCost, TableAttention
from tuner.policies.arrivals import batch_by_batch
from tuner.policies.ascend import ascend_rounds
from tuner.policies.dp import dp_rounds
from tuner.policies.fixed import fixed_rounds, gpipe_rounds
from tuner.policies.sglang import sglang_rounds
from tuner.policies.terapipe import terapipe_rounds
from tuner.rounds.problem import Problem
from tuner.rounds.relaxation import Envelope, Work, envelopes, requests_s
from tuner.workload.objective import Objective

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
ROUNDING = 1e-12
MOST_SAMPLES = 32
"""With more prompts `terapipe`, which gives all of them one split, takes longer than ours by far and to plan."""


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


def simpler_rounds(problem: Problem, best: float, known: Sequence[str] = ()) -> Iterator[list[Round]]:
    """The rounds of every policy but `joint`, less those that provably are no better than `best` by the objective.

    known: batch policies whose rounds are candidates already.
    """
    floor = Floor(problem)
    names = fixed_sweep(problem.requests, problem.chunk_multiple)
    names += [f"{name}:{base}" for base in base_sizes(problem) for name in BASED]
    yield from (named_rounds(problem, name) for name in names if floor.score(name) < best)
    padded = ("terapipe",) if len(problem.requests) > MOST_SAMPLES else ()
    yield from (named_rounds(problem, name) for name in BATCHES if name not in (*known, *padded))


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

    The makespan is at least the sum of the rounds and what the first one takes on the stages before. For the mean TTFT
    each request's tokens bear their share of the rounds' overhead, and least work for its weight first is the best
    order there is (Smith's rule). Of deadlines nothing is known. The schedulers align their rounds to 64 tokens, so
    shorter ones count as that.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._work = Work.of(problem.requests, problem.limits.max_round_tokens)
        cost = self._cost = problem.cost.merged()
        kinds = cost.kind_of_stage.tolist()
        # Of stages alike the last one: most stages lie before it.
        self._stages = [len(kinds) - 1 - kinds[::-1].index(kind) for kind in range(len(cost.kinds))]
        self._lines = [envelopes([kind], self._work) for kind in cost.kinds]
        self._sums: dict[float, list[float]] = {}  # policies of one budget share them

    def score(self, policy: str) -> float:
        """The floor of `policy:N`."""
        if self._problem.objective not in (Objective.MAKESPAN, Objective.MEAN_TTFT):
            return -math.inf
        name, _, argument = policy.partition(":")
        num_tokens = min(max(float(argument), 64.0), self._work.max_round_tokens)
        if self._problem.objective is Objective.MEAN_TTFT:
            return max(self._mean_s(line, num_tokens) for lines in self._lines for line in lines)
        first_s = self._first_round_s(name, int(argument))
        sums = self._sums_s(num_tokens)
        return max(sum(first_s[:stage]) + least_s for stage, least_s in zip(self._stages, sums, strict=True))

    def _sums_s(self, num_tokens: float) -> list[float]:
        """What rounds of at most so many tokens sum to at least, on each kind of stage."""
        if num_tokens not in self._sums:
            rounds, work = math.ceil(self._work.new_tokens / num_tokens), self._work
            self._sums[num_tokens] = [
                max(
                    least_rates_s(kind, work, num_tokens),
                    *(float(requests_s(line, work, num_tokens).sum()) + rounds * line.round_s for line in lines),
                )
                for kind, lines in zip(self._cost.kinds, self._lines, strict=True)
            ]
        return self._sums[num_tokens]

    def _mean_s(self, line: Envelope, num_tokens: float) -> float:
        """The least mean of when requests end that run one after the other; arrivals count against it."""
        requests, work = self._problem.requests, self._work
        seconds = requests_s(line, self._work, num_tokens) + line.round_s * (work.prompt - work.cached) / num_tokens
        weights = np.array([request.weight for request in requests])
        weights = weights if weights.any() else np.ones(len(weights))
        order = np.argsort(seconds / np.maximum(weights, 1e-300))
        arrival = np.array([request.arrival_s for request in requests])
        return float((np.cumsum(seconds[order]) @ weights[order] - arrival @ weights) / weights.sum())

    def _first_round_s(self, name: str, num_tokens: int) -> list[float]:
        """Seconds of the first round's tokens on each stage, which the first round passes before all others."""
        problem, limits = self._problem, self._problem.limits
        if problem.is_timed or limits.max_kv_tokens is not None or problem.cost.virtual_stages > 1:
            return [0.0] * problem.cost.pp_size
        alone = name == "ascend"  # which may leave a round's rest empty behind its first request
        tokens = problem.requests[0].new_tokens if alone else sum(request.new_tokens for request in problem.requests)
        tokens = min(tokens, num_tokens, limits.max_round_tokens or num_tokens)
        tokens = max(tokens - problem.chunk_multiple + 1, 1)  # what is cut off a prompt ends on the grid
        seconds = [kind.round_overhead_s + float(kind.tokens_s(tokens)) for kind in problem.cost.kinds]
        return [seconds[kind] for kind in problem.cost.kind_of_stage.tolist()]


def least_rates_s(stage: StageCost, work: Work, num_tokens: float) -> float:
    """What rounds of at most so many tokens sum to at least on a stage, by what a token costs where it is cheapest.

    A round of T tokens costs at least the least overhead and token-wise seconds a token, times T. A chunk of c tokens
    after p costs base(c) + slope(c) p >= a (c p + c (c+1) / 2) + b c, with a the least slope(c) / c and b the least
    (base(c) - a c (c+1) / 2) / c; the pairs of a prompt's chunks sum to those of the prompt. Between the points of a
    table each ratio is monotone or concave, so that it is least at a point.
    """
    attention = stage.attention
    inner = attention.count if isinstance(attention, TableAttention) else ()
    total, chunk = (
        np.array([1.0, *(n for n in points if 1 < n < num_tokens), num_tokens]) for points in (stage.token_count, inner)
    )
    round_token_s = ((stage.round_overhead_s + stage.tokens_s(total)) / total).min()
    pair_s = (attention.slope(chunk) / chunk).min()
    token_s = (
        (attention.base(chunk) - pair_s * chunk * (chunk + 1.0) / 2.0) / chunk
    ).min() + stage.chunk_s / num_tokens
    pairs = float((work.prompt * (work.prompt + 1.0) - work.cached * (work.cached + 1.0)).sum()) / 2.0
    seconds = (round_token_s + token_s) * work.new_tokens + pair_s * pairs + stage.final_s * len(work.prompt)
    return float(seconds) * (1.0 - ROUNDING)


def _num_tokens(policy: str, argument: str, chunk_multiple: int) -> int:
    try:
        return whole_number("policy", argument, least=chunk_multiple, most=MAX_TOKENS)
    except UserError:
        name = policy.partition(":")[0]
        allowed = f"{name}:N with N at least {chunk_multiple} tokens (chunk_multiple)"
        raise UserError("policy", policy, allowed) from None
