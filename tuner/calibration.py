"""How much longer a whole layer takes than its parts alone: cold caches, launches, the memory between the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from db.measurements import Measurement
from tuner.attention_fit import AttentionCurve
from tuner.curve import Floats
from tuner.rows import expected_s

LEAST_FACTOR, MOST_FACTOR = 0.5, 2.0  # parts that miss the whole by more are a mistake, not a correction
PULL_TO_ONE = 0.1  # weight of "no correction" against one measured layer
FEW_SAMPLES = 3.0  # a row of so many samples counts for half


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Factors on the parts by their tokens: a round's for token-wise work, a chunk's for attention."""

    tokens: Floats
    factors: Floats
    attention_factors: Floats
    num_layers_measured: int

    @classmethod
    def none(cls) -> Calibration:
        """The parts as they are."""
        return cls(tokens=np.ones(1), factors=np.ones(1), attention_factors=np.ones(1), num_layers_measured=0)

    def tokens_factor(self, tokens: Floats) -> Floats:
        """Factor for rounds of so many tokens, interpolated over the logarithm, constant outside."""
        return self._at(tokens, self.factors)

    def attention_factor(self, chunk: Floats) -> Floats:
        """Factor for the attention of chunks of so many tokens, likewise."""
        return self._at(chunk, self.attention_factors)

    def _at(self, tokens: Floats, factors: Floats) -> Floats:
        factor: Floats = np.interp(np.log(np.maximum(tokens, 1.0)), np.log(self.tokens), factors)
        return factor


def fit_calibration(
    compute_s: Callable[[Floats], Floats], attention: AttentionCurve, layers: Sequence[Measurement], *, ranks: int
) -> Calibration:
    """Fit the factors to `layer` rows (bounded least squares on relative errors, `scipy.optimize.lsq_linear`).

    Layers of one chunk after several contexts tell its two factors apart.
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
    hats = np.stack([np.interp(np.log(chunk), np.log(knots), unit) for unit in np.eye(len(knots))], axis=1)
    design = np.concatenate([hats * part[:, None] for part in (compute_s(chunk), attention(chunk, context))], axis=1)
    num_factors = design.shape[1]
    solution = lsq_linear(
        np.concatenate([design * (weight / measured)[:, None], PULL_TO_ONE * np.eye(num_factors)]),
        np.concatenate([weight, np.full(num_factors, PULL_TO_ONE)]),
        bounds=(LEAST_FACTOR, MOST_FACTOR),
    )
    factors, attention_factors = np.split(np.asarray(solution.x, dtype=np.float64), 2)
    return Calibration(
        tokens=knots, factors=factors, attention_factors=attention_factors, num_layers_measured=len(layers)
    )
