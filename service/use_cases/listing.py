"""What `isochunk db list` shows of each kind of row: everything as JSON, the telling columns as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from db.store.engine import Database


class Kept(StrEnum):
    """What the database keeps."""

    HARDWARE = "hardware"
    MEASUREMENTS = "measurements"
    PLANS = "plans"
    RUNS = "runs"
    PROCESSES = "processes"
    FITS = "fits"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of its table."""
        return _COLUMNS[self]


# In the order of their worth: a page has no room for all.
_COLUMNS = {
    Kept.HARDWARE: (
        "id", "device", "device_count", "num_measurements", "last_measured_at", "link", "memory_gib", "torch_version",
        "backend", "num_threads", "driver",
    ),
    Kept.MEASUREMENTS: (
        "hardware_id", "op", "shape_text", "median_us", "noisy", "dtype", "group_size", "busy_ranks", "variant",
        "p10_us", "p90_us", "num_samples", "measured_at", "source",
    ),
    Kept.PLANS: (
        "id", "model", "policy", "predicted_s", "tp_size", "pp_size", "sp_size", "sp_kind", "virtual_stages",
        "num_requests", "num_rounds", "window", "precision", "num_runs", "created_at",
    ),
    Kept.RUNS: (
        "id", "plan_id", "kind", "status", "makespan_s", "predicted_makespan_s", "mfu", "started_at", "hardware_id",
        "study", "error",
    ),
    Kept.PROCESSES: ("id", "command", "status", "started_at", "finished_at", "pid", "host", "error"),
    Kept.FITS: ("id", "hardware_id", "model_name", "dtype", "created_at", "code_version"),
}  # fmt: skip


def kept_rows(database: Database, kept: Kept, hardware_id: int | None, limit: int) -> list[dict[str, Any]]:
    """The newest rows of a kind, only those of a hardware if it is given. Raises UserError for an unknown hardware."""
    from db.rows.fits import list_fits
    from db.rows.hardware import get_hardware, list_hardware
    from db.rows.plans import list_plan_rows
    from db.rows.processes import list_processes
    from db.rows.runs import list_runs

    hardware = None if hardware_id is None else get_hardware(database, hardware_id)
    match kept:
        case Kept.HARDWARE:
            known = [row for row in list_hardware(database) if hardware_id in (None, row.id)]
            rows = [asdict(row.hardware) | asdict(row) for row in reversed(known[-limit:])]
            return [{**row, "memory_gib": round(row["memory_bytes"] / 2**30, 1)} for row in rows]
        case Kept.MEASUREMENTS:
            return _measurements(database, hardware_id, limit)
        case Kept.PLANS:
            plans = list_plan_rows(database, hardware=hardware, limit=limit)
            return [asdict(row) | plan_summary(row.plan) for row in plans]
        case Kept.RUNS:
            runs = [asdict(row) for row in list_runs(database, hardware=hardware, limit=limit)]
            return _with_lost(database, runs, "process_id")
        case Kept.PROCESSES:
            return _with_lost(database, [asdict(row) for row in list_processes(database, limit=limit)], "id")
        case Kept.FITS:
            return [asdict(row) for row in list_fits(database, hardware=hardware, limit=limit)]


def _with_lost(database: Database, rows: list[dict[str, Any]], owner: str) -> list[dict[str, Any]]:
    """The rows; those whose process is gone are lost, whether or not the database says so yet."""
    from db.store.engine import lost_processes
    from db.store.tables import RunStatus

    lost = set(lost_processes(database))
    gone = [row for row in rows if row[owner] in lost and row["status"] is RunStatus.RUNNING]
    for row in gone:
        row["status"] = RunStatus.LOST
    return rows


def _measurements(database: Database, hardware_id: int | None, limit: int) -> list[dict[str, Any]]:
    from db.rows.hardware import list_hardware
    from db.rows.measurements import load_measurements

    rows = [
        asdict(point) | {"hardware_id": owner.id, "shape_text": point.key.shape}
        for owner in list_hardware(database)
        if hardware_id in (None, owner.id)
        for point in load_measurements(database, owner.hardware)
    ]
    return sorted(rows, key=lambda row: row["measured_at"], reverse=True)[:limit]


def plan_summary(plan: Mapping[str, Any]) -> dict[str, Any]:
    """What tells plans apart at a glance; the file's optional fields may be missing."""
    parallel = plan.get("parallel") or {}
    return {
        "model": (plan.get("model") or {}).get("name"),
        "precision": plan.get("precision"),
        **{name: parallel.get(name) for name in ("tp_size", "pp_size", "sp_size", "sp_kind", "virtual_stages")},
        "policy": plan.get("policy"),
        "num_requests": len(plan.get("requests") or ()),
        "num_rounds": len(plan.get("rounds") or ()),
        "window": plan.get("window"),
        "predicted_s": (plan.get("predicted") or {}).get("makespan_s"),
        "uncertainty": (plan.get("predicted") or {}).get("uncertainty"),
    }
