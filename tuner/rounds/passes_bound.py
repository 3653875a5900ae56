"""A proven lower bound where rounds pass every stage several times: for any cut and any order of a stage's tasks.

Why it is a bound. Take any plan and any order in which stages run their tasks; all that is used is that task (i,g),
round i in group g, comes after (i,g-1), with a hop where the stage differs, and after (i-1,g), whose KV it reads, and
that a stage runs one task at a time. Let stage A hold the groups a1 < a2 < ... Its first task is (0,a1): every other
one has a predecessor on A. So A is idle while round 0 is in the groups before a1, and likewise after its last task
while the last round is in the groups behind: fill(A) and drain(A), at least what one token costs there, hops included.

1. *Work.* A runs all its tasks between the two: makespan >= fill(A) + sum over i and g on A of t(i,g) + drain(A).
2. *A round.* Take groups a < b on stages A and B, and a round j. Before (j,a) starts, A has run every (i,g) with i <= j
   and g <= a but (j,a) itself, for each precedes (j,a) through data or KV. Then j goes from a to b. After that B still
   has to run every (i,g) with i >= j and g >= b but (j,b). So makespan >= fill(A) + those on A + t(j,a) + ... + t(j,b)
   + hops + those on B + drain(B).

Let x(i) be what round i takes in a mean group of some stage (the sum of its groups divided by their number, ended
prompts left out), and r(g) <= 1 such that every round takes at least r(g) x in group g. With j the round whose x = m is
the largest, X the sum of x before it and Y the sum after it, each bound of kind 2 is

    alpha X + beta Y + gamma m + constant,    X + Y + m = S,

with alpha = sum of r(g) over g <= a on A, and beta over g >= b on B. How X and Y share S - m is the plan's choice, so
two such lines are weighted so that X and Y weigh the same (one alone where they do): what is left is A S + B m +
constant, with B >= 0. Kind 1 for the stage that x was taken from is v S + constant. Under a cap m no plan has S below
S(m) (`rounds.bound`, 1. and 2.), which falls with m, so on an interval m1 <= m <= m2 the largest of the lines is at
least that of A S(m2) + B m1 + constant: a finite grid of caps proves the bound for all m.

With one group a stage kind 2 from the first stage to the last is the bound of `rounds.bound`. With more, a plan may
also grow its rounds while the pipeline fills and let them shrink while it drains, about twofold a round where v = 2;
the lines leave room for that, which is why they meet v S at rounds as long as S / (2 pp_size - 1) and not at those of
equal rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats, StageCost, scaled_stage, sum_of
from tuner.rounds.relaxation import Work, envelopes, least_sum, least_sums, quick_sums
from tuner.rounds.uneven import least_ratio

MOST_STAGES = 4
"""Stages from which x is taken: those with most work, each kind once."""
NUM_CAPS, NUM_REFINEMENTS, NUM_INNER = 64, 3, 4
"""Caps of the grid, how often it is made closer where the least may lie, and into how many parts."""
FEW = 6
"""Of every so many caps one is summed first."""
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearBound:
    """before_weight X + after_weight Y + round_weight m + constant_s, which no makespan is below."""

    before_weight: float
    after_weight: float
    round_weight: float
    constant_s: float


def passes_bound_s(cost: CostModel, work: Work) -> float:
    """Seconds that no makespan is below for requests that are all there at the start, on stages of several groups."""
    pipeline = _Pipeline(cost)
    tokens, context = work.prompt - work.cached, work.cached
    busy: dict[StageCost, tuple[float, int]] = {}
    for stage in range(cost.pp_size):
        held = sum_of([cost.stages[group] for group in pipeline.held[stage]])
        seconds = held.round_overhead_s + held.tokens_s(tokens.sum()) + held.chunk_seconds(tokens, context, True).sum()
        busy.setdefault(held, (float(seconds), stage))
    chosen = sorted(busy.values(), reverse=True)[:MOST_STAGES]
    return max(_bound_from_s(pipeline, work, stage) for _, stage in chosen)


class _Pipeline:
    """What one token costs around each stage, and the hand-offs between groups."""

    def __init__(self, cost: CostModel) -> None:
        self.cost, self.stages = cost, cost.stage_of_group
        num_groups = len(self.stages)
        self.held = [[g for g in range(num_groups) if self.stages[g] == stage] for stage in range(cost.pp_size)]
        token = [stage.round_overhead_s + float(stage.tokens_s(1)) for stage in cost.stages]
        self.hop_s = cost.hop_latency_s + cost.hop_token_s
        moves = [g > 0 and self.stages[g] != self.stages[g - 1] for g in range(num_groups)]
        self.hops = np.cumsum(moves)  # hand-offs up to the start of each group
        before = np.concatenate([[0.0], np.cumsum(token)])
        self.fill_s = [float(before[held[0]] + self.hop_s * self.hops[held[0]]) for held in self.held]
        self.drain_s = [
            float(before[-1] - before[held[-1] + 1] + self.hop_s * (self.hops[-1] - self.hops[held[-1]]))
            for held in self.held
        ]

    def lines(self, ratio: Floats) -> Iterator[LinearBound]:
        """Those of kind 2 from and to the ends of passes."""
        through = np.concatenate([[0.0], np.cumsum(ratio)])
        pp_size, num_groups = self.cost.pp_size, len(self.stages)
        ends = sorted({g for first in range(0, num_groups, pp_size) for g in (first, first + pp_size - 1)})
        for a in ends:
            for b in ends:
                if a >= b:
                    continue
                before = float(sum(ratio[g] for g in self.held[self.stages[a]] if g <= a))
                after = float(sum(ratio[g] for g in self.held[self.stages[b]] if g >= b))
                yield LinearBound(
                    before_weight=before,
                    after_weight=after,
                    round_weight=before - ratio[a] + float(through[b + 1] - through[a]) + after - ratio[b],
                    constant_s=self.fill_s[self.stages[a]]
                    + self.drain_s[self.stages[b]]
                    + self.hop_s * float(self.hops[b] - self.hops[a]),
                )


def _balanced(lines: list[LinearBound]) -> Iterator[tuple[float, float, float]]:
    """(A, B, constant) of lines, and of two together, in which X and Y weigh the same."""
    for one in lines:
        for other in lines:
            lean, counter = one.before_weight - one.after_weight, other.after_weight - other.before_weight
            if lean < 0.0 or counter < 0.0:
                continue
            share = counter / (lean + counter) if lean + counter > 0.0 else 0.5  # of `one`
            weight, longest, constant_s = (
                share * mine + (1.0 - share) * theirs
                for mine, theirs in (
                    (one.before_weight, other.before_weight),
                    (one.round_weight, other.round_weight),
                    (one.constant_s, other.constant_s),
                )
            )
            yield weight, longest - weight, constant_s


def _bound_from_s(pipeline: _Pipeline, work: Work, stage: int) -> float:
    """The bound with x taken from this stage."""
    cost, held = pipeline.cost, pipeline.held[stage]
    whole = sum_of([cost.stages[group] for group in held])
    mean = scaled_stage(replace(whole, final_s=0.0), 1.0 / len(held))
    by_kind = [least_ratio(kind, mean, work.new_tokens) for kind in cost.kinds]
    ratio = np.array(by_kind)[cost.kind_of_stage]
    ended_s = whole.final_s * len(work.prompt)
    own = (float(len(held)), 0.0, pipeline.fill_s[stage] + pipeline.drain_s[stage] + ended_s)
    lines = np.array([own, *_balanced(list(pipeline.lines(ratio)))])
    return _least_s(mean, work, np.unique(lines, axis=0))


def _least_s(mean: StageCost, work: Work, lines: Floats) -> float:
    """The least over all caps m of the largest line at (S(m), m); lines [n, 3]: A, B and constant."""
    all_lines = envelopes([mean], work)
    highest = max(least_sum(envelope, work) for envelope in all_lines)  # all in one round
    if highest <= 0.0:
        return float(lines[:, 2].max())

    def sums(caps_s: Floats) -> Floats:
        found: Floats = np.max([least_sums(envelope, work, caps_s)[0] for envelope in all_lines], axis=0)
        return found

    def largest(sum_s: Floats, cap_s: Floats) -> Floats:
        with np.errstate(invalid="ignore"):
            highest_line: Floats = (lines[:, :1] * sum_s + lines[:, 1:2] * cap_s + lines[:, 2:]).max(axis=0)
        return highest_line

    caps = np.geomspace(highest * 1e-4, highest, NUM_CAPS)
    # Short caps take longest to sum: those whose interval cannot hold the least keep what is surely below their sums.
    found = np.max([quick_sums(envelope, work, caps) for envelope in all_lines], axis=0)
    few = np.arange(NUM_CAPS - 1, 0, -FEW)
    near = largest(found, np.append(0.0, caps[:-1])) < float(largest(sums(caps[few]), caps[few]).min())
    near[-1] = True
    found[near] = sums(caps[near])
    for refinement in range(NUM_REFINEMENTS + 1):
        # Below caps[0]; on [caps[i], caps[i+1]]; above the last.
        at_least = largest(np.append(found, found[-1]), np.concatenate([[0.0], caps]))
        if refinement == NUM_REFINEMENTS:
            break
        reached = float(largest(found, caps).min())
        split = np.flatnonzero(at_least[1:-1] < reached * (1.0 - TOLERANCE))
        if not split.size:
            break
        low, high = caps[split][:, None], caps[split + 1][:, None]
        inner = (low + (high - low) * (np.arange(1, NUM_INNER) / NUM_INNER)).ravel()
        caps, found = np.append(caps, inner), np.append(found, sums(inner))
        order = np.argsort(caps)
        caps, found = caps[order], found[order]
    return float(at_least.min())
