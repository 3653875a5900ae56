"""What is tried on a trace beside the usual: the online planner's settings, and sizes between those of sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tuner.online.settings import OnlineSettings
from tuner.plan.plan import Request
from tuner.replays.ranking import P99_SLACK, best_of, limits_s, loss
from tuner.replays.replay import Replay, Runs
from tuner.rounds.packing.packer import Packer
from tuner.rounds.problem import Problem
from tuner.workload.objective import Objective

BY_ARRIVAL = 100.0
"""Aging under which requests run first come first served."""
TRIED = tuple(
    OnlineSettings(aging=aging, foresight=foresight)
    for aging, foresight in (
        (0.01, 0.5),
        (0.1, 0.5),
        (0.3, 0.5),
        (BY_ARRIVAL, 0.2),
        (BY_ARRIVAL, 0.5),
        (BY_ARRIVAL, 1.0),
        (BY_ARRIVAL, 3.0),
    )
)
"""Settings of the online planner that are tried: from least work first to first come first served."""
AGINGS_TRIED = (0.01, 0.1, 1.0)
"""And with rounds as for the makespan of what waits."""
PATIENCES = (1.0, 0.97, 0.94, 0.9)
"""Shares of the most that the 99th percentile may be under which least work first is tried: what takes longest ends
somewhat after its limit, for rounds are longer than the running order knows."""
FORESIGHTS_TRIED, NEARBY = (0.2, 1.0), (0.985, 1.01)
"""What is tried beside 0.5, under the best of those limits; and what that limit is scaled by where the 99th percentile
is above it all the same."""
PACES_TRIED = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
"""How long rounds of one length are tried on every trace, as multiples of the rounds of the policy with the least 99th
percentile: near saturation they can be best, for each round has to make up for what longer ones cost all behind."""
AGED = 0.1
"""What the best of those is tried with too, for a lower 99th percentile."""
FORESIGHTS_BETWEEN = (0.7, 1.4, 2.0, 2.4, 2.9, 3.5, 4.2, 5.0, 6.0)
"""What is tried, first come first served, where nothing has kept within both limits."""
PACES_BETWEEN = (1.2, 1.6, 1.0, 0.8, 2.0, 1.4, 1.1, 0.9)
"""How long rounds of one length are tried there."""
PASSINGS_BETWEEN = (
    (0.0, 2.0),
    (0.0, 3.0),
    (0.3, 3.0),
    (0.3, 6.0),
    (0.3, 4.2),
    (0.0, 1.0),
    (0.0, 1.4),
    (0.1, 2.0),
    (0.1, 9.0),
)
"""Less than usual of `passing`, with `foresight`, that is tried last."""
SIZES_BETWEEN = (1.25, 1.5, 0.75)
"""Sizes of `ascend` and `fixed` that are tried there, as multiples of the best fixed chunk: their sweeps are powers of
two."""
SHARES, SHARES_TRIED = (0.6, 1.1), 6
"""Between which shares of the most that the 99th percentile may be a limit of waiting is sought beside each, and in how
many steps."""
AGINGS, FORESIGHTS, MOST_PATIENCE = (1e-3, 1e3), (1e-2, 1e1), 1.5
"""Ranges in which a study looks for settings, the last as a share of the most that the 99th percentile may be."""
LEAST_PATIENCE = 0.5
"""A study's shares below it are no limit."""


def settings_tried(runs: Runs, simpler: Sequence[Replay], usual: Sequence[Replay], num_trials: int) -> list[Replay]:
    """Replays of the online planner under settings by what is known: how the simpler policies and the usual settings
    did."""
    found = [*_paced(runs, simpler), *_patient(runs, simpler), *_by_makespan(runs)]
    found += _between(runs, simpler, [*usual, *found])
    return [*found, *_least_work(runs, simpler), *_tuned(runs, simpler, num_trials)]


def are_alike(requests: Sequence[Request]) -> bool:
    """Whether no running order is better than another but by arrival."""
    return len({(one.new_tokens, one.cached_tokens, one.weight) for one in requests}) == 1


def _paced(runs: Runs, simpler: Sequence[Replay]) -> list[Replay]:
    """Replays of the online planner in rounds of one length, least work first; under the best also aged more."""
    problem = runs.problem
    if problem.objective is not Objective.MEAN_TTFT:
        return []
    alike = are_alike(problem.requests)
    aging, base_s = BY_ARRIVAL if alike else OnlineSettings().aging, _base_round_s(problem, simpler)
    tried = [OnlineSettings(aging=aging, pace=pace * base_s) for pace in PACES_TRIED]
    found = [runs.under(f"joint:{each}") for each in tried]
    if not alike:
        best = OnlineSettings.parse(best_of(found, simpler, problem.objective).planned.policy.partition(":")[2])
        found.append(runs.under(f"joint:{replace(best, aging=AGED)}"))
    return found


def _patient(runs: Runs, simpler: Sequence[Replay]) -> list[Replay]:
    """Replays of the online planner that lets nothing wait for much longer than the simpler policies do."""
    problem = runs.problem
    if problem.objective.needs_deadlines or are_alike(problem.requests):
        return []
    most_s = P99_SLACK * min(one.ttft_s(99) for one in simpler)
    found: list[Replay] = []
    tried = [OnlineSettings(patience=share * most_s) for share in PATIENCES]
    for step in range(3):
        found += [runs.under(f"joint:{each}") for each in tried]
        closest = best_of(found, simpler, problem.objective)
        best = OnlineSettings.parse(closest.policy.partition(":")[2])
        tried = [replace(best, foresight=foresight) for foresight in FORESIGHTS_TRIED]
        if step == 1:
            if closest.ttft_s(99) <= most_s:
                break
            tried = [replace(best, patience=share * best.patience) for share in NEARBY]
    return found


