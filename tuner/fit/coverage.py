"""Coverage: which of the points that a plan's prediction depends on were measured."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from db.rows.measurements import Measurement
from profiler.kernels.attention_kernel import AttentionKernel
from profiler.points.grid import Grid
from profiler.points.point import COLLECTIVES, Op, Point
from profiler.sequence.kind import SPKind
from tuner.fit.rows import RankWork
from tuner.fit.uncertainty import Coverage
from tuner.plan.layout import Layout
from tuner.plan.plan import Round

NEAR = 2
"""Points of at most so many times the longest round's tokens, and at least the shortest's over it, are leaned on."""
BESIDE = 2.0
"""A row of at most so many times as many tokens tells of a point: between two of them is a ratio of four at most."""
CONTEXT_SHARE = 0.26
"""Of the longest context: attention of a chunk is linear in it, and the grid has a quarter of it between points."""
_PARTS = (Op.MATMUL, Op.ATTENTION, Op.ELEMENTWISE)
_SIZE = {Op.MATMUL: "m", Op.ATTENTION: "chunk", Op.ELEMENTWISE: "tokens", **dict.fromkeys(COLLECTIVES, "bytes")}


def plan_coverage(
    rows: Sequence[Measurement], work: RankWork, layout: Layout, rounds: Sequence[Round], *, device_type: str
) -> list[Coverage]:
    """Points of the profile's own grid that lie near the rounds on this layout, by operation.

    What the profile was asked for is read from its rows: the longest context and the ranks at work. A point counts as
    measured where a row of the same work has nearly its tokens and context, whichever kernel it ran.
    """
    attention = [row for row in rows if row.op == Op.ATTENTION and row.variant in set(AttentionKernel)]
    if not attention:
        return []
    context_length = max(row.shape["chunk"] + row.shape["context"] for row in attention)
    grid = Grid(
        shape=work.shape,
        dtype=work.dtype,
        tp_sizes=(layout.tp_size,),
        sp_sizes=(layout.sp_size,) if layout.sp_size > 1 else (),
        world_size=max(row.busy_ranks for row in attention),
        context_length=context_length,
        device_type=device_type,
        kernels=(AttentionKernel(attention[0].variant),),
    )
    there: dict[object, list[Measurement]] = defaultdict(list)
    for row in rows:
        if row.op in _SIZE:
            there[_work_of(row)].append(row)
    wanted, missing = Counter[Op](), Counter[Op]()
    for point in _near(grid, work, layout, rounds):
        wanted[point.op] += 1
        missing[point.op] += not any(_is_beside(row, point, context_length) for row in there[_work_of(point)])
    return [Coverage(op=op, num_points=count, num_missing=missing[op]) for op, count in wanted.items()]


def _work_of(point: Point | Measurement) -> tuple[object, ...]:
    """The key of a row's curve: everything but its tokens and its context."""
    sizes = {name: size for name, size in point.shape.items() if name not in (*_SIZE.values(), "context")}
    return (str(point.op), point.group_size, *sorted(sizes.items()))


def _is_beside(row: Measurement, point: Point, context_length: int) -> bool:
    """Whether the row tells of the point: so near that a curve between its rows says what the point takes."""
    size = _SIZE[point.op]
    if not point.shape[size] / BESIDE <= row.shape[size] <= point.shape[size] * BESIDE:
        return False
    far = abs(row.shape.get("context", 0) - point.shape.get("context", 0))
    return far <= CONTEXT_SHARE * context_length


def _near(grid: Grid, work: RankWork, layout: Layout, rounds: Sequence[Round]) -> Iterator[Point]:
    """Points of what the layout runs, at most NEAR times as far from the rounds' tokens."""
    tokens = [sum(chunk.tokens for chunk in chunks) for chunks in rounds]
    least, most = min(tokens) / layout.sp_size / NEAR, NEAR * max(tokens)
    from tuner.fit.sequence.messages import layer_messages  # imports the database

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
