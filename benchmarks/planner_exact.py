"""Which is loose, plan or bound? Two or three prompts on measured cards, every round there is.

    python -m benchmarks.planner_exact PROFILE [--model NAME]

A state is how far each prompt has come. For pipelines whose first stage is the slowest, `rounds.uneven` shows that a
plan takes at least S + D + hops where its drain adds D, and D caps each round by what can run after it. Here S is the
least over all ways through the states under these caps: nothing of how prompts share rounds is relaxed. What lies
between this bound and the plan is all that a better plan could gain; what lies below it is what the planner's bound
gives away.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.planner_gap import measured
from benchmarks.planner_records import prompts
from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats
from tuner.rounds.relaxation import Work, envelopes, least_sum
from tuner.rounds.uneven import Side, busiest_stage, sides_of
from tuner.search.planner import RoundPlan, plan_rounds

UNIT = 256
BATCHES = ([1750, 82731], [866, 1111, 43094], [9000, 24000], [30000, 30000])
NUM_EDGES = 96
"""Edges of the grid over what the drain adds, by what it adds to the plan."""


class Rounds:
    """Every round of a batch on one stage, by the state it starts from."""

    def __init__(self, cost: CostModel, lengths: list[int], longest_s: float) -> None:
        stage, total = cost.stages[0], sum(lengths)
        self.num_units = [-(-length // UNIT) for length in lengths]
        self._own = stage.round_overhead_s + stage.tokens_s(np.arange(total + 1))
        self._most = int(np.searchsorted(self._own, longest_s, side="right")) // UNIT + 1
        self._chunks = []
        for length, units in zip(lengths, self.num_units, strict=True):
            at = np.minimum(np.arange(units + 1) * UNIT, length)
            tokens = np.maximum(at[None, :] - at[:, None], 0)
            seconds = np.where(tokens > 0, stage.chunk_seconds(np.maximum(tokens, 1), at[:, None]), 0.0)
            self._chunks.append((tokens, seconds))
        self.states = list(itertools.product(*(range(units + 1) for units in self.num_units)))

    def out_of(self, state: tuple[int, ...]) -> tuple[tuple[slice, ...], Floats]:
        """The states that a round may lead to, and its seconds, the first entry (no round) infinite."""
        reach = tuple(
            slice(at, min(at + self._most, units) + 1) for at, units in zip(state, self.num_units, strict=True)
        )
        tokens, seconds = np.zeros(1, dtype=np.int64), np.zeros(1)
        for axis, (at, (each, each_s)) in enumerate(zip(state, self._chunks, strict=True)):
            shape = [-1 if i == axis else 1 for i in range(len(state))]
            tokens = tokens + each[at, reach[axis]].reshape(shape)
            seconds = seconds + each_s[at, reach[axis]].reshape(shape)
        found: Floats = np.where(tokens > 0, self._own[tokens] + seconds, np.inf)
        return reach, found


def least_sums(rounds: Rounds, side: Side, excess_s: Floats, most_s: float) -> Floats:
    """The least that all rounds sum to for each excess of the drain, if they sum to at most `most_s`."""
    shape = tuple(units + 1 for units in rounds.num_units)
    first = np.full(shape, np.inf)  # the least up to each state, no round capped
    found = np.full((*shape, len(excess_s)), np.inf)
    first[(0,) * len(shape)], found[(0,) * len(shape)] = 0.0, 0.0
    for state in rounds.states[:-1]:
        reach, seconds = rounds.out_of(state)
        np.minimum(first[reach], first[state] + seconds, out=first[reach])
        after = np.maximum(most_s - first[state] - np.where(np.isfinite(seconds), seconds, 0.0), 0.0)
        caps = side.caps_s(excess_s, after[..., None])
        onward = np.where(seconds[..., None] <= caps, found[state] + seconds[..., None], np.inf)
        np.minimum(found[reach], onward, out=found[reach])
    least: Floats = found[tuple(rounds.num_units)]
    return least


def bound_s(cost: CostModel, lengths: list[int], plan: RoundPlan) -> float:
    """Seconds that no plan takes less than."""
    known_s, side = plan.makespan_s, sides_of(cost, Work.of(prompts(lengths), None), 0)[1]
    hops = (cost.pp_size - 1) * cost.hop_latency_s  # what tokens add is the side's
    usual_s = known_s - float(plan.evaluation.round_s[:, 0].sum())
    highest_s = max(0.2 * known_s, 4.0 * usual_s)
    edges = np.geomspace(0.3 * usual_s, highest_s, NUM_EDGES)
    edges = edges[edges > side.least_s]
    longest_s = float(side.caps_s(edges[-1:], np.array([known_s]))[0])
    sums = least_sums(Rounds(cost, lengths, longest_s), side, edges, known_s)
    work = Work.of(prompts(lengths), None)
    beyond = edges[-1] + max(least_sum(line, work) for line in envelopes([cost.stages[0]], work))  # where D is larger
    return min(float(np.min(sums + np.append(side.least_s, edges[:-1]))), float(beyond)) + hops


def equal(cost: CostModel) -> CostModel:
    """The first stage in the place of every stage."""
    return replace(cost, stages=cost.stages[:1] * len(cost.stages))


def main() -> None:
    """Print, for each pipeline and batch, what a plan could gain at most and what the bound gives away at least."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profile", type=Path)
    parser.add_argument("--model", default="llama-3-8b")
    options = parser.parse_args()
    print(f"{'pipeline':>15} {'prompts':>20} {'plan':>9} {'plan above':>11} {'bound below':>12} {'gap':>7}")
    pipelines = measured(options.profile, options.model)
    pipelines |= {f"{name}, equal": equal(cost) for name, cost in pipelines.items()}
    for name, cost in pipelines.items():
        for lengths in BATCHES:
            if cost.pp_size == 1 or busiest_stage(cost, Work.of(prompts(lengths), None)):
                continue
            plan = plan_rounds(cost, prompts(lengths), chunk_multiple=UNIT)
            exact_s = bound_s(cost, lengths, plan)
            print(
                f"{name:>15} {','.join(map(str, lengths)):>20} {plan.makespan_s:8.5f}s "
                f"{plan.makespan_s / exact_s - 1.0:11.2%} {1.0 - plan.lower_bound_s / exact_s:12.2%} {plan.gap:7.2%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
