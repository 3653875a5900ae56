from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from db.rows.hardware import Hardware
from db.rows.plans import save_plan_row
from db.rows.runs import RoundTime, RunOutcome, finish_run, start_run
from db.store.engine import Database, open_database
from tests.tuner.measured import SHAPE, Machine, measure
from tuner.fit.correction import MeasuredRounds, fit_correction, load_measured_rounds
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.plan import Parallel, Plan, Request
from tuner.rounds.round_plan import rounds_to_plan
from tuner.search.planner import plan_rounds

HARDWARE = Hardware(
    device="cpu", device_count=1, memory_bytes=2**34, driver="d", torch_version="t", backend="gloo", num_threads=1,
    link="lo",
)  # fmt: skip
WORK = RankWork(shape=SHAPE, dtype="float32", tp_size=1)
COSTS = fit_layer_costs(measure(Machine()), WORK, busy_ranks=2)


def planned(partition: tuple[int, ...] = (8, 8)) -> Plan:
    cost = COSTS.cost_model(partition)
    requests = (Request(id="r", prompt_tokens=6000),)
    return rounds_to_plan(
        plan_rounds(cost, requests, policy="fixed:512"),
        requests=requests,
        model=dict(SHAPE.config),
        precision="float32",
        parallel=Parallel(tp_size=1, pp_size=2, layer_partition=partition),
        window=None,
        cost_model=cost.to_json(),
    )


def keep_run(
    database: Database,
    plan: Plan,
    *,
    factor: float | tuple[float, float],
    hardware: Hardware = HARDWARE,
    start_s: float = 1.0,
) -> None:
    """A run whose rounds took `factor` times what was predicted, on both stages or on each."""
    factors = factor if isinstance(factor, tuple) else (factor, factor)
    assert plan.predicted is not None
    assert plan.predicted.round_s is not None
    run = start_run(database, save_plan_row(database, plan.to_json()), hardware)
    rounds = [
        RoundTime(round=i, stage=k, start_s=start_s, finish_s=start_s + factors[k] * seconds)
        for i, row in enumerate(plan.predicted.round_s)
        for k, seconds in enumerate(row)
    ]
    finish_run(database, run, RunOutcome(makespan_s=1.0, rounds=rounds))


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(f"sqlite:///{tmp_path / 'runs.db'}")


def test_runs_correct_the_next_prediction(database: Database) -> None:
    keep_run(database, planned(), factor=1.2)
    measured = load_measured_rounds(database, HARDWARE, WORK, cost_model=COSTS.cost_model)
    correction = fit_correction(measured)
    assert correction.num_runs == 1
    assert correction.num_rounds == 2 * len(planned().rounds)
    assert correction.error_before == pytest.approx(1 - 1 / 1.2, abs=0.01)
    assert correction.error_after < 0.04
    before, after = (
        costs.cost_model((8, 8)).stage_seconds(0, [(1024, 2048, False)])
        for costs in (COSTS, replace(COSTS, correction=correction))
    )
    assert after / before == pytest.approx(1.2, abs=0.05)


def test_runs_of_other_work_teach_nothing(database: Database) -> None:
    keep_run(database, planned(), factor=1.2, hardware=replace(HARDWARE, device="another"))
    keep_run(database, replace(planned(), precision="bfloat16"), factor=1.2)
    measured = load_measured_rounds(database, HARDWARE, WORK, cost_model=COSTS.cost_model)
    assert measured.num_runs == 0
    assert fit_correction(measured).num_rounds == 0


def test_few_rounds_correct_little() -> None:
    def correction(num_rounds: int) -> float:
        seconds = np.full(num_rounds, 0.1)
        rounds = MeasuredRounds(tokens_s=seconds, attention_s=0 * seconds, measured_s=1.3 * seconds, num_runs=1)
        return fit_correction(rounds).tokens_scale

    assert correction(3) == 1.0
    assert 1.0 < correction(4) < correction(8) < correction(200) < 1.31


def test_products_attention_and_overhead_are_told_apart() -> None:
    tokens_s, attention_s = np.full(100, 0.3), np.linspace(0.01, 1.0, 100)
    tokens_s[::2] = 0.1
    measured_s = 1.1 * tokens_s + 0.9 * attention_s + 0.005
    found = fit_correction(
        MeasuredRounds(tokens_s=tokens_s, attention_s=attention_s, measured_s=measured_s, num_runs=3)
    )
    assert found.tokens_scale == pytest.approx(1.1, abs=0.04)
    assert found.attention_scale == pytest.approx(0.9, abs=0.03)
    assert found.round_s == pytest.approx(0.005, abs=0.002)


def test_each_stage_is_corrected_by_its_own_rounds(database: Database) -> None:
    keep_run(database, planned(), factor=(1.3, 1.1))
    measured = load_measured_rounds(database, HARDWARE, WORK, cost_model=COSTS.cost_model)
    correction = fit_correction(measured)
    assert correction.error_after < 0.05
    corrected = replace(COSTS, correction=correction).cost_model((8, 8))
    first, second = (corrected.stage_seconds(stage, [(1024, 2048, False)]) for stage in (0, 1))
    assert first / second == pytest.approx(1.3 / 1.1, rel=0.05)
    # Of other stages nothing is known but what all have in common.
    other = replace(COSTS, correction=correction).cost_model((4, 4, 4, 4))
    assert other.stage_seconds(1, [(64, 0, False)]) == pytest.approx(other.stage_seconds(2, [(64, 0, False)]))


def test_the_first_moments_of_a_card_teach_nothing(database: Database) -> None:
    card = replace(HARDWARE, backend="nccl")
    keep_run(database, planned(), factor=0.8, hardware=card, start_s=-10.0)
    keep_run(database, planned(), factor=1.2, hardware=card, start_s=5.0)
    measured = load_measured_rounds(database, card, WORK, cost_model=COSTS.cost_model)
    assert len(measured.measured_s) == 2 * len(planned().rounds)
    assert fit_correction(measured).tokens_scale > 1.1


def test_rounds_of_one_rank_teach_over_any_link(database: Database) -> None:
    keep_run(database, planned(), factor=1.2, hardware=replace(HARDWARE, link="another"))
    measured = load_measured_rounds(database, HARDWARE, WORK, cost_model=COSTS.cost_model)
    assert measured.num_runs == 1
    shared = replace(planned(), parallel=Parallel(tp_size=2, pp_size=2, layer_partition=(8, 8)))
    keep_run(database, shared, factor=1.2, hardware=replace(HARDWARE, link="another"))
    work = replace(WORK, tp_size=2)  # two ranks exchange partial sums within a round
    assert load_measured_rounds(database, HARDWARE, work, cost_model=COSTS.cost_model).num_runs == 0


def test_only_the_plans_asked_for_teach(database: Database) -> None:
    keep_run(database, planned(), factor=1.2)
    measured = load_measured_rounds(database, HARDWARE, WORK, cost_model=COSTS.cost_model, of=lambda _plan: False)
    assert measured.num_runs == 0
