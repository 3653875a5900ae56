"""A job ends once, with what it leaves or not at all."""

from __future__ import annotations

from functools import partial

import pytest
from sqlalchemy.exc import StatementError

from db.errors import UserError
from db.rows.job_ends import JobOutcome, add_end, find_end, keep_end
from db.rows.plans import save_plan_row
from db.rows.runs import RunOutcome, RunStatus, finish_run, list_runs, start_run
from db.store.engine import Database
from tests.db.samples import make_hardware


def test_of_two_runs_of_a_job_the_first_to_end_is_kept_and_nothing_of_the_other(database: Database) -> None:
    plan_id = save_plan_row(database, {"schema": "isochunk.plan/1"})
    first, second = (start_run(database, plan_id, make_hardware()) for _ in range(2))
    done = JobOutcome(exit_code=0, result={"run_id": first})
    finish_run(database, first, RunOutcome(makespan_s=1.0), also=partial(add_end, job="a", outcome=done))
    with pytest.raises(UserError, match="job: a; has ended already"):
        other = JobOutcome(exit_code=0, result={"run_id": second})
        finish_run(database, second, RunOutcome(makespan_s=2.0), also=partial(add_end, job="a", outcome=other))
    assert [(run.id, run.status, run.makespan_s) for run in list_runs(database)] == [
        (second, RunStatus.RUNNING, None),
        (first, RunStatus.DONE, 1.0),
    ]
    assert keep_end(database, "a", JobOutcome(exit_code=1, error="late")) == find_end(database, "a") == done


def test_an_end_that_is_not_kept_leaves_no_run(database: Database) -> None:
    run = start_run(database, save_plan_row(database, {"schema": "isochunk.plan/1"}), make_hardware())
    assert find_end(database, "b") is None
    with pytest.raises((ValueError, StatementError), match="not JSON compliant"):
        outcome = JobOutcome(exit_code=0, result=float("nan"))
        finish_run(database, run, RunOutcome(makespan_s=1.0), also=partial(add_end, job="b", outcome=outcome))
    assert find_end(database, "b") is None
    assert list_runs(database)[0].status is RunStatus.RUNNING
    failed = JobOutcome(exit_code=2, error="Error: \0 what it said")
    assert keep_end(database, "b", failed) == JobOutcome(exit_code=2, error="Error:  what it said")
