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
PULL_TO_ONE = 0.02  # weight of "no correction" against one measured layer: only decides where nothing was measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Factors on the sum of the parts: on token-wise work by the round's tokens, on attention one for all."""

    tokens: Floats
    factors: Floats
    attention_factor: float
    num_layers_measured: int

    @classmethod
    def none(cls) -> Calibration:
        """The parts as they are."""
        return cls(tokens=np.ones(1), factors=np.ones(1), attention_factor=1.0, num_layers_measured=0)

    def tokens_factor(self, tokens: Floats) -> Floats:
        """Factor for rounds of so many tokens, interpolated over the logarithm, constant outside."""
        at = np.log(np.maximum(tokens, 1.0))
        factor: Floats = np.interp(at, np.log(self.tokens), self.factors)
        return factor


def fit_calibration(
    compute_s: Callable[[Floats], Floats], attention: AttentionCurve, layers: Sequence[Measurement], *, ranks: int
) -> Calibration:
    """Fit the factors to `layer` rows (bounded least squares on relative errors, `scipy.optimize.lsq_linear`).

    ranks: that wait for one another after each layer's parts.
    """
    if not layers:
        return Calibration.none()
    chunk = np.array([row.shape["chunk"] for row in layers], dtype=np.float64)
    context = np.array([row.shape["context"] for row in layers], dtype=np.float64)
    measured = np.array([expected_s(row, ranks=ranks) for row in layers])
    knots = np.unique(chunk)
    hats = np.stack([np.interp(np.log(chunk), np.log(knots), unit) for unit in np.eye(len(knots))], axis=1)
    design = np.concatenate([hats * compute_s(chunk)[:, None], attention(chunk, context)[:, None]], axis=1)
    design /= measured[:, None]
    num_factors = design.shape[1]
    pull = PULL_TO_ONE * np.eye(num_factors)
    solution = lsq_linear(
        np.concatenate([design, pull]),
        np.concatenate([np.ones(len(layers)), np.full(num_factors, PULL_TO_ONE)]),
        bounds=(LEAST_FACTOR, MOST_FACTOR),
    )
    factors = np.asarray(solution.x, dtype=np.float64)
    return Calibration(
        tokens=knots, factors=factors[:-1], attention_factor=float(factors[-1]), num_layers_measured=len(layers)
    )
