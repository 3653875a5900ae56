"""Jobs: queued for the hardware that they need, followed live, cancelled, tried again; and the workers for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import Body, Path, Query
from fastapi.routing import APIRouter
from pydantic import ConfigDict, Field, create_model
from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse

from db.errors import UserError
from db.rows.hardware import get_hardware
from db.rows.plans import plan_hardware
from db.rows.workers import StoredWorker, list_workers
from service.http.bodies import body_of_command
from service.http.door.access import Scope, open_to
from service.http.pages import MOST_ID, Cursor, Limit, Page, before_of, cursor_of
from service.http.problems import RefusedError, missing
from service.http.routes.router import api_router
from service.http.state import Service, Shared
from service.jobs.command import CommandOption, flags_for
from service.jobs.job import Job, JobKind, JobSpec
from service.use_cases.models import check_new_model, model_path

JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$")]
FOLLOW_EVERY_S = 0.5
KEEP_ALIVE_S = 15.0
_TEXTS = ("calibration", "held_out")
_MOST_TEXT = 8 << 20
Options = Mapping[JobKind, tuple[CommandOption, ...]]


def job_router(options: Options) -> APIRouter:
    """The routes; `options` are those of the commands that jobs run."""
    router = api_router("jobs")
    bodies = {
        kind: create_model(
            f"{kind.name.title().replace('_', '')}Job",
            __config__=ConfigDict(extra="forbid"),
            kind=_word(kind),
            options=(
                body_of_command(known, f"{kind.name.title().replace('_', '')}Options"),
                Field(default_factory=dict, validate_default=True),
            ),
            hardware=(str | None, Field(None, max_length=400, description="Key of a worker's hardware.")),
            **_targets(kind),
        )
        for kind, known in options.items()
    }
    any_body: Any = Annotated[
        bodies[JobKind.PROFILE] | bodies[JobKind.TUNE] | bodies[JobKind.RUN_PLAN] | bodies[JobKind.QUANTIZE],
        Field(discriminator="kind"),
    ]

    @open_to(Scope.RUN)
    def submit(service: Shared, body: Any) -> Job:
        """Queue a job."""
        kind = JobKind(body.kind)
        given = body.options.model_dump(exclude_unset=True)
        model, weights = getattr(body, "model", None), getattr(body, "weights", None)
        for name in (model, weights):
            if name is not None:
                model_path(service.model_folders, name)
        plan_id = getattr(body, "plan_id", None)
        output = getattr(body, "output", None)
        if output is not None:
            check_new_model(service.model_folders, output)
        spec = JobSpec(
            kind=kind,
            flags=flags_for(options[kind], given),
            model=model,
            plan_id=plan_id,
            weights=weights,
            output=output,
            texts={name: text for name in _TEXTS if (text := getattr(body, name, None)) is not None},
        )
        return service.jobs.submit(spec, _hardware(service, body.hardware, plan_id))

    submit.__annotations__["body"] = Annotated[any_body, Body()]
    router.add_api_route("/jobs", submit, methods=["POST"], status_code=201)
    router.add_api_route("/jobs", read_jobs, methods=["GET"])
    router.add_api_route("/jobs/{job_id}", read_job, methods=["GET"])
    router.add_api_route("/jobs/{job_id}/cancel", cancel, methods=["POST"])
    router.add_api_route("/jobs/{job_id}/retry", retry, methods=["POST"], status_code=201)
    router.add_api_route("/jobs/{job_id}/events", follow, methods=["GET"], response_class=StreamingResponse)
    router.add_api_route("/workers", read_workers, methods=["GET"])
    return router


@open_to(Scope.READ)
def read_jobs(service: Shared, limit: Limit = 50, cursor: Cursor = None) -> Page[Job]:
    """Jobs, newest first, without their results."""
    offset = before_of(cursor) or 0
    found = service.jobs.page(limit=limit + 1, offset=offset)
    more = len(found) > limit
    return Page(items=found[:limit], next=cursor_of(offset + limit) if more else None)


@open_to(Scope.READ)
def read_job(job_id: JobId, service: Shared) -> Job:
    """One job, with its result once it is done."""
    return _found(service, job_id)


@open_to(Scope.RUN)
def cancel(job_id: JobId, service: Shared) -> Job:
    """Take a job back, whether it waits or runs; one that is over stays as it is."""
    if not _found(service, job_id).status.is_over:
        service.jobs.cancel(job_id)
    return _found(service, job_id)


@open_to(Scope.RUN)
def retry(job_id: JobId, service: Shared) -> Job:
    """Queue a job that is over once more, as a job of its own."""
    job = _found(service, job_id)
    if not job.status.is_over:
        raise RefusedError(409, "job", job.status, "must be over before it is tried again")
    return service.jobs.retry(job)


@open_to(Scope.READ)
async def follow(
    job_id: JobId, service: Shared, after: Annotated[int, Query(ge=0, le=MOST_ID, description="Batches known.")] = 0
) -> StreamingResponse:
    """A job's log and status as server-sent events: `log` with lines, `job` when its status changes; ends with it."""
    await run_in_threadpool(_found, service, job_id)
    return StreamingResponse(_events(service, job_id, after), media_type="text/event-stream")


