"""A proven lower bound on the makespan of any plan: any cut, any grouping into rounds, any order, any window.

Why it is a bound. Take any plan and any stages a <= b. The recurrence gives makespan >= the cost of every path that
goes from round 0 on stage 0 to the last round on the last stage by steps "next round" and "next stage". Choose the
path that enters stage a with the first round, stays there up to the round j whose time is the largest, m, goes down
to stage b with it, and stays on b to the last round, which it follows out:

    makespan >= sum_i e(i) + (b - a) m + fill + drain + (pp_size - 1) hop_latency

where e is an envelope: a cost that on none of the stages a..b exceeds theirs, and m the largest of e(i) + T(i)
hop_token, what round i takes with handing on its T(i) tokens. fill and drain are what one token costs on the stages
before a and after b and on the way to and from them. Nothing is known of m, so the right side is minimised over it;
with a cap m on every round,

1. request r, whose chunks must each fit under m alone, reads its context again at every chunk's start p: sum of
   context_s * p over its chunks is least when it is cut backwards from its end with the longest chunks allowed. (Let
   s(e) be the earliest start allowed for a chunk that ends at e. A shorter chunk from the same start costs no more,
   so s does not fall with e, and by induction every start of every other cut lies at or after the backward cut's,
   which also has the fewest chunks.)
2. with F all that rounds cost beside their overhead o, and H what handing on all tokens costs, N rounds hold it only if
   F + H <= N (m - o): N >= ceil((F + H) / (m - o)), and N is also at least any request's number of chunks. So sum_i
   e(i) >= F + o N.

S(m), the least sum, falls with m, so between two caps m1 < m2 the expression is at least S(m2) + (b - a) m1: a finite
grid of caps proves the bound for all m. The envelope is linear in a round's tokens (a supporting line under every
stage's table, its offset added to o) and pair-wise in attention (`rounds.relaxation`), so the backward cut has a closed
form in each step.

Where stages differ the envelope forgets what the slower ones cost; `rounds.uneven` proves a bound that does not.

A window adds another bound: rounds i, i+W, i+2W, ... pass the whole pipeline one after the other, and the longest of
these W chains is at least their mean: (sum over rounds and stages + hops) / W. Arrivals add a third: the requests
that arrive at t or later make a batch of their own that starts at t.

Where a stage holds several groups of layers `rounds.passes_bound` takes the place of the first; the other two hold as
they stand, a group counting as a stage.
"""

from __future__ import annotations

import itertools

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats
from tuner.rounds.grid.bound import grid_bound_s
from tuner.rounds.grid.relaxation import is_curved
from tuner.rounds.passes_bound import passes_bound_s
from tuner.rounds.problem import Problem
from tuner.rounds.relaxation import (
    Envelope,
    Work,
    envelopes,
    least_sum,
    least_sums,
    likely_cap_s,
    likely_least_s,
    longest_round_s,
    smooth_curve,
)
from tuner.rounds.uneven import uneven_bound_s

MOST_CAPS = 48
"""Caps on the grid to either side of the likely minimum."""
TOLERANCE = 1e-3
"""What the grid of caps may cost the bound, relative."""
NUM_REFINEMENTS = 2
"""How often intervals of the grid that could hold a lower minimum are quartered, at most."""
MOST_REFINED_ROUNDS = 96
"""With more rounds a plan, refining would take as long as planning and gain less than the tolerance."""
REFINED_TOLERANCE = 1e-4
ROUNDING = 1e-9
"""Share taken off the bound for the rounding of floating-point sums."""
MAX_ARRIVALS = 8
"""Arrival times at which the batch's rest is bounded on its own."""


def makespan_bound_s(problem: Problem) -> float:
    """Seconds that no plan's makespan can be below, for this cost model, these requests and this window."""
    arrivals = sorted({request.arrival_s for request in problem.requests})
    chosen = {arrivals[i] for i in np.linspace(0, len(arrivals) - 1, MAX_ARRIVALS).astype(int)}
    bounds = []
    for arrival in chosen:
        later = [request for request in problem.requests if request.arrival_s >= arrival]
        work = Work.of(later, problem.limits.max_round_tokens)
        bounds.append(arrival + batch_bound_s(problem.cost, work, problem.window, problem.chunk_multiple))
    return float(max(bounds)) * (1.0 - ROUNDING)


def batch_bound_s(cost: CostModel, work: Work, window: int | None, multiple: int | None = None) -> float:
    """The bound for requests that are all there at the start.

    multiple: chunks end on multiples of so many tokens; None where they may end anywhere.
    """
    pp_size, stages = cost.pp_size, cost.stage_of_group
    num_hops = sum(one != other for one, other in itertools.pairwise(stages))
    hops = num_hops * (cost.hop_latency_s + cost.hop_token_s * work.new_tokens)
    best = passes_bound_s(cost, work) if cost.virtual_stages > 1 else _one_pass_s(cost, work, multiple)
    if window is not None and window < pp_size:
        in_turn = sum(max(least_sum(envelope, work) for envelope in envelopes([stage], work)) for stage in cost.stages)
        best = max(best, (in_turn + hops) / window)
    return best


