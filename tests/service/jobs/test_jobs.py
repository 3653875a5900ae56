"""Jobs from the queue to their end: run, fail, are cancelled, go where their hardware is, and outlive their workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from db.rows.hardware import list_hardware
from db.rows.job_ends import VARIABLE, JobOutcome, find_end
from db.rows.plans import save_plan_row
from db.rows.runs import RunStatus, list_runs
from db.rows.workers import list_workers
from db.store.engine import open_database
from service.jobs.child import NOT_KEPT
from service.jobs.job import JobKind, JobSpec, JobStatus
from service.jobs.queue import JobQueue
from tests.runtime.cases import make_plan
from tests.service.jobs.conftest import StartWorker, ended, eventually, lines
from tests.structures import ROOT

pytestmark = pytest.mark.timeout(290)
SHORT = ("--world-size=1", "--context-length=32", "--budget-s=20", "--device=cpu")
LONG = ("--world-size=1", "--context-length=64", "--budget-s=600", "--remeasure=all", "--device=cpu")


def test_a_profile_runs_to_its_end_and_says_what_it_measured(
    jobs: JobQueue, start_worker: StartWorker, url: str
) -> None:
    start_worker("one")
    job = jobs.submit(JobSpec(kind=JobKind.PROFILE, model="tiny", flags=SHORT), "box x1")
    assert job.status is JobStatus.QUEUED
    done = ended(jobs, job)
    assert (done.status, done.error, done.attempts) == (JobStatus.DONE, None, 1), (done, lines(jobs, job))
    assert done.worker is not None
    assert done.worker.startswith("one-")
    assert lines(jobs, job)[0] == f"{done.worker} takes it up"
    with open_database(url) as database:
        assert list_hardware(database)[0].num_measurements == done.result["num_new"] > 0
        (worker,) = list_workers(database, alive=True)
        assert worker.hardware.key == "box x1"
    again = jobs.retry(done)
    assert again.spec.retry_of == job.id
    assert ended(jobs, again).status is JobStatus.DONE


def test_a_job_that_fails_says_why(jobs: JobQueue, start_worker: StartWorker) -> None:
    start_worker("one")
    refused = jobs.submit(JobSpec(kind=JobKind.PROFILE, model="tiny", flags=("--world-size=999",)), "box x1")
    unknown = jobs.submit(JobSpec(kind=JobKind.PROFILE, model="../tiny"), "box x1")
    missing = jobs.submit(JobSpec(kind=JobKind.RUN_PLAN, plan_id=7), "box x1")
    found = [ended(jobs, job) for job in (refused, unknown, missing)]
    assert {job.status for job in found} == {JobStatus.FAILED}
    assert "world_size: 999; at most" in str(found[0].error)
    assert "model: ../tiny; must be one of" in str(found[1].error)
    assert "plan: 7; must be the id of a plan" in str(found[2].error)


def test_a_job_is_cancelled_while_it_waits_and_while_it_runs(jobs: JobQueue, start_worker: StartWorker) -> None:
    running = jobs.submit(JobSpec(kind=JobKind.PROFILE, model="tiny", flags=LONG), "box x1")
    waiting = jobs.submit(JobSpec(kind=JobKind.PROFILE, model="tiny", flags=LONG), "box x1")
    start_worker("one")
    eventually(lambda: lines(jobs, running))
    found = jobs.find(waiting.id)
    assert found is not None
    assert found.status is JobStatus.QUEUED  # one job at a time holds the machine
    jobs.cancel(waiting.id)
    jobs.cancel(running.id)
    assert ended(jobs, running).status is ended(jobs, waiting).status is JobStatus.CANCELLED
    # The worker is free again, and what was cancelled never ran.
    after = jobs.submit(JobSpec(kind=JobKind.PROFILE, model="tiny", flags=SHORT), "box x1")
    assert ended(jobs, after).status is JobStatus.DONE
    assert lines(jobs, waiting) == []


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_each_job_goes_to_a_worker_that_has_its_hardware(jobs: JobQueue, start_worker: StartWorker, url: str) -> None:
    for machine, hardware in (("left", "small"), ("right", "large")):
        start_worker(machine, hardware)
    wanted = ["small x1", "large x1", "large x1", "small x1"]
    queued = [jobs.submit(JobSpec(kind=JobKind.PROFILE, model="../no"), key) for key in wanted]
    found = [ended(jobs, job) for job in queued]
    assert [str(job.worker).partition("-")[0] for job in found] == ["left", "right", "right", "left"]
    assert all(job.attempts == 1 for job in found)


def test_a_machine_has_one_worker(start_worker: StartWorker, tmp_path: Path, url: str) -> None:
    start_worker("one")

    def is_there() -> bool:
        with open_database(url) as database:
            return bool(list_workers(database, alive=True))

    eventually(is_there)
    assert start_worker("one").wait(60) == 2
    assert "already has a worker" in (tmp_path / "worker-one.log").read_text()


def test_the_job_of_killed_workers_is_taken_up_and_runs_to_its_end_once(
    jobs: JobQueue, start_worker: StartWorker, url: str, models: Path
) -> None:
    with open_database(url) as database:
        plan_id = save_plan_row(database, make_plan(models / "tiny", pp_size=1).to_json())
    flags = ("--random-weights", "--threads-per-rank=1", "--repeat=10")
    job = jobs.submit(JobSpec(kind=JobKind.RUN_PLAN, plan_id=plan_id, flags=flags), "box x1")

    def runs() -> list[RunStatus]:
        with open_database(url) as database:
            return [run.status for run in list_runs(database)]

    first = start_worker("one")
    eventually(lambda: runs() == [RunStatus.RUNNING])
    first.kill()
    first.wait(10)
    eventually(lambda: runs() == [RunStatus.LOST])  # the command ended with its worker
    # The second worker is stopped while its command runs to the end, and so cannot note that before it is killed.
    second = start_worker("two")
    eventually(lambda: runs() == [RunStatus.RUNNING, RunStatus.LOST])
    os.kill(second.pid, signal.SIGSTOP)
    with open_database(url) as database:
        left = eventually(lambda: find_end(database, job.id))
    second.kill()
    second.wait(10)
    start_worker("three")
    done = ended(jobs, job, within_s=150)
    assert done.status is JobStatus.DONE, (done.error, lines(jobs, job))
    assert str(done.worker).startswith("three-")
    assert (done.attempts, done.result) == (3, left.result)
    assert runs() == [RunStatus.DONE, RunStatus.LOST]
    said = [line.partition("-")[0] for line in lines(jobs, job) if line.endswith(" takes it up")]
    assert said == ["one", "two"]
    assert lines(jobs, job)[-1] == f"{done.worker} notes that it has ended"


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_job_whose_workers_all_die_fails_with_the_reason(jobs: JobQueue, start_worker: StartWorker, url: str) -> None:
    job = jobs.submit(JobSpec(kind=JobKind.PROFILE, model="tiny", flags=LONG), "box x1")
    for attempt in range(4):
        worker = start_worker("one")
        eventually(lambda attempt=attempt: len(lines(jobs, job)) > attempt)
        worker.kill()
        worker.wait(10)
    start_worker("one")
    failed = ended(jobs, job)
    assert failed.status is JobStatus.FAILED
    assert "its workers ended without a word" in str(failed.error)


def test_a_worker_that_is_told_to_end_leaves_its_job_to_the_next(jobs: JobQueue, start_worker: StartWorker) -> None:
    first = start_worker("one")
    job = jobs.submit(JobSpec(kind=JobKind.PROFILE, model="tiny", flags=LONG), "box x1")
    eventually(lambda: lines(jobs, job))
    first.terminate()
    assert first.wait(20) == 0
    found = jobs.find(job.id)
    assert found is not None
    assert not found.status.is_over
    start_worker("two")
    eventually(lambda: any(line.startswith("two-") for line in lines(jobs, job)))
    jobs.cancel(job.id)
    assert ended(jobs, job).status is JobStatus.CANCELLED


def test_the_process_of_a_job_keeps_its_end_or_says_that_it_could_not(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'rows.db'}"
    open_database(url).close()

    def run(job: str, *words: str, url: str = url) -> int:
        command = [sys.executable, "-m", "service.jobs.child", str(os.getpid()), *words]
        with (tmp_path / "answer").open("w+b") as answer:
            environment = os.environ | {"PYTHONPATH": str(ROOT), "ISOCHUNK_DB": url, VARIABLE: job}
            done = subprocess.run(command, env=environment, stdout=answer, timeout=60, check=False)
        return done.returncode

    assert run("a", "db", "list", "hardware", "--json") == 0
    assert run("b", "db", "list", "nothing") == 2
    assert run("c", "db", "path", url=f"sqlite:///{tmp_path / 'no' / 'rows.db'}") == NOT_KEPT
    with open_database(url) as database:
        assert find_end(database, "a") == JobOutcome(exit_code=0, result=[])
        failed = find_end(database, "b")
        assert find_end(database, "c") is None
    assert failed is not None
    assert failed.exit_code == 2
    assert "'nothing' is not one of" in str(failed.error)
