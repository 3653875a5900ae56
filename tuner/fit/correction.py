"""Corrects the fitted model by earlier runs: measured rounds of the same work on the same hardware."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from db.errors import UserError
from db.rows.hardware import Hardware, list_hardware
from db.rows.plans import get_plan_row
from db.rows.runs import RunStatus, StoredRun, list_runs, load_round_times
from db.store.engine import Database
from profiler.model import model_from_config
from profiler.sequence.kind import usual_cut
from tuner.fit.curve import Floats, bounded_least_squares
from tuner.fit.rows import RankWork
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Plan
from tuner.rounds.schedule import evaluate

RUNS_LOOKED_AT = 300
LEAST_ROUNDS = 4
LEAST_SCALE, MOST_SCALE = 0.7, 1.5  # beyond these the runs do not match what was profiled
ROUNDS_OF_BELIEF = 2.0  # "no correction" weighs as much as so many measured rounds
# A card that rested runs the first tenths of a second up to a fifth faster than it can go on: no lesson. After passes
# that did not count it rested only for the moment between two passes.
SETTLED_S = {"nccl": 0.2, "gloo": 0.0}
SETTLED_AGAIN_S = {"nccl": 0.1, "gloo": 0.0}
OVERHEAD_DOUBT = 4.0  # rounds of like size cannot tell an overhead from a scale: the scale is the likelier


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """measured = stage_scale * (tokens_scale * token-wise + attention_scale * attention + round_s), of each round.

    Two scales, because a card at its power limit runs products, which draw the most, at another clock than attention,
    and either at another than the mix that the profile stands for.

    stage_scales: (pp_size, stage, scale) of stages that were run: devices of one kind differ by several percent, and a
    pipeline is as fast as the slowest.
    """

    tokens_scale: float = 1.0
    attention_scale: float = 1.0
    round_s: float = 0.0
    stage_scales: tuple[tuple[int, int, float], ...] = ()
    num_rounds: int = 0
    num_runs: int = 0
    error_before: float = 0.0
    """Median relative error of the rounds' predictions without the correction."""
    error_after: float = 0.0

    def of_stage(self, pp_size: int, stage: int) -> float:
        """Scale of one stage of `pp_size`; 1 where none like it was run."""
        return next((scale for size, index, scale in self.stage_scales if (size, index) == (pp_size, stage)), 1.0)

    def to_json(self) -> dict[str, Any]:
        """The same as a JSON object."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRounds:
    """Rounds of earlier runs, one stage each: seconds by the uncorrected model, and measured ones.

    places: (pp_size, stage) of each, [num_rounds, 2]; all on one where it is left out.
    """

    tokens_s: Floats
    """Predicted, of all but attention."""
    attention_s: Floats
    measured_s: Floats
    num_runs: int
    places: npt.NDArray[np.int64] | None = None

    def by_place(self) -> dict[tuple[int, int], npt.NDArray[np.bool_]]:
        """Which rounds ran on each place."""
        if self.places is None:
            return {}
        found = np.unique(self.places, axis=0)
        return {(int(size), int(stage)): (self.places == (size, stage)).all(axis=1) for size, stage in found}


def fit_correction(rounds: MeasuredRounds) -> Correction:
    """Fit scales and round_s to relative errors (bounded least squares), drawn to no correction by few rounds."""
    if len(rounds.measured_s) < LEAST_ROUNDS:
        return Correction()
    weight = 1.0 / rounds.measured_s
    parts = np.stack([rounds.tokens_s, rounds.attention_s, np.ones(len(weight))], axis=1)
    typical_s = float(np.median(rounds.measured_s))
    pull = np.sqrt(ROUNDS_OF_BELIEF) * np.diag([1.0, 1.0, OVERHEAD_DOUBT / typical_s])
    solution = bounded_least_squares(
        np.concatenate([parts * weight[:, None], pull]),
        np.concatenate([np.ones(len(weight)), pull @ np.array([1.0, 1.0, 0.0])]),
        [LEAST_SCALE, LEAST_SCALE, 0.0],
        [MOST_SCALE, MOST_SCALE, typical_s],
    )
    tokens_scale, attention_scale, round_s = solution.tolist()
    corrected_s = parts @ solution
    ratio = rounds.measured_s / corrected_s
    stage_scales = []
    for (pp_size, stage), mine in rounds.by_place().items():
        count = int(mine.sum())
        believed = (float(np.median(ratio[mine])) * count + ROUNDS_OF_BELIEF) / (count + ROUNDS_OF_BELIEF)
        stage_scales.append((pp_size, stage, believed))
        corrected_s[mine] *= believed
    return Correction(
        tokens_scale=tokens_scale,
        attention_scale=attention_scale,
        round_s=round_s,
        stage_scales=tuple(stage_scales),
        num_rounds=len(weight),
        num_runs=rounds.num_runs,
        error_before=_median_error(rounds.tokens_s + rounds.attention_s, rounds.measured_s),
        error_after=_median_error(corrected_s, rounds.measured_s),
    )


class PlansRun:
    """Plans of earlier runs, each read once and shared by all layouts."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._plans: dict[int, tuple[Plan, str] | None] = {}
        self._fingerprints: dict[str, str] = {}

    def read(self, plan_id: int) -> tuple[Plan, str] | None:
        """A plan and its model's fingerprint; None for one that cannot be read."""
        if plan_id not in self._plans:
            try:
                plan = Plan.from_json(get_plan_row(self._database, plan_id))
                self._plans[plan_id] = plan, self._fingerprint(plan)
            except UserError:
                self._plans[plan_id] = None
        return self._plans[plan_id]

    def _fingerprint(self, plan: Plan) -> str:
        model = json.dumps(plan.model, sort_keys=True)
        if model not in self._fingerprints:
            backend = str(plan.model.get("backend", "auto"))
            self._fingerprints[model] = model_from_config(plan.model, name="", backend=backend).fingerprint
        return self._fingerprints[model]


