"""Reads stored rows: hardware, measurements, fits and runs with their rounds."""

from __future__ import annotations

import json
from typing import Annotated

from fastapi import Path, Query
from starlette.responses import Response

from db.rows.fits import StoredFit, list_fits
from db.rows.hardware import Hardware, StoredHardware, get_hardware
from db.rows.measurements import StoredMeasurement, page_measurements
from db.rows.plans import find_plan
from db.rows.runs import RoundTime, StoredRun, find_run, list_runs, load_round_times
from db.store.engine import Database
from runtime.run.trace import trace_of
from service.http.door.access import Scope, open_to
from service.http.pages import MOST_ID, Cursor, Limit, Page, before_of, page_of
from service.http.problems import missing
from service.http.routes.router import api_router
from service.http.state import Shared
from service.use_cases.coverage import OpCoverage, coverage
from service.use_cases.models import KnownModel, known_models, model_path
from tuner.plan.plan import Plan

router = api_router("kept")
Id = Annotated[int, Path(ge=0, le=MOST_ID)]
OfHardware = Annotated[int | None, Query(ge=0, le=MOST_ID, description="Only what belongs to this hardware.")]


@router.get("/hardware")
@open_to(Scope.READ)
def read_all_hardware(service: Shared) -> list[StoredHardware]:
    """All hardware that something is kept of, in the order it was first seen."""
    return service.hardware.read()


@router.get("/hardware/{hardware_id}")
@open_to(Scope.READ)
def read_hardware(hardware_id: Id, service: Shared) -> StoredHardware:
    """One hardware."""
    for row in service.hardware.read():
        if row.id == hardware_id:
            return row
    raise missing("hardware", hardware_id)


@router.get("/hardware/{hardware_id}/coverage")
@open_to(Scope.READ)
def read_coverage(
    hardware_id: Id,
    service: Shared,
    model: Annotated[str, Query(max_length=200, description="A model that may be named (GET /models).")],
) -> list[OpCoverage]:
    """What of a model was measured on a hardware, and what a profile would still measure."""
    return coverage(service.database, hardware_id, model_path(service.model_folders, model))


@router.get("/measurements")
@open_to(Scope.READ)
def read_measurements(
    service: Shared,
    hardware: OfHardware = None,
    op: Annotated[str | None, Query(max_length=64, pattern=r"^[\w.-]*$")] = None,
    limit: Limit = 50,
    cursor: Cursor = None,
) -> Page[StoredMeasurement]:
    """Measured points, the last kept first."""
    before = before_of(cursor)
    rows = page_measurements(service.database, hardware_id=hardware, op=op, before=before, limit=limit + 1)
    return page_of(rows, limit, lambda row: row)


@router.get("/fits")
@open_to(Scope.READ)
def read_fits(
    service: Shared, hardware: OfHardware = None, limit: Limit = 20, cursor: Cursor = None
) -> Page[StoredFit]:
    """Fitted cost models with their held-out errors, newest first."""
    of = owner(service.database, hardware)
    rows = list_fits(service.database, hardware=of, before=before_of(cursor), limit=limit + 1)
    return page_of(rows, limit, lambda row: row)


@router.get("/models")
@open_to(Scope.READ)
def read_models(service: Shared) -> list[KnownModel]:
    """Models that may be named."""
    return known_models(service.model_folders)


@router.get("/runs")
@open_to(Scope.READ)
def read_runs(
    service: Shared,
    plan: Annotated[int | None, Query(ge=0, le=MOST_ID)] = None,
    hardware: OfHardware = None,
    limit: Limit = 20,
    cursor: Cursor = None,
) -> Page[StoredRun]:
    """Runs of plans, newest first."""
    of = owner(service.database, hardware)
    rows = list_runs(service.database, plan_id=plan, hardware=of, before=before_of(cursor), limit=limit + 1)
    return page_of(rows, limit, lambda row: row)


@router.get("/runs/{run_id}")
@open_to(Scope.READ)
def read_run(run_id: Id, service: Shared) -> StoredRun:
    """One run."""
    run = find_run(service.database, run_id)
    if run is None:
        raise missing("run", run_id)
    return run


@router.get("/runs/{run_id}/rounds")
@open_to(Scope.READ)
def read_rounds(run_id: Id, service: Shared) -> list[RoundTime]:
    """When each round of a run started and ended on each stage, in seconds from the run's start."""
    if find_run(service.database, run_id) is None:
        raise missing("run", run_id)
    return load_round_times(service.database, run_id)


@router.get("/runs/{run_id}/trace", response_class=Response)
@open_to(Scope.READ)
def read_run_trace(run_id: Id, service: Shared) -> Response:
    """A run beside its prediction as a Chrome Trace file, which Perfetto opens."""
    run = find_run(service.database, run_id)
    plan = None if run is None else find_plan(service.database, run.plan_id)
    if plan is None:
        raise missing("run", run_id)
    content = trace_of(Plan.from_json(plan), load_round_times(service.database, run_id))
    headers = {"content-disposition": f'attachment; filename="run-{run_id}.trace.json"'}
    return Response(json.dumps(content), media_type="application/json", headers=headers)


def owner(database: Database, hardware_id: int | None) -> Hardware | None:
    """The hardware of an id that a caller names."""
    return None if hardware_id is None else get_hardware(database, hardware_id)
