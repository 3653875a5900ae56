"""A proven lower bound on the makespan of any plan: any cut, any grouping into rounds, any order, any window.

Why it is a bound. Take any plan and any stages a <= b. The recurrence gives makespan >= the cost of every path that
goes from round 0 on stage 0 to the last round on the last stage by steps "next round" and "next stage". Choose the
path that enters stage a with the first round, stays there up to the round j whose time is the largest, m, goes down
to stage b with it, and stays on b to the last round, which it follows out:

    makespan >= sum_i e(i) + (b - a) m + fill + drain + (pp_size - 1) hop

where e is an envelope: a cost that on none of the stages a..b exceeds theirs, and m = max_i e(i). fill and drain are
what one token costs on the stages before a and after b. Nothing is known of m, so the right side is minimised over
it; with a cap m on every round,

1. request r, whose chunks must each fit under m alone, reads its context again at every chunk's start p: sum of
   context_s * p over its chunks is least when it is cut backwards from its end with the longest chunks allowed. (Let
   s(e) be the earliest start allowed for a chunk that ends at e. A shorter chunk from the same start costs no more,
   so s does not fall with e, and by induction every start of every other cut lies at or after the backward cut's,
   which also has the fewest chunks.)
2. with F all that rounds cost beside their overhead o, N rounds hold it only if F <= N (m - o): N >= ceil(F / (m -
   o)), and N is also at least any request's number of chunks. So sum_i e(i) >= F + o N.

S(m), the least sum, falls with m, so between two caps m1 < m2 the expression is at least S(m2) + (b - a) m1: a finite
grid of caps proves the bound for all m. The envelope is linear in a round's tokens (a supporting line under every
stage's table, its offset added to o) and pair-wise in attention (`_pair_floor`), so the backward cut has a closed
form in each step.

A window adds another bound: rounds i, i+W, i+2W, ... pass the whole pipeline one after the other, and the longest of
these W chains is at least their mean: (sum over rounds and stages + hops) / W. Arrivals add a third: the requests
that arrive at t or later make a batch of their own that starts at t.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from tuner.cost_model import CostModel, Floats, PairAttention, StageCost
from tuner.plan import Request
from tuner.problem import Problem

NUM_CAPS = 64
"""Points of the smooth curve that places the grid of caps."""
MOST_CAPS = 48
"""Caps on the grid to either side of the likely minimum."""
TOLERANCE = 1e-3
"""What the grid of caps may cost the bound, relative."""
NUM_REFINEMENTS = 2
"""How often intervals of the grid that could hold a lower minimum are quartered, at most."""
MOST_REFINED_ROUNDS = 96
"""With more rounds a plan, refining would take as long as planning and gain less than the tolerance."""
REFINED_TOLERANCE = 1e-4
NUM_SAMPLES = 12
"""Points of a prompt at which `smooth_sums` takes the chunk length."""
MAX_CUTS = 640
"""Chunks of one request that the backward cut follows; those before them are counted as free of context reads."""
ROUNDING = 1e-9
"""Share taken off the bound for the rounding of floating-point sums."""
MAX_ARRIVALS = 8
"""Arrival times at which the batch's rest is bounded on its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """A cost that is on no stage of a set above that stage's: linear in tokens, pair-wise in attention."""

    round_s: float
    token_s: float
    pair_s: float
    context_token_s: float
    chunk_s: float
    final_s: float


@dataclass(frozen=True, slots=True)
class Work:
    """The requests as columns: what must run whatever the plan."""

    prompt: Floats
    cached: Floats
    max_round_tokens: float

    @classmethod
    def of(cls, requests: Sequence[Request], max_round_tokens: int | None) -> Work:
        """The columns of these requests."""
        prompt = np.array([request.prompt_tokens for request in requests], dtype=np.float64)
        cached = np.array([request.cached_tokens for request in requests], dtype=np.float64)
        return cls(prompt, cached, np.inf if max_round_tokens is None else float(max_round_tokens))

    @property
    def new_tokens(self) -> float:
        """Tokens that must run."""
        return float((self.prompt - self.cached).sum())


def makespan_bound_s(problem: Problem) -> float:
    """Seconds that no plan's makespan can be below, for this cost model, these requests and this window."""
    arrivals = sorted({request.arrival_s for request in problem.requests})
    chosen = {arrivals[i] for i in np.linspace(0, len(arrivals) - 1, MAX_ARRIVALS).astype(int)}
    bounds = []
    for arrival in chosen:
        later = [request for request in problem.requests if request.arrival_s >= arrival]
        work = Work.of(later, problem.limits.max_round_tokens)
        bounds.append(arrival + batch_bound_s(problem.cost, work, problem.window))
    return float(max(bounds)) * (1.0 - ROUNDING)


