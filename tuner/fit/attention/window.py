"""Attention within a sliding window as a function of chunk and context: it grows until the window is full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from db.rows.measurements import Measurement
from tuner.fit.curve import Curve, Floats, fit_curve
from tuner.fit.rows import expected_s


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowCurve:
    """t(c, p) = base(c) + rise(c) * min(p, window) / window.

    What plans are made with is linear in the context: `base` and `slope` are the line that is nearest to it, by least
    squares, over all contexts up to that of the longest prompt. Behind a prompt of many windows its slope is near 0.
    """

    window: int
    longest: int
    """Tokens of the longest context."""
    start: Curve
    """Seconds of chunks without context."""
    full: Curve
    """Seconds behind a full window."""

    @property
    def chunks(self) -> Floats:
        """Chunks that were measured."""
        return self.start.knots

    def base(self, chunk: npt.ArrayLike) -> Floats:
        """Seconds of the line without context."""
        share = min(self.window / self.longest, 1.0)
        return self._start(chunk) + (1.0 - share) ** 2 * self._rise(chunk)

    def slope(self, chunk: npt.ArrayLike) -> Floats:
        """Seconds that each token of context adds on the line."""
        share = min(self.window / self.longest, 1.0)
        return share * (3.0 - 2.0 * share) / max(self.window, self.longest) * self._rise(chunk)

    def __call__(self, chunk: npt.ArrayLike, context: npt.ArrayLike) -> Floats:
        """Seconds of chunks after contexts."""
        filled = np.minimum(np.asarray(context, dtype=np.float64) / self.window, 1.0)
        seconds: Floats = self._start(chunk) + self._rise(chunk) * filled
        return seconds

    def _start(self, chunk: npt.ArrayLike) -> Floats:
        return np.asarray(self.start(np.asarray(chunk, dtype=np.float64)))

    def _rise(self, chunk: npt.ArrayLike) -> Floats:
        rise: Floats = np.maximum(np.asarray(self.full(np.asarray(chunk, dtype=np.float64))) - self._start(chunk), 0.0)
        return rise


def fit_window(rows: Sequence[Measurement], window: int, *, longest: int, ranks: int = 1) -> WindowCurve:
    """Fit attention rows of one window; where none is behind a full one, the growth seen goes on until it is full."""
    by_chunk: dict[int, dict[int, float]] = {}
    for row in rows:
        by_chunk.setdefault(row.shape["chunk"], {})[row.shape["context"]] = expected_s(row, ranks=ranks)
    starts, fulls = dict[int, float](), dict[int, float]()
    for chunk, by_context in by_chunk.items():
        first, last = min(by_context), max(by_context)
        filled = [seconds for context, seconds in by_context.items() if context >= window]
        if first == 0:
            starts[chunk] = by_context[0]
        if filled:
            fulls[chunk] = float(np.mean(filled))
        elif first == 0 and last > 0:
            fulls[chunk] = by_context[0] + max(by_context[last] - by_context[0], 0.0) * window / last
    starts = starts or fulls
    fulls = fulls or starts
    return WindowCurve(
        window=window,
        longest=longest,
        start=fit_curve(list(starts), list(starts.values())),
        full=fit_curve(list(fulls), list(fulls.values())),
    )
