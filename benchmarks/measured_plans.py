"""Plans made from a profile and run on this machine: what the benchmarks that run plans share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from benchmarks.demo_model import write_demo_model
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.hardware.device import describe_hardware
from profiler.measure.profile import ProfileOptions, profile_model
from profiler.model import ModelShape, load_model_shape
from runtime.run.result import RunResult
from runtime.run.run import run_plans
from tuner.fit.correction import fit_correction, load_measured_rounds
from tuner.fit.holdout import HeldOutError, held_out_errors
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.fit.uncertainty import makespan_uncertainty
from tuner.plan.layout import Layout
from tuner.plan.plan import Plan, Request
from tuner.search.layouts import Candidate, search_layouts, to_plan
from tuner.search.rules import Rules
from tuner.search.target import Target

DTYPE = "float32"
NUM_THREADS = 1
CHUNK_MULTIPLE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan to make and to run."""

    tp_size: int
    pp_size: int
    prompt_lens: tuple[int, ...]
    policy: str = "joint"

    @property
    def name(self) -> str:
        """For tables."""
        lengths = "+".join(map(str, self.prompt_lens))
        return f"TP{self.tp_size} PP{self.pp_size} {self.policy} {lengths}"


class Machine:
    """This machine, profiled for a model: plans of cases, and what they measure."""

    def __init__(
        self,
        model: str,
        *,
        database_url: str,
        context_length: int,
        budget_s: float,
        device_type: str = "cpu",
        dtype: str = DTYPE,
        chunk_multiple: int = CHUNK_MULTIPLE,
    ) -> None:
        self.database_url, self.device_type, self.dtype = database_url, device_type, dtype
        self.chunk_multiple = chunk_multiple
        self.profile = profile_model(
            ProfileOptions(
                model=model, world_size=2, tp_sizes="1,2", context_length=context_length, dtype=dtype,
                device_type=device_type, threads_per_rank=NUM_THREADS, budget_s=budget_s,
                remeasure=None, db_url=database_url,
            )
        )  # fmt: skip
        self.shape: ModelShape = load_model_shape(model)
        self.hardware = describe_hardware(device_type, num_threads=NUM_THREADS)
        with open_database(self.database_url) as database:
            self.rows = load_measurements(database, self.hardware, dtype=dtype)
        self.fit = cache(self._fit)
        self.held_out = cache(self._held_out)

    def plan(self, case: Case, *, correct: bool = False) -> Plan:
        """Make the plan of a case; `correct`: with what the database's runs taught."""
        target = Target(
            shape=self.shape,
            dtype=self.dtype,
            requests=tuple(Request(id=f"r{i}", prompt_tokens=length) for i, length in enumerate(case.prompt_lens)),
            device_type=self.device_type,
            memory_bytes=self.hardware.memory_bytes,
        )
        rules = Rules(policy=case.policy, chunk_multiple=self.chunk_multiple)
        layout = Layout(tp_size=case.tp_size, pp_size=case.pp_size)
        (candidate,) = search_layouts(target, [layout], rules, lambda layout: self.fit(layout, correct))
        check(candidate)
        assert candidate.costs is not None
        held_out = self.held_out(case.tp_size, layout.world_size)
        correction = candidate.costs.correction
        uncertainty = makespan_uncertainty(held_out, correction, extrapolates=candidate.extrapolates)
        return to_plan(target, candidate, rules, uncertainty=uncertainty)

    def run(self, plan: Plan, *, repeat: int) -> RunResult:
        """Run a plan on random weights; the median pass counts."""
        (result,) = self.run_all([plan], repeat=repeat)
        return result

    def run_all(self, plans: Sequence[Plan], *, repeat: int) -> list[RunResult]:
        """Run plans of as many ranks one after another on the same ranks."""
        return run_plans(
            plans, random_weights=True, repeat=repeat, device_type=self.device_type, num_threads=NUM_THREADS,
            db_url=self.database_url, kind="benchmark",
        )  # fmt: skip

    def _work(self, tp_size: int) -> RankWork:
        return RankWork.on(self.hardware, shape=self.shape, dtype=self.dtype, tp_size=tp_size)

    def _held_out(self, tp_size: int, busy_ranks: int) -> list[HeldOutError]:
        return held_out_errors(self.rows, self._work(tp_size), busy_ranks=busy_ranks)

    def _fit(self, layout: Layout, correct: bool) -> LayerCosts:
        work = self._work(layout.tp_size)
        costs = fit_layer_costs(self.rows, work, busy_ranks=layout.world_size)
        if not correct:
            return costs
        with open_database(self.database_url) as database:
            measured = load_measured_rounds(database, self.hardware, work, cost_model=costs.cost_model)
        return replace(costs, correction=fit_correction(measured))


def check(candidate: Candidate) -> None:
    """A case that cannot be planned is a mistake of the benchmark."""
    if candidate.refusal:
        raise SystemExit(f"{candidate.layout}: {candidate.refusal}")


def machine_from_arguments(description: str, *, context_length: int, argv: Sequence[str] | None = None) -> Machine:
    """Parse the arguments that these benchmarks share, and profile what is missing."""
    (machine,) = machines_from_arguments(description, context_length=context_length, dtypes=(DTYPE,), argv=argv)
    return machine


def machines_from_arguments(
    description: str, *, context_length: int, dtypes: Sequence[str], argv: Sequence[str] | None = None
) -> list[Machine]:
    """The same in several precisions."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder with the model and the database")
    parser.add_argument("--budget-s", type=float, default=300.0, help="for profiling what the database does not hold")
    options = parser.parse_args(argv)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not (model / "config.json").exists():
        write_demo_model(model)
    url = f"sqlite:///{(folder / 'isochunk.db').resolve()}"
    return [
        Machine(str(model), database_url=url, context_length=context_length, budget_s=options.budget_s, dtype=dtype)
        for dtype in dtypes
    ]
