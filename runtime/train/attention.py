"""Causal attention of a chunk over its sequence's cached keys and values, with exact gradients whatever the cut.

A chunk's keys and values go to a cache. Its backward adds the gradients of all keys that it attended to into a buffer
beside that cache, and hands on the whole gradient of its own: chunks run backward from the last to the first, so all
that attended to them have added theirs by then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

aten = torch.ops.aten
_TOLERANCE = 0.05  # relative, of gradients in 16 bits on random numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Rows of a round that belong to one sequence, or to several alike that begin in the round and lie side by side."""

    first_row: int
    num_tokens: int
    slab_start: int  # row of the sequence's token 0 in the cache
    context: int  # tokens of the sequence before these
    num_sequences: int = 1

    @property
    def rows(self) -> slice:
        """Rows of the packed round."""
        return slice(self.first_row, self.first_row + self.num_sequences * self.num_tokens)

    @property
    def own(self) -> slice:
        """Rows of the cache that the tokens' keys and values are written to."""
        start = self.slab_start + self.context
        return slice(start, start + self.num_sequences * self.num_tokens)

    @property
    def before(self) -> slice:
        """Rows of the cache with the context."""
        return slice(self.slab_start, self.slab_start + self.context)


def make_spans(chunks: Sequence[tuple[int, int, int]]) -> tuple[Span, ...]:
    """chunks: (slab_start, context, num_tokens) in packed order; whole sequences of one length are put together."""
    spans: list[Span] = []
    row = 0
    for slab_start, context, count in chunks:
        last = spans[-1] if spans else None
        alike = last is not None and context == last.context == 0 and count == last.num_tokens
        if last is not None and alike and slab_start == last.own.stop:
            spans[-1] = Span(
                first_row=last.first_row, num_tokens=count, slab_start=last.slab_start, context=0,
                num_sequences=last.num_sequences + 1,
            )  # fmt: skip
        else:
            spans.append(Span(first_row=row, num_tokens=count, slab_start=slab_start, context=context))
        row += count
    return tuple(spans)


@dataclass(slots=True)
class LayerCache:
    """Keys and values [rows, KV, D] of one layer, and their gradients once a backward has begun."""

    keys: torch.Tensor
    values: torch.Tensor
    key_grads: torch.Tensor | None = None
    value_grads: torch.Tensor | None = None

    @classmethod
    def empty(cls, num_rows: int, kv_heads: int, head_dim: int, like: torch.Tensor) -> LayerCache:
        """Room for so many tokens, in the format of `like`."""
        keys, values = like.new_empty(2, num_rows, kv_heads, head_dim)
        return cls(keys, values)

    def operands(self, q: torch.Tensor, span: Span, rows: slice) -> Operands:
        """Queries [B, H, c, D] with the keys and values [B, KV, tokens, D] of a span's rows."""
        return Operands(q, _heads_first(self.keys, span, rows), _heads_first(self.values, span, rows))

    def gradients(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums over the chunks so far, in float32 where the numbers are shorter."""
        if self.key_grads is None or self.value_grads is None:
            wide = torch.promote_types(self.keys.dtype, torch.float32)
            self.key_grads = torch.zeros_like(self.keys, dtype=wide)
            self.value_grads = torch.zeros_like(self.values, dtype=wide)
        return self.key_grads, self.value_grads


Grads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Partial = tuple[torch.Tensor, torch.Tensor]  # an output [B, H, c, D] and the log-sum-exp of its scores [B, H, c]


class Operands(NamedTuple):
    """q [B, H, c, D], and k and v [B, KV, n, D]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


class Kernel(Protocol):
    """Attention of q over k and v: all of them, or under the causal mask of equal lengths."""

    def forward(self, x: Operands, causal: bool) -> Partial:
        """The output and the log-sum-exp of its scores."""

    def backward(self, grad: torch.Tensor, x: Operands, joint: Partial, causal: bool) -> Grads:
        """Gradients of q, k and v; `joint` may span more keys than k holds."""


@dataclass(frozen=True, slots=True)
class _Cpu:
    """Torch's flash attention on a CPU."""

    def forward(self, x: Operands, causal: bool) -> Partial:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*x, 0.0, causal)
        return out, lse

    def backward(self, grad: torch.Tensor, x: Operands, joint: Partial, causal: bool) -> Grads:
        out, lse = joint
        run = aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads: Grads = run(grad, *x, out, lse.contiguous(), 0.0, causal)
        return grads


