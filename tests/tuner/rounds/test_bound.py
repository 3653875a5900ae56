"""The bound on the makespan: below every plan, and near it where stages differ."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.tuner.atom import atom
from tests.tuner.strategies import batches, cost_models, windows
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Chunk, Request
from tuner.plan.stage_cost import StageCost, TableAttention, scaled_stage
from tuner.policies.exact import exact_rounds
from tuner.policies.fixed import fixed_rounds
from tuner.rounds.bound import makespan_bound_s
from tuner.rounds.problem import Problem
from tuner.search.planner import plan_rounds


def prompts(*lengths: int) -> list[Request]:
    return [Request(id=f"r{i}", prompt_tokens=n) for i, n in enumerate(lengths)]


def cost_of_tokens(seconds: tuple[float, ...], *, overhead_s: float = 0.0) -> StageCost:
    """A stage without attention; seconds: of 0, 1 and 8 tokens."""
    attention = TableAttention(count=(1,), base_s=(0.0,), context_s=(0.0,))
    return StageCost(token_count=(0, 1, 8), token_seconds=seconds, attention=attention, round_overhead_s=overhead_s)


@settings(max_examples=30, deadline=None)
@given(cost=cost_models(max_stages=4), requests=batches(max_requests=2, max_tokens=1500), window=windows)
@example(  # one round is best, and longer than the longest chunk on the grid that the caps let through
    cost=CostModel(stages=(cost_of_tokens((0.0, 1e-5, 2e-5)),) * 2),
    requests=[Request(id="r0", prompt_tokens=257)],
    window=None,
)
@example(  # the stage on which tokens take longest takes no time
    cost=CostModel(stages=(cost_of_tokens((0.0,) * 3), cost_of_tokens((0.0,) * 3, overhead_s=1e-5))),
    requests=[Request(id="r0", prompt_tokens=1)],
    window=None,
)
def test_the_bound_is_below_the_best_plan(cost: CostModel, requests: list[Request], window: int | None) -> None:
    problem = Problem(cost=cost, requests=tuple(requests), window=window, chunk_multiple=256)
    best, _ = exact_rounds(problem, fixed_rounds(problem, 256))
    assert makespan_bound_s(problem) <= problem.evaluate(best).makespan_s * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(data=st.data(), requests=batches(max_requests=2, max_tokens=1500, timed=False), window=windows)
def test_the_bound_is_below_the_best_plan_on_stages_alike_in_kind(
    data: st.DataObject, requests: list[Request], window: int | None
) -> None:
    """One stage's costs times a factor a stage, as layers are dealt out, and a head on the last: where the bound for
    uneven stages counts."""
    one = data.draw(cost_models(max_stages=1)).stages[0]
    factors = data.draw(st.lists(st.sampled_from([0.5, 0.8, 0.9, 1.0, 1.1]), min_size=2, max_size=4))
    *first, last = (CostModel(stages=(one,)).scaled(factor).stages[0] for factor in factors)
    head_s = data.draw(st.sampled_from([0.0, 0.001, 0.03]))
    cost = CostModel(
        stages=(*first, replace(last, final_s=last.final_s + head_s)),
        hop_token_s=data.draw(st.sampled_from([0.0, 1e-6, 1e-4])),
    )
    problem = Problem(cost=cost, requests=tuple(requests), window=window, chunk_multiple=128)
    best, _ = exact_rounds(problem, fixed_rounds(problem, 128))
    assert makespan_bound_s(problem) <= problem.evaluate(best).makespan_s * (1 + 1e-9)


def test_the_gap_is_small_where_stages_hold_other_work() -> None:
    """7, 9, 8 and 8 layers and a head on the last stage: an envelope below all stages leaves 13.8 % here."""
    model = atom(1)
    stages = [model.scaled(layers / 8).stages[0] for layers in (7.0, 9.0, 8.0, 8.3)]
    assert plan_rounds(CostModel(stages=tuple(stages)), prompts(131072), window=5).gap <= 0.08


def test_a_round_may_be_long_to_hand_on_while_prompts_that_ended_are_finished() -> None:
    """The path down with the long round does not pay for the four prompts that ended before it."""
    stage = StageCost(token_count=(0, 1000), token_seconds=(0.0, 0.0), round_overhead_s=0.5, chunk_s=0.001)
    cost = CostModel(stages=(stage, replace(stage, final_s=1.0)), hop_token_s=0.01)
    problem = Problem(cost=cost, requests=tuple(prompts(1, 1, 1, 1, 400)))
    rounds = [tuple(Chunk(i, 0, 1) for i in range(4)), (Chunk(4, 0, 400),)]
    assert 6.5 <= makespan_bound_s(problem) <= problem.evaluate(rounds).makespan_s


def stage_of_tables(*, overhead_s: float) -> StageCost:
    """A stage like a measured one."""
    counts = (64, 256, 1024, 4096, 16384)
    attention = TableAttention(
        count=counts,
        base_s=tuple(8e-5 + 2.4e-11 * n * n / 2 * (1.0 + 300.0 / n) for n in counts),
        context_s=tuple(1e-8 + 2.4e-11 * (n + 150.0) for n in counts),
    )
    seconds = (4.6e-4, 4.6e-4, 0.079)
    return StageCost(
        token_count=(0, 96, 16384), token_seconds=seconds, attention=attention, round_overhead_s=overhead_s
    )


def test_the_gap_is_small_where_a_long_prompt_shares_rounds_on_stages_that_differ() -> None:
    """Without the place of its chunks in the drain the bound leaves 1.8 %."""
    one = stage_of_tables(overhead_s=1.6e-3)
    cost = CostModel(stages=(one, scaled_stage(one, 0.975)))
    assert plan_rounds(cost, prompts(866, 1111, 43094), chunk_multiple=256).gap <= 0.012


def test_the_gap_is_small_where_the_last_stage_has_a_head() -> None:
    """2.6 % where the paths through the other stages do not know what ending prompts costs it."""
    one = stage_of_tables(overhead_s=2e-4)
    cost = CostModel(stages=(*(one,) * 7, replace(one, final_s=5e-4)))
    assert plan_rounds(cost, prompts(*[3000] * 40), chunk_multiple=256).gap <= 0.013


def test_the_gap_is_small_where_rounds_are_handed_on_slowly() -> None:
    """By a quarter of the time that they run; counting one token's way alone leaves 5.3 %."""
    model = atom(8)
    slow = replace(model, hop_token_s=0.25 * float(model.stages[0].tokens_s(4096)) / 4096)
    assert plan_rounds(slow, prompts(*[3000] * 20)).gap <= 0.005
