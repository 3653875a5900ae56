"""One decoder layer over a round or a step: packed tokens in, hidden states out, KV written to its slab."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict

import torch

from profiler.kernels.attention_kernel import CAUSAL, Masking
from profiler.kernels.elementwise import TokenPlaces, gelu_product, norm_all_heads, rms_norm, rotate_into_slab
from profiler.kernels.entry import PLAIN, Entries, Entry, Operand, Product
from profiler.kernels.linear import Linear
from profiler.kernels.quantized.kv import KV
from profiler.kernels.quantized.linear import DequantizingLinear, QuantizedLinear
from profiler.layers.latent import Latent
from profiler.layers.layer_inputs import LayerInputs, Reduce
from profiler.model import LayerSpec
from profiler.model.mlp import Activation, DenseMLP
from profiler.model.tensors import NormSpec

Project = Callable[[Operand], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Norms:
    """The weights of a layer's norms on one rank, those that it has: [hidden] each, but for query and key.

    These are [head_dim], or [H head_dim] and [KV head_dim] where a norm spans all heads of all ranks, or of latents.
    """

    before_attention: torch.Tensor | None
    after_attention: torch.Tensor | None
    before_mlp: torch.Tensor | None
    after_mlp: torch.Tensor | None
    query: torch.Tensor | None
    key: torch.Tensor | None
    sinks: torch.Tensor | None  # [H], of attention
    all_heads: bool
    eps: float

    @classmethod
    def of(cls, spec: LayerSpec, read: Callable[[NormSpec], torch.Tensor], *, eps: float) -> Norms:
        """The norms of `spec`, each read by `read`."""

        def weight(norm: NormSpec | None) -> torch.Tensor | None:
            return None if norm is None else read(norm)

        return cls(
            before_attention=weight(spec.before_attention),
            after_attention=weight(spec.after_attention),
            before_mlp=weight(spec.before_mlp),
            after_mlp=weight(spec.after_mlp),
            query=weight(spec.attention.q_norm),
            key=weight(spec.attention.k_norm),
            sinks=weight(spec.attention.sinks),
            all_heads=spec.attention.norms_all_heads,
            eps=eps,
        )

    def after(self, output: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """A block's output [T, hidden] as it is added to the residual stream."""
        return output if weight is None else rms_norm(output, weight, self.eps)


@dataclass(frozen=True, slots=True)
class ResidualStream:
    """The residual stream between blocks: hidden states [T, hidden] and the last block's output, not yet added.

    Adding belongs to the next norm, which reads both anyway: one pass over memory instead of two.
    """

    hidden: torch.Tensor
    update: torch.Tensor | None = None

    def add_and_norm(
        self, weight: torch.Tensor | None, eps: float, entry: Entry = PLAIN
    ) -> tuple[torch.Tensor, Operand]:
        """The sum, and its norm as the next product takes it; the sum itself so where there is no norm."""
        if weight is None:
            added = self.added()
            return added, entry.take(added)
        if self.update is None:
            return self.hidden, entry.norm(self.hidden, weight, eps)
        return entry.add_norm(self.hidden, self.update, weight, eps)

    def added(self) -> torch.Tensor:
        """The sum [T, hidden]."""
        return self.hidden if self.update is None else self.hidden + self.update


class Exchange(Protocol):
    """Experts on the ranks that share the rows of a round."""

    def __call__(self, x: torch.Tensor, *, num_tokens: int, is_cut: bool) -> torch.Tensor:
        """This rank's rows x [P, hidden], or all where they are not cut -> their sums; tokens are the first ones."""


class Projections(TypedDict):
    """A layer's products and the work before them, as `DecoderLayer` takes them."""

    qkv: Project
    o: Project
    gate_up: Project | None
    down: Project | None
    entries: Entries


def projections(products: Mapping[str, Product], *, has_latent: bool = False) -> Projections:
    """Products by name, each with its entry; none of an MLP where there are experts."""
    return Projections(
        qkv=products["qkv"], o=products["o"], gate_up=products.get("gate_up"), down=products.get("down"),
        entries=Entries.of(products, has_latent=has_latent),
    )  # fmt: skip


