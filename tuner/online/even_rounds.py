"""Cuts waiting requests into even rounds: as many as delay all requests least, later arrivals included."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tuner.online.to_come.outlook import Outlook
from tuner.rounds.round_budgets import QueueBudgets, RoundExcess

ROUNDS_A_REQUEST = (0.5, 1, 2, 3, 4)
"""How many rounds each of those that wait is cut into for a trial: its end then need not wait for others."""
ROUNDS_TRIED = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 1.0, 1.15)
"""How many rounds what waits is cut into for a trial, as powers of the number that would be best if nobody came."""
TRIED_IN_PASSING = 4
"""Numbers of rounds of a plan ahead once requests arrive over time: it is made anew for every one."""
SIZES_IN_PASSING, WIDE = 2, (0.6, 1.0, 1.3)
"""How many of those numbers rounds of equal tokens are made for too, and what their sizes are scaled by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvenRounds:
    """What waits, to be cut into a number of rounds of equal time."""

    budgets: QueueBudgets
    num_tokens: int
    """That all of them have left."""
    excess: RoundExcess
    outlook: Outlook
    lag_s: float
    """What rounds may take without leaving any later than what is in flight makes them."""
    hop_share: float
    """Of a round's seconds that handing it on takes."""

    @property
    def cap_s(self) -> float:
        """Most seconds of a round when their number is the best."""
        return self.judged()[0][1]

    def judged(self) -> list[tuple[float, float, int]]:
        """(score, cap, number of rounds) of a few numbers of even rounds, the best first.

        The score is how much all that wait and those to come are delayed: under each cap requests end when the round
        with their last token has passed all stages, behind rounds that are as long at least; what their rounds and
        overheads then keep busy delays those to come, and longer rounds than those in flight do
        (`online.to_come.outlook`).
        """
        budgets, tokens = self.budgets, self.num_tokens
        if not budgets.stages_after:
            return [(0.0, math.inf, 1)]
        work_s, weights = np.array(budgets.work_s).cumsum(), np.array(budgets.weights)
        total_s = max(float(work_s[-1]), 1e-12)
        context = sum(budgets.context_work) / total_s
        most = max(tokens / self.excess.least_tokens(context), 1.0)
        numbers = {max(round(most**share), 1) for share in ROUNDS_TRIED}
        whole = {int(share * len(weights)) for share in ROUNDS_A_REQUEST}
        numbers |= {count for count in whole if 1 <= count <= most + 1.0}
        tried = sorted(numbers)
        counts = np.array(tried, dtype=np.float64)
        excess_s = self.excess.seconds(tokens / counts, context)
        whole_rounds = (counts / total_s)[:, None] * work_s
        whole_rounds -= 1e-9
        before = np.ceil(whole_rounds, out=whole_rounds) @ weights
        pass_s = budgets.stages_after * (1.0 + self.hop_share) * float(weights.sum())
        caps_s = total_s / counts + excess_s
        slowest_s = np.maximum(caps_s, self.lag_s)
        scores = before * caps_s + pass_s * slowest_s + self.outlook.costs_s(counts * caps_s, slowest_s)
        judged = [
            (score, cap_s if num_rounds > 1 else math.inf, num_rounds)
            for score, cap_s, num_rounds in zip(scores.tolist(), caps_s.tolist(), tried, strict=True)
        ]
        return sorted(judged)

    def likely(self) -> tuple[dict[int, float], list[int]]:
        """The cap of each of the best few numbers of rounds, and sizes in tokens of rounds of about so many."""
        judged = self.judged()[:TRIED_IN_PASSING]
        total_s = sum(self.budgets.work_s)
        even_s = {num_rounds: min(cap_s, 2.0 * total_s) for _, cap_s, num_rounds in judged}
        context = sum(self.budgets.context_work) / max(total_s, 1e-12)
        sizes = dict.fromkeys(
            self.excess.thrifty_tokens(wide * self.num_tokens / num_rounds, context)
            for _, _, num_rounds in judged[:SIZES_IN_PASSING]
            for wide in WIDE
        )
        return even_s, list(sizes)
