"""How far a predicted makespan may be off: the relative half-width that holds nine times in ten for normal errors."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner.fit.correction import Correction
from tuner.fit.holdout import HeldOutError

# Of a normal distribution: the 90 % half-width over the median of absolute deviations, 1.645 / 0.6745.
NINETY_OF_MEDIAN = 2.44
# What fits never see without a run: clocks, skew between ranks, memory that kernels share.
UNSEEN = 0.02
TIMES_A_LAYER = {"matmul": 4}  # q|k|v, o, gate|up and down are fitted apart
EXTRAPOLATED = 2.0  # times as uncertain beyond what was measured


def makespan_uncertainty(held_out: Sequence[HeldOutError], correction: Correction, *, extrapolates: bool) -> float:
    """The largest of what is known: the fits' held-out errors, and the errors of corrected rounds of earlier runs.

    A layer adds its operations up, and their errors are independent: they add up by their squares.
    """
    fits = math.sqrt(sum(TIMES_A_LAYER.get(error.op, 1) * error.of_layer**2 for error in held_out))
    width = NINETY_OF_MEDIAN * max(fits, correction.error_after, UNSEEN)
    return EXTRAPOLATED * width if extrapolates else width