@dataclass(frozen=True, slots=True)
class _Exact:
    """All scores at once: for formats that no fused kernel takes."""

    def forward(self, x: Operands, causal: bool) -> Partial:
        scores = _scores(x, causal)
        lse = scores.logsumexp(dim=-1)
        return ((scores - lse[..., None]).exp() @ _repeated(x.v, x.q)).to(x.q.dtype), lse

    def backward(self, grad: torch.Tensor, x: Operands, joint: Partial, causal: bool) -> Grads:
        q, k, v = x
        out, lse = joint
        shares = (_scores(x, causal) - lse[..., None]).exp()
        delta = (grad * out).sum(dim=-1, keepdim=True)
        inner = shares * (grad @ _repeated(v, q).transpose(-1, -2) - delta) * q.shape[-1] ** -0.5
        return inner @ _repeated(k, q), _summed(inner.transpose(-1, -2) @ q, k), _summed(shares.mT @ grad, v)


@dataclass(frozen=True, slots=True)
class _Flash:
    """Flash attention 2 on a card."""

    def forward(self, x: Operands, causal: bool) -> Partial:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(*x, 0.0, causal)
        return out, lse

    def backward(self, grad: torch.Tensor, x: Operands, joint: Partial, causal: bool) -> Grads:
        out, lse = joint
        grads: Grads = aten._scaled_dot_product_flash_attention_backward(
            grad, *x, out, lse.contiguous(), None, None, x.q.shape[2], x.k.shape[2], 0.0, causal,
            *_no_dropout(x.q.device),
        )  # fmt: skip
        return grads


@dataclass(frozen=True, slots=True)
class _Cudnn:
    """cuDNN's attention; `expands` where its backward does not take groups of query heads."""

    expands: bool = False

    def forward(self, x: Operands, causal: bool) -> Partial:
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(*x, None, True, 0.0, causal)
        return out, lse.view(*lse.shape[:3])

    def backward(self, grad: torch.Tensor, x: Operands, joint: Partial, causal: bool) -> Grads:
        q, k, v = x
        out, lse = joint
        wide_k, wide_v = (_repeated(k, q), _repeated(v, q)) if self.expands else (k, v)
        seed, offset = _no_dropout(q.device)
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            grad, q, wide_k, wide_v, out, lse.contiguous().view(*lse.shape, 1), seed, offset, None, None, None,
            q.shape[2], k.shape[2], 0.0, causal,
        )  # fmt: skip
        return (dq, _summed(dk, k), _summed(dv, v)) if self.expands else (dq, dk, dv)