@open_to(Scope.READ)
def read_workers(
    service: Shared, alive: Annotated[bool | None, Query(description="Only those that live, or do not.")] = None
) -> list[StoredWorker]:
    """Workers and the hardware that each says it has, newest first."""
    return list_workers(service.database, alive=alive)[:200]


async def _events(service: Service, job_id: str, after: int) -> AsyncIterator[str]:
    """What is said to one who follows a job."""
    known: Job | None = None
    silent_s = 0.0
    while True:
        job = await run_in_threadpool(service.jobs.find, job_id)
        batches = await run_in_threadpool(service.jobs.log, job_id, after)
        for batch in batches:
            after += 1
            yield f"id: {after}\nevent: log\ndata: {json.dumps(batch)}\n\n"
        if job is None:
            return
        if known is None or job.status is not known.status or job.attempts != known.attempts:
            event = {
                "id": job.id,
                "status": job.status,
                "worker": job.worker,
                "attempts": job.attempts,
                "error": job.error,
            }
            yield f"event: job\ndata: {json.dumps(event)}\n\n"
            known, silent_s = job, 0.0
        if job.status.is_over and not batches:
            return
        silent_s = 0.0 if batches else silent_s + FOLLOW_EVERY_S
        if silent_s >= KEEP_ALIVE_S:
            silent_s = 0.0
            yield ": still there\n\n"
        await asyncio.sleep(FOLLOW_EVERY_S)


def _word(kind: JobKind) -> Any:
    """The field that tells jobs of this kind from others."""
    return (Literal[kind.value], ...)


def _targets(kind: JobKind) -> dict[str, Any]:
    """What a job of a kind works on."""
    name = (str, Field(max_length=200, description="A model that may be named (GET /models)."))
    if kind is JobKind.RUN_PLAN:
        plan = (int, Field(ge=0, le=MOST_ID, description="Of a plan that is kept."))
        weights = (str | None, Field(None, max_length=200, description="The model whose weights it runs with."))
        return {"plan_id": plan, "weights": weights}
    if kind is JobKind.QUANTIZE:
        text = (str | None, Field(None, max_length=_MOST_TEXT, description="Text, or JSONL with text or token_ids."))
        output = (str, Field(max_length=100, description="Name of the model to write."))
        return {"model": name, "output": output} | dict.fromkeys(_TEXTS, text)
    return {"model": name}


def _hardware(service: Service, asked: str | None, plan_id: int | None) -> str:
    """The key of the hardware that a job is for: the one that is asked for, the plan's, or the only one there is."""
    workers = list_workers(service.database)
    keys = list(dict.fromkeys(worker.hardware.key for worker in sorted(workers, key=lambda one: not one.alive)))
    if plan_id is not None:
        owner = plan_hardware(service.database, plan_id)
        if owner is not None and asked is None:
            kept = get_hardware(service.database, owner)
            asked = next((key for key in keys if key == f"{kept.device} x{kept.device_count}"), None)
    if asked is None:
        living = {worker.hardware.key for worker in workers if worker.alive}
        if len(living) == 1:
            return living.pop()
        allowed = f"must be one of {', '.join(keys)}" if keys else "no worker has come yet: isochunk worker"
        raise UserError("hardware", "missing", allowed)
    if asked not in keys:
        allowed = f"must be one of {', '.join(keys)}" if keys else "no worker has come yet: isochunk worker"
        raise UserError("hardware", asked, allowed)
    return asked


def _found(service: Service, job_id: str) -> Job:
    job = service.jobs.find(job_id)
    if job is None:
        raise missing("job", job_id)
    return job
