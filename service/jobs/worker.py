"""A worker: says what hardware it has, takes jobs for it one at a time, and takes up what dead workers left.

**A job ends once.** It has ended when its row in `job_ends` is committed, and the job's id is the key of that table.
Whoever takes a job up looks there first, and runs nothing if there is a row; whatever of a job is committed in one
transaction with its row (a run of a plan, its rounds) cannot be there twice. So, by what is killed, and when:

- The worker, before it noted the end: the command's own process wrote the row before it ended. The next worker finds
  the row in the same database that it takes the job from, on whatever machine it is, and hands it to the queue.
- The worker, while the command runs: the kernel ends the command with it. Nothing is adopted, because what nobody
  watches could hold a machine for ever. The job has not ended, and runs again.
- The command, between its results and its row: a run of a plan has no such moment. Of the other kinds the results are
  what a second run finds, and does not repeat: a profile measures what is missing, trials of `tune --measure`
  are in a study of the job's name, a checkpoint is moved into place after the row that says so was written.
- The database's server, at the commit: there are both, or neither.
- A worker that lives but was taken for dead, for the network was split: its command may run to its last step beside the
  one that took its job up. The first of both to commit ends the job; the other's commit is refused whole.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dbos import DBOS

from db.errors import UserError
from db.rows.job_ends import VARIABLE, JobOutcome, find_end, keep_end
from db.rows.plans import get_plan_row
from db.rows.processes import process_row
from db.rows.workers import WorkerHardware, save_worker
from db.store.engine import Database, open_database
from db.store.leases import is_held
from service.jobs.child import NOT_KEPT
from service.jobs.job import JobKind, JobSpec
from service.jobs.log import Log
from service.jobs.machine import hold_machine
from service.jobs.process import plan_file, run_command
from service.jobs.store import LOG, WORKFLOW, worker_config
from service.use_cases.checkpoints.quantize import move_what_is_whole
from service.use_cases.models import model_path, new_model_path

MOST_ATTEMPTS = 4
"""Of a job whose workers die: it may be what kills them."""
LOOK_EVERY_S = 1.0
SERVER_GRACE_S = 10.0
"""How long a lease must be gone on a server before its job is taken up: its worker, if it lives, ends sooner."""
LOST_LEASE = 75
STOP_WITHIN_S = 4.0
"""From the wish that a worker ends to its end, its job's process with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Worker:
    """What a worker's jobs are run with."""

    database: Database
    hardware: WorkerHardware
    model_folders: Sequence[Path]
    process_id: int
    held: int
    log: Log
    stopping: threading.Event
    idle: threading.Event

    @property
    def executor(self) -> str:
        """The name of this process among those that run jobs."""
        return f"{self.hardware.machine}/{self.process_id}"

    def run(self, content: Mapping[str, Any], job_id: str) -> dict[str, Any]:
        """Run a job to its end -> its outcome; what it says goes to the job's log."""
        try:
            spec, outcome = JobSpec.from_json(content), find_end(self.database, job_id)
            if outcome is None:
                outcome = self._outcome(spec, job_id)
                if outcome is None and self.stopping.is_set():
                    threading.Event().wait()  # the job is not over: whoever takes it up goes on with it
                if outcome is not None and outcome.exit_code == NOT_KEPT:
                    raise UserError("database", self.database.location, f"an end was not kept: {outcome.error}")
                if outcome is not None:
                    outcome = keep_end(self.database, job_id, outcome)
            else:
                _say([f"{self.hardware.machine} notes that it has ended"])
                if spec.kind is JobKind.QUANTIZE and outcome.exit_code == 0:
                    move_what_is_whole(Path(outcome.result["folder"]), job_id)
        except UserError as error:  # the database is away: a job whose end cannot be read must not be said to have one
            self.end(error)
        return (outcome or JobOutcome(exit_code=130, error="cancelled")).to_json()

    def end(self, error: Exception) -> NoReturn:
        """End this process, its job's with it, so that others may take the job up."""
        machine = self.hardware.machine
        self.log.say("worker ends", f"worker {machine}: ends: {error}", machine=machine, error=str(error))
        os._exit(LOST_LEASE)

    def _outcome(self, spec: JobSpec, job_id: str) -> JobOutcome | None:
        """Run a job's command -> what is known of its end from outside; None where it was ended from here."""
        attempts = _attempts(job_id)
        if attempts > MOST_ATTEMPTS:
            return JobOutcome(exit_code=1, error=f"its workers ended without a word, {attempts - 1} times")
        self.idle.clear()
        began = time.monotonic()
        self.log.say("job begins", None, job=job_id, kind=spec.kind, machine=self.hardware.machine)
        _say([f"{self.hardware.machine} takes it up"])
        outcome: JobOutcome | None
        try:
            with tempfile.TemporaryDirectory(prefix="job-") as folder:
                try:
                    arguments = self._arguments(spec, job_id, folder)
                except UserError as error:
                    if error.field == "database":
                        raise
                    return JobOutcome(exit_code=2, error=str(error))
                url = self.database.url.render_as_string(hide_password=False)
                outcome = run_command(
                    arguments,
                    environment={"ISOCHUNK_DB": url, VARIABLE: job_id},
                    held=self.held,
                    say=_say,
                    is_cancelled=lambda: self.stopping.is_set() or _is_cancelled(job_id),
                )
        finally:
            self.idle.set()
        code = None if outcome is None else outcome.exit_code
        seconds = round(time.monotonic() - began, 1)
        self.log.say("job ends", None, job=job_id, kind=spec.kind, exit_code=code, seconds=seconds)
        return outcome

    def _arguments(self, spec: JobSpec, job_id: str, folder: str) -> list[str]:
        words = [spec.kind.value, *spec.flags, "--json"]
        given = {word.partition("=")[0] for word in spec.flags}
        if spec.kind is JobKind.TUNE and "--measure" in given and "--study" not in given:
            words.append(f"--study=job-{job_id}")
        if spec.weights is not None:
            words.append(f"--weights={model_path(self.model_folders, spec.weights)}")
        if spec.kind is JobKind.RUN_PLAN:
            assert spec.plan_id is not None
            return [*words, "--", str(plan_file(folder, get_plan_row(self.database, spec.plan_id)))]
        assert spec.model is not None
        if spec.kind is JobKind.QUANTIZE:
            assert spec.output is not None
            words.append(f"--output={new_model_path(self.model_folders, spec.model, spec.output)}")
        for name, content in spec.texts.items():
            path = Path(folder) / name
            path.write_text(content)
            words.append(f"--{name.replace('_', '-')}={path}")
        return [*words, "--", model_path(self.model_folders, spec.model)]


