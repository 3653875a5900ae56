"""What a training step should take by this machine's profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from db.errors import UserError

if TYPE_CHECKING:
    from profiler.model import ModelShape
    from runtime.train.recipe import TrainingRecipe
    from tuner.plan.plan import Plan
    from tuner.training.step import PredictedStep


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrediction:
    """A step by the fitted cost model; why there is none, where the profile does not tell."""

    step: PredictedStep | None = None
    why: str | None = None
    fastest_flops: float | None = None  # FLOP/s of the fastest product in the profile


def predict(
    plan: Plan, recipe: TrainingRecipe, shape: ModelShape, *, device_type: str, num_threads: int, db_url: str | None
) -> StepPrediction:
    """From the rows that the database holds of this hardware, in the format of the activations."""
    from db.rows.measurements import load_measurements
    from db.store.engine import default_url, open_database
    from profiler.hardware.device import describe_hardware
    from profiler.model.flops import fastest_product_flops
    from tuner.fit.layer_fit import fit_layer_costs
    from tuner.fit.rows import RankWork
    from tuner.fit.step_ends import step_ends
    from tuner.training.step import predict_step
    from tuner.training.work import StepWork

    if recipe.formats.linears is not None:
        return StepPrediction(why="no profile tells what rounding to 8 bits takes in training")
    dtype, parallel = recipe.formats.activations.name, plan.parallel
    hardware = describe_hardware(device_type, num_threads=num_threads)
    with open_database(db_url or default_url()) as database:
        rows = load_measurements(database, hardware, dtype=dtype)
    work = StepWork(
        shape=shape, parallel=parallel, requests=plan.requests, rounds=plan.rounds, precision=dtype,
        recompute=recipe.recompute, order=recipe.order, accumulate=recipe.accumulate,
        compiled=device_type == "cuda" and parallel.tp_size == 1,
    )  # fmt: skip
    fastest = fastest_product_flops(rows, dtype)
    try:
        costs = fit_layer_costs(
            rows, RankWork.on(hardware, shape=shape, dtype=dtype, tp_size=parallel.tp_size),
            busy_ranks=parallel.world_size,
        )  # fmt: skip
    except UserError as error:
        return StepPrediction(why=str(error), fastest_flops=fastest)
    ends = step_ends(costs, work)
    step = predict_step(work, costs.cost_model(parallel.layer_partition), ends=ends)
    return StepPrediction(step=step, fastest_flops=fastest)
