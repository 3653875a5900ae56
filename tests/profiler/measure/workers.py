"""Functions that tests run on ranks."""

from __future__ import annotations

from unittest.mock import patch

from profiler.comm.ranks.rank import RankContext
from profiler.measure.session import ProfileJob, RankSession, profile_rank
from profiler.measure.timing import Prepared
from profiler.points.point import Op, Point


def products_do_not_fit(context: RankContext, job: ProfileJob) -> int:
    """The last rank has no memory for products."""
    prepare = RankSession.prepare

    def prepare_or_fail(session: RankSession, point: Point) -> Prepared:
        if point.op is Op.MATMUL and context.rank == context.world_size - 1:
            raise MemoryError
        return prepare(session, point)

    with patch.object(RankSession, "prepare", prepare_or_fail):
        return profile_rank(context, job)
