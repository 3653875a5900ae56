"""Replays an arrival trace under each policy, which sees a request only once it has arrived; TTFT and throughput."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Unpack

import numpy as np

from tuner.online.driven import online_rounds
from tuner.online.settings import OnlineSettings
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request, Round
from tuner.policies.named import BASED, POLICIES, base_sizes, fixed_sweep, named_rounds
from tuner.rounds.packing.packer import Packer
from tuner.rounds.problem import Problem, RoundOptions
from tuner.rounds.round_plan import Bound, RoundPlan
from tuner.rounds.schedule import Evaluation
from tuner.search.planner import no_cycles
from tuner.workload.objective import Objective

WHILE_OTHERS_COME = 0.0075
"""By how much what waits may take longer for a lower mean TTFT: all that come later wait for it too."""
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
MEAN_SLACK, P99_SLACK = 1.02, 1.05
"""How far above the simpler policies' least `joint` may be in one figure to be better in the other."""
HOPELESS = 3.0
"""Base chunks are made shorter until their figures are so many times the best."""
PENALTY = 10.0
"""What a study counts each share of TTFT above those limits as."""
SETTINGS_KEPT = 3
"""Settings of the online planner under which the whole of a long trace is replayed."""
FEW_REQUESTS = 128
"""Of a longer trace only the beginning is replayed under every policy, unless all are asked for."""
NEARLY = 1.2
"""Policies whose mean TTFT there is within this factor of the simpler ones' least are replayed in full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A trace under one policy, with the rounds that the policy is predicted to run."""

    policy: str
    planned: RoundPlan
    """Its policy with the parameter that was best: `sglang:4096`, `joint:1.5`; of `joint` maybe a simpler policy."""
    tokens_per_s: float
    """New prompt tokens a second from the first arrival to the last TTFT."""
    goodput: float
    """Requests a second of the same time that meet their limits of TTFT and TPOT; all do that have none."""

    @property
    def evaluation(self) -> Evaluation:
        """What the cost model says of the rounds."""
        return self.planned.evaluation

    @property
    def num_rounds(self) -> int:
        """Number of rounds."""
        return len(self.planned.rounds)

    def ttft_s(self, percentile: float) -> float:
        """A percentile of the TTFTs."""
        return float(np.percentile(self.evaluation.ttft_s, percentile))


class Runs:
    """A trace on one pipeline: each policy is run once."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self._bound = Bound(problem)
        self._known: dict[str, Replay] = {}

    def under(self, policy: str) -> Replay:
        """The replay under a policy with its parameters."""
        if policy not in self._known:
            self._known[policy] = _replay(self.problem, policy, self._bound)
        return self._known[policy]

    @cached_property
    def beginning(self) -> Runs:
        """Of the first FEW_REQUESTS requests alone."""
        first = sorted(self.problem.requests, key=lambda request: request.arrival_s)[:FEW_REQUESTS]
        return Runs(replace(self.problem, requests=tuple(first)))


def replay(
    cost: CostModel,
    requests: Sequence[Request],
    *,
    policy: str = "joint",
    known: dict[Problem, Runs] | None = None,
    **options: Unpack[RoundOptions],
) -> Replay:
    """Run a trace under a policy, in the exact recurrence.

    `joint` is the online planner, its caps scaled by S in `joint:S`. The schedulers (`fixed:N`, `sglang`, `ascend`)
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
    variants["joint"] += _paced(runs, variants)
    variants["joint"] += _patient(runs, variants)
    variants["joint"] += _by_makespan(runs)
    variants["joint"] += _between(runs, variants)
    variants["joint"] += _least_work(runs, variants)
    variants["joint"] += _tuned(runs, variants, num_trials)
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


def _patient(runs: Runs, variants: Mapping[str, Sequence[Replay]]) -> list[Replay]:
    """Replays of the online planner that lets nothing wait for much longer than the simpler policies do."""
    problem = runs.problem
    if problem.objective.needs_deadlines or _are_alike(problem.requests):
        return []
    simpler = _simpler(variants)
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


