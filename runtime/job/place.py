"""Where a rank stands: its stage, its place among the stage's ranks, and the layers it holds."""

from __future__ import annotations

from dataclasses import dataclass

from profiler.comm.links.mesh import Mesh
from tuner.plan.plan import Parallel


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One rank of a plan, laid out as in `Mesh`."""

    stage: int
    sp_rank: int
    tp_rank: int
    parallel: Parallel

    @classmethod
    def of(cls, rank: int, parallel: Parallel) -> Place:
        """The place of global rank `rank`."""
        stage, sp_rank, tp_rank = mesh_of(parallel).place(rank)
        return cls(stage=stage, sp_rank=sp_rank, tp_rank=tp_rank, parallel=parallel)

    @property
    def is_first(self) -> bool:
        """Whether the stage embeds the tokens."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether the stage chooses the next tokens."""
        return self.stage == self.parallel.pp_size - 1

    @property
    def layers(self) -> range:
        """Indices of the stage's layers in the model."""
        partition = self.parallel.layer_partition
        first = sum(partition[: self.stage])
        return range(first, first + partition[self.stage])


def mesh_of(parallel: Parallel) -> Mesh:
    """Where the ranks of a layout stand."""
    return Mesh(pp_size=parallel.pp_size, sp_size=parallel.sp_size, tp_size=parallel.tp_size)
