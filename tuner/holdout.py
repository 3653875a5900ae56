"""How well the fits predict points that they have not seen: each measured point left out once, the rest fitted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from db.measurements import Measurement
from tuner.attention_rows import AttentionRows
from tuner.curve import fit_curve
from tuner.rows import RankWork, Rows, expected_s

WIDEST_GAP = 4  # leaving a point out may open a gap of this ratio, twice the profile's own finest


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

    def to_json(self) -> dict[str, float | int | str]:
        """The same as a JSON object."""
        return {
            "op": self.op, "num_points": self.num_points, "median": self.median, "p90": self.p90, "worst": self.worst,
        }  # fmt: skip


def held_out_errors(measurements: Sequence[Measurement], work: RankWork, *, busy_ranks: int) -> list[HeldOutError]:
    """Leave-one-out errors of the fits behind `tuner.fit.fit_layer_costs`, by operation."""
    rows = Rows(measurements)
    errors: dict[str, list[float]] = {}
    for n, k in work.projections:
        found = rows.select("matmul", {"n": n, "k": k}, busy_ranks=busy_ranks)
        errors.setdefault("matmul", []).extend(_curve_errors(found, lambda row: row.shape["m"]))
    found = rows.select("elementwise", work.layer_sizes, busy_ranks=busy_ranks, variant=work.layer_variant)
    errors["elementwise"] = _curve_errors(found, lambda row: row.shape["tokens"])
    found = rows.select("attention", work.attention_sizes, busy_ranks=busy_ranks, variant=None)
    errors["attention"] = _attention_errors(AttentionRows(found, work)) if found else []
    if work.tp_size > 1:
        found = rows.select("all_reduce", {}, busy_ranks=busy_ranks, group_size=work.tp_size)
        errors["all_reduce"] = _curve_errors(found, lambda row: row.shape["bytes"])
    return [_summary(op, values) for op, values in errors.items() if values]


def _curve_errors(rows: Sequence[Measurement], at: Callable[[Measurement], int]) -> list[float]:
    ordered = sorted(rows, key=at)
    errors = []
    for before, left_out, after in zip(ordered, ordered[1:], ordered[2:], strict=False):
        if at(after) > WIDEST_GAP * at(before):
            continue
        rest = [row for row in ordered if row is not left_out]
        curve = fit_curve([at(row) for row in rest], [expected_s(row) for row in rest])
        errors.append(float(curve(at(left_out))) / expected_s(left_out) - 1.0)
    return errors


def _attention_errors(attention: AttentionRows) -> list[float]:
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
    errors = []
    for left_out in tests:
        curve = attention.fit([row for row in attention.chosen if row not in left_out])
        errors += [float(curve(row.shape["chunk"], row.shape["context"])) / expected_s(row) - 1.0 for row in left_out]
    return errors


def _summary(op: str, errors: Sequence[float]) -> HeldOutError:
    size = np.abs(np.asarray(errors))
    return HeldOutError(
        op=op,
        num_points=len(size),
        median=float(np.median(size)),
        p90=float(np.quantile(size, 0.9)),
        worst=float(size.max()),
    )
