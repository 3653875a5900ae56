"""Keys and values in 8 bits as Triton kernels: what is read for attention that takes plain numbers alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_ROWS = 32  # that a program reads


def dequantize_rows(values: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """values [KV, n, D] in 8 bits, scales [KV, n]: rows of a slab -> plain numbers [KV, n, D]."""
    heads, num_rows, head_dim = values.shape
    out = torch.empty((heads, num_rows, head_dim), device=values.device, dtype=dtype)
    _dequantize_rows[(triton.cdiv(num_rows, _ROWS), heads)](
        values, scales, out, num_rows, values.stride(0), scales.stride(0), DIM=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim), ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["num_rows"])
def _dequantize_rows(
    values, scales, out, num_rows, value_stride, scale_stride,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (row < num_rows)[:, None] & (at < DIM)
    place = row.to(tl.int64)[:, None] * DIM + at
    numbers = tl.load(values + head * value_stride + place, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scales + head * scale_stride + row, mask=row < num_rows, other=0.0)
    numbers = (numbers * scale[:, None]).to(out.dtype.element_ty)
    tl.store(out + head * num_rows * DIM + place, numbers, mask=inside)
