"""Statistics and sampling of `profiler.measure.timing`."""

import math
import time

import numpy as np
import pytest
import torch

from profiler.measure.cpu_interference import CpuInterference
from profiler.measure.expected_time import expected_seconds
from profiler.measure.point_rows import rows_of
from profiler.measure.session import of_the_last
from profiler.measure.timing import (
    MAX_SAMPLES,
    MIN_SAMPLES,
    OWN_LOAD_S,
    RECORDED_LAYER_S,
    Prepared,
    Samples,
    Sampling,
    plan_own_load,
    plan_sampling,
    summarize,
    take_samples,
)
from profiler.points.point import RANK_LAYER, Op, Point
from profiler.points.rank_groups import RankGroups

CPU = torch.device("cpu")


def samples(*us: float) -> Samples:
    return Samples(list(us), [False] * len(us))


def test_statistics_are_those_of_the_samples() -> None:
    us = [5.0, 1.0, 3.0, 2.0, 4.0]
    timing = summarize(samples(*us))
    assert (timing.num_samples, timing.median_us, timing.min_us) == (5, 3.0, 1.0)
    assert timing.p10_us == pytest.approx(1.4) and timing.p90_us == pytest.approx(4.6)
    assert timing.std_us == pytest.approx(math.sqrt(2))
    assert timing.spread == pytest.approx(3.2 / 3) and timing.noisy


def test_equal_samples_are_not_noisy() -> None:
    timing = summarize(samples(7.0, 7.0, 7.0))
    assert timing.spread == 0.0 and timing.std_us == 0.0 and not timing.noisy


def test_disturbed_samples_are_left_out_while_enough_others_remain() -> None:
    timing = summarize(Samples([1.0, 1.0, 1.0, 9.0], [False, False, False, True]))
    assert timing.num_samples == 3 and timing.median_us == 1.0 and not timing.noisy
    assert not timing.disturbed


def test_a_busy_machine_makes_a_point_noisy_though_its_samples_agree() -> None:
    timing = summarize(Samples([9.0, 9.0, 9.0, 9.0], [True, True, True, False]))
    assert timing.num_samples == 4 and timing.spread == 0.0 and timing.noisy


@pytest.mark.parametrize("call_s", [1e-6, 1e-4, 1e-2, 0.5, 30.0])
def test_cheap_calls_get_more_samples_than_dear_ones_within_their_time(call_s: float) -> None:
    sampling = plan_sampling(call_s, device_type="cpu", budget_s=0.4)
    sample_s = sampling.inner_repeats * call_s
    assert 1 <= sampling.num_samples <= MAX_SAMPLES
    assert sample_s >= 2e-3 * 0.999
    if sample_s <= 0.4 / MIN_SAMPLES:
        assert sampling.num_samples >= MIN_SAMPLES
        assert sampling.num_samples * sample_s <= 0.4 or sampling.num_samples == MIN_SAMPLES
    else:
        assert sampling.num_samples * sample_s <= 0.8 or sampling.num_samples == 1


def test_of_ranks_in_step_the_one_that_waited_for_none_counts_in_each_group() -> None:
    us = torch.tensor([[10.0, 30.0], [20.0, 21.0], [50.0, 40.0], [45.0, 60.0]])
    pairs, apart = RankGroups(2), RankGroups(2, 2)
    assert of_the_last(us, pairs.of(4)).tolist() == [[10.0, 21.0], [10.0, 21.0], [45.0, 40.0], [45.0, 40.0]]
    assert of_the_last(us, apart.of(4)).tolist() == [[10.0, 30.0], [20.0, 21.0], [10.0, 30.0], [20.0, 21.0]]
    assert of_the_last(us, RankGroups(4).of(4)).tolist() == [[10.0, 21.0]] * 4


def test_each_card_has_a_row_of_its_own_beside_that_of_the_slowest() -> None:
    point = Point(op=Op.LAYER, dtype="bfloat16", shape={"chunk": 512, "context": 0}, busy_ranks=2)
    ranks = (samples(10.0, 11.0, 12.0), samples(20.0, 21.0, 22.0))
    slowest = summarize(ranks[1])
    row, first, second = rows_of(point, ranks, slowest, own_load=True)
    assert (row.key, row.median_us) == (point.key, 21.0)
    assert [(one.op, one.shape["rank"], one.median_us) for one in (first, second)] == [
        (RANK_LAYER, 0, 11.0),
        (RANK_LAYER, 1, 21.0),
    ]
    assert len(rows_of(point, ranks, slowest, own_load=False)) == len(rows_of(point, ranks[:1], slowest, own_load=True))


