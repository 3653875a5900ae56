"""`joint`: rounds of equal cost over the whole batch, the best of several constructions under the exact recurrence.

1. The relaxation of `tuner.bound` says near which cap on a round's time the best plan lies.
2. Around it caps are swept; under each, requests are packed into rounds in two ways (`tuner.packing`).
3. For mean TTFT and deadlines, rounds of short prompts also get lower caps, and other orders are tried; a plan gives up at
   most `MAKESPAN_SLACK` of the best makespan for it.
4. The best few are improved by moving tokens between neighbouring rounds (`tuner.policies.improve`).
5. Batches of a few grid units are searched exactly (`tuner.policies.exact`).

Every candidate is judged by the exact recurrence: uneven stages, hand-offs, the window and arrivals included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from tuner.bound import Work, envelopes, likely_cap_s
from tuner.cost_model import StageCost
from tuner.packing import Packer, pack_in_order, pack_tails
from tuner.plan import Request, Round
from tuner.policies.exact import exact_rounds, is_small
from tuner.policies.improve import improve_rounds
from tuner.problem import Problem
from tuner.schedule import Evaluation, Objective

Pack = Callable[[Packer, Sequence[Request], Sequence[int], Sequence[float]], list[Round]]

ROUNDS_SWEPT = 2_400
"""Rounds over all caps of one sweep: with many rounds a plan, their whole number matters less and fewer caps do."""
LEAST_CAPS, MOST_CAPS = 8, 72
MOST_STARTS = 3
"""Candidates, of different numbers of rounds, that are improved locally."""
GOOD_ENOUGH = 1.002
"""A makespan within this factor of the bound is not improved further."""
MAKESPAN_SLACK = 1.0075
"""A plan for mean TTFT or deadlines has at most this much times the best makespan found."""
CAP_POWERS = (0.0, 0.25, 0.5)
"""Exponents of the cap profiles tried for mean TTFT; the relaxation's own is 0.5 (`_profile`)."""


@dataclass(slots=True)
class _Candidate:
    score: tuple[float, ...]
    evaluation: Evaluation
    rounds: list[Round]


