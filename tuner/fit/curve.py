"""A piecewise linear, non-decreasing time curve, fitted with non-negative least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from db.rows.measurements import Measurement
from tuner.fit.rows import expected_s

Floats = npt.NDArray[np.float64]
SPIKE = 1.15  # times its neighbours' cost of a unit: kernels differ by less, interference by more
_ROUNDS_OF_WEIGHTS = 30
_LEAST_RESIDUAL = 1e-4


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
    """Fit a curve through measured points, minimising relative errors.

    The value at the first knot and each rise to the next are unknowns that may not be negative (Lawson and Hanson's
    active set, `scipy.optimize.nnls`): where a noisy point lies below its predecessor the two share a level, elsewhere
    the curve goes through the points.
    """
    return _fitted(tuple(x), tuple(seconds))


@lru_cache(maxsize=4096)
def _fitted(x: tuple[float, ...], seconds: tuple[float, ...]) -> Curve:
    """Fit the curve; cached, because many layouts use the same points."""
    at = np.asarray(x, dtype=np.float64)
    measured = np.asarray(seconds, dtype=np.float64)
    knots = np.unique(at)
    steps = np.ones((len(at), len(knots)))
    for j in range(1, len(knots)):
        steps[:, j] = np.clip((at - knots[j - 1]) / (knots[j] - knots[j - 1]), 0.0, 1.0)
    weight = 1.0 / np.maximum(measured, 1e-12)
    rises, _ = nnls(steps * weight[:, None], measured * weight)
    return Curve(knots=knots, seconds=np.cumsum(rises))


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
    """Non-negative solution of the least sum of absolute residuals, which single outliers do not move.

    Iteratively reweighted least squares (Schlossmacher, 1973) over `scipy.optimize.nnls`.
    """
    weight = np.ones(len(target))
    solution: Floats = np.full(design.shape[1], np.nan)
    for _ in range(_ROUNDS_OF_WEIGHTS):
        before, (solution, _) = solution, nnls(design * weight[:, None], target * weight)
        if (solution == before).all():
            break  # all further ones are the same
        weight = np.maximum(np.abs(design @ solution - target), _LEAST_RESIDUAL) ** -0.5
    return solution


def fit_line(x: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(latency_s, seconds per unit of x), both non-negative, minimising relative errors."""
    at, measured = np.asarray(x, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    weight = 1.0 / np.maximum(measured, 1e-12)
    (latency, per_unit), _ = nnls(np.stack([weight, at * weight], axis=1), measured * weight)
    return float(latency), float(per_unit)
