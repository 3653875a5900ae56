"""Budgets: how long rounds may be while each of the requests that wait runs, from the work that waits.

For the makespan, C seconds of work in rounds with o seconds of overhead and context read again want rounds of o +
sqrt(C o / (K-1)). For the mean TTFT let request r, in running order, have `a(r)` seconds of work, times the overhead o
of a round, times the weight of all requests that have not ended before it; rounds of m(r) seconds beside their overhead
then delay all TTFTs by a(r) / m(r), weighted. On equal stages a round waits behind the longest before it
(`recurrence.timeline`), so rounds never need to shrink, and a request's TTFT also holds K - 1 times the m(r) it ends
under. The sum of a(r) / m(r) + (K - 1) weight(r) m(r), m never falling, is least where neighbours that would fall are
pooled and each pool takes m = sqrt(sum of a / ((K - 1) sum of weights)): isotonic regression, by pooling adjacent
violators (Ayer and others, 1955). The makespan counts like one more request that has no work and ends last: the weight
it is given moves the budgets from those of the mean TTFT to those of the makespan.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats, PairAttention, StageCost

MAKESPAN_SHARE, ENDS_INSIDE = 1.1, 0.5
"""Corrections found on batches known at the start; the results are flat around them: the share of the work that counts
for the makespan, and the share of a round that a request which ends inside it waits for."""
WEIGHTS_TRIED = (0.0, *(2.0**power for power in range(-6, 7)))
"""Weights of the makespan that are tried, as shares of all weights."""
THRIFTY, THRIFTY_FROM, STEPS = 1.005, 0.7, 128
"""Costs of a token that differ by less are alike; how much shorter a round may be made to lower them; and up to how
many steps of the grid, beyond which kernels' steps no longer count."""
NEARBY = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Multiples of the makespan's likely weight whose plans are worth a try."""


def pooled_budgets(delays: Sequence[float], weights: Sequence[float], stages_after: float) -> list[float]:
    """m(r) of each request: sqrt(a / (stages_after * weight)), pooled so that it never falls."""
    pools: list[list[float]] = []  # [sum of a, sum of weights, number of requests]
    for delay, weight in zip(delays, weights, strict=True):
        pool = [delay, weight, 1]
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            pool = [mine + before for mine, before in zip(pool, pools.pop(), strict=True)]
        pools.append(pool)
    budgets: list[float] = []
    for delay, weight, count in pools:
        budget = math.sqrt(delay / (stages_after * weight)) if weight else math.inf
        budgets.extend([budget] * int(count))
    return budgets


def round_overhead_s(cost: CostModel) -> float:
    """Seconds that one more round costs beside its tokens, on the stage where that is most."""
    return max(kind.round_overhead_s + float(kind.tokens_s(0)) + kind.chunk_s for kind in cost.kinds)


def context_token_s(cost: CostModel) -> float:
    """Seconds a chunk pays for each context token whatever its length, on the stage where that is most."""
    attentions = [kind.attention for kind in cost.kinds]
    return max(each.context_token_s if isinstance(each, PairAttention) else 0.0 for each in attentions)


