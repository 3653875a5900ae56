"""When each round starts and finishes on each stage: the exact pipeline recurrence and what follows from it.

    start(i,k)  = max( finish(i-1,k),
                       finish(i,k-1) + hop(i)              for k > 0,
                       finish(i-W,K-1) + return_s          for k = 0 and i >= W,
                       ready(i)                            for k = 0 )
    finish(i,k) = start(i,k) + t(i,k)

Within a stage the recurrence is a running maximum: with S the prefix sums of t, finish(i) - S(i) is the maximum over
j <= i of earliest(j) - S(j-1). So a stage is one `np.maximum.accumulate` over all rounds. With a window the rounds'
earliest starts on stage 0 follow from finishes: from those without a window they rise, wave after wave, to the least
that agree with one another. Where that takes many waves, W rounds are run at a time (round i waits for round i-W only,
so W rounds are independent of one another's windows).

Where a stage holds several groups of layers the same holds for each group k, with K the number of groups, but for two
things: a stage runs its tasks in the order of `tuner.plan.task_order`, so that instead of finish(i-1,k) it waits for
the task before in that order (KV is there: in a group rounds run in order); and there is no hop where the group before
is on the same stage. Where requests arrive over time, that order would hold a round up inside the pipeline until
requests have come that are not there yet. A stage then takes, of the tasks that are there when it is free, the first in
that order (`tuner.recurrence.tasks`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tuner.plan.cost_model import CostModel
from tuner.plan.stage_cost import Floats
from tuner.plan.task_order import TaskOrder, task_order
from tuner.recurrence.tasks import Tasks

MOST_WAVES = 12
"""How often rounds are held up by the window of what was found before, until nothing changes."""
SHORT_WINDOW = 48
"""Up to it rounds are run one by one in lists: arrays of so few are slower."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """Start and finish seconds of every round in every group (stage), both [num_rounds, num_groups]."""

    start_s: Floats
    finish_s: Floats

    @property
    def makespan_s(self) -> float:
        """Seconds until the last round leaves the last group."""
        return float(self.finish_s[-1, -1])


def simulate(
    stage_s: Floats,
    hop_s: Floats | None = None,
    window: int | None = None,
    return_s: float = 0.0,
    ready_s: Floats | None = None,
    free_s: Floats | None = None,
    order: TaskOrder | None = None,
    in_order: bool = True,
) -> Timeline:
    """Run the recurrence.

    `stage_s` is [num_rounds, num_groups], `hop_s` and `ready_s` (the earliest start on stage 0) are [num_rounds],
    `free_s` (when each stage ends what ran before the first round) is [pp_size]. `order` is that of stages with several
    groups; without it each group is a stage. `in_order`: a stage waits for the next task of that order, as ranks do.
    """
    if order is not None:
        tasks = Tasks(stage_s, hop_s, window, return_s, ready_s, order)
        start = tasks.in_order() if in_order else tasks.as_they_come()
        return Timeline(start, start + stage_s)
    num_rounds, pp_size = stage_s.shape
    hop = np.zeros(num_rounds) if hop_s is None else hop_s
    if window is not None and window >= num_rounds:
        window = None
    ready = np.zeros(num_rounds) if ready_s is None else ready_s
    free = np.zeros(pp_size) if free_s is None else free_s
    finish = None if ready.any() or free.any() else _equal_stages(stage_s, hop)
    if finish is None:
        finish = _in_blocks(stage_s, hop, num_rounds, return_s, ready, free)
    if window is not None and not _window_is_wide(finish, stage_s, window, return_s):
        settled = _in_waves(stage_s, hop, window, return_s, ready, free, finish[:, -1])
        if settled is None:
            in_short = _in_lists if window <= SHORT_WINDOW else _in_blocks
            settled = in_short(stage_s, hop, window, return_s, ready, free)
        finish = settled
    start = finish - stage_s
    np.maximum(start[:, 0], ready, out=start[:, 0])  # which rounding may miss
    return Timeline(start, finish)


def _in_blocks(stage_s: Floats, hop: Floats, window: int, return_s: float, ready: Floats, free: Floats) -> Floats:
    """Finishes, `window` rounds at a time."""
    num_rounds, pp_size = stage_s.shape
    before, after = (np.ascontiguousarray(sums.T) for sums in _prefix_sums(stage_s))
    finish = np.empty((pp_size, num_rounds))
    latest = free.tolist()  # finish(i-1,k) - S(i-1,k), the running maximum
    for first in range(0, num_rounds, window):
        rows = slice(first, min(first + window, num_rounds))
        earliest, hop_s = ready[rows], hop[rows]
        if first:
            opened = finish[-1, first - window : first - window + (rows.stop - first)] + return_s
            earliest = np.maximum(earliest, opened)
        for k in range(pp_size):
            lag = earliest - before[k, rows]
            lag[0] = max(lag[0], latest[k])
            np.maximum.accumulate(lag, out=lag)
            latest[k] = lag[-1]
            done = np.add(lag, after[k, rows], out=finish[k, rows])
            earliest = done + hop_s
    return np.ascontiguousarray(finish.T)


def _in_waves(
    stage_s: Floats, hop: Floats, window: int, return_s: float, ready: Floats, free: Floats, left_s: Floats
) -> Floats | None:
    """Finishes, from those on the last stage without a window; None where MOST_WAVES are not enough.

    Finishes only rise with what holds rounds up, and none rises above its exact one: where they agree with what they
    hold up, they are exact.
    """
    before, after = (np.ascontiguousarray(sums.T) for sums in _prefix_sums(stage_s))
    finish, earliest = np.empty_like(before), ready.copy()
    for wave in range(MOST_WAVES + 1):
        opened = np.maximum(ready[window:], left_s[:-window] + return_s)
        if wave and (opened <= earliest[window:]).all():
            return np.ascontiguousarray(finish.T)
        earliest[window:] = opened
        reached = earliest
        for k, free_s in enumerate(free.tolist()):
            done = np.subtract(reached, before[k], out=finish[k])
            done[0] = max(done[0], free_s)
            np.maximum.accumulate(done, out=done)
            done += after[k]
            reached = done + hop
        left_s = finish[-1]
    return None


def _in_lists(stage_s: Floats, hop: Floats, window: int, return_s: float, ready: Floats, free: Floats) -> Floats:
    """The same round by round."""
    latest: list[float] = free.tolist()
    left: list[float] = []
    finish: list[list[float]] = []
    columns = (each.tolist() for each in (*_prefix_sums(stage_s), hop, ready))
    for i, (before, after, hop_s, earliest) in enumerate(zip(*columns, strict=True)):
        if i >= window:
            earliest = max(earliest, left[i - window] + return_s)
        row = []
        for k, lag in enumerate(latest):
            own = earliest - before[k]
            if own > lag:
                latest[k] = lag = own
            done = lag + after[k]
            row.append(done)
            earliest = done + hop_s
        finish.append(row)
        left.append(row[-1])
    return np.array(finish)


def _prefix_sums(stage_s: Floats) -> tuple[Floats, Floats]:
    """Of each stage's seconds, the round itself left out and counted."""
    before = np.zeros_like(stage_s)
    np.cumsum(stage_s[:-1], axis=0, out=before[1:])
    return before, before + stage_s


def order_of(cost: CostModel, num_rounds: int, window: int | None) -> TaskOrder | None:
    """The order in which stages of several groups run so many rounds; None where each holds one."""
    if cost.virtual_stages == 1:
        return None
    return task_order(num_rounds, cost.pp_size, cost.virtual_stages, cost.stage_order, window)


def _equal_stages(stage_s: Floats, hop_s: Floats) -> Floats | None:
    """Finishes where every round takes the same time on all stages and nothing else holds it up; None where not.

    A path to (i, k) runs through every round up to i once and through k of them once more, with their hops: the sum
    of t up to i, and k times the largest t + hop so far.
    """
    if not (stage_s == stage_s[:, :1]).all():
        return None
    seconds = stage_s[:, 0]
    slowest = np.maximum.accumulate(seconds + hop_s)
    finish: Floats = np.cumsum(seconds)[:, None] + slowest[:, None] * np.arange(stage_s.shape[1])
    return finish


def _window_is_wide(finish: Floats, stage_s: Floats, window: int, return_s: float) -> bool:
    """Whether every round has left before stage 0 would take the one that waits for it."""
    opened = finish[:-window, -1] + return_s
    return bool((opened <= finish[window:, 0] - stage_s[window:, 0]).all())
