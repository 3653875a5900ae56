"""Products of two 8-bit operands as Triton kernels: scales and bias are applied where the sums are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import triton
import triton.language as tl

from profiler.kernels.quantized.triton_launch import tuned

GROUP_ROWS = 8  # blocks of rows that run one after another over the same columns, for the L2 cache

_SCALED = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 256, 128, 8, 3),
        (128, 128, 128, 8, 4),
        (128, 128, 128, 4, 3),
        (64, 128, 128, 4, 4),
        (64, 64, 128, 4, 5),
        (16, 32, 512, 2, 4),
        (16, 32, 256, 4, 6),
        (16, 128, 256, 4, 4),
        (16, 64, 256, 4, 4),
    )
]


def scaled_product(
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """values [M, K] and weight [N, K], both int8 or both float8 -> [M, N] in `dtype`.

    Sums are int32 or float32; scales [M, 1] or [1], weight_scales [N, 1] and bias [N] are applied where they are
    written.
    """
    (m, k), n = values.shape, weight.shape[0]
    out = torch.empty((m, n), device=values.device, dtype=dtype)
    if m == 0:
        return out
    constants = {
        "STATIC": scales.numel() == 1 and scales.dim() == 1, "HAS_BIAS": bias is not None,
        "INTEGER": values.dtype == torch.int8, "GROUP_ROWS": GROUP_ROWS,
    }  # fmt: skip
    added = bias if bias is not None else weight_scales
    _scaled_product[grid(m, n)](
        values, weight, out, scales, weight_scales, added, m, n, k, values.stride(0), weight.stride(0), bucket(m),
        EVEN=k % 512 == 0, **constants,
    )  # fmt: skip
    return out


def dequantize_sums(
    sums: torch.Tensor, scales: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Sums [M, N] of a library's product -> [M, N] in `dtype`: the second kernel of the unfused arm."""
    m, n = sums.shape
    out = torch.empty((m, n), device=sums.device, dtype=dtype)
    _dequantize_sums[(m, triton.cdiv(n, 2048))](
        sums, out, scales, weight_scales, bias if bias is not None else weight_scales, n,
        STATIC=scales.numel() == 1 and scales.dim() == 1, HAS_BIAS=bias is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return out


def grid(m: int, n: int) -> Callable[[Mapping[str, int]], tuple[int]]:
    """A program for each block of the result."""
    return lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)


def bucket(m: int) -> int:
    """What a block size is chosen for: rows up to the next power of two, no finer than 16 and no coarser than 8192."""
    return int(min(8192, max(16, triton.next_power_of_2(m))))


@triton.jit
def block_place(block, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_ROWS: tl.constexpr):
    """First row and first column of the `block`-th block of a result [m, n]."""
    num_rows, num_columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = block // (GROUP_ROWS * num_columns)
    first = group * GROUP_ROWS
    size = min(num_rows - first, GROUP_ROWS)
    row = first + (block % (GROUP_ROWS * num_columns)) % size
    column = (block % (GROUP_ROWS * num_columns)) // size
    return row * BLOCK_M, column * BLOCK_N


@tuned(_SCALED, ["n", "k", "bucket"])
@triton.jit(do_not_specialize=["m", "bucket"])
def _scaled_product(
    x, weight, out, scales, weight_scales, bias, m, n, k, x_stride, weight_stride, bucket,
    STATIC: tl.constexpr, HAS_BIAS: tl.constexpr, INTEGER: tl.constexpr, EVEN: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row, column = block_place(tl.program_id(0), m, n, BLOCK_M, BLOCK_N, GROUP_ROWS)
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    at = tl.arange(0, BLOCK_K)
    # Rows and columns outside read those inside again; they are not written.
    x_at = x + (rows % m).to(tl.int64)[:, None] * x_stride + at[None, :]
    weight_at = weight + (columns % n).to(tl.int64)[None, :] * weight_stride + at[:, None]
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if INTEGER else tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = at < k - start
        if EVEN:
            left = tl.load(x_at)
            right = tl.load(weight_at)
        else:
            left = tl.load(x_at, mask=inside[None, :], other=0.0)
            right = tl.load(weight_at, mask=inside[:, None], other=0.0)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32 if INTEGER else tl.float32)
        x_at += BLOCK_K
        weight_at += BLOCK_K
    _write(sums.to(tl.float32), rows, columns, out, scales, weight_scales, bias, m, n, STATIC, HAS_BIAS)


@triton.jit
def _write(
    sums, rows, columns, out, scales, weight_scales, bias, m, n, STATIC: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    if STATIC:  # noqa: SIM108 - a branch that the compiler takes
        sums = sums * tl.load(scales)
    else:
        sums = sums * tl.load(scales + rows, mask=rows < m, other=0.0)[:, None]
    sums = sums * tl.load(weight_scales + columns, mask=columns < n, other=0.0)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    to = out + rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(to, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_sums(
    sums, out, scales, weight_scales, bias, n, STATIC: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    numbers = tl.load(sums + row * n + at, mask=inside, other=0).to(tl.float32)
    if STATIC:  # noqa: SIM108 - a branch that the compiler takes
        numbers = numbers * tl.load(scales)
    else:
        numbers = numbers * tl.load(scales + row)
    numbers = numbers * tl.load(weight_scales + at, mask=inside, other=0.0)
    if HAS_BIAS:
        numbers += tl.load(bias + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * n + at, numbers.to(out.dtype.element_ty), mask=inside)
