"""`joint`: rounds of equal cost over the whole batch, the best of several constructions under the exact recurrence.

1. The relaxation of `rounds.bound` says near which cap on a round's time the best plan lies.
2. Around it caps are swept; under each, requests are packed into rounds in three ways: in order, by tails
   (`rounds.packing.packer`), and by dynamic programming over a line of chunks (`tuner.policies.dp`). On tables and
   where stages differ, a line of all tokens is also cut anywhere (`tuner.policies.line.stretches`), so that rounds
   shrink while the pipeline drains; on tables rounds are also filled by what chunks are worth
   (`rounds.packing.worth`). Every simpler policy competes (`tuner.policies.named`).
3. For mean TTFT and deadlines, rounds of short prompts also get lower caps, and other orders are tried; a plan gives
   up at most `max_makespan_increase` of the best makespan for it.
   With arrivals, the online planner's rounds are the candidates (`tuner.online.online_planner`).
   Where a stage holds several groups, the best rounds also grow and shrink at the ends (`tuner.policies.ramp`).
4. The best few are improved by moving tokens between neighbouring rounds (`tuner.policies.local_search`).
5. Batches of a few grid units are searched exactly (`tuner.policies.exact`), few prompts also on a coarser grid.

Every candidate is judged by the exact recurrence: uneven stages, hand-offs, the window and arrivals included.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tuner.online.driven import online_rounds
from tuner.online.settings import OnlineSettings
from tuner.plan.plan import Round
from tuner.policies.dp import pack_line
from tuner.policies.exact import exact_rounds, is_small
from tuner.policies.line.stretches import stretch_rounds
from tuner.policies.local_search import fits_kv, local_search
from tuner.policies.named import simpler_rounds
from tuner.policies.ramp import ramps
from tuner.policies.sweep import (
    Pack,
    Search,
    budget_profiles,
    request_orders,
    shortest_first,
    whole_rounds,
)
from tuner.rounds.grid.relaxation import is_curved
from tuner.rounds.packing.packer import pack_in_order, pack_tails
from tuner.rounds.problem import Problem
from tuner.rounds.round_plan import Bound
from tuner.workload.objective import Objective

DRAFT_EFFORT = 0.4
"""Share of the caps that a draft tries: it ranks layouts and partitions, to about 0.3 %."""
SKETCH_EFFORT = 0.2
MOST_STARTS = 3
"""Candidates, of different numbers of rounds, that are improved locally."""
RAMP_WIDTHS = (2, 4)
"""How many rounds of each length a ramp may have beside one."""
GOOD_ENOUGH = 1.002
"""A makespan within this factor of the bound is not improved further."""
NEAR_BOUND = 1.005
"""Plans within this factor of the bound need not compete with simpler policies'."""
FEW_PROMPTS = 3
"""Batches of so few prompts are also searched exactly on a coarser grid: it finds how rounds should grow and shrink
where stages differ, which one cap for all rounds does not."""
MOST_UNEVEN_STAGES, COARSE_LABELS = 16, 48
"""Stages and labels a state of that search."""
FORESIGHTS = (0.3, 4.0)
"""With arrivals, settings of the online planner that are tried beside its own."""
FEW_REQUESTS = 256
"""With more requests that arrive over time, only its own are tried."""


def draft_rounds(problem: Problem) -> list[Round]:
    """The best of the sweeps for the makespan, and of the online planner's rounds where it is wanted for them."""
    return _drafted(problem, DRAFT_EFFORT).ranked()[0].rounds


def draft_choices(problem: Problem, most: int) -> list[list[Round]]:
    """The best few of the sweeps for the makespan, each of another number of rounds."""
    return [found.rounds for found in _drafted(problem, SKETCH_EFFORT, most).ranked()[:most]]


def joint_rounds(problem: Problem, bound: Bound) -> list[Round]:
    """Plan a batch that is known at the start; the makespan's lower bound says when to stop improving.

    No simpler policy's plan is better, but for makespans within NEAR_BOUND of the bound; for other objectives than the
    makespan, none whose makespan is within the limit.
    """
    if len(problem.requests) == 1 and problem.objective is Objective.MEAN_TTFT:
        problem = replace(problem, objective=Objective.MAKESPAN)
    swept = _swept(problem, num_needed=_num_starts(problem))
    if problem.objective is Objective.MAKESPAN or problem.is_timed or math.isinf(problem.max_makespan_increase):
        return _finished(swept, bound)
    quickest = _finished(swept.towards(Objective.MAKESPAN), bound)
    return _finished(swept, bound, quickest)


def _num_starts(problem: Problem) -> int:
    """How many candidates for the makespan are improved locally."""
    return MOST_STARTS if problem.cost.virtual_stages == 1 else 2 * MOST_STARTS


