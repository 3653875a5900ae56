"""How far a predicted makespan may be off: the relative half-width that holds nine times in ten for normal errors."""

from __future__ import annotations

from collections.abc import Sequence

from tuner.correction import Correction
from tuner.holdout import HeldOutError

# Of a normal distribution: the 90 % half-width over the median of absolute deviations, 1.645 / 0.6745.
NINETY_OF_MEDIAN = 2.44
# What fits never see without a run: clocks, skew between ranks, memory that kernels share.
UNSEEN = 0.02
EXTRAPOLATED = 2.0  # times as uncertain beyond what was measured


def makespan_uncertainty(held_out: Sequence[HeldOutError], correction: Correction, *, extrapolates: bool) -> float:
    """The largest of what is known: the fits' held-out errors, and the errors of corrected rounds of earlier runs.

    A makespan adds up many kernels, so that the largest median error of an operation stands for them.
    """
    typical = max((error.median for error in held_out), default=0.0)
    width = NINETY_OF_MEDIAN * max(typical, correction.error_after, UNSEEN)
    return EXTRAPOLATED * width if extrapolates else width
