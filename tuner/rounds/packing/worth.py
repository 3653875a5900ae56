"""Rounds filled by what chunks are worth, from the last round to the first: a packing for cost tables.

Where costs are tables, a round is cheap a token at some numbers of tokens and a chunk at some lengths, and no rule by
time alone finds rounds in which both are. Let w(T) be what a round of T tokens takes beside attention, rho the least
w(T) / T, and A what a chunk of c tokens adds. A prompt's cheapest cut at A + rho c a chunk is a shortest path over the
grid; a chunk is *worth* what it carries its prompt along this path, and wastes A + rho c less that. All rounds take

    sum of w(T) + A  =  worth of all prompts  +  sum over rounds of (w(T) - rho T + what its chunks waste),

so that a round is good where it wastes little a second. Which chunks make it so is a knapsack with one choice a prompt
(Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, chapter 11), by tokens.

Rounds are found backwards, each from what is left of the prompts' ends, since what runs after a round says how long it
may be: under the caps of `rounds.uneven` for what draining and filling the pipeline may add, and under a longest one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

import numpy as np

from tuner.plan.cost_model import Ints
from tuner.plan.plan import Chunk, Request, Round
from tuner.plan.stage_cost import Floats, StageCost
from tuner.rounds.problem import Problem
from tuner.rounds.relaxation import Work
from tuner.rounds.uneven import Side, busiest_stage, sides_of

STEPS_A_UNIT, MOST_STEPS = 4, 64
"""A round's tokens are told apart by steps, so many to a unit of the grid, as prompts end off it, or to the longest
round."""
MOST_COPIES = 3
"""Of prompts alike that have come equally far, how many may have a chunk in a round."""

MOST_CHUNKS = 1 << 21
"""Chunks of all kinds of prompts that are looked at; with more the grid is coarser, by powers of two."""
MOST_TAILS = 10
"""Prompts, alike or not, that are looked at for a round: those that have waited longest."""

Kind = tuple[int, int]
"""Prompts alike: their tokens and their cached tokens."""
Tail = tuple[Kind, int]
"""And the point of the grid up to which they are still to be run."""


class WorthPacker:
    """Fills rounds of one batch by worth, none longer than `longest_s`: the cheapest cuts are those of such rounds.

    Seconds are those of the stage on which the batch takes longest.
    """

    def __init__(self, problem: Problem, longest_s: float) -> None:
        cost = problem.cost
        work = Work.of(problem.requests, problem.limits.max_round_tokens)
        busiest = busiest_stage(cost, work)
        stage = cost.stages[busiest]
        self._requests, self._longest_s = problem.requests, longest_s
        self._fill, self._drain = sides_of(cost, work, busiest)
        kinds = {_kind(request) for request in problem.requests}
        most = int(min(work.new_tokens, work.max_round_tokens))
        multiple, units = problem.chunk_multiple, _units(stage, problem.chunk_multiple, most, longest_s)
        while len(units) * sum(prompt - cached for prompt, cached in kinds) > MOST_CHUNKS * multiple:
            multiple, units = 2 * multiple, _units(stage, 2 * multiple, most, longest_s)
        self._step = max(multiple * len(units) // MOST_STEPS, multiple // STEPS_A_UNIT, 1)
        known = min(int(units[-1]) + multiple, most)
        own_s = _own_s(stage, np.arange(known + 1))
        token_s = float((own_s[units] / units).min())
        self._own_s = np.append(own_s, np.full(known + multiple + 1, np.inf))  # w by tokens: two chunks that fit alone
        self._token_s = token_s
        self._cuts = {
            kind: _Cuts.of(stage, *kind, multiple, len(units), self._own_s, token_s, longest_s) for kind in kinds
        }

    def pack(self, outer_s: float, total_s: float) -> list[Round]:
        """Rounds of which the first or last takes up to about `outer_s`, where stages next to the busiest one have to
        wait for it; all of them take about `total_s`."""
        left = dict[Tail, list[int]]()
        for index, request in enumerate(self._requests):
            kind = _kind(request)
            left.setdefault((kind, len(self._cuts[kind].points) - 1), []).append(index)
        rounds, after_s, longest_s = list[Round](), 0.0, self._longest_s
        fill, drain = _lines(self._fill, outer_s), _lines(self._drain, outer_s)
        while left:
            cap_s = min((constant + rate * after_s for constant, rate in drain), default=longest_s)
            before_s = max(total_s - after_s - cap_s, 0.0)
            cap_s = min(longest_s, cap_s, *(constant + rate * before_s for constant, rate in fill))
            taken, seconds = self._round(left, cap_s)
            chunks, waiting = list[Chunk](), list[tuple[Tail, int]]()
            for (kind, end), units in taken:
                points, alike = self._cuts[kind].points, left[kind, end]
                index, start = alike.pop(), end - units
                if not alike:
                    del left[kind, end]
                if start:
                    waiting.append(((kind, start), index))
                chunks.append(Chunk(index, int(points[start]), int(points[end] - points[start])))
            for tail, index in waiting:
                left.setdefault(tail, []).append(index)
            rounds.append(tuple(chunks))
            after_s += seconds
        return rounds[::-1]

    def _round(self, left: dict[Tail, list[int]], cap_s: float) -> tuple[list[tuple[Tail, int]], float]:
        """The chunks, as tails and units, of the round that wastes least a second, and its seconds."""
        most = int(np.searchsorted(self._own_s, cap_s, side="right")) - 1
        filling = _Filling(self._own_s, max(most, 0), self._step, cap_s)
        for (kind, end), alike in islice(left.items(), MOST_TAILS):
            filling.offer((kind, end), self._cuts[kind], min(len(alike), MOST_COPIES))
        found = filling.best(self._token_s)
        if found is None:  # no chunk fits: the quickest there is
            alone = {tail: self._cuts[tail[0]].least_s(tail[1], self._own_s) for tail in left}
            quickest = min(alone, key=alone.__getitem__)
            return [(quickest, 1)], alone[quickest]
        return found


@dataclass(frozen=True, slots=True)
class _Cuts:
    """The chunks that may end at each point of prompts alike, by their units: [points, units], the shortest first."""

    points: Ints
    """Tokens up to each point of the grid from the cached ones on, and up to the prompt's end."""
    tokens: Ints
    added_s: Floats
    """A with what ending the prompt costs; infinite where there is no such chunk."""
    wasted_s: Floats

    @classmethod
    def of(
        cls,
        stage: StageCost,
        prompt: int,
        cached: int,
        multiple: int,
        most_units: int,
        own_s: Floats,
        token_s: float,
        longest_s: float,
    ) -> _Cuts:
        """Of chunks up to so many units in rounds up to `longest_s`; a chunk of one unit is always possible."""
        points = np.append(np.arange(cached, prompt, multiple), prompt)
        first = np.arange(len(points))[:, None] - np.arange(1, most_units + 1)
        start = points[np.maximum(first, 0)]
        tokens = np.where(first >= 0, points[:, None] - start, 0)
        added = stage.chunk_s + stage.attention.base(tokens) + stage.attention.slope(tokens) * start
        added[-1] += stage.final_s
        possible = added + own_s[tokens] <= longest_s
        possible[:, 0] = True
        added = np.where(possible & (first >= 0), added, np.inf)
        cost, least = added + token_s * tokens, np.zeros(len(points))
        for end in range(1, len(points)):
            width = min(end, most_units)
            least[end] = (cost[end, :width][::-1] + least[end - width : end]).min()
        return cls(points, tokens, added, cost - (least[:, None] - least[np.maximum(first, 0)]))

    def least_s(self, end: int, own_s: Floats) -> float:
        """Seconds of the shortest chunk up to a point in a round of its own."""
        return float(self.added_s[end, 0] + own_s[self.tokens[end, 0]])


