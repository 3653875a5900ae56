"""Attention of one token a request over its rows of the KV slab, as Triton kernels whose launch knows no length.

FlashDecoding (Dao, Haziza, Massa and Sizov, 2023, https://pytorch.org/blog/flash-decoding/): the keys of a request are
split, each split is attended to by itself, and the results are merged by their log-sum-exp. The number of splits is
fixed, lengths are read on the device: a launch can be recorded once and replayed while the requests grow.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from profiler.kernels.quantized.kv import KV, QuantizedKV
from profiler.kernels.quantized.triton_launch import begin, early

TILE_BYTES = 16 << 10  # of keys, and of values, that a program holds at once: three programs fit a multiprocessor
PROGRAMS = 1024  # enough for some to end late and others early on 132 multiprocessors
FEWEST_SPLITS, MOST_SPLITS = 4, 128
LOG2_E = math.log2(math.e)


def attend(q: torch.Tensor, keys: KV, values: KV, starts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """See `profiler.kernels.attention.attend_tokens`. Products of float32 are exact, sums are in float32 for all types.

    The query heads of a KV head are one block of a product, so that keys and values are read once. With three tiles in
    flight a program waits for memory, not for arithmetic: each byte of keys or values takes part in as many
    multiplications as the group has heads.
    """
    partial, lse = _split(q, keys, values, starts, lengths)
    num_requests, num_heads, splits, head_dim = partial.shape
    out = torch.empty((num_requests, num_heads, head_dim), device=q.device, dtype=q.dtype)
    _merge_splits[(num_requests * num_heads,)](
        partial,
        lse,
        out,
        SPLITS=splits,
        DIM=head_dim,
        DIM_BLOCK=triton.next_power_of_2(head_dim),
        num_warps=8,
        **early(num_requests),
    )
    return out


def attend_with_lse(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in float32 [R, H, D], and the log-sum-exp of the scores [R, H, 1]; of a request without tokens 0 and
    minus infinity."""
    partial, lse = _split(q, keys, values, starts, lengths)
    most = lse.amax(dim=-1, keepdim=True)
    weights = torch.exp2(lse - most).nan_to_num(0.0)
    total = weights.sum(dim=-1, keepdim=True)
    # What an empty split left was never written.
    parts = torch.where((weights > 0.0).unsqueeze(-1), partial, 0.0)
    out = (parts * weights.unsqueeze(-1)).sum(dim=2) / total.clamp_min(1e-30)
    return out, (most + torch.log2(total)) / LOG2_E


