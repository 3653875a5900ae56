"""A rank's tasks: its rounds in its groups of layers, in the order that all ranks know, and the messages between."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from tuner.plan.plan import Parallel
from tuner.plan.task_order import task_order


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundTask:
    """A round in one group of layers, and the links that its hidden states come and go by; None: on this rank."""

    round_index: int
    group: int
    source: int | None  # stage that hands on to it
    received: int  # which message of that link it is, counted over a pass
    target: int | None  # stage that it hands on to
    sent: int


@dataclass(frozen=True, slots=True)
class Announced:
    """An expected message of a link: its round, and how many of this rank's tasks its sender may wait for."""

    round_index: int
    after: int


@dataclass(frozen=True, slots=True)
class StageTasks:
    """The tasks of a stage in a pass, in order, and the messages that its links receive."""

    tasks: tuple[RoundTask, ...]
    announced: dict[int, list[Announced]]
    """By the stage that hands on."""

    @property
    def by_round(self) -> list[int]:
        """Places of the tasks in the order of rounds, those of one round in the order of groups."""
        return sorted(range(len(self.tasks)), key=lambda at: (self.tasks[at].round_index, self.tasks[at].group))


def tasks_of(parallel: Parallel, stage: int, num_rounds: int, window: int | None = None) -> StageTasks:
    """The tasks of a stage.

    A message's sender waits, directly or not, only for tasks that are earlier than it in the order of all tasks. With
    one group a stage it waits for the stage that it hands on to by the window alone (and for messages that have long
    been read).
    """
    order = task_order(num_rounds, parallel.pp_size, parallel.virtual_stages, parallel.stage_order, window)
    stages, last = order.stages, parallel.num_groups - 1
    tasks = list[RoundTask]()
    announced: dict[int, list[Announced]] = {}
    counts: Counter[tuple[str, int]] = Counter()
    queued = 0
    sent_after: dict[tuple[int, int], int] = {}  # own tasks before the sender's
    for i, group in zip(order.rounds.tolist(), order.groups.tolist(), strict=True):
        if group < last and stages[group + 1] == stage:
            by_window = max(i + 1 - (window or num_rounds), 0)  # rounds that have left when this one begins
            sent_after[i, group] = queued if parallel.virtual_stages > 1 else by_window
        if stages[group] != stage:
            continue
        source = stages[group - 1] if group and stages[group - 1] != stage else None
        target = stages[group + 1] if group < last and stages[group + 1] != stage else None
        places = ("received", -1 if source is None else source), ("sent", -1 if target is None else target)
        tasks.append(
            RoundTask(
                round_index=i,
                group=group,
                source=source,
                received=counts[places[0]],
                target=target,
                sent=counts[places[1]],
            )
        )
        counts.update(places)
        if source is not None:
            announced.setdefault(source, []).append(Announced(i, sent_after[i, group - 1]))
        queued += 1
    return StageTasks(tuple(tasks), announced)
