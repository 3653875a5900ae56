"""CPU time of planning, imports apart: `python -m benchmarks.planner_time`."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np

from benchmarks.planner_gap import WORKLOADS, measured
from benchmarks.planner_records import prompts
from tests.tuner.atom import atom
from tuner.online.online_planner import OnlinePlanner
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.plan.stage_cost import StageCost, scaled_stage
from tuner.search.planner import plan_rounds
from tuner.workload.objective import Objective

REPEATS = 7
PROFILE = Path(__file__).parent / "results" / "h100x4.json.gz"


def main() -> None:
    """Print median and least planning times beside their limits, and the online planner's time a round."""
    rng = random.Random(0)
    mixed = [int(2048 * 2 ** (6 * rng.random())) for _ in range(256)]
    thousand = [int(512 * 2 ** (7 * rng.random())) for _ in range(1000)]
    table = measured(PROFILE, "llama-3-8b")["TP1 PP4"]
    many = CostModel(stages=tuple(uneven_stage(table.stages[k % 4], k) for k in range(64)))
    for name, lengths, cost, limit_ms in [
        ("1 x 1048576 tokens, 64 stages", [1_048_576], atom(64), 50),
        ("1 x 1048576 tokens, 64 uneven stages", [1_048_576], uneven(64), 50),
        ("256 requests of 2K-128K, 16 stages", mixed, atom(16), 300),
        ("256 requests of 2K-128K, 16 uneven stages", mixed, uneven(16), 300),
        ("1000 x 3000 tokens, 4 stages", [3000] * 1000, atom(4), 1000),
        ("1000 requests of 512-64K, 4 stages", thousand, atom(4), 1000),
        ("tables of 4 H100: 1 x 131072", [131072], table, 300),
        ("tables of 4 H100: 12 of 900-90001", WORKLOADS["12 of 900-90001"], table, 300),
        ("tables of 4 H100: 40 x 3000", [3000] * 40, table, 300),
        ("tables of 4 H100: 1000 x 3000", [3000] * 1000, table, 300),
        ("tables of 4 H100: 1000 of 512-64K", thousand, table, 1000),
        ("tables of 4 H100, 64 uneven stages: 1 x 131072", [131072], many, 300),
        ("tables of 4 H100, 64 uneven stages: 40 x 3000", [3000] * 40, many, 300),
    ]:
        multiple = 256 if cost in (table, many) else 64
        times_ms = []
        for _ in range(REPEATS):
            started = time.process_time()
            plan = plan_rounds(cost, prompts(lengths), window=cost.pp_size + 1, chunk_multiple=multiple)
            times_ms.append((time.process_time() - started) * 1e3)
        print(
            f"{name}: median {np.median(times_ms):.1f} ms, least {min(times_ms):.1f} ms (limit {limit_ms} ms); "
            f"{len(plan.rounds)} rounds",
            flush=True,
        )
    for objective in (Objective.MEAN_TTFT, Objective.MAKESPAN):
        times_ms = _online_ms(mixed, objective, rng)
        print(
            f"online next round with 256 waiting, {objective}: median {np.median(times_ms):.3f} ms, "
            f"p99 {np.percentile(times_ms, 99):.3f} ms (limit 1 ms in the median)"
        )


def uneven_stage(stage: StageCost, k: int) -> StageCost:
    """A stage with 7, 8 or 9 layers in turn instead of 8."""
    return scaled_stage(stage, (7 + k % 3) / 8)


def uneven(pp_size: int) -> CostModel:
    """ATOM's stages with 7, 8 and 9 layers in turn instead of 8."""
    return CostModel(stages=tuple(uneven_stage(atom(1).stages[0], k) for k in range(pp_size)))


def _online_ms(lengths: list[int], objective: Objective, rng: random.Random) -> list[float]:
    """Times of next_round while 256 requests wait: whenever one ends, another arrives."""
    planner = OnlinePlanner(atom(16), window=None, objective=objective)
    num_added, now = 0, 0.0
    times_ms: list[float] = []
    while len(times_ms) < 300:
        while planner.num_waiting < 256:
            planner.add(Request(id=f"r{num_added}", prompt_tokens=rng.choice(lengths), arrival_s=now), now)
            num_added += 1
        started = time.process_time()
        planner.next_round(now)
        times_ms.append((time.process_time() - started) * 1e3)
        planner.finish_round()
        now += 1.0
    return times_ms


if __name__ == "__main__":
    main()
