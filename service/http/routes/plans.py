"""Plans: made, compared, stored, read, and downloaded as files."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, cast

from fastapi import Body
from pydantic import BaseModel, Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from db.errors import UserError
from db.rows.plans import StoredPlan, find_plan, list_plan_rows
from service.engines.export import Engine, Export, export
from service.http.bodies import body_of
from service.http.door.access import Scope, open_to
from service.http.pages import Cursor, Limit, Page, before_of, page_of
from service.http.planning.request import MadePlan, PlanRequest, timeline_of
from service.http.problems import missing
from service.http.routes.kept import Id, OfHardware, owner
from service.http.routes.router import api_router
from service.http.state import Shared
from service.use_cases.listing import plan_summary
from service.use_cases.models import model_path
from service.use_cases.tune_options import TuneOptions
from tuner.plan.plan import Plan
from tuner.workload.trace import WorkloadLine

router = api_router("plans")
MOST_REQUESTS = 10_000
PlanBody = body_of(
    TuneOptions,
    "PlanBody",
    without=("db_url", "measure", "repeat"),
    cost_model=(
        dict[str, Any] | None,
        Field(None, description="Plan with this isochunk.cost-model/1 instead of MODEL."),
    ),
    requests=(
        Annotated[list[WorkloadLine], Field(min_length=1, max_length=MOST_REQUESTS)] | None,
        Field(None, description="A trace instead of prompt_lens."),
    ),
)


class KeptPlan(BaseModel):
    """A plan of the list: what tells it apart, and how often it was run."""

    id: int
    hardware_id: int | None
    created_at: datetime
    num_runs: int
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanFile:
    """A plan file's content and when its rounds run."""

    id: int
    plan: dict[str, Any]
    timeline: dict[str, Any] | None


@router.post("/plans", status_code=201)
@open_to(Scope.PLAN)
async def make(
    caller: Request,
    service: Shared,
    body: Annotated[PlanBody, Body()],  # type: ignore[valid-type]  # a class made when this is imported
) -> MadePlan:
    """Plan a batch or a trace, for a model on measured hardware or for a cost model.

    With `compare` every policy is planned beside it; with `keep` false nothing is kept.
    """
    given = cast(BaseModel, body).model_dump(exclude_unset=True)
    requests, cost_model, keep = given.pop("requests", None), given.pop("cost_model", None), given.pop("keep", True)
    if given.get("prompt_lens") is None and requests is None:
        raise UserError("prompt_lens", "missing", "give prompt_lens or requests")
    if given.get("model") is not None:
        given["model"] = await run_in_threadpool(model_path, service.model_folders, given["model"])
    request = PlanRequest(
        options=given,
        cost_model=cost_model,
        requests=None if requests is None else tuple(requests),
        db_url=service.db_url,
        keep=keep,
    )
    return await service.planning.make(request, caller.is_disconnected)


@router.get("/plans")
@open_to(Scope.READ)
def read_plans(
    service: Shared, hardware: OfHardware = None, limit: Limit = 20, cursor: Cursor = None
) -> Page[KeptPlan]:
    """Plans, newest first."""
    of = owner(service.database, hardware)
    rows = list_plan_rows(service.database, hardware=of, before=before_of(cursor), limit=limit + 1)
    return page_of(rows, limit, _summary)


@router.get("/plans/{plan_id}")
@open_to(Scope.READ)
def read_plan(plan_id: Id, service: Shared) -> PlanFile:
    """A plan with the times of its rounds."""
    plan = _found(service, plan_id)
    return PlanFile(id=plan_id, plan=plan, timeline=timeline_of(plan))


@router.get("/plans/{plan_id}/file", response_class=Response)
@open_to(Scope.READ)
def download(plan_id: Id, service: Shared) -> Response:
    """The plan file, as `isochunk run-plan` takes it."""
    text = json.dumps(_found(service, plan_id), indent=2) + "\n"
    headers = {"content-disposition": f'attachment; filename="plan-{plan_id}.json"'}
    return Response(text, media_type="application/json", headers=headers)


@router.get("/plans/{plan_id}/export/{engine}")
@open_to(Scope.READ)
def read_export(plan_id: Id, engine: Engine, service: Shared) -> Export:
    """The plan as an engine's launch files, with what the engine cannot express and what that costs."""
    return export(Plan.from_json(_found(service, plan_id)), engine)


@router.get("/plans/{plan_id}/export/{engine}/files", response_class=Response)
@open_to(Scope.READ)
def read_export_files(plan_id: Id, engine: Engine, service: Shared) -> Response:
    """The engine's launch files in one archive (ZIP)."""
    made = export(Plan.from_json(_found(service, plan_id)), engine)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in made.files.items():
            entry = zipfile.ZipInfo(f"plan-{plan_id}-{engine}/{name}")
            entry.external_attr = (0o755 if name.endswith(".sh") else 0o644) << 16
            archive.writestr(entry, text)
    headers = {"content-disposition": f'attachment; filename="plan-{plan_id}-{engine}.zip"'}
    return Response(packed.getvalue(), media_type="application/zip", headers=headers)


def _found(service: Shared, plan_id: int) -> dict[str, Any]:
    row = find_plan(service.database, plan_id)
    if row is None:
        raise missing("plan", plan_id)
    return row


def _summary(row: StoredPlan) -> KeptPlan:
    return KeptPlan(
        id=row.id,
        hardware_id=row.hardware_id,
        created_at=row.created_at,
        num_runs=row.num_runs,
        summary=plan_summary(row.plan),
    )
