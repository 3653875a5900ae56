"""What each part of the planner and of the fit brings: everything as it is, and once more without each part.

    python -m benchmarks.planner_ablation [--profile FILE ...] [--seeds N]

FILE is a profile of Llama-3-8B as `isochunk db export` writes it; by default those kept here. Plans are judged by the
cost model; predictions and choices by the kept runs, one run of which is within 1 % of another (`gpu_report`).
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.gpu_report import KEPT, choices, is_taught, judge, opened, runs_of
from benchmarks.planner_gap import random_mixes
from benchmarks.planner_records import CASES, prompts
from db.rows.archive import import_hardware
from db.rows.hardware import Hardware, get_hardware, list_hardware
from db.rows.measurements import Measurement, load_measurements
from db.store.engine import Database, open_database
from profiler.model import load_model_shape
from service.cli.output import print_table
from tests.tuner.atom import ATOM, atom
from tests.tuner.oracle import random_instance
from tuner.fit.attention.curve import AttentionCurve, Waves
from tuner.fit.calibration import Calibration
from tuner.fit.correction import fit_correction, load_measured_rounds
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rank_skew import RankSkew
from tuner.fit.rows import RankWork, expected_s
from tuner.online.driven import online_rounds
from tuner.rounds.problem import Problem
from tuner.rounds.schedule import evaluate
from tuner.search.partition import even_partition
from tuner.search.planner import plan_rounds
from tuner.workload.objective import Objective

Off = Callable[[], AbstractContextManager[object]]

PROFILES = tuple(sorted((Path(__file__).parent / "results").glob("*.profile.json.gz")))
MODEL = "llama-3-8b"
TAUGHT = 32768  # tokens of the one prompt whose runs may correct predictions
BATCHES = {
    "one": [32768],
    "two": [60000, 20000],
    "mix": [min(n, 65536) for n in ATOM["request_mix"]],
    **random_mixes(8, random.Random(1)),
}

PLANNER: dict[str, Off] = {
    "as it is": nullcontext,
    "local search": lambda: patch("tuner.policies.joint.local_search", lambda problem, rounds, *_: list(rounds)),
    "exact search": lambda: patch("tuner.policies.joint.is_small", lambda problem: False),
    "simpler policies": lambda: patch("tuner.policies.joint.simpler_rounds", lambda *_: []),
    "rounds by worth": lambda: patch("tuner.policies.joint.Search.sweep_by_worth", lambda search: None),
    "line cut anywhere": lambda: patch("tuner.policies.joint.stretch_rounds", lambda *_: []),
    "uneven bound": lambda: patch("tuner.rounds.bound.uneven_bound_s", lambda cost, work, known_s: known_s),
    "lookahead": lambda: patch("tuner.online.online_planner.OnlinePlanner._may_plan_ahead", lambda planner: False),
}


def _in_proportion(**sizes: Any) -> Waves:
    return Waves(**sizes | {"num_multiprocessors": None})


def _one_factor(
    compute_s: Callable[[Any], Any],
    attention: AttentionCurve,
    layers: Sequence[Measurement],
    *,
    ranks: int,
    constant: bool,
) -> Calibration:
    """The simplest fit on whole layers: how much longer they take than all their parts together."""
    if not layers:
        return Calibration.none()
    chunk = np.array([row.shape["chunk"] for row in layers], dtype=np.float64)
    context = np.array([row.shape["context"] for row in layers], dtype=np.float64)
    measured_s = np.array([expected_s(row, ranks=ranks) for row in layers])
    ratio = measured_s / (compute_s(chunk) + attention.base(chunk) + attention.slope(chunk) * context)
    knots = np.unique(chunk)
    factors = np.array([float(np.median(ratio if constant else ratio[chunk == at])) for at in knots])
    return Calibration(
        tokens=knots, factors=factors, base_factors=factors, context_factors=factors, num_layers_measured=len(layers)
    )


FIT: dict[str, Off] = {
    "as it is": nullcontext,
    "waves": lambda: patch("tuner.fit.attention.rows.Waves", _in_proportion),
    "calibration": lambda: patch("tuner.fit.layer_fit.fit_calibration", lambda *_, **__: Calibration.none()),
    "calibration but one factor by chunk": lambda: patch(
        "tuner.fit.layer_fit.fit_calibration", partial(_one_factor, constant=False)
    ),
    "calibration but one constant": lambda: patch(
        "tuner.fit.layer_fit.fit_calibration", partial(_one_factor, constant=True)
    ),
    "rank skew": lambda: patch("tuner.fit.layer_fit.fit_rank_skew", lambda rows: RankSkew()),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reached:
    """What plans of one problem reach."""

    makespan_s: float
    gap: float
    mean_ttft_s: float
    online_makespan_s: float
    online_ttft_s: float


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", type=Path, nargs="*", default=PROFILES)
    parser.add_argument("--seeds", type=int, default=40, help="small random batches")
    options = parser.parse_args()
    groups = {"ATOM": list(atom_problems())}
    for path in options.profile:
        groups[path.name.removesuffix(".profile.json.gz")] = list(profile_problems(path))
    groups["small batches"] = [small_problem(seed) for seed in range(options.seeds)]
    print_planner(groups)
    print_fit()
    print_regret()


def atom_problems() -> Iterator[Problem]:
    """The published engine's cases."""
    for _, lengths, pp_size, window, _ in CASES:
        yield Problem(cost=atom(pp_size), requests=tuple(prompts(lengths)), window=window)


