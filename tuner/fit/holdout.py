"""Leave-one-out errors of the fits: each measured point is left out once and predicted from the others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from db.rows.measurements import Measurement
from profiler.points.point import Op
from profiler.sequence.kind import SPKind
from tuner.fit.attention.rows import AttentionRows, attention_rows
from tuner.fit.curve import fit_means, fit_rows
from tuner.fit.rows import RankWork, Rows, expected_s
from tuner.fit.sequence.messages import LayerMessage, layer_messages, message_rows

WIDEST_GAP = 4  # leaving a point out may open a gap of this ratio, twice the profile's own finest
UNTESTED = 0.1  # the error of an operation none of whose points can be left out
Seconds = Callable[[float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutError:
    """Relative errors of one operation's left-out points; UNTESTED where there are none.

    The ends of a range are not left out (that would be extrapolation), nor points in a grid still too coarse, nor
    those that disagree with themselves.
    """

    op: str
    num_points: int
    median: float
    p90: float
    worst: float
    of_layer: float
    """Median of the errors in relation to a whole layer, of which the operation is a part, at the same point."""

    def to_json(self) -> dict[str, float | int | str]:
        """The same as a JSON object."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A point that was left out: how far off the fit was there, and the point's part of a layer's time."""

    row: Measurement
    error: float
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOutPoints:
    """An operation's points that were left out, and the shares of a layer's time of all its points."""

    op: str
    points: list[LeftOut]
    shares: list[float]


def held_out_errors(measurements: Sequence[Measurement], work: RankWork, *, busy_ranks: int) -> list[HeldOutError]:
    """Leave-one-out errors of the fits behind `tuner.fit.layer_fit.fit_layer_costs`, by operation."""
    kinds = [leave_out(measurements, kind, busy_ranks=busy_ranks) for kind in work.kinds]
    if len(kinds) == 1:
        return [_summary(tested) for tested in kinds[0]]
    merged: dict[str, LeftOutPoints] = {}
    for tested in (one for kind in kinds for one in kind):
        known = merged.setdefault(tested.op, LeftOutPoints(op=tested.op, points=[], shares=[]))
        known.points.extend(tested.points)
        known.shares.extend(tested.shares)
    return [_summary(tested) for tested in merged.values()]


def leave_out(measurements: Sequence[Measurement], work: RankWork, *, busy_ranks: int) -> list[LeftOutPoints]:
    """The points behind `held_out_errors`, of each operation that was measured."""
    rows, ranks = Rows(measurements), work.stage_size
    products = [
        rows.select("matmul", sizes, busy_ranks=busy_ranks, variant=variant) for sizes, variant in work.projection_rows
    ]
    elementwise = rows.select("elementwise", work.layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant)
    parts = [fit_rows(found, "m", ranks=ranks) for found in products if found]
    parts += [fit_rows(elementwise, "tokens", ranks=ranks)] if elementwise else []

    def compute_s(tokens: float) -> float:
        return sum(float(part(tokens)) for part in parts)

    def share_of(row: Measurement, at: str) -> float:
        return expected_s(row, ranks=ranks) / compute_s(row.shape[at])

    found = [
        LeftOutPoints(
            op="matmul",
            points=[point for mine in products for point in _curve_errors(mine, "m", share_of, ranks)],
            shares=[share_of(row, "m") for mine in products for row in mine],
        ),
        LeftOutPoints(
            op="elementwise",
            points=_curve_errors(elementwise, "tokens", share_of, ranks),
            shares=[share_of(row, "tokens") for row in elementwise],
        ),
    ]
    if work.layer.experts is not None:
        routed = rows.select("experts", work.expert_sizes, busy_ranks=busy_ranks, variant=None)
        found.append(_spread_of_routers(routed, share_of, ranks))
    attended = attention_rows(rows, work, busy_ranks=busy_ranks)
    if attended:
        found.append(_leave_attention_out(AttentionRows(attended, work), compute_s))
    if work.tp_size > 1 and work.sp_kind is not SPKind.MEGATRON:
        reduced = rows.select("all_reduce", {}, busy_ranks=busy_ranks, group_size=work.tp_size)
        sums = LayerMessage(op=Op.ALL_REDUCE, token_bytes=work.hidden_bytes, count=2)
        found.append(_leave_messages_out(reduced, sums, compute_s))
    for message in layer_messages(work):
        sent = message_rows(rows, message.op, work, busy_ranks=busy_ranks)
        found.append(_leave_messages_out(sent, message, compute_s))
    return [tested for tested in found if tested.shares]


