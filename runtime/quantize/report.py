"""What quantizing a checkpoint cost: errors of each linear, what calibration covered, perplexity before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelEnds:
    """The largest magnitudes of a linear's input channels: the least of them, their quartiles, and the most."""

    least: float
    lower: float
    median: float
    upper: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """One linear of one layer. Errors are relative, in the Frobenius norm; None where nothing was run through it."""

    layer: int
    linear: str
    kept: bool
    weight_error: float
    output_error: float | None = None
    outlier_ratio: float | None = None  # of the widest channel to the median one, before smoothing
    seen: ChannelEnds | None = None
    """The input's channels on the calibration set, before smoothing."""
    smoothed: ChannelEnds | None = None
    """The same after smoothing; None where nothing was smoothed."""
    held_out: ChannelEnds | None = None
    """The same on the held-out text, before smoothing."""

    @property
    def input_end(self) -> float | None:
        """The largest magnitude that is rounded, of the calibration set."""
        ends = self.smoothed or self.seen
        return None if ends is None else ends.most


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
        linears = [asdict(linear) | {"input_end": linear.input_end} for linear in self.linears]
        return asdict(self) | {"linears": linears, "perplexity_loss": self.perplexity_loss}
