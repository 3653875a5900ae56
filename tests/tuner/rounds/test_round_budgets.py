import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tuner.atom import atom
from tuner.rounds.round_budgets import RoundExcess, pooled_budgets

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


@pytest.mark.parametrize("cached", [0, 3000])
def test_rounds_of_each_size_take_what_a_prompt_in_them_takes(cached: int) -> None:
    """One prompt of 8192 tokens cut evenly, and several in one round."""
    cost, prompt = atom(4), 8192
    excess = RoundExcess(cost, 64, 16384)
    seconds = dict(zip(excess.sizes.tolist(), excess.sizes_s(prompt, cached + prompt / 2.0).tolist(), strict=True))
    for size in (512, 2048, 8192):
        whole_s = sum(cost.kinds[0].seconds([(size, cached + at, False)]) for at in range(0, prompt, size))
        assert seconds[size] * prompt / size == pytest.approx(whole_s, rel=1e-3)
    assert seconds[16384] == pytest.approx(cost.kinds[0].seconds([(prompt, cached, False)] * 2), rel=1e-3)
