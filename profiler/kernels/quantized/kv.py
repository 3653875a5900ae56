"""Keys or values of a layer in 8 bits: each token's head has a scale, and what attends to them reads plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from profiler.kernels.quantized.rounding import quantize_rows, quantize_static, widened


@dataclass(frozen=True, slots=True)
class QuantizedKV:
    """A slab [KV, rows, D] of keys or values: numbers are values times scales.

    static: the scale of all numbers, where a checkpoint knows it; None finds one for each token and head.
    """

    values: torch.Tensor  # [KV, rows, D] int8 or float8_e4m3fn
    scales: torch.Tensor  # [KV, rows] float32
    dtype: torch.dtype  # of what is written and read
    static: float | None = None

    @classmethod
    def zeros(
        cls,
        size: tuple[int, int, int],
        *,
        kept: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        static: float | None = None,
    ) -> QuantizedKV:
        """An empty slab of `size` whose numbers are `kept` in 8 bits."""
        values = torch.zeros(size, device=device, dtype=kept)
        return cls(values, torch.zeros(size[:2], device=device), dtype, static)

    @property
    def shape(self) -> torch.Size:
        """[KV, rows, D]."""
        return self.values.shape

    @property
    def is_cuda(self) -> bool:
        """Whether it is on a card."""
        return self.values.is_cuda

    def __getitem__(self, heads: slice | Sequence[int]) -> QuantizedKV:
        """The slab of some heads."""
        return QuantizedKV(self.values[heads], self.scales[heads], self.dtype, self.static)

    def write(self, rows: slice | torch.Tensor, numbers: torch.Tensor) -> None:
        """Keep numbers [KV, n, D] in `rows`: a slice, or [n] int64."""
        heads, count, head_dim = numbers.shape
        flat = numbers.reshape(-1, head_dim)
        if self.static is None:
            found = quantize_rows(flat, self.values.dtype)
            scales = found.scales.view(heads, count)
        else:
            one = torch.full((1,), self.static, device=numbers.device)
            found = quantize_static(flat, one, 0.0, self.values.dtype)
            scales = one.expand(heads, count)
        # As bytes: not every device indexes float8.
        kept, new = self.values.view(torch.uint8), found.values.view(torch.uint8).view(numbers.shape)
        if isinstance(rows, slice):
            kept[:, rows], self.scales[:, rows] = new, scales
        else:
            kept.index_copy_(1, rows, new)
            self.scales.index_copy_(1, rows, scales)

    def read(self, rows: slice) -> torch.Tensor:
        """Plain numbers [KV, n, D] of some rows: memory of their own, which one layer needs at a time."""
        values, scales = self.values[:, rows], self.scales[:, rows]
        if values.is_cuda:
            from profiler.kernels.quantized.triton_kv import dequantize_rows

            return dequantize_rows(values, scales, self.dtype)
        return (widened(values) * scales[..., None]).to(self.dtype)


KV = torch.Tensor | QuantizedKV


def read_rows(slab: KV, rows: slice) -> torch.Tensor:
    """Some rows of all heads of a slab [KV, rows, D], as attention kernels take them."""
    return slab.read(rows) if isinstance(slab, QuantizedKV) else slab[:, rows]
