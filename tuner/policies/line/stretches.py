"""Rounds that are stretches of a line of all tokens, cut anywhere on the grid: dynamic programming from the line's end.

All requests stand in a line, one after another, and a round is a stretch of it. Where the first stage is the busiest,
a plan takes what its rounds take there and what draining the pipeline adds. For an allowed drain D the cheapest rounds
from place i on take

    Y(i) = min over j > i of  t(i, j) + Y(j)

seconds of the busiest stage, over the stretches from i to j with which the stages behind end at most D after it. How
long those have to run is known of the way that each place goes on by: the recurrence, read backwards. So rounds are as
long as what comes after them allows, and chunks end where kernels like it. All D and both orders of the requests are
followed at once. Where a later stage is the busiest, filling counts instead, and line and pipeline are mirrored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.plan.cost_model import CostModel, Ints
from tuner.plan.plan import Request, Round
from tuner.plan.stage_cost import Floats, StageCost
from tuner.policies.line.line import TokenLine
from tuner.rounds.problem import Problem
from tuner.rounds.relaxation import Work
from tuner.rounds.uneven import busiest_stage

MOST_PLACES, MOST_STRETCHES = 3_200, 400_000
"""Longer lines are cut on a coarser grid ..."""
LEAST_UNITS, COARSE_STRETCHES = 8, 100_000
"""... of which the cap that is best for all rounds holds at least so many units, and with fewer stretches: it gains
less."""
DRAINS = np.geomspace(0.25, 2.0, 16)
"""Of what rounds as long as that cap add: the drains that are tried."""
LONGEST, LONG = 2.6, 1.5
"""Times that cap: stretches that are looked at; with too many of them at least these."""
SLOWER = 1.01
"""A stage so much slower than the last one may hold rounds up as that does."""
NUM_KEPT = 4
"""Plans that are judged exactly."""


def stretch_rounds(problem: Problem, order: Sequence[int], cap_s: float) -> Iterator[list[Round]]:
    """Candidates for the makespan, the most promising first, of requests in this order and the other way round.

    None for one stage or too many tokens. `cap_s` is the cap that is best for all rounds.
    """
    way = _Way.of(problem.cost.merged(), problem.requests)
    unit = _unit(problem, way.busy, cap_s) if way.length else 0
    if not unit:
        return
    lengths = [(problem.requests[index].prompt_tokens, problem.requests[index].cached_tokens) for index in order]
    orders = [order] if lengths == lengths[::-1] else [order, order[::-1]]
    lines = [TokenLine(problem.requests, each, unit) for each in orders]
    most = min(_num_held(problem, unit, way.busy, LONGEST * cap_s), _most_stretches(problem, unit) // len(lines[0]))
    steps = _Steps.of(problem, way, lines, most, LONGEST * cap_s)
    drains_s = DRAINS * cap_s * way.length
    choice, makespan_s = steps.followed(drains_s)
    for column in makespan_s.argsort(kind="stable")[:NUM_KEPT].tolist():
        line, place, rounds = lines[column // len(drains_s)], 0, list[Round]()
        while place < len(line):
            end = place + 1 + int(choice[place, column])
            rounds.append(line.round(len(line) - end, len(line) - place) if way.mirrored else line.round(place, end))
            place = end
        yield rounds[::-1] if way.mirrored else rounds


def _unit(problem: Problem, busy: StageCost, cap_s: float) -> int:
    """Tokens between two places of the line; 0 where places would be too many or too far apart."""
    unit, most = problem.chunk_multiple, problem.limits.max_round_tokens
    while True:
        places, stretches = _num_places(problem, unit), _most_stretches(problem, unit)
        if places <= MOST_PLACES and places * _num_held(problem, unit, busy, LONG * cap_s) <= stretches:
            return unit
        unit *= 2
        if _num_held(problem, unit, busy, cap_s) < LEAST_UNITS or (most is not None and LEAST_UNITS * unit > most):
            return 0


def _most_stretches(problem: Problem, unit: int) -> int:
    return MOST_STRETCHES if unit == problem.chunk_multiple else COARSE_STRETCHES


def _num_places(problem: Problem, unit: int) -> int:
    return sum(-(-request.new_tokens // unit) for request in problem.requests)


def _num_held(problem: Problem, unit: int, busy: StageCost, most_s: float) -> int:
    """Places that a stretch of so many seconds holds, attention left out."""
    places = _num_places(problem, unit)
    tokens = np.arange(1, places + 1) * (sum(request.new_tokens for request in problem.requests) / places)
    return max(int(np.count_nonzero(busy.round_overhead_s + busy.tokens_s(tokens) <= most_s)), 1)


@dataclass(frozen=True, slots=True)
class _Way:
    """The way of rounds from the busiest stage to the last one; mirrored, to the first one."""

    cost: CostModel
    busy: StageCost
    mirrored: bool
    length: int
    """Stages behind the busiest one."""
    stations: list[StageCost]
    """Stages at which rounds may wait: the last, and the slowest where it is slower."""
    passed: list[list[StageCost]]
    """The stages between each station and the one before it (the busiest stage, for the first)."""

    @classmethod
    def of(cls, cost: CostModel, requests: Sequence[Request]) -> _Way:
        """On the longer side of the busiest stage."""
        work = Work.of(requests, None)
        busy = busiest_stage(cost, work)
        mirrored = busy > cost.pp_size - 1 - busy
        kinds = cost.kind_of_stage[busy::-1] if mirrored else cost.kind_of_stage[busy:]
        tokens, context = work.prompt - work.cached, work.cached
        taken = [float(kind.tokens_s(tokens.sum()) + kind.chunk_seconds(tokens, context).sum()) for kind in cost.kinds]
        last = len(kinds) - 1
        slowest = max(range(1, last + 1), key=lambda place: taken[kinds[place]], default=0)
        chosen = [slowest] if 0 < slowest < last and taken[kinds[slowest]] > SLOWER * taken[kinds[last]] else []
        chosen += [last] if last else []
        stages = [cost.kinds[kind] for kind in kinds]
        passed = [stages[before + 1 : place] for before, place in zip([0, *chosen], chosen, strict=False)]
        return cls(cost, stages[0], mirrored, last, [stages[place] for place in chosen], passed)


@dataclass(frozen=True, slots=True)
class _Steps:
    """Seconds of all stretches, each [places, stretches from there, lines, 1]."""

    busy_s: Floats
    """On the busiest stage; infinite where there is no such stretch or no round may be so long."""
    station_s: list[Floats]
    passing_s: list[Floats]
    """On the way to each station."""
    num: Ints
    """Stretches that are looked at, [places]."""

    @classmethod
    def of(cls, problem: Problem, way: _Way, lines: Sequence[TokenLine], most: int, most_s: float) -> _Steps:
        """The stretches of up to `most` places that take at most `most_s`, and those of one."""
        cost, num_places = way.cost, len(lines[0])
        by_kind: dict[int, Floats] = {}

        def seconds(stage: StageCost) -> Floats:
            if id(stage) not in by_kind:
                by_kind[id(stage)] = np.stack([line.seconds(stage, most) for line in lines], axis=-1)
            return by_kind[id(stage)]

        held = np.stack([line.tokens(most) for line in lines], axis=-1)
        hop_s = cost.hop_seconds(held)
        station_s = [seconds(stage) for stage in way.stations]
        passing_s = [sum(map(seconds, passed), (1 + len(passed)) * hop_s) for passed in way.passed]
        busy_s = seconds(way.busy).copy()
        missing = np.arange(num_places)[:, None] + np.arange(most) >= num_places
        busy_s[missing] = np.inf
        if problem.limits.max_round_tokens is not None:
            busy_s[:, 1:][held[:, 1:] > problem.limits.max_round_tokens] = np.inf
        columns = [busy_s, *station_s, *passing_s]
        if way.mirrored:  # a stretch that begins at a place begins at its end
            at = np.maximum(num_places - 1 - np.arange(num_places)[:, None] - np.arange(most), 0)
            columns = [column[at, np.arange(most)] for column in columns]
            columns[0][missing] = np.inf
        busy_s, *others = (column[..., None] for column in columns)
        num = np.maximum((busy_s <= most_s).any(axis=(2, 3)).sum(axis=1), 1)
        return cls(busy_s, others[: len(station_s)], others[len(station_s) :], num)

    def followed(self, drains_s: Floats) -> tuple[Ints, Floats]:
        """For every line and drain: places beyond the first of the round from each place, [places, lines x drains], and
        the makespan, [lines x drains]."""
        num_places, most, num_lines, _ = self.busy_s.shape
        num_stations, shape = len(self.station_s), (num_lines, len(drains_s))
        columns = np.arange(num_lines * len(drains_s))
        # From each place to the end: of each station, of the busiest stage with what is behind it, and alone.
        left = np.zeros((num_stations + 2, num_places + 1, *shape))
        tried = np.empty((num_stations + 2, most, *shape))
        choice = np.zeros((num_places, len(columns)), dtype=np.int64)
        for place in range(num_places - 1, -1, -1):
            num = int(self.num[place])
            after, now = left[:, place + 1 : place + 1 + num], tried[:, :num]
            behind_s: Floats | None = None
            for station in range(num_stations - 1, -1, -1):
                reached = now[station]
                if behind_s is None:
                    np.add(after[station], self.station_s[station][place, :num], out=reached)
                else:
                    np.maximum(after[station], behind_s, out=reached)
                    reached += self.station_s[station][place, :num]
                behind_s = reached + self.passing_s[station][place, :num]
            assert behind_s is not None
            busy_s = self.busy_s[place, :num]
            np.maximum(after[-2], behind_s, out=now[-2])
            now[-2] += busy_s
            np.add(after[-1], busy_s, out=now[-1])
            behind_s -= after[-1]
            best = np.where(behind_s > drains_s, np.inf, now[-1]).argmin(axis=0).ravel()
            choice[place] = best
            chosen = now.reshape(num_stations + 2, -1).take(best * len(columns) + columns, axis=1)
            left[:, place] = chosen.reshape(-1, *shape)
        return choice, left[-2, 0].ravel()
