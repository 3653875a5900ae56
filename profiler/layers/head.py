"""The two ends of a model: token embedding before the first layer, final norm and greedy choice after the last."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from profiler.kernels.elementwise import rms_norm
from profiler.kernels.entry import Product

GatherRanks = Callable[[torch.Tensor], torch.Tensor]


def embed(weight: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """weight: [V, hidden], token_ids: [T] -> [T, hidden]."""
    return F.embedding(token_ids, weight)


class Head:
    """Chooses the next token of the requests whose last prompt token is in the round.

    Each rank of a tensor-parallel group holds a slice of the vocabulary beginning at `first_id`; the group exchanges
    one (value, id) pair a row instead of the logits. `gather` stacks a tensor of all ranks along a new first dimension.
    """

    def __init__(
        self, norm: torch.Tensor, eps: float, logits: Product, *, first_id: int, gather: GatherRanks | None
    ) -> None:
        self.norm, self.eps, self.logits = norm, eps, logits
        self.first_id, self.gather = first_id, gather

    def local_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, hidden], one row a request -> this rank's logits [R, V / tp_size]."""
        return self.logits(rms_norm(hidden, self.norm, self.eps))

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden: [R, hidden] -> ids of the largest logit [R] int64, the smallest id among equals."""
        value, index = self.local_logits(hidden).float().max(dim=-1)
        if self.gather is None:
            return index
        # float64 holds every float32 value and every id exactly.
        pairs = self.gather(torch.stack((value.double(), (index + self.first_id).double())))  # [ranks, 2, R]
        best_rank = pairs[:, 0].argmax(dim=0)
        return pairs[:, 1].gather(0, best_rank[None]).squeeze(0).long()
