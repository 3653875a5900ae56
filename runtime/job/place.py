"""A rank's place in the layout: its stage, its index among the stage's ranks, and the layers it holds."""

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
        return self.groups[-1] == self.parallel.num_groups - 1

    @property
    def groups(self) -> tuple[int, ...]:
        """The groups of layers that the stage holds, in the order in which rounds go through them."""
        return tuple(group for group, stage in enumerate(self.parallel.stage_of_group) if stage == self.stage)

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the stage's layers in the model, group after group."""
        partition = self.parallel.layer_partition
        starts = [sum(partition[:group]) for group in self.groups]
        counts = [partition[group] for group in self.groups]
        return tuple(start + index for start, count in zip(starts, counts, strict=True) for index in range(count))

    def layers_of(self, group: int) -> slice:
        """The slice of a group's layers among those of the stage."""
        partition = self.parallel.layer_partition
        first = sum(partition[other] for other in self.groups if other < group)
        return slice(first, first + partition[group])


def mesh_of(parallel: Parallel) -> Mesh:
    """The rank mesh of a layout."""
    return Mesh(
        pp_size=parallel.pp_size,
        sp_size=parallel.sp_size,
        tp_size=parallel.tp_size,
        stage_of_group=parallel.stage_of_group if parallel.virtual_stages > 1 else (),
    )
