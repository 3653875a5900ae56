"""What a plan file says of its own run, whole or in part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from db.errors import UserError
from runtime.run.prediction import read_prediction
from tests.runtime.cases import make_plan
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Plan, Predicted
from tuner.plan.stage_cost import StageCost

COST = CostModel(stages=(StageCost(token_count=(0, 100), token_seconds=(0.0, 1.0)),), hop_latency_s=0.5)


@pytest.fixture
def plan(checkpoint: Callable[[str], Path]) -> Plan:
    """Rounds of 100, 61, 37 and 101 tokens on two stages."""
    return make_plan(checkpoint("llama"))


def test_a_plan_may_predict_nothing(plan: Plan) -> None:
    prediction = read_prediction(plan)
    assert (prediction.makespan_s, prediction.timeline, prediction.round_s) == (None, None, None)


def test_a_cost_model_predicts_rounds_and_makespan(plan: Plan) -> None:
    prediction = read_prediction(replace(plan, cost_model=COST.to_json()))
    assert prediction.round_s is not None
    assert prediction.round_s == [pytest.approx([t, t]) for t in (1.0, 0.61, 0.37, 1.01)]
    assert prediction.makespan_s == pytest.approx(1.0 + 0.61 + 0.37 + 1.01 + 0.5 + 1.01)


def test_the_plans_own_numbers_come_first(plan: Plan) -> None:
    own = Predicted(makespan_s=7.0, round_s=((1.0, 2.0),) * 4)
    prediction = read_prediction(replace(plan, cost_model=COST.to_json(), predicted=own))
    assert prediction.makespan_s == 7.0
    assert prediction.round_s == [pytest.approx([1.0, 2.0])] * 4
    assert prediction.timeline is not None
    assert prediction.timeline.makespan_s == pytest.approx(1.0 + 0.5 + 4 * 2.0)


@pytest.mark.parametrize(
    ("round_s", "words"),
    [(((1.0, 2.0),) * 3, "predicted.round_s: 3 rounds"), (((1.0,),) * 4, r"predicted.round_s\[0\]: 1 values")],
)
def test_predictions_of_another_plan_are_refused(
    round_s: tuple[tuple[float, ...], ...], words: str, plan: Plan
) -> None:
    with pytest.raises(UserError, match=words):
        read_prediction(replace(plan, predicted=Predicted(makespan_s=7.0, round_s=round_s)))
