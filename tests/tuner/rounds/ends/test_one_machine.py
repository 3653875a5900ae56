"""What one machine reaches at best, against all orders of a few requests."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
import pytest

from tuner.plan.stage_cost import Floats
from tuner.rounds.ends.one_machine import least_ends_s, least_lateness_s, most_in_time, most_on_time


def ends_of(order: Sequence[int], release: Floats, seconds: Floats) -> Floats:
    """Ends when each runs whole, in this order."""
    ends, now = np.zeros(len(order)), 0.0
    for i in order:
        now = max(now, release[i]) + seconds[i]
        ends[i] = now
    return ends


@pytest.mark.parametrize("is_timed", [False, True])
def test_no_order_is_better_than_the_least(is_timed: bool) -> None:
    rng = random.Random(3)
    for _ in range(40):
        count = rng.randint(1, 5)
        seconds = np.array([rng.uniform(0.1, 3.0) for _ in range(count)])
        weights = np.array([rng.choice([1.0, 1.0, 4.0]) for _ in range(count)])
        release = np.array([rng.uniform(0.0, 4.0) if is_timed else 0.0 for _ in range(count)])
        due = release + np.array([rng.uniform(0.5, 6.0) for _ in range(count)])
        ends = [ends_of(order, release, seconds) for order in itertools.permutations(range(count))]
        best_s = min(float(each @ weights) for each in ends)
        assert least_ends_s(release, seconds, weights) <= best_s * (1 + 1e-9)
        assert least_lateness_s(release, seconds, due) <= min(float((each - due).max()) for each in ends) + 1e-9
        if not is_timed:
            most = max(float((each <= due) @ weights) for each in ends)
            assert most_in_time(seconds, due, weights) >= most
            assert least_ends_s(release, seconds, weights) == pytest.approx(best_s)
            in_time = most_on_time(np.argsort(due).tolist(), seconds.tolist(), due.tolist())
            assert sum(ends_of(in_time, release, seconds) <= due) == max(int((each <= due).sum()) for each in ends)
