"""What earlier runs taught: measured rounds of the same work on the same hardware correct the fitted model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from db.engine import Database
from db.errors import UserError
from db.hardware import Hardware
from db.plans import get_plan_row
from db.runs import RunStatus, list_runs, load_round_times
from profiler.model import ModelShape
from tuner.cost_model import CostModel
from tuner.curve import Floats
from tuner.plan import Plan
from tuner.rows import RankWork
from tuner.schedule import evaluate

RUNS_LOOKED_AT = 100
LEAST_ROUNDS = 8
LEAST_SCALE, MOST_SCALE = 0.7, 1.5  # beyond these the runs are of something else than what was profiled
ROUNDS_OF_BELIEF = 4.0  # "no correction" weighs as much as so many measured rounds
OVERHEAD_DOUBT = 4.0  # rounds of like size cannot tell an overhead from a scale: the scale is the likelier


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """measured = scale * predicted + round_s, for each round on each stage."""

    scale: float = 1.0
    round_s: float = 0.0
    num_rounds: int = 0
    num_runs: int = 0
    error_before: float = 0.0
    """Median relative error of the rounds' predictions without the correction."""
    error_after: float = 0.0

    def to_json(self) -> dict[str, float | int]:
        """The same as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRounds:
    """Rounds of earlier runs on a stage each: what the uncorrected model says, and what was measured."""

    predicted_s: Floats
    measured_s: Floats
    num_runs: int


def fit_correction(rounds: MeasuredRounds) -> Correction:
    """Fit scale and round_s to relative errors (bounded least squares), drawn to no correction by few rounds."""
    if len(rounds.measured_s) < LEAST_ROUNDS:
        return Correction()
    weight = 1.0 / rounds.measured_s
    design = np.stack([rounds.predicted_s * weight, weight], axis=1)
    typical_s = float(np.median(rounds.measured_s))
    pull = np.sqrt(ROUNDS_OF_BELIEF) * np.diag([1.0, OVERHEAD_DOUBT / typical_s])
    solution = lsq_linear(
        np.concatenate([design, pull]),
        np.concatenate([np.ones(len(weight)), pull @ np.array([1.0, 0.0])]),
        bounds=([LEAST_SCALE, 0.0], [MOST_SCALE, typical_s]),
    )
    scale, round_s = (float(value) for value in solution.x)
    return Correction(
        scale=scale,
        round_s=round_s,
        num_rounds=len(weight),
        num_runs=rounds.num_runs,
        error_before=_median_error(rounds.predicted_s, rounds.measured_s),
        error_after=_median_error(scale * rounds.predicted_s + round_s, rounds.measured_s),
    )


def load_measured_rounds(
    database: Database, hardware: Hardware, work: RankWork, *, cost_model: Callable[[Sequence[int]], CostModel]
) -> MeasuredRounds:
    """Rounds of `work`'s model, dtype and tp_size that were run on `hardware`, predicted anew by `cost_model`.

    The prediction stored with a run may come from an older fit or carry a correction already, so it is not used.
    """
    predicted: list[float] = []
    measured: list[float] = []
    num_runs = 0
    for run in list_runs(database, status=RunStatus.DONE, hardware=hardware, limit=RUNS_LOOKED_AT):
        try:
            plan = Plan.from_json(get_plan_row(database, run.plan_id))
            shape = ModelShape.from_config(plan.model, name="")
        except UserError:
            continue
        ran = (shape.fingerprint, plan.precision, plan.parallel.tp_size)
        if ran != (work.shape.fingerprint, work.dtype, work.tp_size):
            continue
        seconds = evaluate(cost_model(plan.parallel.layer_partition), plan.requests, plan.rounds).round_s
        times = load_round_times(database, run.id)
        predicted += [float(seconds[time.round, time.stage]) for time in times]
        measured += [time.finish_s - time.start_s for time in times]
        num_runs += 1
    return MeasuredRounds(predicted_s=np.array(predicted), measured_s=np.array(measured), num_runs=num_runs)


def _median_error(predicted: Floats, measured: Floats) -> float:
    return float(np.median(np.abs(predicted / measured - 1.0)))
