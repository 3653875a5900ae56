import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tuner.atom import atom
from tests.tuner.online.arrivals import stream
from tests.tuner.strategies import batches, cost_models, windows
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Chunk, Request
from tuner.plan.stage_cost import StageCost, scaled_stage
from tuner.plan.stage_order import StageOrder
from tuner.plan.task_order import task_order
from tuner.policies.fixed import fixed_rounds
from tuner.recurrence.timeline import simulate
from tuner.rounds.problem import Problem
from tuner.rounds.schedule import evaluate
from tuner.serving.clock import Clock
from tuner.workload.objective import Objective


def recurrence(
    stage_s: list[list[float]], hop_s: list[float], window: int | None, return_s: float, ready_s: list[float]
) -> list[list[float]]:
    """The recurrence as design.md writes it, term by term."""
    finish: list[list[float]] = []
    for i, row in enumerate(stage_s):
        done: list[float] = []
        for k, seconds in enumerate(row):
            start = ready_s[i] if k == 0 else done[k - 1] + hop_s[i]
            if i:
                start = max(start, finish[i - 1][k])
            if k == 0 and window is not None and i >= window:
                start = max(start, finish[i - window][-1] + return_s)
            done.append(start + seconds)
        finish.append(done)
    return finish


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_simulated_time_is_the_recurrence(data: st.DataObject) -> None:
    num_rounds, pp_size = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 5))
    numbers = st.floats(0.0, 10.0)
    column = st.lists(numbers, min_size=num_rounds, max_size=num_rounds)
    if data.draw(st.booleans()):  # equal stages have a closed form
        stage_s = [[seconds] * pp_size for seconds in data.draw(column)]
    else:
        stage_s = [data.draw(st.lists(numbers, min_size=pp_size, max_size=pp_size)) for _ in range(num_rounds)]
    hop_s = data.draw(st.one_of(st.just([0.0] * num_rounds), column))
    ready_s = data.draw(st.one_of(st.just([0.0] * num_rounds), column))
    window = data.draw(st.one_of(st.none(), st.integers(1, 6)))
    return_s = data.draw(st.sampled_from([0.0, 1.5]))
    timeline = simulate(np.array(stage_s), np.array(hop_s), window, return_s, np.array(ready_s))
    expected = np.array(recurrence(stage_s, hop_s, window, return_s, ready_s))
    assert timeline.finish_s == pytest.approx(expected, abs=1e-9)
    assert timeline.start_s == pytest.approx(expected - np.array(stage_s), abs=1e-9)
    assert timeline.makespan_s == pytest.approx(expected[-1][-1], abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_rounds_run_on_from_stages_that_are_still_busy(data: st.DataObject) -> None:
    """Cut anywhere, the second part starts when the first leaves each stage."""
    num_rounds, pp_size = data.draw(st.integers(2, 10)), data.draw(st.integers(1, 5))
    row = st.lists(st.floats(0.0, 10.0), min_size=pp_size, max_size=pp_size)
    stage_s = np.array([data.draw(row) for _ in range(num_rounds)])
    cut = data.draw(st.integers(1, num_rounds - 1))
    whole = simulate(stage_s).finish_s
    rest = simulate(stage_s[cut:], free_s=whole[cut - 1]).finish_s
    assert rest == pytest.approx(whole[cut:], abs=1e-9)


def test_the_window_of_uneven_rounds_costs_what_the_field_found() -> None:
    """Alternating 600 and 100 ms rounds on 4 stages: unlimited 29.8 s, W = 5 35.0 s, W = 4 48.8 s (80 rounds)."""
    stage_s = np.repeat(np.array([0.6, 0.1] * 40)[:, None], 4, axis=1)
    assert [simulate(stage_s, window=window).makespan_s for window in (None, 5, 4)] == pytest.approx([29.8, 35.0, 48.8])


@settings(max_examples=40, deadline=None)
@given(cost=cost_models(), requests=batches(), window=windows)
def test_evaluation_agrees_with_the_clock(cost: CostModel, requests: list[Request], window: int | None) -> None:
    problem = Problem(cost=cost, requests=tuple(requests), window=window, chunk_multiple=256)
    rounds = fixed_rounds(problem, 1024)
    evaluation = problem.evaluate(rounds)
    clock = Clock(cost, window)
    for chunks in rounds:
        ready_s = max(requests[chunk.request].arrival_s for chunk in chunks)
        clock.run(chunks, requests, ready_s)
    assert clock.finish_s[-1] == pytest.approx(evaluation.makespan_s)
    assert evaluation.makespan_s == pytest.approx(
        max(ttft + r.arrival_s for ttft, r in zip(evaluation.ttft_s, requests, strict=True))
    )
    assert 0.0 <= evaluation.bubble_share <= 1.0


@settings(max_examples=40, deadline=None)
@given(cost=cost_models(), requests=batches(), window=windows, extra=st.integers(1, 500))
def test_what_must_not_shorten_does_not(
    cost: CostModel, requests: list[Request], window: int | None, extra: int
) -> None:
    """With the same rounds: one more stage, a longer last chunk, a narrower window, a later arrival."""
    problem = Problem(cost=cost, requests=tuple(requests), window=window, chunk_multiple=256)
    rounds = fixed_rounds(problem, 1024)
    makespan = problem.evaluate(rounds).makespan_s * (1 - 1e-12)
    deeper = CostModel(
        stages=(*cost.stages, cost.stages[-1]),
        hop_latency_s=cost.hop_latency_s,
        hop_token_s=cost.hop_token_s,
        return_s=cost.return_s,
    )
    assert evaluate(deeper, requests, rounds, window).makespan_s >= makespan
    if window is not None and window > 1:
        assert evaluate(cost, requests, rounds, window - 1).makespan_s >= makespan
    assert evaluate(cost, requests, rounds, 1).makespan_s >= makespan
    last = rounds[-1][-1]
    request = requests[last.request]
    if last.end == request.prompt_tokens:
        grown = Request(id="x", prompt_tokens=request.prompt_tokens + extra, cached_tokens=request.cached_tokens)
        longer = [*requests]
        longer[last.request] = grown
        more = [*rounds[:-1], (*rounds[-1][:-1], Chunk(last.request, last.start, last.tokens + extra))]
        with_arrival = [
            Request(id=r.id, prompt_tokens=r.prompt_tokens, cached_tokens=r.cached_tokens) for r in requests
        ]
        longer[last.request] = grown
        assert evaluate(
            cost, [grown if i == last.request else r for i, r in enumerate(with_arrival)], more, window
        ).makespan_s >= evaluate(cost, with_arrival, rounds, window).makespan_s * (1 - 1e-12)


def test_objectives_order_evaluations() -> None:
    cost = CostModel(stages=(StageCost(token_count=(0, 1), token_seconds=(0.0, 1.0)),))
    requests = [
        Request(id="long", prompt_tokens=10, sla_ttft_s=10.0),
        Request(id="short", prompt_tokens=1, weight=3.0, sla_ttft_s=1.0),
    ]
    long_first = evaluate(cost, requests, [(Chunk(0, 0, 10),), (Chunk(1, 0, 1),)])
    short_first = evaluate(cost, requests, [(Chunk(1, 0, 1),), (Chunk(0, 0, 10),)])
    assert long_first.ttft_s == (10.0, 11.0)
    assert short_first.mean_ttft_s == pytest.approx((11.0 + 3 * 1.0) / 4)
    assert (long_first.num_sla_met, short_first.num_sla_met) == (1, 1)
    assert short_first.score(Objective.MEAN_TTFT) < long_first.score(Objective.MEAN_TTFT)
    assert short_first.score(Objective.SLA) < long_first.score(Objective.SLA)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_time_of_several_groups_a_stage_is_the_recurrence_of_tasks(data: st.DataObject) -> None:
    """Each task at the least time that all its waits allow: started anywhere earlier it would break one."""
    num_rounds, pp_size, passes = (data.draw(st.integers(1, most)) for most in (9, 4, 3))
    stage_order = data.draw(st.sampled_from(StageOrder))
    window = data.draw(st.one_of(st.none(), st.integers(1, 6)))
    row = st.lists(st.floats(0.0, 10.0), min_size=pp_size * passes, max_size=pp_size * passes)
    seconds = [data.draw(row) for _ in range(num_rounds)]
    hop, ready = ([data.draw(st.floats(0.0, 5.0)) for _ in range(num_rounds)] for _ in range(2))
    order = task_order(num_rounds, pp_size, passes, stage_order, window)
    timeline = simulate(np.array(seconds), np.array(hop), window, 1.5, np.array(ready), order=order)
    start, finish = timeline.start_s, timeline.finish_s
    for stage in range(pp_size):
        before = 0.0
        for i, group in order.of_stage(stage):
            waits = [before]
            if group:
                is_near = order.stages[group - 1] == stage
                waits.append(finish[i, group - 1] + (0.0 if is_near else hop[i]))
            else:
                waits.append(ready[i])
                if window is not None and i >= window:
                    waits.append(finish[i - window, -1] + 1.5)
            assert start[i, group] == pytest.approx(max(waits), abs=1e-9)
            before = finish[i, group]
    assert timeline.makespan_s == pytest.approx(finish.max(), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_groups_of_a_stage_take_what_has_come(data: st.DataObject) -> None:
    """Nothing waits but for what is there: each task starts at the end of a wait, and none overtakes in its group."""
    num_rounds, pp_size, passes = (
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(2, 3)),
    )
    stage_order = data.draw(st.sampled_from(StageOrder))
    window = data.draw(st.one_of(st.none(), st.integers(1, 6)))
    row = st.lists(st.floats(0.1, 10.0), min_size=pp_size * passes, max_size=pp_size * passes)
    seconds = [data.draw(row) for _ in range(num_rounds)]
    ready = np.sort(np.array([data.draw(st.floats(0.0, 60.0)) for _ in range(num_rounds)]))
    order = task_order(num_rounds, pp_size, passes, stage_order, window)
    timeline = simulate(np.array(seconds), None, window, 1.5, ready, order=order, in_order=False)
    start, finish = timeline.start_s, timeline.finish_s
    assert (np.diff(start, axis=0) > 0.0).all()
    for i in range(num_rounds):
        for group in range(pp_size * passes):
            there = finish[i, group - 1] if group else ready[i]
            if not group and window is not None and i >= window:
                there = max(there, finish[i - window, -1] + 1.5)
            own = [g for g in range(pp_size * passes) if order.stages[g] == order.stages[group]]
            ends = finish[:, own].ravel()
            assert start[i, group] >= there - 1e-9
            assert np.isclose(start[i, group], there) or np.isclose(ends, start[i, group]).any()
            # The stage is busy from when the task is there until it starts.
            busy = np.clip(np.minimum(ends, start[i, group]) - np.maximum(start[:, own].ravel(), there), 0.0, None)
            assert busy.sum() == pytest.approx(start[i, group] - there, abs=1e-6)


@pytest.mark.parametrize("stage_order", list(StageOrder))
def test_with_groups_of_layers_the_first_token_comes_no_later_when_fewer_requests_come(stage_order: StageOrder) -> None:
    half = scaled_stage(atom(4).kinds[0], 0.5)
    cost = CostModel(stages=(half,) * 8, virtual_stages=2, stage_order=stage_order)
    means = []
    for gap_s in (0.1, 0.2, 0.4, 0.8, 8.0):
        problem = Problem(cost=cost, requests=stream(8192, gap_s, 24))
        means.append(round(problem.evaluate(fixed_rounds(problem, 8192)).mean_ttft_s, 9))
    assert means == sorted(means, reverse=True)
    alone = Problem(cost=cost, requests=stream(8192, 0.0, 1))
    assert means[-1] == pytest.approx(alone.evaluate(fixed_rounds(alone, 8192)).mean_ttft_s)
