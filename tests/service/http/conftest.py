"""A service on the rows of an imaginary machine, called in this process."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from db.rows.measurements import save_measurements
from db.rows.processes import process_row
from db.rows.tokens import token_scopes
from db.rows.workers import WorkerHardware, save_worker
from db.store.engine import open_database
from service.cli.declared import job_options
from service.http.application import make_application
from service.http.door.access import Access, Scope
from service.http.door.guard import RequestLimits
from service.http.planning.processes import Planning, PlanningLimits
from service.http.state import Service
from service.jobs.queue import JobQueue
from tests.checkpoints import write_checkpoint
from tests.service.test_tune import HARDWARE
from tests.tuner.measured import Machine, measure

LIMITS = RequestLimits(body_bytes=1 << 20, body_s=2.0, requests_per_s=1e6, burst=1e6)
WORKER = WorkerHardware(machine="far", device_type="cpu", device="imaginary", device_count=2, memory_bytes=2**35)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A service and those who call it."""

    app: FastAPI
    service: Service
    client: TestClient
    """With a token that allows everything."""
    nobody: TestClient
    """Without one."""

    def with_scopes(self, *scopes: Scope) -> dict[str, str]:
        """Headers of a caller who may do only so much."""
        return {"authorization": f"Bearer {self.service.access.make_token(frozenset(scopes))}"}


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    models = folder / "models"
    models.mkdir()
    write_checkpoint(models / "tiny", "llama")
    yield from serve(folder, models)


def serve(folder: Path, models: Path, **planning: Any) -> Iterator[Served]:
    """A service over a database that knows the imaginary machine, and a worker that never takes a job."""
    database = open_database(f"sqlite:///{folder / 'rows.db'}")
    rows = [row for tp_size in (1, 2) for row in measure(Machine(), tp_size=tp_size)]
    save_measurements(database, HARDWARE, {row.key: row for row in rows}.values())
    access = Access(kept=functools.partial(token_scopes, database))
    service = Service(
        database=database,
        access=access,
        planning=Planning(PlanningLimits(**({"processes": 1} | planning))),
        jobs=JobQueue(database.url),
        model_folders=(models,),
    )
    app = make_application(service, job_options(), hosts=["testserver", "localhost"], limits=LIMITS)
    token = {"authorization": f"Bearer {access.make_token()}"}
    with (
        process_row(database, "worker") as process_id,
        TestClient(app, headers=token) as client,
    ):
        save_worker(database, process_id, WORKER)
        yield Served(app=app, service=service, client=client, nobody=TestClient(app, raise_server_exceptions=False))
