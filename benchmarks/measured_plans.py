"""Plans made from a profile and run on this machine: what the benchmarks on two cores share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from benchmarks.demo_model import write_demo_model
from db.engine import open_database
from db.measurements import load_measurements
from profiler.device import describe_hardware
from profiler.model import ModelShape, load_model_shape
from profiler.profile import ProfileOptions, profile_model
from runtime.result import RunResult
from runtime.run import run_plan
from tuner.fit import LayerCosts, fit_layer_costs
from tuner.layout import Layout
from tuner.plan import Plan, Request
from tuner.rows import RankWork
from tuner.search import Candidate, Rules, Target, search_layouts, to_plan

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
    """This machine, profiled for the demo's model with two ranks."""

    def __init__(self, folder: Path, *, context_length: int, budget_s: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.model = folder / "model"
        if not (self.model / "config.json").exists():
            write_demo_model(self.model)
        self.database_url = f"sqlite:///{(folder / 'isochunk.db').resolve()}"
        import time

        profile_model(
            ProfileOptions(
                model=str(self.model), world_size=2, tp_sizes="1,2", context_length=context_length, dtype=DTYPE,
                device_type="cpu", threads_per_rank=NUM_THREADS, deadline=time.monotonic() + budget_s,
                remeasure=None, db_url=self.database_url,
            )
        )  # fmt: skip
        self.shape: ModelShape = load_model_shape(str(self.model))
        self.hardware = describe_hardware("cpu", num_threads=NUM_THREADS)
        with open_database(self.database_url) as database:
            self.rows = load_measurements(database, self.hardware, dtype=DTYPE)
        self.fit = cache(self._fit)

    def plan(self, case: Case) -> Plan:
        """Make the plan of a case."""
        target = Target(
            shape=self.shape,
            dtype=DTYPE,
            requests=tuple(Request(id=f"r{i}", prompt_tokens=length) for i, length in enumerate(case.prompt_lens)),
            device_type="cpu",
            memory_bytes=self.hardware.memory_bytes,
        )
        rules = Rules(policy=case.policy, chunk_multiple=CHUNK_MULTIPLE)
        layout = Layout(tp_size=case.tp_size, pp_size=case.pp_size)
        (candidate,) = search_layouts(target, [layout], rules, lambda layout: self.fit(layout))
        check(candidate)
        return to_plan(target, candidate, rules)

    def run(self, plan: Plan, *, repeat: int) -> RunResult:
        """Run a plan on random weights; the median pass counts."""
        return run_plan(
            plan, random_weights=True, repeat=repeat, device_type="cpu", num_threads=NUM_THREADS,
            db_url=self.database_url, kind="benchmark",
        )  # fmt: skip

    def _fit(self, layout: Layout) -> LayerCosts:
        work = RankWork(shape=self.shape, dtype=DTYPE, tp_size=layout.tp_size)
        return fit_layer_costs(self.rows, work, busy_ranks=layout.world_size)


def check(candidate: Candidate) -> None:
    """A case that cannot be planned is a mistake of the benchmark."""
    if candidate.refusal:
        raise SystemExit(f"{candidate.layout}: {candidate.refusal}")


def machine_from_arguments(description: str, *, context_length: int, argv: Sequence[str] | None = None) -> Machine:
    """Parse the arguments that these benchmarks share, and profile what is missing."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder with the model and the database")
    parser.add_argument("--budget-s", type=float, default=300.0, help="for profiling what the database does not hold")
    options = parser.parse_args(argv)
    return Machine(options.output, context_length=context_length, budget_s=options.budget_s)
