"""One decoder layer over a round or a step: packed tokens in, hidden states out, KV written to its slab."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from profiler.elementwise import add_rms_norm, rms_norm, rotate_into_slab, silu_product
from profiler.model import ModelShape
from profiler.round import RoundInputs
from profiler.step import StepInputs

Project = Callable[[torch.Tensor], torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]
LayerInputs = RoundInputs | StepInputs


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The small weights of a layer: [hidden] each, q and k [head_dim] where the architecture has them."""

    before_attention: torch.Tensor
    before_mlp: torch.Tensor
    query: torch.Tensor | None
    key: torch.Tensor | None
    eps: float


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual stream between blocks: hidden states [T, hidden] and the last block's output, not yet added.

    Adding belongs to the next norm, which reads both anyway: one pass over memory instead of two.
    """

    hidden: torch.Tensor
    update: torch.Tensor | None = None

    def add_and_norm(self, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum, and its norm."""
        if self.update is None:
            return self.hidden, rms_norm(self.hidden, weight, eps)
        return add_rms_norm(self.hidden, self.update, weight, eps)

    def added(self) -> torch.Tensor:
        """The sum [T, hidden]."""
        return self.hidden if self.update is None else self.hidden + self.update


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

    def __call__(self, stream: Stream, inputs: LayerInputs, keys: torch.Tensor, values: torch.Tensor) -> Stream:
        """keys, values: this layer's slab [KV, rows, head_dim]."""
        norms = self.norms
        hidden, normed = stream.add_and_norm(norms.before_attention, norms.eps)
        # No names for what is large and used once: it would live through the MLP.
        attended = self.reduce_o(
            self.o(
                self.attend(
                    rotate_into_slab(self.qkv(normed), inputs, norms, keys, values, num_heads=self.num_heads),
                    inputs,
                    keys,
                    values,
                )
            )
        )
        hidden, normed = Stream(hidden, attended).add_and_norm(norms.before_mlp, norms.eps)
        del attended
        return Stream(hidden, self.reduce_down(self.down(silu_product(self.gate_up(normed)))))

    def attend(self, q: torch.Tensor, inputs: LayerInputs, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Attend each token of q [T, H, D] over its request's rows of the slab -> [T, H D]."""
        return inputs.attend(q, keys, values)
