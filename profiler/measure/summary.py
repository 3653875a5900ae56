"""Summary of a profile: points by operation, new, noisy and missing, and where they are stored."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from db.rows.hardware import Hardware
from profiler.points.point import Op
from profiler.points.worklist import Worklist


@dataclass(frozen=True, slots=True, kw_only=True)
class OpSummary:
    """The points of one operation; the times are the smallest and the largest median."""

    op: str
    num_points: int
    num_new: int
    num_noisy: int
    num_missing: int
    fastest_us: float | None
    slowest_us: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSummary:
    """A finished profile; `notes` are for people."""

    model: str
    dtype: str
    world_size: int
    tp_sizes: tuple[int, ...]
    context_length: int
    hardware: Hardware
    fingerprint: str
    database: str
    elapsed_s: float
    interrupted: bool
    num_new: int
    num_missing: int
    num_noisy: int
    ops: tuple[OpSummary, ...]
    notes: tuple[str, ...]


def summarize_ops(worklist: Worklist, *, since: datetime) -> tuple[OpSummary, ...]:
    """Count points by operation. Rows measured after `since` are new."""
    missing = list(worklist.missing())
    summaries = []
    for op in Op:
        found = [worklist.rows[point.key] for point in worklist.points if point.op is op and point.key in worklist.rows]
        medians = [row.median_us for row in found]
        summaries.append(
            OpSummary(
                op=op.value,
                num_points=len(found),
                num_new=sum(row.measured_at >= since for row in found),
                num_noisy=sum(row.noisy for row in found),
                num_missing=sum(point.op is op for point in missing),
                fastest_us=min(medians, default=None),
                slowest_us=max(medians, default=None),
            )
        )
    return tuple(summary for summary in summaries if summary.num_points or summary.num_missing)
