"""Uncertainty of a predicted makespan: the relative half-width of a 90 % interval, for normal errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # both import the database
    from tuner.fit.correction import Correction
    from tuner.fit.holdout import HeldOutError

# Of a normal distribution: the 90 % half-width over the median of absolute deviations, 1.645 / 0.6745.
NINETY_OF_MEDIAN = 2.44
# Effects that only runs show: clocks, skew between ranks, memory that kernels share.
UNSEEN = 0.02
TIMES_A_LAYER = {"matmul": 4}  # q|k|v, o, gate|up and down are fitted apart
EXTRAPOLATED = 2.0  # times as uncertain beyond what was measured
SPARSE, A_GUESS = 0.5, 0.75
"""Of the points that a plan leans on: with a larger share missing, its prediction needs a warning, or is a guess."""


def makespan_uncertainty(held_out: Sequence[HeldOutError], correction: Correction, *, extrapolates: bool) -> float:
    """The largest of what is known: the fits' held-out errors, and the errors of corrected rounds of earlier runs.

    A layer adds its operations up, and their errors are independent: they add up by their squares.
    """
    fits = math.sqrt(sum(TIMES_A_LAYER.get(error.op, 1) * error.of_layer**2 for error in held_out))
    width = NINETY_OF_MEDIAN * max(fits, correction.error_after, UNSEEN)
    return EXTRAPOLATED * width if extrapolates else width


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The points of one operation near a plan's rounds."""

    op: str
    num_points: int
    num_missing: int

    def to_json(self) -> dict[str, int | str]:
        """The same as a JSON object."""
        return asdict(self)


def share_missing(found: Sequence[Coverage]) -> float:
    """Share of missing points among those that a plan depends on."""
    num_points = sum(one.num_points for one in found)
    return sum(one.num_missing for one in found) / num_points if num_points else 0.0


def widened_uncertainty(uncertainty: float, missing: float) -> float:
    """The relative half-width of a prediction with such a share of its points missing: all of it where it is a guess.

    Few points leave few out, so that held-out errors alone would call them good.
    """
    if missing > A_GUESS:
        return max(1.0, uncertainty)
    return 2.0 * uncertainty if missing > SPARSE else uncertainty
