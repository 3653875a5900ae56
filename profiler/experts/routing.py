"""The experts of each token and their weights, as a router's logits say."""

from __future__ import annotations

import torch

from profiler.model.experts import Router, Scoring


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