def _paced(runs: Runs, variants: Mapping[str, Sequence[Replay]]) -> list[Replay]:
    """Replays of the online planner in rounds of one length, least work first; under the best also aged more."""
    problem = runs.problem
    if problem.objective is not Objective.MEAN_TTFT:
        return []
    simpler, alike = _simpler(variants), _are_alike(problem.requests)
    aging, base_s = BY_ARRIVAL if alike else OnlineSettings().aging, _base_round_s(problem, simpler)
    tried = [OnlineSettings(aging=aging, pace=pace * base_s) for pace in PACES_TRIED]
    found = [runs.under(f"joint:{each}") for each in tried]
    if not alike:
        best = OnlineSettings.parse(best_of(found, simpler, problem.objective).planned.policy.partition(":")[2])
        found.append(runs.under(f"joint:{replace(best, aging=AGED)}"))
    return found


def _between(runs: Runs, variants: Mapping[str, Sequence[Replay]]) -> list[Replay]:
    """Replays of the online planner under more settings, one by one, while none is within the limits of `best_of`: what
    is best in the mean and what is best in the 99th percentile may lie far apart."""
    problem = runs.problem
    if problem.objective is not Objective.MEAN_TTFT:
        return []
    simpler = _simpler(variants)
    most_mean_s, most_p99_s = _limits_s(simpler)

    def keeps(one: Replay) -> bool:
        return one.evaluation.mean_ttft_s <= most_mean_s and one.ttft_s(99) <= most_p99_s

    tried = {one.planned.policy for one in variants["joint"]}
    found: list[Replay] = []
    if any(map(keeps, (*variants["joint"], *simpler))):
        return found

    def attempt(settings: OnlineSettings | str) -> Replay:
        found.append(runs.under(settings if isinstance(settings, str) else f"joint:{settings}"))
        return found[-1]

    base_s = _base_round_s(problem, simpler)
    if _are_alike(problem.requests):
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


def _by_makespan(runs: Runs) -> list[Replay]:
    """Replays of the online planner with rounds as for the makespan of what waits; first come first served, which is
    any order of prompts alike, these are best nowhere."""
    if runs.problem.objective.needs_deadlines or _are_alike(runs.problem.requests):
        return []
    return [runs.under(f"joint:{OnlineSettings(aging=aging, makespan=1.0)}") for aging in AGINGS_TRIED]


def _least_work(runs: Runs, variants: Mapping[str, Sequence[Replay]]) -> list[Replay]:
    """Replays of the online planner as for the mean TTFT, where deadlines are to be met: under overload the earliest
    deadline is late when it runs, and so are all behind it."""
    problem = runs.problem
    if problem.objective is not Objective.SLA:
        return []
    base_s = _base_round_s(problem, _simpler(variants))
    tried = [one for one in TRIED if one.aging < BY_ARRIVAL]
    tried += [OnlineSettings(pace=pace * base_s) for pace in PACES_TRIED]
    return [runs.under(f"joint:{replace(each, least_work=1.0)}") for each in tried]


def _simpler(variants: Mapping[str, Sequence[Replay]]) -> list[Replay]:
    """The replays of all policies but `joint`."""
    return [replay for policy, replays in variants.items() if policy != "joint" for replay in replays]


def _base_round_s(problem: Problem, simpler: Sequence[Replay]) -> float:
    """Seconds of the rounds of the policy with the least 99th percentile, on the stage where they take longest; the
    median."""
    packer, steadiest = Packer.of(problem), min(simpler, key=lambda one: one.ttft_s(99))
    return float(np.median([packer.seconds(chunks, problem.requests) for chunks in steadiest.planned.rounds]))


def _limits_s(simpler: Sequence[Replay]) -> tuple[float, float]:
    """Most mean TTFT and most 99th percentile of a policy that is behind none of these by more than is allowed."""
    mean_s = min(one.evaluation.mean_ttft_s for one in simpler)
    return MEAN_SLACK * mean_s, P99_SLACK * min(one.ttft_s(99) for one in simpler)


def _are_alike(requests: Sequence[Request]) -> bool:
    """Whether no running order is better than another but by arrival."""
    return len({(one.new_tokens, one.cached_tokens, one.weight) for one in requests}) == 1


