"""What every database keeps to, SQLite and PostgreSQL alike."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from db.errors import UserError
from db.rows.fits import list_fits, save_fit
from db.rows.hardware import get_hardware, list_hardware, save_hardware
from db.rows.measurements import (
    load_measurements,
    measurement_key,
    save_measurements,
    write_measurements,
)
from db.rows.plans import get_plan_row, list_plan_rows, save_plan_row
from db.rows.runs import (
    RoundTime,
    RunKind,
    RunOutcome,
    RunStatus,
    fail_run,
    finish_run,
    list_runs,
    load_round_times,
    start_run,
)
from db.store.engine import Database, open_database
from db.store.schema import HEAD
from db.store.tables import HardwareRow, MeasurementRow
from tests.db.samples import NOON, make_hardware, make_measurement

PLAN = {"schema": "isochunk.plan/1", "rounds": [[{"request": 0, "start": 0, "tokens": 64}]], "window": None}


class TestOpening:
    def test_a_new_database_gets_its_tables_and_an_old_one_is_left_alone(self, database_url: str) -> None:
        with open_database(database_url) as first:
            assert first.found_revision is None
            save_hardware(first, make_hardware())
        with open_database(database_url) as second:
            assert second.found_revision == HEAD
            assert [row.hardware for row in list_hardware(second)] == [make_hardware()]

    def test_read_only_reads_and_refuses_to_write(self, database_url: str) -> None:
        with open_database(database_url) as writer:
            save_measurements(writer, make_hardware(), [make_measurement()])
        with open_database(database_url, read_only=True) as reader:
            assert load_measurements(reader, make_hardware()) == [make_measurement()]
            with pytest.raises(UserError, match=r"opened read-only; must be writable"):
                save_measurements(reader, make_hardware(), [make_measurement(1)])

    def test_a_newer_database_is_refused_and_untouched(self, database_url: str) -> None:
        with open_database(database_url) as database, database.session() as session:
            session.execute(text("UPDATE isochunk_schema SET version_num = '9999'"))
        for read_only in (False, True):
            with pytest.raises(UserError, match=r"has schema 9999 of a newer version.*update isochunk") as refused:
                open_database(database_url, read_only=read_only)
            assert "file:" not in str(refused.value)

    def test_a_session_that_raises_keeps_nothing(self, database: Database) -> None:
        hardware_id = save_hardware(database, make_hardware())
        values = {name: getattr(make_measurement(), name) for name in make_measurement().__dataclass_fields__}
        with pytest.raises(RuntimeError, match="half-way"), database.session() as session:
            session.add(MeasurementRow(hardware_id=hardware_id, **values))
            session.flush()
            raise RuntimeError("half-way")
        assert load_measurements(database, make_hardware()) == []

    def test_a_lock_held_for_long_is_an_error_that_names_the_seconds(self, database_url: str) -> None:
        with open_database(database_url) as holder, open_database(database_url, lock_timeout_s=0.3) as database:
            save_hardware(holder, make_hardware())
            with holder.session() as session:
                session.execute(text("UPDATE hardware SET link = 'held'"))
                with (
                    pytest.raises(UserError, match=r"locked by another process for 0\.3 s"),
                    database.session() as other,
                ):
                    other.execute(text("UPDATE hardware SET link = 'wanted'"))
            save_measurements(database, make_hardware(), [make_measurement()])  # free again

    def test_readers_do_not_wait_for_a_writer(self, database_url: str) -> None:
        with open_database(database_url) as holder, open_database(database_url, lock_timeout_s=0.3) as database:
            save_hardware(holder, make_hardware())
            with holder.session() as session:
                session.execute(text("UPDATE hardware SET link = 'held'"))
                assert [row.hardware.link for row in list_hardware(database)] == ["shared memory"]

    def test_a_writer_does_not_wait_for_readers(self, database_url: str) -> None:
        with open_database(database_url, lock_timeout_s=0.3) as writer, open_database(database_url) as database:
            with database.reading() as session:
                assert session.scalars(select(HardwareRow)).all() == []
                save_hardware(writer, make_hardware())
            assert len(list_hardware(database)) == 1

    def test_sessions_that_read_before_they_write_take_turns(self, database: Database) -> None:
        hardware_id = save_hardware(database, make_hardware())

        def read_and_write(worker: int) -> None:
            for m in range(1, 11):
                with database.session() as session:
                    session.scalars(select(MeasurementRow)).all()
                    write_measurements(session, hardware_id, [make_measurement(m, variant=f"{worker}")])

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(read_and_write, range(4)))
        assert len(load_measurements(database, make_hardware())) == 40


class TestHardware:
    def test_saved_twice_is_kept_once(self, database: Database) -> None:
        first = save_hardware(database, make_hardware())
        assert save_hardware(database, make_hardware()) == first
        assert get_hardware(database, first) == make_hardware()

    @pytest.mark.parametrize("changed", [{"driver": "6.2"}, {"num_threads": 2}, {"memory_bytes": 16 * 2**30}])
    def test_what_changes_its_speed_or_size_makes_another(self, database: Database, changed: dict[str, object]) -> None:
        assert save_hardware(database, make_hardware()) != save_hardware(database, make_hardware(**changed))

    def test_memory_that_the_kernel_keeps_for_itself_does_not(self, database: Database) -> None:
        less = make_hardware(memory_bytes=8 * 2**30 - 123456)
        assert save_hardware(database, make_hardware()) == save_hardware(database, less)

    def test_more_memory_than_32_bits(self, database: Database) -> None:
        large = make_hardware(memory_bytes=150_123_456_789)
        assert get_hardware(database, save_hardware(database, large)) == large

    def test_unknown_id_names_the_known_ones(self, database: Database) -> None:
        with pytest.raises(UserError, match="hardware: 7; the database holds no hardware"):
            get_hardware(database, 7)
        known = save_hardware(database, make_hardware())
        with pytest.raises(UserError, match=f"hardware: 77; must be one of {known}$"):
            get_hardware(database, 77)


class TestMeasurements:
    def test_come_back_as_they_were_sorted_by_size(self, database: Database) -> None:
        rows = [make_measurement(m) for m in (1000, 8, 64)]
        save_measurements(database, make_hardware(), rows)
        assert load_measurements(database, make_hardware()) == [rows[1], rows[2], rows[0]]

    def test_belong_to_their_hardware(self, database: Database) -> None:
        save_measurements(database, make_hardware(), [make_measurement()])
        assert load_measurements(database, make_hardware(num_threads=2)) == []

    def test_the_newest_of_a_key_stands(self, database: Database) -> None:
        new = make_measurement(minutes=1, median_us=11.0, noisy=True)
        old = make_measurement(minutes=0, median_us=10.0)
        for rows in ([old, new], [new, old], [old]):  # within one call, and in a later one
            save_measurements(database, make_hardware(), rows)
            assert load_measurements(database, make_hardware()) == [new]

    def test_the_time_is_utc_whatever_zone_it_came_in(self, database: Database) -> None:
        there = NOON.astimezone(timezone(timedelta(hours=8)))
        save_measurements(database, make_hardware(), [make_measurement(measured_at=there)])
        (row,) = load_measurements(database, make_hardware())
        assert row.measured_at == NOON
        assert row.measured_at.utcoffset() == timedelta(0)

    def test_filters(self, database: Database) -> None:
        rows = [
            make_measurement(op="matmul", dtype="bfloat16"),
            make_measurement(op="all_reduce", shape={"bytes": 1024}, group_size=2, busy_ranks=2),
            make_measurement(op="all_reduce", shape={"bytes": 1024}, group_size=4, busy_ranks=4, variant="ring"),
        ]
        save_measurements(database, make_hardware(), rows)
        load = partial(load_measurements, database, make_hardware())
        assert load(op="matmul", dtype="bfloat16") == [rows[0]]
        assert load(op="all_reduce", group_size=2) == [rows[1]]
        assert load(variant="ring") == load(busy_ranks=4) == [rows[2]]
        assert load(op="matmul", dtype="float32") == []

    def test_keys_can_be_told_before_measuring(self, database: Database) -> None:
        save_measurements(database, make_hardware(), [make_measurement(64, variant="fused")])
        key = measurement_key(op="matmul", dtype="float32", shape={"k": 256, "n": 512, "m": 64}, variant="fused")
        assert [row.key for row in load_measurements(database, make_hardware())] == [key]

    def test_many_at_once(self, database: Database) -> None:
        rows = [make_measurement(m) for m in range(1, 2001)]
        save_measurements(database, make_hardware(), rows)
        assert load_measurements(database, make_hardware()) == rows

    @pytest.mark.parametrize(
        "changed",
        [
            {"median_us": float("nan")},
            {"std_us": float("inf")},
            {"min_us": -1.0},
            {"p10_us": 11.0},
            {"num_samples": 0},
            {"shape": {"m,n": 1}},
            {"measured_at": datetime(2026, 3, 1)},
        ],
    )
    def test_numbers_that_cannot_be_are_refused(self, changed: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"times|min_us|must\b|shape name"):
            make_measurement(**changed)


class TestPlans:
    def test_equal_content_is_kept_once(self, database: Database) -> None:
        first = save_plan_row(database, PLAN)
        assert save_plan_row(database, dict(reversed(PLAN.items()))) == first
        assert save_plan_row(database, PLAN | {"window": 2}) != first
        assert get_plan_row(database, first) == PLAN
        assert [row.plan["window"] for row in list_plan_rows(database)] == [2, None]

    def test_nan_is_refused(self, database: Database) -> None:
        with pytest.raises(ValueError, match="not JSON compliant"):
            save_plan_row(database, PLAN | {"predicted": {"makespan_s": float("nan")}})

    def test_unknown_id(self, database: Database) -> None:
        with pytest.raises(UserError, match="plan: 3; must be the id of a plan"):
            get_plan_row(database, 3)

    def test_made_for_a_hardware(self, database: Database) -> None:
        hardware_id = save_hardware(database, make_hardware())
        save_plan_row(database, PLAN, hardware_id=hardware_id)
        save_plan_row(database, PLAN | {"window": 2})
        assert [row.hardware_id for row in list_plan_rows(database, hardware=make_hardware())] == [hardware_id]


class TestRuns:
    OUTCOME = RunOutcome(
        makespan_s=1.5,
        predicted_makespan_s=1.4,
        slowdown=1.02,
        mfu=0.31,
        ttft_s=[0.5, 1.5],
        rounds=[
            RoundTime(round=0, stage=0, predicted_s=0.6, start_s=0.0, finish_s=0.7),
            RoundTime(round=0, stage=1, start_s=0.7, finish_s=1.5),
        ],
    )

    def start(self, database: Database, **options: object) -> int:
        return start_run(database, save_plan_row(database, PLAN), make_hardware(), **options)  # type: ignore[arg-type]  # wrong on purpose

    def test_done(self, database: Database) -> None:
        run_id = self.start(database, kind="benchmark", study="sweep", details={"seed": 3})
        (running,) = list_runs(database)
        assert (running.status, running.finished_at, running.ttft_s) == (RunStatus.RUNNING, None, None)
        finish_run(database, run_id, self.OUTCOME)
        (done,) = list_runs(database, study="sweep", kind=RunKind.BENCHMARK, status="done", hardware=make_hardware())
        assert (done.id, done.details, done.code_version != "") == (run_id, {"seed": 3}, True)
        assert (done.makespan_s, done.predicted_makespan_s, done.mfu, done.ttft_s) == (1.5, 1.4, 0.31, [0.5, 1.5])
        assert done.finished_at is not None
        assert running.started_at <= done.finished_at <= datetime.now(UTC)
        assert load_round_times(database, run_id) == self.OUTCOME.rounds
        assert list_plan_rows(database)[0].num_runs == 1

    def test_the_first_ending_stands(self, database: Database) -> None:
        run_id = self.start(database)
        assert fail_run(database, run_id, "RuntimeError: boom", rank=1, stage=1, round_index=4)
        assert not fail_run(database, run_id, "lost its peer", rank=0)
        with pytest.raises(ValueError, match="is not running"):
            finish_run(database, run_id, self.OUTCOME)
        (failed,) = list_runs(database, status="failed")
        assert (failed.error, failed.failed_rank, failed.failed_stage, failed.failed_round) == (
            "RuntimeError: boom", 1, 1, 4,
        )  # fmt: skip
        assert load_round_times(database, run_id) == []

    def test_an_outcome_is_kept_whole_or_not_at_all(self, database: Database) -> None:
        run_id = self.start(database)
        twice = RunOutcome(makespan_s=1.0, rounds=[self.OUTCOME.rounds[0]] * 2)
        with pytest.raises(IntegrityError):
            finish_run(database, run_id, twice)
        assert [(row.status, row.makespan_s) for row in list_runs(database)] == [(RunStatus.RUNNING, None)]
        assert load_round_times(database, run_id) == []

    def test_a_run_needs_its_plan(self, database: Database) -> None:
        with pytest.raises(IntegrityError):
            start_run(database, 99, make_hardware())

    def test_newest_first(self, database: Database) -> None:
        ids = [self.start(database, study=study) for study in ("a", "b", "a")]
        assert [row.id for row in list_runs(database, limit=2)] == [ids[2], ids[1]]
        assert [row.id for row in list_runs(database, study="a")] == [ids[2], ids[0]]

    def test_kinds_are_closed(self, database: Database) -> None:
        with pytest.raises(ValueError, match="'holiday' is not a valid RunKind"):
            self.start(database, kind="holiday")


class TestFits:
    def test_the_newest_come_first(self, database: Database) -> None:
        for version in (1, 2):
            save_fit(database, make_hardware(), "llama", "float32", {"v": version}, {"error": 0.02})
        save_fit(database, make_hardware(), "llama", "bfloat16", {"v": 3}, {})
        save_fit(database, make_hardware(num_threads=2), "llama", "float32", {"v": 4}, {})
        (fit,) = list_fits(database, hardware=make_hardware(), model_name="llama", dtype="float32", limit=1)
        assert (fit.cost_model, fit.report) == ({"v": 2}, {"error": 0.02})
        assert [row.cost_model["v"] for row in list_fits(database)] == [4, 3, 2, 1]
        assert [row.cost_model["v"] for row in list_fits(database, dtype="float32", limit=2)] == [4, 2]
