"""Batch policies under arrivals: whenever stage 0 can take a round, all that has arrived makes a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tuner.online.queue import Clock
from tuner.plan.plan import Chunk, Round
from tuner.rounds.problem import Problem


def batch_by_batch(problem: Problem, rule: Callable[[Problem], list[Round]]) -> list[Round]:
    """Plan what has arrived, run it, plan what has arrived by then, and so on."""
    clock = Clock(problem.cost.merged(), problem.window)
    order = sorted(range(len(problem.requests)), key=lambda i: problem.requests[i].arrival_s)
    rounds: list[Round] = []
    arrived = 0
    while arrived < len(order):
        now = max(clock.ready_s(), problem.requests[order[arrived]].arrival_s)
        first = arrived
        while arrived < len(order) and problem.requests[order[arrived]].arrival_s <= now:
            arrived += 1
        batch = order[first:arrived]
        here = [replace(problem.requests[index], arrival_s=0.0) for index in batch]
        part = Problem(
            cost=problem.cost,
            requests=tuple(here),
            window=problem.window,
            chunk_multiple=problem.chunk_multiple,
            limits=problem.limits,
            objective=problem.objective,
        )
        for chunks in rule(part):
            rounds.append(tuple(Chunk(batch[chunk.request], chunk.start, chunk.tokens) for chunk in chunks))
            clock.run(rounds[-1], problem.requests, now)
    return rounds
