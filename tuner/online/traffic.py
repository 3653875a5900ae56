"""Forecasts later arrivals from those so far: how long they would wait for a decision made now.

While `V` seconds of work wait, requests arrive at a rate `a` and bring a load `r` (seconds of work a second), `V` falls
by 1 - r a second. All that arrive before it is gone wait for what is left of it: a V^2 / (2 (1 - r)) seconds in all.
That is the value function of the M/G/1 queue, without what any decision costs alike (Hyytia, Aalto, Penttinen and
Virtamo, "On the value function of the M/G/1 FCFS and LCFS queues", 2012). A rule that adds it to the cost of each of
its choices is one step of policy iteration: where its model holds it is no worse than the rule whose load `r` is.
Over a horizon `H` the same is a (V H - (1 - r) H^2 / 2) where work outlasts it; under overload it always does. The
horizon is as long as arrivals have been watched.

Arrivals need not be Poisson's. Regular ones leave time until the next one: work done by then delays nobody. Of bursts,
a renewal process whose times between arrivals have the variation c^2, (c^2 - 1) / 2 more come soon after one has.

The load depends on the rounds. A request of `w` seconds in `q` rounds with an overhead of `o` each, or 1 / q requests
to a round, takes S = w + q o of the pipeline and S + (K - 1) (w / q + o) to pass it, and waits about r / (1 - r) *
(c_a^2 + c_s^2) / 2 * S before (Kingman, 1961; for Poisson arrivals Pollaczek and Khinchine's mean), `c_a` and `c_s` the
variation of the times between arrivals and of the work. The least of the sum over `q` tells the load that the pipeline
should run at. Rounds that hold all that waits are a bulk service queue, whose throughput grows with its rounds (Inoue,
"Queueing analysis of GPU-based inference servers with dynamic batching", 2021): with a backlog the load is less than
that, and requests to come count less than by the formula (`OnlineSettings.foresight`). Regular arrivals below capacity
leave no backlog, and count in full.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.plan.stage_cost import Floats

MEMORY = 128
"""Arrivals over which the running means reach."""
PRIOR_ARRIVALS = 4.0
"""How many arrivals the assumption counts for that they are Poisson's."""
ROUNDS_A_REQUEST = tuple(2.0 ** (step / 2.0) for step in range(-8, 9))
"""Rounds a request that are weighed; below 1, requests share a round."""
MOST_VARIATION = 25.0
MOST_LEVELS = 8
IN_TURN = 1.0


@dataclass(frozen=True, slots=True)
class Levels:
    """Requests to come by what runs before them."""

    share: Floats
    work_s: Floats
    """Mean work of a request."""
    most_s: Floats
    before: Floats
    upto: Floats
    variance: Floats
    """Of the work that comes in a second, of this level and those before it."""


@dataclass(frozen=True, slots=True)
class Steady:
    """The pace at which requests to come are best run."""

    pace_s: float = 0.0
    paces_s: tuple[float, ...] = ()
    stretches: tuple[float, ...] = ()

    def stretch(self, pace_s: float) -> float:
        """Seconds of rounds over those of the work in them."""
        return float(np.interp(pace_s, self.paces_s, self.stretches))


