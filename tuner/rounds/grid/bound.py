"""A proven lower bound on the chunk grid, for cost tables as they are: stairs, floors and several kernels.

With equal stages it is that of `rounds.bound`, S(m) + (pp_size - 1) m least over all caps m, S being the sum of
`rounds.grid.relaxation`. Caps are on what a round takes with handing it on.

Where stages differ it goes by `rounds.uneven`: paths through the stage k on which the batch takes longest show that
makespan >= S + E + D + hops, and E and D cap each round by what ran before it (X) and by what runs after it (Y). Under
them S is bounded from below in four ways, of which the largest counts:

1. by the longest round that they let through anywhere: S is at least the sum under that cap;
2. by what rounds can do: up to any time before the end of the last round as the fill's caps allow, from there on as
   the drain's do (`grid.efficiency`), until all is done. With E and D limited, a chunk comes after all that
   its request ran before it, so that late chunks of a long prompt only fit where the drain's caps are low; where no cut
   fits, no plan has such E and D;
3. for one request, whose chunks run in order, by its shortest path under the cap at each place: a chunk from a to b has
   at most H - rest(a) before it and H - least(b) after it, least and rest being shortest paths under the longest cap
   of all, if the rounds sum to at most H. H is the bound that is hoped for: where a path needs more, all that is proven
   is H;
4. for several requests, by the number of rounds, each chunk under the cap of what its request ran before it
   (`grid.placed`).

S falls as E and D rise, so on a cell of (E, D) the bound is S at its upper corner plus its lower corner. Cells with the
least bounds are divided, best first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats, StageCost
from tuner.rounds.grid.efficiency import Corner, Efficiency
from tuner.rounds.grid.placed import PlacedRelaxation
from tuner.rounds.grid.relaxation import MOST_STEPS, SLACK, is_curved
from tuner.rounds.relaxation import Work, envelopes, least_sum, likely_cap_s
from tuner.rounds.uneven import Side, bounding_stage, paid_s, sides_of

LEAST_CAP, MOST_CAP = 0.3, 6.0
"""Caps that are tried, by the likely best one."""
NUM_CAPS, NUM_REFINEMENTS = 20, 2
SHORT = np.geomspace(0.15, 0.9, 8)
"""By the least of them, further caps of the outermost rounds, under which little is done."""
NUM_SPANS, NUM_BORDERS = 72, 12
"""Spans of time in which caps are taken to be the most they are at either end, and times between fill and drain."""
USUAL_LEVELS, USUAL_SHARE, CORNERS = (0.7, 1.0), 0.15, (0.3, 0.6, 1.0, 1.5, 2.2, 3.5)
"""Caps, by the likely best one, up to which a second costs the same; in a corner the cap at this share of the time from
the outer end; corners, by what the stages of a side add at the likely best cap."""
NUM_EDGES, NUM_DIVISIONS, NUM_DIVIDED = 10, 8, 24
"""Cells at the start, how often some are divided, and how many."""
MOST_GAINS, MOST_REPEATS = (1.12, 1.03), 8
"""H by the bound that is known, in turn; each again while H is reached: more may be provable then."""


def grid_bound_s(cost: CostModel, work: Work, multiple: int, known_s: float) -> float | None:
    """Seconds that no makespan is below where chunks end on multiples of so many tokens after the cached ones; None
    where straight lines tell as much, or where it would take too long."""
    hops, num_more = (cost.pp_size - 1) * cost.hop_latency_s, cost.pp_size - 1
    stage = bounding_stage(cost, work)
    reference = cost.stages[stage] if len(cost.kinds) == 1 else replace(cost.stages[stage], final_s=0.0)
    found = _grid(reference, work, multiple, num_more, cost.hop_token_s)
    if found is None or known_s <= 0.0:
        return None
    relaxation, caps = found
    if len(cost.kinds) == 1:
        return hops + _least_s(relaxation, reference, work, caps, num_more)
    best = int(np.argmin(relaxation.sums(caps) + num_more * caps))
    short = caps[0] * np.geomspace(0.15, 0.9, 8)
    levels, sides, bound_s = (
        np.sort(np.concatenate([short, caps, _between(caps, best)])),
        sides_of(cost, work, stage),
        known_s,
    )
    fixed_s = hops + paid_s(cost, work, stage)
    own_s = relaxation.own_by_number(levels * (1.0 + SLACK)) if relaxation.knows_places else np.zeros(0)
    for gain in MOST_GAINS:
        for _ in range(MOST_REPEATS):
            hoped_s = gain * bound_s
            most_s = hoped_s - fixed_s
            if most_s <= 0.0:
                return bound_s
            corners = _corners(sides, most_s, float(caps[best]))
            efficiencies = relaxation.efficiencies(levels, corners)
            if not efficiencies:
                return None
            proven_s = fixed_s + _Cells(sides, most_s, relaxation, efficiencies, own_s).least_s()
            bound_s = max(bound_s, min(hoped_s, proven_s))
            if proven_s < hoped_s * (1.0 - SLACK):
                break
    return bound_s


def _corners(sides: list[Side], most_s: float, usual_s: float) -> list[Corner]:
    """Corners of (E, D) around what rounds of the usual length need."""

    def corner(share: float) -> Corner:
        limits = [share * usual_s * len(side.ratio) for side in sides]
        place = np.array([USUAL_SHARE * most_s])
        inner = [float(side.caps_s(np.array([x]), place)[0]) for side, x in zip(sides, limits, strict=True)]

        def cap_after_s(before_s: Floats) -> Floats:
            return sides[1].caps_s(np.full_like(before_s, limits[1]), np.maximum(most_s - before_s, 0.0))

        return Corner(limits[0], limits[1], (min(inner),), cap_after_s)

    usual = tuple(usual_s * share for share in USUAL_LEVELS)
    everywhere = Corner(np.inf, np.inf, usual, lambda before_s: np.full_like(before_s, np.inf))
    return [everywhere, *(corner(share) for share in CORNERS)]


def _grid(
    stage: StageCost, work: Work, multiple: int, num_more: int, hop_token_s: float
) -> tuple[PlacedRelaxation, Floats] | None:
    """The relaxation and caps around the likely best one."""
    if not is_curved([stage]):
        return None
    caps = np.array([np.inf])
    if num_more:
        lines = envelopes([stage], work, hop_token_s)
        centre = max(likely_cap_s(envelope, work, num_more) for envelope in lines)
        caps = centre * np.geomspace(LEAST_CAP, MOST_CAP, NUM_CAPS)
    relaxation = PlacedRelaxation([stage], work, multiple, float(caps[-1]), hop_token_s)
    return (relaxation, caps) if relaxation.num_steps <= MOST_STEPS else None


def _least_s(relaxation: PlacedRelaxation, stage: StageCost, work: Work, caps: Floats, num_more: int) -> float:
    """The least of S(m) + num_more * m."""
    sums = relaxation.sums(caps)
    if num_more == 0:
        return float(sums[0])
    for _ in range(NUM_REFINEMENTS):
        inner = _between(caps, int(np.argmin(sums + num_more * caps)))
        caps, sums = np.append(caps, inner), np.append(sums, relaxation.sums(inner))
        order = np.argsort(caps)
        caps, sums = caps[order], sums[order]
    beyond = caps[-1] * num_more + max(least_sum(envelope, work) for envelope in envelopes([stage], work))
    return float(min(sums[0], (sums[1:] + num_more * caps[:-1]).min(), beyond))


def _between(caps: Floats, best: int) -> Floats:
    """Caps around one of them."""
    inner: Floats = np.geomspace(caps[max(best - 2, 0)], caps[min(best + 2, len(caps) - 1)], NUM_CAPS)[1:-1]
    return inner


@dataclass(slots=True)
class _Cells:
    """The least of S + E + D over all that fill and drain may add."""

    sides: list[Side]
    most_s: float
    relaxation: PlacedRelaxation
    efficiencies: list[Efficiency]
    own_s: Floats
    """w of so many equal rounds under each of the efficiencies' caps, [num_caps, numbers]."""

    def least_s(self) -> float:
        """Best first: the cells with the least bounds are divided."""
        axes = []
        for side in self.sides:
            first = np.array([side.least_s])
            inner = np.geomspace(max(side.least_s, 1e-3 * self.most_s), self.most_s, NUM_EDGES)
            axes.append(np.unique(np.concatenate([first, inner])) if len(side.ratio) else np.zeros(2))
        (low_e, low_d), (high_e, high_d) = (
            [grid.ravel() for grid in np.meshgrid(axes[0][part], axes[1][part])] for part in (slice(-1), slice(1, None))
        )
        cells = np.stack([low_e, high_e, low_d, high_d], axis=1)
        bounds = self._bounds(cells)
        for _ in range(NUM_DIVISIONS):
            chosen = np.argsort(bounds)[:NUM_DIVIDED]
            if bounds[chosen[0]] >= self.most_s:
                break
            chosen = chosen[bounds[chosen] < self.most_s]
            parts = self._divided(cells[chosen])
            kept = np.setdiff1d(np.arange(len(cells)), chosen)
            cells = np.concatenate([cells[kept], parts])
            bounds = np.concatenate([bounds[kept], self._bounds(parts)])
        return float(bounds.min())

    def _divided(self, cells: Floats) -> Floats:
        """Each cell in four, or in two where one side has no stages."""
        for axis, side in enumerate(self.sides):
            if len(side.ratio):
                low, high = cells[:, 2 * axis], cells[:, 2 * axis + 1]
                middle = 0.5 * (low + high)
                lower, upper = cells.copy(), cells.copy()
                lower[:, 2 * axis + 1] = upper[:, 2 * axis] = middle
                cells = np.concatenate([lower, upper])
        return cells

    def _bounds(self, cells: Floats) -> Floats:
        """S at the upper corners plus the lower corners."""
        fill, drain = cells[:, 1], cells[:, 3]
        longest = self._longest(fill, drain)
        sums = np.maximum(self.efficiencies[0].least_sums(longest), self._by_work(fill, drain, longest))
        bounds: Floats = sums + cells[:, 0] + cells[:, 2]
        open_ = np.flatnonzero((longest <= self.relaxation.longest_cap_s) & (bounds < self.most_s))
        if self.relaxation.is_single and open_.size:
            by_place = self._by_place(fill[open_], drain[open_]) + cells[open_, 0] + cells[open_, 2]
            bounds[open_] = np.maximum(bounds[open_], by_place)
        elif self.relaxation.knows_places and open_.size:
            in_place = self._in_place(fill[open_], drain[open_], longest[open_]) + cells[open_, 0] + cells[open_, 2]
            bounds[open_] = np.maximum(bounds[open_], in_place)
        return bounds

    def _in_place(self, fill_s: Floats, drain_s: Floats, longest_s: Floats) -> Floats:
        """S of several requests for each fill and drain, whose longest rounds are known."""
        numbers, most_s, rows = self.relaxation.numbers, self.most_s, np.arange(len(fill_s))[:, None]
        reach = numbers * longest_s[:, None]
        for side, excess_s in zip(self.sides, (fill_s, drain_s), strict=True):
            if len(side.ratio):
                grown = side.grown_s(excess_s)
                steps = np.minimum(numbers, grown.shape[1] - 1).astype(np.int64)
                reach = np.minimum(reach, grown[rows, steps] + (numbers - steps) * longest_s[:, None])
        before = np.minimum(self.sides[0].caps_s(fill_s, np.full(len(fill_s), most_s)), longest_s)

        def cap_after_s(done_s: Floats) -> Floats:
            after = self.sides[1].caps_s(drain_s[:, None], np.maximum(most_s - done_s, 0.0))
            return np.minimum(before[:, None], after)

        levels = np.searchsorted(self.efficiencies[0].caps_s, longest_s)  # the next higher cap known
        return self.relaxation.sums_in_place(cap_after_s, self.own_s[levels], reach)

    def _longest(self, fill_s: Floats, drain_s: Floats) -> Floats:
        places = np.linspace(0.0, self.most_s, NUM_SPANS + 1)
        before = self.sides[0].caps_s(fill_s[:, None], places[1:])
        after = self.sides[1].caps_s(drain_s[:, None], self.most_s - places[:-1], places[1:])
        found: Floats = np.minimum(before, after).max(axis=1)
        return found

    def _by_work(self, fill_s: Floats, drain_s: Floats, longest_s: Floats) -> Floats:
        places = np.concatenate([[0.0], np.geomspace(1e-4, 1.0, NUM_SPANS) * self.most_s])
        caps = [
            self.sides[0].caps_s(fill_s[:, None], places[1:]),
            self.sides[1].caps_s(drain_s[:, None], places[1:], self.most_s - places[:-1]),
        ]
        times, is_known = np.zeros(len(fill_s)), longest_s <= self.relaxation.longest_cap_s
        for efficiency in self.efficiencies:
            corner = efficiency.corner
            inside = (fill_s <= corner.fill_s) & (drain_s <= corner.drain_s) & (is_known | np.isinf(corner.drain_s))
            if not inside.any() or not np.isfinite(efficiency.work_s):
                times = np.where(inside, self.most_s, times)
                continue
            rates = [efficiency.under(each) for each in caps]  # [cells, spans]
            start = np.zeros((len(fill_s), 1))
            done = [np.concatenate([start, np.cumsum(rate * np.diff(places), axis=1)], axis=1) for rate in rates]
            work_s = np.full(len(fill_s), efficiency.work_s)
            found = _reached(work_s, done[1], rates[1], places)  # all of it as the drain allows
            for border in np.linspace(0, NUM_SPANS, NUM_BORDERS).astype(int):
                left = np.maximum(work_s - done[1][:, border], 0.0)
                filled = _reached(left, done[0], rates[0], places)
                found = np.maximum(found, np.where(left > 0.0, places[border] + filled, 0.0))
            times = np.where(inside, np.maximum(times, found), times)
        return times

    def _by_place(self, fill_s: Floats, drain_s: Floats) -> Floats:
        least, rest = self.relaxation.free_paths
        before = self.sides[0].caps_s(fill_s[:, None], np.maximum(self.most_s - rest, 0.0))
        none_ended = np.zeros(1)  # the one that there is ends with the last round
        after = self.sides[1].caps_s(drain_s[:, None], np.maximum(self.most_s - least, 0.0), none_ended)
        return np.minimum(self.relaxation.path_under(before, after), self.most_s)


def _reached(work_s: Floats, done: Floats, per_s: Floats, places: Floats) -> Floats:
    """When so much work is done at the earliest, at most the last place; [cells]."""
    at = np.clip((done < work_s[:, None]).sum(axis=1) - 1, 0, len(places) - 2)
    rows = np.arange(len(work_s))
    with np.errstate(divide="ignore", invalid="ignore"):
        more = (work_s - done[rows, at]) / per_s[rows, at]
    found: Floats = np.minimum(places[at] + np.where(work_s > done[rows, at], more, 0.0), places[-1])
    return found