def _by_makespan(runs: Runs) -> list[Replay]:
    """Replays of the online planner with rounds as for the makespan of what waits; first come first served, which is
    any order of prompts alike, these are best nowhere."""
    if runs.problem.objective.needs_deadlines or are_alike(runs.problem.requests):
        return []
    return [runs.under(f"joint:{OnlineSettings(aging=aging, makespan=1.0)}") for aging in AGINGS_TRIED]


def _between(runs: Runs, simpler: Sequence[Replay], own: Sequence[Replay]) -> list[Replay]:
    """Replays of the online planner under more settings, one by one, while none is within the limits of `best_of`: what
    is best in the mean and what is best in the 99th percentile may lie far apart."""
    problem = runs.problem
    if problem.objective is not Objective.MEAN_TTFT:
        return []
    most_mean_s, most_p99_s = limits_s(simpler)

    def keeps(one: Replay) -> bool:
        return one.evaluation.mean_ttft_s <= most_mean_s and one.ttft_s(99) <= most_p99_s

    tried = {one.planned.policy for one in own}
    found: list[Replay] = []
    if any(map(keeps, (*own, *simpler))):
        return found

    def attempt(settings: OnlineSettings | str) -> Replay:
        found.append(runs.under(settings if isinstance(settings, str) else f"joint:{settings}"))
        return found[-1]

    base_s = _base_round_s(problem, simpler)
    if are_alike(problem.requests):
        if any(keeps(attempt(name)) for name in _sizes_between(problem, simpler)):
            return found
        between = [OnlineSettings(aging=BY_ARRIVAL, foresight=foresight) for foresight in FORESIGHTS_BETWEEN]
        between += [OnlineSettings(aging=BY_ARRIVAL, pace=pace * base_s) for pace in PACES_BETWEEN]
        between += [OnlineSettings(aging=BY_ARRIVAL, passing=one, foresight=other) for one, other in PASSINGS_BETWEEN]
        for each in between:
            if f"joint:{each}" not in tried and keeps(attempt(each)):
                break
        return found
    for pace in PACES_BETWEEN:
        low, high = SHARES
        for _ in range(SHARES_TRIED):
            share = (low + high) / 2.0
            one = attempt(OnlineSettings(pace=pace * base_s, patience=share * most_p99_s))
            if keeps(one):
                return found
            low, high = (low, share) if one.ttft_s(99) > most_p99_s else (share, high)
    return found


def _sizes_between(problem: Problem, simpler: Sequence[Replay]) -> list[str]:
    """Simpler policies whose size is between those of their sweeps."""
    fixed = [one for one in simpler if one.planned.policy.startswith("fixed:")]
    if not fixed:
        return []
    best = min(fixed, key=lambda one: one.evaluation.mean_ttft_s)
    chunk, multiple = int(best.planned.policy.removeprefix("fixed:")), problem.chunk_multiple
    sizes = dict.fromkeys(max(int(share * chunk) // multiple, 1) * multiple for share in SIZES_BETWEEN)
    return [f"{policy}:{size}" for size in sizes for policy in ("ascend", "fixed")]


def _least_work(runs: Runs, simpler: Sequence[Replay]) -> list[Replay]:
    """Replays of the online planner as for the mean TTFT, where deadlines are to be met: under overload the earliest
    deadline is late when it runs, and so are all behind it."""
    problem = runs.problem
    if problem.objective is not Objective.SLA:
        return []
    base_s = _base_round_s(problem, simpler)
    tried = [one for one in TRIED if one.aging < BY_ARRIVAL]
    tried += [OnlineSettings(pace=pace * base_s) for pace in PACES_TRIED]
    return [runs.under(f"joint:{replace(each, least_work=1.0)}") for each in tried]


def _tuned(runs: Runs, simpler: Sequence[Replay], num_trials: int) -> list[Replay]:
    """Replays of the online planner under settings that an Optuna study chooses, from those tried on."""
    problem = runs.problem
    if not num_trials:
        return []
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    most_s = P99_SLACK * min(one.ttft_s(99) for one in simpler)
    for settings in TRIED:
        study.enqueue_trial({"aging": settings.aging, "foresight": settings.foresight, "patience": 0.0})
    found: list[Replay] = []

    def loss_of(trial: optuna.Trial) -> float:
        share = trial.suggest_float("patience", 0.0, MOST_PATIENCE)
        settings = OnlineSettings(
            aging=trial.suggest_float("aging", *AGINGS, log=True),
            foresight=trial.suggest_float("foresight", *FORESIGHTS, log=True),
            patience=most_s * share if share >= LEAST_PATIENCE else 0.0,
        )
        one = runs.under(f"joint:{settings}")
        found.append(one)
        return loss(one, simpler, problem.objective)

    study.optimize(loss_of, n_trials=len(TRIED) + num_trials)
    return found


def _base_round_s(problem: Problem, simpler: Sequence[Replay]) -> float:
    """Seconds of the rounds of the policy with the least 99th percentile, on the stage where they take longest; the
    median."""
    packer, steadiest = Packer.of(problem), min(simpler, key=lambda one: one.ttft_s(99))
    return float(np.median([packer.seconds(chunks, problem.requests) for chunks in steadiest.planned.rounds]))