def batch_bound_s(cost: CostModel, work: Work, window: int | None) -> float:
    """The bound for requests that are all there at the start."""
    pp_size = cost.pp_size
    one_token = np.array([kind.round_overhead_s + float(kind.tokens_s(1)) for kind in cost.kinds])[cost.kind_of_stage]
    hops = (pp_size - 1) * (cost.hop_latency_s + cost.hop_token_s)
    best = 0.0
    for first, last in _stage_ranges(cost, work):
        outside = one_token[:first].sum() + one_token[last + 1 :].sum() + hops
        stages = {cost.stages[k] for k in range(first, last + 1)}
        for envelope in envelopes(stages, work):
            best = max(best, outside + _least_makespan(envelope, work, last - first))
    if window is not None and window < pp_size:
        in_turn = sum(max(least_sum(envelope, work) for envelope in envelopes([stage], work)) for stage in cost.stages)
        best = max(best, (in_turn + hops) / window)
    return best


def envelopes(stages: Iterable[StageCost], work: Work) -> list[Envelope]:
    """Envelopes of these stages, one for each supporting line that is worth a try under their tokens tables."""
    stages = list(stages)
    pairs = [_pair_floor(stage) for stage in stages]
    pair_s, context_token_s, chunk_s = (min(column) for column in zip(*pairs, strict=True))
    round_s = min(stage.round_overhead_s for stage in stages)
    final_s = min(stage.final_s for stage in stages)
    most = work.new_tokens
    points = np.array(sorted({1.0, most, *(float(n) for stage in stages for n in stage.token_count if 1 <= n < most)}))
    floor = np.min([stage.tokens_s(points) for stage in stages], axis=0)
    return [
        Envelope(
            round_s=round_s + offset,
            token_s=token_s,
            pair_s=pair_s,
            context_token_s=context_token_s,
            chunk_s=chunk_s,
            final_s=final_s,
        )
        for offset, token_s in _lines_under(points, floor)
    ]


def least_sum(envelope: Envelope, work: Work, cap_s: float = np.inf) -> float:
    """S(m) for one cap: the least that all rounds can sum to when none exceeds the cap."""
    return float(least_sums(envelope, work, np.array([cap_s]))[0][0])


def least_sums(envelope: Envelope, work: Work, caps_s: Floats) -> tuple[Floats, Floats]:
    """S(m) and the least number of rounds for every cap (inf where a cap is too low for any plan), both [num_caps]."""
    caps_s = caps_s * (1.0 + 1e-9)  # a higher cap only lowers the sum: rounding never makes a plan impossible
    pair, context = envelope.pair_s, envelope.context_token_s
    num_caps, num_requests = len(caps_s), len(work.prompt)
    read = np.zeros(num_caps)  # context tokens read again, all requests together
    cuts = np.zeros(num_caps)
    most_cuts = np.zeros(num_caps)
    possible = caps_s >= envelope.round_s + envelope.chunk_s
    # One entry a (cap, request) pair whose cut goes on.
    cap = np.repeat(np.arange(num_caps), num_requests)
    end, start = np.tile(work.prompt, num_caps), np.tile(work.cached, num_caps)
    room = (caps_s - envelope.round_s - envelope.chunk_s)[cap]
    for step in range(1, MAX_CUTS + 1):
        # The longest chunk that ends at `end`: -pair/2 c^2 + rate c <= spare; all that is left, or the smaller root.
        left = end - start
        rate = (envelope.token_s + 0.5 * pair - context) + pair * end
        spare = room - context * end
        whole = left * (rate - 0.5 * pair * left) <= spare
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            root = 2.0 * spare / (rate + np.sqrt(np.maximum(rate * rate - 2.0 * pair * spare, 0.0)))
        chunk = np.where(whole, left, np.minimum(np.floor(root + 1e-6), left))
        end = end - chunk
        read += np.bincount(cap, weights=end, minlength=num_caps)
        cuts += np.bincount(cap, minlength=num_caps)
        most_cuts[cap] = step
        possible[cap[~(chunk >= 1.0)]] = False
        more = (end > start) & possible[cap]
        if not more.any():
            break
        if not more.all():
            cap, end, start, room = cap[more], end[more], start[more], room[more]
    pairs = float((work.prompt * (work.prompt + 1.0) - work.cached * (work.cached + 1.0)).sum()) / 2.0
    fixed = envelope.token_s * work.new_tokens + pair * pairs + envelope.final_s * num_requests
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        held = fixed + context * read + envelope.chunk_s * cuts
        needed = np.where(held > 0.0, np.ceil(held / (caps_s - envelope.round_s) - 1e-9), 0.0)
        rounds = np.maximum(needed, most_cuts)
    possible &= np.isfinite(rounds)
    rounds = np.maximum(rounds, np.ceil(work.new_tokens / work.max_round_tokens))
    return np.where(possible, held + envelope.round_s * rounds, np.inf), np.where(possible, rounds, np.inf)


