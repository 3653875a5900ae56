"""The pace at which requests that keep coming are best run: rounds of one length, the least time in the system.

Rounds of `m` seconds take the stretch s(m) times the work in them. A request of `w` seconds waits, takes s w / (1 - b),
with `b` the load of those that pass it, and passes the K - 1 stages behind in (K - 1) m: short rounds pass sooner, long
ones leave less to wait for. With a load r(m) = s(m) a w up to its level the work held up to there is v / (2 (1 - r)) in
the mean, `v` the variance of the work that a second brings (Pollaczek and Khinchine; Kingman, 1961, where arrivals are
not Poisson's), and the request waits 1 / (1 - b) times that (Cobham, 1954).

Near saturation and over it the mean is not reached in the time `H` that is looked ahead. The work W held is taken from
W (1 - r + 2 W / H) = v / 2: far below saturation the formula above, over it the fluid's (r - 1) H / 2, and at r = 1 as
much as a Brownian motion that is kept above 0 holds over `H`, within a tenth. `v` counts twice: the load is known from
as many arrivals as are looked ahead to, and is as far off as they will be.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import numpy as np

from tuner.online.to_come.traffic import Levels
from tuner.plan.stage_cost import Floats

LEAST_FREE = 1e-3
UNSURE = 2.0
"""What the variance of the work to come counts, for the load is only estimated."""


def _one() -> Floats:
    return np.ones(1)


@dataclass(frozen=True, slots=True)
class SteadyPace:
    """The best pace, and what each pace makes of work."""

    pace_s: float = 0.0
    tokens: float = 0.0
    """Of its rounds."""
    _paces_s: Floats = field(default_factory=_one)
    _stretches: Floats = field(default_factory=_one)

    @classmethod
    def of(
        cls, levels: Levels, sizes: Floats, *, round_s: Floats, stretches: Floats, behind: float, horizon_s: float
    ) -> Self:
        """The best of rounds of some sizes.

        round_s: seconds of rounds of each of `sizes` tokens; stretches: of all rounds over those of the work in them.
        behind: times a round's seconds to pass the stages behind the first.
        """
        stretch = stretches[:, None]  # sizes x levels from here on
        drain = 1.0 - stretch * levels.upto
        spread = UNSURE * 4.0 * levels.variance * stretch * stretch / horizon_s
        held_s = (np.sqrt(drain * drain + spread) - drain) * horizon_s / 4.0
        free = np.maximum(1.0 - stretch * levels.before, LEAST_FREE)
        wait_s = np.minimum(held_s / free, horizon_s)
        own_s = np.maximum(np.minimum(stretch * levels.work_s / free, horizon_s), round_s[:, None])
        best = int(((wait_s + own_s) @ levels.share + behind * round_s).argmin())
        return cls(float(round_s[best]), float(sizes[best]), round_s, np.minimum.accumulate(stretches))

    def stretch(self, pace_s: Floats) -> Floats:
        """Seconds of rounds over those of the work in them, in rounds of up to so many seconds."""
        return np.interp(pace_s, self._paces_s, self._stretches)
