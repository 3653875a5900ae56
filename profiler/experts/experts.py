"""Routed experts on one rank: tokens sorted by expert, products of each group of them, and their weighted sums.

Where every rank of a tensor-parallel group has all rows, each adds what its own experts, or its part of each, make of
them, and the group's sum combines them. Under Megatron's sequence parallelism that is an all-gather before and a
reduce-scatter after. `exchange` sends rows to their experts instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from profiler.experts.products import GroupedProduct
from profiler.experts.routing import route
from profiler.kernels.elementwise import silu_product
from profiler.kernels.entry import Product
from profiler.model.experts import ExpertGate, ExpertsMLP


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Those of the experts that a rank holds, of each F of its features.

    gate_up: hidden to 2 F, down: F to hidden; the latter adds biases on one rank of those that share an expert.
    """

    gate_up: GroupedProduct
    down: GroupedProduct


class Experts:
    """The experts of one layer on one rank."""

    def __init__(
        self,
        spec: ExpertsMLP,
        weights: ExpertWeights,
        *,
        first: int,
        router: Product,
        choice_bias: torch.Tensor | None = None,
        shared: tuple[Product, Product] | None = None,
        shared_gate: Product | None = None,
    ) -> None:
        """first: the first expert that is held. shared: gate|up and down of the shared one, as the rank holds it."""
        self.spec, self.weights, self.first = spec, weights, first
        self.router, self.choice_bias = router, choice_bias
        self.shared, self.shared_gate = shared, shared_gate

    def __call__(self, x: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
        """x: [T, hidden] -> this rank's part of the sum [T, hidden]; of rows behind the tokens no expert is asked."""
        return self.with_shared(self.routed(x, *self.choose(x), num_tokens), x)

    def choose(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x: [T, hidden] -> the experts of each token [T, k] int64 and their weights in float32."""
        return route(self.spec.router, self.router(x), self.choice_bias)

    def with_shared(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """out [T, hidden] and what the shared expert makes of x, in place."""
        if self.shared is not None:
            gate_up, down = self.shared
            added = down(silu_product(gate_up(x)))
            out += added if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * added
        return out

    def routed(
        self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor, num_tokens: int | None = None
    ) -> torch.Tensor:
        """What the held experts make of x [T, hidden], by the experts [T, k] of each token and their weights."""
        held, per_token = self.weights.down.held, experts.shape[1]
        local = experts.flatten() - self.first
        local = torch.where((local >= 0) & (local < held), local, held)
        if num_tokens is not None:
            local[num_tokens * per_token :] = held
        order = torch.argsort(local, stable=True)
        counts = torch.bincount(local, minlength=held + 1)[:held]
        ends = counts.cumsum(0).to(torch.int32)
        order = order[: int(ends[-1])]
        if not order.numel():
            return torch.zeros_like(x)
        rows = order // per_token
        made = self._each(x[rows], ends)
        made *= weights.flatten()[order, None].to(made.dtype)
        return torch.zeros_like(x).index_add_(0, rows, made)

    def _each(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Rows [N, hidden] sorted by expert, those of each up to its end -> [N, hidden]."""
        return self.weights.down(self._gated(self.weights.gate_up(x, ends)), ends)

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.spec.gate is ExpertGate.SILU:
            return silu_product(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.spec.limit), up.clamp(-self.spec.limit, self.spec.limit)
        return (up + 1.0) * gate * torch.sigmoid(gate * self.spec.alpha)
