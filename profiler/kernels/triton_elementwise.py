"""The element-wise work of a layer as Triton kernels: each reads its inputs once and writes its results once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from profiler.kernels.quantized.kv import KV, QuantizedKV
from profiler.kernels.quantized.rounding import LARGEST, LEAST, ROUNDER
from profiler.kernels.quantized.triton_launch import begin, early
from profiler.kernels.quantized.triton_quantize import quantized, swish

HEADS_PER_PROGRAM = 8
SILU_BLOCK = 2048
ROWS_PER_PROGRAM = 32


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm of the rows of x [T, hidden], accumulated in float32."""
    num_rows, hidden = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(hidden)
    num_warps = 4 if block <= 2048 else 8
    _rms_norm[(num_rows,)](x, weight, out, hidden, eps, BLOCK=block, num_warps=num_warps, **early(num_rows))
    return out


def add_rms_norm(
    stream: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """stream + update, rounded as it is kept, and its root-mean-square norm; all [T, hidden]."""
    num_rows, hidden = stream.shape
    added, normed = torch.empty_like(stream), torch.empty_like(stream)
    block = triton.next_power_of_2(hidden)
    num_warps = 4 if block <= 2048 else 8
    _add_rms_norm[(num_rows,)](
        stream, update, weight, added, normed, hidden, eps, BLOCK=block, num_warps=num_warps, **early(num_rows)
    )  # fmt: skip
    return added, normed


def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's element-wise half: gate_up [T, 2F] -> silu(gate) * up [T, F]."""
    num_rows, doubled = gate_up.shape
    width = doubled // 2
    out = torch.empty((num_rows, width), device=gate_up.device, dtype=gate_up.dtype)
    _silu_product[(num_rows, triton.cdiv(width, SILU_BLOCK))](
        gate_up, out, width, BLOCK=SILU_BLOCK, num_warps=8, **early(num_rows)
    )
    return out


def rotate_into_slab(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slab_rows: torch.Tensor,
    keys: KV,
    values: KV,
    *,
    num_heads: int,
    query_norm: torch.Tensor | None,
    key_norm: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    """Norm each head of q and k if asked to, rotate both, write k and v to the slab, return q [T, H, D].

    qkv: [T, (H + 2 KV) D]; cos, sin: [T, D / 2]; slab_rows: [T] int64, each token's row of keys and values
    [KV, rows, D].
    """
    num_tokens = qkv.shape[0]
    num_kv_heads, _, head_dim = keys.shape
    q = torch.empty((num_tokens, num_heads, head_dim), device=qkv.device, dtype=qkv.dtype)
    grid = (num_tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_PER_PROGRAM))
    has_norm = query_norm is not None and key_norm is not None
    k, k_scales, k_static = _numbers(keys, q)
    v, v_scales, v_static = _numbers(values, q)
    _rotate_into_slab[grid](
        qkv, cos, sin, slab_rows, q, k, v, k_scales, v_scales,
        query_norm if has_norm else qkv, key_norm if has_norm else qkv,
        num_heads, num_kv_heads, k.stride(0), v.stride(0), k_scales.stride(0), eps, k_static, v_static,
        QUANTIZES=isinstance(keys, QuantizedKV), STATIC=k_static > 0.0, INTEGER=k.dtype == torch.int8,
        LARGEST=LARGEST.get(k.dtype, 0.0), LEAST=LEAST, ROUNDER=ROUNDER,
        HALF=head_dim // 2, HALF_BLOCK=triton.next_power_of_2(head_dim // 2), HEADS=HEADS_PER_PROGRAM,
        HAS_NORM=has_norm, num_warps=4, **early(num_tokens),
    )  # fmt: skip
    return q


def _numbers(slab: KV, unused: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Where a slab's numbers and scales are, and the static scale or 0."""
    if isinstance(slab, QuantizedKV):
        return slab.values, slab.scales, slab.static or 0.0
    return slab, unused, 0.0


def write_gathered(gathered: torch.Tensor, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """See `profiler.kernels.elementwise.write_gathered`."""
    num_ranks, _, num_kv_heads, num_rows, head_dim = gathered.shape
    grid = (num_ranks * triton.cdiv(num_rows, ROWS_PER_PROGRAM), 2 * num_kv_heads)
    _write_gathered[grid](
        gathered, rows, keys, values, num_rows, num_kv_heads, gathered.stride(0), keys.stride(0), values.stride(0),
        DIM=head_dim, DIM_BLOCK=triton.next_power_of_2(head_dim), ROWS=ROWS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip


def merge_partial(
    first: torch.Tensor, first_lse: torch.Tensor, second: torch.Tensor, second_lse: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor | None,
) -> None:  # fmt: skip
    """Attention over two sets of keys from that over each: see `PartialAttention`.

    first, second, out: [H, c, D] with consecutive numbers of a head; log-sum-exp: [H, c, 1] in float32, None if unused.
    """
    num_heads, num_tokens, head_dim = first.shape
    kept = first_lse if lse is None else lse
    _merge_partial[(num_tokens, triton.cdiv(num_heads, HEADS_PER_PROGRAM))](
        first, first_lse, second, second_lse, out, kept, num_heads,
        *(stride for x in (first, first_lse, second, second_lse, out, kept) for stride in x.stride()[:2]),
        DIM=head_dim, DIM_BLOCK=triton.next_power_of_2(head_dim), HEADS=HEADS_PER_PROGRAM, KEEPS_LSE=lse is not None,
        num_warps=4,
    )  # fmt: skip


@triton.jit
def _merge_partial(
    first, first_lse, second, second_lse, out, lse, num_heads,
    first_head, first_token, first_lse_head, first_lse_token, second_head, second_token, second_lse_head,
    second_lse_token, out_head, out_token, lse_head, lse_token,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, HEADS: tl.constexpr, KEEPS_LSE: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)
    at = tl.arange(0, DIM_BLOCK)[None, :]
    inside = (head < num_heads)[:, None] & (at < DIM)
    low = tl.load(first_lse + head * first_lse_head + token * first_lse_token, mask=head < num_heads, other=0.0)
    high = tl.load(second_lse + head * second_lse_head + token * second_lse_token, mask=head < num_heads, other=0.0)
    most = tl.maximum(low, high)
    base = tl.where(most == float("-inf"), 0.0, most)  # neither saw a key
    of_first, of_second = tl.exp(low - base), tl.exp(high - base)
    total = of_first + of_second
    share = tl.where(total > 0.0, of_second / total, 0.0)[:, None]
    left = tl.load(first + head[:, None] * first_head + token * first_token + at, mask=inside, other=0.0)
    right = tl.load(second + head[:, None] * second_head + token * second_token + at, mask=inside, other=0.0)
    left, right = left.to(tl.float32), right.to(tl.float32)
    merged = left + (right - left) * share
    tl.store(out + head[:, None] * out_head + token * out_token + at, merged.to(out.dtype.element_ty), mask=inside)
    if KEEPS_LSE:
        tl.store(lse + head * lse_head + token * lse_token, base + tl.log(total), mask=head < num_heads)


@triton.jit
def _write_gathered(
    gathered, rows, keys, values, num_rows, num_kv_heads, rank_stride, key_stride, value_stride,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(num_rows, ROWS)
    rank = (tl.program_id(0) // blocks).to(tl.int64)
    row = (tl.program_id(0) % blocks) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)  # keys of all heads, then values
    at = tl.arange(0, DIM_BLOCK)[None, :]
    place = tl.load(rows + rank * num_rows + row, mask=row < num_rows, other=-1)
    inside = (place >= 0)[:, None] & (at < DIM)
    source = gathered + rank * rank_stride + (head * num_rows + row[:, None]) * DIM + at
    numbers = tl.load(source, mask=inside, other=0.0)
    is_key = head < num_kv_heads
    target = place[:, None] * DIM + at
    tl.store(keys + head * key_stride + target, numbers, mask=inside & is_key)
    tl.store(values + (head - num_kv_heads) * value_stride + target, numbers, mask=inside & (head >= num_kv_heads))


@triton.jit
def _rms_norm(x, weight, out, hidden, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    values = tl.load(x + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / hidden + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * hidden + at, (values * scale * weights).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm(
    stream, update, weight, added, normed, hidden, eps, BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    values = tl.load(stream + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(update + row * hidden + at, mask=inside, other=0.0).to(tl.float32)
    rounded = values.to(added.dtype.element_ty)
    tl.store(added + row * hidden + at, rounded, mask=inside)
    values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, axis=0) / hidden + eps)
    weights = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + row * hidden + at, (values * scale * weights).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _silu_product(gate_up, out, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    begin(EARLY)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    gate = tl.load(gate_up + row * 2 * width + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (swish(gate) * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_into_slab(
    qkv, cos, sin, slab_rows, q, keys, values, key_scales, value_scales, query_norm, key_norm,
    num_heads, num_kv_heads, key_stride, value_stride, scale_stride, eps, key_static, value_static,
    QUANTIZES: tl.constexpr, STATIC: tl.constexpr, INTEGER: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
    ROUNDER: tl.constexpr,
    HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, HEADS: tl.constexpr, HAS_NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    token = tl.program_id(0).to(tl.int64)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    at = tl.arange(0, HALF_BLOCK)[None, :]
    half = at < HALF
    total = num_heads + 2 * num_kv_heads
    inside = (head < total) & half
    dim = 2 * HALF
    source = qkv + token * total * dim + head * dim + at
    first = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=inside, other=0.0).to(tl.float32)
    is_query = head < num_heads
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = (head >= num_heads + num_kv_heads) & (head < total)
    if HAS_NORM:
        square = tl.sum(first * first + second * second, axis=1)[:, None]
        scale = tl.rsqrt(square / dim + eps)
        # One weight for all query heads, one for all key heads; values keep their scale.
        first_q = tl.load(query_norm + at, mask=half, other=0.0).to(tl.float32)
        second_q = tl.load(query_norm + at + HALF, mask=half, other=0.0).to(tl.float32)
        first_k = tl.load(key_norm + at, mask=half, other=0.0).to(tl.float32)
        second_k = tl.load(key_norm + at + HALF, mask=half, other=0.0).to(tl.float32)
        first = tl.where(is_value, first, first * scale * tl.where(is_query, first_q, first_k))
        second = tl.where(is_value, second, second * scale * tl.where(is_query, second_q, second_k))
    c = tl.load(cos + token * HALF + at, mask=half, other=0.0).to(tl.float32)
    s = tl.load(sin + token * HALF + at, mask=half, other=0.0).to(tl.float32)
    rotated_first = tl.where(is_value, first, first * c - second * s)
    rotated_second = tl.where(is_value, second, second * c + first * s)
    to = q.dtype.element_ty
    q_at = q + token * num_heads * dim + head * dim + at
    tl.store(q_at, rotated_first.to(to), mask=is_query & half)
    tl.store(q_at + HALF, rotated_second.to(to), mask=is_query & half)
    row = tl.load(slab_rows + token)
    kept_first, kept_second = rotated_first.to(to), rotated_second.to(to)
    if QUANTIZES:
        first, second = kept_first.to(tl.float32), kept_second.to(tl.float32)
        if STATIC:
            own = tl.where(is_key, key_static, value_static)
        else:
            end = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))[:, None]
            own = tl.div_rn(tl.maximum(end, LEAST), tl.full((), LARGEST, tl.float32))
        kept_first = quantized(first, own, 0.0, STATIC, INTEGER, LARGEST, ROUNDER)
        kept_second = quantized(second, own, 0.0, STATIC, INTEGER, LARGEST, ROUNDER)
        tl.store(key_scales + (head - num_heads) * scale_stride + row, own, mask=is_key)
        tl.store(value_scales + (head - num_heads - num_kv_heads) * scale_stride + row, own, mask=is_value)
    key_at = keys + (head - num_heads) * key_stride + row * dim + at
    tl.store(key_at, kept_first, mask=is_key & half)
    tl.store(key_at + HALF, kept_second, mask=is_key & half)
    value_at = values + (head - num_heads - num_kv_heads) * value_stride + row * dim + at
    tl.store(value_at, kept_first, mask=is_value & half)
    tl.store(value_at + HALF, kept_second, mask=is_value & half)
