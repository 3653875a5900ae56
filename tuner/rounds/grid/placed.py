"""The least sum of several requests' rounds where each chunk comes after what its request ran before.

`grid.efficiency` takes the work of a batch in any order. But a chunk of request r that starts at token a has all of r's
rounds up to a before it. Each of these takes at least what r's chunk takes in a round of its own, so together they take
at least r's shortest path `least(a)`. Where all rounds sum to at most H, at most H - least(a) can run after it, and the
drain's caps (`rounds.uneven`), which rise with what runs after a round, hold its round below that of H - least(a). So
long prompts must be cut short towards their ends, whatever runs beside them.

Under caps that depend on a chunk's start, a request's chunks add at least D(p) - p N where there are N rounds, D(p)
being its shortest path under these caps with p more a chunk, for any p; and w of N rounds is at least N times that of
the mean round on the convex hull of w. Only numbers N count whose rounds can sum to that: the last n of them sum to at
most H(n) under the drain's caps, the first n to at most G(n) under the fill's.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tuner.plan.stage_cost import Floats
from tuner.rounds.grid.efficiency import RatedRelaxation
from tuner.rounds.grid.relaxation import SLACK

MOST_PLACED_STEPS = 150_000
"""Pairs of a position and a chunk up to which paths are searched once more for each pair of fill and drain."""


class PlacedRelaxation(RatedRelaxation):
    """The relaxation of a batch, with caps by place."""

    @property
    def knows_places(self) -> bool:
        """Whether sums by place can be had in time, and say more than those of a single request do."""
        return not self.is_single and self.num_steps <= MOST_PLACED_STEPS

    def sums_in_place(self, cap_after_s: Callable[[Floats], Floats], own_s: Floats, reach_s: Floats) -> Floats:
        """The least that all rounds sum to, [rows], inf where there is no plan.

        cap_after_s: the cap of a round after so many seconds of rounds, [rows, places]. own_s: w of so many equal
        rounds, [rows, numbers]. reach_s: what so many rounds sum to at most with handing on, [rows, numbers].
        """
        added = np.zeros(reach_s.shape)
        for group, alone in zip(self._groups, self.alone, strict=True):
            caps_s = cap_after_s(alone) * (1.0 + SLACK)
            least = np.full((len(caps_s), len(self.prices), len(alone)), np.inf)
            least[:, :, 0] = 0.0
            for end in range(1, len(alone)):
                cost = self._added_before(group, end)[::-1]
                before = slice(end - len(cost), end)
                allowed = (self._own + self._hop_s)[: len(cost)][::-1] + cost <= caps_s[:, before]
                cost = np.where(allowed, cost, np.inf)
                least[:, :, end] = (least[:, :, before] + cost[:, None, :]).min(axis=2) + self.prices
            for length, count in zip(*np.unique(group.prompts, return_counts=True), strict=True):
                starts, chunk, cost = self._added_last(group, length)
                cost = cost + self._final_s
                own = np.where(chunk <= self._most, self._capped_s(chunk), np.inf)
                cost = np.where(own + cost <= caps_s[:, starts], cost, np.inf)
                path = (least[:, :, starts] + cost[:, None, :]).min(axis=2) + self.prices
                added += count * self._added_by_number(path)
        return self._least_of_numbers(own_s, added, reach_s) * (1.0 - SLACK)
