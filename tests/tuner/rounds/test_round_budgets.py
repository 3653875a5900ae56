import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.rounds.round_budgets import pooled_budgets

amounts = st.lists(st.tuples(st.floats(0.01, 100.0), st.floats(0.1, 10.0)), min_size=1, max_size=5)


@given(amounts=amounts, stages_after=st.sampled_from([0.5, 1.0, 7.0]))
def test_pooled_budgets_cost_least_of_all_that_never_fall(
    amounts: list[tuple[float, float]], stages_after: float
) -> None:
    """Against every way of cutting the requests into neighbours that share the cap which is best for them."""
    delays, weights = zip(*amounts, strict=True)

    def cost(caps: list[float]) -> float:
        terms = zip(delays, weights, caps, strict=True)
        return sum(delay / cap + stages_after * weight * cap for delay, weight, cap in terms)

    caps = pooled_budgets(delays, weights, stages_after)
    assert caps == sorted(caps)
    for joined in itertools.product([False, True], repeat=len(amounts) - 1):
        edges = [0, *(i + 1 for i, join in enumerate(joined) if not join), len(amounts)]
        other: list[float] = []
        for first, end in itertools.pairwise(edges):
            best = math.sqrt(sum(delays[first:end]) / (stages_after * sum(weights[first:end])))
            other.extend([best] * (end - first))
        if other == sorted(other):
            assert cost(caps) <= cost(other) * (1 + 1e-9)


def test_short_requests_first_run_in_short_rounds() -> None:
    assert pooled_budgets([1.0, 4.0, 2.0], [1.0, 1.0, 1.0], 1.0) == pytest.approx([1.0, math.sqrt(3.0), math.sqrt(3.0)])
