"""Products of rows sorted by expert with the weights of each: plain ones at once, others expert by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from profiler.kernels.entry import Product


class GroupedProduct(Protocol):
    """One product of every expert that a rank holds."""

    @property
    def held(self) -> int:
        """How many experts."""

    def __call__(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows x [N, K], those of each expert up to its end [held] int32 -> [N, M]."""


class GroupedLinear:
    """Plain weights [held, M, K] and biases [held, M]; experts without rows cost nothing."""

    __slots__ = ("bias", "transposed")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.transposed, self.bias = weight.transpose(1, 2), bias

    @property
    def held(self) -> int:
        """See `GroupedProduct`."""
        return self.transposed.shape[0]

    def __call__(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """See `GroupedProduct`."""
        made = F.grouped_mm(x, self.transposed, offs=ends)
        if self.bias is not None:
            starts = torch.cat([ends.new_zeros(1), ends])
            made += self.bias.repeat_interleave(starts.diff(), dim=0)
        return made


class EachProduct:
    """A product of its own for each expert, in whatever format: the rows of one after another, on a CPU.

    Weights in 8 bits are widened by the expert, so that no more than one is wide at a time.
    """

    __slots__ = ("products",)

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = tuple(products)

    @property
    def held(self) -> int:
        """See `GroupedProduct`."""
        return len(self.products)

    def __call__(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """See `GroupedProduct`."""
        counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
        parts = zip(self.products, x.split(counts), strict=True)
        made = [product(rows) for product, rows in parts if rows.shape[0]]
        return torch.cat(made) if made else self.products[0](x)
