"""`joint`: rounds of equal cost over the whole batch, the best of several constructions under the exact recurrence.

1. The relaxation of `tuner.bound` says near which cap on a round's time the best plan lies.
2. Around it caps are swept; under each, requests are packed into rounds in three ways: in order, by tails
   (`tuner.packing`), and by dynamic programming over a line of chunks (`tuner.policies.dp`). Fixed chunks compete, from
   about the size that came out best on: where kernels fill a card in steps, equal rounds are hard to beat.
3. For mean TTFT and deadlines, rounds of short prompts also get lower caps, and other orders are tried; a plan gives
   up at most `MAKESPAN_SLACK` of the best makespan for it.
   With arrivals, the online planner's rounds are the candidates (`tuner.online`).
4. The best few are improved by moving tokens between neighbouring rounds (`tuner.policies.improve`).
5. Batches of a few grid units are searched exactly (`tuner.policies.exact`), few prompts also on a coarser grid.

Every candidate is judged by the exact recurrence: uneven stages, hand-offs, the window and arrivals included.
"""

from __future__ import annotations

import math
from dataclasses import replace

from tuner.online import online_rounds
from tuner.packing import pack_in_order, pack_tails
from tuner.plan import Round
from tuner.policies.dp import pack_line
from tuner.policies.exact import exact_rounds, is_small
from tuner.policies.fixed import fixed_rounds
from tuner.policies.improve import improve_rounds
from tuner.policies.sweep import Pack, Search, cap_profiles, request_orders, shortest_first
from tuner.problem import Problem
from tuner.schedule import MAKESPAN_SLACK, Objective

MOST_STARTS = 3
"""Candidates, of different numbers of rounds, that are improved locally."""
GOOD_ENOUGH = 1.002
"""A makespan within this factor of the bound is not improved further."""
NEAR_BOUND = 1.01
"""Plans within this factor of the bound need not compete with fixed chunks."""
FEW_PROMPTS = 3
"""Batches of so few prompts are also searched exactly on a coarser grid: it finds how rounds should grow and shrink
where stages differ, which one cap for all rounds does not."""
MOST_UNEVEN_STAGES, COARSE_LABELS = 16, 48
"""Stages and labels a state of that search."""
CAP_SCALES = (1.0, 0.7, 0.85, 1.2, 1.5)
"""With arrivals, scales of the online planner's caps that are tried."""
FEW_REQUESTS = 256
"""With more requests that arrive over time, only the first scale is tried."""


def joint_rounds(problem: Problem, bound_s: float) -> list[Round]:
    """Plan a batch that is known at the start; `bound_s`, the makespan's lower bound, says when to stop improving."""
    search, objective = Search.of(problem), problem.objective
    if problem.is_timed:
        scales = CAP_SCALES if len(problem.requests) <= FEW_REQUESTS else CAP_SCALES[:1]
        for scale in scales:
            search.keep(online_rounds(problem, scale), objective)
    else:
        flat = [1.0] * len(problem.requests)
        for pack in _packs(problem):
            search.sweep(pack, shortest_first(problem), flat, Objective.MAKESPAN)
        best_so_far = search.ranked()[0]
        if best_so_far.evaluation.makespan_s > NEAR_BOUND * bound_s:
            _keep_fixed(search, len(best_so_far.rounds))
        if objective is not Objective.MAKESPAN:
            search.limit(MAKESPAN_SLACK * search.ranked()[0].evaluation.makespan_s, objective)
            search.keep(online_rounds(problem), objective)
            for order in request_orders(problem):
                for profile in cap_profiles(problem, order):
                    search.sweep(pack_in_order, order, profile, objective)
    if objective is Objective.MAKESPAN:
        known = search.ranked()[0]
        if is_small(problem):
            return exact_rounds(problem, known.rounds)
        uneven = len(problem.cost.kinds) > 1 and problem.cost.pp_size <= MOST_UNEVEN_STAGES
        if uneven and len(problem.requests) <= FEW_PROMPTS:
            coarser = _coarser(problem)
            if is_small(coarser):
                search.keep(exact_rounds(coarser, known.rounds, COARSE_LABELS), objective)
    best = search.ranked()
    starts = best[: MOST_STARTS if objective is Objective.MAKESPAN else 1]
    improved = [improve_rounds(problem, start.rounds, bound_s * GOOD_ENOUGH, search.limit_s) for start in starts]
    return min(improved, key=lambda rounds: search.score(problem.evaluate(rounds), objective))


def _keep_fixed(search: Search, num_rounds: int) -> None:
    """Climb over fixed chunks of a power of two of grid units, from the mean size of `num_rounds` rounds."""
    problem = search.problem
    units = sum(request.new_tokens for request in problem.requests) / problem.chunk_multiple
    most = max(math.ceil(math.log2(max(units, 1.0))), 0)

    def makespan_s(power: int) -> float:
        rounds = fixed_rounds(problem, problem.chunk_multiple << power)
        search.keep(rounds, Objective.MAKESPAN)
        return problem.evaluate(rounds).makespan_s

    at = min(max(round(math.log2(max(units / num_rounds, 1.0))), 0), most)
    best_s = makespan_s(at)
    for step in (1, -1):
        while 0 <= at + step <= most and (found_s := makespan_s(at + step)) < best_s:
            at, best_s = at + step, found_s


def _coarser(problem: Problem) -> Problem:
    """The same problem on the finest grid, a power of two coarser, on which it is small; a round must hold a unit."""
    longest = max(request.new_tokens for request in problem.requests)
    most = min(longest, problem.limits.max_round_tokens or longest)
    while not is_small(problem) and 2 * problem.chunk_multiple <= most:
        problem = replace(problem, chunk_multiple=2 * problem.chunk_multiple)
    return problem


def _packs(problem: Problem) -> list[Pack]:
    """Packing by tails starts all requests before any ends: not where the KV limit forbids it."""
    held = sum(request.prompt_tokens for request in problem.requests)
    if problem.limits.max_kv_tokens is not None and problem.limits.max_kv_tokens < held:
        return [pack_in_order]
    return [pack_tails] if len(problem.requests) == 1 else [pack_in_order, pack_tails, pack_line]
