"""The online planner against the batch planner, all requests known at the start: `python -m benchmarks.planner_online
[num_mixes]`.

ATOM's cases and random mixes of 1-128 prompts of 1K-128K tokens on 2-16 stages, planned for the makespan and for
the mean TTFT; for the latter both planners limit the makespan, so both columns count.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable

import numpy as np

from benchmarks.planner_records import CASES, prompts
from tests.tuner.atom import atom
from tuner.online.driven import online_rounds
from tuner.rounds.problem import Problem
from tuner.search.planner import make_rounds
from tuner.workload.objective import Objective

ALLOWED = 0.02


def main(num_mixes: int = 40) -> None:
    """Print how far the online planner is above the batch planner in each case, and the worst of all."""
    print(f"{'planned for':>44} {'makespan':>9} {'mean TTFT':>20}")
    print(f"{'case':>44} {'makespan':>9} {'makespan':>10} {'mean_ttft':>9}")
    rows = []
    for name, lengths, pp_size, window in [*((case[:4]) for case in CASES), *map(random_mix, range(num_mixes))]:
        makespan, _ = excess(lengths, pp_size, window, Objective.MAKESPAN)
        rows.append((makespan, *excess(lengths, pp_size, window, Objective.MEAN_TTFT)))
        _print_row(name, rows[-1])
    table = np.array(rows)
    _print_row("mean", table.mean(axis=0))
    _print_row("worst", table.max(axis=0))
    above = int((table > ALLOWED).any(axis=1).sum())
    print(f"{above} of {len(table)} cases are more than {ALLOWED:.0%} above the batch planner")


def _print_row(name: str, columns: Iterable[float]) -> None:
    makespan, makespan_by_ttft, mean_ttft = columns
    print(f"{name:>44} {makespan:+9.2%} {makespan_by_ttft:+10.2%} {mean_ttft:+9.2%}", flush=True)


def excess(lengths: list[int], pp_size: int, window: int | None, objective: Objective) -> tuple[float, float]:
    """How far the online planner's makespan and mean TTFT are above the batch planner's, as shares."""
    problem = Problem(cost=atom(pp_size), requests=tuple(prompts(lengths)), window=window, objective=objective)
    online, batch = (problem.evaluate(rounds) for rounds in (online_rounds(problem), make_rounds(problem, "joint")))
    return online.makespan_s / batch.makespan_s - 1.0, online.mean_ttft_s / batch.mean_ttft_s - 1.0


def random_mix(seed: int) -> tuple[str, list[int], int, int | None]:
    """Name, prompt lengths, stages and window of a mix."""
    rng = random.Random(seed)
    num_requests, pp_size = rng.choice([1, 2, 3, 5, 8, 16, 32, 64, 128]), rng.choice([2, 4, 8, 16])
    window = rng.choice([None, pp_size + 1])
    lengths = [int(1024 * 2 ** (7 * rng.random())) for _ in range(num_requests)]
    return f"random {seed}: {num_requests} prompts, K = {pp_size}, W = {window or '-'}", lengths, pp_size, window


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
