"""The format in which a product takes its operand; the element-wise work before it writes that format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from profiler.kernels.elementwise import add_rms_norm, rms_norm, silu_product
from profiler.kernels.quantized.rows import QuantizedRows

Operand = torch.Tensor | QuantizedRows


class Entry(Protocol):
    """The work before a product, its last step included: the format that the product takes."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> Operand:
        """The root-mean-square norm of x [T, K]."""

    def add_norm(
        self, stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, Operand]:
        """The residual stream with a block's output added, plain, and its norm."""

    def silu(self, gate_up: torch.Tensor) -> Operand:
        """gate|up [T, 2F] -> silu of the first half times the second [T, F]."""

    def take(self, x: torch.Tensor) -> Operand:
        """x [T, K] as it is."""


class PlainEntry:
    """Into products that take plain numbers."""

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """See `Entry`."""
        return rms_norm(x, weight, eps)

    def add_norm(
        self, stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Entry`."""
        return add_rms_norm(stream, update, weight, eps)

    def silu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See `Entry`."""
        return silu_product(gate_up)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """See `Entry`."""
        return x


PLAIN = PlainEntry()


class Product(Protocol):
    """A linear of a layer: takes its operand as its entry gives it, or plain."""

    @property
    def entry(self) -> Entry:
        """The work before it."""

    def __call__(self, x: Operand) -> torch.Tensor:
        """x: [T, K] -> [T, N]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entries:
    """The entries of a layer's products that element-wise work comes before; attention's output is taken plain."""

    qkv: Entry = PLAIN
    gate_up: Entry = PLAIN
    down: Entry = PLAIN

    @classmethod
    def of(cls, products: Mapping[str, Product], *, has_latent: bool = False) -> Entries:
        """Those of the products by name; experts take plain rows, and so do the several products before latents."""

        def entry(name: str) -> Entry:
            return products[name].entry if name in products else PLAIN

        return cls(qkv=PLAIN if has_latent else entry("qkv"), gate_up=entry("gate_up"), down=entry("down"))
