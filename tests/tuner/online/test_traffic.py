import heapq
import math

import numpy as np
import pytest

from db.errors import UserError
from tests.tuner.atom import atom
from tests.tuner.online.arrivals import OVERLOADED_BY_SHORT_ROUNDS, stream
from tuner.online.driven import online_rounds
from tuner.online.settings import OnlineSettings
from tuner.online.to_come.outlook import Outlook
from tuner.online.to_come.steady_pace import SteadyPace
from tuner.online.to_come.traffic import IN_TURN, Traffic
from tuner.online.waiting import Waiting, WaitingOrder
from tuner.plan.plan import Request
from tuner.plan.stage_cost import Floats
from tuner.rounds.problem import Problem
from tuner.workload.objective import Objective


def watched(gaps: list[float], work_s: float) -> Traffic:
    """Traffic of requests alike with these times between them."""
    traffic, now = Traffic(), 0.0
    traffic.note(now, work_s)
    for gap_s in gaps:
        now += gap_s
        traffic.note(now, work_s)
    return traffic


def paced(stretch: float, pace_s: float = 0.0) -> SteadyPace:
    """A steady pace whose rounds take so many times the work in them."""
    one = np.ones(1)
    levels = watched([0.1] * 9, 0.01).levels(aging=IN_TURN)
    return SteadyPace.of(levels, one, round_s=pace_s * one, stretches=stretch * one, behind=1.0, horizon_s=1.0)


def outlook(traffic: Traffic, steady: SteadyPace, before_s: list[float], aging: float, behind: float = 0.0) -> Outlook:
    """Just after the latest arrival, with so much work before each level."""
    levels, waiting_s = traffic.levels(aging), before_s[-1]
    return Outlook.of(traffic, levels, steady, traffic.last_s, before_s=before_s, waiting_s=waiting_s, behind=behind)


def test_what_regular_arrivals_wait_is_counted_one_by_one() -> None:
    """A backlog of several prompts that falls by 0.02 s an arrival."""
    traffic = watched([0.1] * 400, 0.06)
    for busy_s in (0.05, 0.3, 0.5):
        waited, left_s = 0.0, busy_s - 0.1
        while left_s > 0.0:
            waited += left_s
            left_s -= 0.02
        to_come = outlook(traffic, paced(0.08 / 0.06), [busy_s], IN_TURN)
        assert to_come.cost_s(busy_s, 0.0) == pytest.approx(waited, rel=0.2, abs=1e-9)


def test_poisson_arrivals_have_the_value_function_of_their_queue() -> None:
    one = np.ones(1)
    calm = Outlook(rate=5.0 * one, load=0.6 * one, ahead=one, horizon_s=1e9)
    assert calm.cost_s(2.0, 0.0) == pytest.approx(5.0 * 2.0**2 / (2 * 0.4))
    overloaded = Outlook(rate=5.0 * one, load=1.5 * one, ahead=one, horizon_s=4.0)
    assert overloaded.cost_s(2.0, 0.0) == pytest.approx(5.0 * (2.0 * 4.0 + 0.5 * 4.0**2 / 2))


def test_arrivals_are_told_apart_by_their_variation() -> None:
    regular, bursty = watched([0.1] * 100, 0.05), watched([0.01, 0.01, 0.01, 0.37] * 25, 0.05)
    assert regular.gap_variation < 0.1 < 1.0 < bursty.gap_variation
    assert regular.gap_s == pytest.approx(bursty.gap_s)
    later_s = (outlook(each, paced(1.0), [0.08], IN_TURN).cost_s(0.08, 0.0) for each in (regular, bursty))
    assert next(later_s) == 0.0 < next(later_s)


