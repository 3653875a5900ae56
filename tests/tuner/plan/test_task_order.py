"""The order of tasks contradicts no wait: of data, of links and their slots, and of the window."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from tuner.plan.stage_order import StageOrder, stages_of_groups, visits_of
from tuner.plan.task_order import MESSAGES, task_order
from tuner.recurrence.timeline import simulate


def test_stages_of_groups_are_passed_in_loops_or_up_and_down() -> None:
    assert stages_of_groups(3, 2, StageOrder.LOOP) == (0, 1, 2, 0, 1, 2)
    assert stages_of_groups(3, 3, StageOrder.V) == (0, 1, 2, 2, 1, 0, 0, 1, 2)
    assert visits_of((0, 1, 2, 2, 1, 0, 0, 1, 2)) == ((0,), (1,), (2, 3), (4,), (5, 6), (7,), (8,))


@pytest.mark.parametrize("order", StageOrder)
@pytest.mark.parametrize("virtual_stages", [1, 2, 3, 4])
@pytest.mark.parametrize("pp_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 9])
def test_no_wait_points_to_a_later_task(
    pp_size: int, virtual_stages: int, order: StageOrder, window: int | None
) -> None:
    for num_rounds in (0, 1, 2, 3, 7, 12, 19):
        found = task_order(num_rounds, pp_size, virtual_stages, order, window)
        tasks = list(zip(found.rounds.tolist(), found.groups.tolist(), strict=True))
        at = {task: place for place, task in enumerate(tasks)}
        last = pp_size * virtual_stages - 1
        assert len(tasks) == len(at) == num_rounds * (last + 1)
        sent, read = defaultdict(list), defaultdict(list)
        for (i, group), place in at.items():
            if group:
                assert at[i, group - 1] < place
            if i:
                assert at[i - 1, group] < place
            if window is not None and group == 0 and i >= window:
                assert at[i - window, last] < place
            if group < last and found.stages[group] != found.stages[group + 1]:
                link = found.stages[group], found.stages[group + 1]
                sent[link].append(i)
            if group and found.stages[group] != found.stages[group - 1]:
                read[found.stages[group - 1], found.stages[group]].append((i, place, at[i, group - 1]))
        for link, messages in read.items():
            assert [i for i, _, _ in messages] == sent[link]  # links keep the order
            for (_, was_read, _), (_, _, is_sent) in zip(messages, messages[MESSAGES:], strict=False):
                assert was_read < is_sent or virtual_stages == 1


@pytest.mark.parametrize("num_rounds", [4, 9, 16, 17, 40])
@pytest.mark.parametrize("pp_size", [2, 4])
def test_loops_divide_the_bubble_by_the_groups_of_a_stage(pp_size: int, num_rounds: int) -> None:
    order = task_order(num_rounds, pp_size, 2, StageOrder.LOOP)
    halves = np.full((num_rounds, 2 * pp_size), 0.5)
    assert simulate(halves, order=order).makespan_s == pytest.approx(num_rounds + (pp_size - 1) / 2)


def test_v_order_alternates_between_the_passes() -> None:
    order = task_order(12, 4, 2, StageOrder.V)
    assert [group for _, group in order.of_stage(2)][6:14] in ([5, 2] * 4, [2, 5] * 4)
    assert simulate(np.full((12, 8), 0.5), order=order).makespan_s == pytest.approx(12 + 3)
