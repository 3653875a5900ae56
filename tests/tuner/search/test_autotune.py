from __future__ import annotations

import pytest

from db.errors import UserError
from tests.tuner.fit.test_correction import planned
from tuner.plan.plan import Plan
from tuner.search.autotune import Choice, autotune

LAYOUTS, POLICIES = ("TP1 PP2", "TP2 PP1"), ("fixed:256", "fixed:512", "joint")


def choices() -> list[Choice]:
    return [
        Choice(layout=layout, policy=policy, plan=planned(), predicted_s=1.0)
        for layout in LAYOUTS
        for policy in POLICIES
    ]


def test_the_best_measured_comes_first_and_no_run_is_spent_twice() -> None:
    seconds = iter([3.0, 1.0, 2.0, 5.0])
    ran: list[Plan] = []

    def run(plan: Plan) -> float:
        ran.append(plan)
        return next(seconds)

    trials = autotune(choices(), run, num_trials=4)
    assert [trial.measured_s for trial in trials] == [1.0, 2.0, 3.0, 5.0]
    assert len({(trial.choice.layout, trial.choice.policy) for trial in trials}) == len(ran) == 4


def test_more_trials_than_choices_run_each_once() -> None:
    trials = autotune(choices(), lambda plan: 1.0, num_trials=50)
    assert len(trials) == len(LAYOUTS) * len(POLICIES)


def test_a_failed_run_is_a_failed_trial() -> None:
    outcomes = iter([RuntimeError("rank 1 died"), 2.0, 1.0])

    def run(plan: Plan) -> float:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    trials = autotune(choices(), run, num_trials=3)
    assert [trial.measured_s for trial in trials] == [1.0, 2.0, None]
    assert trials[-1].error == "rank 1 died"


def test_no_trials_is_an_error() -> None:
    with pytest.raises(UserError, match=r"^measure: 0"):
        autotune(choices(), lambda plan: 1.0, num_trials=0)
