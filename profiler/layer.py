"""One decoder layer over a round: packed tokens of several requests in, hidden states out, KV written to its slab."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from profiler.attention import AttentionKernel, attend
from profiler.model import ModelShape

Project = Callable[[torch.Tensor], torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Where one request's chunk lies: rows of the packed round, and rows of the KV slab."""

    first_row: int  # of the chunk in the round
    num_tokens: int
    slab_start: int  # row of the request's token 0 in the slab
    context: int  # tokens of the request before the chunk
    kernel: AttentionKernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The small weights of a layer: [hidden] each, q and k [head_dim] where the architecture has them."""

    before_attention: torch.Tensor
    before_mlp: torch.Tensor
    query: torch.Tensor | None
    key: torch.Tensor | None
    eps: float


class DecoderLayer:
    """Llama, Mistral, Qwen2 and Qwen3 layers, as one rank of a tensor-parallel group holds them.

    The projections are given from outside (fused q|k|v and gate|up, sharded by the caller); `reduce` sums the
    partial results of the group and adds a row-parallel bias once. One layer knows nothing of pipelines.
    """

    def __init__(
        self,
        shape: ModelShape,
        tp_size: int,
        *,
        norms: Norms,
        qkv: Project,
        o: Project,
        gate_up: Project,
        down: Project,
        reduce_o: Reduce,
        reduce_down: Reduce,
    ) -> None:
        self.num_heads = shape.num_heads // tp_size
        self.num_kv_heads = shape.kv_heads_per_rank(tp_size)
        self.head_dim = shape.head_dim
        self.norms = norms
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down
        self.reduce_o, self.reduce_down = reduce_o, reduce_down

    def __call__(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        spans: Sequence[Span],
        keys: torch.Tensor,
        values: torch.Tensor,
    ) -> torch.Tensor:
        """hidden [T, hidden], rotary cos and sin [T, head_dim / 2], this layer's slab [KV, rows, head_dim] each."""
        norms = self.norms
        normed = rms_norm(hidden, norms.before_attention, norms.eps)
        q, k, v = self.split_heads(self.qkv(normed), rotary)
        write_kv(k, v, spans, keys, values)
        mixed = self.attend_spans(q, spans, keys, values)
        hidden = hidden + self.reduce_o(self.o(mixed))
        normed = rms_norm(hidden, norms.before_mlp, norms.eps)
        return hidden + self.reduce_down(self.down(silu_product(self.gate_up(normed))))

    def split_heads(
        self, qkv: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv: [T, (H + 2 KV) D] -> q [T, H, D], k and v [T, KV, D], normed and rotated."""
        heads = qkv.view(qkv.shape[0], -1, self.head_dim)
        q, k, v = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.norms.query is not None and self.norms.key is not None:
            q = rms_norm(q, self.norms.query, self.norms.eps)
            k = rms_norm(k, self.norms.key, self.norms.eps)
        return rotate(q, *rotary), rotate(k, *rotary), v

    def attend_spans(
        self, q: torch.Tensor, spans: Sequence[Span], keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Attend each chunk of q [T, H, D] over its request's rows of the slab -> [T, H D]."""
        outputs = []
        for span in spans:
            rows = slice(span.first_row, span.first_row + span.num_tokens)
            seen = slice(span.slab_start, span.slab_start + span.context + span.num_tokens)
            out = attend(span.kernel, q[rows].transpose(0, 1), keys[:, seen], values[:, seen])
            outputs.append(out.transpose(0, 1))
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return mixed.reshape(q.shape[0], -1)


def write_kv(k: torch.Tensor, v: torch.Tensor, spans: Sequence[Span], keys: torch.Tensor, values: torch.Tensor) -> None:
    """Copy the round's k and v [T, KV, D] to each request's rows of the slab [KV, rows, D]."""
    for span in spans:
        rows = slice(span.first_row, span.first_row + span.num_tokens)
        first = span.slab_start + span.context
        keys[:, first : first + span.num_tokens] = k[rows].transpose(0, 1)
        values[:, first : first + span.num_tokens] = v[rows].transpose(0, 1)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), computed in float32."""
    return F.rms_norm(x, weight.shape, weight, eps)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding (Su et al., 2021) in the half-split layout; x: [T, heads, D], cos and sin: [T, D / 2]."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def silu_product(gate_up: torch.Tensor) -> torch.Tensor:
    """SwiGLU's element-wise half (Shazeer, 2020): [T, 2F] -> [T, F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
