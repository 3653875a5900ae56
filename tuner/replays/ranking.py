"""Which replay of a trace is best: by the objective, and by the mean TTFT with the long waits kept short as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from tuner.replays.replay import Replay
from tuner.workload.objective import Objective

MEAN_SLACK, P99_SLACK = 1.02, 1.05
"""How far above the simpler policies' least `joint` may be in one figure to be better in the other."""
PENALTY = 10.0
"""What a study counts each share of TTFT above those limits as."""


def simpler_of(variants: Mapping[str, Sequence[Replay]]) -> list[Replay]:
    """The replays of all policies but `joint`."""
    return [replay for policy, replays in variants.items() if policy != "joint" for replay in replays]


def limits_s(simpler: Sequence[Replay]) -> tuple[float, float]:
    """Most mean TTFT and most 99th percentile of a policy that is behind none of these by more than is allowed."""
    mean_s = min(one.evaluation.mean_ttft_s for one in simpler)
    return MEAN_SLACK * mean_s, P99_SLACK * min(one.ttft_s(99) for one in simpler)


def ranked(variants: Mapping[str, Sequence[Replay]], objective: Objective) -> list[Replay]:
    """Each policy under its best parameter; `joint`, last, may be any of them."""
    simpler = simpler_of(variants)
    best = best_of([*variants["joint"], *simpler], simpler, objective)
    by_score = [
        replace(min(replays, key=lambda one: one.evaluation.score(objective)), policy=policy)
        for policy, replays in variants.items()
        if policy != "joint"
    ]
    return [*by_score, replace(best, policy="joint")]


def best_of(replays: Sequence[Replay], simpler: Sequence[Replay], objective: Objective) -> Replay:
    """The best by the objective; by the mean TTFT, one that keeps the long waits short as well.

    Running least work first makes the mean small and the last percent long. So of those whose mean is at most
    MEAN_SLACK times the simpler policies' least, the best is one whose 99th percentile is at most P99_SLACK times
    theirs, or else the one that exceeds that least.
    """
    if objective is not Objective.MEAN_TTFT:
        return min(replays, key=lambda one: one.evaluation.score(objective))
    most_mean_s, most_p99_s = limits_s(simpler)

    def score(one: Replay) -> tuple[float, float, float]:
        mean_s = one.evaluation.mean_ttft_s
        return max(mean_s / most_mean_s, 1.0), max(one.ttft_s(99) / most_p99_s, 1.0), mean_s

    return min(replays, key=score)


def loss(one: Replay, simpler: Sequence[Replay], objective: Objective) -> float:
    """The objective of a study of settings: the comparison of `best_of` as one number."""
    if objective is not Objective.MEAN_TTFT:
        return one.evaluation.score(objective)[0]
    least_mean_s = min(each.evaluation.mean_ttft_s for each in simpler)
    least_p99_s = min(each.ttft_s(99) for each in simpler)
    mean, p99 = one.evaluation.mean_ttft_s / least_mean_s, one.ttft_s(99) / least_p99_s
    return mean + PENALTY * (max(mean - MEAN_SLACK, 0.0) + max(p99 - P99_SLACK, 0.0))
