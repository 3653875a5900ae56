"""Runs the commands that ranks queued, in any order that their cards' queues allow: a schedule.

A schedule fails when nothing can go on before all is done, when a round reads what is not its own, or when something is
overwritten that is still being read or written.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from tests.runtime.run.link_work import Counter_, Label, Work


class Schedule:
    """Runs programs one command, or half of one, at a time, in random order.

    serial: each card does all its queues' work in the order in which it was queued.
    """

    def __init__(self, programs: Sequence[Sequence[Work]], *, seed: int, serial: bool) -> None:
        self.programs, self.serial, self.random = programs, serial, random.Random(seed)
        self.done = [[False] * len(program) for program in programs]
        self.num_done = [0] * len(programs)  # all before it is done
        self.half_done: set[tuple[int, int]] = set()
        self.counters: dict[Counter_, int] = defaultdict(int)
        self.queues = [self._queues(program) for program in programs]
        self.inbox: dict[tuple[int, int, int], Label | None] = {}  # rank, lane, slot -> whose hidden states lie there
        self.staged: dict[tuple[int, tuple[int, int]], Label | None] = {}  # rank, (target, slot) -> the same
        self.users: Counter[tuple[object, ...]] = Counter()  # places that are being read (> 0) or written (< 0)

    def run(self) -> None:
        """Run to the end. Raises AssertionError for a deadlock or wrong data."""
        while True:
            ready = [item for item in self._heads() if self._is_ready(*item)]
            if not ready:
                break
            self._advance(*self.random.choice(ready))
        left = [(rank, work) for rank, queues in enumerate(self.queues) for queue in queues for work in queue[:1]]
        assert not left, f"nothing can go on: {[(rank, self.programs[rank][index]) for rank, index in left]}"

    def _queues(self, program: Sequence[Work]) -> list[list[int]]:
        if self.serial:
            return [list(range(len(program)))]
        by_queue: dict[int, list[int]] = defaultdict(list)
        for index, work in enumerate(program):
            by_queue[work.queue].append(index)
        return list(by_queue.values())

    def _heads(self) -> Iterator[tuple[int, int]]:
        for rank, queues in enumerate(self.queues):
            for queue in queues:
                if queue:
                    yield rank, queue[0]

    def _is_ready(self, rank: int, index: int) -> bool:
        work, done = self.programs[rank][index], self.done[rank]
        while self.num_done[rank] < len(done) and done[self.num_done[rank]]:
            self.num_done[rank] += 1
        barrier = next(
            (at for at in range(self.num_done[rank], index + 1) if self.programs[rank][at].waits_for_host), None
        )
        if barrier is not None and self.num_done[rank] < barrier:
            return False
        if work.kind == "wait":
            assert work.counter is not None
            return self.counters[work.counter] >= work.value
        return done[work.value] if work.kind == "wait_mark" else True

    def _advance(self, rank: int, index: int) -> None:
        work = self.programs[rank][index]
        if work.kind in ("copy", "compute") and (rank, index) not in self.half_done:
            self.half_done.add((rank, index))
            self._use(rank, work, 1)
            return
        if work.kind in ("copy", "compute"):
            self._use(rank, work, -1)
        if work.kind == "write":
            assert work.counter is not None and self.counters[work.counter] < work.value
            self.counters[work.counter] = work.value
        self.done[rank][index] = True
        for queue in self.queues[rank]:
            if queue and queue[0] == index:
                queue.pop(0)

    def _use(self, rank: int, work: Work, change: int) -> None:
        """Begin (1) or end (-1) to read and write what a copy or a task reads and writes."""
        source: tuple[object, ...] | None = None
        target: tuple[object, ...] | None = None
        staging = ("staging", rank, work.staging) if work.staging is not None else None
        if work.kind == "copy":
            source, target = staging, ("inbox", work.target, work.lane, work.slot)
        else:
            source, target = ("inbox", rank, work.lane, work.slot) if work.slot >= 0 else None, staging
        if source is not None:
            assert self.users[source] >= 0, f"rank {rank} reads {source} while it is written"
            self.users[source] += change
        if target is not None:
            assert self.users[target] == (0 if change > 0 else -1), f"rank {rank} writes {target} while it is used"
            self.users[target] -= change
        if change > 0 and work.kind == "compute" and work.slot >= 0:
            found = self.inbox[rank, work.lane, work.slot]
            assert work.label is not None
            assert found == (work.label[0] - 1, work.label[1]), f"rank {rank} reads {found} for {work.label}"
        if work.staging is None:
            return
        if change > 0 and work.kind == "copy":
            found = self.staged.get((rank, work.staging))
            assert found == work.label, f"rank {rank} sends {found} for {work.label}"
        if change < 0 and work.kind == "copy":
            self.inbox[work.target, work.lane, work.slot] = work.label
        if change < 0 and work.kind == "compute":
            self.staged[rank, work.staging] = work.label