def load_measured_rounds(
    database: Database,
    hardware: Hardware,
    work: RankWork,
    *,
    cost_model: Callable[[Sequence[int]], CostModel],
    of: Callable[[Plan], bool] = lambda _plan: True,
    plans: PlansRun | None = None,
) -> MeasuredRounds:
    """Rounds of `work`'s model, dtype and ranks of a stage that were run on `hardware`, predicted anew by `cost_model`,
    which knows rounds in the usual cut.

    of: which of them count. Rounds of one rank a stage move nothing between their start and their finish, so that runs
    over another link between the same devices teach as much. plans: those of earlier runs, where several calls share
    them.
    The prediction stored with a run may come from an older fit or carry a correction already, so it is not used.
    """
    tokens: list[float] = []
    attention: list[float] = []
    measured: list[float] = []
    places: list[tuple[int, int]] = []
    num_runs = 0
    plans, fingerprint = plans or PlansRun(database), work.shape.fingerprint
    for run in _runs(database, hardware, any_link=work.stage_size == 1):
        found = plans.read(run.plan_id)
        if found is None or run.details.get("missing_kernels"):  # another kernel ran than the plan's
            continue
        plan, ran = found
        if ran != fingerprint or not _ran(plan, work) or not of(plan):
            continue
        model = cost_model(plan.parallel.layer_partition)
        without_s, with_s = (
            evaluate(each, plan.requests, plan.rounds).round_s for each in (model.without_attention(), model)
        )
        attention_s = with_s - without_s
        settled_s = (SETTLED_AGAIN_S if run.details.get("settle_s") else SETTLED_S).get(hardware.backend, 0.0)
        usual = usual_cut(work.sp_kind)
        times = [
            time
            for time in load_round_times(database, run.id)
            if (time.start_s + time.finish_s) / 2 >= settled_s and plan.round_cuts[time.round] is usual
        ]
        tokens += [float(without_s[time.round, time.stage]) for time in times]
        attention += [float(attention_s[time.round, time.stage]) for time in times]
        measured += [time.finish_s - time.start_s for time in times]
        places += [(plan.parallel.pp_size, time.stage) for time in times]
        num_runs += bool(times)
    return MeasuredRounds(
        tokens_s=np.array(tokens),
        attention_s=np.array(attention),
        measured_s=np.array(measured),
        num_runs=num_runs,
        places=np.array(places, dtype=np.int64).reshape(-1, 2),
    )


def _ran(plan: Plan, work: RankWork) -> bool:
    """Whether a stage of the plan, of one group of layers, did such work."""
    parallel = plan.parallel
    ran = (plan.precision, parallel.tp_size, parallel.sp_size, parallel.sp_kind, parallel.weights)
    wanted = (work.dtype, work.tp_size, work.sp_size, work.sp_kind, work.weights)
    return ran == wanted and parallel.virtual_stages == 1


def _runs(database: Database, hardware: Hardware, *, any_link: bool) -> list[StoredRun]:
    """Runs that ended on the hardware, newest first; any_link: on its devices, whatever joins them."""
    alike = [stored.hardware for stored in list_hardware(database) if stored.hardware.computes_like(hardware)]
    wanted = alike if any_link else [hardware]
    runs = [
        run for one in wanted for run in list_runs(database, status=RunStatus.DONE, hardware=one, limit=RUNS_LOOKED_AT)
    ]
    return sorted(runs, key=lambda run: run.id, reverse=True)[:RUNS_LOOKED_AT]


def _median_error(predicted: Floats, measured: Floats) -> float:
    return float(np.median(np.abs(predicted / measured - 1.0)))
