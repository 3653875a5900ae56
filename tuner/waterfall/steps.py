"""The way from a chip's peak to a makespan, step by step: what kernels, messages and waiting add, in seconds.

The steps are differences of the same quantity, each under one more thing that holds it up, so that they add up to the
makespan exactly:

    FLOPs / peak of all ranks, then by kind what its seconds exceed that by: the mean work of a stage;
    rounds and stages all alike           (the pipeline fills and drains);
    rounds as they are, stages alike      (the longest round counts once a stage);
    stages as they are;
    at most `window` rounds in flight;
    hand-offs between stages, and in a run all that the recurrence does not know;
    requests that arrive later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from db.errors import UserError
from profiler.model import ModelShape
from tuner.plan.cost_model import CostModel, Ints
from tuner.plan.plan import Plan
from tuner.plan.stage_cost import MAX_SECONDS, Floats
from tuner.plan.task_order import task_order
from tuner.recurrence.timeline import simulate

SIZES = (1024, 2048, 4096, 8192)  # rounds are grouped by their tokens
PIPELINE = ("fill and drain", "uneven rounds", "uneven stages", "window", "hand-offs", "arrivals")
PEAK, DRIFT = "peak of the chip", "slower machine"


class Kind(StrEnum):
    """What a round's seconds consist of."""

    PRODUCTS = "products"
    ATTENTION = "attention"
    ELEMENTWISE = "element-wise work"
    COLLECTIVES = "collectives"
    LAUNCHES = "launches"
    ENDS = "embedding and head"


@dataclass(frozen=True, slots=True)
class WaterfallStep:
    """Seconds that one thing adds."""

    name: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Waterfall:
    """Steps that add up to the makespan, the first at the chip's peak."""

    steps: tuple[WaterfallStep, ...]
    makespan_s: float

    def seconds_of(self, name: str) -> float:
        """Of a step; none where there is no such step."""
        return sum(step.seconds for step in self.steps if step.name == name)

    def to_json(self) -> dict[str, Any]:
        """For programs: seconds, and shares of the makespan."""
        return {
            "makespan_s": self.makespan_s,
            "steps": [
                {"name": step.name, "seconds": step.seconds, "share": step.seconds / self.makespan_s}
                for step in self.steps
            ],
        }


def waterfall(
    plan: Plan, shape: ModelShape, round_s: Floats, makespan_s: float, *, peak_flops: float, slowdown: float = 1.0
) -> Waterfall:
    """The way to a makespan whose rounds took `round_s` [num_rounds, num_groups].

    peak_flops: FLOP/s of one rank. slowdown: how much longer the machine took for everything than in its profile.
    Measured rounds are shared out among the kinds of work as the plan predicts, for a run times rounds alone.
    """
    pp_size = plan.parallel.pp_size
    stage_s = round_s.sum(axis=1) / pp_size
    flops = flops_of_rounds(shape, plan)
    ideal_s = {kind: values / (peak_flops * plan.parallel.world_size) for kind, values in flops.items()}
    by_kind = _seconds_by_kind(plan, stage_s, flops)
    steps = [WaterfallStep(PEAK, float(sum(values.sum() for values in ideal_s.values())))]
    tokens = np.array([sum(chunk.tokens for chunk in chunks) for chunks in plan.rounds])
    for kind, seconds in by_kind.items():
        lost = seconds / slowdown - ideal_s.get(kind, np.zeros_like(seconds))
        if kind in ideal_s and kind is not Kind.ENDS:
            steps += [
                WaterfallStep(f"{kind} below peak, {words}", float(lost[rows].sum()))
                for words, rows in _by_size(tokens)
            ]
        else:
            steps.append(
                WaterfallStep("collectives not hidden" if kind is Kind.COLLECTIVES else kind, float(lost.sum()))
            )
    steps.append(WaterfallStep(DRIFT, float(stage_s.sum()) * (1.0 - 1.0 / slowdown)))
    steps += _pipeline_steps(plan, round_s, makespan_s)
    return Waterfall(steps=tuple(step for step in steps if step.seconds), makespan_s=makespan_s)


class TimedRound(Protocol):
    """When a round ran in a group of layers, and how long it should have run."""

    @property
    def round(self) -> int:
        """Its place in the plan."""

    @property
    def stage(self) -> int:
        """The group of layers."""

    @property
    def start_s(self) -> float:
        """Seconds from the run's start."""

    @property
    def finish_s(self) -> float:
        """Likewise."""

    @property
    def predicted_s(self) -> float | None:
        """Its predicted duration."""


def waterfalls(
    plan: Plan,
    shape: ModelShape,
    rounds: Iterable[TimedRound],
    makespan_s: float,
    predicted_s: float | None,
    *,
    peak_flops: float,
    slowdown: float = 1.0,
) -> tuple[Waterfall | None, Waterfall]:
    """The waterfalls of a run, (as predicted, as measured); the first is None where its plan predicts nothing.

    slowdown: of the machine while it ran, since its profile.
    """
    size = (len(plan.rounds), plan.parallel.num_groups)
    measured, predicted = np.zeros(size), np.zeros(size)
    for time in rounds:
        measured[time.round, time.stage] = time.finish_s - time.start_s
        predicted[time.round, time.stage] = time.predicted_s or 0.0
    planned = None
    if predicted_s and predicted.any():
        planned = waterfall(plan, shape, predicted, predicted_s, peak_flops=peak_flops)
    return planned, waterfall(plan, shape, measured, makespan_s, peak_flops=peak_flops, slowdown=slowdown)


