"""Element-wise work that ends in 8 bits: one kernel each on CUDA, or the plain kernel and a quantizing one."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from profiler.kernels.elementwise import add_rms_norm, has_triton, rms_norm, silu_product
from profiler.kernels.quantized.rounding import quantize_rows, quantize_static
from profiler.kernels.quantized.rows import QuantizedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizingEntry:
    """Into a product of 8-bit numbers; ranges are found row by row, or known: then `scale` and `offset` tell them.

    fused: whether what can be one kernel is one. The other arm gives the same values by two, each of which reads and
    writes all numbers: the comparison that shows what fusing brings.
    """

    dtype: torch.dtype
    scale: torch.Tensor | None = None  # [1] float32
    offset: float = 0.0
    fused: bool = True

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> QuantizedRows:
        """See `Entry`."""
        if self._fuses(x):
            from profiler.kernels.quantized import triton_quantize

            return triton_quantize.rms_norm(x, weight, eps, dtype=self.dtype, scale=self.scale, offset=self.offset)
        return self.take(rms_norm(x, weight, eps))

    def add_norm(
        self, stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, QuantizedRows]:
        """See `Entry`."""
        if self._fuses(stream):
            from profiler.kernels.quantized import triton_quantize

            return triton_quantize.add_rms_norm(
                stream, update, weight, eps, dtype=self.dtype, scale=self.scale, offset=self.offset
            )
        added, normed = add_rms_norm(stream, update, weight, eps)
        return added, self.take(normed)

    def silu(self, gate_up: torch.Tensor) -> QuantizedRows:
        """See `Entry`."""
        if self._fuses(gate_up):
            from profiler.kernels.quantized import triton_quantize

            return triton_quantize.silu_product(gate_up, dtype=self.dtype, scale=self.scale, offset=self.offset)
        return self.take(silu_product(gate_up))

    def take(self, x: torch.Tensor) -> QuantizedRows:
        """See `Entry`; one kernel on CUDA in either arm."""
        if x.is_cuda and has_triton():
            from profiler.kernels.quantized import triton_quantize

            return triton_quantize.quantize(x, dtype=self.dtype, scale=self.scale, offset=self.offset)
        if self.scale is None:
            return quantize_rows(x, self.dtype)
        return quantize_static(x, self.scale, self.offset, self.dtype)

    def _fuses(self, x: torch.Tensor) -> bool:
        return self.fused and x.is_cuda and has_triton()
