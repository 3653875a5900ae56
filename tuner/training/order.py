"""The order in which a stage runs the rounds of a training step, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from tuner.plan.plan import Round


class Order(StrEnum):
    """When backward rounds begin."""

    ALL_FORWARD = "all-forward"  # when all rounds of the step have run forward
    ONE_EACH = "1f1b"  # as soon as a sequence's last chunk is through: fewer activations wait


class Recompute(StrEnum):
    """What of a forward round is computed again in its backward, instead of kept."""

    NONE = "none"
    LINEAR = "linear"  # all of a layer but its attention
    LAYER = "layer"  # layers, one after another: each layer's input is kept
    ROUND = "round"  # the stage's layers together: only the round's input is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A round of the step: `batch` counts its groups of rounds that share no sequence with others."""

    index: int  # among the step's rounds, in forward order
    repeat: int  # which accumulation
    round_index: int  # in the plan
    batch: int


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """A unit run forward or backward."""

    unit: Unit
    is_backward: bool


def step_units(rounds: Sequence[Round], accumulate: int) -> tuple[Unit, ...]:
    """The rounds of a step that runs the plan `accumulate` times over other sequences."""
    groups = _batches(rounds)
    num_batches = groups[-1] + 1
    return tuple(
        Unit(index=repeat * len(rounds) + index, repeat=repeat, round_index=index, batch=repeat * num_batches + group)
        for repeat in range(accumulate)
        for index, group in enumerate(groups)
    )


def _batches(rounds: Sequence[Round]) -> list[int]:
    """For each round the number of its group: rounds between the first and the last of a sequence are together."""
    last: dict[int, int] = {}
    for index, chunks in enumerate(rounds):
        last |= {chunk.request: index for chunk in chunks}
    groups: list[int] = []
    number, end = -1, -1
    for index, chunks in enumerate(rounds):
        if index > end:
            number += 1
        end = max(end, *(last[chunk.request] for chunk in chunks))
        groups.append(number)
    return groups


def stage_tasks(units: Sequence[Unit], *, stage: int, pp_size: int, order: Order) -> Iterator[TrainingTask]:
    """The tasks of a stage. Batches run backward in turn, the rounds of each from its last to its first.

    `1f1b` follows Seq1F1B (Sun et al., 2024): before its i-th backward a stage has run as many rounds forward as the
    last stage needs for it, and one more for each stage between.
    """
    backward = sorted(units, key=lambda unit: (unit.batch, -unit.index))
    ends = {unit.batch: unit.index + 1 for unit in units}  # the last of each stays
    longest = max(sum(unit.batch == batch for unit in units) for batch in ends)
    done = 0
    for position, unit in enumerate(backward):
        needed = len(units)
        if order is Order.ONE_EACH:
            needed = min(needed, max(ends[unit.batch], position + longest) + pp_size - 1 - stage)
        while done < needed:
            yield TrainingTask(units[done], is_backward=False)
            done += 1
        yield TrainingTask(unit, is_backward=True)


def most_kept(units: Sequence[Unit], *, stage: int, pp_size: int, order: Order) -> int:
    """Rounds whose activations a stage keeps at once, at most."""
    kept = most = 0
    for task in stage_tasks(units, stage=stage, pp_size=pp_size, order=order):
        kept += -1 if task.is_backward else 1
        most = max(most, kept)
    return most
