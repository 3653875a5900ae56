"""A piecewise linear, non-decreasing time curve, fitted with least squares; and non-decreasing lines.

Both are solved here, exactly and in a few lines: SciPy's solvers take longer to import than all fits take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from db.rows.measurements import Measurement
from tuner.fit.rows import expected_s

Floats = npt.NDArray[np.float64]
SPIKE = 1.15  # times its neighbours' cost of a unit: kernels differ by less, interference by more
_ROUNDS_OF_WEIGHTS = 30
_LEAST_RESIDUAL = 1e-4
_IN_PROPORTION = 1e-20
"""Share of a column's square that is rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Linear between `knots`, constant below the first (a kernel has a shortest time), the last slope beyond."""

    knots: Floats
    seconds: Floats

    def __call__(self, x: npt.ArrayLike) -> Floats:
        """Seconds at x, of the same shape as x."""
        at = np.asarray(x, dtype=np.float64)
        inside: Floats = np.interp(at, self.knots, self.seconds)
        if len(self.knots) == 1:
            scaled: Floats = inside * np.maximum(at / max(self.knots[0], 1.0), 1.0)
            return scaled
        slope = (self.seconds[-1] - self.seconds[-2]) / (self.knots[-1] - self.knots[-2])
        beyond: Floats = slope * np.maximum(at - self.knots[-1], 0.0)
        return inside + beyond


def fit_curve(x: Sequence[float], seconds: Sequence[float]) -> Curve:
    """Fit a curve through measured points, minimising relative errors: of all curves that fall nowhere the best.

    Where a noisy point lies below its predecessor the two share a level, elsewhere the curve goes through the points.
    """
    return _fitted(tuple(x), tuple(seconds))


@lru_cache(maxsize=4096)
def _fitted(x: tuple[float, ...], seconds: tuple[float, ...]) -> Curve:
    """Fit the curve; cached, because many layouts use the same points."""
    knots, place = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True)
    measured = np.asarray(seconds, dtype=np.float64)
    weight = np.maximum(measured, 1e-12) ** -2.0
    weights = np.bincount(place, weight).astype(np.float64)
    return Curve(knots=knots, seconds=non_decreasing(np.bincount(place, weight * measured) / weights, weights))


def non_decreasing(values: Floats, weights: Floats) -> Floats:
    """The nearest values by weighted squares that nowhere fall and are not negative.

    Pool adjacent violators (Ayer, Brunk, Ewing, Reid and Silverman, 1955): neighbours that fall share their mean.
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, number of values
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, heavy, count = value, weight, 1
        while pools and pools[-1][0] >= mean:
            before, its, more = pools.pop()
            mean, heavy, count = (before * its + mean * heavy) / (its + heavy), its + heavy, count + more
        pools.append((mean, heavy, count))
    return np.repeat([max(mean, 0.0) for mean, _, _ in pools], [count for _, _, count in pools])


def fit_rows(rows: Sequence[Measurement], at: str, *, ranks: int = 1) -> Curve:
    """Fit the expected seconds of rows over one of their sizes; single outliers are smoothed."""
    sizes = [row.shape[at] for row in rows]
    return fit_curve(sizes, without_spikes(sizes, [expected_s(row, ranks=ranks) for row in rows]))


def fit_means(rows: Sequence[Measurement], at: str, *, ranks: int = 1) -> Curve:
    """The same through the mean of the rows of each size, which differ in what is not known beforehand."""
    by_size: dict[int, list[float]] = {}
    for row in rows:
        by_size.setdefault(row.shape[at], []).append(expected_s(row, ranks=ranks))
    sizes = list(by_size)
    return fit_curve(sizes, without_spikes(sizes, [float(np.mean(by_size[size])) for size in sizes]))


def without_spikes(x: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Lower the seconds of points that cost far more for a unit of x than both neighbouring points.

    A core that others share, or a hypervisor takes away, makes single points slow while they are measured.
    """
    order = np.argsort(x, kind="stable")
    rates = np.asarray(seconds, dtype=np.float64)[order] / np.asarray(x, dtype=np.float64)[order]
    usual = np.maximum(rates[:-2], rates[2:])
    spiked = rates[1:-1] > SPIKE * usual
    rates[1:-1] = np.where(spiked, usual, rates[1:-1])
    steady = np.empty_like(rates)
    steady[order] = rates
    return [float(rate * at) for rate, at in zip(steady, x, strict=True)]


def least_absolute(design: Floats, target: Floats) -> Floats:
    """Non-negative multiples of two columns with least absolute residuals in sum, which single outliers do not move.

    Iteratively reweighted least squares (Schlossmacher, 1973).
    """
    weight = np.ones(len(target))
    solution: Floats = np.full(2, np.nan)
    for _ in range(_ROUNDS_OF_WEIGHTS):
        first, second = (design * weight[:, None]).T
        before, solution = solution, least_squares_of_two(first, second, target * weight)
        if (solution == before).all():
            break  # all further ones are the same
        weight = np.maximum(np.abs(design @ solution - target), _LEAST_RESIDUAL) ** -0.5
    return solution


def fit_line(x: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(latency_s, seconds per unit of x), both non-negative, minimising relative errors."""
    at, measured = np.asarray(x, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    weight = 1.0 / np.maximum(measured, 1e-12)
    latency, per_unit = least_squares_of_two(weight, at * weight, measured * weight)
    return float(latency), float(per_unit)


def least_squares_of_two(first: Floats, second: Floats, target: Floats) -> Floats:
    """The non-negative multiples of two columns whose sum is nearest to a third, by squares.

    Where the best multiples are not both positive, one of them is zero: the problem is convex. Of columns in proportion
    the one that goes with the target more is taken.
    """
    own, other, mixed = float(first @ first), float(second @ second), float(first @ second)
    alike = max(float(first @ target), 0.0), max(float(second @ target), 0.0)
    rest = second - mixed / own * first  # what is at right angles to the first column
    size = float(rest @ rest)
    if size > _IN_PROPORTION * other:
        of_second = float(rest @ target) / size
        of_first = (float(first @ target) - mixed * of_second) / own
        if of_first >= 0.0 and of_second >= 0.0:
            return np.array([of_first, of_second])
        nearer = alike[0] ** 2 * other > alike[1] ** 2 * own
        takes_first = of_second < 0.0 and (of_first >= 0.0 or nearer)
    else:
        takes_first = alike[0] >= alike[1]
    return np.array([alike[0] / own, 0.0] if takes_first else [0.0, alike[1] / other])


def bounded_least_squares(design: Floats, target: Floats, least: Sequence[float], most: Sequence[float]) -> Floats:
    """The solution within bounds; SciPy finds it where the one without them is outside."""
    free = np.asarray(np.linalg.lstsq(design, target, rcond=-1)[0], dtype=np.float64)
    if (free >= np.asarray(least)).all() and (free <= np.asarray(most)).all():
        return free
    from scipy.optimize import lsq_linear

    return np.asarray(lsq_linear(design, target, bounds=(least, most)).x, dtype=np.float64)
