"""Several plans on the same ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from db.errors import UserError
from db.rows.measurements import save_measurements
from db.rows.runs import RunStatus, list_runs
from db.store.engine import open_database
from profiler.hardware.device import describe_hardware
from runtime.run.run import run_plans
from tests.db.samples import make_measurement
from tests.runtime.cases import make_plan, prompts
from tests.runtime.conftest import Generate


@pytest.mark.timeout(120)
def test_plans_of_two_layouts_run_on_the_same_ranks(
    checkpoint: Callable[[str], Path], db_url: str, generate: Generate
) -> None:
    weights = checkpoint("llama")
    plans = [make_plan(weights, tp_size=1, pp_size=2), make_plan(weights, tp_size=2, pp_size=1)]
    asked = prompts(202, 97)
    # Its profile says that a product takes a thousandth of what any core needs.
    size, claimed_us = 256, 0.4
    product = make_measurement(
        op="matmul_ceiling", shape={"m": size, "n": size, "k": size}, busy_ranks=2, median_us=claimed_us,
        p10_us=claimed_us, p90_us=claimed_us, min_us=claimed_us,
    )  # fmt: skip
    with open_database(db_url) as database:
        save_measurements(database, describe_hardware("cpu", num_threads=1), [product])
    results = run_plans(plans, weights=weights, prompts=asked, max_new_tokens=2, db_url=db_url)
    expected = [tuple(generate(weights, prompt, 2)) for prompt in asked]
    for result in results:
        assert [request.token_ids for request in result.requests] == expected
        assert result.warm_up_s > 0.0
        assert result.slowdown is not None and result.slowdown > 20.0
    with open_database(db_url) as database:
        runs = list_runs(database)
    assert [run.status for run in runs] == [RunStatus.DONE] * 2
    assert {run.id: run.slowdown for run in runs} == {result.run_id: result.slowdown for result in results}


def test_plans_of_other_numbers_of_ranks_are_refused(checkpoint: Callable[[str], Path], db_url: str) -> None:
    weights = checkpoint("llama")
    plans = [make_plan(weights, pp_size=2), make_plan(weights, pp_size=1)]
    with pytest.raises(UserError, match="as many ranks"):
        run_plans(plans, weights=weights, db_url=db_url)
    with pytest.raises(UserError, match="one or more plans"):
        run_plans([], weights=weights, db_url=db_url)


def test_one_plan_that_does_not_fit_stops_all_before_a_rank_starts(
    checkpoint: Callable[[str], Path], db_url: str
) -> None:
    weights = checkpoint("llama")
    good = make_plan(weights, pp_size=2)
    bad = replace(good, parallel=replace(good.parallel, layer_partition=(1, 1)))
    with pytest.raises(UserError, match="layer_partition"):
        run_plans([good, bad], weights=weights, db_url=db_url)
    with open_database(db_url) as database:
        assert list_runs(database) == []
