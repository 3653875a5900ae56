"""`joint`: rounds of equal cost over the whole batch, the best of several constructions under the exact recurrence.

1. The relaxation of `tuner.bound` says near which cap on a round's time the best plan lies.
2. Around it caps are swept; under each, requests are packed into rounds in two ways (`tuner.packing`) and orders.
3. The best few are improved by moving tokens between neighbouring rounds (`tuner.policies.improve`).
4. Batches of a few grid units are searched exactly (`tuner.policies.exact`).

Every candidate is judged by the exact recurrence: uneven stages, hand-offs, the window and arrivals included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tuner.bound import Work, envelopes, least_sum, likely_cap_s, makespan_bound_s
from tuner.cost_model import StageCost
from tuner.packing import Packer, pack_in_order, pack_tails
from tuner.plan import Request, Round
from tuner.policies.exact import exact_rounds, is_small
from tuner.policies.improve import improve_rounds
from tuner.problem import Problem
from tuner.schedule import Objective

Score = tuple[float, ...]
Pack = Callable[[Packer, Sequence[Request], Sequence[int], float], list[Round]]

CHUNK_DECISIONS = 24_000
"""Chunks that all packings of one search may make together: what bounds the planning time of large batches."""
MOST_CAPS = 64
"""Caps on the sweep of a small batch."""


def joint_rounds(problem: Problem, bound_s: float) -> list[Round]:
    """Plan a batch that is known at the start."""
    packer = Packer.of(problem)
    orders = request_orders(problem)
    best: list[tuple[Score, list[Round]]] = []
    packs: list[Pack] = [pack_in_order]
    total_held = sum(request.prompt_tokens for request in problem.requests)
    if problem.limits.max_kv_tokens is None or problem.limits.max_kv_tokens >= total_held:
        packs.append(pack_tails)
    cap = central_cap_s(problem)
    for pack in packs:
        for order in orders:
            best.extend(_sweep(problem, packer, pack, order, cap, len(packs) * len(orders)))
    best.sort(key=lambda candidate: candidate[0])
    score, rounds = best[0]
    if problem.objective is Objective.MAKESPAN and is_small(problem):
        return exact_rounds(problem, rounds)
    return improve_rounds(problem, rounds, bound_s * 1.0005)


def central_cap_s(problem: Problem) -> float:
    """The cap at which the relaxed makespan on the slowest stage is least."""
    work = Work.of(problem.requests, problem.limits.max_round_tokens)
    slowest = envelopes([slowest_stage(problem)], work)
    return max(likely_cap_s(envelope, work, problem.cost.pp_size - 1) for envelope in slowest)


def slowest_stage(problem: Problem) -> StageCost:
    """The stage on which the batch takes longest."""
    chunks = [(request.new_tokens, request.cached_tokens, True) for request in problem.requests]
    return max(problem.cost.kinds, key=lambda kind: kind.seconds(chunks))


def request_orders(problem: Problem) -> list[list[int]]:
    """Orders to pack in: least remaining work for its weight first (Smith's rule)."""
    stage, requests = slowest_stage(problem), problem.requests
    work = [stage.seconds([(r.new_tokens, r.cached_tokens, True)]) for r in requests]
    return [sorted(range(len(requests)), key=lambda i: work[i] / max(requests[i].weight, 1e-12))]


def _sweep(
    problem: Problem, packer: Packer, pack: Pack, order: Sequence[int], cap_s: float, share: int
) -> list[tuple[Score, list[Round]]]:
    """Pack under caps around `cap_s`, then closer around the best; the best candidate of each pass."""
    found: dict[float, tuple[Score, list[Round]]] = {}

    def attempt(cap: float) -> None:
        rounds = pack(packer, problem.requests, order, cap)
        found[cap] = (problem.evaluate(rounds).score(problem.objective), rounds)

    attempt(cap_s)
    num_chunks = sum(map(len, found[cap_s][1]))
    num_caps = int(np.clip(CHUNK_DECISIONS // (num_chunks * share), 4, MOST_CAPS))
    for cap in cap_s * np.linspace(0.8, 1.2, num_caps - num_caps // 3):
        attempt(float(cap))
    centre = min(found, key=lambda cap: found[cap][0])
    width = 0.4 / (num_caps - num_caps // 3)
    for cap in centre * (1.0 + width * np.linspace(-1.0, 1.0, num_caps // 3)):
        attempt(float(cap))
    return [min(found.values(), key=lambda candidate: candidate[0])]
