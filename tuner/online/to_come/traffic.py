"""How requests come: running means of the times between arrivals, and the work of the latest, by what passes what.

Where least work runs first, a request waits only for those with no more work than its own: preemptive priorities
(Cobham, 1954). So the latest requests are divided by their work into levels, each of which waits for itself and those
below. Where requests run as they come all are one level.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from tuner.plan.stage_cost import Floats

MEMORY = 128
"""Arrivals over which the running means reach."""
PRIOR_ARRIVALS = 4.0
"""How many arrivals the assumption counts for that they are Poisson's."""
SOON_OVER = 32.0
"""Arrivals that are taken to come at least, however few have."""
MOST_VARIATION = 25.0
AT_ONCE_S = 1e-9
"""Mean time between arrivals up to which they count as one arrival."""
MOST_LEVELS = 8
ALIKE = 1.0001
"""Requests whose work differs by less are alike."""
IN_TURN = 1.0
"""Aging from which on requests run as they come."""


@dataclass(frozen=True, slots=True)
class Levels:
    """Requests to come, those with least work first; arrays by level."""

    share: Floats
    """Of all requests."""
    work_s: Floats
    """Of one, in the mean."""
    most_s: Floats
    """Of the longest."""
    before: Floats
    """Seconds of work a second that all levels before bring."""
    upto: Floats
    """The same with the level's own."""
    variance: Floats
    """Of the work that a second brings up to each level."""


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
    """Work of the latest."""

    def note(self, now_s: float, work_s: float) -> None:
        """A request has arrived, with so many seconds of work for the slowest stage."""
        self.latest_s.append(work_s)
        self.work_s += (work_s - self.work_s) / min(self.count + 1, MEMORY)
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
        return self.gap_s > AT_ONCE_S

    @property
    def gap_variation(self) -> float:
        """Variance of the time between arrivals over its squared mean: 0 if regular, 1 if Poisson."""
        count = min(self.count - 1, MEMORY)
        seen = self.gap_square / self.gap_s**2 - 1.0
        return min(max((count * seen + PRIOR_ARRIVALS) / (count + PRIOR_ARRIVALS), 0.0), MOST_VARIATION)

    def horizon_s(self, now_s: float) -> float:
        """Seconds for which requests are taken to come: as long as they have, SOON_OVER arrivals at least."""
        return max(now_s - self.first_s, SOON_OVER * self.gap_s)

    def levels(self, aging: float) -> Levels:
        """The latest requests by their work, or as one level where they run as they come."""
        work_s = np.sort(np.array(self.latest_s))
        count = len(work_s)
        is_one = aging >= IN_TURN or float(work_s[-1]) <= ALIKE * float(work_s[0])
        number = 1 if is_one else min(MOST_LEVELS, count)
        bounds = np.arange(number + 1) * count // number
        sizes, total_s = np.diff(bounds), np.add.reduceat(work_s, bounds[:-1])
        mean_s = total_s.cumsum() / count
        square = np.add.reduceat(work_s * work_s, bounds[:-1]).cumsum() / count
        upto = mean_s / self.gap_s
        return Levels(
            share=sizes / count,
            work_s=total_s / sizes,
            most_s=np.full(1, math.inf) if is_one else work_s[bounds[1:] - 1],
            before=upto - total_s / (count * self.gap_s),
            upto=upto,
            variance=np.maximum(square + (self.gap_variation - 1.0) * mean_s * mean_s, 0.0) / self.gap_s,
        )
