"""Linears of 8-bit weights: the activations plain or in 8 bits too, on each device by the fastest exact way."""

from __future__ import annotations

from copy import copy
from functools import cache

import torch
import torch.nn.functional as F

from profiler.kernels.elementwise import has_triton
from profiler.kernels.entry import PLAIN, Operand, PlainEntry, Product
from profiler.kernels.quantized.entry import QuantizingEntry
from profiler.kernels.quantized.rounding import widened
from profiler.kernels.quantized.rows import QuantizedRows
from profiler.kernels.quantized.weight import QuantizedWeight
from profiler.model.precision import LinearFormat

# From here on a card's own product over weights dequantized for the call is taken: they are read once more, and the
# library's product is faster than a kernel that dequantizes inside its loop.
LIBRARY_ROWS = 512
# Below it our product of float8 reads its weights faster than the library's.
_LIBRARY_FP8_ROWS = 64
_LEAST_GROUP = 16  # inputs that share a scale, for which a block of the kernel's loop is found
_LEAST_INT_MM_ROWS = 17  # of `torch._int_mm` on CUDA


class DequantizingLinear:
    """y = x (values scales)^T + b with x plain: the weights are dequantized inside the product (W8A16).

    fused: whether a card's kernel may dequantize in its loop, None where that is faster; or all weights beforehand, for
    the library's product.
    """

    __slots__ = ("bias", "fused", "scales", "values")
    entry: PlainEntry = PLAIN

    def __init__(self, weight: QuantizedWeight, bias: torch.Tensor | None = None, *, fused: bool | None = None) -> None:
        self.values, self.scales, self.bias, self.fused = weight.values, weight.scales, bias, fused

    def split(self, first_outputs: int) -> tuple[DequantizingLinear, DequantizingLinear]:
        """The product as two, of the first outputs and of the rest, on the same memory."""
        whole = QuantizedWeight(self.values, self.scales)
        first, rest = slice(0, first_outputs), slice(first_outputs, None)
        biases = (None, None) if self.bias is None else (self.bias[first], self.bias[rest])
        one, other = (
            DequantizingLinear(whole.rows(rows), bias, fused=self.fused)
            for rows, bias in zip((first, rest), biases, strict=True)
        )
        return one, other

    def __call__(self, x: Operand) -> torch.Tensor:
        """x: [T, K] plain -> [T, N] in x's dtype."""
        assert isinstance(x, torch.Tensor)
        if not x.is_cuda:
            return self._in_floats(x)
        if not has_triton():
            return F.linear(x, QuantizedWeight(self.values, self.scales).dequantized(x.dtype), self.bias)
        from profiler.kernels.quantized.triton_weight import dequantize, dequantizing_product

        group_size = self.values.shape[1] // self.scales.shape[1]
        fused = x.shape[0] < LIBRARY_ROWS if self.fused is None else self.fused
        if fused and group_size % _LEAST_GROUP == 0:
            return dequantizing_product(x, self.values, self.scales, self.bias)
        return F.linear(x, dequantize(self.values, self.scales, x.dtype), self.bias)

    def _in_floats(self, x: torch.Tensor) -> torch.Tensor:
        """In float32, which is a CPU's fast format; a scale for each output is applied to its sums."""
        bias = None if self.bias is None else self.bias.float()
        if self.scales.shape[1] > 1:
            weight = QuantizedWeight(self.values, self.scales).dequantized(torch.float32)
            return F.linear(x.float(), weight, bias).to(x.dtype)
        y = F.linear(x.float(), widened(self.values)).mul_(self.scales.view(-1))
        return (y if bias is None else y.add_(bias)).to(x.dtype)


