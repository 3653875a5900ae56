"""How tight the bounds are, of the makespan or the mean TTFT: uneven stages, tables, and measured ones.

python -m benchmarks.planner_gap [PROFILE...] [--num-mixes N] [--mean-ttft [--any-makespan]]
"""

from __future__ import annotations

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.planner_records import prompts
from db.rows.archive import import_hardware
from db.rows.hardware import get_hardware
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.model import load_model_shape
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Attention, PairAttention, StageCost, TableAttention
from tuner.rounds.ends.mean_ttft import mean_ttft_bound_s
from tuner.rounds.problem import Problem
from tuner.search.partition import even_partition
from tuner.search.planner import plan_rounds
from tuner.workload.objective import MAX_MAKESPAN_INCREASE, Objective

COUNTS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


def stage(*, layers: float, head: float = 0.0, table: bool = False, stairs: bool = False) -> StageCost:
    """Layers of an 8B model on one fast device; `head` as a share of all layers' token-wise work."""
    token_s, pair_s, context_s = 6e-7 * layers, 3e-12 * layers, 1.2e-9 * layers
    attention: Attention = PairAttention(pair_s=pair_s, context_token_s=context_s)
    if table:  # short chunks run below the kernel's rate: a floor, and a slope that is not in proportion
        base = tuple(max(pair_s * n * n / 2 * (1.0 + 300.0 / n), 2e-5 * layers) for n in COUNTS)
        slope = tuple(context_s + pair_s * (n + 150.0) for n in COUNTS)
        attention = TableAttention(count=COUNTS, base_s=base, context_s=slope)
    counts: tuple[int, ...] = (0, *COUNTS)
    tokens = [token_s * (max(n, 96) + 40.0 * (1.0 - 96.0 / max(n, 96))) if table else token_s * n for n in counts]
    if stairs:  # tiles of 1024 tokens
        counts = (*(n for i in range(16) for n in (i * 1024 + 1, (i + 1) * 1024)), 65536)
        tokens = [*(token_s * (i + 1) * 1024 for i in range(16) for _ in range(2)), token_s * 65536]
    return StageCost(
        token_count=counts,
        token_seconds=tuple(seconds * (1.0 + head) for seconds in tokens),
        attention=attention,
        round_overhead_s=2e-4 * layers,
        final_s=head * 1e-3,
    )


def pipelines() -> dict[str, CostModel]:
    """Pipelines of 4 stages by what is uneven in them."""
    even = [8.0] * 4
    return {
        "equal, linear": CostModel(stages=tuple(stage(layers=n) for n in even)),
        "equal, tables": CostModel(stages=tuple(stage(layers=n, table=True) for n in even)),
        "equal, stairs": CostModel(stages=tuple(stage(layers=n, stairs=True) for n in even)),
        "head 5 %": CostModel(stages=(*(stage(layers=8) for _ in range(3)), stage(layers=8, head=0.05))),
        "head 10 %": CostModel(stages=(*(stage(layers=8) for _ in range(3)), stage(layers=8, head=0.1))),
        "head 5 %, tables": CostModel(
            stages=(*(stage(layers=8, table=True) for _ in range(3)), stage(layers=8, head=0.05, table=True))
        ),
        "7-8-8-7 layers, head 10 %": CostModel(
            stages=(stage(layers=7), stage(layers=8), stage(layers=8), stage(layers=7, head=0.1))
        ),
        "7-9-8-8 layers, tables": CostModel(stages=tuple(stage(layers=n, table=True) for n in (7, 9, 8, 8))),
        "4-8-8-4 layers": CostModel(stages=tuple(stage(layers=n) for n in (4, 8, 8, 4))),
        "2 stages, 8-9 layers": CostModel(stages=tuple(stage(layers=n) for n in (8, 9))),
        "8 stages, head 10 %": CostModel(stages=(*(stage(layers=4) for _ in range(7)), stage(layers=4, head=0.1))),
    }


WORKLOADS = {
    "1 x 49152": [49152],
    "1 x 131072": [131072],
    "12 of 900-90001": [*(int(900 * 100 ** (i / 11)) for i in range(11)), 90001],
    "40 x 3000": [3000] * 40,
}


def random_mixes(num_mixes: int, rng: random.Random) -> dict[str, list[int]]:
    """Batches of 1 to 30 prompts of 512 to 131072 tokens, by name."""
    batches = dict[str, list[int]]()
    for number in range(num_mixes):
        count = rng.choice([1, 2, 3, 5, 8, 16, 30])
        batches[f"mix {number}, {count}"] = [int(512 * 2 ** (8 * rng.random())) for _ in range(count)]
    return batches