def smooth_sums(envelope: Envelope, work: Work, caps_s: Floats) -> Floats:
    """S(m) without whole numbers: cuts as the integral of one over the chunk length. Not a bound; it finds good
    caps."""
    share = (np.arange(NUM_SAMPLES) + 0.5) / NUM_SAMPLES
    new = work.prompt - work.cached
    end = (work.cached[:, None] + new[:, None] * share).ravel()  # [requests * samples]
    pair, context = envelope.pair_s, envelope.context_token_s
    rate = (envelope.token_s - context) + pair * end
    spare = (caps_s - envelope.round_s - envelope.chunk_s)[:, None] - context * end
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        chunk = 2.0 * spare / (rate + np.sqrt(np.maximum(rate * rate - 2.0 * pair * spare, 0.0)))
    left = np.repeat(new, NUM_SAMPLES)
    chunk = np.where(np.isfinite(chunk) & (chunk > 0.0), np.minimum(chunk, left), left)
    chunk = np.where((spare > 0.0) & (chunk >= 1.0), chunk, np.nan)
    density = np.repeat(new / NUM_SAMPLES, NUM_SAMPLES) / chunk  # cuts each sample stands for
    read = (density * np.maximum(end - chunk, np.repeat(work.cached, NUM_SAMPLES))).sum(axis=1)
    pairs = float((work.prompt * (work.prompt + 1.0) - work.cached * (work.cached + 1.0)).sum()) / 2.0
    held = envelope.token_s * work.new_tokens + pair * pairs + envelope.final_s * len(new)
    held = held + context * read + envelope.chunk_s * density.sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        sums = held * caps_s / (caps_s - envelope.round_s)
    return np.where(np.isfinite(sums) & (caps_s > envelope.round_s), np.maximum(sums, held + envelope.round_s), np.inf)


def likely_cap_s(envelope: Envelope, work: Work, num_more: int) -> float:
    """The cap at which the smooth S(m) + num_more * m is least."""
    caps, sums = _smooth_curve(envelope, work)
    i = int(np.argmin(sums + num_more * caps))
    fine = np.linspace(caps[max(i - 1, 0)], caps[min(i + 1, len(caps) - 1)], NUM_SAMPLES)
    return float(fine[np.argmin(smooth_sums(envelope, work, fine) + num_more * fine)])


def _smooth_curve(envelope: Envelope, work: Work) -> tuple[Floats, Floats]:
    highest = least_sum(envelope, work)
    caps = np.geomspace(max(highest * 1e-4, envelope.round_s, 1e-300), max(highest, 1e-300), NUM_CAPS)
    return caps, smooth_sums(envelope, work, caps)


def _cap_grid(envelope: Envelope, work: Work, num_more: int, tolerance: float) -> Floats:
    """Caps m1 < m2 < ... such that the smooth S(m2) + num_more * m1 stays within `tolerance` of its least
    everywhere."""
    curve_caps, curve = _smooth_curve(envelope, work)
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
    highest = least_sum(envelope, work)  # all in one round: no plan needs a higher cap
    if num_more == 0 or highest <= 0.0:
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


def _pair_floor(stage: StageCost) -> tuple[float, float, float]:
    """(pair_s, context_token_s, chunk_s) whose PairAttention cost is nowhere above the stage's attention plus
    chunk_s.

    For a table: at its points base(c) >= pair_s c (c+1) / 2 + d and slope(c) >= pair_s c + context_token_s. A chord
    lies above a convex parabola that is below its ends, and beyond the last point base and slope grow at least as
    fast, so what holds at the points holds everywhere.
    """
    attention = stage.attention
    if isinstance(attention, PairAttention):
        return attention.pair_s, attention.context_token_s, stage.chunk_s
    count = np.array(attention.count, dtype=np.float64)
    base, slope = np.array(attention.base_s), np.array(attention.context_s)
    half_square = count * (count + 1.0) / 2.0
    pair_s = float(min((base / half_square).min(), (slope / count).min()))
    context_token_s = float((slope - pair_s * count).min())
    return pair_s, max(context_token_s, 0.0), stage.chunk_s + max(float((base - pair_s * half_square).min()), 0.0)


def _lines_under(points: Floats, floor: Floats) -> list[tuple[float, float]]:
    """(offset, slope) of lines nowhere above the floor on [points[0], points[-1]], none with a negative offset.

    `floor` is a minimum of piecewise linear functions whose breaks are all among the points, so it is concave between
    them and a line below it at the points is below it between them.
    """
    slopes = {float((floor / points).min())}
    hull: list[int] = []
    for i in range(len(points)):
        while len(hull) > 1 and _turns_down(points, floor, hull[-2], hull[-1], i):
            hull.pop()
        hull.append(i)
    for left, right in itertools.pairwise(hull):
        slopes.add(float((floor[right] - floor[left]) / (points[right] - points[left])))
    lines = [(float((floor - slope * points).min()), slope) for slope in slopes]
    rounding = 1e-12 * float(floor[-1])
    allowed = sorted((max(offset, 0.0), slope) for offset, slope in lines if offset >= -rounding)
    return allowed[:: max(1, len(allowed) // 4)]


def _turns_down(x: Floats, y: Floats, a: int, b: int, c: int) -> bool:
    return bool((y[b] - y[a]) * (x[c] - x[b]) >= (y[c] - y[b]) * (x[b] - x[a]))