def profile_problems(path: Path) -> Iterator[Problem]:
    """Batches on the stages of a measured machine, one a rank."""
    with TemporaryDirectory() as folder, open_database(f"sqlite:///{folder}/rows.db") as database:
        imported = import_hardware(database, path)
        hardware = get_hardware(database, imported.hardware_id)
        rows = load_measurements(database, hardware, dtype="bfloat16")
    shape, pp_size = load_model_shape(MODEL), hardware.device_count
    work = RankWork.on(hardware, shape=shape, dtype="bfloat16", tp_size=1)
    costs = fit_layer_costs(rows, work, busy_ranks=pp_size)
    cost = costs.cost_model(even_partition(shape.num_layers, pp_size))
    for lengths in BATCHES.values():
        yield Problem(cost=cost, requests=tuple(prompts(lengths)), chunk_multiple=256)


def small_problem(seed: int) -> Problem:
    """A random batch that the exact search can take."""
    one = random_instance(seed)
    return Problem(cost=one.cost, requests=one.requests, window=one.window, chunk_multiple=one.chunk_multiple)


def reach(problem: Problem, off: Off) -> Reached:
    """Plan without a part: as a batch for both objectives, and online."""
    by_ttft = replace(problem, objective=Objective.MEAN_TTFT)

    def planned(one: Problem) -> Any:
        return plan_rounds(
            one.cost, one.requests, window=one.window, chunk_multiple=one.chunk_multiple, objective=one.objective
        )

    with off():
        fastest, soonest = planned(problem), planned(by_ttft)
        return Reached(
            makespan_s=fastest.makespan_s,
            gap=fastest.gap,
            mean_ttft_s=soonest.evaluation.mean_ttft_s,
            online_makespan_s=problem.evaluate(online_rounds(problem)).makespan_s,
            online_ttft_s=by_ttft.evaluate(online_rounds(by_ttft)).mean_ttft_s,
        )


def print_planner(groups: Mapping[str, Sequence[Problem]]) -> None:
    """How much worse plans are without each part."""
    table: list[list[object]] = []
    for group, problems in groups.items():
        whole = [reach(problem, nullcontext) for problem in problems]
        table.append([group, "as it is", *[None] * 4, 100 * float(np.mean([one.gap for one in whole])), None, None])
        for part, off in PLANNER.items():
            if part == "as it is":
                continue
            without = [reach(problem, off) for problem in problems]
            row: list[object] = [group, f"without {part}"]
            for name in ("makespan_s", "mean_ttft_s"):
                row += _changes(whole, without, name)
            row.append(100 * float(np.mean([one.gap for one in without])))
            row += [_changes(whole, without, name)[0] for name in ("online_makespan_s", "online_ttft_s")]
            table.append(row)
    columns = ["on", "planner", "makespan %", "worst", "mean TTFT %", "worst", "gap %", "online makespan %",
               "online TTFT %"]  # fmt: skip
    print_table(columns, table, title="Planner: how much more without a part")


