"""Attention of a chunk over its context and itself, exactly under the causal mask, by the kernels a device offers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from profiler.kernels import cpu_attention, cudnn_attention, flash3_attention
from profiler.kernels.attention_kernel import CAUSAL, PREFERENCE, AttentionKernel, Latents, Masking
from profiler.kernels.elementwise import has_triton
from profiler.kernels.quantized.kv import KV, read_rows

aten = torch.ops.aten


def available_kernels(device: torch.device, dtype: torch.dtype) -> list[AttentionKernel]:
    """The kernels that run on `device` in `dtype`, the usual best first."""
    if device.type == "cpu":
        absent = set() if dtype == torch.float32 else {AttentionKernel.CPU_FOLDED}
        absent |= {AttentionKernel.CUDNN, AttentionKernel.CUDNN_GRAPH, AttentionKernel.FLASH3}
        absent.add(AttentionKernel.CPU_MASKED)  # a mask asks for it, no time
    else:
        absent = {AttentionKernel.CPU_FOLDED, AttentionKernel.CPU_FLASH, AttentionKernel.CPU_MASKED}
        if dtype != torch.bfloat16 or not flash3_attention.is_available(device):
            absent.add(AttentionKernel.FLASH3)
        if dtype not in (torch.bfloat16, torch.float16):
            absent |= {AttentionKernel.CUDNN, AttentionKernel.CUDNN_GRAPH}
        elif not cudnn_attention.is_installed():
            absent.add(AttentionKernel.CUDNN_GRAPH)
    return [kernel for kernel in PREFERENCE if kernel not in absent]


def attend(
    kernel: AttentionKernel, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking = CAUSAL
) -> torch.Tensor:
    """Causal attention of the last c of p + c positions.

    q: [H, c, D], k and v: [KV, p + c, D] with H a multiple of KV -> [H, c, D]. The query at row i sees keys up to
    p + i. The merge of two calls is that of FlashAttention's partial results: each is weighted by the share of the
    softmax's denominator that it saw. Where more than the causal mask counts, the one kernel that knows it runs. With
    latents k [1, p + c, kept] is all that is read.
    """
    if masking.latents is not None:
        return masking.latents.attend(q, k.squeeze(0))
    if kernel is AttentionKernel.CPU_MASKED or not masking.is_plain(k.shape[1]):
        return attend_masked(q, k, v, masking)
    if kernel is AttentionKernel.CPU_FOLDED:
        return cpu_attention.attend(q, k, v)
    if kernel is AttentionKernel.FLASH3:
        return flash3_attention.attend(q, k, v)
    context = k.shape[1] - q.shape[1]
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if kernel is AttentionKernel.SDPA:
        return _sdpa(q, k, v, context).squeeze(0)
    if kernel is AttentionKernel.CUDNN_GRAPH:
        return cudnn_attention.attend(q, k, v).squeeze(0)
    partial = _cpu_flash if kernel is AttentionKernel.CPU_FLASH else _cudnn
    # out: [1, H, c, D], lse: [1, H, c, 1]
    out, lse = partial(q, k[:, :, context:], v[:, :, context:], True)
    if context:
        before, before_lse = partial(q, k[:, :, :context], v[:, :, :context], False)
        out = merge_partial(out, lse, before, before_lse)
    return out.squeeze(0)


def attend_tokens(
    q: torch.Tensor,
    keys: KV,
    values: KV,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    masking: Masking = CAUSAL,
) -> torch.Tensor:
    """Attention of the last token of each of R requests over its rows of a slab.

    q: [R, H, D]; keys, values: [KV, rows, D] with H a multiple of KV; starts, lengths: [R] int64, a request's first row
    and how many it has -> [R, H, D]. Where `attends_on_device`, the host need not know the lengths.
    """
    if q.is_cuda and has_triton():
        from profiler.kernels import flash_decoding

        return flash_decoding.attend(q, keys, values, starts, lengths)
    if masking.latents is not None:
        return _attend_latents(q, keys, starts, lengths, masking.latents)
    outputs = []
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        seen = slice(start + masking.first_seen(length, 1), start + length)
        k, v = read_rows(keys, seen), read_rows(values, seen)
        outputs.append(attend(AttentionKernel.SDPA, q[row, :, None], k, v, masking))
    return torch.stack(outputs).squeeze(2)


def _attend_latents(
    q: torch.Tensor, keys: KV, starts: torch.Tensor, lengths: torch.Tensor, latents: Latents
) -> torch.Tensor:
    """Each matrix is read once for all requests."""
    absorbed, outputs = latents.absorb(q.transpose(0, 1)), []
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        rows = read_rows(keys, slice(start, start + length)).squeeze(0)
        outputs.append(latents.attend_absorbed(absorbed[:, row : row + 1], rows))
    return latents.restore(torch.cat(outputs, dim=1)).transpose(0, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialAttention:
    """Attention over a part of the keys, with the log-sum-exp of its scores: minus infinity for no keys."""

    out: torch.Tensor  # [..., D], in the queries' dtype or float32
    lse: torch.Tensor  # [..., 1], float32

    def merged(self, other: PartialAttention) -> PartialAttention:
        """Attention over both parts, in float32."""
        if _fuses(self.out):
            from profiler.kernels import triton_elementwise

            out, lse = torch.empty_like(self.out, dtype=torch.float32), torch.empty_like(self.lse)
            triton_elementwise.merge_partial(self.out, self.lse, other.out, other.lse, out, lse)
            return PartialAttention(out=out, lse=lse)
        share = torch.sigmoid(other.lse - self.lse).nan_to_num(0.0)
        out = torch.lerp(self.out.float(), other.out.float(), share)
        return PartialAttention(out=out, lse=torch.logaddexp(self.lse, other.lse))

    def with_sinks(self, sinks: torch.Tensor) -> torch.Tensor:
        """The output [H, c, D] where a score of each head, sinks [H], takes its share of the softmax and goes to
        nothing: what is left of each weight is exp(lse) / (exp(lse) + exp(sink))."""
        kept = torch.sigmoid(self.lse - sinks.float().view(-1, 1, 1))
        return (self.out * kept).to(self.out.dtype)

    def merge_into(self, other: PartialAttention, out: torch.Tensor) -> None:
        """Attention over both parts of [H, c, D], written to `out` of that shape and any strides of whole heads."""
        if _fuses(self.out):
            from profiler.kernels import triton_elementwise

            triton_elementwise.merge_partial(self.out, self.lse, other.out, other.lse, out, None)
        else:
            out.copy_(self.merged(other).out)


def _fuses(out: torch.Tensor) -> bool:
    return out.is_cuda and has_triton() and out.dim() == 3


def attend_masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masking: Masking) -> torch.Tensor:
    """As `attend` under a mask that is more than causal: in half precision on a card by kernels that give their
    log-sum-exp, in which sinks are settled; elsewhere, and with a softcap, by strips of whole rows."""
    fits = q.shape[2] == v.shape[2] <= flash3_attention.LARGEST_HEAD and q.shape[2] % 8 == 0
    halves = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if not halves or not fits or masking.softcap is not None:
        return cpu_attention.attend_masked(q, k, v, masking)
    windowed = masking.window is not None and masking.window < k.shape[1]
    part = _in_window(q, k, v, masking.window or 0) if windowed else attend_partial(q, k, v, causal=True)
    return part.out if masking.sinks is None else part.with_sinks(masking.sinks)


def _in_window(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> PartialAttention:
    """Causal attention on a card, each query over its last `window` keys alone, by torch's FlashAttention-2."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    out, lse, *_ = aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, window_size_left=window - 1, window_size_right=0
    )
    return PartialAttention(out=out.squeeze(0).transpose(0, 1), lse=lse.view(q.shape[2], q.shape[1], 1))