def measured(profile: Path, model: str) -> dict[str, CostModel]:
    """Pipelines of even layers over all cards of a profile, by their sizes."""
    shape, found = load_model_shape(model), {}
    with TemporaryDirectory() as folder, open_database(f"sqlite:///{folder}/rows.db") as database:
        hardware = get_hardware(database, import_hardware(database, profile).hardware_id)
        rows = load_measurements(database, hardware, dtype="bfloat16")
    cards = hardware.device_count
    for tp_size in (size for size in (1, 2, 4, 8) if cards % size == 0):
        work = RankWork.on(hardware, shape=shape, dtype="bfloat16", tp_size=tp_size)
        costs = fit_layer_costs(rows, work, busy_ranks=cards)
        partition = even_partition(shape.num_layers, cards // tp_size)
        found[f"TP{tp_size} PP{cards // tp_size}"] = costs.cost_model(partition)
    return found


def main() -> None:
    """Print the gap of each pipeline's plan for one short prompt, one long prompt and a mix; with PROFILEs, of the
    measured pipelines' plans for four workloads and random mixes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profiles", nargs="*", type=Path, metavar="PROFILE")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--num-mixes", type=int, default=0)
    parser.add_argument("--mean-ttft", action="store_true", help="plan for the mean TTFT, and print its gap")
    parser.add_argument("--any-makespan", action="store_true", help="and give up as much of the makespan as it takes")
    options = parser.parse_args()
    sought = Sought(options.mean_ttft, math.inf if options.any_makespan else MAX_MAKESPAN_INCREASE)
    rng = random.Random(0)
    mix = [int(1024 * 2 ** (6 * rng.random())) for _ in range(12)]
    costs, batches, multiple = pipelines(), {"1 x 8K": [8192], "1 x 64K": [65536], "12 of 1K-64K": mix}, 64
    if options.profiles:
        batches, multiple = WORKLOADS | random_mixes(options.num_mixes, rng), 256
        costs = {
            f"{profile.name.partition('.')[0]} {layout}": cost
            for profile in options.profiles
            for layout, cost in measured(profile, options.model).items()
        }
    if options.profiles:
        print_by_batch(costs, batches, multiple, sought)
        return
    print(f"{'pipeline':>28} " + " ".join(f"{name:>15}" for name in batches))
    for name, cost in costs.items():
        gaps = [gap_of(cost, lengths, multiple, sought) for lengths in batches.values()]
        print(f"{name:>28} " + " ".join(f"{gap:15.2%}" for gap in gaps), flush=True)


@dataclass(frozen=True, slots=True)
class Sought:
    """What plans are made for."""

    mean_ttft: bool
    max_makespan_increase: float
    """For the mean TTFT."""


def gap_of(cost: CostModel, lengths: list[int], multiple: int, sought: Sought) -> float:
    """How far the plan is above the bound, of its makespan or of its mean TTFT."""
    requests = prompts(lengths)
    if not sought.mean_ttft:
        return plan_rounds(cost, requests, chunk_multiple=multiple).gap
    problem = Problem.of(cost, requests, chunk_multiple=multiple)
    plan = plan_rounds(
        cost,
        requests,
        chunk_multiple=multiple,
        objective=Objective.MEAN_TTFT,
        max_makespan_increase=sought.max_makespan_increase,
    )
    return plan.evaluation.mean_ttft_s / mean_ttft_bound_s(problem) - 1.0


def print_by_batch(costs: dict[str, CostModel], batches: dict[str, list[int]], multiple: int, sought: Sought) -> None:
    """A row a batch, a column a pipeline."""
    names = [name.replace("-nvlink", "") for name in costs]
    print(f"{'prompts':>16} " + " ".join(f"{name:>16}" for name in names))
    gaps = []
    for batch, lengths in batches.items():
        gaps.append([gap_of(cost, lengths, multiple, sought) for cost in costs.values()])
        print(f"{batch:>16} " + " ".join(f"{gap:16.2%}" for gap in gaps[-1]), flush=True)
    columns = list(zip(*gaps, strict=True))
    print(f"{'mean':>16} " + " ".join(f"{sum(column) / len(column):16.2%}" for column in columns))
    print(f"{'worst':>16} " + " ".join(f"{max(column):16.2%}" for column in columns))
    print(f"{'above 2 %':>16} " + " ".join(f"{sum(gap > 0.02 for gap in column):16d}" for column in columns))


if __name__ == "__main__":
    main()
