"""Functions that tests run on ranks."""

from __future__ import annotations

from unittest.mock import patch

import torch
import torch.distributed as dist

from profiler.comm.ranks.rank import RankContext
from profiler.measure.leader import profile_rank
from profiler.measure.operations.collectives import collective_groups, prepare_collective
from profiler.measure.session import ProfileJob, RankSession
from profiler.measure.timing import Prepared
from profiler.model import PRECISIONS
from profiler.points.point import Op, Point, strided
from profiler.points.rank_groups import RankGroups


def products_do_not_fit(context: RankContext, job: ProfileJob) -> int:
    """The last rank has no memory for products."""
    prepare = RankSession.prepare

    def prepare_or_fail(session: RankSession, point: Point) -> Prepared:
        if point.op is Op.MATMUL and context.rank == context.world_size - 1:
            raise MemoryError
        return prepare(session, point)

    with patch.object(RankSession, "prepare", prepare_or_fail):
        return profile_rank(context, job)


def ranks_gathered(context: RankContext, forms: list[RankGroups]) -> list[tuple[int, ...]]:
    """The ranks that this rank's group of each form gathers, in order; every collective of the form runs, too."""
    found = []
    for form, group in collective_groups(forms, context.world_size).items():
        gathered = [torch.zeros(1, dtype=torch.int64) for _ in range(form.size)]
        dist.all_gather(gathered, torch.tensor([context.rank]), group=group.group)
        found.append(tuple(int(rank) for rank in gathered))
        for op in (Op.ALL_GATHER, Op.REDUCE_SCATTER, Op.ALL_TO_ALL, Op.ALL_REDUCE):
            point = Point(
                op=op, dtype="float32", shape={"bytes": 48 * form.size}, group_size=form.size,
                variant=strided("", form.stride), busy_ranks=form.busy(context.world_size),
            )  # fmt: skip
            assert point.ranks == form
            prepare_collective(point, group, context.device, PRECISIONS["float32"].reductions).run(0)
    return found
