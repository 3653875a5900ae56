"""How far off a makespan may be."""

import pytest

from tuner.fit.correction import Correction
from tuner.fit.holdout import HeldOutError
from tuner.fit.uncertainty import EXTRAPOLATED, NINETY_OF_MEDIAN, UNSEEN, makespan_uncertainty


def held_out(of_layer: float, op: str = "attention") -> HeldOutError:
    return HeldOutError(op=op, num_points=9, median=9.0, p90=9.0, worst=9.0, of_layer=of_layer)


def test_without_runs_the_fits_speak_all_together() -> None:
    found = makespan_uncertainty([held_out(0.03), held_out(0.02, op="matmul")], Correction(), extrapolates=False)
    assert found == pytest.approx(NINETY_OF_MEDIAN * 0.05)  # four products: 0.03 and twice 0.02, by their squares


def test_the_worst_that_is_known_counts_and_nothing_is_certain() -> None:
    taught = Correction(num_rounds=50, error_after=0.03)
    for of_layer, expected in ((0.2, 0.2), (0.01, 0.03)):
        found = makespan_uncertainty([held_out(of_layer)], taught, extrapolates=False)
        assert found == pytest.approx(NINETY_OF_MEDIAN * expected)
    perfect = Correction(num_rounds=50, error_after=0.0)
    assert makespan_uncertainty([], perfect, extrapolates=False) == pytest.approx(NINETY_OF_MEDIAN * UNSEEN)


def test_extrapolation_is_less_certain() -> None:
    inside, beyond = (makespan_uncertainty([held_out(0.03)], Correction(), extrapolates=e) for e in (False, True))
    assert beyond == pytest.approx(EXTRAPOLATED * inside)
