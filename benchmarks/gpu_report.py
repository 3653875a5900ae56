"""Prediction errors of the plans in a database that were run on cards, and the regret of the tuner's choices.

    python -m benchmarks.gpu_report [DATABASE ...] [--teach LENGTH]

DATABASE is a SQLite file, gzipped or not, as `benchmarks.gpu_plans --db` leaves it; by default the one kept here.
"before" is what was predicted before the plan ran. "refit" is predicted from the same measurements by the present cost
model. "corrected" is also fitted to the runs of one prompt of --teach tokens, and is judged on all other runs.
"""

from __future__ import annotations

import argparse
import gzip
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from db.rows.hardware import Hardware, list_hardware
from db.rows.measurements import load_measurements
from db.rows.plans import get_plan_row
from db.rows.runs import RunStatus, StoredRun, list_runs
from db.store.engine import Database, open_database
from profiler.model import ModelShape, model_from_config
from service.cli.output import print_table
from tuner.fit.correction import fit_correction, load_measured_rounds
from tuner.fit.holdout import HeldOutError, held_out_errors
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.fit.uncertainty import makespan_uncertainty
from tuner.plan.plan import Plan
from tuner.rounds.schedule import evaluate

MOST_ERROR = 0.08  # what a prediction should stay within

ERROR_COLUMNS = ("median error %", "p90 %", "worst %", f"above {MOST_ERROR:.0%}", "within stated")

KEPT = (Path(__file__).parent / "results" / "h100x2.db.gz",)


@dataclass(frozen=True, slots=True)
class Prediction:
    """A predicted makespan and its stated relative uncertainty."""

    seconds: float
    uncertainty: float

    def error(self, measured_s: float) -> float:
        """Relative error."""
        return self.seconds / measured_s - 1.0

    def held(self, measured_s: float) -> bool:
        """Whether the error is within what was stated."""
        return abs(self.error(measured_s)) <= self.uncertainty


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A run beside what is predicted of it."""

    plan: Plan
    model: str
    taught: bool
    measured_s: float
    mfu: float | None
    before: Prediction
    refit: Prediction
    corrected: Prediction

    @property
    def layout(self) -> str:
        """TP and PP."""
        return f"TP{self.plan.parallel.tp_size} PP{self.plan.parallel.pp_size}"

    @property
    def short_name(self) -> str:
        """Layout and policy."""
        return f"{self.layout} {self.plan.policy}"

    @property
    def workload(self) -> str:
        """Prompts, for tables."""
        lengths = [request.prompt_tokens for request in self.plan.requests]
        return "+".join(map(str, lengths)) if len(lengths) < 4 else f"{len(lengths)} prompts, {sum(lengths)} tokens"


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One workload's plans: the tuner's before any ran, those of all that predict least now, and the best measured."""

    before: Judged
    refit: Judged
    corrected: Judged
    best: Judged
    num_plans: int

    def regret(self, chosen: Judged) -> float:
        """How much longer it took than the best."""
        return chosen.measured_s / self.best.measured_s - 1.0


@dataclass(frozen=True, slots=True)
class Fits:
    """The costs of a layer before and after runs taught, and how far held-out points were off."""

    costs: LayerCosts
    corrected: LayerCosts
    held_out: list[HeldOutError]

    def predict(self, plan: Plan, costs: LayerCosts) -> Prediction:
        """The plan's makespan by `costs`."""
        model = costs.cost_model(plan.parallel.layer_partition)
        makespan_s = evaluate(model, plan.requests, plan.rounds, plan.window).makespan_s
        largest = max(sum(chunk.tokens for chunk in chunks) for chunks in plan.rounds)
        longest = max(request.prompt_tokens for request in plan.requests)
        beyond = largest > costs.max_chunk or longest > costs.max_context
        return Prediction(makespan_s, makespan_uncertainty(self.held_out, costs.correction, extrapolates=beyond))


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
    rows, runs = load_measurements(database, hardware), runs_of(database, hardware)
    shapes = {shape.fingerprint: shape for _, _, shape in runs}

    @cache
    def fit(fingerprint: str, dtype: str, tp_size: int, busy_ranks: int) -> Fits:
        work = RankWork.on(hardware, shape=shapes[fingerprint], dtype=dtype, tp_size=tp_size)
        mine = [row for row in rows if row.dtype == dtype]
        costs = fit_layer_costs(mine, work, busy_ranks=busy_ranks)
        taught = load_measured_rounds(
            database, hardware, work, cost_model=costs.cost_model, of=lambda plan: is_taught(plan, teach, busy_ranks)
        )
        corrected = replace(costs, correction=fit_correction(taught))
        return Fits(costs, corrected, held_out_errors(mine, work, busy_ranks=busy_ranks))

    found = []
    for run, plan, shape in runs:
        busy_ranks = plan.parallel.tp_size * plan.parallel.pp_size
        fits = fit(shape.fingerprint, plan.precision, plan.parallel.tp_size, busy_ranks)
        assert run.makespan_s is not None
        if run.predicted_makespan_s is None or plan.predicted is None:
            continue  # written by hand
        found.append(
            Judged(
                plan=plan, model=shape.name, taught=is_taught(plan, teach, busy_ranks), measured_s=run.makespan_s,
                mfu=run.mfu, before=Prediction(run.predicted_makespan_s, plan.predicted.uncertainty or 0.0),
                refit=fits.predict(plan, fits.costs), corrected=fits.predict(plan, fits.corrected),
            )
        )  # fmt: skip
    return found