def _finished(search: Search, bound: Bound, quickest: list[Round] | None = None) -> list[Round]:
    """The best rounds that follow from what was swept; `quickest`: those for the makespan alone, which limit others."""
    problem, objective = search.problem, search.problem.objective
    _add_drafts(search)
    if problem.is_timed and len(problem.requests) <= FEW_REQUESTS:
        for foresight in FORESIGHTS:
            search.keep(online_rounds(problem, OnlineSettings(foresight=foresight)), objective)
    if objective is Objective.MAKESPAN and _pays_by_worth(problem):
        search.sweep_by_worth()
    if objective is not Objective.MAKESPAN and not problem.is_timed:
        if quickest is not None:
            _limit_makespan(search, quickest)
        for order in request_orders(problem):
            for profile in budget_profiles(problem, order):
                search.sweep(pack_in_order, order, profile, objective)
    drafted = search.ranked()[0].evaluation
    known = ("dp",) if objective is Objective.MAKESPAN and not problem.is_timed and pack_line in _packs(problem) else ()
    near = objective is Objective.MAKESPAN and drafted.makespan_s <= NEAR_BOUND * bound.while_planning_s
    simpler = [] if near else list(simpler_rounds(problem, drafted.score(objective)[0], known))
    for rounds in simpler:
        search.keep(rounds, objective)
    if objective is Objective.MAKESPAN:
        best = search.ranked()[0]
        if is_small(problem):
            rounds, is_proven = exact_rounds(problem, best.rounds)
            if is_proven:
                bound.raise_to(problem.evaluate(rounds).makespan_s)
            return rounds
        uneven = len(problem.cost.kinds) > 1 and problem.cost.pp_size <= MOST_UNEVEN_STAGES
        if uneven and len(problem.requests) <= FEW_PROMPTS:
            coarser = _coarser(problem)
            if is_small(coarser):
                search.keep(exact_rounds(coarser, best.rounds, COARSE_LABELS)[0], objective)
    if problem.cost.virtual_stages > 1 and not problem.is_timed:
        _keep_ramps(search)
    starts = search.ranked()[: _num_starts(problem) if objective is Objective.MAKESPAN else 1]
    good_enough_s = GOOD_ENOUGH * bound.while_planning_s if objective is Objective.MAKESPAN else 0.0
    improved = [local_search(problem, start.rounds, good_enough_s, search.limit_s) for start in starts]
    return min(improved, key=lambda rounds: search.score(problem.evaluate(rounds), objective))


def _limit_makespan(search: Search, quickest: list[Round]) -> None:
    """Limit makespans beside what a plan for the makespan alone has, which is a candidate from now on."""
    problem = search.problem
    found_s = [candidate.evaluation.makespan_s for candidate in search.found.values()]
    least_s = min(problem.evaluate(quickest).makespan_s, *found_s)
    search.limit(problem.makespan_limit_s(least_s), problem.objective)  # first: of so many rounds one is kept
    search.keep(quickest, problem.objective)


def _keep_ramps(search: Search) -> None:
    """Candidates that grow and shrink at the ends."""
    problem = search.problem
    starts = search.ranked()[:MOST_STARTS]
    widths = [(start, 1) for start in starts] + [(starts[0], width) for width in RAMP_WIDTHS]
    for start, width in widths:
        for rounds in ramps(problem.requests, start.rounds, problem.chunk_multiple, width):
            if fits_kv(problem, rounds):
                search.keep(rounds, problem.objective)


def _keep_stretches(search: Search) -> None:
    """Candidates that are cut anywhere, where one cap for all rounds is not the best: on tables, and where stages
    differ."""
    problem = search.problem
    if len(problem.cost.kinds) > 1 or is_curved(problem.cost.kinds):
        for rounds in stretch_rounds(problem, shortest_first(problem), search.cap_s):
            if fits_kv(problem, rounds):
                search.keep(rounds, Objective.MAKESPAN)


def _drafted(problem: Problem, effort: float = 1.0, num_needed: int = 1) -> Search:
    search = _swept(problem, effort, num_needed)
    _add_drafts(search)
    return search


def _swept(problem: Problem, effort: float = 1.0, num_needed: int = 1) -> Search:
    """The sweeps for the makespan, whatever the objective; none for requests that arrive over time."""
    search = Search.of(problem, effort, num_needed)
    if problem.is_timed:
        return search
    flat, packs = [1.0] * len(problem.requests), _packs(problem)
    for pack in packs:
        search.sweep(pack, shortest_first(problem), flat, Objective.MAKESPAN)
    if pack_line in packs:
        _keep_stretches(search)
    return search


def _add_drafts(search: Search) -> None:
    """What is quickly made for another objective than the makespan, and of requests that arrive over time."""
    problem, objective = search.problem, search.problem.objective
    if problem.is_timed:
        search.keep(online_rounds(problem), objective)
    elif objective is not Objective.MAKESPAN:
        search.limit(problem.makespan_limit_s(search.ranked()[0].evaluation.makespan_s), objective)
        search.keep(whole_rounds(problem, shortest_first(problem)), objective)
        search.keep(online_rounds(problem), objective)


def _coarser(problem: Problem) -> Problem:
    """The same problem on the finest grid, a power of two coarser, on which it is small; a round must hold a unit."""
    longest = max(request.new_tokens for request in problem.requests)
    most = min(longest, problem.limits.max_round_tokens or longest)
    while not is_small(problem) and 2 * problem.chunk_multiple <= most:
        problem = replace(problem, chunk_multiple=2 * problem.chunk_multiple)
    return problem


def _pays_by_worth(problem: Problem) -> bool:
    """Whether rounds filled by worth may be better: several prompts, that may all be under way at once, on tables."""
    curved = is_curved(problem.cost.kinds) and problem.cost.virtual_stages == 1
    return curved and not problem.is_timed and pack_tails in _packs(problem)


def _packs(problem: Problem) -> list[Pack]:
    """Packing by tails starts all requests before any ends: not where the KV limit forbids it."""
    held = sum(request.prompt_tokens for request in problem.requests)
    if problem.limits.max_kv_tokens is not None and problem.limits.max_kv_tokens < held:
        return [pack_in_order]
    return [pack_line] if len(problem.requests) == 1 else [pack_in_order, pack_tails, pack_line]
