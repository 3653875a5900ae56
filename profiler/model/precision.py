"""Precisions: in which formats weights, activations, the KV cache and sums between ranks are kept and computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
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
INT8, E4M3 = Format("int8", 8), Format("float8_e4m3fn", 8)


class Ranges(StrEnum):
    """How the range of a product's activations is found before they are quantized."""

    DYNAMIC = "dynamic"  # of each token, as it comes
    STATIC = "static"  # of the whole tensor, beforehand, on a calibration set


@dataclass(frozen=True, slots=True)
class LinearFormat:
    """How a layer's linears are kept and computed in 8 bits: each output's weights share a scale in float32.

    activations: None where they stay as they are and the weights are dequantized inside the product.
    """

    weights: Format
    activations: Format | None = None
    ranges: Ranges = Ranges.DYNAMIC

    def num_bytes(self, n: int, k: int, group_size: int | None = None) -> int:
        """Bytes of a matrix [n, k] and its scales, of each output or of groups of its inputs."""
        return self.weights.num_bytes(n * k) + FLOAT32.num_bytes(n * (-(-k // group_size) if group_size else 1))

    @property
    def is_calibrated(self) -> bool:
        """Whether it takes a calibration set."""
        return self.activations is not None and self.ranges is Ranges.STATIC


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What each kind of number is kept in, and what matrix products are computed in."""

    name: str  # as plans and rows name it
    weights: Format  # embedding, head, norms, biases; linears too where `linears` says nothing else
    activations: Format  # hidden states, between stages too
    products: Format  # operands of matrix products
    kv: Format
    reductions: Format  # partial results that the ranks of a tensor-parallel group sum
    linears: LinearFormat | None = None  # of the layers; those that a model keeps plain are left out

    @classmethod
    def plain(cls, every: Format) -> Precision:
        """One format for all."""
        return cls(
            name=every.name, weights=every, activations=every, products=every, kv=every, reductions=every
        )  # fmt: skip

    @classmethod
    def quantized(cls, name: str, linears: LinearFormat, around: Format) -> Precision:
        """Linears in 8 bits, all `around` them in another format; the name says which where it is not bfloat16."""
        return cls(
            name=name if around is BFLOAT16 else f"{name}+{around.name}",
            weights=around,
            activations=around,
            products=linears.activations or around,
            kv=around,
            reductions=around,
            linears=linears,
        )

    @property
    def has_kv_scales(self) -> bool:
        """Whether keys and values are kept in 8 bits, those of each token's head with a scale in float32."""
        return self.kv != self.activations

    def with_kv(self, name: str, kv: Format) -> Precision:
        """The same with keys and values in another format; `name` is what precisions add to theirs."""
        return replace(self, name=f"{self.name}+{name}", kv=kv)

    def kv_bytes(self, num_elements: int, head_dim: int) -> int:
        """Bytes of keys or values in heads of `head_dim` numbers, with their scales."""
        scales = FLOAT32.num_bytes(num_elements // head_dim) if self.has_kv_scales else 0
        return self.kv.num_bytes(num_elements) + scales

    def matrix_bytes(self, n: int, k: int, *, kept: bool = False, group_size: int | None = None) -> int:
        """Bytes of a layer's matrix [n, k] with its scales; `kept` as the other weights are."""
        if self.linears is None or kept:
            return self.weights.num_bytes(n * k)
        return self.linears.num_bytes(n, k, group_size)

    def peak_flops(self, device_name: str) -> float | None:
        """FLOP/s that the vendor publishes for dense products in the activations' format; None where none is known.

        A utilisation against it compares precisions: what 8 bits bring raises it.
        """
        return published_peak_flops(device_name, self.activations.name)

    def product_peak_flops(self, device_name: str) -> float | None:
        """The same in the format in which the layers' products are computed."""
        return published_peak_flops(device_name, self.products.name)


_QUANTIZED = {
    "w8a16": LinearFormat(INT8),
    "w8a8": LinearFormat(INT8, INT8),
    "w8a8-static": LinearFormat(INT8, INT8, Ranges.STATIC),
    "fp8": LinearFormat(E4M3, E4M3),
    "fp8-static": LinearFormat(E4M3, E4M3, Ranges.STATIC),
}

KV_FORMATS: Mapping[str, Format] = MappingProxyType({"kv-int8": INT8, "kv-fp8": E4M3})

_WITH_PLAIN_KV = (
    *(Precision.plain(every) for every in (FLOAT32, BFLOAT16, FLOAT16)),
    *(Precision.quantized(name, linears, BFLOAT16) for name, linears in _QUANTIZED.items()),
    *(Precision.quantized(name, linears, FLOAT32) for name, linears in _QUANTIZED.items()),
)

PRECISIONS: Mapping[str, Precision] = MappingProxyType(
    {each.name: each for each in _WITH_PLAIN_KV}
    | {f"{each.name}+{name}": each.with_kv(name, kv) for name, kv in KV_FORMATS.items() for each in _WITH_PLAIN_KV}
)
SUPPORTED = (
    ", ".join(each.name for each in _WITH_PLAIN_KV) + ", each also with " + " or ".join(f"+{x}" for x in KV_FORMATS)
)


def precision_of(name: str, *, field: str = "dtype") -> Precision:
    """The precision that plans, rows and options call `name`; raises `UserError` naming `field` for any other."""
    if name not in PRECISIONS:
        raise UserError(field, name, f"supported are {SUPPORTED}")
    return PRECISIONS[name]


def plain_precision(name: str, *, field: str = "dtype") -> Precision:
    """As `precision_of`, of one format for all."""
    plain = [each.name for each in _WITH_PLAIN_KV if each.linears is None]
    if name not in plain:
        raise UserError(field, name, "supported are " + ", ".join(plain))
    return PRECISIONS[name]


def quantized_name(linears: LinearFormat | None, around: Format, kv: Format | None = None) -> str:
    """The name of the precision with such linears; kv: None where keys and values are as the activations."""
    return next(
        p.name
        for p in PRECISIONS.values()
        if p.linears == linears and p.activations == around and p.kv == (kv or around)
    )