def runs_of(database: Database, hardware: Hardware) -> list[tuple[StoredRun, Plan, ModelShape]]:
    """Runs that ended, in order, each with its plan and the model that was run."""
    runs = list_runs(database, status=RunStatus.DONE, hardware=hardware, limit=1000)[::-1]
    plans = [Plan.from_json(get_plan_row(database, run.plan_id)) for run in runs]
    shapes = [model_from_config(plan.model, name=str(plan.model.get("name"))) for plan in plans]
    return list(zip(runs, plans, shapes, strict=True))


def is_taught(plan: Plan, teach: int, busy_ranks: int) -> bool:
    """Whether the plan's run may correct predictions."""
    alone = [request.prompt_tokens for request in plan.requests] == [teach]
    return alone and plan.parallel.tp_size * plan.parallel.pp_size == busy_ranks


def print_predictions(judged: Sequence[Judged]) -> None:
    """Each run, and how far off predictions were."""
    table: list[list[object]] = []
    for one in judged:
        row: list[object] = [
            one.model, f"{one.layout} {one.plan.policy} {one.workload}", len(one.plan.rounds), one.measured_s,
            None if one.mfu is None else 100 * one.mfu,
        ]  # fmt: skip
        for prediction in (one.before, one.refit, one.corrected):
            row += [100 * prediction.error(one.measured_s), 100 * prediction.uncertainty]
        table.append([*row, "taught" if one.taught else ""])
    print_table(
        [
            "model",
            "plan",
            "rounds",
            "measured s",
            "MFU %",
            "before %",
            "± %",
            "refit %",
            "± %",
            "corrected %",
            "± %",
            "",
        ],
        table,
        title="Errors of the predicted makespan",
    )


def print_groups(judged: Mapping[str, Sequence[Judged]], where: str) -> None:
    """Errors of predictions made before first runs, by link, model and layout, and how far repeated runs differ."""
    groups: dict[str, dict[str, list[Judged]]] = {}
    for link, mine in judged.items():
        for one in mine:
            plans = groups.setdefault(f"{link}: {one.model}, {one.layout}", {})
            plans.setdefault(f"{one.plan.policy} {one.workload}", []).append(one)
    everything = {f"{group} {name}": runs for group, plans in groups.items() for name, runs in plans.items()}
    table: list[list[object]] = []
    for group, plans in (groups | {"all": everything}).items():
        first = [runs[0] for runs in plans.values()]
        again = [abs(runs[-1].measured_s / runs[0].measured_s - 1.0) for runs in plans.values() if len(runs) > 1]
        row = _errors(first, [one.before for one in first])
        table.append([group, *row, len(again), 100 * max(again) if again else None])
    columns = ["plans", "number", *ERROR_COLUMNS, "run again", "at most % off"]
    print_table(columns, table, title=f"Predicted before first runs of {where}")


def _errors(mine: Sequence[Judged], which: Sequence[Prediction]) -> list[object]:
    """How many, quantiles of the errors, how many are large, and how often the stated uncertainty held."""
    errors = [each.error(one.measured_s) for one, each in zip(mine, which, strict=True)]
    held = sum(each.held(one.measured_s) for one, each in zip(mine, which, strict=True))
    large = sum(abs(error) > MOST_ERROR for error in errors)
    return [len(mine), *_quantiles(errors), large, f"{held} of {len(mine)}"]


def choices(judged: Sequence[Judged]) -> Iterator[Choice]:
    """For each workload with several plans."""
    for model, workload in dict.fromkeys((one.model, one.workload) for one in judged):
        mine = [one for one in judged if (one.model, one.workload) == (model, workload)]
        ours = [one for one in mine if one.plan.policy == "joint"]
        if len(mine) >= 4 and ours:
            yield Choice(
                before=min(ours, key=lambda one: one.before.seconds),
                refit=min(mine, key=lambda one: one.refit.seconds),
                corrected=min(mine, key=lambda one: one.corrected.seconds),
                best=min(mine, key=lambda one: one.measured_s),
                num_plans=len(mine),
            )


def _quantiles(errors: Sequence[float]) -> list[float | None]:
    """Median, p90 and worst, in percent, if there are any."""
    return [100 * float(np.quantile(np.abs(errors), share)) if errors else None for share in (0.5, 0.9, 1.0)]


def print_regret(judged: Sequence[Judged]) -> None:
    """For each workload: the plan that was chosen before any ran, and the one of all that the model now thinks best."""
    table: list[list[object]] = []
    for choice in choices(judged):
        row: list[object] = [choice.best.model, choice.best.workload, choice.num_plans]
        row += [choice.best.short_name, choice.best.measured_s]
        for chosen in (choice.before, choice.refit, choice.corrected):
            row += [chosen.short_name, 100 * choice.regret(chosen)]
        table.append(row)
    print_table(
        [
            "model", "workload", "plans", "best measured", "seconds", "chosen", "regret %", "best by refit", "regret %",
            "best by corrected", "regret %",
        ],
        table,
        title="Regret: how much slower than the best measured plan",
    )  # fmt: skip


def main() -> None:
    """Print tables for each hardware of the database, and one over all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("databases", nargs="*", type=Path, default=KEPT)
    parser.add_argument("--teach", type=int, default=32768, help="tokens of the one prompt whose runs teach")
    options = parser.parse_args()
    for path in options.databases:
        by_link: dict[str, list[Judged]] = {}
        with opened(path) as database:
            for stored in list_hardware(database):
                hardware = stored.hardware
                cards = f"{hardware.device_count} x {hardware.device}"
                print(f"{path.name}: {cards}, {hardware.link}, torch {hardware.torch_version}")
                judged = judge(database, hardware, options.teach)
                print_predictions(judged)
                print_regret(judged)
                by_link[hardware.link] = judged
        print_groups(by_link, path.name)


if __name__ == "__main__":
    main()
