"""Runs plans of many layouts in one command and prints them side by side: predicted, measured, MFU, memory.

    python -m benchmarks.gpu_parallel PLAN... [--repeat 3] [-o rows.json] [--device cpu]

Plans of as many ranks share one launch. A plan without a prediction is measured alone. Random weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from db.errors import UserError
from profiler.comm.ranks.failure import RanksFailedError
from profiler.hardware.device import describe_hardware
from runtime.run.preparation import model_shape
from runtime.run.run import run_plans
from service.cli.output import print_table
from tuner.plan.layout import layout_of
from tuner.plan.memory import plan_memory
from tuner.plan.plan import Plan, load_plan

COLUMNS = [
    "workload",
    "layout",
    "rounds",
    "predicted s",
    "measured s",
    "error",
    "MFU",
    "predicted GiB",
    "measured GiB",
    "warm-up s",
]


def row_of(name: str, plan: Plan, result: Any, device_type: str) -> dict[str, Any]:
    """What is printed and kept of a plan's run."""
    memory = plan_memory(model_shape(plan.model, None), plan, max_new_tokens=1, device_type=device_type)
    return {
        "plan": name,
        "workload": "+".join(str(request.prompt_tokens) for request in plan.requests[:3])
        + ("..." if len(plan.requests) > 3 else ""),
        "layout": str(layout_of(plan.parallel)),
        "rounds": len(plan.rounds),
        "cuts": sorted(set(plan.round_cuts)),
        "predicted_s": result.predicted_makespan_s,
        "uncertainty": plan.predicted.uncertainty if plan.predicted else None,
        "makespans_s": result.makespans_s,
        "measured_s": result.makespan_s,
        "error": result.error,
        "mfu": result.mfu,
        "predicted_bytes": max(stage.total_bytes for stage in memory),
        "memory_bytes": result.memory_bytes,
        "warm_up_s": result.warm_up_s,
    }


def printed(row: dict[str, Any]) -> list[object]:
    """The row of the table."""
    error, memory = row["error"], row["memory_bytes"]
    return [
        row["workload"], row["layout"], row["rounds"], row["predicted_s"] or "", row["measured_s"],
        "" if error is None else f"{error:+.1%}", "" if row["mfu"] is None else f"{row['mfu']:.1%}",
        row["predicted_bytes"] / 2**30, "" if memory is None else memory / 2**30, row["warm_up_s"],
    ]  # fmt: skip


def main() -> None:
    """Run the plans, print a line each as its launch ends, and the table; exit code 1 if a launch failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("plans", nargs="+", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    of_size: dict[int, list[tuple[str, Plan]]] = defaultdict(list)
    for path in options.plans:
        plan = load_plan(path)
        of_size[plan.parallel.world_size].append((path.name, plan))
    rows: list[dict[str, Any]] = []
    failed = False
    with TemporaryDirectory() as folder:
        for size, named in sorted(of_size.items()):
            try:
                results = run_plans(
                    [plan for _, plan in named], random_weights=True, repeat=options.repeat,
                    device_type=options.device, db_url=f"sqlite:///{folder}/{size}.db",
                )  # fmt: skip
            except (RanksFailedError, UserError) as error:
                print(f"{size} ranks: {error}", file=sys.stderr, flush=True)
                failed = True
                continue
            for (name, plan), result in zip(named, results, strict=True):
                rows.append(row_of(name, plan, result, options.device))
                print(json.dumps(rows[-1]), flush=True)
            if options.output is not None:
                options.output.write_text(json.dumps(rows, indent=1))
    device = describe_hardware(options.device, num_threads=1).device
    rows.sort(key=lambda row: (row["workload"], row["measured_s"]))
    print_table(COLUMNS, [printed(row) for row in rows], title=f"{device}, torch {torch.__version__}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