def _split(
    q: torch.Tensor, keys: KV, values: KV, starts: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over each split of a request's tokens [R, H, splits, D], and its log-sum-exp in bits [R, H, splits]."""
    q = q.contiguous()
    num_requests, num_heads, head_dim = q.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    splits = num_splits(num_requests * num_kv_heads)
    dim_block = triton.next_power_of_2(head_dim)
    partial = torch.empty((num_requests, num_heads, splits, head_dim), device=q.device, dtype=torch.float32)
    lse = torch.empty((num_requests, num_heads, splits), device=q.device, dtype=torch.float32)
    scaled = isinstance(keys, QuantizedKV) and isinstance(values, QuantizedKV)
    k, k_scales = (keys.values, keys.scales) if isinstance(keys, QuantizedKV) else (keys, lse)
    v, v_scales = (values.values, values.scales) if isinstance(values, QuantizedKV) else (values, lse)
    _attend_split[(splits, num_kv_heads, num_requests)](
        q, k, v, k_scales, v_scales, starts, lengths, partial, lse, k.stride(0), v.stride(0), k_scales.stride(0),
        LOG2_E / math.sqrt(head_dim), SCALED=scaled,
        GROUP=group, GROUP_BLOCK=max(16, triton.next_power_of_2(group)), DIM=head_dim, DIM_BLOCK=dim_block,
        ROWS=max(16, min(128, TILE_BYTES // (dim_block * q.element_size()))), num_warps=4, num_stages=3,
        **early(num_requests),
    )  # fmt: skip
    return partial, lse


def num_splits(num_blocks: int) -> int:
    """Splits of each of `num_blocks` pairs of a request and a KV head: by what the card holds, whatever the lengths."""
    return int(max(FEWEST_SPLITS, min(MOST_SPLITS, triton.next_power_of_2(triton.cdiv(PROGRAMS, num_blocks)))))


@triton.jit
def _attend_split(
    q, keys, values, key_scales, value_scales, starts, lengths, partial, lse, key_stride, value_stride, scale_stride,
    scale, SCALED: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    begin(EARLY)
    split, splits = tl.program_id(0), tl.num_programs(0)
    kv_head, num_kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    request = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + request).to(tl.int32)
    start = tl.load(starts + request).to(tl.int64)
    # Whole tiles, so that only a request's last one is masked; the last splits may have none.
    share = tl.cdiv(tl.cdiv(length, ROWS), splits) * ROWS
    first = split * share
    last = tl.minimum(first + share, length)
    in_group = tl.arange(0, GROUP_BLOCK)
    head = (request * num_kv_heads + kv_head) * GROUP + in_group  # of all requests' heads
    at = tl.arange(0, DIM_BLOCK)
    row = tl.arange(0, ROWS)
    inside = (in_group < GROUP)[:, None] & (at < DIM)[None, :]
    query = tl.load(q + head[:, None] * DIM + at[None, :], mask=inside, other=0.0)
    most = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)  # scores are in bits: 2 to their power is the weight
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    mixed = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    key_at = keys + kv_head * key_stride + start * DIM + at[:, None]
    value_at = values + kv_head * value_stride + start * DIM + at[None, :]
    scale_at = kv_head * scale_stride + start
    for tile in range(first, last, ROWS):
        seen = tile + row < last
        offset = (tile + row).to(tl.int64) * DIM
        k = tl.load(key_at + offset[None, :], mask=(at < DIM)[:, None] & seen[None, :], other=0.0)
        scores = tl.dot(query, k.to(query.dtype), input_precision="ieee") * scale
        if SCALED:
            scores *= tl.load(key_scales + scale_at + tile + row, mask=seen, other=0.0)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(most - higher)
        v = tl.load(value_at + offset[:, None], mask=seen[:, None] & (at < DIM)[None, :], other=0.0)
        total = total * shrunk + tl.sum(weights, axis=1)
        if SCALED:
            weights *= tl.load(value_scales + scale_at + tile + row, mask=seen, other=0.0)[None, :]
        mixed = mixed * shrunk[:, None] + tl.dot(weights.to(query.dtype), v.to(query.dtype), input_precision="ieee")
        most = higher
    place = head * splits + split
    if first < last:
        tl.store(partial + place[:, None] * DIM + at[None, :], mixed / total[:, None], mask=inside)
    # An empty split has no weight: minus infinity.
    tl.store(lse + place, most + tl.log2(total), mask=in_group < GROUP)


@triton.jit
def _merge_splits(
    partial, lse, out, SPLITS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, EARLY: tl.constexpr
):  # fmt: skip
    begin(EARLY)
    head = tl.program_id(0).to(tl.int64)  # of all requests' heads
    split, at = tl.arange(0, SPLITS), tl.arange(0, DIM_BLOCK)
    shares = tl.load(lse + head * SPLITS + split)
    weights = tl.exp2(shares - tl.max(shares, axis=0))
    # What an empty split left was never written.
    written = (shares > float("-inf"))[:, None] & (at < DIM)[None, :]
    parts = tl.load(partial + (head * SPLITS + split)[:, None] * DIM + at[None, :], mask=written, other=0.0)
    mixed = tl.sum(parts * weights[:, None], axis=0) / tl.sum(weights, axis=0)
    tl.store(out + head * DIM + at, mixed.to(out.dtype.element_ty), mask=at < DIM)
