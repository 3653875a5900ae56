"""Chooses how many layers each stage holds, together with the rounds."""

from __future__ import annotations

import heapq
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
MOST_MOVED = 8
"""Groups that layers are taken from, and put on: beyond, the fullest and those with least work."""


def even_partition(num_layers: int, pp_size: int) -> tuple[int, ...]:
    """As equal as whole layers allow; the stages in the middle get those left over, since the ends hold other work
    too."""
    if not 1 <= pp_size <= num_layers:
        raise UserError("pp_size", pp_size, f"1 to {num_layers}, the number of layers")
    least, left = divmod(num_layers, pp_size)
    first = (pp_size - left) // 2
    return tuple(least + (first <= stage < first + left) for stage in range(pp_size))


def balanced_partition(
    build_cost: BuildCost, num_layers: int, num_groups: int, requests: Sequence[Request]
) -> tuple[int, ...]:
    """Layers of each group such that the one with most work has least, prompts cut nowhere.

    Layers are dealt out one by one to the group that then has least, those in the middle first; what a layer adds to a
    group and what the group costs besides come from two cost models.
    """
    even = even_partition(num_layers, num_groups)
    if num_groups == 1 or num_groups == num_layers:
        return even
    chunks = [(request.new_tokens, request.cached_tokens, True) for request in requests]
    seconds = []
    for more in (0, 1):
        cost = build_cost(tuple(layers + more for layers in even))
        of_kind = [kind.seconds(chunks) for kind in cost.kinds]
        seconds.append([of_kind[kind] for kind in cost.kind_of_stage.tolist()])
    layer_s = [after - before for before, after in zip(*seconds, strict=True)]
    beside_s = [all_s - layers * each for all_s, layers, each in zip(seconds[0], even, layer_s, strict=True)]
    partition = [1] * num_groups
    middle = (num_groups - 1) / 2
    waiting = [
        (beside + 2 * each, abs(group - middle), group)
        for group, (beside, each) in enumerate(zip(beside_s, layer_s, strict=True))
    ]
    heapq.heapify(waiting)
    for _ in range(num_layers - num_groups):
        reached_s, place, group = waiting[0]
        partition[group] += 1
        heapq.heapreplace(waiting, (reached_s + layer_s[group], place, group))
    return tuple(partition)


def choose_partition(
    build_cost: BuildCost,
    num_layers: int,
    num_groups: int,
    requests: Sequence[Request],
    rules: Rules,
    known: tuple[tuple[int, ...], RoundPlan] | None = None,
) -> tuple[tuple[int, ...], RoundPlan]:
    """Layers of each group, and the rounds drafted for them.

    Drafts for even layers, for those that balance the work, and for partitions around these; from the best of these,
    takes turns: move single layers as long as the exact recurrence says that the same rounds end sooner, and draft the
    rounds anew. Stops when that no longer helps.

    known: a partition and its draft, to start from.
    """
    wanted, window = rules.objective, rules.window

    def plan(partition: tuple[int, ...]) -> RoundPlan:
        return rules.draft(build_cost(partition), requests)

    if known is None:
        balanced = balanced_partition(build_cost, num_layers, num_groups, requests)
        known = (balanced, plan(balanced))
    partition, best = known
    starts = [even_partition(num_layers, num_groups)]
    starts += _by_work(_one_layer_moved(partition, _stage_s(best)), build_cost, requests, best, window)
    for start in dict.fromkeys(starts[:MOST_STARTS]):
        if start != known[0]:
            planned = plan(start)
            if planned.evaluation.score(wanted) < best.evaluation.score(wanted):
                partition, best = start, planned
    for _ in range(MOST_REPLANS):

        def score(candidate: tuple[int, ...], planned: RoundPlan = best) -> tuple[float, ...]:
            return evaluate(build_cost(candidate), requests, planned.rounds, window).score(wanted)

        moved = _move_layers(partition, score, _stage_s(best))
        if moved == partition:
            break
        replanned = plan(moved)
        if not replanned.evaluation.score(wanted) < best.evaluation.score(wanted):
            break
        partition, best = moved, replanned
    return partition, best


def _stage_s(planned: RoundPlan) -> list[float]:
    """Seconds of work of each stage or group."""
    seconds: list[float] = planned.evaluation.round_s.sum(axis=0).tolist()
    return seconds


def _by_work(
    partitions: Sequence[tuple[int, ...]],
    build_cost: BuildCost,
    requests: Sequence[Request],
    planned: RoundPlan,
    window: int | None,
) -> list[tuple[int, ...]]:
    """The partitions by how full their fullest stage is, the rounds as planned."""

    def fullest_s(partition: tuple[int, ...]) -> tuple[float, float]:
        stage_s = evaluate(build_cost(partition), requests, planned.rounds, window).round_s.sum(axis=0)
        return float(stage_s.max()), float((stage_s**2).sum())

    return sorted(partitions, key=fullest_s)


def _move_layers(
    partition: tuple[int, ...], score: Callable[[tuple[int, ...]], tuple[float, ...]], stage_s: Sequence[float]
) -> tuple[int, ...]:
    """Steepest descent over moves of one layer from a group to another."""
    reached = score(partition)
    while moves := _one_layer_moved(partition, stage_s):
        scores = {moved: score(moved) for moved in moves}
        best = min(moves, key=lambda moved: scores[moved])
        if not scores[best] < reached:
            break
        partition, reached = best, scores[best]
    return partition


def _one_layer_moved(partition: tuple[int, ...], stage_s: Sequence[float]) -> list[tuple[int, ...]]:
    """Partitions that have one layer on another group: of the fullest ones, onto those with least work."""
    by_work = sorted(range(len(partition)), key=lambda group: stage_s[group])
    moves = []
    for source in by_work[-MOST_MOVED:]:
        for target in by_work[:MOST_MOVED]:
            if target != source and partition[source] > 1:
                moved = list(partition)
                moved[source] -= 1
                moved[target] += 1
                moves.append(tuple(moved))
    return moves