def test_least_work_first_the_short_ones_to_come_wait_for_no_long_one() -> None:
    """Nine short prompts of ten: behind a long one that waits, only a long one to come does."""
    traffic, rng = Traffic(), np.random.default_rng(0)
    for now_s in rng.exponential(0.1, 200).cumsum().tolist():
        traffic.note(now_s, 0.5 if rng.random() < 0.1 else 0.01)
    levels = traffic.levels(aging=0.0)
    assert float(levels.upto[-1]) == pytest.approx(float(traffic.levels(IN_TURN).upto[0]))
    before_s = [0.5 if most_s > 0.4 else 0.0 for most_s in levels.most_s.tolist()]
    in_turn = outlook(traffic, paced(1.0), [0.5], IN_TURN).cost_s(0.5, 0.0)
    by_work = outlook(traffic, paced(1.0), before_s, 0.0).cost_s(0.5, 0.0)
    assert 0.0 < by_work < 0.3 * in_turn


def test_the_work_before_a_level_is_that_of_no_larger_rank() -> None:
    order = WaitingOrder()
    for index, work_s in enumerate((0.3, 0.1, 0.2, 0.2)):
        request = Request(id=str(index), prompt_tokens=100)
        order.insert(Waiting(index, request, 0, work_s=work_s, rank=work_s))
    assert order.work_before([0.05, 0.1, 0.2, math.inf]) == pytest.approx([0.0, 0.1, 0.5, 0.8])


def test_only_rounds_longer_than_the_steady_pace_delay_those_to_come() -> None:
    """They pass the stages behind as slowly, until the pipeline runs empty."""
    traffic = watched(np.random.default_rng(0).exponential(0.1, 400).tolist(), 0.06)
    to_come = outlook(traffic, paced(1.0, pace_s=0.02), [0.5], IN_TURN, behind=3.0)
    at_pace, below, above = (to_come.cost_s(0.5, 3.0 * pace_s) for pace_s in (0.02, 0.01, 0.03))
    assert at_pace == pytest.approx(below)
    until_s = 0.5 / (1.0 - 0.06 / traffic.gap_s)
    assert above - at_pace == pytest.approx(until_s / traffic.gap_s * 3.0 * 0.01)


@pytest.mark.parametrize("load", [0.5, 0.8, 0.95, 1.2])
@pytest.mark.parametrize("aging", [0.0, IN_TURN])
def test_the_steady_pace_is_the_best_of_a_queue_in_rounds_of_one_length(load: float, aging: float) -> None:
    """Rounds of m seconds that are a preemptive queue, which each request leaves (K - 1) m later; by simulation."""
    rng = np.random.default_rng(1)
    work_s = np.where(rng.random(2000) < 0.1, 0.4, 0.02)
    arrival_s = rng.exponential(float(work_s.mean()) / load, 2000).cumsum()
    traffic = Traffic()
    for now_s, seconds in zip(arrival_s[:100].tolist(), work_s[:100].tolist(), strict=True):
        traffic.note(now_s, seconds)
    round_s = 0.004 * 2.0 ** np.arange(7.0)
    stretches = round_s / (round_s - 0.002)
    horizon_s = float(arrival_s[-1] - arrival_s[0])
    levels = traffic.levels(aging)
    steady = SteadyPace.of(levels, round_s, round_s=round_s, stretches=stretches, behind=3.0, horizon_s=horizon_s)
    took_s = {
        pace_s: queue_s(arrival_s, stretch * work_s, is_by_work=not aging) + 3.0 * pace_s
        for pace_s, stretch in zip(round_s.tolist(), stretches.tolist(), strict=True)
    }
    assert took_s[steady.pace_s] <= 1.15 * min(took_s.values())