def test_a_layer_on_a_card_is_expected_to_take_its_settling_too() -> None:
    layer, product = (Point(op=op, dtype="bfloat16", shape={}, flops=3e11) for op in (Op.LAYER, Op.MATMUL))
    more_s = expected_seconds(layer, "cuda", 1) - expected_seconds(product, "cuda", 1)
    assert more_s > plan_own_load(1e-3).settle_s
    assert expected_seconds(layer, "cpu", 1) == expected_seconds(product, "cpu", 1)


@pytest.mark.parametrize("call_s", [1e-5, 3e-4, 5e-3, 0.1, 0.5])
def test_under_its_own_load_work_settles_and_is_sampled_for_as_long_whatever_it_takes(call_s: float) -> None:
    sampling = plan_own_load(call_s)
    sampled_s = sampling.num_samples * sampling.inner_repeats * call_s
    assert sampling.settle_s > 0 and MIN_SAMPLES <= sampling.num_samples <= MAX_SAMPLES
    assert 0.75 * OWN_LOAD_S <= sampled_s <= 1.05 * OWN_LOAD_S or sampling.num_samples == MIN_SAMPLES
    assert sampling.recorded == (call_s < RECORDED_LAYER_S)


def test_a_collective_between_other_work_is_sampled_one_by_one() -> None:
    between = plan_sampling(1e-5, device_type="cuda", budget_s=0.2, waits=True, in_step=True)
    assert between.inner_repeats == 1 < plan_sampling(1e-5, device_type="cuda", budget_s=0.2, waits=True).inner_repeats


def test_calls_are_numbered_without_a_gap_and_a_sample_is_the_mean_of_its_calls() -> None:
    calls: list[int] = []
    finished: list[int] = []
    prepared = Prepared(run=calls.append, finish=lambda: finished.append(len(calls)))
    taken = take_samples(prepared, Sampling(warmup_calls=2, num_samples=3, inner_repeats=4), CPU)
    assert calls == list(range(14)) and finished == [14]
    assert len(taken.us) == 3 and all(us > 0 for us in taken.us)


def test_units_divide_the_time_of_a_call() -> None:
    sampling = Sampling(warmup_calls=0, num_samples=5, inner_repeats=1)
    whole = take_samples(Prepared(run=lambda _call: time.sleep(0.004), waits=True), sampling, CPU)
    halves = take_samples(Prepared(run=lambda _call: time.sleep(0.004), waits=True, num_units=2), sampling, CPU)
    assert min(whole.us) >= 4000 and 2000 <= min(halves.us) < min(whole.us)


def test_work_that_varies_is_flagged() -> None:
    prepared = Prepared(run=lambda call: time.sleep(0.001 if call % 2 else 0.02), waits=True)
    assert summarize(take_samples(prepared, Sampling(warmup_calls=0, num_samples=6, inner_repeats=1), CPU)).noisy


def test_a_thread_off_its_core_is_told_from_one_that_waits() -> None:
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sampling = Sampling(warmup_calls=0, num_samples=3, inner_repeats=1)
        off = take_samples(Prepared(run=lambda _call: time.sleep(0.01)), sampling, CPU)
        waiting = take_samples(Prepared(run=lambda _call: time.sleep(0.01), waits=True), sampling, CPU)
    finally:
        torch.set_num_threads(torch_threads)
    assert all(off.disturbed) and max(off.us) < 10_000
    assert not any(waiting.disturbed) and min(waiting.us) >= 10_000


def test_samples_beside_a_slow_moment_are_disturbed() -> None:
    answers = iter([False, False, True, False, False])
    sampling = Sampling(warmup_calls=1, num_samples=4, inner_repeats=1)
    work = Prepared(run=lambda _call: time.sleep(0.001), waits=True)
    taken = take_samples(work, sampling, CPU, is_slow=lambda: next(answers))
    assert taken.disturbed == [False, True, True, False]
    assert summarize(taken).disturbed and not summarize(taken + taken).disturbed


def test_the_probe_calls_a_core_slow_that_takes_longer_than_usual() -> None:
    probe = CpuInterference()
    assert 0 < probe.usual_s < 1
    probe.usual_s = 1e9
    assert not probe()
    probe.usual_s = 1e-9
    assert probe()


def test_percentiles_interpolate_as_numpy_does() -> None:
    us = list(np.random.default_rng(0).lognormal(size=17))
    timing = summarize(samples(*us))
    assert [timing.p10_us, timing.median_us, timing.p90_us] == pytest.approx(np.percentile(us, (10, 50, 90)))
