"""Experts spread over ranks that share the rows of a round: rows go to their experts by all-to-all, and come back."""

from __future__ import annotations

from collections.abc import Callable

import torch

from profiler.experts.experts import Experts
from profiler.layers.row_group import RowGroup


class ExpertExchange:
    """The experts of one layer, whole or in parts, on the ranks of a group of which each has rows of its own.

    A row goes once to each rank that holds some of its experts, with its choice, and that rank's weighted sum comes
    back. How many go is told beforehand, so that messages are as long as they must be: none where nothing goes.
    """

    def __init__(
        self, experts: Experts, group: RowGroup, reduce: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        """reduce: sums parts of each expert over ranks that have the same rows, where those cut it."""
        self.experts, self.group, self.reduce = experts, group, reduce
        self.owner = torch.tensor(experts.spec.owners)  # [experts]: the rank of the group that holds each

    def __call__(self, x: torch.Tensor, *, num_tokens: int, is_cut: bool) -> torch.Tensor:
        """Rows x [P, hidden] of this rank, or of all where none are cut -> their sums [P, hidden].

        num_tokens: rows that are tokens; those behind them go to no expert.
        """
        chosen, weights = self.experts.choose(x)
        if is_cut:
            made = self._exchanged(x, chosen[:num_tokens], weights[:num_tokens])
        else:
            made = self.group.sum(self.experts.routed(x, chosen, weights))
        made = self.experts.with_shared(made, x)
        return made if self.reduce is None else self.reduce(made)

    def _exchanged(self, x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """chosen [T, k] int64, weights [T, k] float32, of the first rows of x [P, hidden]."""
        group, width, per_token = self.group, x.shape[1], chosen.shape[1]
        owner = self.owner[chosen]
        going = [(owner == rank).any(dim=1).nonzero().flatten() for rank in range(group.size)]
        counts = group.gather(torch.tensor([rows.shape[0] for rows in going]))[:, group.rank].tolist()
        choices = torch.cat([chosen.to(weights.dtype), weights], dim=1)  # experts' numbers are exact in float32
        came = torch.cat(group.exchange([x[rows] for rows in going], [count * width for count in counts]))
        told = torch.cat(
            group.exchange([choices[rows] for rows in going], [count * 2 * per_token for count in counts])
        ).view(-1, 2 * per_token)
        made = self.experts.routed(came.view(-1, width), told[:, :per_token].long(), told[:, per_token:])
        back = group.exchange(made.split(counts), [rows.shape[0] * width for rows in going])
        out = torch.zeros_like(x)
        for rows, part in zip(going, back, strict=True):
            out.index_add_(0, rows, part.view(-1, width))
        return out
