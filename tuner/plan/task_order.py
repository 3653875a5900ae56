"""The order in which each stage runs its tasks, a task being a round in one group of layers.

With one group a stage it is the order of rounds. With several the order is a rule that needs no times, so that every
rank finds the same one from the plan alone: the order in which tasks would start if each took one unit of time and a
hand-off the pp_size-th part of one. Of the tasks that wait for it a stage takes

- *blocks*: the oldest block's, in a block the earliest pass's, in a pass the oldest round's. With blocks of pp_size
  rounds this is Megatron-LM's interleaving (`microbatch_group_size_per_vp_stage`); one more round a block hides what
  hand-offs take around the loop. Blocks differ by one round where Megatron wants the rounds to divide by pp_size.
- *depth first*: the oldest round's, with pp_size to pp_size + SPARE_ROUNDS rounds in flight. In V order each stage then
  alternates between the passes, as in ZB-V.

Whichever ends first in those units is taken. Measured in units of a round on a stage, loops so have (pp_size - 1) /
virtual_stages rounds of bubble for nearly all numbers of rounds; in V order an even number of passes ends where it
began, and the last round's way back costs as much as passes save: 2 (pp_size - 1) / virtual_stages.

**Why no order can hang.** The order is the record of one run in which every task began only when

1. the group before had ended for this round, and reached the stage as the oldest message of its link,
2. the round `window` before had left the last group,
3. of the messages that its own link carries no more than MESSAGES - 1 had not begun to be read,

and the run came to its end with all tasks (`_run` returns nothing where it does not). So the waits of 1. to 3. and of
a stage for itself all point from a task to one that is earlier in the record. The record is a linear extension of
them, whatever the real times are: the earliest unfinished task can always go on. A link with room for more messages
waits for less, which keeps this true.

That a run comes to its end: it stops only where every stage that has work is kept from it by 3. Then each such link is
full, and so is the link out of the stage it leads to: following them closes a circle of full links, with MESSAGES
different rounds on each. A circle has at least two links, so with fewer than 2 * MESSAGES rounds in flight there is
none; more are tried first (a circle of a loop has pp_size links).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from tuner.plan.stage_order import StageOrder, stages_of_groups, visits_of

MESSAGES = 2
"""Hidden states on a link that its sender may have handed over before the first of them is begun to be read; no
transport holds fewer."""
SPARE_ROUNDS = 2
"""Rounds in flight beyond one for each stage: they are begun while others are handed on."""
MANY_ROUNDS = 256
"""With more, the first rule alone is tried."""


@dataclass(frozen=True, slots=True)
class TaskOrder:
    """All tasks in one order that no wait contradicts; each stage runs its own in this order."""

    rounds: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    stages: tuple[int, ...]
    """The stage of each group."""

    def of_stage(self, stage: int) -> list[tuple[int, int]]:
        """(round, group) of a stage's tasks, in order."""
        tasks = zip(self.rounds.tolist(), self.groups.tolist(), strict=True)
        return [(i, group) for i, group in tasks if self.stages[group] == stage]


@lru_cache(maxsize=1024)
def task_order(
    num_rounds: int, pp_size: int, virtual_stages: int, order: StageOrder, window: int | None = None
) -> TaskOrder:
    """The order of a plan's tasks. See the module."""
    stages = stages_of_groups(pp_size, virtual_stages, order)
    if virtual_stages == 1 or num_rounds == 0:
        rounds, groups = np.divmod(np.arange(num_rounds * pp_size), pp_size)
    else:
        most = min(window or num_rounds, num_rounds)
        found: list[tuple[int, list[int]]] = []
        # Every stage busy from when the first round can reach it: no order ends sooner.
        least = num_rounds * virtual_stages * pp_size + (pp_size - 1) * (pp_size + 1)
        rules = _rules(num_rounds, pp_size, virtual_stages, order, most)
        for blocks, in_flight in rules if num_rounds <= MANY_ROUNDS else rules[:1]:
            shortest = min((run[0] for run in found), default=None)
            run = _run(stages, blocks, min(in_flight, most), shortest)
            found += [run] if run is not None else []
            if run is not None and run[0] <= least:
                break
        if not found:
            run = _run(stages, [0] * num_rounds, min(2 * MESSAGES - 1, most))
            assert run is not None
            found.append(run)
        rounds, groups = _columns(min(found, key=lambda run: run[0])[1], num_rounds, visits_of(stages))
    return TaskOrder(rounds, groups, stages)


