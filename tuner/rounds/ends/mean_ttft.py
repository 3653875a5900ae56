"""A proven lower bound on the mean TTFT, of requests that arrive over time and of batches.

Why it is a bound, of both. Take any plan and one stage k. It runs one round at a time, and a round costs at least
round_s + token_s T + what its chunks cost, for T tokens and any line below the stage's costs (`rounds.relaxation`).
Share the round's time out to its chunks: to each its own cost, and of round_s the share of its tokens in the most
tokens M that a round can hold, which together is no more than round_s. Then a request has at least p(r) seconds of the
stage, its context read as rarely as chunks of M tokens allow, and the shares of a round can be run one after the other
inside it: the stage is a machine that runs the requests with preemption. Request r can be there from its arrival plus
head(r) on, what its first chunk takes on the stages before, and has its first token at the earliest tail(r) after it is
through, what its last token takes on the stages behind. (A stage with several groups of layers is one machine, which
has all before its first group ahead of it and all behind its last one after it.) So

    sum over r of weight(r) (end(r) - arrival(r)) >= the least of one machine with release dates and preemption
                                                     + sum over r of weight(r) (tail(r) - arrival(r))

What one machine reaches at least, `rounds.ends.one_machine` says.

Another bound is that of each request alone: others only delay it. Under load the first is the closer one; it does not
see that rounds must be short for the stages behind and long for their overhead. For a batch two more bounds do
(`rounds.ends.kth_ends`, `rounds.ends.round_ends`). The largest is taken.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from tuner.plan.plan import Chunk
from tuner.plan.stage_cost import Floats, StageCost
from tuner.rounds.bound import makespan_bound_s
from tuner.rounds.ends.kth_ends import kth_ends_s
from tuner.rounds.ends.one_machine import least_ends_s
from tuner.rounds.ends.round_ends import least_sum_of_round_ends_s
from tuner.rounds.problem import Problem
from tuner.rounds.relaxation import Work, envelopes, requests_s

MOST_ALONE = 64
"""Different prompts whose bound alone is proven by `rounds.bound`, the most frequent first; of others by one stage."""
CUTS_ALONE = (1, 4, 16)
"""Rounds that each is cut into to see whether that bound can be the larger one at all: it takes longer to prove."""


def mean_ttft_bound_s(problem: Problem) -> float:
    """No plan for these requests has a smaller mean TTFT (weighted by the requests' weights)."""
    cost, requests = problem.cost.merged(), problem.requests
    weights = np.array([request.weight for request in requests])
    weights = weights if weights.any() else np.ones(len(requests))
    arrival = np.array([request.arrival_s for request in requests])
    heads, tails = _heads_and_tails(problem)
    limits = problem.limits.max_round_tokens
    work = Work.of(requests, limits)
    most = min(work.max_round_tokens, work.new_tokens)
    kinds = cost.kind_of_stage.tolist()
    alone, best = np.zeros(len(requests)), 0.0
    for kind, stage in enumerate(cost.kinds):
        places = [k for k in range(cost.pp_size) if kinds[k] == kind]
        for line in envelopes([stage], work):
            if line.round_s < 0.0:
                continue
            seconds = requests_s(line, work, most) + line.round_s * (work.prompt - work.cached) / most
            for k in {places[0], places[-1]}:
                ends = least_ends_s(arrival + heads[k], seconds, weights)
                best = max(best, ends + float((tails[k] - arrival) @ weights))
                alone = np.maximum(alone, heads[k] + seconds + tails[k])
    if not problem.is_timed and problem.cost.virtual_stages == 1:
        largest_first = np.sort(weights)[::-1]
        by_number = float(kth_ends_s(problem) @ largest_first)
        best = max(best, by_number, least_sum_of_round_ends_s(cost, work, weights))
    if best < float(_reached_alone_s(problem) @ weights):  # or else what each takes alone is no closer
        best = max(best, float(np.maximum(alone, _alone_s(problem)) @ weights))
    return best / float(weights.sum())


def _heads_and_tails(problem: Problem) -> tuple[list[Floats], list[Floats]]:
    """Of each stage, for every request: what its first chunk takes at least before the stage, its last one behind."""
    cost = problem.cost
    new = np.array([request.new_tokens for request in problem.requests])
    first = np.minimum(new, problem.chunk_multiple)
    last = np.ones(len(new))
    by_kind = [(_least_s(kind, first), _least_s(kind, last) + kind.final_s) for kind in cost.kinds]
    hops = cost.hop_latency_s + cost.hop_token_s * first, cost.hop_latency_s + cost.hop_token_s * last
    groups, stage_of = [by_kind[kind] for kind in cost.kind_of_stage.tolist()], cost.stage_of_group
    moves = [float(one != other) for one, other in itertools.pairwise(stage_of)]
    heads, tails = [np.zeros(len(new))], [np.zeros(len(new))]
    for (head, _), move in zip(groups, moves, strict=False):
        heads.append(heads[-1] + head + move * hops[0])
    for (_, tail), move in zip(groups[::-1], moves[::-1], strict=False):
        tails.append(tails[-1] + tail + move * hops[1])
    tails.reverse()
    stages = range(cost.pp_size)
    final = {stage: group for group, stage in enumerate(stage_of)}
    return [heads[stage_of.index(stage)] for stage in stages], [tails[final[stage]] for stage in stages]


def _least_s(stage: StageCost, tokens: Floats) -> Floats:
    """What a round with a chunk of so many tokens or more takes at least."""
    seconds: Floats = stage.round_overhead_s + stage.tokens_s(tokens) + stage.attention.base(tokens) + stage.chunk_s
    return seconds


def _alone_s(problem: Problem) -> Floats:
    """The least TTFT of each request by itself; 0 for prompts beyond MOST_ALONE different ones."""
    return np.array(_of_each(problem, makespan_bound_s, MOST_ALONE))


def _reached_alone_s(problem: Problem) -> Floats:
    """A TTFT that each request by itself does reach, in a few equal rounds."""

    def reached_s(one: Problem) -> float:
        (request,), multiple = one.requests, one.chunk_multiple
        most = min(request.new_tokens, one.limits.max_round_tokens or request.new_tokens)
        plans = []
        for cuts in CUTS_ALONE:
            tokens = math.ceil(min(request.new_tokens / cuts, most) / multiple) * multiple
            tokens = tokens if tokens <= most else max(most // multiple, 1) * multiple
            starts = range(request.cached_tokens, request.prompt_tokens, tokens)
            plans.append([(Chunk(0, start, min(tokens, request.prompt_tokens - start)),) for start in starts])
        return min(one.evaluate(rounds).makespan_s for rounds in plans)

    return np.array(_of_each(problem, reached_s, len(problem.requests)))


def _of_each(problem: Problem, seconds: Callable[[Problem], float], most: int) -> list[float]:
    """Seconds of each request by itself, of as many different prompts at most, the most frequent first; 0 of others."""
    keys = [(request.prompt_tokens, request.cached_tokens) for request in problem.requests]
    found: dict[tuple[int, int], float] = {}
    for key, _ in Counter(keys).most_common(most):
        one = replace(problem.requests[keys.index(key)], arrival_s=0.0, output_tokens=1)
        found[key] = seconds(replace(problem, requests=(one,)))
    return [found.get(key, 0.0) for key in keys]