class DecoderLayer:
    """A layer of any `LayerSpec`, as one rank of a tensor-parallel group holds it.

    The projections are given from outside (fused q|k|v and gate|up, sharded by the caller), or experts in the place of
    the last two (`exchange` where rows are sent to them), and latents beside the first; `reduce_o` and `reduce_down`
    sum the partial results of the group and add a row-parallel bias once, `sum_ranks` adds no bias.
    `entries` say in which formats the projections take their operands.
    One layer knows nothing of pipelines.
    """

    def __init__(
        self,
        spec: LayerSpec,
        tp_size: int,
        *,
        norms: Norms,
        qkv: Project,
        o: Project,
        gate_up: Project | None = None,
        down: Project | None = None,
        experts: Callable[[torch.Tensor, int], torch.Tensor] | None = None,
        exchange: Exchange | None = None,
        latent: Latent | None = None,
        reduce_o: Reduce,
        reduce_down: Reduce,
        sum_ranks: Callable[[torch.Tensor], torch.Tensor],
        entries: Entries | None = None,
    ) -> None:
        self.num_heads, self.tp_size = spec.attention.heads.per_rank(tp_size), tp_size
        self.head_dim = spec.attention.head_dim
        self.rotation = spec.attention.rotation
        self.gate = spec.mlp.activation if isinstance(spec.mlp, DenseMLP) else Activation.SILU
        self.masking = CAUSAL
        if spec.attention.masking:
            self.masking = Masking(window=spec.attention.window, softcap=spec.attention.softcap, sinks=norms.sinks)
        if latent is not None:
            self.masking = Masking(latents=latent)
        self.latent = latent
        self.norms, self.entries = norms, entries or Entries()
        self.qkv, self.o, self.gate_up, self.down = qkv, o, gate_up, down
        self.experts, self.exchange = experts, exchange
        self.reduce_o, self.reduce_down, self.sum_ranks = reduce_o, reduce_down, sum_ranks

    def __call__(self, stream: ResidualStream, inputs: LayerInputs, keys: KV, values: KV) -> ResidualStream:
        """keys, values: this layer's slab [KV, rows, head_dim]."""
        norms = self.norms
        hidden, normed = stream.add_and_norm(norms.before_attention, norms.eps, self.entries.qkv)
        # No names for what is large and used once: it would live through the MLP.
        attended = inputs.join(self.reduce_o, self.o(inputs.mix(self, normed, keys, values)))
        attended = norms.after(attended, norms.after_attention)
        hidden, normed = ResidualStream(hidden, attended).add_and_norm(
            norms.before_mlp, norms.eps, self.entries.gate_up
        )
        del attended
        if self.exchange is None:
            output = inputs.join(self.reduce_down, self.feed(inputs.spread(normed), inputs))
        else:
            assert isinstance(normed, torch.Tensor)  # experts take plain rows
            output = self.exchange(normed, num_tokens=inputs.own_tokens(normed.shape[0]), is_cut=inputs.cuts_rows)
        return ResidualStream(hidden, norms.after(output, norms.after_mlp))

    def feed(self, normed: Operand, inputs: LayerInputs) -> torch.Tensor:
        """normed: [T, hidden] through the MLP or the experts -> this rank's part of the sum [T, hidden]."""
        if self.experts is not None:
            assert isinstance(normed, torch.Tensor)  # experts are plain
            return self.experts(normed, inputs.product_tokens(normed.shape[0]))
        assert self.gate_up is not None and self.down is not None
        return self.down(self.gated(self.gate_up(normed)))

    def gated(self, gate_up: torch.Tensor) -> Operand:
        """gate|up [T, 2F] -> what down takes [T, F]."""
        entry = self.entries.down
        return entry.silu(gate_up) if self.gate is Activation.SILU else entry.take(gelu_product(gate_up))

    def project(self, normed: Operand) -> torch.Tensor:
        """normed: [T, hidden] -> q|k|v [T, (H + 2 KV) D], normed where the norm spans all heads; q|kept of latents."""
        qkv = self.qkv(normed)
        if self.latent is not None:
            return self.latent.project(normed, qkv, self.norms.query)
        if self.norms.all_heads:
            norm_all_heads(qkv, self.norms, lambda means: self.sum_ranks(means) / self.tp_size)
        return qkv

    def project_apart(self, normed: Operand) -> tuple[torch.Tensor, Callable[[], torch.Tensor]] | None:
        """k|v at once and q when it is called for; None where the rows of q|k|v cannot be multiplied apart."""
        if self.norms.all_heads or not isinstance(self.qkv, Linear | DequantizingLinear | QuantizedLinear):
            return None
        parts = self.qkv.split(self.num_heads * self.head_dim)
        if parts is None:
            return None
        q, kv = parts
        return kv(normed), lambda: q(normed)

    def rotate(
        self,
        qkv: torch.Tensor,
        places: TokenPlaces,
        keys: KV,
        values: KV,
        *,
        num_heads: int | None = None,
    ) -> torch.Tensor:
        """Norm and rotate q and k, write k and v to keys and values [KV, rows, D] -> q [T, H, D].

        num_heads: query heads in qkv, if not all of this rank's.
        """
        if self.latent is not None:
            return self.latent.rotate(qkv, places, self.norms, keys, self.rotation)
        heads = self.num_heads if num_heads is None else num_heads
        return rotate_into_slab(
            qkv, places, self.norms, keys, values, num_heads=heads, rotation=self.rotation
        )  # fmt: skip

    def attend(self, q: torch.Tensor, inputs: LayerInputs, keys: KV, values: KV) -> torch.Tensor:
        """Attend each token of q [T, H, D] over its request's rows of the slab -> [T, H D]."""
        return inputs.attend(q, keys, values, self.masking)
