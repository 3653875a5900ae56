"""Queues and workers of tests: workers are processes, as they are in earnest."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url

from db.store.engine import open_database
from service.jobs.job import Job
from service.jobs.queue import JobQueue
from tests.checkpoints import write_checkpoint
from tests.db.conftest import new_postgresql_url, postgresql_url
from tests.structures import ROOT

__all__ = ["new_postgresql_url", "postgresql_url"]

StartWorker = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_checkpoint(folder / "tiny", "llama")
    return folder


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    found = f"sqlite:///{tmp_path / 'rows.db'}"
    if request.param == "postgresql":
        found = str(request.getfixturevalue("new_postgresql_url"))
    open_database(found).close()
    return found


@pytest.fixture
def jobs(url: str) -> Iterator[JobQueue]:
    queue = JobQueue(make_url(url))
    yield queue
    queue.close()


@pytest.fixture
def start_worker(url: str, models: Path, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts a worker; all are killed at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def start(machine: str, hardware: str = "box") -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "service", "worker", "--db", url, "--models", str(models), "--device", "cpu"]
        words += ["--machine", f"{machine}-{tmp_path.parent.name}-{tmp_path.name}", "--hardware", hardware]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (tmp_path / f"worker-{machine}.log").open("ab") as log:
            process = subprocess.Popen(words, env=environment, stderr=log, stdout=log, start_new_session=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait(20)


def eventually(what: Callable[[], Any], within_s: float = 90.0) -> Any:
    """What a function returns once it is true; fails when that takes too long."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"not within {within_s} s: {what}")


def ended(jobs: JobQueue, job: Job, within_s: float = 180.0) -> Job:
    """The job once it is over."""

    def over() -> Job | None:
        found = jobs.find(job.id)
        return found if found is not None and found.status.is_over else None

    found: Job = eventually(over, within_s)
    return found


def lines(jobs: JobQueue, job: Job) -> list[str]:
    """What a job has said."""
    return [line for batch in jobs.log(job.id, 0) for line in batch["lines"]]