@dataclass(slots=True)
class Traffic:
    """Running means over the requests that have come."""

    count: int = 0
    first_s: float = 0.0
    last_s: float = 0.0
    gap_s: float = 0.0
    gap_square: float = 0.0
    work_s: float = 0.0
    latest_s: deque[float] = field(default_factory=lambda: deque(maxlen=MEMORY))

    def note(self, now_s: float, work_s: float) -> None:
        """A request has arrived, with so many seconds of work for the slowest stage."""
        share = 1.0 / min(self.count + 1, MEMORY)
        self.latest_s.append(work_s)
        self.work_s += share * (work_s - self.work_s)
        if self.count:
            share = 1.0 / min(self.count, MEMORY)
            gap_s = max(now_s - self.last_s, 0.0)
            self.gap_s += share * (gap_s - self.gap_s)
            self.gap_square += share * (gap_s * gap_s - self.gap_square)
        else:
            self.first_s = now_s
        self.count += 1
        self.last_s = max(self.last_s, now_s)

    @property
    def is_known(self) -> bool:
        """Whether requests have arrived at more than one time."""
        return self.gap_s > 0.0

    @property
    def gap_variation(self) -> float:
        """Variance of the time between arrivals over its squared mean: 0 if regular, 1 if Poisson."""
        count = min(self.count - 1, MEMORY)
        seen = self.gap_square / self.gap_s**2 - 1.0
        return min(max((count * seen + PRIOR_ARRIVALS) / (count + PRIOR_ARRIVALS), 0.0), MOST_VARIATION)

    @property
    def horizon_s(self) -> float:
        return max(self.last_s - self.first_s, self.gap_s)

    def levels(self, aging: float) -> Levels:
        work_s = np.sort(np.array(self.latest_s))
        number = 1 if aging >= IN_TURN or work_s[-1] <= 1.0001 * work_s[0] else min(MOST_LEVELS, len(work_s))
        bounds = [len(work_s) * i // number for i in range(number + 1)]
        count = np.diff(bounds)
        share = count / len(work_s)
        total = np.add.reduceat(work_s, bounds[:-1])
        square = np.add.reduceat(work_s * work_s, bounds[:-1])
        mean = np.cumsum(total) / len(work_s)
        variance = (np.cumsum(square) / len(work_s) + (self.gap_variation - 1.0) * mean * mean) / self.gap_s
        upto = mean / self.gap_s
        return Levels(
            share=share,
            work_s=total / count,
            most_s=work_s[np.array(bounds[1:]) - 1] if number > 1 else np.array([math.inf]),
            before=np.concatenate([[0.0], upto[:-1]]),
            upto=upto,
            variance=np.maximum(variance, 0.0),
        )

    def steady(self, levels: Levels, overheads_s: Floats, stages_after: float) -> Steady:
        """The pace of the least time in the system.

        overheads_s: of a round, for each of ROUNDS_A_REQUEST.
        """
        rounds = np.array(ROUNDS_A_REQUEST)
        pace_s = self.work_s / rounds + overheads_s
        stretch = 1.0 + overheads_s * rounds / self.work_s
        horizon_s = max(self.horizon_s, 1e-9)
        by_pace = stretch[:, None]
        drain = 1.0 - levels.upto * by_pace
        held_s = (np.sqrt(drain * drain + 4.0 * levels.variance * by_pace * by_pace / horizon_s) - drain) * horizon_s / 4.0
        free = np.maximum(1.0 - levels.before * by_pace, 1e-3)
        wait_s = np.minimum(held_s / free, horizon_s)
        own_s = np.maximum(np.minimum(levels.work_s * by_pace / free, horizon_s), pace_s[:, None])
        time_s = (wait_s + own_s) @ levels.share + stages_after * pace_s
        best = int(time_s.argmin())
        return Steady(float(pace_s[best]), tuple(pace_s[::-1].tolist()), tuple(stretch[::-1].tolist()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What work that is left over costs requests to come."""

    rates: tuple[float, ...] = ()
    """Arrivals a second by level; none where none are expected."""
    ahead: tuple[float, ...] = ()
    """Share of the waiting work that runs before each."""
    loads: tuple[float, ...] = ()
    steady: Steady = Steady()
    horizon_s: float = 0.0
    spare_s: float = 0.0
    """Work that is surely done before the next one arrives."""
    regularity: float = 0.0
    """1 for regular arrivals, 0 for Poisson."""
    soon: float = 0.0
    """Requests that will come soon because one has: more than Poisson's, by a renewal process' excess."""
    soon_s: float = 0.0
    """Their work."""
    num_passing: float = 0.0
    """Requests that come before the pipeline runs empty."""
    stages_after: float = 0.0
    gap_s: float = 0.0

    @classmethod
    def of(
        cls, traffic: Traffic, now_s: float, levels: Levels | None, steady: Steady, ahead_s: Sequence[float], waiting_s: float,
        stages_after: float,
    ) -> Outlook:
        """The outlook at a time; `ahead_s`: work that waits and runs before each level."""
        if not traffic.is_known or levels is None:
            return NONE_TO_COME
        variation = traffic.gap_variation
        regularity = 1.0 - min(variation, 1.0)
        excess = (max(variation, 1.0) - 1.0) / 2.0
        soon = excess * max(1.0 - (now_s - traffic.last_s) / (2.0 * traffic.gap_s), 0.0)
        horizon_s = max(now_s - traffic.first_s, traffic.gap_s)
        stretch = steady.stretch(steady.pace_s)
        drain = 1.0 - float(levels.upto[-1]) * stretch
        busy_s = waiting_s * stretch
        until_s = busy_s / drain if drain * horizon_s > busy_s else horizon_s
        return cls(
            soon=soon,
            soon_s=soon * traffic.work_s,
            rates=tuple((levels.share / traffic.gap_s).tolist()),
            ahead=tuple(each / max(waiting_s, 1e-12) for each in ahead_s),
            loads=tuple(levels.upto.tolist()),
            steady=steady,
            horizon_s=horizon_s,
            spare_s=regularity * max(traffic.last_s + traffic.gap_s - now_s, 0.0),
            regularity=regularity,
            num_passing=PASSING * until_s / traffic.gap_s,
            stages_after=stages_after,
            gap_s=traffic.gap_s,
        )

    def cost_s(self, busy_s: float, pass_s: float) -> float:
        """Seconds that requests to come wait, for so many seconds of work and to pass the stages behind."""
        if not self.rates:
            return 0.0
        pace_s = max(pass_s / max(self.stages_after, 1.0), self.steady.pace_s)
        cost_s, horizon_s = self.num_passing * self.stages_after * pace_s, self.horizon_s
        stretch = self.steady.stretch(pace_s)
        at_once = self.gap_s * (self.regularity / 2.0 + self.soon)
        for rate, ahead, load in zip(self.rates, self.ahead, self.loads, strict=True):
            left_s = ahead * busy_s - self.spare_s + self.soon_s
            if left_s <= 0.0:
                continue
            drain = 1.0 - load * stretch
            if drain * horizon_s >= left_s:
                waited = left_s * left_s / (2.0 * drain)
            else:
                waited = left_s * horizon_s - drain * horizon_s * horizon_s / 2.0
            cost_s += rate * (waited + at_once * left_s)
        return cost_s


import os
PASSING = float(os.environ.get("PASSING", "1"))
NONE_TO_COME = Outlook()
