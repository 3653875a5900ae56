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
    planned: dict[tuple[tuple[int, int, float, float | None], ...], list[Round]] = {}  # batches alike have one plan
    arrived = 0
    while arrived < len(order):
        now = max(clock.ready_s(), problem.requests[order[arrived]].arrival_s)
        first = arrived
        while arrived < len(order) and problem.requests[order[arrived]].arrival_s <= now:
            arrived += 1
        batch = order[first:arrived]
        here = [problem.requests[index] for index in batch]
        alike = tuple((one.prompt_tokens, one.cached_tokens, one.weight, one.sla_ttft_s) for one in here)
        if alike not in planned:
            part = replace(problem, requests=tuple(replace(request, arrival_s=0.0) for request in here))
            planned[alike] = rule(part)
        for chunks in planned[alike]:
            rounds.append(tuple(Chunk(batch[chunk.request], chunk.start, chunk.tokens) for chunk in chunks))
            clock.run(rounds[-1], problem.requests, now)
    return rounds
