"""One decoder layer over a round: packed tokens of several requests in, hidden states out, KV written to its slab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from profiler.attention import attend
from profiler.elementwise import rms_norm, rotate_into_slab, silu_product
from profiler.model import ModelShape
from profiler.round import RoundInputs

Project = Callable[[torch.Tensor], torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


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
        self.norms = norms
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down
        self.reduce_o, self.reduce_down = reduce_o, reduce_down

    def __call__(
        self, hidden: torch.Tensor, inputs: RoundInputs, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """hidden: [T, hidden]; keys, values: this layer's slab [KV, rows, head_dim] -> [T, hidden]."""
        norms = self.norms
        normed = rms_norm(hidden, norms.before_attention, norms.eps)
        q = rotate_into_slab(self.qkv(normed), inputs, norms, keys, values, num_heads=self.num_heads)
        mixed = self.attend_spans(q, inputs, keys, values)
        hidden = hidden + self.reduce_o(self.o(mixed))
        normed = rms_norm(hidden, norms.before_mlp, norms.eps)
        return hidden + self.reduce_down(self.down(silu_product(self.gate_up(normed))))

    def attend_spans(
        self, q: torch.Tensor, inputs: RoundInputs, keys: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        """Attend each chunk of q [T, H, D] over its request's rows of the slab -> [T, H D]."""
        outputs = []
        for span in inputs.spans:
            rows = slice(span.first_row, span.first_row + span.num_tokens)
            seen = slice(span.slab_start, span.slab_start + span.context + span.num_tokens)
            out = attend(span.kernel, q[rows].transpose(0, 1), keys[:, seen], values[:, seen])
            outputs.append(out.transpose(0, 1))
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return mixed.reshape(q.shape[0], -1)
