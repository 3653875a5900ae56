"""Precisions: in which formats weights, activations, the KV cache and sums between ranks are kept and computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from db.errors import UserError
from profiler.hardware.datasheet import published_peak_flops

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Format:
    """A number format, by torch's name."""

    name: str
    bits: int

    def num_bytes(self, num_elements: int) -> int:
        """Bytes that so many numbers take."""
        return -(-num_elements * self.bits // 8)

    def num_elements(self, size_bytes: int) -> int:
        """Whole numbers in so many bytes."""
        return size_bytes * 8 // self.bits

    @property
    def torch_dtype(self) -> torch.dtype:
        """Torch's dtype; the only thing here that imports torch."""
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


FLOAT32, BFLOAT16, FLOAT16 = Format("float32", 32), Format("bfloat16", 16), Format("float16", 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What each kind of number is kept in, and what matrix products are computed in."""

    name: str  # as plans and rows name it
    weights: Format
    activations: Format  # hidden states, between stages too
    products: Format  # operands of matrix products
    kv: Format
    reductions: Format  # partial results that the ranks of a tensor-parallel group sum

    @classmethod
    def plain(cls, every: Format) -> Precision:
        """One format for all."""
        return cls(
            name=every.name, weights=every, activations=every, products=every, kv=every, reductions=every
        )  # fmt: skip

    def peak_flops(self, device_name: str) -> float | None:
        """FLOP/s that the vendor publishes for dense products; None where none is known (any CPU)."""
        return published_peak_flops(device_name, self.products.name)


PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {each.name: Precision.plain(each) for each in (FLOAT32, BFLOAT16, FLOAT16)}
)


def precision_of(name: str, *, field: str = "dtype") -> Precision:
    """The precision that plans, rows and options call `name`; raises `UserError` naming `field` for any other."""
    if name not in PRECISIONS:
        raise UserError(field, name, "supported are " + ", ".join(PRECISIONS))
    return PRECISIONS[name]
