"""Quantizing as Triton kernels, alone and as the last step of a norm or of SiLU: a row is read once, written once.

A norm or a product is rounded to the activations' format before it is quantized, as two kernels would: the values are
those of the unfused arm, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from profiler.kernels.quantized.rounding import LARGEST, LEAST
from profiler.kernels.quantized.rows import QuantizedRows

_ROUNDER = 12582912.0  # 1.5 * 2^23: adding it to a small float32 leaves no bits for a fraction


class _Out(NamedTuple):
    """Where a kernel writes, and how it finds the range."""

    values: torch.Tensor
    scales: torch.Tensor
    scale: torch.Tensor  # the static one
    constants: dict[str, float | bool]


def quantize(x: torch.Tensor, *, dtype: torch.dtype, scale: torch.Tensor | None, offset: float) -> QuantizedRows:
    """x [T, K], each row by its own range or all by `scale` [1] and `offset`."""
    num_rows, width = x.shape
    out = _out(x, width, dtype, scale, offset)
    block = triton.next_power_of_2(width)
    _quantize[(num_rows,)](
        x, out.values, out.scales, out.scale, width, x.stride(0), BLOCK=block, num_warps=_warps(block),
        **out.constants,
    )  # fmt: skip
    return QuantizedRows(out.values, out.scales, x.dtype)


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    scale: torch.Tensor | None,
    offset: float,
) -> QuantizedRows:
    """The root-mean-square norm of the rows of x [T, hidden], quantized."""
    num_rows, hidden = x.shape
    out = _out(x, hidden, dtype, scale, offset)
    block = triton.next_power_of_2(hidden)
    _rms_norm[(num_rows,)](
        x, x, weight, x, out.values, out.scales, out.scale, hidden, eps, ADDS=False, BLOCK=block,
        num_warps=_warps(block), **out.constants,
    )  # fmt: skip
    return QuantizedRows(out.values, out.scales, x.dtype)


def add_rms_norm(
    stream: torch.Tensor,
    update: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    dtype: torch.dtype,
    scale: torch.Tensor | None,
    offset: float,
) -> tuple[torch.Tensor, QuantizedRows]:
    """stream + update [T, hidden], rounded as it is kept, and its norm, quantized."""
    num_rows, hidden = stream.shape
    added = torch.empty_like(stream)
    out = _out(stream, hidden, dtype, scale, offset)
    block = triton.next_power_of_2(hidden)
    _rms_norm[(num_rows,)](
        stream, update, weight, added, out.values, out.scales, out.scale, hidden, eps, ADDS=True, BLOCK=block,
        num_warps=_warps(block), **out.constants,
    )  # fmt: skip
    return added, QuantizedRows(out.values, out.scales, stream.dtype)


def silu_product(
    gate_up: torch.Tensor, *, dtype: torch.dtype, scale: torch.Tensor | None, offset: float
) -> QuantizedRows:
    """gate_up [T, 2F] -> silu(gate) * up [T, F], quantized."""
    num_rows, doubled = gate_up.shape
    width = doubled // 2
    out = _out(gate_up, width, dtype, scale, offset)
    block = triton.next_power_of_2(width)
    _silu_product[(num_rows,)](
        gate_up, out.values, out.scales, out.scale, width, BLOCK=block, num_warps=_warps(block), **out.constants
    )  # fmt: skip
    return QuantizedRows(out.values, out.scales, gate_up.dtype)


def _out(x: torch.Tensor, width: int, dtype: torch.dtype, scale: torch.Tensor | None, offset: float) -> _Out:
    num_rows = x.shape[0]
    values = torch.empty((num_rows, width), device=x.device, dtype=dtype)
    scales = torch.empty((num_rows, 1), device=x.device, dtype=torch.float32) if scale is None else scale
    constants: dict[str, float | bool] = {
        "OFFSET": float(offset), "STATIC": scale is not None, "INTEGER": dtype == torch.int8,
        "LARGEST": LARGEST[dtype], "LEAST": LEAST, "ROUNDER": _ROUNDER,
    }  # fmt: skip
    return _Out(values, scales, scales, constants)


def _warps(block: int) -> int:
    """Some 16 to 32 numbers a thread: all of a row stays in registers."""
    return min(32, max(4, block // 512))


@triton.jit
def _store_quantized(
    numbers, row, at, inside, values, scales, scale, width, OFFSET: tl.constexpr, STATIC: tl.constexpr,
    INTEGER: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, ROUNDER: tl.constexpr,
):  # fmt: skip
    if STATIC:
        numbers = tl.div_rn(numbers, tl.load(scale)) + OFFSET
    else:
        end = tl.maximum(tl.max(tl.abs(numbers), axis=0), LEAST)
        own = tl.div_rn(end, tl.full((), LARGEST, tl.float32))
        tl.store(scales + row, own)
        numbers = tl.div_rn(numbers, own)
    if INTEGER:
        numbers = tl.minimum(tl.maximum(numbers, -128.0), 127.0)
        numbers = (numbers + ROUNDER) - ROUNDER
        tl.store(values + row * width + at, numbers.to(tl.int8), mask=inside)
    else:
        numbers = tl.minimum(tl.maximum(numbers, -LARGEST), LARGEST)
        tl.store(values + row * width + at, numbers.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _quantize(
    x, values, scales, scale, width, stride, BLOCK: tl.constexpr, OFFSET: tl.constexpr, STATIC: tl.constexpr,
    INTEGER: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, ROUNDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    numbers = tl.load(x + row * stride + at, mask=inside, other=0.0).to(tl.float32)
    _store_quantized(
        numbers, row, at, inside, values, scales, scale, width, OFFSET, STATIC, INTEGER, LARGEST, LEAST, ROUNDER
    )


@triton.jit
def _rms_norm(
    stream, update, weight, added, values, scales, scale, hidden, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr,
    OFFSET: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    ROUNDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    kept = stream.dtype.element_ty
    numbers = tl.load(stream + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        numbers += tl.load(update + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
        total = numbers.to(kept)
        tl.store(added + row * hidden + at, total, mask=inside)
        numbers = total.to(tl.float32)
    norm = tl.rsqrt(tl.sum(numbers * numbers, axis=0) / hidden + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    numbers = (numbers * norm * weights).to(kept).to(tl.float32)
    _store_quantized(
        numbers, row, at, inside, values, scales, scale, hidden, OFFSET, STATIC, INTEGER, LARGEST, LEAST, ROUNDER
    )


@triton.jit
def _silu_product(
    gate_up, values, scales, scale, width, BLOCK: tl.constexpr, OFFSET: tl.constexpr, STATIC: tl.constexpr,
    INTEGER: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, ROUNDER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    numbers = (gate * tl.sigmoid(gate) * up).to(gate_up.dtype.element_ty).to(tl.float32)
    _store_quantized(
        numbers, row, at, inside, values, scales, scale, width, OFFSET, STATIC, INTEGER, LARGEST, LEAST, ROUNDER
    )
