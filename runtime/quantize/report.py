"""What quantizing a checkpoint cost: errors of each linear, what calibration covered, perplexity before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """One linear of one layer. Errors are relative, in the Frobenius norm; None where nothing was run through it."""

    layer: int
    linear: str
    kept: bool
    weight_error: float
    output_error: float | None = None
    input_end: float | None = None  # largest magnitude on the calibration set, after smoothing
    outlier_ratio: float | None = None  # of the widest channel to the median one, before smoothing


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeReport:
    """A checkpoint made 8-bit."""

    model: str
    precision: str
    folder: str
    linears: tuple[LinearReport, ...]
    calibration_tokens: int
    held_out_tokens: int
    perplexity_before: float | None
    perplexity_after: float | None
    source_bytes: int
    written_bytes: int
    elapsed_s: float

    def worst(self, count: int = 5) -> Sequence[LinearReport]:
        """The linears whose outputs lose most, or their weights where no output was seen."""
        lossy = [linear for linear in self.linears if not linear.kept]
        return sorted(lossy, key=lambda linear: -(linear.output_error or linear.weight_error))[:count]

    @property
    def perplexity_loss(self) -> float | None:
        """By what share perplexity rose."""
        if self.perplexity_before is None or self.perplexity_after is None:
            return None
        return self.perplexity_after / self.perplexity_before - 1.0

    def to_json(self) -> dict[str, Any]:
        """All of it for programs."""
        return asdict(self) | {"perplexity_loss": self.perplexity_loss}
