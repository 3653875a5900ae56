"""The online planner against the batch planner, all requests known at the start: `python -m benchmarks.planner_online
[num_mixes]`.

ATOM's cases and random mixes of 1-128 prompts of 1K-128K tokens on 2-16 stages. Each objective is compared by itself:
makespan planned for the makespan, mean TTFT planned for the mean TTFT.
"""

from __future__ import annotations

import random
import sys

import numpy as np

from benchmarks.planner_records import CASES, atom, prompts
from tuner.online import online_rounds
from tuner.planner import make_rounds
from tuner.problem import Problem
from tuner.schedule import Objective

ALLOWED = 0.02


def main(num_mixes: int = 40) -> None:
    """Print how far the online planner is above the batch planner in each case, and the worst of all."""
    print(f"{'case':>36} {'makespan':>9} {'mean_ttft':>9}")
    excesses = []
    for name, lengths, pp_size, window in [*((case[:4]) for case in CASES), *map(random_mix, range(num_mixes))]:
        makespan, mean_ttft = (excess(lengths, pp_size, window, wanted) for wanted in list(Objective)[:2])
        excesses.append((makespan, mean_ttft))
        print(f"{name:>36} {makespan:+9.2%} {mean_ttft:+9.2%}", flush=True)
    table = np.array(excesses)
    print(f"{'mean':>36} {table[:, 0].mean():+9.2%} {table[:, 1].mean():+9.2%}")
    print(f"{'worst':>36} {table[:, 0].max():+9.2%} {table[:, 1].max():+9.2%}")
    above = int((table > ALLOWED).any(axis=1).sum())
    print(f"{above} of {len(table)} cases are more than {ALLOWED:.0%} above the batch planner")


def excess(lengths: list[int], pp_size: int, window: int | None, objective: Objective) -> float:
    """How far the online planner's objective is above the batch planner's, as a share."""
    problem = Problem(cost=atom(pp_size), requests=tuple(prompts(lengths)), window=window, objective=objective)
    online, batch = online_rounds(problem), make_rounds(problem, "joint")
    return problem.evaluate(online).score(objective)[0] / problem.evaluate(batch).score(objective)[0] - 1.0


def random_mix(seed: int) -> tuple[str, list[int], int, int | None]:
    """Name, prompt lengths, stages and window of a mix."""
    rng = random.Random(seed)
    num_requests, pp_size = rng.choice([1, 2, 3, 5, 8, 16, 32, 64, 128]), rng.choice([2, 4, 8, 16])
    window = rng.choice([None, pp_size + 1])
    lengths = [int(1024 * 2 ** (7 * rng.random())) for _ in range(num_requests)]
    return f"random {seed}: {num_requests} prompts, K = {pp_size}, W = {window or '-'}", lengths, pp_size, window


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
