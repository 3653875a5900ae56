"""Attention of one layer as a function of chunk and context, fitted with non-negative least absolute deviations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tuner.curve import SPIKE, least_absolute

Floats = npt.NDArray[np.float64]
SHORTEST_S = 1e-12  # stands for zero where a logarithm is taken


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCurve:
    """t(c, p) = base(c) + slope(c) * p.

    For a given chunk a kernel's time is linear in the context. Between the measured chunks base and slope follow a
    power of the chunk (linear interpolation of logarithms): the square of large chunks and the constant of small ones
    are both such powers. Beyond the largest, base grows with the square and slope in proportion; below the smallest
    both stay.
    """

    chunks: Floats
    base_s: Floats
    context_s: Floats

    def base(self, chunk: npt.ArrayLike) -> Floats:
        """Seconds of chunks without context."""
        return self._power(chunk, self.base_s) * self._beyond(chunk) ** 2

    def slope(self, chunk: npt.ArrayLike) -> Floats:
        """Seconds that each token of context adds."""
        return self._power(chunk, self.context_s) * self._beyond(chunk)

    def __call__(self, chunk: npt.ArrayLike, context: npt.ArrayLike) -> Floats:
        """Seconds of chunks after contexts."""
        return self.base(chunk) + self.slope(chunk) * np.asarray(context, dtype=np.float64)

    def _power(self, chunk: npt.ArrayLike, seconds: Floats) -> Floats:
        at = np.log(np.maximum(np.asarray(chunk, dtype=np.float64), 1.0))
        value: Floats = np.exp(np.interp(at, np.log(self.chunks), np.log(np.maximum(seconds, SHORTEST_S))))
        return value

    def _beyond(self, chunk: npt.ArrayLike) -> Floats:
        factor: Floats = np.maximum(np.asarray(chunk, dtype=np.float64) / self.chunks[-1], 1.0)
        return factor


def fit_attention(chunk: Sequence[int], context: Sequence[int], seconds: Sequence[float]) -> AttentionCurve:
    """Fit measured points (chunk, context, seconds), minimising relative errors chunk by chunk.

    A chunk measured at one context alone takes its slope from its neighbours' cost of a (query, key) pair. A larger
    chunk could run as several smaller ones: where its pairs cost far more than theirs, the machine was disturbed.
    """
    c, p = np.asarray(chunk, dtype=np.float64), np.asarray(context, dtype=np.float64)
    measured = np.maximum(np.asarray(seconds, dtype=np.float64), SHORTEST_S)
    chunks = np.unique(c)
    lines = {
        at: least_absolute(np.stack([np.ones(mine.sum()), p[mine]], axis=1) / measured[mine, None], np.ones(mine.sum()))
        for at in chunks
        for mine in [c == at]
        if len(np.unique(p[mine])) > 1
    }
    if lines:
        known = np.array(list(lines))
        pair_s = np.interp(np.log(chunks), np.log(known), np.array([line[1] for line in lines.values()]) / known)
    else:
        pair_s = np.array([float(np.min(measured / (c * p + c * (c + 1.0) / 2.0)))] * len(chunks))
    slope = _undisturbed(pair_s) * chunks
    base = np.empty_like(slope)
    for index, at in enumerate(chunks):
        mine = c == at
        alone = float(np.min(measured[mine] - slope[index] * p[mine]))
        base[index] = lines[at][0] if at in lines else max(alone, 0.0)
    pairs = chunks * (chunks + 1.0) / 2.0
    return AttentionCurve(chunks=chunks, base_s=_undisturbed(base / pairs) * pairs, context_s=slope)


def _undisturbed(pair_s: Floats) -> Floats:
    """Costs of a pair by chunk size, the far larger ones lowered to the least of a smaller chunk."""
    least_before = np.minimum.accumulate(np.concatenate([[np.inf], pair_s[:-1]]))
    return np.where(pair_s > SPIKE * least_before, least_before, pair_s)