@dataclass(slots=True)
class _Search:
    """The candidates found so far: the best for each number of rounds."""

    problem: Problem
    packer: Packer
    cap_s: float
    limit_s: float = np.inf
    """Makespans above it count as worse than any below."""
    found: dict[int, _Candidate] = field(default_factory=dict)

    def score(self, evaluation: Evaluation, objective: Objective) -> tuple[float, ...]:
        return (max(evaluation.makespan_s - self.limit_s, 0.0), *evaluation.score(objective))

    def ranked(self) -> list[_Candidate]:
        return sorted(self.found.values(), key=lambda candidate: candidate.score)

    def sweep(self, pack: Pack, order: Sequence[int], profile: Sequence[float], objective: Objective) -> None:
        """Pack under caps around `cap_s`, then twice closer around the best; `profile` scales each request's cap."""
        tried: dict[float, _Candidate] = {}

        def attempt(cap: float) -> None:
            if cap not in tried:
                rounds = pack(self.packer, self.problem.requests, order, [cap * share for share in profile])
                evaluation = self.problem.evaluate(rounds)
                tried[cap] = _Candidate(self.score(evaluation, objective), evaluation, rounds)

        def best() -> float:
            return min(tried, key=lambda cap: tried[cap].score)

        attempt(self.cap_s)
        num_caps = int(np.clip(ROUNDS_SWEPT // len(tried[self.cap_s].rounds), LEAST_CAPS, MOST_CAPS))
        window, pp_size = self.problem.window, self.problem.cost.pp_size
        narrow = window is not None and window < pp_size
        width = 0.1
        if narrow or num_caps > 3 * LEAST_CAPS:  # a narrow window wants longer rounds than the relaxation says
            num_caps = num_caps // 3
            width = 0.2
            for factor in np.geomspace(0.4, 16.0 if narrow else 4.0, num_caps):
                attempt(self.cap_s * float(factor))
        centre = best()
        for share in (1, 1):
            for factor in np.linspace(1.0 - width, 1.0 + width, num_caps // share):
                attempt(centre * float(factor))
            centre, width = best(), 2.0 * width / num_caps
        for candidate in tried.values():
            known = self.found.get(len(candidate.rounds))
            if known is None or candidate.score < known.score:
                self.found[len(candidate.rounds)] = candidate


def joint_rounds(problem: Problem, bound_s: float) -> list[Round]:
    """Plan a batch that is known at the start; `bound_s`, the makespan's lower bound, says when to stop improving."""
    search = _Search(problem, Packer.of(problem), central_cap_s(problem))
    flat = [1.0] * len(problem.requests)
    for pack in _packs(problem):
        search.sweep(pack, shortest_first(problem), flat, Objective.MAKESPAN)
    if problem.objective is Objective.MAKESPAN:
        best = search.ranked()
        if is_small(problem):
            return exact_rounds(problem, best[0].rounds)
        starts = [candidate.rounds for candidate in best[:MOST_STARTS]]
    else:
        search.limit_s = MAKESPAN_SLACK * search.ranked()[0].evaluation.makespan_s
        search.found = {n: _Candidate(search.score(c.evaluation, problem.objective), c.evaluation, c.rounds) for n, c in search.found.items()}
        for order in request_orders(problem):
            for power in CAP_POWERS:
                search.sweep(pack_in_order, order, _profile(problem, order, power), problem.objective)
        starts = [search.ranked()[0].rounds]
    improved = [improve_rounds(problem, rounds, bound_s * GOOD_ENOUGH, search.limit_s) for rounds in starts]
    return min(improved, key=lambda rounds: search.score(problem.evaluate(rounds), problem.objective))


def central_cap_s(problem: Problem) -> float:
    """The cap at which the relaxed makespan on the slowest stage is least."""
    work = Work.of(problem.requests, problem.limits.max_round_tokens)
    slowest = envelopes([slowest_stage(problem)], work)
    return max(likely_cap_s(envelope, work, problem.cost.pp_size - 1) for envelope in slowest)


def slowest_stage(problem: Problem) -> StageCost:
    """The stage on which the batch takes longest."""
    chunks = [(request.new_tokens, request.cached_tokens, True) for request in problem.requests]
    return max(problem.cost.kinds, key=lambda kind: kind.seconds(chunks))


def work_s(problem: Problem) -> list[float]:
    """Seconds each request takes on the slowest stage, cut nowhere."""
    stage = slowest_stage(problem)
    return [stage.seconds([(r.new_tokens, r.cached_tokens, True)]) for r in problem.requests]


def shortest_first(problem: Problem) -> list[int]:
    """Least work for its weight first (Smith's rule): optimal for the weighted mean on one machine."""
    work, requests = work_s(problem), problem.requests
    return sorted(range(len(requests)), key=lambda i: work[i] / max(requests[i].weight, 1e-12))


def request_orders(problem: Problem) -> list[list[int]]:
    """Orders worth packing in: shortest first; for deadlines also earliest deadline first and Moore-Hodgson's."""
    orders = [shortest_first(problem)]
    if problem.objective is Objective.SLA:
        work, requests = work_s(problem), problem.requests
        deadline = [np.inf if r.sla_ttft_s is None else r.arrival_s + r.sla_ttft_s for r in requests]
        by_deadline = sorted(range(len(requests)), key=lambda i: deadline[i])
        orders += [by_deadline, _most_on_time(by_deadline, work, deadline)]
    return orders


def _most_on_time(by_deadline: Sequence[int], work: Sequence[float], deadline: Sequence[float]) -> list[int]:
    """Moore and Hodgson (1968): in deadline order, drop the longest so far whenever one would be late; the dropped go last."""
    kept: list[int] = []
    dropped: list[int] = []
    for index in by_deadline:
        kept.append(index)
        if sum(work[i] for i in kept) > deadline[index]:
            longest = max(kept, key=lambda i: work[i])
            kept.remove(longest)
            dropped.append(longest)
    return kept + sorted(dropped, key=lambda i: work[i])


def _profile(problem: Problem, order: Sequence[int], power: float) -> list[float]:
    """Each request's share of the cap: (work up to its end / all work) ** power.

    A request that ends after S seconds of work in rounds of m seconds waits about S (1 + o/m) + (K-1) m, least at
    m = sqrt(S o / (K-1)): rounds grow with the square root of the work done so far.
    """
    work = work_s(problem)
    done = np.cumsum([work[index] for index in order])
    profile = np.ones(len(order))
    profile[list(order)] = (done / done[-1]) ** power
    return profile.tolist()


def _packs(problem: Problem) -> list[Pack]:
    """Packing by tails starts all requests before any ends: not where the KV limit forbids it."""
    held = sum(request.prompt_tokens for request in problem.requests)
    if problem.limits.max_kv_tokens is not None and problem.limits.max_kv_tokens < held:
        return [pack_in_order]
    return [pack_tails] if len(problem.requests) == 1 else [pack_in_order, pack_tails]
