"""Which stage holds how many layers, chosen together with the rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from db.errors import UserError
from tuner.plan.cost_model import CostModel
from tuner.plan.plan import Request
from tuner.rounds.round_plan import RoundPlan
from tuner.rounds.schedule import evaluate
from tuner.search.rules import Rules

BuildCost = Callable[[tuple[int, ...]], CostModel]
"""The cost model of a pipeline whose stages hold these many layers (embedding on the first, head on the last)."""

MOST_REPLANS = 3
"""How often partition and rounds are improved in turn."""
MOST_STARTS = 4
"""Partitions around the balanced one that are planned for."""


def even_partition(num_layers: int, pp_size: int) -> tuple[int, ...]:
    """As equal as whole layers allow; the stages in the middle get those left over, since the ends hold other work
    too."""
    if not 1 <= pp_size <= num_layers:
        raise UserError("pp_size", pp_size, f"1 to {num_layers}, the number of layers")
    least, left = divmod(num_layers, pp_size)
    first = (pp_size - left) // 2
    return tuple(least + (first <= stage < first + left) for stage in range(pp_size))


def choose_partition(
    build_cost: BuildCost,
    num_layers: int,
    pp_size: int,
    requests: Sequence[Request],
    rules: Rules,
) -> tuple[tuple[int, ...], RoundPlan]:
    """Layers of each stage, and the rounds drafted for them.

    Drafts for even layers and for those that balance the stages' work; from the best of these, takes turns: move
    single layers between stages as long as the exact recurrence says that the same rounds end sooner, and draft the
    rounds anew. Stops when that no longer helps.
    """
    wanted, window = rules.objective, rules.window
    costs: dict[tuple[int, ...], CostModel] = {}

    def cost_of(partition: tuple[int, ...]) -> CostModel:
        if partition not in costs:
            costs[partition] = build_cost(partition)
        return costs[partition]

    def plan(partition: tuple[int, ...]) -> RoundPlan:
        return rules.draft(cost_of(partition), requests)

    partition = even_partition(num_layers, pp_size)
    best = plan(partition)

    def busiest_s(candidate: tuple[int, ...]) -> tuple[float, ...]:
        stage_s = evaluate(cost_of(candidate), requests, best.rounds, window).round_s.sum(axis=0)
        return (float(stage_s.max()), float((stage_s**2).sum()))

    balanced = _move_layers(partition, busiest_s)
    nearby = sorted(_one_layer_moved(balanced), key=busiest_s)
    for start in dict.fromkeys([balanced, *nearby[: MOST_STARTS - 1]]):
        if start != partition:
            planned = plan(start)
            if planned.evaluation.score(wanted) < best.evaluation.score(wanted):
                partition, best = start, planned
    for _ in range(MOST_REPLANS):

        def score(candidate: tuple[int, ...], planned: RoundPlan = best) -> tuple[float, ...]:
            return evaluate(cost_of(candidate), requests, planned.rounds, window).score(wanted)

        moved = _move_layers(partition, score)
        if moved == partition:
            break
        replanned = plan(moved)
        if not replanned.evaluation.score(wanted) < best.evaluation.score(wanted):
            break
        partition, best = moved, replanned
    return partition, best


def _move_layers(partition: tuple[int, ...], score: Callable[[tuple[int, ...]], tuple[float, ...]]) -> tuple[int, ...]:
    """Steepest descent over moves of one layer from a stage to another."""
    reached = score(partition)
    while moves := _one_layer_moved(partition):
        scores = {moved: score(moved) for moved in moves}
        best = min(moves, key=lambda moved: scores[moved])
        if not scores[best] < reached:
            break
        partition, reached = best, scores[best]
    return partition


def _one_layer_moved(partition: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Every partition that has one layer on another stage."""
    moves = []
    for source, layers in enumerate(partition):
        for target in range(len(partition)):
            if target != source and layers > 1:
                moved = list(partition)
                moved[source] -= 1
                moved[target] += 1
                moves.append(tuple(moved))
    return moves
