"""`dp`: split each request best, then decide every round of the batch by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tuner.packing import OpenRound, Packer, backward_cut
from tuner.plan import Chunk, Round
from tuner.policies.joint import central_cap_s, shortest_first
from tuner.problem import Problem

NUM_CAPS = 10


def dp_rounds(problem: Problem) -> list[Round]:
    """For caps around the relaxation's, cut each request best under the cap, then group the cuts by a dynamic programme.

    Cut backwards with the longest chunks allowed, a request reads its context the fewest times (`tuner.bound` proves it), so
    that is its best split under a cap. The chunks then stand in a line: what each request has left at its front, least
    work first, then the full chunks, request after request. A round is a stretch of the line; chunks of one request in it
    join. D(j) = min over i of D(i) + t(round of the chunks i..j), t at most the cap, is the least total time of the first
    j chunks; the caps are compared under the exact recurrence.
    """
    packer = Packer.of(problem)
    centre, order = central_cap_s(problem), shortest_first(problem)
    candidates = [_group(problem, packer, order, centre * factor) for factor in np.linspace(0.7, 1.5, NUM_CAPS)]
    return min(candidates, key=lambda rounds: problem.evaluate(rounds).score(problem.objective))


def _group(problem: Problem, packer: Packer, order: Sequence[int], cap_s: float) -> list[Round]:
    cuts = [backward_cut(packer, index, problem.requests[index], cap_s) for index in order]
    held = problem.limits.max_kv_tokens
    if held is not None and held < sum(request.prompt_tokens for request in problem.requests):
        line = [chunk for chunks in cuts for chunk in chunks]
    else:
        line = [chunks[0] for chunks in cuts] + [chunk for chunks in cuts for chunk in chunks[1:]]
    least = [0.0] + [np.inf] * len(line)
    came_from = [0] * (len(line) + 1)
    for first in range(len(line)):
        rounds, members = packer.open_round(), dict[int, Chunk]()
        for last in range(first, len(line)):
            if not _append(problem, packer, rounds, members, line[last], cap_s) and last > first:
                break
            seconds = max(
                table.round_s(rounds.num_tokens) + added for table, added in zip(packer.tables, rounds.added_s, strict=True)
            )
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
    problem: Problem, packer: Packer, into: OpenRound, members: dict[int, Chunk], chunk: Chunk, cap_s: float
) -> bool:
    """Put the line's next chunk into the round, joined with its request's; whether cap and limits still hold."""
    before = members.get(chunk.request)
    joined = _joined(before, chunk)
    members[chunk.request] = joined
    into.num_tokens += chunk.tokens
    final = joined.end == problem.requests[chunk.request].prompt_tokens
    for i, table in enumerate(packer.tables):
        into.added_s[i] += table.chunk_s(joined.tokens, joined.start) + (table.stage.final_s if final else 0.0)
        if before is not None:
            into.added_s[i] -= table.chunk_s(before.tokens, before.start)
    held = sum(problem.requests[index].prompt_tokens for index in members)
    limits = problem.limits
    if into.num_tokens > packer.max_round_tokens or (limits.max_kv_tokens is not None and held > limits.max_kv_tokens):
        return False
    return all(
        table.round_s(into.num_tokens) + added <= cap_s * (1.0 + 1e-9)
        for table, added in zip(packer.tables, into.added_s, strict=True)
    )


def _joined(before: Chunk | None, chunk: Chunk) -> Chunk:
    return chunk if before is None else Chunk(chunk.request, before.start, before.tokens + chunk.tokens)
