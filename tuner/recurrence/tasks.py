"""Tasks, a round in a group of layers each, on stages that hold several groups: which runs when.

`tuner.recurrence.timeline` has the recurrence. It runs in lists here, as each task depends on the one before.
"""

from __future__ import annotations

import heapq

import numpy as np

from tuner.plan.stage_cost import Floats
from tuner.plan.task_order import TaskOrder


class Tasks:
    """The tasks of all rounds, run once, in one of two ways; either returns their starts, [num_rounds, num_groups].

    `stage_s` is [num_rounds, num_groups], `hop_s` and `ready_s` are [num_rounds], zero where None.
    """

    def __init__(
        self,
        stage_s: Floats,
        hop_s: Floats | None,
        window: int | None,
        return_s: float,
        ready_s: Floats | None,
        order: TaskOrder,
    ) -> None:
        num_rounds, num_groups = stage_s.shape
        self._seconds: list[list[float]] = stage_s.tolist()
        none = [0.0] * num_rounds
        self._hop: list[float] = none if hop_s is None else hop_s.tolist()
        self._ready: list[float] = none if ready_s is None else ready_s.tolist()
        self._window, self._return_s, self._order = window, return_s, order
        self._starts = [[0.0] * num_groups for _ in range(num_rounds)]
        self._left = [0.0] * num_rounds  # when each round left the last group
        self._free = [0.0] * (max(order.stages) + 1)  # when each stage has ended what it ran last

    def in_order(self) -> Floats:
        """A stage waits for the next task of the order, as ranks do."""
        stages, free, left, window = self._order.stages, self._free, self._left, self._window
        last = len(stages) - 1
        is_handed_on = [group > 0 and stages[group] != stages[group - 1] for group in range(len(stages))]
        reached = [0.0] * len(left)  # when each round left the group it was in last
        for i, group in zip(self._order.rounds.tolist(), self._order.groups.tolist(), strict=True):
            stage = stages[group]
            if group:
                earliest = reached[i] + self._hop[i] if is_handed_on[group] else reached[i]
            else:
                earliest = self._ready[i]
                if window is not None and i >= window:
                    earliest = max(earliest, left[i - window] + self._return_s)
            start = max(earliest, free[stage])
            self._starts[i][group] = start
            reached[i] = free[stage] = start + self._seconds[i][group]
            if group == last:
                left[i] = reached[i]
        return np.array(self._starts)

    def as_they_come(self) -> Floats:
        """A free stage takes the first of the tasks that are there, by their places in the order; rounds are ready in
        their own order."""
        stages, free, left, window = self._order.stages, self._free, self._left, self._window
        last, num_rounds = len(stages) - 1, len(left)
        ready: list[float] = np.maximum.accumulate(self._ready).tolist()
        place = np.empty((num_rounds, len(stages)), dtype=np.int64)
        place[self._order.rounds, self._order.groups] = np.arange(len(self._order.rounds))
        places = place.tolist()
        there = [0.0] * len(stages)  # when the last round reached each group: rounds overtake none on a link
        waiting: list[list[tuple[int, int, int]]] = [[] for _ in free]
        events = [(ready[i], i, 0) for i in range(num_rounds if window is None else min(window, num_rounds))]
        heapq.heapify(events)
        while events:
            now = events[0][0]
            changed = set()
            while events and events[0][0] == now:
                _, i, group = heapq.heappop(events)
                if group >= 0:
                    heapq.heappush(waiting[stages[group]], (places[i][group], i, group))
                    changed.add(stages[group])
                else:
                    changed.add(-1 - group)  # a stage that is free again
            for stage in changed:
                if not waiting[stage] or free[stage] > now:
                    continue
                _, i, group = heapq.heappop(waiting[stage])
                self._starts[i][group] = now
                end_s = free[stage] = now + self._seconds[i][group]
                heapq.heappush(events, (end_s, i, -1 - stage))
                if group < last:
                    hop_here = self._hop[i] if stages[group + 1] != stage else 0.0
                    there[group + 1] = max(end_s + hop_here, there[group + 1])
                    heapq.heappush(events, (there[group + 1], i, group + 1))
                else:
                    left[i] = end_s
                    if window is not None and i + window < num_rounds:
                        heapq.heappush(events, (max(end_s + self._return_s, ready[i + window]), i + window, 0))
        return np.array(self._starts)
