"""Rows of tokens in 8 bits, as a product takes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations x [T, K] as values and scales: x is about (values - offset) scales.

    The offset of a static range is the product's to take off: it is the same for every token.
    """

    values: torch.Tensor  # [T, K] int8 or float8_e4m3fn
    scales: torch.Tensor  # float32: [T, 1], of each row; [1], of all
    dtype: torch.dtype  # what they were, and what the product gives

    @property
    def shape(self) -> torch.Size:
        """[T, K]."""
        return self.values.shape

    def gathered(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedRows:
        """The rows of all ranks, one rank after another; gather: [...] -> [ranks, ...]."""
        # As bytes: not every transport knows float8.
        values = gather(self.values.view(torch.uint8)).flatten(0, 1).view(self.values.dtype)
        scales = gather(self.scales).flatten(0, 1) if self.scales.dim() == 2 else self.scales
        return QuantizedRows(values, scales, self.dtype)