def ranked(variants: Mapping[str, Sequence[Replay]], objective: Objective) -> list[Replay]:
    """Each policy under its best parameter; `joint`, last, may be any of them."""
    simpler = _simpler(variants)
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
    most_mean_s, most_p99_s = _limits_s(simpler)

    def score(one: Replay) -> tuple[float, float, float]:
        mean_s = one.evaluation.mean_ttft_s
        return max(mean_s / most_mean_s, 1.0), max(one.ttft_s(99) / most_p99_s, 1.0), mean_s

    return min(replays, key=score)


def _tuned(runs: Runs, variants: Mapping[str, Sequence[Replay]], num_trials: int) -> list[Replay]:
    """Replays of the online planner under settings that an Optuna study chooses, from those tried on."""
    problem = runs.problem
    if not num_trials:
        return []
    import optuna

    simpler = _simpler(variants)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    most_s = P99_SLACK * min(one.ttft_s(99) for one in simpler)
    for settings in TRIED:
        study.enqueue_trial({"aging": settings.aging, "foresight": settings.foresight, "patience": 0.0})
    found: list[Replay] = []

    def loss(trial: optuna.Trial) -> float:
        share = trial.suggest_float("patience", 0.0, MOST_PATIENCE)
        settings = OnlineSettings(
            aging=trial.suggest_float("aging", *AGINGS, log=True),
            foresight=trial.suggest_float("foresight", *FORESIGHTS, log=True),
            patience=most_s * share if share >= LEAST_PATIENCE else 0.0,
        )
        one = runs.under(f"joint:{settings}")
        found.append(one)
        return _loss(one, simpler, problem.objective)

    study.optimize(loss, n_trials=len(TRIED) + num_trials)
    return found


def _loss(one: Replay, simpler: Sequence[Replay], objective: Objective) -> float:
    """The objective of a study of settings: the comparison of `best_of` as one number."""
    if objective is not Objective.MEAN_TTFT:
        return one.evaluation.score(objective)[0]
    least_mean_s = min(each.evaluation.mean_ttft_s for each in simpler)
    least_p99_s = min(each.ttft_s(99) for each in simpler)
    mean, p99 = one.evaluation.mean_ttft_s / least_mean_s, one.ttft_s(99) / least_p99_s
    return mean + PENALTY * (max(mean - MEAN_SLACK, 0.0) + max(p99 - P99_SLACK, 0.0))


def _names(problem: Problem, policy: str) -> list[str]:
    """The policy with each of the parameters that it leaves open."""
    if policy == "joint":
        alike = _are_alike(problem.requests)
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


def _replay(problem: Problem, policy: str, bound: Bound) -> Replay:
    started = time.perf_counter()
    rounds = _rounds(problem, policy)
    evaluation = problem.evaluate(rounds)
    planning_s = time.perf_counter() - started
    first = min(request.arrival_s for request in problem.requests)
    tokens = sum(request.new_tokens for request in problem.requests)
    planned = RoundPlan(policy=policy, rounds=tuple(rounds), evaluation=evaluation, bound=bound, planning_s=planning_s)
    span_s = evaluation.makespan_s - first
    goodput = evaluation.num_sla_met / span_s
    return Replay(policy=policy, planned=planned, tokens_per_s=tokens / span_s, goodput=goodput)


def _rounds(problem: Problem, policy: str) -> list[Round]:
    name, _, settings = policy.partition(":")
    if name != "joint":
        return named_rounds(problem, policy)
    return online_rounds(problem, OnlineSettings.parse(settings))


def _runs(
    cost: CostModel, requests: Sequence[Request], known: dict[Problem, Runs] | None, options: RoundOptions
) -> Runs:
    """Of the problem; where the caller names no objective, by the mean TTFT."""
    of_trace: RoundOptions = {"objective": Objective.MEAN_TTFT, **options, "max_makespan_increase": WHILE_OTHERS_COME}
    runs = Runs(Problem.of(cost, requests, **of_trace))
    return runs if known is None else known.setdefault(runs.problem, runs)
