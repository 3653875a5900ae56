"""Stages of one, two and four groups of layers: predicted makespans and gaps to the bound, for each profile's link.

    python -m benchmarks.planner_passes PROFILE... [--pp-sizes 2 4]

Llama-3-8B in bfloat16, even layers, one prompt, `joint` on a grid of 256 tokens. Pipelines longer than the profile's
machine take its costs as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

from db.rows.archive import import_hardware
from db.rows.hardware import get_hardware
from db.rows.measurements import load_measurements
from db.store.engine import open_database
from profiler.model import load_model_shape
from service.cli.output import print_table
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.plan.plan import Request
from tuner.plan.stage_order import StageOrder
from tuner.search.partition import even_partition
from tuner.search.planner import plan_rounds

MODEL, DTYPE = "llama-3-8b", "bfloat16"
PROMPTS = (32768, 49152, 131072)
PASSES = ((1, StageOrder.LOOP), (2, StageOrder.LOOP), (2, StageOrder.V), (4, StageOrder.LOOP))


def costs_of(profile: Path) -> LayerCosts:
    """The fit of a profile of two ranks."""
    with TemporaryDirectory() as folder, open_database(f"sqlite:///{folder}/rows.db") as database:
        hardware = get_hardware(database, import_hardware(database, profile).hardware_id)
        rows = load_measurements(database, hardware, dtype=DTYPE)
    work = RankWork.on(hardware, shape=load_model_shape(MODEL), dtype=DTYPE, tp_size=1)
    return fit_layer_costs(rows, work, busy_ranks=hardware.device_count)


def main() -> None:
    """Print a table: a row a profile, pipeline and prompt, a column a number of groups."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profiles", nargs="+", type=Path, metavar="PROFILE")
    parser.add_argument("--pp-sizes", nargs="+", type=int, default=[2, 4])
    options = parser.parse_args()
    num_layers = load_model_shape(MODEL).num_layers
    rows: list[list[object]] = []
    for profile in options.profiles:
        costs = costs_of(profile)
        for pp_size in options.pp_sizes:
            for tokens in PROMPTS:
                cells = []
                for passes, order in PASSES:
                    cost = costs.interleaved(passes, order).cost_model(even_partition(num_layers, pp_size * passes))
                    plan = plan_rounds(cost, [Request(id="a", prompt_tokens=tokens)], chunk_multiple=256)
                    cells.append(f"{plan.makespan_s:.4f} ({plan.gap:.1%})")
                rows.append([profile.name.partition(".")[0], pp_size, tokens, *cells])
    names = ["1", *(f"{passes} {order}" for passes, order in PASSES[1:])]
    print_table(["profile", "stages", "tokens", *names], rows, title="predicted s (gap to the bound) by groups a stage")


if __name__ == "__main__":
    main()