def flops_of_rounds(shape: ModelShape, plan: Plan) -> dict[Kind, Floats]:
    """FLOPs of each round, [num_rounds], as `profiler.model.flops` counts those of a prefill."""
    vocab, hidden = shape.head.sizes()
    kinds = Counter(shape.every_layer)
    products = sum(2 * count * layer.product_elements() for layer, count in kinds.items())
    found: dict[Kind, list[float]] = {Kind.PRODUCTS: [], Kind.ATTENTION: [], Kind.ENDS: []}
    for chunks in plan.rounds:
        ends = sum(chunk.end == plan.requests[chunk.request].prompt_tokens for chunk in chunks)
        found[Kind.PRODUCTS].append(float(products * sum(chunk.tokens for chunk in chunks)))
        attended = sum(
            count * sum(layer.attention_flops(chunk.tokens, chunk.start) for chunk in chunks)
            for layer, count in kinds.items()
        )
        found[Kind.ATTENTION].append(float(attended))
        found[Kind.ENDS].append(2.0 * hidden * vocab * ends)
    return {kind: np.array(values) for kind, values in found.items()}


def _seconds_by_kind(plan: Plan, stage_s: Floats, flops: Mapping[Kind, Floats]) -> dict[Kind, Floats]:
    """Seconds of each round by kind in proportion to what the plan predicts, or to their FLOPs where it does not; they
    add up to `stage_s`."""
    kinds = plan.predicted.round_kinds if plan.predicted else None
    shares = dict(flops) if kinds is None else {Kind(name): np.array(seconds) for name, seconds in kinds.items()}
    total = np.asarray(sum(shares.values()))
    share = np.divide(stage_s, total, out=np.zeros_like(stage_s), where=total > 0)
    found = {kind: share * shares.get(kind, np.zeros_like(stage_s)) for kind in Kind if kind in shares or kind in flops}
    found[Kind.ENDS] = found[Kind.ENDS] + np.where(total > 0, 0.0, stage_s)
    return found


def _by_size(tokens: Ints) -> Iterable[tuple[str, Ints]]:
    """Which rounds have so many tokens, the smallest first; sizes that no round has are left out."""
    place = np.searchsorted(SIZES, tokens, side="right")
    for index in range(len(SIZES) + 1):
        rows = np.flatnonzero(place == index)
        if len(rows):
            least = SIZES[index - 1] if index else 1
            most = f"to {SIZES[index] - 1}" if index < len(SIZES) else "tokens on"
            yield f"rounds of {least} {most}", rows


def _pipeline_steps(plan: Plan, round_s: Floats, makespan_s: float) -> list[WaterfallStep]:
    """What waiting adds to the mean work of a stage."""
    parallel = plan.parallel
    num_rounds, num_groups = round_s.shape
    cost = None if plan.cost_model is None else CostModel.from_json(plan.cost_model).for_pp_size(parallel.pp_size)
    tokens = np.array([sum(chunk.tokens for chunk in chunks) for chunks in plan.rounds])
    arrivals = np.array([max(plan.requests[chunk.request].arrival_s for chunk in chunks) for chunks in plan.rounds])

    def run(seconds: Floats, *, window: int | None = None, hops: bool = False) -> float:
        order = None
        if parallel.virtual_stages > 1:
            order = task_order(num_rounds, parallel.pp_size, parallel.virtual_stages, parallel.stage_order, window)
        return simulate(
            seconds,
            cost.hop_seconds(tokens) if cost and hops else None,
            window,
            cost.return_s if cost and hops else 0.0,
            order=order,
        ).makespan_s

    alike = np.repeat(round_s.mean(axis=1, keepdims=True), num_groups, axis=1)
    reached = [
        float(round_s.sum()) / parallel.pp_size,
        run(np.full_like(round_s, round_s.mean())),
        run(alike),
        run(round_s),
        run(round_s, window=plan.window),
    ]
    # With arrivals the last step takes what the recurrence does not know.
    reached.append(run(round_s, window=plan.window, hops=True) if arrivals.any() else makespan_s)
    reached.append(makespan_s)
    return [
        WaterfallStep(name, after - before) for name, (before, after) in zip(PIPELINE, pairwise(reached), strict=True)
    ]  # fmt: skip


def merged_names(waterfalls: Sequence[Waterfall]) -> list[str]:
    """Names of all steps, in their order."""
    order: dict[str, None] = {}
    for each in waterfalls:
        order |= dict.fromkeys(step.name for step in each.steps)
    pipeline = [name for name in (DRIFT, *PIPELINE) if name in order]
    return [name for name in order if name not in pipeline] + pipeline


def to_rows(planned: Waterfall | None, measured: Waterfall | None) -> list[tuple[str, float | None, float | None]]:
    """(name, predicted seconds, measured seconds) of each step."""
    names = merged_names([each for each in (planned, measured) if each is not None])

    def seconds_of(each: Waterfall | None, name: str) -> float | None:
        return None if each is None else each.seconds_of(name)

    return [(name, seconds_of(planned, name), seconds_of(measured, name)) for name in names]


def check_kinds(plan: Plan) -> None:
    """Raise UserError unless a plan's kinds are known ones, with seconds for each of its rounds."""
    for name, seconds in ((plan.predicted and plan.predicted.round_kinds) or {}).items():
        field = f"predicted.round_kinds.{name}"
        if name not in list(Kind):
            raise UserError(field, name, f"must be one of {', '.join(Kind)}")
        if len(seconds) != len(plan.rounds):
            raise UserError(field, f"{len(seconds)} values", f"one for each of {len(plan.rounds)} rounds")
        if not all(0.0 <= each <= MAX_SECONDS for each in seconds):
            raise UserError(field, "seconds", f"numbers from 0 to {MAX_SECONDS:g} are needed")
