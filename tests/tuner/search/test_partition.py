import itertools

import pytest

from db.errors import UserError
from tests.tuner.search.test_planner import prompts
from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import PairAttention, StageCost
from tuner.search.partition import choose_partition, even_partition
from tuner.search.planner import plan_rounds
from tuner.search.rules import Rules


def build_cost(partition: tuple[int, ...], head_layers: float = 2.5) -> CostModel:
    """Layers of 1 ms per 1024 tokens; the head costs the last stage as much as `head_layers` layers."""
    stages = []
    for stage, layers in enumerate(partition):
        share = layers + (head_layers if stage == len(partition) - 1 else 0.0)
        stages.append(
            StageCost(
                token_count=(0, 1024),
                token_seconds=(0.0, share * 1e-3),
                attention=PairAttention(pair_s=layers * 1e-12),
                round_overhead_s=1e-4,
            )
        )
    return CostModel(stages=tuple(stages))


def test_even_layers_leave_the_ends_lighter() -> None:
    assert even_partition(8, 4) == (2, 2, 2, 2)
    assert even_partition(10, 4) == (2, 3, 3, 2)
    with pytest.raises(UserError, match="pp_size: 5; 1 to 4"):
        even_partition(4, 5)


def test_a_heavy_head_takes_layers_off_the_last_stage() -> None:
    partition, plan = choose_partition(build_cost, 16, 4, prompts(32768, 4096), Rules(window=5))
    assert sum(partition) == 16
    assert partition[-1] < min(partition[:-1])
    even = plan_rounds(build_cost((4, 4, 4, 4)), prompts(32768, 4096), window=5)
    assert plan.makespan_s < 0.9 * even.makespan_s


def test_the_choice_is_as_good_as_trying_every_partition() -> None:
    requests = prompts(8192, 1024)
    _, plan = choose_partition(build_cost, 9, 3, requests, Rules(chunk_multiple=512))
    best = min(
        plan_rounds(build_cost(partition), requests, chunk_multiple=512).makespan_s
        for partition in itertools.product(range(1, 8), repeat=3)
        if sum(partition) == 9
    )
    assert plan.makespan_s <= 1.01 * best


def test_one_stage_needs_no_choice() -> None:
    partition, plan = choose_partition(build_cost, 5, 1, prompts(1000), Rules())
    assert partition == (5,)
    assert len(plan.rounds) == 1
