"""Which of the points that a plan's prediction leans on were measured, and which are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import PREFERENCE, AttentionKernel
from profiler.points.grid import Grid
from profiler.points.point import COLLECTIVES, Op, Point
from profiler.points.worklist import Worklist
from profiler.sequence.kind import SPKind
from tuner.fit.rows import RankWork
from tuner.plan.layout import Layout
from tuner.plan.plan import Round

SPARSE, A_GUESS = 0.5, 0.85
"""Of the points that a plan leans on: with a larger share missing, its prediction needs a warning, or is a guess."""
NEAR = 2
"""Points of at most so many times the tokens of the longest round, and at least the shortest over it, are near."""
_PARTS = (Op.MATMUL, Op.ATTENTION, Op.ELEMENTWISE)
_SIZE = {Op.MATMUL: "m", Op.ATTENTION: "chunk", Op.ELEMENTWISE: "tokens"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """The points of one operation near a plan's rounds."""

    op: str
    num_points: int
    num_missing: int

    def to_json(self) -> dict[str, int | str]:
        """The same as a JSON object."""
        return asdict(self)


def share_missing(found: Sequence[Coverage]) -> float:
    """Of all points that a plan leans on."""
    num_points = sum(one.num_points for one in found)
    return sum(one.num_missing for one in found) / num_points if num_points else 0.0


def widened(uncertainty: float, missing: float) -> float:
    """The relative half-width of a prediction with such a share of its points missing: all of it where it is a guess.

    Few points leave few out, so that held-out errors alone would call them good.
    """
    if missing > A_GUESS:
        return max(1.0, uncertainty)
    return 2.0 * uncertainty if missing > SPARSE else uncertainty


def coverage(
    rows: Sequence[Measurement], work: RankWork, layout: Layout, rounds: Sequence[Round], *, device_type: str
) -> list[Coverage]:
    """Points of the profile's own grid that lie near the rounds on this layout, by operation.

    What the profile was asked for is read from its rows: the longest context and the ranks at work.
    """
    attention = [row for row in rows if row.op == Op.ATTENTION and row.variant in set(AttentionKernel)]
    if not attention:
        return []
    kernels = {row.variant for row in attention}
    grid = Grid(
        shape=work.shape,
        dtype=work.dtype,
        tp_sizes=(layout.tp_size,),
        sp_sizes=(layout.sp_size,) if layout.sp_size > 1 else (),
        world_size=max(row.busy_ranks for row in attention),
        context_length=max(row.shape["chunk"] + row.shape["context"] for row in attention),
        device_type=device_type,
        kernels=tuple(kernel for kernel in PREFERENCE if kernel in kernels),
    )
    points = list(_near(grid, work, layout, rounds))
    missing = Counter(point.op for point in Worklist(points, rows, usual_kernel=grid.kernels[0]).missing())
    return [
        Coverage(op=op, num_points=count, num_missing=missing[op])
        for op, count in Counter(point.op for point in points).items()
    ]


def _near(grid: Grid, work: RankWork, layout: Layout, rounds: Sequence[Round]) -> Iterator[Point]:
    tokens = [sum(chunk.tokens for chunk in chunks) for chunks in rounds]
    least, most = min(tokens) / layout.sp_size / NEAR, NEAR * max(tokens)
    from tuner.fit.sequence.messages import layer_messages  # brings SciPy along

    messages = {message.op for message in layer_messages(work)}
    if layout.tp_size > 1 and layout.sp_kind is not SPKind.MEGATRON:
        messages.add(Op.ALL_REDUCE)
    for point in grid.points():
        if point.op in _PARTS:
            if point.group_size == 1 and least <= point.shape[_SIZE[point.op]] <= most:
                yield point
        elif point.op in COLLECTIVES:
            size = point.shape["bytes"] / work.hidden_bytes
            needed = (
                layout.pp_size > 1
                if point.op is Op.SEND_RECV
                else (point.op in messages and point.group_size in (layout.tp_size, layout.sp_size))
            )
            if needed and least <= size <= most:
                yield point
