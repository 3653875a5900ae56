"""Routed experts on one rank: tokens sorted by expert, products of each group of them, and their weighted sums.

Every rank of a tensor-parallel group has all rows: each adds what its own experts, or its part of each, make of them,
and the group's sum combines them. Under Megatron's sequence parallelism that is an all-gather before and a
reduce-scatter after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from profiler.kernels.elementwise import silu_product
from profiler.kernels.entry import Product
from profiler.model.experts import ExpertGate, ExpertsMLP, Router, Scoring


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """Those of the experts that a rank holds, E of them, each F of its features.

    gate_up [E, 2 F, hidden], down [E, hidden, F], with biases [E, 2 F] and [E, hidden] if there are any: the latter on
    one rank of those that share an expert.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


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

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [T, hidden] -> this rank's part of the sum [T, hidden]."""
        experts, weights = route(self.spec.router, self.router(x), self.choice_bias)
        out = self.routed(x, experts, weights)
        if self.shared is not None:
            gate_up, down = self.shared
            added = down(silu_product(gate_up(x)))
            out += added if self.shared_gate is None else torch.sigmoid(self.shared_gate(x)) * added
        return out

    def routed(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """What the held experts make of x [T, hidden], by the experts [T, k] of each token and their weights."""
        held, per_token = self.weights.down.shape[0], experts.shape[1]
        local = experts.flatten() - self.first
        local = torch.where((local >= 0) & (local < held), local, held)
        order = torch.argsort(local, stable=True)
        counts = torch.bincount(local, minlength=held + 1)[:held]
        ends = counts.cumsum(0).to(torch.int32)
        order = order[: int(ends[-1])]
        rows = order // per_token
        made = self._each(x[rows], ends, local[order])
        made *= weights.flatten()[order, None].to(made.dtype)
        return torch.zeros_like(x).index_add_(0, rows, made)

    def _each(self, x: torch.Tensor, ends: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """Rows [N, hidden] sorted by expert, those of each up to its end -> [N, hidden]."""
        weights = self.weights
        gate_up = grouped_product(x, weights.gate_up, ends)
        if weights.gate_up_bias is not None:
            gate_up += weights.gate_up_bias[expert]
        made = grouped_product(self._gated(gate_up), weights.down, ends)
        return made if weights.down_bias is None else made.add_(weights.down_bias[expert])

    def _gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.spec.gate is ExpertGate.SILU:
            return silu_product(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.spec.limit), up.clamp(-self.spec.limit, self.spec.limit)
        return (up + 1.0) * gate * torch.sigmoid(gate * self.spec.alpha)


def route(router: Router, logits: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """logits [T, experts] -> the experts of each token [T, k] int64 and their weights in float32."""
    logits = logits.float()
    if router.scoring is Scoring.CHOSEN:
        best, experts = logits.topk(router.per_token, dim=-1)
        return experts, torch.softmax(best, dim=-1) * router.scale
    scores = torch.softmax(logits, dim=-1) if router.scoring is Scoring.SOFTMAX else torch.sigmoid(logits)
    wanted = scores if bias is None else scores + bias.float()
    if router.groups > 1:
        grouped = wanted.view(wanted.shape[0], router.groups, -1)
        of_group = grouped.topk(router.best_of_group, dim=-1).values.sum(dim=-1)
        opened = torch.zeros_like(of_group, dtype=torch.bool)
        opened.scatter_(1, of_group.topk(router.groups_per_token, dim=-1).indices, True)
        wanted = grouped.masked_fill(~opened[..., None], -torch.inf).flatten(1)
    experts = wanted.topk(router.per_token, dim=-1).indices
    weights = scores.gather(1, experts)
    if router.normalized:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return experts, weights * router.scale


def grouped_product(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Rows x [N, K] up to each end by that expert's weight [E, M, K] -> [N, M]; experts without rows cost nothing."""
    return F.grouped_mm(x, weights.transpose(1, 2), offs=ends)