def _one_pass_s(cost: CostModel, work: Work, multiple: int | None) -> float:
    """The bound of one group a stage without a window."""
    curved = multiple is not None and is_curved(cost.kinds)
    one_token = np.array([kind.round_overhead_s + float(kind.tokens_s(1)) for kind in cost.kinds])[cost.kind_of_stage]
    best = 0.0
    for first, last in _stage_ranges(cost, work):
        outside = one_token[:first].sum() + one_token[last + 1 :].sum() + (cost.pp_size - 1) * cost.hop_latency_s
        outside += (cost.pp_size - 1 - (last - first)) * cost.hop_token_s
        stages = dict.fromkeys(cost.stages[first : last + 1])  # each once, in order
        lines = envelopes(stages, work, cost.hop_token_s)
        if curved:  # the grid tells more: one line will do for a start
            lines = [max(lines, key=lambda line: likely_least_s(line, work, last - first))]
        for envelope in lines:
            best = max(best, outside + _least_makespan(envelope, work, last - first))
    on_grid = grid_bound_s(cost, work, multiple, best) if multiple is not None and curved else None
    if on_grid is not None:
        return max(best, on_grid)
    return max(best, uneven_bound_s(cost, work, best)) if len(cost.kinds) > 1 else best


def _cap_grid(envelope: Envelope, work: Work, num_more: int, tolerance: float) -> Floats:
    """Caps m1 < m2 < ... such that the smooth S(m2) + num_more * m1 stays within `tolerance` of its least
    everywhere."""
    curve_caps, curve = smooth_curve(envelope, work)
    usable = np.isfinite(curve)
    if not usable.any():
        return curve_caps
    curve_caps, curve = curve_caps[usable], np.minimum.accumulate(curve[usable])
    middle = likely_cap_s(envelope, work, num_more)
    target = (1.0 - tolerance) * float(np.interp(middle, curve_caps, curve) + num_more * middle)
    caps = [middle]
    while caps[0] > curve_caps[0] and len(caps) < MOST_CAPS:
        lower = (target - float(np.interp(caps[0], curve_caps, curve))) / num_more
        if lower <= curve_caps[0]:
            break
        caps.insert(0, min(lower, caps[0] * (1.0 - 1e-4)))
    while caps[-1] < curve_caps[-1] and len(caps) < 2 * MOST_CAPS:
        reach = np.flatnonzero(curve >= target - num_more * caps[-1])
        upper = float(curve_caps[reach[-1]]) if reach.size else 0.0
        if reach.size and reach[-1] + 1 < len(curve):  # between two points of the curve, which falls
            i = int(reach[-1])
            share = (curve[i] - (target - num_more * caps[-1])) / max(float(curve[i] - curve[i + 1]), 1e-300)
            upper += min(float(share), 1.0) * float(curve_caps[i + 1] - curve_caps[i])
        caps.append(min(max(upper, caps[-1] * (1.0 + 1e-4)), float(curve_caps[-1])))
    below = caps[0] * np.array([0.5, 0.7, 0.8, 0.9])  # the curve is smooth, the sums are not: leave some room
    return np.unique(np.concatenate([below, caps, curve_caps[-1:]]))


def _least_makespan(envelope: Envelope, work: Work, num_more: int) -> float:
    """The least of S(m) + num_more * m over all caps m."""
    if num_more == 0:
        return least_sum(envelope, work)
    highest = longest_round_s(envelope, work)
    if highest <= 0.0:
        return highest
    grid = _cap_grid(envelope, work, num_more, TOLERANCE)
    caps = np.unique(np.concatenate([grid[grid < highest], highest * np.array([0.25, 0.5, 0.75, 1.0])]))
    sums, rounds = least_sums(envelope, work, caps)
    for _ in range(NUM_REFINEMENTS if rounds[len(caps) // 2] <= MOST_REFINED_ROUNDS else 0):
        at_least = np.append(sums[0], sums[1:] + num_more * caps[:-1])  # below caps[0]; on [caps[i], caps[i+1]]
        reached = float((sums + num_more * caps).min())
        split = np.flatnonzero(at_least[1:] < reached * (1.0 - REFINED_TOLERANCE))
        if not split.size:
            break
        low, high = caps[split][:, None], caps[split + 1][:, None]
        inner = (low + (high - low) * (np.arange(1, 4) / 4.0)).ravel()
        inner_sums, _ = least_sums(envelope, work, inner)
        caps, sums = np.append(caps, inner), np.append(sums, inner_sums)
        order = np.argsort(caps)
        caps, sums = caps[order], sums[order]
    return float(min(sums[0], (sums[1:] + num_more * caps[:-1]).min()))


def _stage_ranges(cost: CostModel, work: Work) -> list[tuple[int, int]]:
    """Ranges of stages to try: from the slowest stage alone, growing to the slower neighbour, to the whole pipeline."""
    tokens, context = work.prompt - work.cached, work.cached
    busy = np.array(
        [
            float(kind.round_overhead_s + kind.tokens_s(tokens.sum()) + kind.chunk_seconds(tokens, context, True).sum())
            for kind in cost.kinds
        ]
    )[cost.kind_of_stage]
    first = last = int(np.argmax(busy))
    ranges = []
    while True:
        lower = busy[first - 1] if first else -1.0
        upper = busy[last + 1] if last + 1 < cost.pp_size else -1.0
        grown = lower < 0.0 and upper < 0.0
        at_limit = min(busy[first : last + 1])
        if (
            grown or max(lower, upper) < at_limit
        ):  # the next stage is cheaper than all in the range: its envelope differs
            ranges.append((first, last))
        if grown:
            return ranges
        if lower >= upper:
            first -= 1
        else:
            last += 1
