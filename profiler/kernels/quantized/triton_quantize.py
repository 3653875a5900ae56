"""Quantizing as Triton kernels, alone and as the last step of a norm or of SiLU: a row is read once, written once.

A norm or a product is rounded to the activations' format before it is quantized, as two kernels would: the values are
those of the unfused arm, bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from profiler.kernels.quantized.rounding import LARGEST, LEAST, ROUNDER
from profiler.kernels.quantized.rows import QuantizedRows
from profiler.kernels.quantized.triton_launch import INTERPRETED, tuned

_COMPILED = tl.constexpr(not INTERPRETED)  # for a card: Triton's interpreter knows no assembly


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
        x, out.values, out.scales, out.scale, width, x.stride(0), BLOCK=block,
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
        **out.constants,
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
        **out.constants,
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
        gate_up, out.values, out.scales, out.scale, width, BLOCK=block, **out.constants
    )  # fmt: skip
    return QuantizedRows(out.values, out.scales, gate_up.dtype)


def _out(x: torch.Tensor, width: int, dtype: torch.dtype, scale: torch.Tensor | None, offset: float) -> _Out:
    num_rows = x.shape[0]
    values = torch.empty((num_rows, width), device=x.device, dtype=dtype)
    scales = torch.empty((num_rows, 1), device=x.device, dtype=torch.float32) if scale is None else scale
    constants: dict[str, float | bool] = {
        "OFFSET": float(offset), "STATIC": scale is not None, "INTEGER": dtype == torch.int8,
        "LARGEST": LARGEST[dtype], "LEAST": LEAST, "ROUNDER": ROUNDER,
    }  # fmt: skip
    return _Out(values, scales, scales, constants)


# All of a row stays in registers: 8 to 64 numbers a thread. With 32 registers each, two of the largest programs fit a
# multiprocessor: one computes while the other waits for memory.
_ROW = [
    *(triton.Config({}, num_warps=warps) for warps in (4, 8, 16, 32)),
    triton.Config({}, num_warps=32, maxnreg=32),
]


def _of_width(configs: list[triton.Config], named: dict[str, int], **_kwargs: object) -> list[triton.Config]:
    """Those that suit a row's width."""
    width = named.get("width") or named["hidden"]
    return [config for config in configs if 8 <= width / 32 / config.num_warps <= 64] or configs[:1]


@triton.jit
def rounded_to(numbers, KEPT: tl.constexpr):
    """float32 numbers in another format. A card converts two to bfloat16 at once at four times the rate of one."""
    if _COMPILED and tl.bfloat16 == KEPT:
        made = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [numbers], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        made = numbers.to(KEPT)
    return made


@triton.jit
def swish(x):
    """x times its sigmoid, in float32: two approximate instructions of a card, off by some 1e-7, for thirteen."""
    if _COMPILED:
        made = tl.inline_asm_elementwise(
            """{
            .reg .f32 t;
            mul.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 t, t;
            mul.f32 $0, t, $1;
            }""",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        made = x * tl.sigmoid(x)
    return made


@triton.jit
def quantized(
    numbers, scale, OFFSET: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr,
    ROUNDER: tl.constexpr,
):  # fmt: skip
    """float32 numbers over their scale, as 8-bit values: see `profiler.kernels.quantized.rounding.rounded`.

    A quotient by its divisor's reciprocal, corrected once, is rounded as a division's (Markstein, 1990) in three
    instructions; the division itself takes some twenty. What `ROUNDER` leaves in the lowest bits is the integer.
    """
    inverse = tl.div_rn(tl.full((), 1.0, tl.float32), scale)
    quotient = numbers * inverse
    numbers = tl.fma(tl.fma(-quotient, scale, numbers), inverse, quotient)
    if STATIC:  # others are within their own range
        numbers = tl.maximum(numbers + OFFSET, -128.0 if INTEGER else -LARGEST)
    if STATIC or INTEGER:
        numbers = tl.minimum(numbers, 127.0 if INTEGER else LARGEST)
    return (numbers + ROUNDER).to(tl.int32, bitcast=True).to(tl.int8) if INTEGER else numbers.to(tl.float8e4nv)


@triton.jit
def _store_quantized(
    numbers, row, at, inside, values, scales, scale, width, OFFSET: tl.constexpr, STATIC: tl.constexpr,
    INTEGER: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, ROUNDER: tl.constexpr,
):  # fmt: skip
    if STATIC:
        own = tl.load(scale)
    else:
        end = tl.maximum(tl.max(tl.abs(numbers), axis=0), LEAST)
        own = tl.div_rn(end, tl.full((), LARGEST, tl.float32))
        tl.store(scales + row, own)
    kept = quantized(numbers, own, OFFSET, STATIC, INTEGER, LARGEST, ROUNDER)
    tl.store(values + row * width + at, kept, mask=inside)


@tuned(_ROW, ["width"], suits=_of_width)
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


@tuned(_ROW, ["hidden"], suits=_of_width)
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
        total = rounded_to(numbers, kept)
        tl.store(added + row * hidden + at, total, mask=inside)
        numbers = total.to(tl.float32)
    norm = tl.rsqrt(tl.sum(numbers * numbers, axis=0) / hidden + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    numbers = rounded_to(numbers * norm * weights, kept).to(tl.float32)
    _store_quantized(
        numbers, row, at, inside, values, scales, scale, hidden, OFFSET, STATIC, INTEGER, LARGEST, LEAST, ROUNDER
    )


@tuned(_ROW, ["width"], suits=_of_width)
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
    numbers = rounded_to(swish(gate) * up, gate_up.dtype.element_ty).to(tl.float32)
    _store_quantized(
        numbers, row, at, inside, values, scales, scale, width, OFFSET, STATIC, INTEGER, LARGEST, LEAST, ROUNDER
    )
