"""Products of 8-bit weights as Triton kernels: dequantized in the epilogue, or weight by weight inside the loop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl

_GROUP_ROWS = 8  # blocks of rows that run one after another over the same columns, for the L2 cache

_SCALED = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for m, n, k, warps, stages in (
        (128, 256, 128, 8, 3),
        (256, 128, 128, 8, 3),
        (128, 128, 128, 8, 4),
        (128, 128, 128, 4, 3),
        (64, 128, 128, 4, 4),
        (64, 256, 128, 8, 3),
        (16, 128, 256, 4, 4),
        (16, 64, 256, 4, 4),
    )
]
# One group of inputs a step, so that its scale is applied to whole partial sums: no block is longer than a group.
_DEQUANTIZING = [
    triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=warps, num_stages=stages)
    for m, n, warps, stages in (
        (128, 128, 8, 3),
        (128, 128, 4, 4),
        (64, 128, 4, 4),
        (16, 128, 4, 4),
        (16, 64, 4, 5),
    )
]


def _fitting(configs: list[triton.Config], named: dict[str, int], **_kwargs: object) -> list[triton.Config]:
    """Those whose blocks suit so many rows: neither mostly empty nor many where few would do."""
    bucket = named["bucket"]
    least, most = (128, 256) if bucket > 128 else (16, max(16, bucket))
    return [config for config in configs if least <= config.kwargs["BLOCK_M"] <= most] or configs


def _tuned(configs: list[triton.Config], key: list[str]) -> Any:
    """Decorates a kernel that measures its block sizes once for each `key`; interpreted, it takes the smallest."""
    if os.environ.get("TRITON_INTERPRET") == "1":  # there is no card to measure on
        return triton.heuristics({name: _always(value) for name, value in configs[-1].kwargs.items()})
    return triton.autotune(configs=configs, key=key, prune_configs_by={"early_config_prune": _fitting})


def _always(value: int) -> Callable[[object], int]:
    return lambda _arguments: value


def scaled_product(
    values: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """values [M, K] and weight [N, K], both int8 or both float8 -> [M, N] in `dtype`.

    Sums are int32 or float32; scales [M, 1] or [1], weight_scales [N, 1] and bias [N] are applied
    where they are written.
    """
    (m, k), n = values.shape, weight.shape[0]
    out = torch.empty((m, n), device=values.device, dtype=dtype)
    if m == 0:
        return out
    _scaled_product[_grid(m, n)](
        values, weight, out, scales, weight_scales, bias if bias is not None else weight_scales, m, n, k,
        values.stride(0), weight.stride(0), _bucket(m),
        STATIC=scales.numel() == 1 and scales.dim() == 1, HAS_BIAS=bias is not None,
        INTEGER=values.dtype == torch.int8, EVEN=k % 256 == 0, GROUP_ROWS=_GROUP_ROWS,
    )  # fmt: skip
    return out


def dequantizing_product(
    x: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x [M, K] plain, weight [N, K] in 8 bits, weight_scales [N, G] -> [M, N] in x's dtype; sums in float32."""
    (m, k), n = x.shape, weight.shape[0]
    out = torch.empty((m, n), device=x.device, dtype=x.dtype)
    if m == 0:
        return out
    groups = weight_scales.shape[1]
    _dequantizing_product[_grid(m, n)](
        x, weight, out, weight_scales, bias if bias is not None else weight_scales, m, n, k, groups, k // groups,
        x.stride(0), weight.stride(0), _bucket(m),
        BLOCK_K=64 if groups == 1 or k // groups % 64 == 0 else 16 if k // groups % 32 else 32,
        HAS_BIAS=bias is not None, GROUPED=groups > 1, EVEN=k % 64 == 0, GROUP_ROWS=_GROUP_ROWS,
    )  # fmt: skip
    return out


def dequantize_sums(
    sums: torch.Tensor, scales: torch.Tensor, weight_scales: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """int32 sums [M, N] of a library's product -> [M, N] in `dtype`: the second kernel of the unfused arm."""
    m, n = sums.shape
    out = torch.empty((m, n), device=sums.device, dtype=dtype)
    _dequantize_sums[(m, triton.cdiv(n, 2048))](
        sums, out, scales, weight_scales, bias if bias is not None else weight_scales, n,
        STATIC=scales.numel() == 1 and scales.dim() == 1, HAS_BIAS=bias is not None, BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return out


def _grid(m: int, n: int) -> Callable[[Mapping[str, int]], tuple[int]]:
    return lambda meta: (triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)


def _bucket(m: int) -> int:
    """What a block size is chosen for: rows up to the next power of two, no finer than 16 and no coarser than 8192."""
    return int(min(8192, max(16, triton.next_power_of_2(m))))


@triton.jit
def _place(m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_ROWS: tl.constexpr):
    program = tl.program_id(0)
    num_rows, num_columns = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    group = program // (GROUP_ROWS * num_columns)
    first = group * GROUP_ROWS
    size = min(num_rows - first, GROUP_ROWS)
    row = first + (program % (GROUP_ROWS * num_columns)) % size
    column = (program % (GROUP_ROWS * num_columns)) // size
    return row * BLOCK_M + tl.arange(0, BLOCK_M), column * BLOCK_N + tl.arange(0, BLOCK_N)


@_tuned(_SCALED, ["n", "k", "bucket"])
@triton.jit
def _scaled_product(
    x, weight, out, scales, weight_scales, bias, m, n, k, x_stride, weight_stride, bucket,
    STATIC: tl.constexpr, HAS_BIAS: tl.constexpr, INTEGER: tl.constexpr, EVEN: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, columns = _place(m, n, BLOCK_M, BLOCK_N, GROUP_ROWS)
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


@_tuned(_DEQUANTIZING, ["n", "k", "group_size", "bucket"])
@triton.jit
def _dequantizing_product(
    x, weight, out, weight_scales, bias, m, n, k, groups, group_size, x_stride, weight_stride, bucket,
    HAS_BIAS: tl.constexpr, GROUPED: tl.constexpr, EVEN: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows, columns = _place(m, n, BLOCK_M, BLOCK_N, GROUP_ROWS)
    at = tl.arange(0, BLOCK_K)
    x_at = x + (rows % m).to(tl.int64)[:, None] * x_stride + at[None, :]
    weight_at = weight + (columns % n).to(tl.int64)[None, :] * weight_stride + at[:, None]
    scale_at = weight_scales + (columns % n).to(tl.int64) * groups
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        inside = at < k - start
        if EVEN:
            left = tl.load(x_at)
            right = tl.load(weight_at).to(left.dtype)
        else:
            left = tl.load(x_at, mask=inside[None, :], other=0.0)
            right = tl.load(weight_at, mask=inside[:, None], other=0.0).to(left.dtype)
        if GROUPED:
            scale = tl.load(scale_at + start // group_size)
            sums += tl.dot(left, right, input_precision="ieee") * scale[None, :]
        else:
            sums = tl.dot(left, right, sums, input_precision="ieee")
        x_at += BLOCK_K
        weight_at += BLOCK_K
    if not GROUPED:
        sums = sums * tl.load(scale_at)[None, :]
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
