from __future__ import annotations

from dataclasses import replace

import pytest

from db.measurements import Measurement
from profiler.point import RANK_LAYER, Op, Point
from profiler.session import rank_row
from profiler.timing import Samples, summarize
from tests.tuner.measured import SHAPE, Machine, measure
from tuner.fit import LayerCosts, fit_layer_costs
from tuner.pace import LEAST_LAYERS, Pace, fit_pace
from tuner.rows import RankWork

COUNTED = (1024, 2048, False)  # a round of one chunk


def with_ranks(rows: list[Measurement], *factors: float, layers: int = 99) -> list[Measurement]:
    """The rows, and those of so many ranks for the first layers, as the profiler writes them."""
    found = []
    for row in [row for row in rows if row.op == "layer"][:layers]:
        point = Point(op=Op.LAYER, dtype=row.dtype, shape=row.shape, busy_ranks=row.busy_ranks, variant=row.variant)
        found += [
            rank_row(point, rank, summarize(Samples([factor * row.median_us] * 3, [False] * 3)))
            for rank, factor in enumerate(factors)
        ]
    return rows + found


def fit(rows: list[Measurement], tp_size: int = 1) -> LayerCosts:
    return fit_layer_costs(rows, RankWork(shape=SHAPE, dtype="float32", tp_size=tp_size), busy_ranks=2)


def test_a_stage_takes_as_long_as_its_own_card() -> None:
    rows = measure(Machine())
    alike, differing = fit(rows), fit(with_ranks(rows, 1.0, 0.95))
    for stage, factor in enumerate((1.0, 0.95)):
        told, before = (costs.cost_model((8, 8)).stage_seconds(stage, [COUNTED]) for costs in (differing, alike))
        assert told == pytest.approx(factor * before)
    assert alike.pace == Pace()


def test_a_group_goes_at_the_pace_of_its_slowest() -> None:
    pace = Pace((0.9, 0.95, 1.0, 0.92))
    assert [pace.of_stage(stage, 2) for stage in (0, 1)] == [0.95, 1.0]
    assert pace.of_stage(0, 1) == 0.9
    assert pace.of_stage(4, 1) == pace.of_stage(2, 2) == pace.of_stage(0, 8) == 1.0  # ranks that were not measured


def test_one_layer_that_was_disturbed_does_not_count() -> None:
    rows = with_ranks(measure(Machine()), 1.0, 0.95)
    layers, of_ranks = ([row for row in rows if row.op == op] for op in ("layer", RANK_LAYER))
    slow = of_ranks[1]
    of_ranks[1] = replace(slow, median_us=3 * slow.median_us, p90_us=3 * slow.p90_us)
    assert fit_pace(layers, of_ranks).factors == pytest.approx((1.0, 0.95))


@pytest.mark.parametrize("layers", [0, LEAST_LAYERS - 1])
def test_few_layers_tell_nothing(layers: int) -> None:
    assert fit(with_ranks(measure(Machine()), 1.0, 0.9, layers=layers)).pace == Pace()
