"""Copies of a whole database: between engines, while it is written, and back as a restored backup."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from db.errors import UserError
from db.rows.copy import copy_database
from db.rows.hardware import save_hardware
from db.rows.measurements import load_measurements, save_measurements
from db.rows.plans import save_plan_row
from db.rows.processes import process_row
from db.rows.runs import RoundTime, RunOutcome, RunStatus, finish_run, list_runs, start_run
from db.store.engine import Database, open_database
from db.store.tables import Base
from tests.db.samples import make_hardware, make_measurement


def silent(_table: str, _count: int) -> None:
    """Progress that nobody follows."""


def rows(database: Database) -> dict[str, list[Any]]:
    with database.reading() as session:
        tables = Base.metadata.sorted_tables
        return {table.name: sorted(map(repr, session.execute(select(table)).all())) for table in tables}


def test_a_copy_holds_every_row_and_can_be_gone_on_with(database: Database, tmp_path: Path) -> None:
    hardware = make_hardware()
    save_measurements(database, hardware, [make_measurement(shape={"m": m}) for m in range(1, 40)])
    plan = save_plan_row(database, {"any": "plan"})
    run = start_run(database, plan, hardware)
    finish_run(
        database,
        run,
        RunOutcome(
            makespan_s=1.0,
            predicted_makespan_s=0.9,
            mfu=0.4,
            ttft_s=[1.0],
            rounds=[RoundTime(round=0, stage=0, predicted_s=0.9, start_s=0.0, finish_s=1.0)],
        ),
    )
    backup = f"sqlite:///{tmp_path / 'backup.db'}"
    with open_database(backup) as copied:
        counts = copy_database(database, copied, silent)
        assert counts["measurements"] == 39
        assert rows(copied) == rows(database)
        with pytest.raises(UserError, match="must be an empty database: it has rows in"):
            copy_database(database, copied, silent)
    # Back into a new database of the first one's engine, where new rows get new ids.
    with database.engine.begin() as connection:
        for table in reversed(Base.metadata.sorted_tables):
            connection.execute(table.delete())
    with open_database(backup, read_only=True) as kept:
        copy_database(kept, database, silent)
        assert rows(kept) == rows(database)
    assert save_plan_row(database, {"another": "plan"}) > plan
    assert save_hardware(database, make_hardware(link="another")) > 1


def test_a_copy_is_of_one_moment_and_what_is_at_work_counts_as_lost(database: Database, tmp_path: Path) -> None:
    hardware = make_hardware()
    save_measurements(database, hardware, [make_measurement(shape={"m": 1})])
    plan = save_plan_row(database, {"any": "plan"})
    stop = threading.Event()

    def write() -> None:
        for m in range(2, 10_000, 10):
            save_measurements(database, hardware, [make_measurement(shape={"m": m + k}) for k in range(10)])
            if stop.is_set():
                return

    with process_row(database, "run-plan") as process_id:
        start_run(database, plan, hardware, process_id=process_id)
        writer = threading.Thread(target=write)
        writer.start()
        try:
            with open_database(f"sqlite:///{tmp_path / 'backup.db'}") as copied:
                copy_database(database, copied, silent)
                copied.check()
                assert len(load_measurements(copied, hardware)) % 10 == 1  # each write whole or not at all
                (run,) = list_runs(copied)
                assert run.status is RunStatus.LOST
        finally:
            stop.set()
            writer.join()
        assert list_runs(database)[0].status is RunStatus.RUNNING


def test_a_database_is_not_copied_onto_itself(database: Database) -> None:
    with pytest.raises(UserError, match="must be another database"):
        copy_database(database, database, silent)
