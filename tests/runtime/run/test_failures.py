"""A rank that dies or raises ends the run on all ranks, and says where; the run's row says failed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from db.rows.runs import RunStatus, list_runs
from db.store.engine import open_database
from profiler.comm.ranks.failure import RanksFailedError
from runtime.run.run import run_plan, run_plans
from tests.runtime import workers
from tests.runtime.cases import make_plan


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("worker", "error"),
    [
        (workers.die_in_round_two, "killed by SIGKILL"),
        (workers.raise_in_round_two, "ArithmeticError: two and two are five"),
    ],
)
@pytest.mark.parametrize(("tp_size", "pp_size", "rank"), [(1, 2, {1}), (2, 2, {2, 3})])
def test_a_failing_rank_ends_the_run(
    worker: Callable[..., object],
    error: str,
    tp_size: int,
    pp_size: int,
    rank: set[int],
    checkpoint: Callable[[str], Path],
    db_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights = checkpoint("qwen2")
    monkeypatch.setattr("runtime.run.run.run_jobs", worker)
    with pytest.raises(RanksFailedError) as caught:
        run_plan(make_plan(weights, tp_size=tp_size, pp_size=pp_size), weights=weights, db_url=db_url)
    failure = caught.value.failure
    assert failure.rank in rank
    assert (failure.stage, failure.round_index, failure.error) == (1, 2, error)
    with open_database(db_url) as database:
        (run,) = list_runs(database)
    assert run.status is RunStatus.FAILED
    assert (run.failed_rank, run.failed_stage, run.failed_round, run.error) == (failure.rank, 1, 2, error)
    assert run.makespan_s is None


@pytest.mark.timeout(60)
def test_a_launch_keeps_the_plans_that_ended_and_blames_the_one_that_failed(
    checkpoint: Callable[[str], Path], db_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = checkpoint("qwen2")
    monkeypatch.setattr("runtime.run.run.run_jobs", workers.raise_in_the_second_plan)
    with pytest.raises(RanksFailedError) as caught:
        run_plans([make_plan(weights)] * 3, weights=weights, db_url=db_url)
    assert caught.value.failure.job == 1
    with open_database(db_url) as database:
        third, second, first = list_runs(database)
    assert (first.status, first.error) == (RunStatus.DONE, None) and first.makespan_s
    assert (second.status, second.failed_rank, second.failed_round) == (RunStatus.FAILED, 1, 2)
    assert (third.status, third.error) == (RunStatus.FAILED, "not begun: plan 2 of the launch failed")


@pytest.mark.timeout(60)
def test_an_interrupted_run_says_so(
    checkpoint: Callable[[str], Path], db_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("runtime.run.run.run_ranks", interrupt)
    weights = checkpoint("qwen2")
    with pytest.raises(KeyboardInterrupt):
        run_plan(make_plan(weights), weights=weights, db_url=db_url)
    with open_database(db_url) as database:
        (run,) = list_runs(database)
    assert (run.status, run.error) == (RunStatus.FAILED, "KeyboardInterrupt")
