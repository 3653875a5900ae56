"""Answers decoded beside prefill: by hand, in the drivers' own time, and under limits of TPOT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tuner.strategies import batches, cost_models, windows
from tuner.online.driven import Driven
from tuner.online.queue import FirstComeQueue, Scheduler, drive
from tuner.online.settings import AS_IT_COMES, OnlineSettings
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Chunk, Request, Round, check_rounds
from tuner.plan.stage_cost import PairAttention, StageCost
from tuner.policies.arrivals import BatchByBatch
from tuner.policies.fixed import gpipe_rounds
from tuner.replays.comparison import replay
from tuner.rounds.problem import Problem
from tuner.serving.answers import Beside
from tuner.workload.objective import Objective

STAGE = StageCost(
    token_count=(0, 1000),
    token_seconds=(0.0, 1.0),
    attention=PairAttention(context_token_s=1e-5),
    round_overhead_s=0.01,
)


def test_by_hand_one_answer_rides_in_a_round_of_another_prompt() -> None:
    """Two stages. A's second token rides with B's only chunk, its third alone."""
    first_s = STAGE.seconds([(100, 0, True)])
    requests = (
        Request(id="a", prompt_tokens=100, output_tokens=3),
        Request(id="b", prompt_tokens=500, arrival_s=2 * first_s),
    )
    problem = Problem(cost=CostModel(stages=(STAGE, STAGE)), requests=requests)
    rounds = [(Chunk(0, 0, 100),), (Chunk(1, 0, 500),)]
    evaluation = problem.evaluate(rounds)
    beside_s = 0.01 + 0.501 + 100 * 1e-5  # 501 rows; the decoded one reads A's 100 tokens
    alone_s = 0.01 + 0.001 + 101 * 1e-5
    assert evaluation.ttft_s == pytest.approx((2 * first_s, 2 * beside_s))
    assert evaluation.tpot_s == pytest.approx(((2 * beside_s + 2 * alone_s) / 2, 0.0))
    assert evaluation.round_s == pytest.approx(np.array([[first_s] * 2, [beside_s] * 2]))
    on_time = replace(requests[0], sla_tpot_s=0.8), replace(requests[1], sla_ttft_s=1.1)
    late = replace(requests[0], sla_tpot_s=0.4), on_time[1]
    assert [replace(problem, requests=each).evaluate(rounds).sla_weight for each in (on_time, late)] == [1.0, 0.5]


class _Watched:
    """A scheduler whose rounds' times are noted."""

    def __init__(self, inner: Scheduler) -> None:
        self.inner, self.times = inner, list[float]()

    @property
    def has_work(self) -> bool:
        return self.inner.has_work

    def add(self, index: int, now_s: float) -> None:
        self.inner.add(index, now_s)

    def next_round(self, now_s: float, beside: Beside) -> Round:
        chunks = self.inner.next_round(now_s, beside)
        if chunks:
            self.times.append(now_s)
        return chunks


SCHEDULERS: list[Callable[[Problem], Scheduler]] = [
    lambda problem: FirstComeQueue(problem, 512, lambda index, start, left, room, first: min(left, room)),
    lambda problem: BatchByBatch(problem, gpipe_rounds),
    lambda problem: Driven(problem, AS_IT_COMES),
    lambda problem: Driven(problem, OnlineSettings(patience=0.5)),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    cost=cost_models(max_stages=4),
    requests=batches(),
    window=windows,
    outputs=st.lists(st.integers(1, 6), min_size=8, max_size=8),
    limit_s=st.sampled_from([None, 0.01, 0.3]),
    scheduler=st.sampled_from(SCHEDULERS),
)
def test_rounds_are_judged_at_the_times_at_which_they_were_decided(
    cost: CostModel,
    requests: list[Request],
    window: int | None,
    outputs: list[int],
    limit_s: float | None,
    scheduler: Callable[[Problem], Scheduler],
) -> None:
    requests = [
        replace(one, output_tokens=outputs[i % len(outputs)], sla_tpot_s=limit_s) for i, one in enumerate(requests)
    ]
    problem = Problem(cost=cost, requests=tuple(requests), window=window, chunk_multiple=128)
    watched = _Watched(scheduler(problem))
    rounds = drive(problem, watched, is_timed=True)
    check_rounds(requests, rounds)
    evaluation = problem.evaluate(rounds)
    assert evaluation.timeline.start_s[:, 0] == pytest.approx(watched.times, abs=1e-6)
    assert all(seconds < np.inf for seconds in evaluation.ttft_s)
    for seconds, one in zip(evaluation.tpot_s, requests, strict=False):
        assert 0.0 <= seconds < np.inf if one.output_tokens > 1 else seconds == 0.0


def test_the_online_planner_leaves_room_for_the_tokens_beside() -> None:
    """Whole prompts miss the limit that rounds made for it keep, and no decoding costs as much as it does."""
    stage = replace(
        STAGE, token_seconds=(0.0, 0.01), round_overhead_s=0.002, attention=PairAttention(context_token_s=1e-8)
    )
    cost = CostModel(stages=(stage,)).for_pp_size(4)
    requests = [
        Request(id=str(i), prompt_tokens=8192, arrival_s=0.15 * i, output_tokens=40, sla_tpot_s=0.04) for i in range(24)
    ]
    whole = replay(cost, requests, policy="gpipe", objective=Objective.SLA).evaluation
    ours = replay(cost, requests, policy="joint", objective=Objective.SLA).evaluation
    assert whole.sla_weight < 0.5
    assert ours.sla_weight == 1.0
    free = replay(cost, [replace(one, output_tokens=1) for one in requests], policy="joint").evaluation
    assert not free.tpot_s
    assert free.mean_ttft_s < ours.mean_ttft_s
