"""The running order under a limit on waiting: as short a mean as it allows, and nothing waits for longer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.online.driven import online_rounds
from tuner.online.patience import running_order
from tuner.online.settings import OnlineSettings
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.plan.stage_cost import StageCost
from tuner.rounds.problem import Problem
from tuner.workload.objective import Objective


@settings(max_examples=200, deadline=None)
@given(
    work_s=st.lists(st.floats(0.1, 10.0), min_size=1, max_size=40),
    spare=st.lists(st.floats(0.0, 20.0), min_size=40, max_size=40),
)
def test_none_that_would_be_in_time_is_late(work_s: list[float], spare: list[float]) -> None:
    as_they_came = list(itertools.accumulate(work_s))
    deadlines = [end_s + more_s for end_s, more_s in zip(as_they_came, spare, strict=False)]
    deadlines = list(itertools.accumulate(deadlines, max))
    order = running_order(work_s, work_s, deadlines)
    assert sorted(order) == list(range(len(work_s)))
    ends_s = dict(zip(order, itertools.accumulate(work_s[i] for i in order), strict=True))
    assert all(ends_s[i] <= deadlines[i] + 1e-9 for i in order)
    free = running_order(work_s, work_s, [np.inf] * len(work_s))
    assert free == sorted(range(len(work_s)), key=lambda i: work_s[i])


@settings(max_examples=100, deadline=None)
@given(
    work_s=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    spare=st.lists(st.integers(0, 20), min_size=6, max_size=6),
)
def test_no_order_that_is_in_time_has_a_smaller_sum_of_ends(work_s: list[int], spare: list[int]) -> None:
    came = itertools.accumulate(work_s)
    deadlines = list(itertools.accumulate((end + more for end, more in zip(came, spare, strict=False)), max))

    def ends(order: Iterable[int]) -> dict[int, int]:
        order = list(order)
        return dict(zip(order, itertools.accumulate(work_s[i] for i in order), strict=True))

    every = map(ends, itertools.permutations(range(len(work_s))))
    least = min(sum(each.values()) for each in every if all(end <= deadlines[i] for i, end in each.items()))
    assert sum(ends(running_order(work_s, work_s, deadlines)).values()) == least


def test_patience_trades_the_mean_for_the_longest_wait() -> None:
    """Long prompts among short ones, faster than they can run: no limit makes long ones wait, one of 0.7 s is kept."""
    stage = StageCost(token_count=(0, 1000), token_seconds=(0.0, 0.01), round_overhead_s=2e-3)
    requests = tuple(
        Request(id=str(i), prompt_tokens=16384 if i % 6 == 0 else 1024, arrival_s=0.03 * i) for i in range(60)
    )
    problem = Problem(cost=CostModel(stages=(stage, stage)), requests=requests, objective=Objective.MEAN_TTFT)
    shortest, patient, in_turn = (
        problem.evaluate(online_rounds(problem, settings))
        for settings in (OnlineSettings(aging=0.0), OnlineSettings(patience=0.7), OnlineSettings(aging=100.0))
    )
    assert max(patient.ttft_s) < 0.72 < max(shortest.ttft_s)
    assert shortest.mean_ttft_s < patient.mean_ttft_s < in_turn.mean_ttft_s
