"""What inputs ask of the ranks that share the rows of a round: the exchanges of sequence parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Wait = Callable[[], torch.Tensor]
"""Waits for an exchange that was begun (on a card the current stream does, not the host), and returns its result."""


class RowGroup(Protocol):
    """Ranks that share rows. Every rank calls the same exchanges in the same order, with tensors of the same size."""

    size: int
    rank: int  # this rank's place among them

    def new_part(self, like: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Where this rank lays what it gathers next, of `like`'s type; empty. `release` follows the gather."""

    def release(self) -> None:
        """What was gathered last has been read."""

    def begin_gather(self, tensor: torch.Tensor) -> Wait:
        """Begin to stack the tensors of all ranks: [...] -> [size, ...]."""

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same, waited for."""

    def sum(self, partial: torch.Tensor) -> torch.Tensor:
        """The sum of all ranks' tensors, in place."""

    def exchange(self, parts: Sequence[torch.Tensor], received: Sequence[int]) -> list[torch.Tensor]:
        """Send part i to rank i; received: how many numbers each rank sends here -> flat tensors, one a rank."""

    def begin_pass_on(self, sent: torch.Tensor, arrived: torch.Tensor) -> Wait:
        """Begin to send to the next rank in a ring, and to receive as much from the rank before; both stay as they are
        until it has been waited for."""
