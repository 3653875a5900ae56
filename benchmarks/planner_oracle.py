"""The planner against exhaustive search on small random batches: `python -m benchmarks.planner_oracle
[num_instances]`.

The oracle follows every plan there is (1-3 requests, up to 11 units, 2-8 stages, even and uneven stages, hops,
windows, every term of the cost model). `joint` is also measured with its exact search switched off, which is what
larger batches get.
"""

from __future__ import annotations

import sys
import time
from unittest.mock import patch

import numpy as np

from tests.tuner.oracle import best_makespan_s, random_instance
from tuner.search.planner import plan_rounds


def main(num_instances: int = 300) -> None:
    """Print the mean and the worst gap of every policy to the best plan, and how often the bound is above it
    (never)."""
    best = {seed: best_makespan_s(random_instance(seed)) for seed in range(num_instances)}
    print(f"{num_instances} instances")
    print(f"{'policy':>24} {'mean gap':>9} {'worst':>8} {'optimal':>8} {'proven so':>9} {'median ms':>9} {'max ms':>7}")
    num_above = 0
    for label, policy, exact in [
        ("joint", "joint", True),
        ("joint, exact search off", "joint", False),
        ("dp", "dp", False),
        ("terapipe", "terapipe", False),
        ("gpipe", "gpipe", False),
    ]:
        gaps, proven, planning_ms, above = [], [], [], 0
        for seed, best_s in best.items():
            instance = random_instance(seed)
            with patch("tuner.policies.joint.is_small", lambda problem, exact=exact: exact):
                started = time.perf_counter()
                plan = plan_rounds(
                    instance.cost,
                    instance.requests,
                    policy=policy,
                    window=instance.window,
                    chunk_multiple=instance.chunk_multiple,
                )
            planning_ms.append((time.perf_counter() - started) * 1e3)
            gaps.append(plan.makespan_s / best_s - 1.0)
            proven.append(plan.gap < 1e-6)
            above += plan.lower_bound_s > best_s * (1.0 + 1e-9)
        print(
            f"{label:>24} {np.mean(gaps):9.3%} {max(gaps):8.2%} {np.mean(np.array(gaps) < 1e-9):8.1%} "
            f"{np.mean(proven):9.1%} {np.median(planning_ms):9.1f} {max(planning_ms):7.1f}"
        )
        if above:
            print(f"the bound was above the best plan {above} times")
        num_above += above
    print("the bound was never above the best plan" if not num_above else "THE BOUND IS WRONG")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
