"""What a database of plans run on cards says: predictions before and after the runs taught, and the regret of choices.

    python -m benchmarks.gpu_report [DATABASE] [--teach LENGTH]

DATABASE is a SQLite file, gzipped or not, as `benchmarks.gpu_plans --db` leaves it; by default the one kept here.
Predictions are made anew from its measurements. The corrected ones know the runs of one prompt of --teach tokens alone,
and are judged on all others.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from db.engine import Database, open_database
from db.hardware import Hardware, list_hardware
from db.measurements import load_measurements
from db.plans import get_plan_row
from db.runs import RunStatus, list_runs
from profiler.model import ModelShape
from profiler.peak import published_multiprocessors
from service.output import print_table
from tuner.correction import fit_correction, load_measured_rounds
from tuner.fit import LayerCosts, fit_layer_costs
from tuner.holdout import held_out_errors
from tuner.plan import Plan
from tuner.rows import RankWork
from tuner.schedule import evaluate
from tuner.uncertainty import makespan_uncertainty

KEPT = Path(__file__).parent / "results" / "h100x2-nvlink.db.gz"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A run beside what is predicted of it, in seconds."""

    plan: Plan
    model: str
    taught: bool
    measured_s: float
    mfu: float | None
    first_s: float
    corrected_s: float
    uncertainty: float  # of the corrected prediction

    @property
    def layout(self) -> str:
        """TP and PP."""
        return f"TP{self.plan.parallel.tp_size} PP{self.plan.parallel.pp_size}"

    @property
    def workload(self) -> str:
        """Prompts, for tables."""
        lengths = [request.prompt_tokens for request in self.plan.requests]
        return "+".join(map(str, lengths)) if len(lengths) < 4 else f"{len(lengths)} prompts, {sum(lengths)} tokens"


@contextmanager
def opened(path: Path) -> Iterator[Database]:
    """A copy of the database, so that the file stays as it is."""
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "runs.db"
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as source, copy.open("wb") as target:
            shutil.copyfileobj(source, target)
        with open_database(f"sqlite:///{copy}") as database:
            yield database


def judge(database: Database, hardware: Hardware, teach: int) -> list[Judged]:
    """All runs that ended, in order."""
    rows = load_measurements(database, hardware)

    def fit(shape: ModelShape, dtype: str, tp_size: int, busy_ranks: int) -> tuple[LayerCosts, LayerCosts, float]:
        work = RankWork(
            shape=shape, dtype=dtype, tp_size=tp_size, num_multiprocessors=published_multiprocessors(hardware.device)
        )
        mine = [row for row in rows if row.dtype == dtype]
        costs = fit_layer_costs(mine, work, busy_ranks=busy_ranks)
        taught = load_measured_rounds(
            database, hardware, work, cost_model=costs.cost_model, of=lambda plan: is_taught(plan, teach, busy_ranks)
        )
        corrected = replace(costs, correction=fit_correction(taught))
        held_out = held_out_errors(mine, work, busy_ranks=busy_ranks)
        return costs, corrected, makespan_uncertainty(held_out, corrected.correction, extrapolates=False)

    fits: dict[tuple[str, str, int, int], tuple[LayerCosts, LayerCosts, float]] = {}
    found = []
    for run in list_runs(database, status=RunStatus.DONE, hardware=hardware, limit=1000):
        plan = Plan.from_json(get_plan_row(database, run.plan_id))
        shape = ModelShape.from_config(plan.model, name=str(plan.model.get("name")))
        tp_size, partition = plan.parallel.tp_size, plan.parallel.layer_partition
        busy_ranks = tp_size * plan.parallel.pp_size
        key = (shape.fingerprint, plan.precision, tp_size, busy_ranks)
        if key not in fits:
            fits[key] = fit(shape, plan.precision, tp_size, busy_ranks)
        *both, uncertainty = fits[key]
        first_s, corrected_s = (
            evaluate(costs.cost_model(partition), plan.requests, plan.rounds, plan.window).makespan_s for costs in both
        )
        assert run.makespan_s is not None
        found.append(
            Judged(
                plan=plan, model=shape.name, taught=is_taught(plan, teach, busy_ranks), measured_s=run.makespan_s,
                mfu=run.mfu, first_s=first_s, corrected_s=corrected_s, uncertainty=uncertainty,
            )
        )  # fmt: skip
    return found[::-1]


def is_taught(plan: Plan, teach: int, busy_ranks: int) -> bool:
    """Whether the plan's run may correct predictions."""
    alone = [request.prompt_tokens for request in plan.requests] == [teach]
    return alone and plan.parallel.tp_size * plan.parallel.pp_size == busy_ranks


def print_predictions(judged: Sequence[Judged]) -> None:
    """Each run, and how far off predictions were."""
    print_table(
        [
            "model", "plan", "rounds", "measured s", "MFU %", "first s", "error %", "corrected s", "error %", "± %", "",
        ],
        [
            [
                one.model, f"{one.layout} {one.plan.policy} {one.workload}", len(one.plan.rounds), one.measured_s,
                None if one.mfu is None else 100 * one.mfu, one.first_s, 100 * (one.first_s / one.measured_s - 1),
                one.corrected_s, 100 * (one.corrected_s / one.measured_s - 1), 100 * one.uncertainty,
                "taught" if one.taught else "",
            ]
            for one in judged
        ],
    )  # fmt: skip
    unseen = [one for one in judged if not one.taught]
    if not unseen:
        return
    for name, errors in (
        ("first", [abs(one.first_s / one.measured_s - 1) for one in unseen]),
        ("corrected", [abs(one.corrected_s / one.measured_s - 1) for one in unseen]),
    ):
        print(f"{len(errors)} runs not taught from, {name}: median {median(errors):.1%}, worst {max(errors):.1%}")
    held = sum(abs(one.corrected_s / one.measured_s - 1) <= one.uncertainty for one in unseen)
    print(f"The stated uncertainty held for {held} of {len(unseen)}")


def print_regret(judged: Sequence[Judged]) -> None:
    """For each workload: the plan that the first predictions choose among ours, against the best that was measured."""
    table: list[list[object]] = []
    for model, workload in dict.fromkeys((one.model, one.workload) for one in judged):
        mine = [one for one in judged if (one.model, one.workload) == (model, workload)]
        ours = [one for one in mine if one.plan.policy == "joint"]
        if len(mine) < 4 or not ours:
            continue
        chosen, best = min(ours, key=lambda one: one.first_s), min(mine, key=lambda one: one.measured_s)
        table.append([
            model, workload, len(mine), f"{chosen.layout} {chosen.plan.policy}", chosen.measured_s,
            f"{best.layout} {best.plan.policy}", best.measured_s, 100 * (chosen.measured_s / best.measured_s - 1),
        ])  # fmt: skip
    print_table(
        ["model", "workload", "plans", "chosen", "measured s", "best measured", "measured s", "regret %"], table
    )


def main() -> None:
    """Print both tables for each hardware of the database."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("database", nargs="?", type=Path, default=KEPT)
    parser.add_argument("--teach", type=int, default=32768, help="tokens of the one prompt whose runs teach")
    options = parser.parse_args()
    with opened(options.database) as database:
        for stored in list_hardware(database):
            hardware = stored.hardware
            print(f"{hardware.device_count} x {hardware.device}, {hardware.link}, torch {hardware.torch_version}")
            judged = judge(database, hardware, options.teach)
            print_predictions(judged)
            print_regret(judged)


if __name__ == "__main__":
    main()