def _columns(
    visited: Sequence[int], num_rounds: int, visits: Sequence[Sequence[int]]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The round and the group of each task, from what `_run` knows rounds in visits by."""
    visit, i = np.divmod(np.array(visited, dtype=np.int64), num_rounds)
    visit %= len(visits)
    num_groups = np.array([len(groups) for groups in visits])[visit]
    first = np.array([groups[0] for groups in visits])[visit]
    place = np.arange(num_groups.sum()) - np.repeat(num_groups.cumsum() - num_groups, num_groups)  # in its visit
    return np.repeat(i, num_groups), np.repeat(first, num_groups) + place


def _rules(
    num_rounds: int, pp_size: int, virtual_stages: int, order: StageOrder, most: int
) -> list[tuple[list[int], int]]:
    """The block of each round, and how many rounds may be in flight; those most often best first.

    What no other rule is worse than is tried alone: of up to 64 rounds on up to 8 stages of 2 to 4 groups, no rule that
    is left out ended first.
    """
    rules = []
    for size in range(pp_size + SPARE_ROUNDS - 1, pp_size - 1, -1):
        num_blocks = max(num_rounds // size, -(-num_rounds // most), 1)
        rules.append(([i * num_blocks // num_rounds for i in range(num_rounds)], 2 * size))
    depth_first = [(list(range(num_rounds)), in_flight) for in_flight in range(pp_size + SPARE_ROUNDS, pp_size - 1, -1)]
    if most < num_rounds:  # a window: all may be best
        return rules + depth_first
    if virtual_stages == 2:
        return rules[:1] if order is StageOrder.V else rules + depth_first[:1]
    return rules + depth_first[: 2 if order is StageOrder.V and pp_size == 2 else 1]


def _run(
    stages: tuple[int, ...], blocks: Sequence[int], in_flight: int, shortest: int | None = None
) -> tuple[int, list[int]] | None:
    """How long the tasks take, and the rounds in their visits in the order of their start; None where they cannot all
    run, or where a stage's remaining work alone makes them take as long as `shortest`.

    A stage takes the oldest block first, in a block the earliest pass, in a pass the oldest round. So a round in a
    visit is known by one number, (block, visit, round) in this order, of which a stage takes the smallest. Plans are
    judged by the order many times, so this loop is written for speed.
    """
    visits, num_rounds = visits_of(stages), len(blocks)
    pp_size, num_visits, last = max(stages) + 1, len(visits), len(visits) - 1
    where = [stages[groups[0]] for groups in visits]
    taken = [pp_size * len(groups) for groups in visits]
    # Each visit's link, by the first visit that it leads to.
    link = [0] + [next(i for i in range(1, v + 1) if where[i - 1 : i + 1] == where[v - 1 : v + 1])
                  for v in range(1, num_visits)]  # fmt: skip
    unread = [0] * num_visits  # messages on a link that have not begun to be read
    waiting: list[deque[int]] = [deque() for _ in visits]  # tasks whose messages have come over a link, in order
    inbound = [[waiting[first] for first in sorted({link[v] for v in range(1, num_visits) if where[v] == stage})]
               for stage in range(pp_size)]  # fmt: skip
    free_at = [0] * pp_size
    remaining = [pp_size * num_rounds * stages.count(stage) for stage in range(pp_size)]
    begun = finished = now = 0
    is_finished = [False] * num_rounds
    tasks: list[int] = []
    # Events as they come: all tasks of a length end in the order of their start, and messages arrive in that of the
    # ends, so that queues of each hold them by time.
    ending: dict[int, deque[tuple[int, int]]] = {length: deque() for length in taken}
    arriving: deque[tuple[int, int]] = deque()
    queues = [*ending.values(), arriving]
    first_bit = 1 << where[0]
    changed = first_bit  # stages, a bit each, that may begin a task: something that kept them from it may be gone

    while finished < num_rounds:
        while changed:
            lowest = changed & -changed
            changed ^= lowest
            stage = lowest.bit_length() - 1
            if free_at[stage] > now:
                continue
            if shortest is not None and now + remaining[stage] >= shortest:
                return None
            ready = [queue[0] for queue in inbound[stage] if queue]
            if lowest == first_bit and begun < num_rounds and (begun < in_flight or is_finished[begun - in_flight]):
                ready.append(blocks[begun] * num_visits * num_rounds + begun)
            if len(ready) > 1:
                ready.sort()
            for task in ready:
                visit = task // num_rounds % num_visits
                if visit < last:
                    onward = link[visit + 1]
                    if unread[onward] >= MESSAGES:
                        continue
                    unread[onward] += 1
                if visit:
                    first = link[visit]
                    waiting[first].popleft()
                    unread[first] -= 1
                    changed |= 1 << where[first - 1]
                else:
                    begun += 1
                tasks.append(task)
                length = taken[visit]
                free_at[stage] = now + length
                remaining[stage] -= length
                ending[length].append((now + length, task))
                break
        times = [queue[0][0] for queue in queues if queue]
        if not times:
            return None
        now = min(times)
        for queue in ending.values():
            while queue and queue[0][0] == now:
                task = queue.popleft()[1]
                visit = task // num_rounds % num_visits
                changed |= 1 << where[visit]
                if visit < last:
                    arriving.append((now + 1, task + num_rounds))  # of the next visit
                else:
                    is_finished[task % num_rounds] = True
                    finished += 1
                    changed |= first_bit
        while arriving and arriving[0][0] == now:
            task = arriving.popleft()[1]
            visit = task // num_rounds % num_visits
            waiting[link[visit]].append(task)
            changed |= 1 << where[visit]
    return now, tasks
