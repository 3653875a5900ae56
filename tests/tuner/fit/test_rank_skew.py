from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from db.rows.measurements import Measurement
from profiler.points.point import RANK_LAYER
from tests.tuner.measured import SHAPE, Machine, measure, with_ranks
from tuner.fit.layer_costs import LayerCosts
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rank_skew import LEAST_LAYERS, RankSkew, fit_rank_skew
from tuner.fit.rows import RankWork

COUNTED = (1024, 2048, False)  # a round of one chunk


def fit(rows: list[Measurement], tp_size: int = 1) -> LayerCosts:
    return fit_layer_costs(rows, RankWork(shape=SHAPE, dtype="float32", tp_size=tp_size), busy_ranks=2)


def test_a_stage_takes_as_long_as_its_own_card() -> None:
    rows = measure(Machine())
    alike, differing = (fit(every).cost_model((8, 8)) for every in (rows, with_ranks(rows, 1.0, 0.95)))
    assert differing.stages[0] == alike.stages[0]
    skewed, before = (model.stage_seconds(1, [COUNTED]) for model in (differing, alike))
    on_the_host = alike.stages[1].round_overhead_s
    assert skewed - on_the_host == pytest.approx(0.95 * (before - on_the_host))
    assert fit(rows).rank_skew == RankSkew()


def test_messages_are_not_quicker_between_quicker_cards() -> None:
    costs = replace(fit(measure(Machine(), tp_size=2), tp_size=2), rank_skew=RankSkew((0.5, 0.5)))
    tokens = np.array([1024.0])
    reduces = float((costs.tokens_s(tokens) - costs.compute_s(tokens) * costs.calibration.tokens_factor(tokens))[0])
    assert reduces > 0
    assert float((costs.tokens_s(tokens) - reduces)[0]) == pytest.approx(
        2 * float((costs.tokens_s(tokens, 0.5) - reduces)[0])
    )


def test_a_group_goes_at_the_pace_of_its_slowest() -> None:
    skew = RankSkew((0.9, 0.95, 1.0, 0.92))
    assert [skew.of_stage(stage, 2) for stage in (0, 1)] == [0.95, 1.0]
    assert skew.of_stage(0, 1) == 0.9
    assert skew.of_stage(4, 1) == skew.of_stage(2, 2) == skew.of_stage(0, 8) == 1.0  # ranks that were not measured


def test_one_layer_that_was_disturbed_does_not_count() -> None:
    of_ranks = [row for row in with_ranks(measure(Machine()), 1.0, 0.95) if row.op == RANK_LAYER]
    slow = of_ranks[1]
    of_ranks[1] = replace(slow, median_us=3 * slow.median_us, p90_us=3 * slow.p90_us)
    assert fit_rank_skew(of_ranks).factors == pytest.approx((1.0, 0.95))


def test_the_slowest_has_no_advantage_of_noise() -> None:
    """Of cards that are alike now one and now another is the slower."""
    first, second = (
        [row for row in with_ranks(measure(Machine()), *factors) if row.op == RANK_LAYER]
        for factors in ((1.0, 0.98), (0.98, 1.0))
    )
    turns = [(first if index % 4 < 2 else second)[index] for index in range(12)]  # six layers
    assert fit_rank_skew(turns).factors == pytest.approx((1.0, 1.0))


def test_a_rank_that_is_missing_tells_nothing() -> None:
    of_ranks = [row for row in with_ranks(measure(Machine()), 1.0, 0.9, 0.8) if row.op == RANK_LAYER]
    assert len(fit_rank_skew(of_ranks).factors) == 3
    assert fit_rank_skew([row for row in of_ranks if row.shape["rank"] != 1]) == RankSkew()


@pytest.mark.parametrize("layers", [0, LEAST_LAYERS - 1])
def test_few_layers_tell_nothing(layers: int) -> None:
    assert fit(with_ranks(measure(Machine()), 1.0, 0.9, layers=layers)).rank_skew == RankSkew()
