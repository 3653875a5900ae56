"""Exact search over all plans of a small batch: dynamic programming over how far each request has come.

A state is how many grid units of each request have run; a round leads from a state to a later one. What the rounds so
far mean for the rest is only when each stage is free and when the last W rounds left the pipeline. The recurrence is
monotone: a label that is nowhere later than another one of the same state can finish no later, so dominated labels
are dropped, and so are labels that even the least remaining work of some stage carries past the best plan known.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tuner.plan.cost_model import Ints
from tuner.plan.plan import Chunk, Round
from tuner.plan.stage_cost import Floats
from tuner.rounds.problem import Problem

MOST_STEPS = 4000
"""Rounds (pairs of states) up to which a batch counts as small."""
MOST_LABELS = 256
"""Labels kept a state, those that promise the earliest finish first; above it the search is no longer exact."""


def is_small(problem: Problem) -> bool:
    """Whether the exact search is a matter of milliseconds; it knows stages of one group only."""
    if problem.cost.virtual_stages > 1:
        return False
    steps = 1
    for request in problem.requests:
        units = -(-request.new_tokens // problem.chunk_multiple)
        steps *= (units + 1) * (units + 2) // 2
        if steps > MOST_STEPS:
            return False
    return True


@dataclass(slots=True)
class _Steps:
    """All rounds there are: columns over pairs of states."""

    origin: Ints
    target: Ints
    stage_s: Floats  # [steps, stages]
    hop_s: Floats
    ready_s: Floats


def exact_rounds(problem: Problem, known: Sequence[Round], most_labels: int = MOST_LABELS) -> tuple[list[Round], bool]:
    """The rounds with the least makespan, and whether that is proven: whether no label had to be left out.

    `known` is a plan to beat and is returned if nothing does.
    """
    states, steps = _all_steps(problem)
    num_states, pp_size = len(states), problem.cost.pp_size
    first = np.searchsorted(steps.origin, np.arange(num_states + 1))
    rest = np.zeros((num_states, pp_size))  # least seconds of each stage from the state to the end
    for state in range(num_states - 2, -1, -1):
        out = slice(first[state], first[state + 1])
        onward = steps.stage_s[out] + rest[steps.target[out]]
        rest[state] = onward.min(axis=0) if len(onward) else np.inf
    drain = np.append(np.cumsum(steps.stage_s.min(axis=0)[::-1])[::-1][1:], 0.0)  # after a stage, on those behind it
    history = 0 if problem.window is None or problem.window >= sum(states[-1]) else problem.window
    best = problem.evaluate(known).makespan_s
    best_label = -1
    parent, via = [np.array([-1])], [np.array([-1])]
    num_labels = 1
    labels: list[list[Floats]] = [[] for _ in states]
    names: list[list[Ints]] = [[] for _ in states]
    is_proven = True
    labels[0].append(np.concatenate([np.zeros(pp_size), np.full(history, -np.inf)])[None, :])
    names[0].append(np.array([0]))
    for state in range(num_states - 1):
        rows = np.arange(first[state], first[state + 1])
        if not labels[state] or not rows.size:
            continue
        label, name = np.concatenate(labels[state]), np.concatenate(names[state])
        promise = (label[:, :pp_size] + rest[state] + drain).max(axis=1)
        keep, is_all = _undominated(label, promise, best, most_labels)
        is_proven &= is_all
        label, name = label[keep], name[keep]
        reached = _run(label, steps, rows, problem, history)  # [labels, steps, pp_size + history]
        target = steps.target[rows]
        still = rest[target] + np.where((target < num_states - 1)[:, None], drain, 0.0)
        promised = (reached[:, :, :pp_size] + still).max(axis=2)
        chosen, step = np.nonzero(promised < best * (1.0 - 1e-12))
        if not chosen.size:
            continue
        new = np.arange(num_labels, num_labels + chosen.size)
        num_labels += chosen.size
        parent.append(name[chosen])
        via.append(rows[step])
        reached, target = reached[chosen, step], target[step]
        for goal in np.unique(target):
            here = target == goal
            if goal < num_states - 1:
                labels[goal].append(reached[here])
                names[goal].append(new[here])
                continue
            finish = reached[here, pp_size - 1]
            if finish.min() < best:
                best, best_label = float(finish.min()), int(new[here][finish.argmin()])
    if best_label < 0:
        return list(known), is_proven
    return _rounds(problem, states, steps, np.concatenate(parent), np.concatenate(via), best_label), is_proven


def _run(label: Floats, steps: _Steps, rows: Ints, problem: Problem, history: int) -> Floats:
    """The recurrence for every label and every round out of its state."""
    pp_size = problem.cost.pp_size
    out = np.empty((len(label), len(rows), pp_size + history))
    stage_s, hop_s = steps.stage_s[rows], steps.hop_s[rows]
    earliest = np.broadcast_to(steps.ready_s[rows], (len(label), len(rows)))
    if history:
        earliest = np.maximum(earliest, label[:, pp_size : pp_size + 1] + problem.cost.return_s)
    for k in range(pp_size):
        done = np.maximum(label[:, k : k + 1], earliest) + stage_s[:, k]
        out[:, :, k] = done
        earliest = done + hop_s
    if history:
        out[:, :, pp_size:-1] = label[:, None, pp_size + 1 :]
        out[:, :, -1] = out[:, :, pp_size - 1]
    return out


def _undominated(label: Floats, promise: Floats, best: float, most_labels: int) -> tuple[Ints, bool]:
    """Indices of the labels worth following, at most so many, and whether these are all."""
    order = np.argsort(promise, kind="stable")
    order = order[promise[order] < best * (1.0 - 1e-12)]
    is_all, order = len(order) <= 8 * most_labels, order[: 8 * most_labels]
    kept: list[int] = []
    values = label[order]
    alive = np.ones(len(order), dtype=bool)
    for i in range(len(order)):
        if not alive[i]:
            continue
        if len(kept) == most_labels:
            return order[kept], False
        kept.append(i)
        alive &= ~np.all(values >= values[i], axis=1)
    return order[kept], is_all


def _all_steps(problem: Problem) -> tuple[list[tuple[int, ...]], _Steps]:
    """Every state in an order in which rounds only lead forwards, and every round between two of them."""
    requests, multiple, limits = problem.requests, problem.chunk_multiple, problem.limits
    units = [-(-request.new_tokens // multiple) for request in requests]
    states = list(itertools.product(*(range(n + 1) for n in units)))
    grid = np.array(states, dtype=np.int64)  # [states, requests]
    new = np.array([request.new_tokens for request in requests], dtype=np.int64)
    cached = np.array([request.cached_tokens for request in requests], dtype=np.int64)
    prompt, arrival = new + cached, np.array([request.arrival_s for request in requests])
    done = np.minimum(grid * multiple, new)
    origin, target = np.nonzero(np.triu(np.ones((len(states), len(states)), dtype=bool), 1))
    forwards = (grid[origin] <= grid[target]).all(axis=1)
    origin, target = origin[forwards], target[forwards]
    tokens = done[target] - done[origin]  # [steps, requests]
    allowed: npt.NDArray[np.bool_] = np.ones(len(origin), dtype=bool)
    if limits.max_round_tokens is not None:
        allowed &= tokens.sum(axis=1) <= limits.max_round_tokens
    if limits.max_kv_tokens is not None:
        open_now = (done[target] > 0) & (done[origin] < new)
        allowed &= (open_now * prompt).sum(axis=1) <= limits.max_kv_tokens
    origin, target, tokens = origin[allowed], target[allowed], tokens[allowed]
    step, request = np.nonzero(tokens)
    start = cached[request] + done[origin[step], request]
    count = tokens[step, request]
    stage_s = problem.cost.round_seconds(step, count, start, start + count == prompt[request])
    ready = np.zeros(len(origin))
    np.maximum.at(ready, step, arrival[request])
    return states, _Steps(origin, target, stage_s, problem.cost.hop_seconds(tokens.sum(axis=1)), ready)


def _rounds(
    problem: Problem, states: list[tuple[int, ...]], steps: _Steps, parent: Ints, via: Ints, label: int
) -> list[Round]:
    """Follow a label back to the start."""
    rounds: list[Round] = []
    while label > 0:
        before, after = states[steps.origin[via[label]]], states[steps.target[via[label]]]
        chunks = []
        for index, request in enumerate(problem.requests):
            done, upto = (min(s[index] * problem.chunk_multiple, request.new_tokens) for s in (before, after))
            if upto > done:
                chunks.append(Chunk(index, request.cached_tokens + done, upto - done))
        rounds.append(tuple(chunks))
        label = int(parent[label])
    return rounds[::-1]
