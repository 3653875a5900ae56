"""Tuning on the machine itself: an Optuna study whose trials are real runs, seeded with the cost model's ranking."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from db.errors import UserError
from tuner.plan.plan import Plan

RunPlan = Callable[[Plan], float]  # runs a plan and returns what is minimised, in seconds
SAMPLER_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One point of the search space: a plan, named by its layout and its policy."""

    layout: str
    policy: str
    plan: Plan

    predicted_s: float
    """What the cost model expects of the objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A choice that was run; `error` instead of a time when it failed."""

    choice: Choice
    measured_s: float | None
    error: str | None = None


def autotune(choices: Sequence[Choice], run_plan: RunPlan, *, num_trials: int) -> list[Trial]:
    """Run up to `num_trials` of the choices and return them, the best measured first.

    The first half of the trials follows the cost model's ranking; then Optuna's TPE (Bergstra et al., 2011) proposes a
    layout and a policy from what was measured. A proposal that was run already, or that no choice stands for, falls
    back on the best predicted choice not yet run, so that no run is spent twice. A run that fails is a failed trial,
    not the end of the study.
    """
    import optuna

    if num_trials < 1:
        raise UserError("measure", num_trials, "must be 1 or more trials")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=SAMPLER_SEED))
    layouts = sorted({choice.layout for choice in choices})
    policies = sorted({choice.policy for choice in choices})
    waiting = sorted(choices, key=lambda choice: choice.predicted_s)
    trials: list[Trial] = []
    while waiting and len(trials) < num_trials:
        if len(trials) < (num_trials + 1) // 2:
            study.enqueue_trial({"layout": waiting[0].layout, "policy": waiting[0].policy})
        asked = study.ask()
        layout = asked.suggest_categorical("layout", layouts)
        policy = asked.suggest_categorical("policy", policies)
        proposed = [c for c in waiting if (c.layout, c.policy) == (layout, policy)]
        if not proposed:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial({"layout": waiting[0].layout, "policy": waiting[0].policy})
            continue
        waiting.remove(proposed[0])
        trials.append(_run(proposed[0], run_plan))
        measured = trials[-1].measured_s
        study.tell(asked, measured, state=None if measured is not None else optuna.trial.TrialState.FAIL)
    return sorted(trials, key=lambda trial: (trial.measured_s is None, trial.measured_s or 0.0))


def _run(choice: Choice, run_plan: RunPlan) -> Trial:
    try:
        return Trial(choice=choice, measured_s=run_plan(choice.plan))
    except (RuntimeError, UserError) as error:
        return Trial(choice=choice, measured_s=None, error=str(error))