class QuantizedLinear:
    """y = (x_values x_scales) (values scales)^T + b: both operands in 8 bits, sums in int32 or float32.

    On CUDA scales and bias are applied where the sums are written. On a CPU with integer dot products (VNNI) int8 goes
    through `torch._int_mm`, which elsewhere takes thirty times as long as a product in float32: there 8-bit values are
    widened for the call, and sums are exact while they stay below 2^24, rounded to float32 beyond.

    fused: whether a card scales where it writes the sums, or the library's product writes them to int32 or float32 and
    a second kernel scales.
    """

    __slots__ = ("bias", "entry", "fused", "scales", "transposed", "values")

    def __init__(
        self, weight: QuantizedWeight, entry: QuantizingEntry, bias: torch.Tensor | None = None, *, fused: bool = True
    ) -> None:
        assert weight.scales.shape[1] == 1, "a scale for each output, none for groups of inputs"
        self.scales, self.entry, self.fused = weight.scales, entry, fused
        self.transposed = weight.values.dtype == torch.int8 and not weight.values.is_cuda and has_integer_dot_products()
        self.values = weight.values.t().contiguous() if self.transposed else weight.values  # [K, N] or [N, K]
        self.bias = bias
        if entry.offset:
            self.bias = self._take_off_offset(widened(weight.values), bias)

    def split(self, first_outputs: int) -> tuple[QuantizedLinear, QuantizedLinear] | None:
        """The product as two, of the first outputs and of the rest, on the same memory; None where it was reordered."""
        if self.transposed:
            return None
        return self._of(slice(0, first_outputs)), self._of(slice(first_outputs, None))

    def _of(self, rows: slice) -> QuantizedLinear:
        made = copy(self)
        made.values, made.scales = self.values[rows], self.scales[rows]
        made.bias = None if self.bias is None else self.bias[rows]
        return made

    def __call__(self, x: Operand) -> torch.Tensor:
        """x: [T, K] in 8 bits, or plain: then it is quantized first -> [T, N]."""
        rows = x if isinstance(x, QuantizedRows) else self.entry.take(x)
        if rows.values.is_cuda and has_triton():
            return self._on_card(rows)
        if rows.values.is_cuda:
            sums = widened(rows.values) @ widened(self.values).t()
        elif self.transposed:
            sums = torch._int_mm(rows.values, self.values).float()
        else:
            sums = F.linear(widened(rows.values), widened(self.values))
        y = sums.mul_(rows.scales).mul_(self.scales.view(-1))
        return (y if self.bias is None else y.add_(self.bias)).to(rows.dtype)

    def _on_card(self, rows: QuantizedRows) -> torch.Tensor:
        from profiler.kernels.quantized.triton_product import dequantize_sums, scaled_product

        (m, k), n = rows.values.shape, self.values.shape[0]
        if rows.values.dtype == torch.int8:
            if self.fused or m < _LEAST_INT_MM_ROWS or k % 8 or n % 8:
                return scaled_product(rows.values, rows.scales, self.values, self.scales, self.bias, rows.dtype)
            sums = torch._int_mm(rows.values, self.values.t())
            return dequantize_sums(sums, rows.scales, self.scales, self.bias, rows.dtype)
        # The library scales row by row to bfloat16 alone, over rows of whole 16-byte words.
        plain_scales = rows.dtype == torch.bfloat16 and k % 16 == 0 and n % 16 == 0
        if not plain_scales or (self.fused and m < _LIBRARY_FP8_ROWS):
            return scaled_product(rows.values, rows.scales, self.values, self.scales, self.bias, rows.dtype)
        if not self.fused:
            one = self.scales.new_ones(())
            sums = torch._scaled_mm(
                rows.values, self.values.t(), scale_a=one, scale_b=one, out_dtype=torch.float32, use_fast_accum=True
            )
            return dequantize_sums(sums, rows.scales, self.scales, self.bias, rows.dtype)
        return torch._scaled_mm(
            rows.values,
            self.values.t(),
            scale_a=rows.scales.expand(m, 1).contiguous(),
            scale_b=self.scales.view(1, n),
            bias=None if self.bias is None else self.bias.to(rows.dtype),
            out_dtype=rows.dtype,
            use_fast_accum=True,
        )

    def _take_off_offset(self, values: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The bias in float32, less what the offset adds to each output: it is the same for every token."""
        assert self.entry.scale is not None
        extra = values.sum(dim=1) * self.scales.view(-1) * (self.entry.scale * self.entry.offset)
        return -extra if bias is None else bias.float() - extra


@cache
def has_integer_dot_products() -> bool:
    """Whether this CPU multiplies int8 into int32 in one instruction, so that `torch._int_mm` is fast."""
    supported = getattr(torch.cpu, "_is_vnni_supported", None)
    return bool(supported is not None and supported())


def make_linear(
    weight: QuantizedWeight,
    linears: LinearFormat,
    bias: torch.Tensor | None = None,
    *,
    scale: torch.Tensor | None = None,
    offset: float = 0.0,
) -> Product:
    """The product of a quantized weight in the way that a precision asks for; scale [1], offset: of a static range."""
    if linears.activations is None:
        return DequantizingLinear(weight, bias)
    entry = QuantizingEntry(dtype=linears.activations.torch_dtype, scale=scale, offset=offset)
    return QuantizedLinear(weight, entry, bias)
