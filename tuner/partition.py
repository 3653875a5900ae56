"""Which stage holds how many layers, chosen together with the rounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from db.errors import UserError
from tuner.cost_model import CostModel
from tuner.plan import Request
from tuner.planner import RoundPlan, plan_rounds
from tuner.problem import NO_LIMITS, Limits
from tuner.schedule import Evaluation, Objective, evaluate

BuildCost = Callable[[tuple[int, ...]], CostModel]
"""The cost model of a pipeline whose stages hold these many layers (embedding on the first, head on the last)."""

MOST_REPLANS = 3
"""How often partition and rounds are improved in turn."""


def even_partition(num_layers: int, pp_size: int) -> tuple[int, ...]:
    """As equal as whole layers allow; the stages in the middle get those left over, since the ends hold other work too."""
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
    *,
    policy: str = "joint",
    window: int | None = None,
    chunk_multiple: int = 64,
    limits: Limits = NO_LIMITS,
    objective: Objective = Objective.MAKESPAN,
) -> tuple[tuple[int, ...], RoundPlan]:
    """Layers of each stage, and the rounds planned for them.

    Starts from even layers and takes turns: plan the rounds for the partition, then move single layers between stages as
    long as the exact recurrence says that these rounds end sooner. Stops when replanning no longer helps.
    """
    wanted = Objective(objective)
    costs: dict[tuple[int, ...], CostModel] = {}

    def cost_of(partition: tuple[int, ...]) -> CostModel:
        if partition not in costs:
            costs[partition] = build_cost(partition)
        return costs[partition]

    def plan(partition: tuple[int, ...]) -> RoundPlan:
        return plan_rounds(
            cost_of(partition),
            requests,
            policy=policy,
            window=window,
            chunk_multiple=chunk_multiple,
            limits=limits,
            objective=wanted,
        )

    partition = even_partition(num_layers, pp_size)
    best = plan(partition)
    for _ in range(MOST_REPLANS):

        def judge(candidate: tuple[int, ...], rounds: RoundPlan = best) -> Evaluation:
            return evaluate(cost_of(candidate), requests, rounds.rounds, window)

        moved = _move_layers(partition, judge, wanted)
        if moved == partition:
            break
        replanned = plan(moved)
        if not replanned.evaluation.score(wanted) < best.evaluation.score(wanted):
            break
        partition, best = moved, replanned
    return partition, best


def _move_layers(
    partition: tuple[int, ...], judge: Callable[[tuple[int, ...]], Evaluation], objective: Objective
) -> tuple[int, ...]:
    """Steepest descent over moves of one layer from a stage to another."""
    score = judge(partition).score(objective)
    while True:
        moves = []
        for source, layers in enumerate(partition):
            if layers < 2:
                continue
            for target in range(len(partition)):
                if target != source:
                    moved = list(partition)
                    moved[source] -= 1
                    moved[target] += 1
                    moves.append(tuple(moved))
        best = min(moves, key=lambda moved: judge(moved).score(objective), default=partition)
        best_score = judge(best).score(objective)
        if not best_score < score:
            return partition
        partition, score = best, best_score
