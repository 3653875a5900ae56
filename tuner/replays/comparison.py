"""A trace under every policy, each with its parameters; `joint` under the settings that are best on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.policies.named import BASED, POLICIES, base_sizes, fixed_sweep
from tuner.replays.ranking import best_of, ranked, simpler_of
from tuner.replays.replay import FEW_REQUESTS, Replay, Runs
from tuner.replays.settings_tried import TRIED, are_alike, settings_tried
from tuner.rounds.problem import Problem, RoundOptions
from tuner.rounds.round_plan import no_cycles
from tuner.workload.objective import Objective

WHILE_OTHERS_COME = 0.0075
"""By how much what waits may take longer for a lower mean TTFT: all that come later wait for it too."""
HOPELESS = 3.0
"""Base chunks are made shorter until their figures are so many times the best."""
SETTINGS_KEPT = 3
"""Settings of the online planner under which the whole of a long trace is replayed."""
NEARLY = 1.2
"""Policies whose mean TTFT there is within this factor of the simpler ones' least are replayed in full."""


def replay(
    cost: CostModel,
    requests: Sequence[Request],
    *,
    policy: str = "joint",
    known: dict[Problem, Runs] | None = None,
    **options: Unpack[RoundOptions],
) -> Replay:
    """Run a trace under a policy, in the exact recurrence.

    `joint` is the online planner, with settings as in `joint:aging=0.1`. The schedulers (`fixed:N`, `sglang`, `ascend`)
    decide round by round as their sources do. The batch policies (`gpipe`, `terapipe`, `dp`) plan all that waits
    whenever the first stage has run dry. A parameter that is left open is the best one by the objective.
    known: what was run before, to be added to.
    """
    runs = _runs(cost, requests, known, options)
    with no_cycles():
        replays = [runs.under(name) for name in _names(runs.problem, policy)]
    return replace(best_of(replays, replays, runs.problem.objective), policy=policy)


def compare_replays(
    cost: CostModel,
    requests: Sequence[Request],
    *,
    least_chunk: int = 1024,
    everything: bool = True,
    num_trials: int = 0,
    known: dict[Problem, Runs] | None = None,
    **options: Unpack[RoundOptions],
) -> list[Replay]:
    """Replay a trace under every policy, the fixed chunk swept over powers of two from `least_chunk` tokens up.

    The last is `joint`: the online planner under the settings, or the simpler policy, that is best (`best_of`).
    everything: or else a trace of more than FEW_REQUESTS only under the online planner, the best fixed chunk and what
    is NEARLY as good on the trace's beginning. num_trials: settings of the online planner that are tried beside.
    known: what was run before, to be added to.
    """
    runs = _runs(cost, requests, known, options)
    variants = replay_variants(runs, least_chunk=least_chunk, everything=everything, num_trials=num_trials)
    return ranked(variants, runs.problem.objective)


def replay_variants(
    runs: Runs, *, least_chunk: int = 1024, everything: bool = True, num_trials: int = 0
) -> dict[str, list[Replay]]:
    """The replays of every policy, one for each of its parameters that is tried; `joint` last."""
    with no_cycles():
        return _variants(runs, least_chunk, everything, num_trials)


def _variants(runs: Runs, least_chunk: int, everything: bool, num_trials: int) -> dict[str, list[Replay]]:
    problem = runs.problem
    swept = fixed_sweep(problem.requests, problem.chunk_multiple)
    fixed = [name for name in swept if int(name.removeprefix("fixed:")) >= least_chunk] or swept[-1:]
    policies = {policy: _names(problem, policy) for policy in [*fixed, *POLICIES[1:]]}
    if not everything and len(problem.requests) > FEW_REQUESTS:
        policies = _shortlist(runs, policies)
    variants = {policy: _sweep(runs, names) for policy, names in policies.items()}
    variants["joint"] += settings_tried(runs, simpler_of(variants), variants["joint"], num_trials)
    return variants


def _sweep(runs: Runs, names: Sequence[str]) -> list[Replay]:
    """Replays under each of a policy's parameters; of base chunks the longest first, until one is hopeless."""
    if names[0].partition(":")[0] not in BASED:
        return [runs.under(name) for name in names]
    found: list[Replay] = []
    for name in reversed(names):
        found.append(runs.under(name))
        figures = np.array([(one.evaluation.mean_ttft_s, one.ttft_s(99)) for one in found])
        longest_s = max(one.evaluation.makespan_s for one in found)
        if (figures[-1] > HOPELESS * figures.min(axis=0)).all() and found[-1].evaluation.makespan_s >= longest_s:
            break
    return found


def _names(problem: Problem, policy: str) -> list[str]:
    """The policy with each of the parameters that it leaves open."""
    if policy == "joint":
        alike = are_alike(problem.requests)
        kept = {one.foresight if alike else one: one for one in TRIED}  # of prompts alike none is aged before another
        return [f"joint:{settings}" for settings in kept.values()]
    return [f"{policy}:{base}" for base in base_sizes(problem)] if policy in BASED else [policy]


def _shortlist(runs: Runs, policies: dict[str, list[str]]) -> dict[str, list[str]]:
    """Policies under the parameters that are best on the trace's beginning, those far from the best left out."""
    problem, beginning = runs.problem, runs.beginning
    tried = {policy: [beginning.under(name) for name in names] for policy, names in policies.items()}
    best = {one.policy: one for one in ranked(tried, problem.objective)}

    def mean_s(policy: str) -> float:
        return best[policy].evaluation.mean_ttft_s

    fixed = min((policy for policy in tried if policy.startswith("fixed:")), key=mean_s)
    most_s = NEARLY * min(mean_s(policy) for policy in tried if policy != "joint")  # these set joint's limits
    latest_s = best["joint"].evaluation.makespan_s
    likely = [
        policy
        for policy, one in best.items()
        if policy in (fixed, "joint") or mean_s(policy) <= most_s or one.evaluation.makespan_s < latest_s / NEARLY
    ]
    own = sorted(tried["joint"], key=lambda one: one.evaluation.score(problem.objective))
    joint = [best_of(own, own, problem.objective), *own]
    names = {policy: [best[policy].planned.policy] for policy in likely if policy != "joint"}
    return names | {"joint": list(dict.fromkeys(one.planned.policy for one in joint))[:SETTINGS_KEPT]}


def _runs(
    cost: CostModel, requests: Sequence[Request], known: dict[Problem, Runs] | None, options: RoundOptions
) -> Runs:
    """Of the problem; where the caller names no objective, by the mean TTFT."""
    of_trace: RoundOptions = {"objective": Objective.MEAN_TTFT, **options, "max_makespan_increase": WHILE_OTHERS_COME}
    runs = Runs(Problem.of(cost, requests, **of_trace))
    return runs if known is None else known.setdefault(runs.problem, runs)
