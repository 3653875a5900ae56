"""The gated MLP of a layer, or of an expert that every token goes to."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from profiler.model.tensors import Dim, LinearSpec


class Activation(StrEnum):
    """What the gate of an MLP goes through."""

    SILU = "silu"
    GELU_TANH = "gelu_pytorch_tanh"


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseMLP:
    """A gated MLP: down(f(gate x) * up x)."""

    gate_up: LinearSpec
    down: LinearSpec
    activation: Activation = field(default=Activation.SILU, repr=False)

    @property
    def intermediate(self) -> Dim:
        """Features between gate|up and down."""
        return self.down.inputs

    def features(self, tp_size: int) -> int:
        """Of these the most that a rank holds."""
        return self.gate_up.sizes(tp_size)[0] // 2