class RoundExcess:
    """What a round costs beyond the least that its tokens cost in long rounds, by its tokens.

    An overhead a round is what short rounds cost more than long ones; measured tables have it in their form, not in
    one number: a round of few tokens takes as long as one of some hundred, one of thousands nothing beside its tokens.
    """

    def __init__(self, cost: CostModel, multiple: int, longest_tokens: int) -> None:
        count = max(int(2.0 * math.log2(max(longest_tokens / multiple, 1.0))) + 3, 4)
        self._count = multiple * 2.0 ** (np.arange(count) / 2.0)
        slowest = max(cost.kinds, key=lambda kind: float(self._columns(kind, self._count)[0][-1]))
        self._round_s, self._context_s = self._columns(slowest, self._count)
        self._below = self._count[-1] - self._count[:-2]
        self._steps = multiple * np.arange(1.0, STEPS + 1.0)
        self._step_list = self._steps.tolist()
        self._step_round_s, self._step_context_s = self._columns(slowest, self._steps)
        self._slowest = slowest
        self.sizes: Floats = np.unique([self.thrifty_tokens(tokens, 0.0) for tokens in self._count.tolist()]).astype(
            np.float64
        )
        self._size_s = slowest.round_overhead_s + slowest.chunk_s + slowest.tokens_s(self.sizes)
        self._size_base, self._size_slope = slowest.attention.base(self.sizes), slowest.attention.slope(self.sizes)
        self._known_context, self._known = math.nan, (self._round_s, self._round_s)  # of the last context asked for

    @staticmethod
    def _columns(kind: StageCost, tokens: Floats) -> tuple[Floats, Floats]:
        return kind.round_overhead_s + kind.chunk_s + kind.tokens_s(tokens), kind.attention.slope(tokens)

    def seconds(self, tokens: npt.ArrayLike, context: float) -> Floats:
        """Of rounds of so many tokens that are one chunk each, after so much context in the mean."""
        _, beyond_s = self._after(context)
        excess: Floats = np.maximum(np.interp(np.asarray(tokens, dtype=np.float64), self._count, beyond_s), 0.0)
        return excess

    def sizes_s(self, prompt: float, context: float) -> Floats:
        """Seconds of rounds of each of `sizes` that prompts fill: one of them, or as many as it holds.

        prompt: their new tokens; context: tokens before one of those in the mean.
        """
        attention, shares = self._slowest.attention, self.sizes / prompt
        alone = self._size_base + self._size_slope * np.maximum(context - self.sizes / 2.0, 0.0)
        whole = float(attention.base(int(prompt))) + float(attention.slope(int(prompt))) * max(
            context - prompt / 2.0, 0.0
        )
        shared = shares * (whole + self._slowest.chunk_s) - self._slowest.chunk_s
        seconds: Floats = self._size_s + np.where(shares <= 1.0, alone, shared)
        return seconds

    def _after(self, context: float) -> tuple[Floats, Floats]:
        """Seconds of rounds of the known numbers of tokens after so much context, and what of them is excess."""
        if context != self._known_context:
            round_s = self._round_s + self._context_s * context
            rate = float(((round_s[-1] - round_s[:-2]) / self._below).min())
            self._known_context, self._known = context, (round_s, round_s - rate * self._count)
        return self._known

    def thrifty_tokens(self, most: float, context: float) -> int:
        """So many tokens, or somewhat fewer that cost less each: kernels fill a card in steps."""
        steps = self._steps
        first, end = bisect_left(self._step_list, THRIFTY_FROM * most), bisect_left(self._step_list, most + 0.5)
        if end == len(steps) or first == end:
            return int(most)
        each = (self._step_round_s[first:end] + self._step_context_s[first:end] * context) / steps[first:end]
        return int(steps[first + np.flatnonzero(each <= THRIFTY * each.min())[-1]])

    def least_tokens(self, context: float) -> float:
        """Tokens of the shortest round of which no more than half is excess."""
        round_s, beyond_s = self._after(context)
        good = beyond_s <= 0.5 * round_s
        at = int(good.argmax())
        return float(self._count[at if good[at] else -1])


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueBudgets:
    """The work that waits, in running order; every list of budgets has one entry a request, its overhead included."""

    work_s: Sequence[float]
    """Seconds each request's remaining tokens take on the slowest stage, cut nowhere."""
    context_work: Sequence[float]
    """Each request's work_s times the mean context of its remaining tokens."""
    weights: Sequence[float]
    overhead_s: float
    context_token_s: float
    stages_after: int
    """Stages behind the first."""

    @property
    def per_round_s(self) -> float:
        """Overhead of a round and the context that one more chunk reads."""
        return self._per_round_s(sum(self.work_s))

    def _per_round_s(self, work_s: float) -> float:
        return self.overhead_s + self.context_token_s * sum(self.context_work) / max(work_s, 1e-12)

    def for_makespan(self) -> list[float]:
        """One budget for all, that of the makespan."""
        return self._with_overhead(self._flat())

    def for_mean_ttft(self, makespan_weight: float = 0.0) -> list[float]:
        """Budgets that never fall, for the mean TTFT beside a makespan of that weight."""
        return self._with_overhead(self._pooled(makespan_weight))

    def choices(self, max_makespan_increase: float) -> list[list[float]]:
        """Budgets for the mean TTFT beside a makespan of the likely weight, of nearby ones and of none."""
        likely = self.makespan_weight(max_makespan_increase)
        return [self.for_mean_ttft(weight) for weight in dict.fromkeys(share * likely for share in NEARBY)]

    def makespan_weight(self, max_makespan_increase: float) -> float:
        """The least weight tried under which the makespan should be longer than under its own budgets by that share at
        most."""
        if not self.stages_after:
            return 0.0
        allowed_s = (1.0 + max_makespan_increase) * self._makespan_s(self._flat())
        weight, total = 0.0, sum(self._usable_weights())
        for share in WEIGHTS_TRIED:
            weight = share * total
            if self._makespan_s(self._pooled(weight)) <= allowed_s:
                break
        return weight

    def evened(self, cap_s: float) -> float:
        """The budget, lowered so that all work that waits fills whole rounds."""
        if not math.isfinite(cap_s):
            return cap_s
        work_s = sum(self.work_s)
        per_round_s = self._per_round_s(work_s)
        num_rounds = math.ceil(work_s / max(cap_s - per_round_s, 1e-12))
        return per_round_s + work_s / max(num_rounds, 1)

    def _flat(self) -> list[float]:
        if not self.stages_after:
            return [math.inf] * len(self.work_s)
        budget = math.sqrt(MAKESPAN_SHARE * sum(self.work_s) * self.per_round_s / self.stages_after)
        return [budget] * len(self.work_s)

    def _pooled(self, makespan_weight: float) -> list[float]:
        if not self.stages_after:
            return [math.inf] * len(self.work_s)
        weights = self._usable_weights()
        delays = self._delays(weights, makespan_weight)
        return pooled_budgets(delays, [*weights[:-1], weights[-1] + makespan_weight], self.stages_after + ENDS_INSIDE)

    def _makespan_s(self, budgets: Sequence[float]) -> float:
        """What rounds under budgets beside the overhead make of the makespan: work, overheads, and the last round's way
        through the stages."""
        overheads = sum(delay / budget for delay, budget in zip(self._costs(), budgets, strict=True) if delay)
        return sum(self.work_s) + overheads + self.stages_after * budgets[-1]

    def _costs(self) -> list[float]:
        """Work times the overhead of a round."""
        rows = zip(self.work_s, self.context_work, strict=True)
        return [self.overhead_s * work + self.context_token_s * context for work, context in rows]

    def _delays(self, weights: Sequence[float], makespan_weight: float) -> list[float]:
        ended = itertools.accumulate(weights, initial=0.0)
        left = sum(weights) + makespan_weight
        return [(left - before) * cost for before, cost in zip(ended, self._costs(), strict=False)]

    def _usable_weights(self) -> list[float]:
        return list(self.weights) if any(self.weights) else [1.0] * len(self.work_s)

    def _with_overhead(self, beside: Sequence[float]) -> list[float]:
        per_round_s = self.per_round_s
        return [per_round_s + seconds for seconds in beside]
