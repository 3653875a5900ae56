"""The two halves of a layer around its attention, as functions of tensors that autograd differentiates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from profiler.kernels.quantized.rounding import quantize_rows, widened
from profiler.kernels.quantized.weight import quantize_weight
from profiler.model import LayerSpec
from profiler.model.precision import LinearFormat
from runtime.train.parameters import Parameter

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosine and sine, [T, head_dim / 2] each


class _SumGrads(torch.autograd.Function):
    """The same on all ranks of a group; what its gradient misses is on the others."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


class _Sum(torch.autograd.Function):
    """The sum over the ranks of a group, which all of them use alike, or each for its own where `apart`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, apart: bool) -> torch.Tensor:
        ctx.group, ctx.apart = group, apart
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        if ctx.apart:
            grad = grad.clone(memory_format=torch.contiguous_format)
            dist.all_reduce(grad, group=ctx.group)
        return grad, None, None


class _Rounded(torch.autograd.Function):
    """A product of operands rounded to 8 bits and back; gradients pass as if nothing had been rounded (Bengio et al.,
    2013), but are taken at the rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, linears: LinearFormat) -> torch.Tensor:
        weight = quantize_weight(weight, linears.weights.torch_dtype).dequantized(x.dtype)
        if linears.activations is not None:
            rows = quantize_rows(x, linears.activations.torch_dtype)
            x = (widened(rows.values) * rows.scales).to(x.dtype)
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.T @ x, None


_sum_grads: Callable[..., torch.Tensor] = _SumGrads.apply
_sum: Callable[..., torch.Tensor] = _Sum.apply
_rounded: Callable[..., torch.Tensor] = _Rounded.apply


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What both halves of a layer need besides tensors; sizes are this rank's."""

    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    all_heads: tuple[int, int] | None  # sizes that the norms of q and k span, where they span all heads of all ranks
    rounded: LinearFormat | None = None
    group: dist.ProcessGroup | None = field(default=None, compare=False)
    names: tuple[str | None, ...] = ()
    """Of the norms before attention, of q, of k, after attention, before the MLP, after it."""

    @classmethod
    def of(
        cls, spec: LayerSpec, tp_size: int, *, eps: float, rounded: LinearFormat | None, group: dist.ProcessGroup | None
    ) -> Block:
        """Of a layer."""
        attention = spec.attention
        norms = (
            spec.before_attention, attention.q_norm, attention.k_norm, spec.after_attention, spec.before_mlp,
            spec.after_mlp,
        )  # fmt: skip
        return cls(
            heads=attention.heads.count // tp_size,
            kv_heads=attention.kv_heads.count // tp_size,
            head_dim=attention.head_dim,
            eps=eps,
            all_heads=(attention.heads.size, attention.kv_heads.size) if attention.norms_all_heads else None,
            rounded=rounded,
            group=group,
            names=tuple(norm.tensor if norm else None for norm in norms),
        )

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """A product, in 8 bits where training prepares for them."""
        if self.rounded is None:
            return F.linear(x, weight, bias)
        y = _rounded(x, weight, self.rounded)
        return y if bias is None else y + bias

    def norm(self, x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """Root-mean-square norm over the last dimension; x itself where there is none."""
        return x if weight is None else F.rms_norm(x, weight.shape, weight, self.eps)

    def norm_across(self, x: torch.Tensor, weight: torch.Tensor, size: int) -> torch.Tensor:
        """The same over `size` features, of which this rank has some."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        squares = wide.square().sum(dim=-1, keepdim=True)
        if self.group is not None:
            squares = _sum(squares, self.group, True)
        return (wide * torch.rsqrt(squares / size + self.eps)).to(x.dtype) * weight

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """What all ranks hold, as each multiplies it with its own columns."""
        if self.group is None:
            return x
        return _sum_grads(x, self.group)

    def summed(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The sum of the ranks' parts, a row-parallel bias added once."""
        if self.group is not None:
            x = _sum(x, self.group, False)
        return x if bias is None else x + bias


Tensors = Mapping[str, torch.Tensor]


def before_attention(
    block: Block, hidden: torch.Tensor, rotation: Rotation, weights: Tensors
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden [T, hidden] -> q [T, H, D], k and v [T, KV, D], normed and rotated."""
    norm, q_norm, k_norm, *_ = block.names
    normed = block.spread(block.norm(hidden, _of(weights, norm)))
    qkv = block.linear(normed, weights["qkv"], weights.get("qkv.bias"))
    sizes = [count * block.head_dim for count in (block.heads, block.kv_heads, block.kv_heads)]
    q, k, v = qkv.split(sizes, dim=-1)
    if block.all_heads is not None:
        assert q_norm is not None and k_norm is not None
        q = block.norm_across(q, weights[q_norm], block.all_heads[0])
        k = block.norm_across(k, weights[k_norm], block.all_heads[1])
        q_norm = k_norm = None
    q, k, v = (x.unflatten(-1, (-1, block.head_dim)) for x in (q, k, v))
    q, k = block.norm(q, _of(weights, q_norm)), block.norm(k, _of(weights, k_norm))
    return rotate(q, rotation), rotate(k, rotation), v.contiguous()


def after_attention(block: Block, hidden: torch.Tensor, mixed: torch.Tensor, weights: Tensors) -> torch.Tensor:
    """hidden [T, hidden] and attention's output [T, H, D] -> the layer's output [T, hidden]."""
    *_, after, before_mlp, after_mlp = block.names
    attended = block.summed(block.linear(mixed.flatten(1), weights["o"]), weights.get("o.bias"))
    hidden = hidden + block.norm(attended, _of(weights, after))
    normed = block.spread(block.norm(hidden, _of(weights, before_mlp)))
    gate, up = block.linear(normed, weights["gate_up"], weights.get("gate_up.bias")).chunk(2, dim=-1)
    output = block.summed(block.linear(F.silu(gate) * up, weights["down"]), weights.get("down.bias"))
    return hidden + block.norm(output, _of(weights, after_mlp))


def rotate(x: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Rotary embedding (Su et al., 2021) in the half-split layout; x: [T, heads, D]."""
    cos, sin = (part[:, None] for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _of(weights: Tensors, name: str | None) -> torch.Tensor | None:
    return None if name is None else weights[name]


@dataclass(frozen=True, slots=True)
class Halves:
    """Both functions, as they are or compiled."""

    before: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = before_attention
    after: Callable[..., torch.Tensor] = after_attention

    @classmethod
    def compiled(cls) -> Halves:
        """Element-wise work fused with its neighbours, forward and backward."""
        return cls(torch.compile(before_attention, dynamic=False), torch.compile(after_attention, dynamic=False))


def weights_of(parameters: Mapping[str, Parameter]) -> dict[str, torch.Tensor]:
    """The tensors of a layer's parameters."""
    return {name: parameter.weight for name, parameter in parameters.items()}
