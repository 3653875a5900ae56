"""The points still to be measured, in order, without those that measurements have shown to be needless."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from db.rows.measurements import Measurement, MeasurementKey
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.points.kernel_choice import FAR, Contests, KernelChoice, KernelTime, kernel_times
from profiler.points.point import MASKS, Op, Point

# By the nearest point at which several kernels were measured, as all are at the coarsest ones: the usual kernel is not
# followed further when it is so much slower than the best, another one only when it is so much faster than the usual.
_HOPELESS, _PROMISING = 1.15, 0.97


class Worklist:
    """Points in the order of the grid, and the rows that there are."""

    def __init__(self, points: Sequence[Point], rows: Iterable[Measurement], *, usual_kernel: AttentionKernel) -> None:
        self.points, self.usual_kernel = tuple(points), usual_kernel
        self.rows: dict[MeasurementKey, Measurement] = {row.key: row for row in rows}

    def missing(self) -> Iterator[Point]:
        """Points without a row that are worth measuring; considers rows added meanwhile."""
        for point in self.points:
            if point.key not in self.rows and not self.is_needless(point):
                yield point

    def add(self, row: Measurement) -> None:
        """Add a row; of two rows with one key the one with less spread is kept."""
        before = self.rows.get(row.key)
        if before is None or relative_spread(row) <= relative_spread(before):
            self.rows[row.key] = row

    def is_needless(self, point: Point) -> bool:
        """Whether the point is of an attention kernel that another one beats clearly nearby."""
        if point.op is not Op.ATTENTION or point.level == 0:
            return False
        kernel = AttentionKernel(point.variant)
        contests = Contests(_times(self.rows.values(), point.shape, point.busy_ranks))
        chunk = point.shape["chunk"]
        nearest = contests.nearest(chunk, point.shape["context"])
        if nearest is None or not chunk / FAR <= nearest[0] <= chunk * FAR:
            return False
        times = contests.at[nearest]
        if kernel is self.usual_kernel or kernel not in times:
            return kernel in times and times[kernel] > _HOPELESS * min(times.values())
        return times[kernel] > _PROMISING * times.get(self.usual_kernel, math.inf)

    def kernel_choice(self, shape: Mapping[str, int], busy_ranks: int) -> KernelChoice:
        """The best kernels for the heads in `shape` (heads, kv_heads, head_dim), by all rows."""
        return KernelChoice(_times(self.rows.values(), shape, busy_ranks), default=self.usual_kernel)


def _times(rows: Iterable[Measurement], shape: Mapping[str, int], busy_ranks: int) -> list[KernelTime]:
    heads = {name: shape[name] for name in ("heads", "kv_heads", "head_dim")} | dict.fromkeys(MASKS, 0)
    return kernel_times(rows, heads, busy_ranks=busy_ranks)


def relative_spread(row: Measurement) -> float:
    """How far apart p10 and p90 lie, as a share of the median."""
    return (row.p90_us - row.p10_us) / row.median_us if row.median_us else 0.0
