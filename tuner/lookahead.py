"""Rounds for what waits right now: requests packed in their running order under a few caps, judged by the recurrence.

How long should rounds be for the mean TTFT? Let request r, in running order, have `a(r)` seconds of work, times the
overhead o of a round, times the weight of all requests that have not ended before it; rounds of m(r) seconds beside
their overhead then delay all TTFTs by a(r) / m(r), weighted. On equal stages a round waits behind the longest before
it (`tuner.schedule`), so rounds never need to shrink, and a request's TTFT also holds K - 1 times the m(r) it ends
under. The sum of a(r) / m(r) + (K - 1) weight(r) m(r), m never falling, is least where neighbours that would fall are
pooled and each pool takes m = sqrt(sum of a / ((K - 1) sum of weights)): isotonic regression, by pooling adjacent
violators (Ayer and others, 1955).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.cost_model import Floats
from tuner.packing import Packer, fill_rounds
from tuner.plan import Request, Round
from tuner.schedule import FlatRounds, Objective, simulate

ROUNDS_SWEPT = 320
"""Rounds over all caps of one sweep: with many rounds, their whole number matters less and fewer caps do."""
LEAST_CAPS, MOST_CAPS = 8, 24
WIDTH = 2.5
"""Caps up to so many times longer and shorter are tried; with many rounds only its square root."""


def pooled_caps(delays: Sequence[float], weights: Sequence[float], stages_after: float) -> list[float]:
    """m(r) of each request: sqrt(a / (stages_after * weight)), pooled so that it never falls."""
    pools: list[list[float]] = []  # [sum of a, sum of weights, number of requests]
    for delay, weight in zip(delays, weights, strict=True):
        pool = [delay, weight, 1]
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            pool = [mine + before for mine, before in zip(pool, pools.pop(), strict=True)]
        pools.append(pool)
    caps: list[float] = []
    for delay, weight, count in pools:
        cap = math.sqrt(delay / (stages_after * weight)) if weight else math.inf
        caps.extend([cap] * int(count))
    return caps


@dataclass(frozen=True, slots=True, kw_only=True)
class Lookahead:
    """What waits and the pipeline that it will run on."""

    packer: Packer
    requests: Sequence[Request]
    spans: Sequence[tuple[int, int, int]]
    """(request, first token, end) in running order."""
    free_s: Sequence[float]
    """When each stage is free."""
    start_s: float
    """Now; the next round starts no earlier."""
    window: int | None
    objective: Objective

    def rounds(self, caps_s: Sequence[float], least_s: float) -> list[Round]:
        """The best rounds under scaled caps (one a span), none below `least_s`: a wide sweep, then a closer one."""
        tried: dict[float, tuple[tuple[float, float], list[Round]]] = {}

        def attempt(scale: float) -> None:
            caps = [max(scale * cap, least_s) for cap in caps_s]
            spans = zip(self.spans, caps, strict=True)
            rounds = fill_rounds(self.packer, self.requests, self.spans, {span[0]: cap for span, cap in spans})
            tried[scale] = (self._score(rounds), rounds)

        attempt(1.0)
        num_caps = min(max(ROUNDS_SWEPT // len(tried[1.0][1]), LEAST_CAPS), MOST_CAPS)
        width = WIDTH if num_caps == MOST_CAPS else math.sqrt(WIDTH)
        for reach, count in ((width, num_caps), (width ** (2.0 / num_caps), num_caps // 2)):
            centre = min(tried, key=lambda scale: tried[scale][0])
            for scale in np.geomspace(centre / reach, centre * reach, count):
                attempt(float(scale))
        return min(tried.values(), key=lambda found: found[0])[1]

    def _score(self, rounds: list[Round]) -> tuple[float, float]:
        cost, flat = self.packer.cost, FlatRounds.of(rounds)
        prompt = np.array([self.requests[index].prompt_tokens for index in flat.request.tolist()])
        final = flat.start + flat.tokens == prompt
        stage_s = cost.round_seconds(flat.round_index, flat.tokens, flat.start, final)
        hop_s = cost.hop_seconds(np.bincount(flat.round_index, weights=flat.tokens))
        free_s: Floats = np.maximum(np.asarray(self.free_s) - self.start_s, 0.0)
        finish = simulate(stage_s, hop_s, self.window, cost.return_s, free_s=free_s).finish_s[:, -1]
        weights = np.array([self.requests[index].weight for index in flat.request[final].tolist()])
        ends = finish[flat.round_index[final]]
        mean = float(ends @ weights) if weights.any() else float(ends.sum())
        makespan = float(finish[-1])
        return (makespan, mean) if self.objective is Objective.MAKESPAN else (mean, makespan)