def _spread_of_routers(
    rows: Sequence[Measurement], share_of: Callable[[Measurement, str], float], ranks: int
) -> LeftOutPoints:
    """How far each spread of tokens over experts is from what plans are made with, the mean of all measured."""
    if not rows:
        return LeftOutPoints(op="experts", points=[], shares=[])
    curve = fit_means(rows, "tokens", ranks=ranks)
    points = [
        LeftOut(
            row=row,
            error=float(curve(row.shape["tokens"])) / expected_s(row, ranks=ranks) - 1.0,
            share=share_of(row, "tokens"),
        )
        for row in rows
        if not row.noisy
    ]
    return LeftOutPoints(op="experts", points=points, shares=[share_of(row, "tokens") for row in rows])


def _leave_messages_out(rows: Sequence[Measurement], message: LayerMessage, compute_s: Seconds) -> LeftOutPoints:
    def share_of(row: Measurement, at: str) -> float:
        sent_s = message.count * expected_s(row)
        return sent_s / (sent_s + compute_s(row.shape[at] / message.token_bytes))

    return LeftOutPoints(
        op=message.op,
        points=_curve_errors(rows, "bytes", share_of, 1),
        shares=[share_of(row, "bytes") for row in rows],
    )


def _curve_errors(
    rows: Sequence[Measurement], at: str, share_of: Callable[[Measurement, str], float], ranks: int
) -> list[LeftOut]:
    ordered = sorted(rows, key=lambda row: row.shape[at])
    found = []
    for before, left_out, after in zip(ordered, ordered[1:], ordered[2:], strict=False):
        if left_out.noisy or after.shape[at] > WIDEST_GAP * before.shape[at]:
            continue
        curve = fit_rows([row for row in ordered if row is not left_out], at, ranks=ranks)
        error = float(curve(left_out.shape[at])) / expected_s(left_out, ranks=ranks) - 1.0
        found.append(LeftOut(row=left_out, error=error, share=share_of(left_out, at)))
    return found


def _leave_attention_out(attention: AttentionRows, compute_s: Seconds) -> LeftOutPoints:
    """A context between others of its chunk is left out alone; a chunk between others with all its contexts."""
    by_chunk: dict[int, list[Measurement]] = {}
    for row in attention.chosen:
        by_chunk.setdefault(row.shape["chunk"], []).append(row)
    chunks, ranks = sorted(by_chunk), attention.work.stage_size
    tests = [
        [left_out]
        for mine in by_chunk.values()
        for left_out in sorted(mine, key=lambda row: row.shape["context"])[1:-1]
    ]
    tests += [
        by_chunk[chunk]
        for before, chunk, after in zip(chunks, chunks[1:], chunks[2:], strict=False)
        if after <= WIDEST_GAP * before
    ]

    def share_of(row: Measurement) -> float:
        seconds = expected_s(row, ranks=ranks)
        return seconds / (seconds + compute_s(row.shape["chunk"]))

    found = []
    for left_out in tests:
        gone = set(map(id, left_out))
        curve = attention.fit([row for row in attention.chosen if id(row) not in gone])
        for row in left_out:
            if not row.noisy:
                predicted_s = float(curve(row.shape["chunk"], row.shape["context"]))
                error = predicted_s / expected_s(row, ranks=ranks) - 1.0
                found.append(LeftOut(row=row, error=error, share=share_of(row)))
    return LeftOutPoints(op="attention", points=found, shares=[share_of(row) for row in attention.chosen])


def _summary(tested: LeftOutPoints) -> HeldOutError:
    size, shares = np.abs([point.error for point in tested.points]), [point.share for point in tested.points]
    if not tested.points:
        size, shares = np.full(len(tested.shares), UNTESTED), tested.shares
    return HeldOutError(
        op=tested.op,
        num_points=len(tested.points),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        worst=float(size.max()),
        of_layer=float(np.median(size * shares)),
    )
