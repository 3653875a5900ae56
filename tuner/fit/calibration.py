"""Calibration: how much longer a whole layer takes than the sum of its parts (caches, launches, memory)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from db.rows.measurements import Measurement
from tuner.fit.curve import Floats, bounded_least_squares
from tuner.fit.rows import expected_s

LEAST_FACTOR, MOST_FACTOR = 0.5, 2.0  # larger deviations are a measurement error, not a correction
# Against one measured layer: that nothing is corrected; that work of like size is corrected alike, which holds for
# token-wise work; and that a chunk's attention to itself is corrected as its attention to the context.
PULL_TO_ONE, PULL_ALONG, PULL_TOGETHER = 0.05, 0.5, 0.1
NEAR = 1.5  # times as many tokens, or as few: so far a measured layer tells of others
FEW_SAMPLES = 3.0  # a row of so many samples counts for half


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Factors on the parts by their tokens: a round's for token-wise work, a chunk's for attention."""

    tokens: Floats
    factors: Floats
    base_factors: Floats
    """On the attention of a chunk to itself."""
    context_factors: Floats
    """On its attention to the context."""
    num_layers_measured: int

    @classmethod
    def none(cls) -> Calibration:
        """No calibration: all factors are 1."""
        one = np.ones(1)
        return cls(tokens=one, factors=one, base_factors=one, context_factors=one, num_layers_measured=0)

    def with_attention_of(self, other: Calibration) -> Calibration:
        """These factors on token-wise work, the other's on attention."""
        knots = np.union1d(self.tokens, other.tokens)
        return Calibration(
            tokens=knots,
            factors=self.tokens_factor(knots),
            base_factors=other.base_factor(knots),
            context_factors=other.context_factor(knots),
            num_layers_measured=self.num_layers_measured + other.num_layers_measured,
        )

    def is_near(self, tokens: float) -> bool:
        """Whether a whole layer of about this many tokens was measured; elsewhere its factors are interpolated."""
        return self.num_layers_measured > 0 and bool((np.abs(np.log(self.tokens / tokens)) < np.log(NEAR)).any())

    def tokens_factor(self, tokens: Floats) -> Floats:
        """Factor for rounds of so many tokens, interpolated over the logarithm, constant outside."""
        return self._at(tokens, self.factors)

    def base_factor(self, chunk: Floats) -> Floats:
        """Factor for the attention of chunks of so many tokens to themselves, likewise."""
        return self._at(chunk, self.base_factors, careful=True)

    def context_factor(self, chunk: Floats) -> Floats:
        """Factor for the attention of chunks of so many tokens to their context, likewise."""
        return self._at(chunk, self.context_factors, careful=True)

    def _at(self, tokens: Floats, factors: Floats, *, careful: bool = False) -> Floats:
        """careful: a factor that rises to the next knot has risen NEAR the one before: a short chunk leaves a part of
        the card idle, whose power lets the rest run faster, and says nothing of chunks that fill it."""
        knots = self.tokens
        if careful and len(knots) > 1:
            rises = np.flatnonzero((factors[1:] > factors[:-1]) & (NEAR * knots[:-1] < knots[1:]))
            knots = np.concatenate([knots, NEAR * knots[rises]])
            order = np.argsort(knots)
            knots, factors = knots[order], np.concatenate([factors, factors[rises + 1]])[order]
        factor: Floats = np.interp(np.log(np.maximum(tokens, 1.0)), np.log(knots), factors)
        return factor


def fit_calibration(
    compute_s: Callable[[Floats], Floats],
    attention: Callable[[Floats, npt.ArrayLike], Floats],
    layers: Sequence[Measurement],
    *,
    ranks: int,
) -> Calibration:
    """Fit the factors to `layer` rows (bounded least squares on relative errors).

    Layers of one chunk after several contexts tell its factors apart.
    ranks: that wait for one another after each layer's parts.
    """
    if not layers:
        return Calibration.none()
    chunk = np.array([row.shape["chunk"] for row in layers], dtype=np.float64)
    context = np.array([row.shape["context"] for row in layers], dtype=np.float64)
    measured = np.array([expected_s(row, ranks=ranks) for row in layers])
    samples = np.array([row.num_samples for row in layers], dtype=np.float64)
    weight = np.sqrt(samples / (samples + FEW_SAMPLES))
    knots = np.unique(chunk)
    one = np.eye(len(knots))
    hats = np.stack([np.interp(np.log(chunk), np.log(knots), unit) for unit in one], axis=1)
    alone = attention(chunk, 0.0)
    parts = (compute_s(chunk), alone, attention(chunk, context) - alone)
    design = np.concatenate([hats * part[:, None] for part in parts], axis=1)
    steps, nothing = np.diff(one, axis=0), np.zeros_like(one)
    pulls = np.concatenate([
        PULL_TO_ONE * np.eye(design.shape[1]),
        PULL_ALONG * np.hstack([steps, np.zeros((len(steps), 2 * len(knots)))]),
        PULL_TOGETHER * np.hstack([nothing, one, -one]),
    ])  # fmt: skip
    solution = bounded_least_squares(
        np.concatenate([design * (weight / measured)[:, None], pulls]),
        np.concatenate([weight, np.where(pulls.sum(axis=1) > 0, PULL_TO_ONE, 0.0)]),
        [LEAST_FACTOR] * design.shape[1],
        [MOST_FACTOR] * design.shape[1],
    )
    factors, base_factors, context_factors = np.split(solution, 3)
    return Calibration(
        tokens=knots,
        factors=factors,
        base_factors=base_factors,
        context_factors=context_factors,
        num_layers_measured=len(layers),
    )
