"""Attention on a CPU in float32: query heads that share keys folded into one block of rows, the diagonal in strips."""

from __future__ import annotations

import torch

from profiler.kernels.attention_kernel import MASKED_SCORES, Masking

BLOCK_ROWS = 512  # about so many of a chunk at once: all before them is context
STRIP_ROWS = 64  # of the diagonal block at once: a strip's scores stay in a core's own cache


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of the last c of p + c positions; q: [H, c, D], k and v: [KV, p + c, D] -> [H, c, D].

    torch's flash kernel for CPUs takes larger tiles the more queries it sees, and spends as long on a causal block of
    512 rows as on a full one: so it gets the context alone, with the H / KV heads of a group one below the other.
    Softmax over whole rows of scores, by matrix products alone, is slower than it once there is context (71 against 76
    GFLOP/s on a Zen core), and faster on the diagonal (50 against 38).
    """
    num_heads, chunk, head_dim = q.shape
    num_kv_heads, context = k.shape[0], k.shape[1] - chunk
    # As the layer wants it next: [c, H, D].
    out = q.new_empty(chunk, num_kv_heads, num_heads // num_kv_heads, head_dim)
    grouped = q.view(num_kv_heads, -1, chunk, head_dim)
    num_blocks = max(1, round(chunk / BLOCK_ROWS))
    for index in range(num_blocks):
        rows = slice(chunk * index // num_blocks, chunk * (index + 1) // num_blocks)
        seen = slice(0, context + rows.start)
        own = slice(context + rows.start, context + rows.stop)
        folded = (grouped[:, :, rows] * head_dim**-0.5).contiguous()
        mixed, lse = _triangle(folded, k[:, own], v[:, own])
        if seen.stop:
            before, before_lse = _flash(folded, k[:, seen], v[:, seen])
            mixed = mixed.lerp_(before, torch.sigmoid(before_lse - lse))
        out[rows] = mixed.permute(2, 0, 1, 3)
    return out.view(chunk, num_heads, head_dim).transpose(0, 1)


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking) -> torch.Tensor:
    """As `attend`, in any format, under a mask that may be more than causal: strips of queries over the keys they see.

    Scores are in float32. A strip reads the keys of its window alone. Values may have other features than keys.
    """
    num_heads, chunk, head_dim = q.shape
    num_kv_heads, context, value_dim = k.shape[0], k.shape[1] - chunk, v.shape[2]
    group = num_heads // num_kv_heads
    grouped = q.view(num_kv_heads, group, chunk, head_dim)
    out = q.new_empty(chunk, num_kv_heads, group, value_dim)
    sinks = None if masking.sinks is None else masking.sinks.float().view(num_kv_heads, group, 1, 1)
    most_keys = min(context + chunk, (masking.window or context + chunk) + STRIP_ROWS)
    strip = max(1, min(STRIP_ROWS, MASKED_SCORES // (num_heads * most_keys)))
    for first in range(0, chunk, strip):
        last = min(first + strip, chunk)
        count, end = last - first, context + last
        start = masking.first_seen(end, count)
        folded = (grouped[:, :, first:last] * head_dim**-0.5).reshape(num_kv_heads, group * count, head_dim)
        scores = torch.bmm(folded, k[:, start:end].transpose(1, 2)).float()
        if masking.softcap is not None:
            scores.div_(masking.softcap).tanh_().mul_(masking.softcap)
        scores = scores.view(num_kv_heads, group, count, end - start)
        key = torch.arange(start, end, device=q.device)
        query = torch.arange(context + first, end, device=q.device)[:, None]
        hidden = key > query
        if masking.window is not None:
            hidden |= key <= query - masking.window
        scores.masked_fill_(hidden, -torch.inf)
        weights = torch.softmax(scores, dim=-1)
        if sinks is not None:
            weights *= torch.sigmoid(scores.logsumexp(dim=-1, keepdim=True) - sinks)
        weights = weights.view(num_kv_heads, group * count, end - start).to(v.dtype)
        mixed = torch.bmm(weights, v[:, start:end]).view(num_kv_heads, group, count, value_dim)
        out[first:last] = mixed.permute(2, 0, 1, 3)
    return out.view(chunk, num_heads, value_dim).transpose(0, 1)


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [KV, G, n, D] scaled and k, v: [KV, m, D], no mask -> out [KV, G, n, D] and lse [KV, G, n, 1]."""
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q.flatten(1, 2).unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, False, scale=1.0
    )
    return out.view(q.shape), lse.view(*q.shape[:3], 1)


def _triangle(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q: [KV, G, n, D] scaled and k, v: [KV, n, D], causal -> out [KV, G, n, D] and lse [KV, G, n, 1]."""
    num_kv_heads, group, num_rows, head_dim = q.shape
    out, lse = torch.empty_like(q), q.new_empty(num_kv_heads, group, num_rows, 1)
    hidden = q.new_full((STRIP_ROWS, STRIP_ROWS), -torch.inf).triu_(1)
    for first in range(0, num_rows, STRIP_ROWS):
        last = min(first + STRIP_ROWS, num_rows)
        count = last - first
        folded = q[:, :, first:last].reshape(num_kv_heads, group * count, head_dim)
        scores = torch.bmm(folded, k[:, :last].transpose(1, 2)).view(num_kv_heads, group, count, last)
        scores[..., first:] += hidden[:count, :count]
        weights = torch.softmax(scores, dim=-1)
        # The largest weight is exp(largest score - lse).
        lse[:, :, first:last] = scores.amax(dim=-1, keepdim=True) - weights.amax(dim=-1, keepdim=True).log_()
        mixed = torch.bmm(weights.view(num_kv_heads, group * count, last), v[:, :last])
        out[:, :, first:last] = mixed.view(num_kv_heads, group, count, head_dim)
    return out, lse
