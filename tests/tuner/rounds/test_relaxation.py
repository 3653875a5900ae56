"""What caps are left out by is below what they sum to."""

from __future__ import annotations

import numpy as np
import pytest

from tests.tuner.oracle import random_instance
from tuner.rounds.relaxation import Work, envelopes, least_sum, least_sums, quick_sums


@pytest.mark.parametrize("seed", range(20))
def test_quick_sums_are_no_more_than_the_least(seed: int) -> None:
    instance = random_instance(seed, most_units=8)
    work = Work.of(instance.requests, None)
    for line in envelopes(instance.cost.stages, work):
        caps_s = least_sum(line, work) * np.geomspace(1e-3, 2.0, 50)
        quick, least = quick_sums(line, work, caps_s), least_sums(line, work, caps_s)[0]
        assert (quick <= least).all()
        assert quick[-1] > 0.0 and np.isinf(quick[np.isinf(least) & (caps_s < line.round_s)]).all()
