"""The matrix product of a layer: weights kept in the form that is fastest on their device."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from profiler.kernels.entry import PLAIN, Operand, PlainEntry


class Linear:
    """y = x W^T + b over rows of tokens.

    On a CPU in float32 the weight is reordered once into oneDNN's blocked form: 1.2 to 1.5 times the rate of the plain
    call on two Zen cores, and far less noise. Elsewhere the plain call already reaches the library's best kernel.
    """

    __slots__ = ("bias", "packed", "weight")
    entry: PlainEntry = PLAIN

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, *, reorder: bool = True) -> None:
        # weight: [N, K], bias: [N]; reorder: not where the weight is written anew while the product is kept
        self.packed = reorder and _can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()) if self.packed else weight
        self.bias = bias

    def split(self, first_outputs: int) -> tuple[Linear, Linear] | None:
        """The product as two, of the first outputs and of the rest, on the same memory; None where it was reordered."""
        if self.packed:
            return None
        first, rest = slice(0, first_outputs), slice(first_outputs, None)
        biases = (None, None) if self.bias is None else (self.bias[first], self.bias[rest])
        parts = zip((first, rest), biases, strict=True)
        one, other = (Linear(self.weight[rows], bias, reorder=False) for rows, bias in parts)
        return one, other

    def __call__(self, x: Operand) -> torch.Tensor:
        """x: [T, K] -> [T, N]."""
        assert isinstance(x, torch.Tensor)
        if self.packed:
            y: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return y
        return F.linear(x, self.weight, self.bias)


def _can_pack(weight: torch.Tensor) -> bool:
    """Whether this build of torch carries the reordering operator (it is torch.compile's own) for such a weight."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