@cache
def _no_dropout(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    zero = torch.zeros((), dtype=torch.int64, device=device)
    return zero, zero


def _scores(x: Operands, causal: bool) -> torch.Tensor:
    q, k, _ = x
    scores: torch.Tensor = q @ _repeated(k, q).transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        after = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores.masked_fill_(after, float("-inf"))
    return scores


def _repeated(k: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Each KV head for all query heads of its group."""
    group = q.shape[1] // k.shape[1]
    return k if group == 1 else k.repeat_interleave(group, dim=1)


def _summed(grad: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    summed: torch.Tensor = grad.unflatten(1, (k.shape[1], -1)).sum(dim=2)
    return summed


@cache
def kernel_for(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> Kernel:
    """The fastest kernel of this machine that computes gradients right; on a card each is tried on small numbers."""
    if device.type == "cpu":
        return _Cpu()
    if dtype in (torch.bfloat16, torch.float16):
        for kernel in (_Cudnn(), _Cudnn(expands=True), _Flash()):
            if _is_right(kernel, device, dtype, heads, kv_heads, head_dim):
                return kernel
    return _Exact()


def _is_right(
    kernel: Kernel, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int
) -> bool:
    """Whether gradients over a context and a chunk, joined, are those of all scores at once."""
    generator = torch.Generator(device).manual_seed(0)

    def random(count: int, num_tokens: int) -> torch.Tensor:
        made = torch.randn(num_tokens, count, head_dim, device=device, generator=generator)
        return made.to(dtype).transpose(0, 1).unsqueeze(0)

    x, grad = Operands(random(heads, 128), random(kv_heads, 384), random(kv_heads, 384)), random(heads, 128)
    try:
        found = _both(kernel, x, grad)
    except RuntimeError:
        return False
    exact = _both(_Exact(), Operands(*(one.float() for one in x)), grad.float())
    return all(float((a.float() - b).norm() / b.norm()) < _TOLERANCE for a, b in zip(found, exact, strict=True))


def _both(kernel: Kernel, x: Operands, grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and its gradients over a context and a chunk: the last keys are the chunk's own."""
    context = x.k.shape[2] - x.q.shape[2]
    before, own = (Operands(x.q, x.k[:, :, part], x.v[:, :, part]) for part in (slice(context), slice(context, None)))
    joint = _merged(kernel.forward(before, False), kernel.forward(own, True))
    dq, dk, dv = kernel.backward(grad, before, joint, False)
    dq_own, dk_own, dv_own = kernel.backward(grad, own, joint, True)
    return [joint[0], dq + dq_own, torch.cat([dk, dk_own], 2), torch.cat([dv, dv_own], 2)]


def _merged(before: Partial, own: Partial) -> Partial:
    """Attention over both sets of keys, joined by their log-sum-exp in float32."""
    share = torch.sigmoid(before[1] - own[1])[..., None]
    out = torch.lerp(own[0].to(share.dtype), before[0].to(share.dtype), share).to(own[0].dtype)
    return out, torch.logaddexp(before[1], own[1])


@dataclass(frozen=True, slots=True)
class CacheView:
    """The cache that a round's attention of one layer works on."""

    cache: LayerCache
    spans: tuple[Span, ...]
    kernel: Kernel = field(repr=False)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, view: CacheView) -> torch.Tensor:
    """q [T, H, D], k and v [T, KV, D] of a round -> [T, H, D]; k and v are written to the cache."""
    apply: Callable[..., torch.Tensor] = _Attend.apply
    return apply(q, k, v, view)


def _heads_first(x: torch.Tensor, span: Span, rows: slice) -> torch.Tensor:
    """[rows, heads, D] -> [B, heads, tokens, D] of the span's sequences."""
    return x[rows].view(span.num_sequences, -1, *x.shape[1:]).transpose(1, 2)


def _rows_first(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(0, 1)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, view: CacheView) -> torch.Tensor:
        cache, outs, lses = view.cache, [], []
        for span in view.spans:
            cache.keys[span.own], cache.values[span.own] = k[span.rows], v[span.rows]
            mine = _heads_first(q, span, span.rows)
            out, lse = view.kernel.forward(cache.operands(mine, span, span.own), True)
            if span.context:
                before = view.kernel.forward(cache.operands(mine, span, span.before), False)
                out, lse = _merged(before, (out, lse))
            outs.append(_rows_first(out))
            lses.append(lse)
        mixed = outs[0] if len(outs) == 1 else torch.cat(outs)
        ctx.view = view
        ctx.save_for_backward(q, mixed, *lses)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        view: CacheView = ctx.view
        cache = view.cache
        q, mixed, *lses = ctx.saved_tensors
        key_sums, value_sums = cache.gradients()
        dq = torch.empty_like(q)
        dk, dv = (x.new_empty(q.shape[0], *x.shape[1:]) for x in (cache.keys, cache.values))
        for span, lse in zip(view.spans, lses, strict=True):
            mine, out, outer = (_heads_first(x, span, span.rows) for x in (q, mixed, grad))
            own = cache.operands(mine, span, span.own)
            q_grad, k_grad, v_grad = view.kernel.backward(outer, own, (out, lse), True)
            dk[span.rows] = (_rows_first(k_grad) + key_sums[span.own]).to(dk.dtype)
            dv[span.rows] = (_rows_first(v_grad) + value_sums[span.own]).to(dv.dtype)
            if span.context:
                before = cache.operands(mine, span, span.before)
                more, k_grad, v_grad = view.kernel.backward(outer, before, (out, lse), False)
                key_sums[span.before] += _rows_first(k_grad)
                value_sums[span.before] += _rows_first(v_grad)
                q_grad = q_grad + more
            dq[span.rows] = _rows_first(q_grad)
        return dq, dk, dv, None
