"""`dp`: split each request best, then decide every round of the batch by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import add

from tuner.plan.plan import Chunk, Request, Round
from tuner.policies.sweep import Search, shortest_first
from tuner.rounds.packing import Packer, backward_cuts
from tuner.rounds.problem import Problem
from tuner.rounds.schedule import MAKESPAN_SLACK
from tuner.workload.objective import Objective


def dp_rounds(problem: Problem) -> list[Round]:
    """Sweep the cap on a round's time; under each, split requests best and group the chunks by `pack_line`.

    For another objective than the makespan, at most `MAKESPAN_SLACK` of the best makespan is given up.
    """
    search, order, flat = Search.of(problem), shortest_first(problem), [1.0] * len(problem.requests)
    search.sweep(pack_line, order, flat, Objective.MAKESPAN)
    if problem.objective is not Objective.MAKESPAN:
        search.limit(MAKESPAN_SLACK * search.ranked()[0].evaluation.makespan_s, problem.objective)
        search.sweep(pack_line, order, flat, problem.objective)
    return search.ranked()[0].rounds


def pack_line(
    packer: Packer, requests: Sequence[Request], order: Sequence[int], caps_s: Sequence[float]
) -> list[Round]:
    """Cut each request best under its cap, then group the chunks of all into rounds by dynamic programming.

    Cut backwards with the longest chunks allowed, a request reads its context the fewest times (`rounds.bound` proves
    it), so that is its best split under a cap. The chunks then stand in a line: what each request has left at its
    front, least work first, then the full chunks, request after request. A round is a stretch of the line, at most
    the cap long; chunks of one request in it join. D(j) = min over i of D(i) + t(round of the chunks i..j) is the
    least total time of the first j chunks.
    """
    cuts = backward_cuts(packer, requests, order, caps_s)
    held = packer.limits.max_kv_tokens
    if held is not None and held < sum(request.prompt_tokens for request in requests):
        line = [chunk for chunks in cuts for chunk in chunks]
    else:
        line = [chunks[0] for chunks in cuts] + [chunk for chunks in cuts for chunk in chunks[1:]]
    came_from = _cheapest_stretches(packer, requests, line, caps_s)
    stretches: list[Round] = []
    end = len(line)
    while end:
        members = dict[int, Chunk]()
        for chunk in line[came_from[end] : end]:
            members[chunk.request] = _joined(members.get(chunk.request), chunk)
        stretches.append(tuple(members.values()))
        end = came_from[end]
    return stretches[::-1]


def _cheapest_stretches(
    packer: Packer, requests: Sequence[Request], line: Sequence[Chunk], caps_s: Sequence[float]
) -> list[int]:
    """Where the last stretch of the first j chunks begins, for every j, in the cheapest division of these j."""
    most_tokens = packer.max_round_tokens
    most_held = math.inf if packer.limits.max_kv_tokens is None else packer.limits.max_kv_tokens
    finals_s = packer.finals_s
    before = _places_before(line)
    is_final = [chunk.end == requests[chunk.request].prompt_tokens for chunk in line]
    alone_s = [packer.chunk_s[chunk.tokens, chunk.start] for chunk in line]
    alone_s = [list(map(add, one, finals_s)) if ends else one for one, ends in zip(alone_s, is_final, strict=True)]
    least, came_from = [0.0] + [math.inf] * len(line), [0] * (len(line) + 1)
    for first, opening in enumerate(line):
        cap_s, so_far_s = caps_s[opening.request] * (1.0 + 1e-9), least[first]
        tokens, held, added_s = 0, 0, [0.0] * len(finals_s)
        joined: dict[int, Chunk] = {}
        for last in range(first, len(line)):
            chunk = line[last]
            tokens += chunk.tokens
            if before[last] < first:
                held += requests[chunk.request].prompt_tokens
                added_s = list(map(add, added_s, alone_s[last]))
            else:
                own = joined.get(chunk.request, line[before[last]])
                both = joined[chunk.request] = _joined(own, chunk)
                for i, both_s in enumerate(packer.chunk_s[both.tokens, both.start]):
                    added_s[i] += both_s + finals_s[i] if is_final[last] else both_s
                    added_s[i] -= packer.chunk_s[own.tokens, own.start][i]
            seconds = max(map(add, packer.round_s[tokens], added_s))
            if (seconds > cap_s or tokens > most_tokens or held > most_held) and last > first:
                break
            if so_far_s + seconds < least[last + 1]:
                least[last + 1], came_from[last + 1] = so_far_s + seconds, first
    return came_from


def _places_before(line: Sequence[Chunk]) -> list[int]:
    """Where in the line the chunk before of the same request is, -1 for each request's first."""
    places: dict[int, int] = {}
    found = []
    for place, chunk in enumerate(line):
        found.append(places.get(chunk.request, -1))
        places[chunk.request] = place
    return found


def _joined(before: Chunk | None, chunk: Chunk) -> Chunk:
    return chunk if before is None else Chunk(chunk.request, before.start, before.tokens + chunk.tokens)
