"""The head over all tokens, sums of gradients and the update, on a machine whose rates are known."""

from __future__ import annotations

import pytest

from tests.tuner.measured import FLOPS_PER_US, SHAPE, Machine, measure
from tuner.fit.layer_fit import fit_layer_costs
from tuner.fit.rows import RankWork
from tuner.fit.step_ends import step_ends
from tuner.plan.plan import Chunk, Parallel, Request
from tuner.training.step import predict_step
from tuner.training.work import StepWork

TOKENS = 4096


def test_ends_of_a_step_go_at_the_rates_that_were_measured() -> None:
    costs = fit_layer_costs(
        measure(Machine()), RankWork(shape=SHAPE, dtype="float32", tp_size=1), busy_ranks=2
    )  # fmt: skip
    work = StepWork(
        shape=SHAPE, parallel=Parallel(tp_size=1, pp_size=2, layer_partition=(8, 8)),
        requests=(Request(id="r0", prompt_tokens=TOKENS),), rounds=((Chunk(0, 0, TOKENS),),), precision="float32",
    )  # fmt: skip
    ends = step_ends(costs, work)
    products_s = 3 * 2 * SHAPE.vocab_size * SHAPE.hidden_size / FLOPS_PER_US * 1e-6
    assert ends.token_s > products_s
    byte_s = (ends.token_s - products_s) / (48 * SHAPE.vocab_size)
    # Half a microsecond a token for the numbers that the element-wise work of a layer moves.
    width = 4 * 2048 + 3 * 8192 + 3 * 2048
    assert byte_s == pytest.approx(0.5e-6 / (4 * width), rel=0.1)
    parameters = SHAPE.num_parameters // 2  # the first stage, with the embedding, has the most of the two
    assert ends.update_s / ends.round_s == pytest.approx(44 / 12)
    assert ends.update_s > 44 * parameters * byte_s

    cost = costs.cost_model((8, 8))
    without, whole = predict_step(work, cost), predict_step(work, cost, ends=ends)
    added = TOKENS * ends.token_s + 2 * ends.round_s + ends.update_s  # one round: the stages run one after another
    assert whole.seconds - without.seconds == pytest.approx(added)
    assert whole.gap == pytest.approx(without.gap * without.lower_bound_s / whole.lower_bound_s, abs=1e-6)
