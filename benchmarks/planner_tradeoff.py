"""What the mean TTFT gains where the makespan may be longer: `python -m benchmarks.planner_tradeoff [PROFILE...]`.

A row a batch: the mean TTFT planned with each limit, over that planned with the default one, and how much longer than
the least makespan the plan's is. ATOM's cases of several prompts; with PROFILEs, the workloads of several prompts of
`benchmarks.planner_gap` and random mixes, on every layout of tensor-parallel sizes and stages, even layers.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from benchmarks.planner_gap import WORKLOADS, measured
from benchmarks.planner_records import CASES, prompts
from tests.tuner.atom import atom
from tuner.plan.cost_model import CostModel
from tuner.search.planner import plan_rounds
from tuner.workload.objective import MAX_MAKESPAN_INCREASE, Objective

LIMITS = (0.0025, 0.0075, 0.02, 0.05, 0.1, math.inf)
COMPARED = LIMITS.index(MAX_MAKESPAN_INCREASE)
Case = tuple[str, CostModel, list[int], int | None, int]
"""Name, costs, prompt lengths, window, chunk multiple."""


def cases(profiles: Sequence[Path], model: str, num_mixes: int) -> Iterator[Case]:
    """ATOM's cases, or those of the profiles, each of more than one prompt."""
    if not profiles:
        for name, lengths, pp_size, window, _ in CASES:
            if len(lengths) > 1:
                yield name, atom(pp_size), lengths, window, 64
    rng, batches = random.Random(0), {name: lengths for name, lengths in WORKLOADS.items() if len(lengths) > 1}
    for number in range(num_mixes):
        count = rng.choice([2, 3, 5, 8, 16, 30])
        batches[f"mix {number}, {count}"] = [int(512 * 2 ** (8 * rng.random())) for _ in range(count)]
    for profile in profiles:
        for layout, cost in measured(profile, model).items():
            for name, lengths in batches.items():
                yield f"{profile.name.partition('.')[0]} {layout}: {name}", cost, lengths, None, 256


def main() -> None:
    """Print a row a case, then the means of all of them: the geometric one of the shares of the mean TTFT."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("profiles", nargs="*", type=Path, metavar="PROFILE")
    parser.add_argument("--model", default="llama-3-8b")
    parser.add_argument("--num-mixes", type=int, default=8)
    options = parser.parse_args()
    words = " ".join(f"{'none' if math.isinf(limit) else f'{limit:.2%}':>15}" for limit in LIMITS)
    print(f"{'mean TTFT, makespan; at most':>44} {words}   mean TTFT s")
    rows = []
    for name, cost, lengths, window, multiple in cases(options.profiles, options.model, options.num_mixes):
        requests = prompts(lengths)
        least_s = plan_rounds(cost, requests, window=window, chunk_multiple=multiple).makespan_s
        plans = [
            plan_rounds(
                cost,
                requests,
                window=window,
                chunk_multiple=multiple,
                objective=Objective.MEAN_TTFT,
                max_makespan_increase=limit,
            ).evaluation
            for limit in LIMITS
        ]
        own_s = plans[COMPARED].mean_ttft_s
        rows.append([(one.mean_ttft_s / own_s, one.makespan_s / least_s) for one in plans])
        _print_row(name, rows[-1], f"{own_s:11.4g}")
    shares, longer = np.array(rows).transpose(2, 0, 1)
    means = np.exp(np.log(shares).mean(axis=0))
    _print_row("mean", list(zip(means.tolist(), longer.mean(axis=0).tolist(), strict=True)), "")
    most = zip(shares.min(axis=0).tolist(), longer.max(axis=0).tolist(), strict=True)
    _print_row("least, most", list(most), "")


def _print_row(name: str, cells: Sequence[tuple[float, float]], last: str) -> None:
    words = " ".join(f"{share:6.3f} {increase - 1.0:+8.2%}" for share, increase in cells)
    print(f"{name:>44} {words}   {last}", flush=True)


if __name__ == "__main__":
    main()
