"""Random weights and KV slabs on one device: cached while they fit, in enough copies that each use finds them cold."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from profiler.kernels.entry import Product
from profiler.kernels.linear import Linear
from profiler.kernels.quantized.kv import KV, QuantizedKV
from profiler.kernels.quantized.linear import make_linear
from profiler.kernels.quantized.weight import quantize_weight
from profiler.model import Precision

T = TypeVar("T")

_STATIC_SCALE = 4.0 / 127.0  # normal data fill most of such a range
_MIN_SLABS = 8  # most points touch only the first rows of a slab

# Random data: all-zero operands draw less power, and cards then clock higher than a model would see.
_SEED = 20260101


@dataclass(frozen=True, slots=True, kw_only=True)
class Slabs:
    """Keys and values of several layers: of each [KV, rows, D]."""

    keys: list[KV]
    values: list[KV]

    @property
    def num_copies(self) -> int:
        """Number of layers."""
        return len(self.keys)


class Workspace:
    """Hands out operands by size.

    cold_bytes: operands take turns until so many bytes lie between two uses of one, as a stage's layers do.
    limit_bytes: what may be kept; the longest unused goes first.
    """

    def __init__(self, device: torch.device, precision: Precision, *, cold_bytes: int, limit_bytes: int) -> None:
        self.device, self.precision, self.dtype = device, precision, precision.activations.torch_dtype
        self.cold_bytes, self.limit_bytes = cold_bytes, limit_bytes
        self._kept: OrderedDict[tuple[object, ...], tuple[Any, int]] = OrderedDict()
        self._generator = torch.Generator(device).manual_seed(_SEED)

    def num_copies(self, size_bytes: int) -> int:
        """Copies of an operand of `size_bytes` that outgrow the cache, at least one; half the limit at most."""
        wanted = math.ceil(self.cold_bytes / size_bytes)
        return max(1, min(wanted, self.limit_bytes // 2 // size_bytes))

    def random(self, *sizes: int, scale: float = 1.0) -> torch.Tensor:
        """Normally distributed values of standard deviation `scale`."""
        return torch.randn(*sizes, device=self.device, dtype=self.dtype, generator=self._generator).mul_(scale)

    def linear(self, n: int, k: int, *, bias: bool = False, kept: bool = False) -> Product:
        """A new product of random weights that keeps the size of its input; `kept` plain in every precision."""
        weight, added = self.random(n, k, scale=k**-0.5), self.random(n) if bias else None
        linears = None if kept else self.precision.linears
        if linears is None:
            return Linear(weight, added)
        static = torch.full((1,), _STATIC_SCALE, device=self.device) if linears.is_calibrated else None
        return make_linear(quantize_weight(weight, linears.weights.torch_dtype), linears, added, scale=static)

    def cold_linears(self, n: int, k: int, *, kept: bool = False) -> list[Product]:
        """Products of one size, to be used in turn."""
        size = self.precision.matrix_bytes(n, k, kept=kept)
        copies = self.num_copies(size)
        return self.keep(
            ("linear", n, k, kept), size * copies, lambda: [self.linear(n, k, kept=kept) for _ in range(copies)]
        )

    def slabs(self, kv_heads: int, rows: int, widths: tuple[int, int]) -> Slabs:
        """KV slabs of one size, to be used in turn; widths: features of a key and of a value."""
        size = self.precision.kv_bytes(kv_heads * rows * sum(widths), widths[0])
        copies = max(1, min(max(_MIN_SLABS, self.num_copies(size)), self.limit_bytes // 2 // size))
        return self.keep(
            ("slabs", kv_heads, rows, widths),
            size * copies,
            lambda: Slabs(
                keys=self._slab(copies, kv_heads, rows, widths[0]), values=self._slab(copies, kv_heads, rows, widths[1])
            ),
        )

    def _slab(self, copies: int, kv_heads: int, rows: int, head_dim: int) -> list[KV]:
        if not self.precision.has_kv_scales:
            return list(self.random(copies, kv_heads, rows, head_dim))
        made: list[KV] = []
        for _ in range(copies):
            size = (kv_heads, rows, head_dim)
            kept = self.precision.kv.torch_dtype
            slab = QuantizedKV.zeros(size, kept=kept, dtype=self.dtype, device=self.device)
            for head in range(kv_heads):  # one after another: what is held in between stays small
                slab[head : head + 1].write(slice(0, rows), self.random(1, rows, head_dim))
            made.append(slab)
        return made

    def clear(self) -> None:
        """Drop all cached operands."""
        self._kept.clear()

    def keep(self, key: tuple[object, ...], size_bytes: int, make: Callable[[], T]) -> T:
        """Return the operand cached under `key`, or make it, dropping others until it fits."""
        if key in self._kept:
            self._kept.move_to_end(key)
            kept: T = self._kept[key][0]
            return kept
        while self._kept and sum(size for _, size in self._kept.values()) + size_bytes > self.limit_bytes:
            self._kept.popitem(last=False)
        made = make()
        self._kept[key] = (made, size_bytes)
        return made
