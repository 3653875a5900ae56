"""Placement of the groups of layers on stages when a stage holds several groups."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from itertools import groupby


class StageOrder(StrEnum):
    """Placement of the groups of layers when a stage holds several."""

    LOOP = "loop"
    """Group g on stage g mod pp_size: from the last stage rounds go on to the first."""
    V = "v"
    """Up and down: every second pass over the stages goes backwards, so that no hand-off crosses the fold."""


def stage_of_group(group: int, pp_size: int, order: StageOrder) -> int:
    """The stage that holds a group of layers."""
    pass_index, place = divmod(group, pp_size)
    return pp_size - 1 - place if order is StageOrder.V and pass_index % 2 else place


def stages_of_groups(pp_size: int, virtual_stages: int, order: StageOrder) -> tuple[int, ...]:
    """The stage of every group, in the order in which rounds go through them."""
    return tuple(stage_of_group(group, pp_size, order) for group in range(pp_size * virtual_stages))


def visits_of(stages: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Neighbouring groups on one stage, which a round runs through without a hand-off: one group, or two at a fold."""
    return tuple(tuple(groups) for _, groups in groupby(range(len(stages)), key=lambda group: stages[group]))
