"""Local improvement of rounds: move tokens between neighbours, merge and split rounds, while the exact score falls.

All moves of one step are judged at once: the recurrence runs over arrays that hold one plan a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tuner.plan.plan import Chunk, Round
from tuner.plan.stage_cost import Floats
from tuner.recurrence.timeline import order_of
from tuner.rounds.problem import Problem
from tuner.workload.objective import Objective

TIE = 1e-6
"""Weight of the mean TTFT beside another figure: it breaks ties."""

MOST_STAGE_ROUNDS = 512
"""Plans with more rounds x stages are left as they are: their rounds' whole number matters little."""
MOST_STEPS = 16
STAGE_ROUNDS_SEARCHED = 2_500
"""Steps x rounds x stages of one improvement: what bounds its time."""
MOST_MOVES = 400
"""Moves judged in one step."""
LEAST_GAIN = 1e-6
"""A step that gains less than this share ends the search."""


@dataclass(frozen=True, slots=True)
class Move:
    """Replace rounds [first, first + removed) by `rounds`."""

    first: int
    removed: int
    rounds: tuple[Round, ...]


def local_search(
    problem: Problem, rounds: Sequence[Round], good_enough_s: float = 0.0, limit_s: float = np.inf
) -> list[Round]:
    """Follow the best move until none helps or a makespan is at most `good_enough_s`; none goes above `limit_s`."""
    best = list(rounds)
    score = problem.evaluate(best).score(problem.objective)
    num_groups = len(problem.cost.stages)
    if len(best) * num_groups > MOST_STAGE_ROUNDS:
        return best
    for _ in range(min(MOST_STEPS, STAGE_ROUNDS_SEARCHED // max(len(best) * num_groups, 1))):
        if problem.objective is Objective.MAKESPAN and score[0] <= good_enough_s:
            break
        moves = _moves(problem, best)
        if not moves:
            break
        scores = _scores(problem, best, moves, limit_s)
        tried = (_apply(best, moves[index]) for index in scores.argsort() if scores[index] < np.inf)
        candidate = next((rounds for rounds in tried if fits_kv(problem, rounds)), best)
        new_score = problem.evaluate(candidate).score(problem.objective)
        if not new_score < score or abs(score[0] - new_score[0]) < LEAST_GAIN * abs(score[0]):
            break
        best, score = candidate, new_score
    return best


def _apply(rounds: list[Round], move: Move) -> list[Round]:
    return [*rounds[: move.first], *move.rounds, *rounds[move.first + move.removed :]]


def _moves(problem: Problem, rounds: list[Round]) -> list[Move]:
    """At most MOST_MOVES moves, spread over all there are, that keep the limit of a round; that of the KV cache depends
    on all rounds (`fits_kv`)."""
    made = list(_ways(problem, rounds))
    moves = (way() for way in made[:: 1 + len(made) // MOST_MOVES])
    return [move for move in moves if _allowed(problem, move.rounds)]


def _ways(problem: Problem, rounds: list[Round]) -> Iterator[Callable[[], Move]]:
    """All moves there are; made when they are called."""
    for i, current in enumerate(rounds):
        following = rounds[i + 1] if i + 1 < len(rounds) else None
        if following is not None:
            yield partial(_merging, i, current, following)
        for chunk in current:
            for cut in _cuts(problem, chunk):
                if following is not None:
                    yield partial(_handing_on, i, current, following, chunk, cut)
                if len(current) > 1 or cut > chunk.start:
                    yield partial(_splitting, i, current, chunk, cut)
        for chunk in following or ():
            for cut in _cuts(problem, chunk):
                assert following is not None
                yield partial(_taking, i, current, following, chunk, cut)


def _merging(i: int, current: Round, following: Round) -> Move:
    return Move(i, 2, (_merge(current, following),))


def _handing_on(i: int, current: Round, following: Round, chunk: Chunk, cut: int) -> Move:
    """A chunk's tokens from `cut` on run a round later."""
    kept, moved = _split(current, chunk, cut)
    return Move(i, 2, tuple(r for r in (kept, _merge((moved,), following)) if r))


def _splitting(i: int, current: Round, chunk: Chunk, cut: int) -> Move:
    """A chunk's tokens from `cut` on run in a round of their own."""
    kept, moved = _split(current, chunk, cut)
    return Move(i, 1, (kept, (moved,)))


def _taking(i: int, current: Round, following: Round, chunk: Chunk, cut: int) -> Move:
    """A chunk's tokens up to `cut`, all if that is its start, run a round earlier."""
    head = Chunk(chunk.request, chunk.start, cut - chunk.start) if cut > chunk.start else chunk
    rest = tuple(c for c in following if c is not chunk)
    if cut > chunk.start:
        rest = (*rest, Chunk(chunk.request, cut, chunk.end - cut))
    return Move(i, 2, tuple(r for r in (_merge(current, (head,)), rest) if r))


def _cuts(problem: Problem, chunk: Chunk) -> list[int]:
    """Tokens at which to cut a chunk: its start (all of it moves), and grid points 1, 2, 4, ... units from either
    end."""
    multiple = problem.chunk_multiple
    origin = problem.requests[chunk.request].cached_tokens
    units = (chunk.end - 1 - chunk.start) // multiple  # whole units that may stay in front of the cut
    steps = [1 << k for k in range(0, units.bit_length(), 2 if units > 16 else 1)]
    inner = {step for step in steps if step <= units} | {units + 1 - step for step in steps if step <= units}
    assert (chunk.start - origin) % multiple == 0
    return [chunk.start, *(chunk.start + unit * multiple for unit in sorted(inner))]


def _split(current: Round, chunk: Chunk, cut: int) -> tuple[Round, Chunk]:
    """The round without the chunk's tokens from `cut` on, and those."""
    kept = tuple(c for c in current if c is not chunk)
    if cut > chunk.start:
        kept = (*kept, Chunk(chunk.request, chunk.start, cut - chunk.start))
    return kept, Chunk(chunk.request, cut, chunk.end - cut)


def _merge(first: Round, second: Round) -> Round:
    """One round with the chunks of both, those of one request joined."""
    joined = {chunk.request: chunk for chunk in first}
    for chunk in second:
        before = joined.get(chunk.request)
        tokens = chunk.tokens + (before.tokens if before else 0)
        joined[chunk.request] = Chunk(chunk.request, before.start if before else chunk.start, tokens)
    return tuple(joined.values())


def _allowed(problem: Problem, rounds: Sequence[Round]) -> bool:
    most = problem.limits.max_round_tokens
    return most is None or all(sum(chunk.tokens for chunk in r) <= most for r in rounds)


def fits_kv(problem: Problem, rounds: Sequence[Round]) -> bool:
    """Whether the prompts that are begun and not ended fit into the KV cache in every round."""
    most = problem.limits.max_kv_tokens
    if most is None:
        return True
    last = {chunk.request: i for i, chunks in enumerate(rounds) for chunk in chunks}
    held: set[int] = set()
    for i, chunks in enumerate(rounds):
        held |= {chunk.request for chunk in chunks}
        if sum(problem.requests[index].prompt_tokens for index in held) > most:
            return False
        held -= {chunk.request for chunk in chunks if last[chunk.request] == i}
    return True


def _scores(problem: Problem, rounds: list[Round], moves: list[Move], limit_s: float) -> Floats:
    """What to minimise of every move's plan, [num_moves]."""
    cost, requests = problem.cost, problem.requests
    pool: list[Round] = list(rounds)  # every round that occurs, the current ones first
    index = np.full((len(moves), len(rounds) + 1), -1, dtype=np.int64)  # which round of the pool runs when
    base = np.arange(len(rounds))
    for row, move in enumerate(moves):
        added = np.arange(len(pool), len(pool) + len(move.rounds))
        pool.extend(move.rounds)
        order = np.concatenate([base[: move.first], added, base[move.first + move.removed :]])
        index[row, : len(order)] = order
    columns = np.array([(i, c.request, c.start, c.tokens) for i, r in enumerate(pool) for c in r], dtype=np.int64).T
    which, request, start, tokens = columns
    prompt = np.array([r.prompt_tokens for r in requests])
    arrival = np.array([r.arrival_s for r in requests])
    final = start + tokens == prompt[request]
    stage_s = cost.round_seconds(which, tokens, start, final)
    hop_s = cost.hop_seconds(np.bincount(which, weights=tokens))
    ready_s = np.zeros(len(pool))
    np.maximum.at(ready_s, which, arrival[request])
    # A missing last round takes no time, so it finishes with the one before it.
    columns_of = (
        np.concatenate([stage_s, np.zeros((1, len(cost.stages)))])[index],
        np.append(hop_s, 0.0)[index],
        np.append(ready_s, 0.0)[index],
    )
    lengths = (index >= 0).sum(axis=1)
    if cost.virtual_stages == 1:
        finish = _run_together(*columns_of, problem)
    else:
        finish = np.zeros(index.shape)
        for length in np.unique(lengths):
            rows = lengths == length
            finish[rows, :length] = _run_tasks_together(
                columns_of[0][rows, :length], columns_of[1][rows, :length], columns_of[2][rows, :length], problem
            )
    makespan: Floats = finish[np.arange(len(moves)), lengths - 1]
    if problem.objective is Objective.MAKESPAN:
        return makespan
    finals = np.zeros((len(pool) + 1, len(requests)), dtype=bool)
    finals[which[final], request[final]] = True
    ends = np.einsum("mn,mnr->mr", finish, finals[index]) - arrival
    weights = np.array([r.weight for r in requests])
    weights = weights if weights.any() else np.ones(len(weights))
    score: Floats = ends @ weights / weights.sum()
    if problem.objective is Objective.P99_TTFT:
        score = np.percentile(ends, 99, axis=1) + TIE * score
    if problem.objective.needs_deadlines:
        deadline = np.array([np.inf if r.sla_ttft_s is None else r.sla_ttft_s for r in requests])
        if problem.objective is Objective.LATENESS:
            score = (ends - deadline).max(axis=1) + TIE * score
        else:
            scale = (10.0 * float(np.abs(ends).max()) + 1.0) / max(float(weights.max()), 1e-300)
            score = score - scale * (ends <= deadline) @ weights
    return np.where(makespan > limit_s, np.inf, score)


def _run_together(stage_s: Floats, hop_s: Floats, ready_s: Floats, problem: Problem) -> Floats:
    """The recurrence for many plans at once: [plans, rounds, stages] -> finish on the last stage, [plans, rounds]."""
    num_plans, num_rounds, pp_size = stage_s.shape
    finish = np.zeros((num_plans, num_rounds))
    free = np.zeros((pp_size, num_plans))
    window = problem.window
    stage_s = np.ascontiguousarray(stage_s.transpose(1, 2, 0))
    for i in range(num_rounds):
        earliest = ready_s[:, i]
        if window is not None and i >= window:
            earliest = np.maximum(earliest, finish[:, i - window] + problem.cost.return_s)
        hop = hop_s[:, i]
        for k in range(pp_size):
            done = np.maximum(free[k], earliest, out=free[k])
            done += stage_s[i, k]
            earliest = done + hop
        finish[:, i] = free[pp_size - 1]
    return finish


def _run_tasks_together(stage_s: Floats, hop_s: Floats, ready_s: Floats, problem: Problem) -> Floats:
    """The same for stages of several groups and plans of one length: [plans, rounds, groups] -> [plans, rounds]."""
    num_plans, num_rounds, num_groups = stage_s.shape
    order = order_of(problem.cost, num_rounds, problem.window)
    assert order is not None
    stages, window = order.stages, problem.window
    reached, free = np.zeros((num_rounds, num_plans)), np.zeros((problem.cost.pp_size, num_plans))
    finish = np.zeros((num_rounds, num_plans))
    stage_s = np.ascontiguousarray(stage_s.transpose(1, 2, 0))
    for i, group in zip(order.rounds.tolist(), order.groups.tolist(), strict=True):
        stage = stages[group]
        if group == 0:
            earliest = ready_s[:, i]
            if window is not None and i >= window:
                earliest = np.maximum(earliest, finish[i - window] + problem.cost.return_s)
        else:
            earliest = reached[i] if stages[group - 1] == stage else reached[i] + hop_s[:, i]
        np.maximum(free[stage], earliest, out=free[stage])
        free[stage] += stage_s[i, group]
        reached[i] = free[stage]
        if group == num_groups - 1:
            finish[i] = free[stage]
    out: Floats = finish.T
    return out
