from __future__ import annotations

from pathlib import Path

import pytest

from db.errors import UserError
from tests.tuner.fit.test_correction import planned
from tuner.plan.plan import Plan
from tuner.rounds.schedule import measured_evaluation
from tuner.search.autotune import Choice, InterruptedStudy, autotune, kept_study

LAYOUTS, POLICIES = ("TP1 PP2", "TP2 PP1"), ("fixed:256", "fixed:512", "joint")


def choices() -> list[Choice]:
    plan = planned()
    expected = measured_evaluation(plan.requests, [1.0] * len(plan.requests), 1.0)
    return [
        Choice(layout=layout, policy=policy, plan=plan, evaluation=expected, predicted_s=1.0)
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


def test_a_kept_study_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    url, about = f"sqlite:///{tmp_path / 'studies.db'}", {"model": "tiny"}
    ran: list[Plan] = []

    def interrupted(plan: Plan) -> float:
        if len(ran) == 2:
            raise KeyboardInterrupt
        ran.append(plan)
        return float(3 - len(ran))

    with pytest.raises(InterruptedStudy) as caught:
        autotune(choices(), interrupted, num_trials=4, study=kept_study(url, "mine", about))
    assert [trial.measured_s for trial in caught.value.trials] == [1.0, 2.0]
    seconds = iter([0.5, 9.0])
    trials = autotune(choices(), lambda plan: next(seconds), num_trials=4, study=kept_study(url, "mine", about))
    assert [trial.measured_s for trial in trials] == [0.5, 1.0, 2.0, 9.0]
    assert len({(trial.choice.layout, trial.choice.policy) for trial in trials}) == 4
    again = autotune(choices(), lambda plan: 1 / 0, num_trials=4, study=kept_study(url, "mine", about))
    assert [one.measured_s for one in again] == [one.measured_s for one in trials]  # nothing is left to run
    fewer = [choice for choice in choices() if choice.layout == LAYOUTS[0]]  # the fit may rank others later
    trials = autotune(fewer, lambda plan: 2.0, num_trials=9, study=kept_study(url, "mine", about))
    assert {trial.choice.layout for trial in trials} == {LAYOUTS[0]}
    with pytest.raises(UserError, match=r"^--study: mine; was begun with model tiny, not large"):
        kept_study(url, "mine", {"model": "large"})


def test_a_trial_that_a_dead_process_left_running_is_run_again(tmp_path: Path) -> None:
    study = kept_study(f"sqlite:///{tmp_path / 'studies.db'}", "mine", {})

    (first, *_) = autotune(choices(), lambda plan: 1.0, num_trials=1, study=study, process_id=1)
    left = study.ask()
    left.set_user_attr("process_id", 2)
    layout = left.suggest_categorical("layout", list(LAYOUTS))
    policy = left.suggest_categorical("policy", list(POLICIES))
    assert (layout, policy) != (first.choice.layout, first.choice.policy)
    living = autotune(choices(), lambda plan: 1.0, num_trials=50, study=study, process_id=3)
    assert (layout, policy) not in {(t.choice.layout, t.choice.policy) for t in living if t.measured_s is not None}
    done = autotune(choices(), lambda plan: 1.0, num_trials=50, study=study, process_id=3, ended=lambda one: one == 2)
    assert (layout, policy) in {(t.choice.layout, t.choice.policy) for t in done if t.measured_s is not None}
