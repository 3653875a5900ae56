"""Groups of ranks whose collectives are measured: how many ranks, and how far apart they stand."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class RankGroups:
    """All groups of one form in a world: rank r with r + stride, r + 2 stride, ...

    Tensor-parallel neighbours have stride 1; ranks that share rows beside tensor parallelism stand tp_size apart.
    """

    size: int
    stride: int = 1

    def busy(self, world_size: int) -> int:
        """Ranks that are in a group; those left over come last."""
        return world_size // (self.size * self.stride) * self.size * self.stride

    def of(self, world_size: int) -> list[tuple[int, ...]]:
        """The ranks of each group, in ascending order of their first."""
        block = self.size * self.stride
        return [
            tuple(range(first, first + block, self.stride))
            for start in range(0, self.busy(world_size), block)
            for first in range(start, start + self.stride)
        ]
