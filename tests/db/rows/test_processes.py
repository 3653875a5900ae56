"""Several processes at one database: real ones, all at once, some killed."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from sqlalchemy import text, update

from db.rows.hardware import list_hardware, save_hardware
from db.rows.measurements import load_measurements, save_measurements
from db.rows.plans import list_plan_rows, save_plan_row
from db.rows.processes import list_processes, process_row
from db.rows.runs import RunOutcome, RunStatus, finish_run, list_runs, load_round_times, start_run
from db.store.engine import Database, lost_processes, open_database
from db.store.schema import HEAD
from db.store.tables import RunRow
from tests.db.samples import make_hardware, make_measurement
from tests.db.workers import BATCH, NUM_POINTS, begin_a_run, measure_and_run

NUM_WORKERS = 3
ROOT = Path(__file__).parents[3]


def test_all_open_a_new_database_measure_and_run_at_once(database_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(NUM_WORKERS)
    processes = [
        spawn.Process(target=measure_and_run, args=(database_url, barrier, index)) for index in range(NUM_WORKERS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * NUM_WORKERS
    with open_database(database_url) as database:
        assert database.found_revision == HEAD
        assert len(list_hardware(database)) == 1
        rows = load_measurements(database, make_hardware())
        of_each = {"shared": 40} | {f"worker {worker}": NUM_POINTS for worker in range(NUM_WORKERS)}
        assert Counter(row.variant for row in rows) == of_each
        newest = 10 + (NUM_WORKERS - 1) * 0.1
        assert {row.median_us for row in rows if row.variant == "shared"} == {newest}
        plans = list_plan_rows(database)
        assert sorted(row.plan["point"] for row in plans) == list(range(0, NUM_POINTS, 8))
        assert {row.num_runs for row in plans} == {NUM_WORKERS}
        runs = list_runs(database)
        assert {run.status for run in runs} == {RunStatus.DONE}
        assert {len(load_round_times(database, run.id)) for run in runs} == {3}


def test_killed_while_writing_leaves_whole_rows(database_url: str) -> None:
    open_database(database_url).close()
    killed_after = (1, 6)
    for last in killed_after:
        command = [sys.executable, "-m", "tests.db.workers", database_url]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert writer.stdout is not None
        for line in writer.stdout:
            if int(line) >= last:
                break
        writer.kill()
        writer.wait(30)
    with open_database(database_url, lock_timeout_s=10) as database:
        per_batch = Counter(row.variant for row in load_measurements(database, make_hardware()))
        assert set(per_batch.values()) == {BATCH}
        assert len(per_batch) >= max(killed_after) + 1  # what was reported as written is there
        save_measurements(database, make_hardware(), [make_measurement()])  # no lock is left behind
        if database.engine.dialect.name == "sqlite":
            with database.reading() as session:
                assert session.scalar(text("PRAGMA integrity_check")) == "ok"
                assert session.scalar(text("PRAGMA journal_mode")) == "wal"


def test_a_killed_process_and_its_runs_are_lost_and_a_living_one_is_not(database_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    began = spawn.Queue()
    workers = [spawn.Process(target=begin_a_run, args=(database_url, began)) for _ in range(2)]
    for worker in workers:
        worker.start()
    try:
        process_of = dict(began.get(timeout=60) for _ in workers)
        dead, alive = workers
        dead.kill()
        dead.join(30)
        assert dead.pid is not None and alive.pid is not None
        with open_database(database_url, read_only=True) as reader:
            assert lost_processes(reader) == [process_of[dead.pid]]
        with open_database(database_url) as database:
            processes = {row.id: row.status for row in list_processes(database)}
            runs = {row.process_id: row.status for row in list_runs(database)}
            expected = {process_of[dead.pid]: RunStatus.LOST, process_of[alive.pid]: RunStatus.RUNNING}
            assert processes == runs == expected
    finally:
        for worker in workers:
            worker.kill()
            worker.join(30)


def test_a_process_says_how_it_ended(database: Database) -> None:
    with process_row(database, "profile"):
        assert [row.status for row in list_processes(database)] == [RunStatus.RUNNING]
        assert lost_processes(database) == []
    with pytest.raises(ValueError, match="broken"), process_row(database, "tune"):
        raise ValueError("broken")
    newest, first = list_processes(database)
    assert (first.command, first.status, first.error) == ("profile", RunStatus.DONE, None)
    assert (newest.command, newest.status, newest.error) == ("tune", RunStatus.FAILED, "ValueError: broken")


def test_a_run_taken_for_lost_may_yet_end_well(database: Database) -> None:
    with process_row(database, "run-plan") as process_id:
        plan_id = save_plan_row(database, {"point": 1})
        save_hardware(database, make_hardware())
        run_id = start_run(database, plan_id, make_hardware(), process_id=process_id)
        with database.session() as session:
            session.execute(update(RunRow).values(status=RunStatus.LOST))
        finish_run(database, run_id, RunOutcome(makespan_s=1.0))
    assert [run.status for run in list_runs(database)] == [RunStatus.DONE]
