"""Replaying an arrival trace: every policy sees a request only once it has arrived; TTFT percentiles and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tuner.cost_model import CostModel
from tuner.online import Planner
from tuner.plan import Chunk, Request, Round
from tuner.planner import POLICIES, fixed_sweep, make_rounds
from tuner.policies.queue import Clock
from tuner.problem import NO_LIMITS, Limits, Problem
from tuner.schedule import Evaluation, Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a policy makes of a trace."""

    policy: str
    evaluation: Evaluation
    num_rounds: int
    tokens_per_s: float
    """New prompt tokens a second from the first arrival to the last TTFT."""

    def ttft_s(self, percentile: float) -> float:
        """A percentile of the TTFTs."""
        return float(np.percentile(self.evaluation.ttft_s, percentile))


def replay(
    cost: CostModel,
    requests: Sequence[Request],
    *,
    policy: str = "joint",
    window: int | None = None,
    chunk_multiple: int = 64,
    limits: Limits = NO_LIMITS,
    objective: Objective = Objective.MEAN_TTFT,
) -> Replay:
    """Run a trace under a policy, in the exact recurrence.

    `joint` is the online Planner. The schedulers (`fixed:N`, `sglang`, `ascend`) decide round by round as their sources do.
    The batch policies (`gpipe`, `terapipe`, `dp`) plan all that waits whenever the first stage has run dry.
    """
    problem = Problem(
        cost=cost,
        requests=tuple(requests),
        window=window,
        chunk_multiple=chunk_multiple,
        limits=limits,
        objective=Objective(objective),
    )
    name = policy.partition(":")[0]
    if name == "joint":
        rounds = online_rounds(problem)
    elif name in ("gpipe", "terapipe", "dp"):
        rounds = batch_rounds(problem, policy)
    else:
        rounds = make_rounds(problem, policy)
    evaluation = problem.evaluate(rounds)
    first = min(request.arrival_s for request in requests)
    tokens = sum(request.new_tokens for request in requests)
    return Replay(
        policy=policy,
        evaluation=evaluation,
        num_rounds=len(rounds),
        tokens_per_s=tokens / (evaluation.makespan_s - first),
    )


def compare_replays(
    cost: CostModel,
    requests: Sequence[Request],
    *,
    window: int | None = None,
    chunk_multiple: int = 64,
    limits: Limits = NO_LIMITS,
    objective: Objective = Objective.MEAN_TTFT,
    least_chunk: int = 1024,
) -> list[Replay]:
    """Replay a trace under every policy, the fixed chunk swept over powers of two from `least_chunk` tokens up."""
    fixed = [name for name in fixed_sweep(requests, chunk_multiple) if int(name.removeprefix("fixed:")) >= least_chunk]
    return [
        replay(
            cost,
            requests,
            policy=policy,
            window=window,
            chunk_multiple=chunk_multiple,
            limits=limits,
            objective=objective,
        )
        for policy in [*fixed, *POLICIES[1:]]
    ]


def online_rounds(problem: Problem) -> list[Round]:
    """The rounds of the online Planner, asked whenever the first stage and the window let a round in."""
    planner = Planner(
        problem.cost,
        window=problem.window,
        chunk_multiple=problem.chunk_multiple,
        limits=problem.limits,
        objective=problem.objective,
    )
    clock = Clock(problem.cost, problem.window)
    order = sorted(range(len(problem.requests)), key=lambda i: problem.requests[i].arrival_s)
    rounds: list[Round] = []
    in_flight: list[float] = []
    arrived, now = 0, 0.0
    while arrived < len(order) or planner.num_waiting:
        if not planner.num_waiting:
            now = max(now, problem.requests[order[arrived]].arrival_s)
        while arrived < len(order) and problem.requests[order[arrived]].arrival_s <= now:
            planner.add(problem.requests[order[arrived]], now)
            arrived += 1
        while in_flight and in_flight[0] + problem.cost.return_s <= now:
            planner.finish_round(in_flight.pop(0))
        chunks = planner.next_round(now)
        assert chunks is not None
        rounds.append(tuple(Chunk(order[chunk.request], chunk.start, chunk.tokens) for chunk in chunks))
        in_flight.append(clock.run(rounds[-1], problem.requests, now))
        now = max(now, clock.ready_s())
    return rounds


def batch_rounds(problem: Problem, policy: str) -> list[Round]:
    """The rounds of a batch policy: plan what has arrived, run it, plan what has arrived by then, and so on."""
    clock = Clock(problem.cost, problem.window)
    order = sorted(range(len(problem.requests)), key=lambda i: problem.requests[i].arrival_s)
    rounds: list[Round] = []
    arrived = 0
    while arrived < len(order):
        now = max(clock.ready_s(), problem.requests[order[arrived]].arrival_s)
        first = arrived
        while arrived < len(order) and problem.requests[order[arrived]].arrival_s <= now:
            arrived += 1
        batch = order[first:arrived]
        here = [_arrived(problem.requests[index]) for index in batch]
        part = Problem(
            cost=problem.cost,
            requests=tuple(here),
            window=problem.window,
            chunk_multiple=problem.chunk_multiple,
            limits=problem.limits,
            objective=problem.objective,
        )
        for chunks in make_rounds(part, policy):
            rounds.append(tuple(Chunk(batch[chunk.request], chunk.start, chunk.tokens) for chunk in chunks))
            clock.run(rounds[-1], problem.requests, now)
    return rounds


def _arrived(request: Request) -> Request:
    return Request(
        id=request.id,
        prompt_tokens=request.prompt_tokens,
        cached_tokens=request.cached_tokens,
        weight=request.weight,
        sla_ttft_s=request.sla_ttft_s,
    )
