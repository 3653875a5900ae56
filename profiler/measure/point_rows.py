"""Rows of a measured point: the slowest rank's timing and, for work under its own load, each rank's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from db.rows.measurements import Measurement
from db.store.provenance import code_version, now
from profiler.measure.timing import Samples, Timing, summarize
from profiler.points.point import RANK_LAYER, Point


def rows_of(point: Point, samples: Sequence[Samples], timing: Timing, *, own_load: bool) -> list[Measurement]:
    """A point's row; for work under its own load on several ranks (one card each) also a row for each rank."""
    rows = [row_of(point, timing)]
    if own_load and len(samples) > 1:
        rows += [rank_row(point, rank, summarize(mine)) for rank, mine in enumerate(samples)]
    return rows


def row_of(point: Point, timing: Timing) -> Measurement:
    """The row of a point that was just measured."""
    return Measurement(
        op=point.op,
        dtype=point.dtype,
        shape=point.shape,
        group_size=point.group_size,
        busy_ranks=point.busy_ranks,
        variant=point.variant,
        num_samples=timing.num_samples,
        median_us=timing.median_us,
        p10_us=timing.p10_us,
        p90_us=timing.p90_us,
        min_us=timing.min_us,
        std_us=timing.std_us,
        noisy=timing.noisy,
        measured_at=now(),
        code_version=code_version(),
    )


def rank_row(point: Point, rank: int, timing: Timing) -> Measurement:
    """The row of one rank of a layer point, whose own row is that of the slowest rank."""
    return replace(row_of(point, timing), op=RANK_LAYER, shape={**point.shape, "rank": rank})
