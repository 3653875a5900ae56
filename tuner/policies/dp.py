"""`dp`: split each request best, then decide every round of the batch by dynamic programming."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tuner.plan.plan import Chunk, Request, Round
from tuner.policies.sweep import Search, shortest_first
from tuner.rounds.packing import OpenRound, Packer, backward_cut
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
    cuts = [backward_cut(packer, index, requests[index], caps_s[index]) for index in order]
    held = packer.limits.max_kv_tokens
    if held is not None and held < sum(request.prompt_tokens for request in requests):
        line = [chunk for chunks in cuts for chunk in chunks]
    else:
        line = [chunks[0] for chunks in cuts] + [chunk for chunks in cuts for chunk in chunks[1:]]
    least = [0.0] + [math.inf] * len(line)
    came_from = [0] * (len(line) + 1)
    for first in range(len(line)):
        rounds, members = packer.open_round(), dict[int, Chunk]()
        for last in range(first, len(line)):
            if not _append(packer, requests, rounds, members, line[last], caps_s[line[first].request]) and last > first:
                break
            seconds = packer.filled_s(rounds)
            if least[first] + seconds < least[last + 1]:
                least[last + 1], came_from[last + 1] = least[first] + seconds, first
    stretches: list[Round] = []
    end = len(line)
    while end:
        members = dict[int, Chunk]()
        for chunk in line[came_from[end] : end]:
            members[chunk.request] = _joined(members.get(chunk.request), chunk)
        stretches.append(tuple(members.values()))
        end = came_from[end]
    return stretches[::-1]


def _append(
    packer: Packer, requests: Sequence[Request], into: OpenRound, members: dict[int, Chunk], chunk: Chunk, cap_s: float
) -> bool:
    """Put the line's next chunk into the round, joined with its request's; whether cap and limits still hold."""
    before = members.get(chunk.request)
    joined = _joined(before, chunk)
    members[chunk.request] = joined
    into.num_tokens += chunk.tokens
    final = joined.end == requests[chunk.request].prompt_tokens
    for i, table in enumerate(packer.tables):
        into.added_s[i] += table.chunk_s(joined.tokens, joined.start) + (table.stage.final_s if final else 0.0)
        if before is not None:
            into.added_s[i] -= table.chunk_s(before.tokens, before.start)
    limits = packer.limits
    if into.num_tokens > packer.max_round_tokens:
        return False
    if limits.max_kv_tokens is not None and sum(requests[i].prompt_tokens for i in members) > limits.max_kv_tokens:
        return False
    return packer.filled_s(into) <= cap_s * (1.0 + 1e-9)


def _joined(before: Chunk | None, chunk: Chunk) -> Chunk:
    return chunk if before is None else Chunk(chunk.request, before.start, before.tokens + chunk.tokens)
