"""A plan's prediction of its run: makespan, seconds of each round in each group, and when each should run."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from db.errors import UserError
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Plan
from tuner.plan.task_order import task_order
from tuner.recurrence.timeline import Timeline, simulate
from tuner.rounds.schedule import evaluate
from tuner.waterfall.steps import check_kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The plan file's prediction; a hand-written plan may have none."""

    makespan_s: float | None
    timeline: Timeline | None

    @property
    def round_s(self) -> list[list[float]] | None:
        """Seconds of each round in each group of layers (on each stage), [round][group]."""
        if self.timeline is None:
            return None
        seconds: list[list[float]] = (self.timeline.finish_s - self.timeline.start_s).tolist()
        return seconds


def read_prediction(plan: Plan) -> Prediction:
    """The plan's prediction: its round seconds come before its cost model, its makespan before what follows from both.

    Raises `UserError` when they are not those of the plan's rounds and stages.
    """
    parallel = plan.parallel
    cost = None if plan.cost_model is None else CostModel.from_json(plan.cost_model).for_pp_size(parallel.pp_size)
    timeline = None if cost is None else evaluate(cost, plan.requests, plan.rounds, plan.window).timeline
    round_s = plan.predicted.round_s if plan.predicted else None
    if round_s is not None:
        _check_size(plan, round_s)
        tokens = np.array([sum(chunk.tokens for chunk in chunks) for chunks in plan.rounds])
        arrivals = np.array([max(plan.requests[chunk.request].arrival_s for chunk in chunks) for chunks in plan.rounds])
        timeline = simulate(
            np.array(round_s),
            cost.hop_seconds(tokens) if cost else None,
            plan.window,
            cost.return_s if cost else 0.0,
            arrivals,
            order=None
            if parallel.virtual_stages == 1
            else task_order(
                len(plan.rounds), parallel.pp_size, parallel.virtual_stages, parallel.stage_order, plan.window
            ),
        )
    check_kinds(plan)
    if plan.predicted is not None:
        return Prediction(makespan_s=plan.predicted.makespan_s, timeline=timeline)
    return Prediction(makespan_s=None if timeline is None else timeline.makespan_s, timeline=timeline)


def _check_size(plan: Plan, round_s: tuple[tuple[float, ...], ...]) -> None:
    if len(round_s) != len(plan.rounds):
        raise UserError(
            "predicted.round_s", f"{len(round_s)} rounds", f"one entry for each of {len(plan.rounds)} rounds"
        )
    for index, row in enumerate(round_s):
        parallel = plan.parallel
        if len(row) != parallel.num_groups:
            of = f"{parallel.pp_size} stages" if parallel.virtual_stages == 1 else f"{parallel.num_groups} groups"
            allowed = f"one value for each of {of}"
            raise UserError(f"predicted.round_s[{index}]", f"{len(row)} values", allowed)
