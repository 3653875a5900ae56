"""Attention of one layer as a function of chunk and context, fitted with non-negative least squares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCurve:
    """t(c, p) = pair_s(c) * c (c + 1) / 2 + context_pair_s(c) * c * p.

    A kernel's rate depends on the chunk, and for a given chunk its time is linear in the context. So the cost of a
    (query, key) pair, once within the chunk and once with the context, is interpolated over the logarithm of the chunk
    and held constant outside the measured chunks: between powers of two the squared term is followed exactly.
    """

    chunks: Floats
    pair_s: Floats
    context_pair_s: Floats

    def base(self, chunk: npt.ArrayLike) -> Floats:
        """Seconds of chunks without context."""
        c = np.asarray(chunk, dtype=np.float64)
        return self._at(c, self.pair_s) * c * (c + 1.0) / 2.0

    def slope(self, chunk: npt.ArrayLike) -> Floats:
        """Seconds that each token of context adds."""
        c = np.asarray(chunk, dtype=np.float64)
        return self._at(c, self.context_pair_s) * c

    def __call__(self, chunk: npt.ArrayLike, context: npt.ArrayLike) -> Floats:
        """Seconds of chunks after contexts."""
        return self.base(chunk) + self.slope(chunk) * np.asarray(context, dtype=np.float64)

    def _at(self, chunk: Floats, pair_s: Floats) -> Floats:
        value: Floats = np.interp(np.log(np.maximum(chunk, 1.0)), np.log(self.chunks), pair_s)
        return value


def fit_attention(chunk: Sequence[int], context: Sequence[int], seconds: Sequence[float]) -> AttentionCurve:
    """Fit measured points (chunk, context, seconds), minimising relative errors."""
    c, p = np.asarray(chunk, dtype=np.float64), np.asarray(context, dtype=np.float64)
    measured = np.asarray(seconds, dtype=np.float64)
    knots = np.unique(c)
    hats = np.stack([np.interp(np.log(c), np.log(knots), unit) for unit in np.eye(len(knots))], axis=1)
    design = np.concatenate([hats * (c * (c + 1.0) / 2.0)[:, None], hats * (c * p)[:, None]], axis=1)
    weight = 1.0 / np.maximum(measured, 1e-12)
    design *= weight[:, None]
    scale = np.maximum(
        design.max(axis=0), 1e-300
    )  # columns of like size, so that the solver's tolerance means the same
    costs, _ = nnls(design / scale, measured * weight)
    costs = costs / scale
    pair_s, context_pair_s = costs[: len(knots)], costs[len(knots) :]
    with_context = hats[p > 0].sum(axis=0) > 0
    # A chunk measured without context alone: its nearest neighbours' cost of a pair with the context stands in.
    if with_context.any():
        context_pair_s = np.interp(np.log(knots), np.log(knots[with_context]), context_pair_s[with_context])
    else:
        context_pair_s = pair_s
    return AttentionCurve(chunks=knots, pair_s=pair_s, context_pair_s=context_pair_s)