def queue_s(arrival_s: Floats, work_s: Floats, *, is_by_work: bool) -> float:
    """Mean time in a queue of one server, the least work first with preemption or in turn."""
    now_s, in_system_s, place = 0.0, 0.0, 0
    waiting: list[tuple[float, int, float]] = []
    while place < len(work_s) or waiting:
        next_s = float(arrival_s[place]) if place < len(work_s) else math.inf
        if waiting and now_s + waiting[0][2] <= next_s:
            _, index, left_s = heapq.heappop(waiting)
            now_s += left_s
            in_system_s += now_s - float(arrival_s[index])
            continue
        if waiting:
            key, index, left_s = waiting[0]
            heapq.heapreplace(waiting, (key, index, left_s - (next_s - now_s)))
        now_s = next_s
        heapq.heappush(waiting, (float(work_s[place]) if is_by_work else place, place, float(work_s[place])))
        place += 1
    return in_system_s / len(work_s)


@pytest.mark.parametrize(("tokens", "gap_s", "best_simple_s"), [(8192, 0.1, 0.3593), (16384, 0.25, 0.6266)])
def test_rounds_are_not_cut_so_short_that_the_pipeline_overloads(
    tokens: int, gap_s: float, best_simple_s: float
) -> None:
    """As it comes, without a look at the trace; cut for the latency of those that wait alone, the mean is twice it."""
    problem = Problem(
        cost=OVERLOADED_BY_SHORT_ROUNDS, requests=stream(tokens, gap_s, 40), objective=Objective.MEAN_TTFT
    )
    assert problem.evaluate(online_rounds(problem)).mean_ttft_s <= 1.05 * best_simple_s


@pytest.mark.parametrize("rate", [0.8, 1.1])
def test_long_prompts_that_wait_do_not_lengthen_the_rounds_of_all(rate: float) -> None:
    """Near saturation and over it, as it comes: about as good as the best rounds of one length for the trace."""
    rng = np.random.default_rng(0)
    lengths = np.where(rng.random(120) < 0.1, 32768, 2048)
    at_s = (rng.exponential(0.18 / rate, 120)).cumsum()
    rows = enumerate(zip(lengths.tolist(), at_s.tolist(), strict=True))
    requests = tuple(Request(id=str(i), prompt_tokens=length, arrival_s=now_s) for i, (length, now_s) in rows)
    problem = Problem(cost=atom(4), requests=requests, objective=Objective.MEAN_TTFT)
    as_it_comes, *paced = (
        problem.evaluate(online_rounds(problem, OnlineSettings(pace=pace_s))).mean_ttft_s
        for pace_s in (0.0, 0.12, 0.17, 0.24, 0.34, 0.5)
    )
    assert as_it_comes <= 1.1 * min(paced)


def test_rounds_grow_more_behind_a_queue_where_those_to_come_are_not_held_up_by_it() -> None:
    """Prompts alike at light load: the last percent, of several in a row, ends sooner in longer rounds."""
    times = np.cumsum(np.random.default_rng(5).exponential(0.6, 120)).tolist()
    requests = tuple(Request(id=f"r{i}", prompt_tokens=8192, arrival_s=at) for i, at in enumerate(times))
    problem = Problem(cost=atom(4), requests=requests, objective=Objective.MEAN_TTFT)
    usual, grown = (
        problem.evaluate(online_rounds(problem, OnlineSettings(aging=100.0, foresight=3.0, passing=passing)))
        for passing in (1.0, 0.0)
    )
    assert grown.p99_ttft_s < 0.99 * usual.p99_ttft_s


def test_settings_are_read_as_they_are_written() -> None:
    for settings in (
        OnlineSettings(aging=0.25, patience=1.5, foresight=3.0, pace=0.5),
        OnlineSettings(passing=0.0, makespan=1.0),
    ):
        assert OnlineSettings.parse(str(settings)) == settings
    assert str(OnlineSettings()) == "aging=0.01,foresight=0.5"
    assert OnlineSettings.parse("") == OnlineSettings()
    for wrong in ("aging", "ageing=1", "aging=x"):
        with pytest.raises(UserError, match="names of aging, patience, foresight, pace"):
            OnlineSettings.parse(wrong)
    with pytest.raises(UserError, match="foresight: -1"):
        OnlineSettings.parse("foresight=-1")
