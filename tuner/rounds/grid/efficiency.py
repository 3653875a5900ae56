"""How much of a batch's work a second of rounds on the chunk grid can do, by the cap on these rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.plan.cost_model import Ints
from tuner.plan.stage_cost import Floats
from tuner.rounds.grid.relaxation import SLACK, GridRelaxation
from tuner.rounds.relaxation import pair_floor

PRICE_POWER, MOST_SAVED = 1.5, 1e6
"""How the price of a second rises with what rounds of that length save, and up to which factor: it may be all."""


@dataclass(frozen=True, slots=True)
class Corner:
    """How much filling and draining the pipeline may add to the sum of the rounds, at most, and what follows."""

    fill_s: float
    drain_s: float
    usual_s: tuple[float, ...]
    """Caps up to which a second of rounds may be taken to cost the same."""
    cap_after_s: Callable[[Floats], Floats]
    """The longest that a round may be after so many seconds of rounds."""


@dataclass(frozen=True, slots=True)
class Efficiency:
    """How much of a batch's work a second of rounds can do, by the cap on these rounds.

    Every chunk has a worth, and a batch's work is the worth of all chunks of any cut, at least. Rounds that run for x
    seconds under a cap do work of at most x times the efficiency of that cap.
    """

    corner: Corner
    work_s: float  # the least worth of all chunks of a cut; inf where the corner has no plan
    caps_s: Floats  # rising
    sums_s: Floats  # the least that all rounds can sum to under each cap
    per_s: Floats  # the efficiency of each cap
    beyond: float  # and of all higher ones

    def least_sums(self, caps_s: Floats) -> Floats:
        """The least sums under any caps, those of the next higher one known; 0 above all."""
        found: Floats = np.append(self.sums_s, 0.0)[np.searchsorted(self.caps_s, caps_s)]
        return found

    def under(self, caps_s: Floats) -> Floats:
        """The efficiency of any caps, that of the next higher one known."""
        found: Floats = np.append(self.per_s, self.beyond)[np.searchsorted(self.caps_s, caps_s)]
        return found


def _step(before: Floats, cost: Floats, price: Floats, levels: Ints) -> tuple[Floats, Floats]:
    """The cheapest way on, [rows], and the most worth a second under each cap, [rows, caps].

    before: worth at each chunk's start, [rows, chunks]. cost: [caps, chunks]. price: [rows, caps]. levels: the last cap
    that each chunk may have, [rows, chunks].
    """
    allowed = np.arange(len(cost))[:, None] <= levels[:, None, :]
    done: Floats = (before + np.where(allowed, price[:, :, None] * cost, np.inf).min(axis=1)).min(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        gained = (done[:, None] - before)[:, None, :] / cost  # nan where no way leads
    most: Floats = np.where(allowed & np.isfinite(gained), gained, 0.0).max(axis=2)
    return done, most


class RatedRelaxation(GridRelaxation):
    """The relaxation of a batch, and how much of its work rounds can do a second."""

    def efficiencies(self, caps_s: Floats, corners: Sequence[Corner]) -> list[Efficiency]:
        """Efficiencies of these caps, rising, in several prices of a second of rounds by their length, each within a
        corner.

        Longer rounds do more a second, and there is little time in which rounds may be long: up to some cap a second
        costs the same, above it more, as a power of what the least sum under the cap is below. A chunk's worth is how
        far it carries its request's cheapest path.
        """
        wide, sums = np.append(caps_s * (1.0 + SLACK), np.inf), self.sums(caps_s)
        falling = np.minimum.accumulate(np.append(sums, sums[-1:]))
        usable = np.flatnonzero(np.isfinite(falling))
        if not usable.size:
            return []
        rows, prices = list[Corner](), list[Floats]()
        for corner in corners:
            for usual_s in corner.usual_s:
                first = max(min(int(np.searchsorted(caps_s, usual_s)), len(caps_s) - 1), int(usable[0]))
                rows.append(corner)
                saved = falling[first] / np.maximum(falling, 1e-300)
                prices.append(np.clip(saved, 1.0, MOST_SAVED) ** PRICE_POWER)
        price = np.stack(prices)  # [rows, caps + 1]
        total, beyond, per_s = np.zeros(len(rows)), np.zeros(len(rows)), np.zeros(price.shape)
        for group, alone in zip(self._groups, self.alone, strict=True):
            num_units = self._units(group)
            # what a request ran before took at least its shortest path: up to which cap a chunk's round may go
            levels = np.stack([np.searchsorted(wide, corner.cap_after_s(alone)) for corner in rows])
            worth = np.full((len(rows), num_units + 1), np.inf)
            worth[:, 0] = 0.0
            for end in range(1, num_units + 1):
                width, cost = self._cost(group, end, wide)
                starts = np.arange(end - 1, end - width - 1, -1)
                worth[:, end], most = _step(worth[:, starts], cost, price, levels[:, starts])
                per_s = np.maximum(per_s, most)
            for length, count in zip(*np.unique(group.prompts, return_counts=True), strict=True):
                starts, _, cost = self._last(group, length, wide)
                done, most = _step(worth[:, starts], cost, price, levels[:, starts])
                total += count * done
                per_s = np.maximum(per_s, most)
                for row, one in enumerate(worth):
                    if not np.isfinite(done[row]):
                        continue
                    up_to_end = np.append(one[: int(starts[0]) + 1], done[row])
                    beyond[row] = max(beyond[row], self._beyond(group.cached, up_to_end, float(length)))
        per_s = np.maximum.accumulate(per_s, axis=1) * (1.0 + SLACK)
        return [
            Efficiency(
                corner=rows[row],
                work_s=float(total[row]) * (1.0 - SLACK),
                caps_s=caps_s,
                sums_s=sums,
                per_s=per_s[row, :-1],
                beyond=max(float(beyond[row]) * (1.0 + SLACK), float(per_s[row, -1])),
            )
            for row in range(len(rows))
        ]

    def _beyond(self, cached: float, worth: Floats, length: float) -> float:
        """Most worth a second of chunks longer than those known.

        They cost at least a line in their tokens and the pairs of tokens in them, and can be divided into stretches
        of half the longest known chunk to all of it, of which none is worth more a second than the best.
        """
        places = np.append(cached + np.arange(len(worth) - 1) * self._multiple, length)
        token_s, pair_s = self._least_rates()
        floor = token_s * places + pair_s * places * (places + 1.0) / 2.0
        half, best = max(len(self._chunk) // 2, 1), 0.0
        for units in range(half, min(2 * half + 1, len(worth))):
            gained, seconds = worth[units:] - worth[:-units], floor[units:] - floor[:-units]
            if (gained[seconds <= 0.0] > 0.0).any():
                return np.inf
            best = max(best, float(np.divide(gained, seconds, out=np.zeros_like(gained), where=seconds > 0.0).max()))
        return best

    def _least_rates(self) -> tuple[float, float]:
        """Seconds a token and a pair of tokens that no round and no chunk undercuts."""
        most, found = self._work.new_tokens, []
        for stage in self._stages:
            count = np.array([1.0, most, *(float(n) for n in stage.token_count if 1 <= n < most)])
            pair_s, _, _ = pair_floor(stage)
            found.append((float(((stage.round_overhead_s + stage.tokens_s(count)) / count).min()), pair_s))
        return min(token_s for token_s, _ in found), min(pair_s for _, pair_s in found)
