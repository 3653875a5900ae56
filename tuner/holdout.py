"""How well the fits predict points that they have not seen: each measured point left out once, the rest fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from db.measurements import Measurement
from tuner.attention_rows import AttentionRows
from tuner.curve import fit_curve
from tuner.rows import RankWork, Rows, expected_s

WIDEST_GAP = 4  # leaving a point out may open a gap of this ratio, twice the profile's own finest
Seconds = Callable[[float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutError:
    """Relative errors of one operation's left-out points.

    The ends of a range are not left out (that would be extrapolation), nor points in a grid still too coarse.
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

    error: float
    share: float


def held_out_errors(measurements: Sequence[Measurement], work: RankWork, *, busy_ranks: int) -> list[HeldOutError]:
    """Leave-one-out errors of the fits behind `tuner.fit.fit_layer_costs`, by operation."""
    rows = Rows(measurements)
    products = [rows.select("matmul", {"n": n, "k": k}, busy_ranks=busy_ranks) for n, k in work.projections]
    elementwise = rows.select("elementwise", work.layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant)
    attention = rows.select("attention", work.attention_sizes, busy_ranks=busy_ranks, variant=None)
    if not all((*products, elementwise, attention)):
        return []
    parts = [_curve(found, lambda row: row.shape["m"]) for found in products]
    parts.append(_curve(elementwise, lambda row: row.shape["tokens"]))

    def compute_s(tokens: float) -> float:
        return sum(part(tokens) for part in parts)

    points = {
        "matmul": [
            point for found in products for point in _curve_errors(found, lambda row: row.shape["m"], compute_s)
        ],
        "elementwise": _curve_errors(elementwise, lambda row: row.shape["tokens"], compute_s),
        "attention": _attention_errors(AttentionRows(attention, work), compute_s),
    }
    if work.tp_size > 1:
        found = rows.select("all_reduce", {}, busy_ranks=busy_ranks, group_size=work.tp_size)
        points["all_reduce"] = _curve_errors(
            found, lambda row: row.shape["bytes"], lambda size: compute_s(size / work.hidden_bytes), times=2
        )
    return [_summary(op, left_out) for op, left_out in points.items() if left_out]


def _curve(rows: Sequence[Measurement], at: Callable[[Measurement], int]) -> Seconds:
    curve = fit_curve([at(row) for row in rows], [expected_s(row) for row in rows])
    return lambda x: float(curve(x))


def _curve_errors(
    rows: Sequence[Measurement], at: Callable[[Measurement], int], layer_s: Seconds, *, times: int = 1
) -> list[LeftOut]:
    """times: how often a layer does the operation beside the rest, which takes layer_s; with 1 it is part of that."""
    ordered = sorted(rows, key=at)
    found = []
    for before, left_out, after in zip(ordered, ordered[1:], ordered[2:], strict=False):
        if at(after) > WIDEST_GAP * at(before):
            continue
        curve = _curve([row for row in ordered if row is not left_out], at)
        seconds = expected_s(left_out)
        beside = layer_s(at(left_out)) + (times * seconds if times > 1 else 0.0)
        found.append(LeftOut(error=curve(at(left_out)) / seconds - 1.0, share=times * seconds / beside))
    return found


def _attention_errors(attention: AttentionRows, compute_s: Seconds) -> list[LeftOut]:
    """A context between others of its chunk is left out alone; a chunk between others with all its contexts."""
    by_chunk: dict[int, list[Measurement]] = {}
    for row in attention.chosen:
        by_chunk.setdefault(row.shape["chunk"], []).append(row)
    chunks = sorted(by_chunk)
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
    found = []
    for left_out in tests:
        curve = attention.fit([row for row in attention.chosen if row not in left_out])
        for row in left_out:
            chunk, seconds = row.shape["chunk"], expected_s(row)
            error = float(curve(chunk, row.shape["context"])) / seconds - 1.0
            found.append(LeftOut(error=error, share=seconds / (seconds + compute_s(chunk))))
    return found


def _summary(op: str, left_out: Sequence[LeftOut]) -> HeldOutError:
    size = np.abs([point.error for point in left_out])
    return HeldOutError(
        op=op,
        num_points=len(size),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        worst=float(size.max()),
        of_layer=float(np.median(size * [point.share for point in left_out])),
    )
