"""Plans of every family of layouts for one workload, each tuned with its layout kept: what gpu_parallel runs.

    python -m benchmarks.parallel_plans MODEL --db URL --hardware N --world-size W --prompt-lens N,N,... -o FOLDER

A family that is refused is named with the reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from db.errors import UserError
from service.use_cases.tune import tune
from service.use_cases.tune_options import TuneOptions


def families(world_size: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and pins of each family: all ranks in one scheme, and halves of them in two."""
    for kind in ("gather", "ulysses", "ring"):
        yield f"sp{world_size}-{kind}", {"sp_size": world_size, "sp_kind": kind}
    yield f"tp{world_size}", {"tp_size": world_size, "sp_kind": "none"}
    yield f"tp{world_size}-megatron", {"tp_size": world_size, "sp_kind": "megatron"}
    for passes, order in ((1, "loop"), (2, "loop"), (2, "v"), (4, "v")):
        pins = {"pp_size": world_size, "virtual_stages": passes, "stage_order": order, "sp_kind": "none"}
        yield f"pp{world_size}x{passes}-{order}", pins
    half = world_size // 2
    if world_size % 2 or half < 2:
        return
    for passes, order in ((1, "loop"), (2, "v")):
        pins = {"pp_size": half, "virtual_stages": passes, "stage_order": order, "sp_size": 2, "sp_kind": "gather"}
        yield f"sp2-gather-pp{half}x{passes}-{order}", pins
    for kind in ("gather", "ulysses"):
        yield f"tp{half}-sp2-{kind}", {"tp_size": half, "sp_size": 2, "sp_kind": kind}


def main() -> None:
    """Write a plan a family, and print its predicted makespan."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--db", required=True)
    parser.add_argument("--hardware", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--prompt-lens", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, pins in families(options.world_size):
        path = options.output / f"{options.world_size}-{options.prompt_lens.split(',')[0]}-{name}.json"
        try:
            report = tune(
                TuneOptions(
                    model=options.model, db_url=options.db, hardware_id=options.hardware, world_size=options.world_size,
                    prompt_lens=options.prompt_lens, output=str(path), **pins,
                ),
                echo=None,
            )  # fmt: skip
        except UserError as error:
            print(f"{name}: {error}", file=sys.stderr)
            continue
        assert report.plan.predicted is not None
        print(f"{path}: {report.plan.predicted.makespan_s:.4f} s in {len(report.plan.rounds)} rounds", flush=True)


if __name__ == "__main__":
    main()
