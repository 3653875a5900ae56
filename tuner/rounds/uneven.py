"""A proven lower bound for stages that differ: rounds may grow while the pipeline fills and shrink while it drains.

Why it is a bound. Take any plan and a stage k, and let x(i) be what round i takes on k (the cost of ending prompts
left out), S their sum, X(i) the sum before round i and Y(i) the sum after it. Let r(j) <= 1 be such that every round
takes at least r(j) x on stage j. A path through the recurrence that runs on stage a < k up to round i, goes down to k
with it and stays there is longer than S by

    g(i) = one token on the stages before a + r(a) (X(i) + x(i)) + x(i) sum of r(j) for a < j < k - X(i)

and one that leaves k with round i for stage b > k and stays there by h(i), the same with Y. Let E be the largest g
over all i and a, at round i, and D the largest h over all i and b, at round l; one token on every stage before k, of
the path that goes there with the first round, counts as a g of that round. If i <= l one path does both. If i > l
then g(i) >= g(l) and X(i) >= X(l) give x(i) >= x(l), and with Y(i) <= Y(l) also h(i) >= h(l): the path through k in
round i alone does both. So makespan >= S + E + D + hops, and no round of the plan exceeds

    x(i) <= (E - one token before a + (1 - r(a)) X(i)) / sum of r(j) for a <= j < k      for each a,

nor its mirror image. Handing a round on takes a latency, counted in hops, and hop_token for each of its T(i) tokens.
The path pays the latter for one token on the stages before a, and from a to k-1 for all of round i, of which r(j) is
enough here. So x(i) + T(i) hop_token takes the place of x(i) wherever it multiplies the sum of r(j), and is what is
capped.

Ending a prompt costs more on one stage than on the others: the last, which has the head. Let f be that cost.

- On k, the last stage: a path that comes there with round i has not paid f for the n(i) prompts that ended before. With
  S + f of all prompts in the place of S, g(i) loses f n(i), and a cap gains f n(i) / sum of r(j). As n(i) rises with i
  the argument for i > l holds.
- On stages b behind k, the first stage: a path that leaves k with round i pays f there for all prompts that did not end
  before. h(i) gains it, and a cap loses it. There is no g, so that nothing is said of i > l.

n(i) is at most the number of prompts, the shortest first, whose seconds beside overhead X(i) can hold.

With these caps 1. no round exceeds some m, so S >= held(m) + o N as in `rounds.bound`; 2. the first n rounds, with
handing on, sum to at most G(n), where G(n+1) = G(n) + cap(G(n)), the last n to at most H(n); so N m >= S + (n m - G(n))
+ ((N - n) m - H(N - n)) for any n, S with handing on, and N >= (held(m) + hop_token of all tokens + both shortfalls) /
(m - o). S falls as E and D rise, so on a cell of a grid over (E, D) the bound is S at its upper corner plus its lower
corner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats, PairAttention, StageCost, TableAttention
from tuner.rounds.relaxation import Envelope, Work, envelopes, least_sums, requests_s

MOST_GAIN = 1.5
"""The bound is not raised by more than this over the one that is known: plans whose rounds sum to more are left out."""
NUM_CAPS, NUM_STEPS, NUM_PLACES = 96, 48, 32
"""Caps at which the least sums are known; rounds that growth is followed for; places where a cap is taken."""
NUM_EDGES, NUM_CLOSER = 24, 3
"""Edges of the grid over what fill and drain add, and how often edges are added around the least."""
MANY_STAGES, FEWER_CLOSER = 16, 2
"""With more stages edges are added less often: it costs about 0.1 % of the bound and saves a third of its time."""


def paid_s(cost: CostModel, work: Work, stage: int) -> float:
    """What ending all prompts costs every path through this stage."""
    final_s = [float(each.final_s) for each in cost.stages]
    return len(work.prompt) * (final_s[-1] if stage == cost.pp_size - 1 else min(final_s))


def uneven_bound_s(cost: CostModel, work: Work, known_s: float) -> float:
    """Seconds that no makespan is below, where `known_s` is proven already."""
    if known_s <= 0.0:  # nothing to scale the grid by
        return known_s
    return max(known_s, _bound_through_s(cost, work, bounding_stage(cost, work), known_s))


def busiest_stage(cost: CostModel, work: Work, *, ending: bool = False) -> int:
    """The stage on which the batch takes longest, with what ending its prompts costs or without."""
    tokens, context = work.prompt - work.cached, work.cached
    busy = [
        float(kind.tokens_s(tokens.sum()) + kind.chunk_seconds(tokens, context, ending).sum()) for kind in cost.kinds
    ]
    return max(range(cost.pp_size), key=lambda stage: busy[cost.kind_of_stage[stage]])


def bounding_stage(cost: CostModel, work: Work) -> int:
    """The stage through which paths tell most: for one prompt, whose chunks take longer towards its end, the first and
    so the drain are better known than the last, whatever ending it costs."""
    return busiest_stage(cost, work, ending=len(work.prompt) > 1)


def least_ratio(stage: StageCost, other: StageCost, most_tokens: float) -> float:
    """The largest r <= 1 found such that every round takes on `stage` at least r times what it takes on `other`,
    the cost of ending prompts left out there.

    Overhead with tokens, base with `chunk_s`, and slope are compared apart. Between the points of the tables each
    ratio is one of two linear functions (of c or of c (c+1) or c squared), so it is least at a point.
    """
    mine, theirs = stage.attention, other.attention
    if isinstance(mine, TableAttention) and isinstance(theirs, TableAttention) and mine.count == theirs.count:
        inner: tuple[int, ...] = mine.count
    elif isinstance(mine, PairAttention) and isinstance(theirs, PairAttention):
        inner = ()
    else:
        return 0.0
    chunk = np.array(sorted({1.0, most_tokens, *(float(n) for n in inner if n < most_tokens)}))
    breaks = {float(n) for table in (stage, other) for n in table.token_count if 1 <= n < most_tokens}
    total = np.array(sorted({1.0, most_tokens, *breaks}))
    pairs = [
        (stage.round_overhead_s + stage.tokens_s(total), other.round_overhead_s + other.tokens_s(total)),
        (mine.base(chunk) + stage.chunk_s, theirs.base(chunk) + other.chunk_s),
        (mine.slope(chunk), theirs.slope(chunk)),
    ]
    ratio = 1.0
    for above, below in pairs:
        if below.any():
            ratio = min(ratio, float((above[below > 0.0] / below[below > 0.0]).min()))
    return ratio * (1.0 - 1e-12)


def _bound_through_s(cost: CostModel, work: Work, stage: int, known_s: float) -> float:
    """The bound whose paths pass this stage."""
    reference = replace(cost.stages[stage], final_s=0.0)
    sides = sides_of(cost, work, stage)
    num_closer = FEWER_CLOSER if cost.pp_size > MANY_STAGES else NUM_CLOSER
    fixed_s = (cost.pp_size - 1) * cost.hop_latency_s + paid_s(cost, work, stage)
    most_s = MOST_GAIN * known_s - fixed_s
    if most_s <= 0.0:
        return known_s
    lines = envelopes([reference], work, cost.hop_token_s)
    best = max(_least_s(envelope, work, sides, most_s, num_closer) for envelope in lines)
    return min(fixed_s + best, MOST_GAIN * known_s)


def sides_of(cost: CostModel, work: Work, stage: int) -> list[Side]:
    """The stages before and after one, compared with it."""
    reference = replace(cost.stages[stage], final_s=0.0)
    ratio_of_kind = [least_ratio(kind, reference, work.new_tokens) for kind in cost.kinds]
    token_of_kind = [kind.round_overhead_s + float(kind.tokens_s(1)) + cost.hop_token_s for kind in cost.kinds]
    kinds = cost.kind_of_stage.tolist()
    ratio, token = [ratio_of_kind[kind] for kind in kinds], [token_of_kind[kind] for kind in kinds]
    endings = Endings.of(reference, work)
    least_s = min(each.final_s for each in cost.stages)
    final_s: Floats = np.array([each.final_s - least_s for each in cost.stages], dtype=np.float64)
    own_final_s = float(final_s[-1]) if stage == cost.pp_size - 1 else 0.0
    after_s = final_s[:stage:-1] if stage == 0 else np.zeros(cost.pp_size - 1 - stage)
    return [
        Side(ratio[:stage], token[:stage], endings, np.zeros(stage), own_final_s),
        Side(ratio[:stage:-1], token[:stage:-1], endings, after_s, 0.0),
    ]


@dataclass(frozen=True, slots=True)
class Endings:
    """How many prompts can have ended by the time that so much has run."""

    seconds: Floats  # in which no more than 0, 1, 2, ... prompts end, [prompts + 1]

    @classmethod
    def of(cls, stage: StageCost, work: Work) -> Endings:
        """On a stage: the least seconds of the shortest prompts, overhead left out."""
        whole = max(work.new_tokens, 1.0)
        least_s = [np.cumsum(np.sort(requests_s(line, work, whole))) for line in envelopes([stage], work)]
        return cls(np.append(0.0, np.max(least_s, axis=0)))

    def most(self, done_s: Floats) -> Floats:
        """The number of prompts."""
        found = np.searchsorted(self.seconds, done_s * (1.0 + 1e-9), side="right") - 1
        return found.astype(np.float64)

    def least_left(self, done_s: Floats) -> Floats:
        """The number of prompts that have not ended."""
        return len(self.seconds) - 1.0 - self.most(done_s)


class Side:
    """The stages before (or, mirrored, after) the one that the paths stay on, the outermost first.

    final_s: what a prompt that ends costs each of them and not the others; counted with `before_s` of `caps_s`.
    own_final_s: what it costs the stage that the paths stay on.
    """

    def __init__(
        self, ratio: list[float], token_s: list[float], endings: Endings, final_s: Floats, own_final_s: float
    ) -> None:
        self.endings, self.final_s, self.own_final_s = endings, final_s, own_final_s
        self.ratio = np.array(ratio)
        self.before_s = np.concatenate([[0.0], np.cumsum(token_s)])
        self.slowness = np.cumsum(self.ratio[::-1])[::-1]  # sum of r(j) from each stage on

    @property
    def least_s(self) -> float:
        """What every plan pays on this side."""
        return float(self.before_s[-1])

    def caps_s(self, excess_s: Floats, done_s: Floats, before_s: Floats | None = None) -> Floats:
        """The longest round, hop included, for each excess when so much has run, mirrored if this side is; the shapes
        broadcast.

        before_s: the most that may have run before it, not mirrored; None if nothing is known of it.
        """
        shape = np.broadcast_shapes(excess_s.shape, done_s.shape)
        held_up = self.slowness > 0.0
        if not held_up.any():
            return np.full(shape, np.inf)
        columns = (self.ratio[held_up], self.before_s[:-1][held_up], self.slowness[held_up], self.final_s[held_up])
        ratio, outside_s, slowness, final_s = (column.reshape(-1, *(1 for _ in shape)) for column in columns)
        with np.errstate(over="ignore"):
            spare_s = excess_s - outside_s + (1.0 - ratio) * done_s
            if self.own_final_s:
                spare_s = spare_s + self.own_final_s * self.endings.most(done_s)
            if before_s is not None and final_s.any():
                spare_s = spare_s - final_s * self.endings.least_left(before_s)
            caps = (spare_s / slowness).min(axis=0)
        allowed: Floats = np.maximum(caps, 0.0) * (1.0 + 1e-9)
        return allowed

    def grown_s(self, excess_s: Floats) -> Floats:
        """G(n): what the first n rounds sum to at most, [len(excess_s), NUM_STEPS + 1]."""
        done = np.zeros((len(excess_s), NUM_STEPS + 1))
        for step in range(NUM_STEPS):
            done[:, step + 1] = done[:, step] + self.caps_s(excess_s, done[:, step])
        return done


def _least_s(envelope: Envelope, work: Work, sides: list[Side], most_s: float, num_closer: int) -> float:
    """The least of S + E + D over a grid that is made closer around the least."""
    lowest = max(envelope.round_s, 1e-4 * most_s)
    caps_s = np.geomspace(lowest, max(_longest_s(sides, most_s), lowest) * (1.0 + 1e-9), NUM_CAPS)
    sums, rounds = least_sums(envelope, work, caps_s)
    with np.errstate(invalid="ignore"):
        held = np.where(np.isfinite(sums), sums - envelope.round_s * rounds, np.inf)
    held_s = np.minimum.accumulate(held)
    edges = [
        np.append(np.geomspace(1e-3, 1.0, NUM_EDGES) * most_s, np.inf) if len(side.ratio) else np.array([0.0])
        for side in sides
    ]
    least = 0.0
    for closer in range(num_closer + 1):
        lower = [np.maximum(np.append(0.0, e[:-1]), side.least_s) for e, side in zip(edges, sides, strict=True)]
        grid = _sums(envelope, work, sides, edges, most_s, caps_s, held_s, rounds) + lower[0][:, None] + lower[1]
        least = max(least, float(grid.min()))
        at = np.unravel_index(int(grid.argmin()), grid.shape)
        for i, side in enumerate(sides):
            if len(side.ratio):
                edge, reach = edges[i], 3 >> closer // 2
                low = edge[max(int(at[i]) - reach, 0)]
                high = min(float(edge[min(int(at[i]) + reach, len(edge) - 1)]), most_s)
                edges[i] = np.unique(np.concatenate([edge, np.linspace(low, high, NUM_EDGES)]))
    return least


def _longest_s(sides: list[Side], most_s: float) -> float:
    """No round takes longer with its hop in a plan whose S, E and D are below `most_s` together: a path goes down with
    it. That path may not pay for prompts that ended before."""
    return most_s + sides[0].own_final_s * len(sides[0].endings.seconds)


def _sums(
    envelope: Envelope,
    work: Work,
    sides: list[Side],
    edges: list[Floats],
    most_s: float,
    caps_s: Floats,
    held_s: Floats,
    rounds: Floats,
) -> Floats:
    """S for every pair of edges, [len(edges[0]), len(edges[1])]."""
    places = np.linspace(0.0, most_s, NUM_PLACES + 1)  # a round begins at a place between two of these
    fill = sides[0].caps_s(edges[0][:, None], places[1:])
    drain = sides[1].caps_s(edges[1][:, None], most_s - places[:-1], places[1:])
    longest = np.minimum(np.minimum(fill[:, None, :], drain[None, :, :]).max(axis=2), _longest_s(sides, most_s))
    at = np.minimum(np.searchsorted(caps_s, longest), len(caps_s) - 1)
    held, least_rounds = held_s[at], rounds[at]
    filled = held + envelope.hop_token_s * work.new_tokens
    room = longest - envelope.round_s
    steps = np.arange(NUM_STEPS + 1)
    short = [
        np.maximum.accumulate(np.maximum(steps * longest[..., None] - grown, 0.0), axis=2)
        for grown in (sides[0].grown_s(edges[0])[:, None, :], sides[1].grown_s(edges[1])[None, :, :])
    ]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        needed = np.where(held > 0.0, np.maximum(least_rounds, np.ceil(filled / room - 1e-9)), 0.0)
        for share in (0.5, 0.25, 0.75, 0.0, 1.0):
            count = np.where(np.isfinite(needed), np.minimum(needed, 1e9), 0.0)
            first = np.floor(share * count)
            lacking = sum(
                np.take_along_axis(table, np.minimum(n, NUM_STEPS).astype(np.int64)[..., None], axis=2)[..., 0]
                for table, n in zip(short, (first, count - first), strict=True)
            )
            needed = np.maximum(needed, np.where(held > 0.0, np.ceil((filled + lacking) / room - 1e-9), 0.0))
        sums = held + envelope.round_s * needed if envelope.round_s else held
    possible = (room > 0.0) & np.isfinite(held) & np.isfinite(needed)
    return np.where(possible, sums, np.inf)
