"""The token-wise work of a round on the chunk grid, and a chunk's least share of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tuner.plan.cost_model import Ints
from tuner.plan.stage_cost import Floats, StageCost


@dataclass(frozen=True, slots=True)
class TokenTable:
    """w of `rounds.grid.relaxation`: overhead and token-wise work of a round, by its tokens."""

    count: Floats  # points, [n]
    seconds: Floats  # at them, [n]
    capped_s: Floats  # and with handing the round on, [n]
    least_rate: Floats  # [n, n]: the least seconds a token at points i..k
    hop_token_s: float

    @classmethod
    def of(cls, stages: list[StageCost], most: float, grid: Floats, hop_token_s: float) -> TokenTable:
        """The least over these stages, at their points up to `most` tokens and those of the grid."""
        inner = {float(n) for stage in stages for n in stage.token_count if 1 <= n < most}
        count = np.array(sorted({1.0, most} | inner | set(grid.tolist())))
        seconds = np.min([stage.round_overhead_s + stage.tokens_s(count) for stage in stages], axis=0)
        rate = seconds / count
        table = np.full((len(count), len(count)), np.inf)
        for first in range(len(count)):
            table[first, first:] = np.minimum.accumulate(rate[first:])
        return cls(count, seconds, seconds + hop_token_s * count, table, hop_token_s)

    def shares(self, tokens: Floats, at: Ints, spare_s: Floats, own_s: Floats) -> Floats:
        """Least seconds of chunks' shares of w when their rounds may spend so much on it and on handing it on; inf
        where not even the chunk alone fits.

        at: index of the first point from each chunk's tokens on. own_s: w of each chunk alone.
        """
        last = np.searchsorted(self.capped_s, spare_s, side="right") - 1
        inside = np.clip(last, 0, len(self.count) - 2)
        low_s, high_s = self.capped_s[inside], self.capped_s[inside + 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            part = np.clip(np.where(high_s > low_s, (spare_s - low_s) / (high_s - low_s), 1.0), 0.0, 1.0)
            reach = self.count[inside] + part * (self.count[inside + 1] - self.count[inside])
            reach_s = self.seconds[inside] + part * (self.seconds[inside + 1] - self.seconds[inside])
            rate = np.minimum(own_s / tokens, reach_s / np.maximum(reach, tokens))
        rate = np.where(last >= at, np.minimum(rate, self.least_rate[at, np.maximum(last, at)]), rate)
        return np.where(own_s + self.hop_token_s * tokens <= spare_s, tokens * rate, np.inf)