class _Filling:
    """A round being filled: for each number of steps of tokens, the chunks that waste least within the cap."""

    def __init__(self, own_s: Floats, most_tokens: int, step: int, cap_s: float) -> None:
        self._own_s, self._step, self._cap_s, self._most_tokens = own_s, step, cap_s, most_tokens
        size = -(-most_tokens // step) + 1
        self._before = size  # as many rows without chunks before the first
        self._rows = np.arange(size, 2 * size)
        self._wasted_s, self._added_s = np.full(2 * size, np.inf), np.zeros(2 * size)
        self._tokens = np.zeros(2 * size, dtype=np.int64)
        self._wasted_s[size] = 0.0
        self._choices: list[tuple[Tail, Ints, Ints]] = []  # units that a tail has in each row, and steps by units

    def offer(self, tail: Tail, cuts: _Cuts, copies: int) -> None:
        """A chunk of one prompt, or of several alike, up to a point."""
        end, size = tail[1], self._before
        tokens, added_s = cuts.tokens[end], cuts.added_s[end]
        most = int(np.count_nonzero(tokens <= self._most_tokens))
        units = min(most, int(np.count_nonzero(self._own_s[tokens[:most]] + added_s[:most] <= self._cap_s)))
        if not units:
            return
        tokens, added_s, wasted_s = tokens[:units], added_s[:units], cuts.wasted_s[end, :units]
        steps = -(-tokens // self._step)
        before, columns = self._rows[:, None] - steps, np.arange(size)
        for _ in range(copies):
            total, added = self._tokens[before] + tokens, self._added_s[before] + added_s
            fitting = self._own_s[total] + added <= self._cap_s
            wasted = np.where(fitting, self._wasted_s[before] + wasted_s, np.inf)
            at = wasted.argmin(axis=1)
            least_s = wasted[columns, at]
            better = np.flatnonzero(least_s < self._wasted_s[size:])
            if not better.size:
                return
            chosen, rows = at[better], better + size
            taken = np.zeros(size, dtype=np.int64)
            taken[better] = chosen + 1
            self._choices.append((tail, taken, steps))
            self._wasted_s[rows] = least_s[better]
            self._tokens[rows] = total[better, chosen]
            self._added_s[rows] = added[better, chosen]

    def best(self, token_s: float) -> tuple[list[tuple[Tail, int]], float] | None:
        """The chunks that waste least a second, as tails and units, and the round's seconds; None if there are none."""
        tokens, added_s = self._tokens[self._before :], self._added_s[self._before :]
        own_s = self._own_s[tokens]
        seconds = own_s + added_s
        wasted_s = self._wasted_s[self._before :] + own_s - token_s * tokens
        share = np.divide(wasted_s, seconds, out=np.zeros(len(seconds)), where=seconds > 0.0)
        row = int(np.argmin(np.where(tokens > 0, share, np.inf)))
        if not tokens[row]:
            return None
        taken, found_s = list[tuple[Tail, int]](), float(seconds[row])
        for tail, units, steps in reversed(self._choices):
            if units[row]:
                taken.append((tail, int(units[row])))
                row -= int(steps[units[row] - 1])
        return taken, found_s


def _kind(request: Request) -> Kind:
    return request.prompt_tokens, request.cached_tokens


def _units(stage: StageCost, multiple: int, most: int, longest_s: float) -> Ints:
    """Tokens of the chunks on a grid that may be alone in a round of so many seconds and tokens; at least one."""
    units = np.arange(multiple, most + 1, multiple) if most >= multiple else np.array([most])
    fit = int(np.searchsorted(_own_s(stage, units), longest_s, side="right"))
    return units[: max(fit, 1)]


def _own_s(stage: StageCost, tokens: Ints) -> Floats:
    """w of rounds of so many tokens."""
    found: Floats = stage.round_overhead_s + stage.tokens_s(tokens)
    return found


def _lines(side: Side, outer_s: float) -> list[tuple[float, float]]:
    """The least of them, constant + rate x, is the longest that a round may be after x seconds of rounds from a side's
    outer end on (`Side.caps_s`), where the outermost may take `outer_s`."""
    slow = side.slowness > 0.0
    slowness, before_s = side.slowness[slow], side.before_s[:-1][slow]
    excess_s = (before_s + outer_s * slowness).max(initial=0.0)
    constant, rate = (excess_s - before_s) / slowness, (1.0 - side.ratio[slow]) / slowness
    return list(zip(constant.tolist(), rate.tolist(), strict=True))