def _changes(whole: Sequence[Reached], without: Sequence[Reached], name: str) -> list[float]:
    """Mean and worst change in percent."""
    ratios = [getattr(b, name) / getattr(a, name) - 1.0 for a, b in zip(whole, without, strict=True)]
    return [100 * float(np.mean(ratios)), 100 * max(ratios)]


def print_fit() -> None:
    """How far off kept runs are predicted without each part of the fit, and what correcting by runs brings."""
    table: list[list[object]] = []
    everything: dict[str, list[float]] = {}
    for path in KEPT:
        with opened(path) as database:
            for stored in list_hardware(database):
                for part, off in FIT.items():
                    with off():
                        errors = list(run_errors(database, stored.hardware, correct=False))
                    name = part if part == "as it is" else f"without {part}"
                    everything.setdefault(name, []).extend(errors)
                    table.append([path.name.removesuffix(".db.gz"), stored.hardware.link, name, *_errors(errors)])
                errors = list(run_errors(database, stored.hardware, correct=True))
                everything.setdefault("corrected", []).extend(errors)
                table.append([path.name.removesuffix(".db.gz"), stored.hardware.link, "corrected", *_errors(errors)])
    table += [["all", None, name, *_errors(errors)] for name, errors in everything.items()]
    columns = ["database", "link", "fit", "runs", "median error %", "p90 %", "worst %", "mean %", "rms %"]
    print_table(columns, table, title="Fit: error of the predicted makespan, runs that may teach left out")


def print_regret() -> None:
    """How much longer than the best measured plan the one took that is predicted best, without each part of the fit."""
    table: list[list[object]] = []
    for part, off in FIT.items():
        with off(), opened(KEPT[-1]) as database:
            hardware = next(one.hardware for one in list_hardware(database) if one.hardware.link == "nvlink")
            judged = [one for one in judge(database, hardware, TAUGHT) if one.model == MODEL]
            for choice in choices(judged):
                name = part if part == "as it is" else f"without {part}"
                table.append([name, choice.best.workload, choice.refit.short_name, 100 * choice.regret(choice.refit)])
    print_table(["fit", "prompts", "chosen", "regret %"], table, title=f"Regret of choices in {KEPT[-1].name}")


def run_errors(database: Database, hardware: Hardware, *, correct: bool) -> Iterator[float]:
    """Relative error of each run that did not teach."""
    rows, fits = load_measurements(database, hardware), dict[tuple[Any, ...], LayerCosts]()
    for run, plan, shape in runs_of(database, hardware):
        parallel = plan.parallel
        busy_ranks = parallel.tp_size * parallel.pp_size
        unsteady = hardware.link.startswith("socket") and parallel.tp_size > 1
        if (
            run.predicted_makespan_s is None
            or run.makespan_s is None
            or unsteady
            or is_taught(plan, TAUGHT, busy_ranks)
        ):
            continue
        key = (shape.fingerprint, plan.precision, parallel.tp_size, busy_ranks)
        if key not in fits:
            work = RankWork.on(hardware, shape=shape, dtype=plan.precision, tp_size=parallel.tp_size)
            mine = [row for row in rows if row.dtype == plan.precision]
            fits[key] = fit_layer_costs(mine, work, busy_ranks=busy_ranks)
            if correct:
                teaches = partial(is_taught, teach=TAUGHT, busy_ranks=busy_ranks)
                model = fits[key].cost_model
                measured = load_measured_rounds(database, hardware, work, cost_model=model, of=teaches)
                fits[key] = replace(fits[key], correction=fit_correction(measured))
        cost = fits[key].cost_model(parallel.layer_partition)
        yield evaluate(cost, plan.requests, plan.rounds, plan.window).makespan_s / run.makespan_s - 1.0


def _errors(errors: Sequence[float]) -> list[object]:
    size = np.abs(errors)
    quantiles = [100 * float(np.quantile(size, at)) for at in (0.5, 0.9, 1.0)]
    return [len(errors), *quantiles, 100 * float(np.mean(errors)), 100 * float(np.sqrt(np.mean(np.square(errors))))]


if __name__ == "__main__":
    main()
