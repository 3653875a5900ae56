"""What the other processes of the tests do with a database."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier

from db.rows.hardware import save_hardware
from db.rows.measurements import save_measurements
from db.rows.plans import save_plan_row
from db.rows.processes import process_row
from db.rows.runs import RoundTime, RunOutcome, finish_run, start_run
from db.store.engine import open_database
from tests.db.samples import NOON, make_hardware, make_measurement

NUM_POINTS = 40
BATCH = 50


def measure_and_run(url: str, barrier: Barrier, worker: int) -> None:
    """Measure a point of one's own and points that all workers measure, in opposite orders, and run plans.

    The database does not exist before: all open it at the same moment.
    """
    import alembic.command  # noqa: F401 - loaded before the start, so that the race is close

    barrier.wait(60)
    when, median_us = NOON + timedelta(seconds=worker), 10 + worker * 0.1
    shared = [make_measurement(m, variant="shared", measured_at=when, median_us=median_us) for m in range(1, 41)]
    with open_database(url, lock_timeout_s=30) as database:
        for point in range(NUM_POINTS):
            own = make_measurement(point + 1, variant=f"worker {worker}")
            save_measurements(database, make_hardware(), [own, *(shared if worker % 2 else reversed(shared))])
            if point % 8 == 0:
                plan_id = save_plan_row(database, {"point": point})
                run_id = start_run(database, plan_id, make_hardware(), study=f"worker {worker}")
                rounds = [RoundTime(round=index, stage=0, start_s=index, finish_s=index + 1) for index in range(3)]
                finish_run(database, run_id, RunOutcome(makespan_s=3.0, rounds=rounds))


def write_batches_for_ever(url: str) -> None:
    """Write batch after batch, telling each on standard output, until killed."""
    with open_database(url, lock_timeout_s=30) as database:
        batch = 0
        while True:
            rows = [make_measurement(m + 1, variant=f"batch {batch:05d}") for m in range(BATCH)]
            save_measurements(database, make_hardware(), rows)
            print(batch, flush=True)
            batch += 1


if __name__ == "__main__":
    write_batches_for_ever(sys.argv[1])


def begin_a_run(url: str, began: Queue[tuple[int, int]]) -> None:
    """Begin a run, say so, and work until somebody ends this process."""
    with open_database(url, lock_timeout_s=30) as database, process_row(database, "run-plan") as process_id:
        save_hardware(database, make_hardware())
        start_run(database, save_plan_row(database, {"of": process_id}), make_hardware(), process_id=process_id)
        began.put((os.getpid(), process_id))
        time.sleep(120)
