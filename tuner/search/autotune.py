"""Tuning on the machine itself: an Optuna study whose trials are real runs, seeded with the cost model's ranking."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from db.errors import UserError
from tuner.plan.plan import Plan
from tuner.rounds.schedule import Evaluation

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

ABOUT, SPACE, PROCESS, PASSED_OVER, ERROR = "about", "space", "process_id", "passed_over", "error"
"""What a study and its trials say of themselves beside their parameters."""
RunPlan = Callable[[Plan], float]  # runs a plan and returns what is minimised, in seconds
SAMPLER_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One point of the search space: a plan, named by its layout and its policy."""

    layout: str
    policy: str
    plan: Plan
    evaluation: Evaluation
    """What the cost model expects of it."""
    predicted_s: float
    """What is made least, as expected: seconds, or the negative share of the deadlines met."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A choice that was run; `error` instead of a time when it failed."""

    choice: Choice
    measured_s: float | None
    error: str | None = None


class InterruptedStudy(KeyboardInterrupt):
    """The user has ended a study early; `trials` are those that were run, the best measured first."""

    def __init__(self, trials: list[Trial]) -> None:
        super().__init__()
        self.trials = trials


def autotune(
    choices: Sequence[Choice],
    run_plan: RunPlan,
    *,
    num_trials: int,
    study: Study | None = None,
    process_id: int = 0,
    ended: Callable[[int], bool] = lambda _process_id: False,
) -> list[Trial]:
    """Run choices until the study has `num_trials` trials, and return those of them that it has, the best first.

    The first half of the trials follows the cost model's ranking; then Optuna's TPE (Bergstra et al., 2011) proposes a
    layout and a policy from what was measured. A proposal that was run already, or that no choice stands for, falls
    back on the best predicted choice not yet run, so that no run is spent twice. A run that fails is a failed trial,
    not the end of the study.

    study: one that keeps its trials as they end (`kept_study`); trials that it has already count and are not run
    again, those of other processes that still run included. None: one in memory. ended: whether the process of an id,
    ours being `process_id`, has ended: a trial that it left running is run again.

    Raises InterruptedStudy when the user interrupts and something was measured.
    """
    import optuna

    if num_trials < 1:
        raise UserError("measure", num_trials, "must be 1 or more trials")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if study is None:
        study = optuna.create_study()
    study.sampler = optuna.samplers.TPESampler(seed=SAMPLER_SEED + len(study.get_trials(deepcopy=False)))
    layouts, policies = _space(study, choices)
    ranked = sorted(
        (choice for choice in choices if choice.layout in layouts and choice.policy in policies),
        key=lambda choice: choice.predicted_s,
    )

    def waiting() -> list[Choice]:
        taken = {(each.params["layout"], each.params["policy"]) for each in _taken(study, ended)}
        return [choice for choice in ranked if (choice.layout, choice.policy) not in taken]

    try:
        while (left := waiting()) and len(ranked) - len(left) < num_trials:
            if len(ranked) - len(left) < (num_trials + 1) // 2:
                study.enqueue_trial({"layout": left[0].layout, "policy": left[0].policy})
            asked = study.ask()
            asked.set_user_attr(PROCESS, process_id)
            layout = asked.suggest_categorical("layout", layouts)
            policy = asked.suggest_categorical("policy", policies)
            proposed = [c for c in left if (c.layout, c.policy) == (layout, policy)]
            if not proposed:
                asked.set_user_attr(PASSED_OVER, True)
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
                study.enqueue_trial({"layout": left[0].layout, "policy": left[0].policy})
                continue
            try:
                measured = run_plan(proposed[0].plan)
            except (RuntimeError, UserError) as error:
                asked.set_user_attr(ERROR, str(error))
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
            except BaseException:
                asked.set_user_attr(PASSED_OVER, True)
                study.tell(asked, state=optuna.trial.TrialState.FAIL)
                raise
            else:
                study.tell(asked, measured)
    except KeyboardInterrupt:
        trials = _trials(study, ranked)
        if not any(trial.measured_s is not None for trial in trials):
            raise
        raise InterruptedStudy(trials) from None
    return _trials(study, ranked)


def kept_study(storage_url: str, name: str, about: Mapping[str, object], **engine_options: object) -> Study:
    """The study of a name in a database of Optuna's, begun if it is not there.

    about: what it measures, the same for all who join. Raises UserError for a study that measures something else.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(storage_url, engine_kwargs=dict(engine_options))
    study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
    begun = study.user_attrs.get(ABOUT)
    if begun is None:
        study.set_user_attr(ABOUT, dict(about))
    elif begun != dict(about):
        differing = next(key for key in about if begun.get(key) != about[key])
        raise UserError("--study", name, f"was begun with {differing} {begun.get(differing)}, not {about[differing]}")
    return study


def _space(study: Study, choices: Sequence[Choice]) -> tuple[list[str], list[str]]:
    """Names of layouts and of policies, those that the study began with: Optuna knows no others later."""
    if SPACE not in study.user_attrs:
        layouts, policies = {choice.layout for choice in choices}, {choice.policy for choice in choices}
        study.set_user_attr(SPACE, [sorted(layouts), sorted(policies)])
    found: tuple[list[str], list[str]] = tuple(study.user_attrs[SPACE])
    return found


def _taken(study: Study, ended: Callable[[int], bool]) -> list[FrozenTrial]:
    """Trials whose choice is not to be run again: those that ended, and those that a living process runs."""
    import optuna

    running = optuna.trial.TrialState.RUNNING
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if {"layout", "policy"} <= trial.params.keys()
        and PASSED_OVER not in trial.user_attrs
        and not (trial.state is running and ended(trial.user_attrs.get(PROCESS, 0)))
    ]


def _trials(study: Study, choices: Sequence[Choice]) -> list[Trial]:
    """What the study measured of the choices, the best first."""
    by_name = {(choice.layout, choice.policy): choice for choice in choices}
    found = []
    for trial in _taken(study, lambda _process_id: True):
        choice = by_name.get((trial.params["layout"], trial.params["policy"]))
        if choice is not None:
            found.append(Trial(choice=choice, measured_s=trial.value, error=trial.user_attrs.get(ERROR)))
    return sorted(found, key=lambda trial: (trial.measured_s is None, trial.measured_s or 0.0))
