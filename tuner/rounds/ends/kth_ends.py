"""When the k-th request of a batch ends at best: no sooner than the k shortest can all be done.

Why it is a bound. Take any plan and the k requests that end first in it. Leave all others out of its rounds, and of the
j-th shortest of the k all tokens beyond those of the batch's j-th shortest. What is left is a plan for the batch's
k shortest whose chunks end on the same grid. No path through the recurrence is longer in it: rounds hold less, after no
more context, and what ending a prompt costs comes in an earlier round of the last stage, where paths stay to the end.
(Where other stages have such a cost it is left out.) So the k-th end is at least the least makespan of the k shortest,
which `rounds.bound` bounds: here for all k at once.

With e, the least of all stages' costs, and m, the longest round with its hop, the makespan is at least

    S(m) + (pp_size - 1) (m + hop_latency),    S(m) >= sum over requests of D(request, m)

with the shortest paths D of `rounds.grid.relaxation`, which are the same for every k but for how much work others bring
along. They are found anew where k has doubled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats
from tuner.rounds.bound import batch_bound_s
from tuner.rounds.grid.relaxation import MOST_STEPS, SLACK, GridRelaxation, is_curved
from tuner.rounds.problem import Problem
from tuner.rounds.relaxation import Work, envelopes, least_sum, likely_cap_s

NUM_CAPS, LEAST_CAP, MOST_CAP = 64, 0.3, 6.0
"""Caps that are tried, from a share of the likely best ones to a multiple of them."""
MOST_BY_LINES = 48
"""Numbers of requests whose makespan is bounded by lines; of others it is that of the next lower one."""


def kth_ends_s(problem: Problem) -> Floats:
    """Seconds that no plan's first, second, ... end is below, [requests], for requests that are all there at the start.

    Raises ValueError where stages hold several groups of layers: rounds then pass others.
    """
    cost = problem.cost
    if cost.virtual_stages > 1:
        raise ValueError("kth_ends_s: one group a stage is needed")
    if any(stage.final_s for stage in cost.stages[:-1]):
        cost = replace(cost, stages=tuple(replace(stage, final_s=0.0) for stage in cost.stages))
    new = np.sort(np.array([float(request.new_tokens) for request in problem.requests]))
    cached = float(min(request.cached_tokens for request in problem.requests))
    prompts = Work(new + cached, np.full(len(new), cached), float(problem.limits.max_round_tokens or np.inf))
    ends = np.zeros(len(new))
    if is_curved(cost.kinds):
        for first, last in _doubling(len(new)):
            ends[first:last] = _on_grid(cost, prompts, first, last, problem.chunk_multiple)
    else:
        numbers = np.unique(np.geomspace(1, len(new), MOST_BY_LINES).round()).astype(int)
        for number in numbers.tolist():
            ends[number - 1] = batch_bound_s(cost, _shortest(prompts, number), None)
    least: Floats = np.maximum.accumulate(ends) * (1.0 - SLACK)
    return least


def _doubling(number: int) -> Iterator[tuple[int, int]]:
    """Ranges up to a number, each as long as all before it."""
    first, last = 0, 1
    while first < number:
        yield first, min(last, number)
        first, last = last, 2 * last


def _shortest(prompts: Work, number: int) -> Work:
    return Work(prompts.prompt[:number], prompts.cached[:number], prompts.max_round_tokens)


def _on_grid(cost: CostModel, prompts: Work, first: int, last: int, multiple: int) -> Floats:
    """Of the first + 1 to `last` shortest: their least makespans, 0 where it would take too long."""
    num_more, stages, work = cost.pp_size - 1, list(cost.kinds), _shortest(prompts, last)
    lines, caps = envelopes(stages, work, cost.hop_token_s), np.array([np.inf])
    if num_more:
        likely = [
            max(likely_cap_s(line, _shortest(prompts, number), num_more) for line in lines)
            for number in (first + 1, last)
        ]
        caps = np.geomspace(LEAST_CAP * min(likely), MOST_CAP * max(likely), NUM_CAPS)
    relaxation = GridRelaxation(stages, work, multiple, float(caps[-1]), cost.hop_token_s)
    if relaxation.num_steps > MOST_STEPS:
        return np.zeros(last - first)
    sums = np.cumsum(relaxation.least_of_shortest(caps), axis=0)[first:] * (1.0 - SLACK)
    if not num_more:
        return sums[:, 0]
    beyond = [least_sum(lines[0], _shortest(prompts, number)) for number in range(first + 1, last + 1)]
    between = (sums[:, 1:] + num_more * caps[:-1]).min(axis=1)
    below = np.minimum(between, np.array(beyond) + num_more * caps[-1])
    found: Floats = np.minimum(sums[:, 0], below) + num_more * cost.hop_latency_s
    return found