def describe_machine(machine: str | None, name: str | None, device_type: str | None) -> WorkerHardware:
    """What this machine has; `machine` and `name` stand for its own name and its devices'."""
    from profiler.hardware.device import default_device_type, describe_hardware

    device_type = device_type or default_device_type()
    found = describe_hardware(device_type, num_threads=1)
    return WorkerHardware(
        machine=machine or socket.gethostname(),
        device_type=device_type,
        device=name or found.device,
        device_count=found.device_count,
        memory_bytes=found.memory_bytes,
    )


def work(db_url: str | None, hardware: WorkerHardware, model_folders: Sequence[Path], log: Log) -> None:
    """Take jobs until the process is ended. Raises UserError when the machine has a worker already."""
    try:
        _work(db_url, hardware, model_folders, log)
    except UserError:
        raise
    except BaseException:  # asked to end: threads that wait for a job's process must not hold this one up
        os._exit(0)


def _work(db_url: str | None, hardware: WorkerHardware, model_folders: Sequence[Path], log: Log) -> None:
    with (
        hold_machine(hardware.machine) as held,
        open_database(db_url) as database,
        process_row(database, "worker") as process_id,
    ):
        save_worker(database, process_id, hardware)
        worker = Worker(
            database=database,
            hardware=hardware,
            model_folders=model_folders,
            process_id=process_id,
            held=held,
            log=log,
            stopping=threading.Event(),
            idle=threading.Event(),
        )
        worker.idle.set()
        DBOS(config=worker_config(database.url, worker.executor))

        @DBOS.step(name="command")
        def command(content: dict[str, Any]) -> dict[str, Any]:
            job_id = DBOS.workflow_id
            assert job_id is not None
            return worker.run(content, job_id)

        @DBOS.workflow(name=WORKFLOW, max_recovery_attempts=None)  # `_outcome` counts: a job may have ended at the last
        def job(content: dict[str, Any]) -> dict[str, Any]:
            return command(content)

        DBOS.listen_queues([hardware.key])
        DBOS.launch()
        DBOS.register_queue(hardware.key, worker_concurrency=1, polling_interval_sec=0.3)
        log.say(
            "worker", f"worker {hardware.machine}: takes jobs for {hardware.key}",
            machine=hardware.machine, hardware=hardware.key, database=database.location,
        )  # fmt: skip
        try:
            _watch(worker)
        finally:
            worker.stopping.set()
            worker.idle.wait(STOP_WITHIN_S)


def _watch(worker: Worker) -> None:
    """Look after the lease of this process and after the jobs of those that lost theirs."""
    database = worker.database
    grace_s = 0.0 if database.engine.dialect.name == "sqlite" else SERVER_GRACE_S
    seen_lost: dict[str, float] = {}
    stop = threading.Event()
    while not stop.wait(LOOK_EVERY_S):
        try:
            if not is_held(database.engine, database.url, worker.process_id):
                raise UserError("lease", worker.process_id, "must be held: the database's server was away")
            seen_lost = _take_up(worker, seen_lost, grace_s)
        except Exception as error:
            worker.end(error)  # others may take up its job from now on


def _take_up(worker: Worker, seen_lost: dict[str, float], grace_s: float) -> dict[str, float]:
    """Queue again what workers had that are gone -> since when each of them is known to be."""
    running = DBOS.list_workflows(status="PENDING", name=WORKFLOW, load_input=False, load_output=False)
    others = {one.executor_id for one in running if one.executor_id and one.executor_id != worker.executor}
    if not others:
        return {}
    now = time.monotonic()
    living = _living(worker.database, others)
    lost = {executor: seen_lost.get(executor, now) for executor in others - living}
    overdue = [executor for executor, since in lost.items() if now - since >= grace_s]
    if overdue:
        # Only rows that still name a dead process are queued again: of several workers that do this, one succeeds.
        DBOS._recover_pending_workflows(overdue)
    return lost


def _living(database: Database, executors: set[str]) -> set[str]:
    numbers = {executor: int(executor.rpartition("/")[2]) for executor in executors}
    return {executor for executor, number in numbers.items() if is_held(database.engine, database.url, number)}


def _say(lines: list[str]) -> None:
    DBOS.write_stream(LOG, {"lines": lines, "at": time.time()})


def _attempts(job_id: str) -> int:
    """How often a worker took a job up, this time included."""
    status = DBOS.get_workflow_status(job_id)
    return (status and status.recovery_attempts) or 1


def _is_cancelled(job_id: str) -> bool:
    status = DBOS.get_workflow_status(job_id)
    return status is None or status.status != "PENDING"