def attend_partial(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool) -> PartialAttention:
    """Attention of q [H, c, D] over k and v [KV, n, D]: over all rows, or causal, q being their last c rows."""
    context = k.shape[1] - q.shape[1]
    if q.is_cuda and q.dtype == torch.bfloat16 and flash3_attention.is_available(q.device):
        out, lse = flash3_attention.attend_with_lse(q, k, v, causal=causal)
        return PartialAttention(out=out, lse=lse)
    if causal and context:
        before = attend_partial(q, k[:, :context], v[:, :context], causal=False)
        return before.merged(attend_partial(q, k[:, context:], v[:, context:], causal=True))
    q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if not q.is_cuda:
        out, lse = _cpu_flash(q, k, v, causal)
    elif q.dtype in (torch.bfloat16, torch.float16):
        out, lse = _cudnn(q, k, v, causal)
    else:
        out, lse = _exact(q, k, v, causal)
    return PartialAttention(out=out.reshape(q.shape[1:]), lse=lse.reshape(*q.shape[1:3], 1).float())


def attend_tokens_partial(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
) -> PartialAttention:
    """As `attend_tokens`, over a part of each request's tokens, maybe none: [R, H, D] and [R, H, 1]."""
    if q.is_cuda and has_triton():
        from profiler.kernels import flash_decoding

        out, lse = flash_decoding.attend_with_lse(q, keys, values, starts, lengths)
        return PartialAttention(out=out, lse=lse)
    parts = []
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if length:
            seen = slice(start, start + length)
            part = attend_partial(q[row, :, None], keys[:, seen], values[:, seen], causal=False)
        else:
            shape = (*q.shape[1:2], 1, q.shape[2])
            nothing = q.new_full((*shape[:2], 1), float("-inf"), dtype=torch.float32)
            part = PartialAttention(out=q.new_zeros(shape, dtype=torch.float32), lse=nothing)
        parts.append(part)
    return PartialAttention(
        out=torch.stack([part.out.float() for part in parts]).squeeze(2),
        lse=torch.stack([part.lse for part in parts]).squeeze(2),
    )


def attends_on_device(device: torch.device) -> bool:
    """Whether `attend_tokens` reads nothing back from a card, so that it can be recorded there; true without a card."""
    return device.type == "cpu" or has_triton()


def merge_partial(out: torch.Tensor, lse: torch.Tensor, before: torch.Tensor, before_lse: torch.Tensor) -> torch.Tensor:
    """Join attention over two disjoint sets of keys; out, before: [..., c, D], their lse: [..., c, 1] in float32."""
    share = torch.sigmoid(before_lse - lse)
    return torch.lerp(out.float(), before.float(), share).to(out.dtype)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, context: int) -> torch.Tensor:
    chunk = q.shape[2]
    grouped = q.shape[1] != k.shape[1]
    if context == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=chunk > 1, enable_gqa=grouped)
    if chunk == 1:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped)
    from torch.nn.attention.bias import causal_lower_right  # brings torch.compile along: a second of every start

    # is_causal alone would align the mask to the upper left and hide the context.
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=causal_lower_right(chunk, context + chunk), enable_gqa=grouped
    )


def _cpu_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out, lse.unsqueeze(-1)


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """For float32 on a card, where no kernel gives the log-sum-exp: all scores at once."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        after = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(after, float("-inf"))
    lse = scores.logsumexp(dim=-1, keepdim=True)
    return (scores - lse).exp() @ v, lse


def _cudnn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    return out, lse.view(*lse.shape[:3], 1)
