import math

import pytest

from db.errors import UserError
from tests.tuner.online.arrivals import OVERLOADED_BY_SHORT_ROUNDS, stream
from tuner.online.driven import online_rounds
from tuner.online.settings import OnlineSettings
from tuner.online.traffic import ROUNDS_A_REQUEST, Outlook, Traffic
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


def test_what_regular_arrivals_wait_is_counted_one_by_one() -> None:
    """A backlog of several prompts that falls by 0.02 s an arrival."""
    traffic = watched([0.1] * 400, 0.06)
    outlook = Outlook.of(traffic, traffic.last_s, load=traffic.load([0.02] * len(ROUNDS_A_REQUEST), 0))
    assert outlook.load == pytest.approx(0.8, abs=0.02)
    for busy_s in (0.05, 0.3, 0.5):
        waited, left_s = 0.0, busy_s - 0.1
        while left_s > 0.0:
            waited += left_s
            left_s -= 0.02
        assert outlook.cost_s(busy_s) == pytest.approx(waited, rel=0.2, abs=1e-9)


def test_poisson_arrivals_have_the_value_function_of_their_queue() -> None:
    outlook = Outlook(rate=5.0, load=0.6, horizon_s=math.inf)
    assert outlook.cost_s(2.0) == pytest.approx(5.0 * 2.0**2 / (2 * 0.4))
    overloaded = Outlook(rate=5.0, load=1.5, horizon_s=4.0)
    assert overloaded.cost_s(2.0) == pytest.approx(5.0 * (2.0 * 4.0 + 0.5 * 4.0**2 / 2))


def test_arrivals_are_told_apart_by_their_variation() -> None:
    regular, bursty = watched([0.1] * 100, 0.05), watched([0.01, 0.01, 0.01, 0.37] * 25, 0.05)
    assert regular.gap_variation < 0.1 < 1.0 < bursty.gap_variation
    assert regular.gap_s == pytest.approx(bursty.gap_s)
    later_s = (Outlook.of(each, each.last_s, load=0.5).cost_s(0.08) for each in (regular, bursty))
    assert next(later_s) == 0.0 < next(later_s)


@pytest.mark.parametrize(("tokens", "gap_s", "best_simple_s"), [(8192, 0.1, 0.3593), (16384, 0.25, 0.6266)])
def test_rounds_are_not_cut_so_short_that_the_pipeline_overloads(
    tokens: int, gap_s: float, best_simple_s: float
) -> None:
    """As it comes, without a look at the trace; cut for the latency of those that wait alone, the mean is twice it."""
    problem = Problem(
        cost=OVERLOADED_BY_SHORT_ROUNDS, requests=stream(tokens, gap_s, 40), objective=Objective.MEAN_TTFT
    )
    assert problem.evaluate(online_rounds(problem)).mean_ttft_s <= 1.05 * best_simple_s


def test_settings_are_read_as_they_are_written() -> None:
    settings = OnlineSettings(aging=0.25, patience=1.5, foresight=3.0, pace=0.5)
    assert OnlineSettings.parse(str(settings)) == settings
    assert OnlineSettings.parse("") == OnlineSettings()
    for wrong in ("aging", "ageing=1", "aging=x"):
        with pytest.raises(UserError, match="names of aging, patience, foresight, pace"):
            OnlineSettings.parse(wrong)
    with pytest.raises(UserError, match="foresight: -1"):
        OnlineSettings.parse("foresight=-1")
