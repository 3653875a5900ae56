"""All-gather through shared memory of one host: copy engines move the data, so no multiprocessor is occupied.

Each member of the group has a lane for every member; a lane has `SLOTS` slots, used in turn. Gather n:

1. `new_part` waits until the others have read what gather n - SLOTS put into their lanes (`freed`), then gives this
   rank's slot of its own lane, into which its part is written;
2. `begin_gather` copies the part to the others' lanes and says so (`filled`), on a queue of its own, beside what
   follows;
3. the function that it returns waits for the others' parts (`filled`);
4. `release` tells the others that this rank has read them (`freed`).

A signal is one flag a pair, channel and direction, set by one side and cleared by the other: work that uses it can be
recorded and replayed. Rounds are recorded one by one and replayed in any number, so that the slot of a round's last
gather may be that of the next round's first: without step 4 a part could be overwritten before it is read.

**No cycle**: number the steps as above, gathers by the order in which every rank queues them.
Step 1 of gather n waits for step 4 of gather n - SLOTS, step 3 for step 2 of the same gather: always for a smaller
number. All ranks queue the steps in this order on one queue but for the copies, which wait for this rank's own part
alone; so what a queue waits for never stands behind the wait, even if a card ran both queues as one.
`tests/profiler/comm/links/test_peer_gather.py` runs it on queues of random speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from profiler.comm.links.buffers import GATHER_SLOTS as SLOTS
from profiler.comm.links.group import RankGroup
from profiler.comm.links.peer_memory import Lane, PeerMemory


def gather_lanes(size: int, numbers: int, dtype: torch.dtype) -> list[Lane]:
    """A lane for each of `size` members, whose parts have at most so many numbers."""
    return [Lane(slots=SLOTS, rows=1, width=numbers, dtype=dtype)] * size


class PeerGatherGroup(RankGroup):
    """A `RankGroup` whose gathers go through shared memory; its other collectives are unchanged.

    ranks: the members' global numbers; first_lane: of the memory's lanes, the first of this group.
    """

    def __init__(self, group: RankGroup, ranks: Sequence[int], memory: PeerMemory, first_lane: int) -> None:
        super().__init__(group.group, group.size, group.rank)
        self.memory, self.first_lane = memory, first_lane
        self.others = [rank for index, rank in enumerate(ranks) if index != group.rank]
        self._copies = memory.new_queue()
        self._count = 0
        self._slot = 0
        for slot in range(SLOTS):
            self._say(self._freed(slot))

    def new_part(self, like: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """See `RankGroup`: this rank's slot of its own lane, once the others have read what it held."""
        self._slot = self._count % SLOTS
        self._count += 1
        self._await(self._freed(self._slot))
        return self._part(self.rank, torch.Size(size))

    def begin_gather(self, tensor: torch.Tensor, *, into: torch.Tensor | None = None) -> Callable[[], torch.Tensor]:
        """See `RankGroup`. A tensor that is not this rank's slot goes the usual way."""
        slot = self._slot
        if tensor.data_ptr() != self.memory.inbox(self.first_lane + self.rank)[slot].data_ptr():
            return super().begin_gather(tensor, into=into)
        copies = self._copies
        copies.wait_for(self.memory.current_queue().mark())
        flat = tensor.reshape(1, -1)
        for rank in self.others:
            self.memory.copy_part(copies, rank, self.first_lane + self.rank, slot, flat)
            self.memory.signal(copies, rank, self._filled(slot))

        def wait() -> torch.Tensor:
            self._await(self._filled(slot))
            # The copies have left before anything after this round writes to the slot, and are part of a recording.
            self.memory.current_queue().wait_for(copies.mark())
            return self._all(slot, tensor.shape)

        return wait

    def release(self) -> None:
        """See `RankGroup`: what was gathered last has been read."""
        self._say(self._freed(self._slot))

    def _filled(self, slot: int) -> int:
        return self.memory.first_channel + slot

    def _freed(self, slot: int) -> int:
        return self.memory.first_channel + SLOTS + slot

    def _say(self, channel: int) -> None:
        for rank in self.others:
            self.memory.signal(self.memory.current_queue(), rank, channel)

    def _await(self, channel: int) -> None:
        for rank in self.others:
            self.memory.await_signal(self.memory.current_queue(), rank, channel)

    def _part(self, member: int, size: torch.Size) -> torch.Tensor:
        return self.memory.inbox(self.first_lane + member)[self._slot, 0, : size.numel()].view(size)

    def _all(self, slot: int, size: torch.Size) -> torch.Tensor:
        """The parts of all members, [size, ...]: lanes lie one after the other."""
        lanes = self.memory.inboxes(self.first_lane, self.size)
        first = slot * self.memory.lanes[self.first_lane].width
        parts = lanes[:, first : first + size.numel()]
        return parts.view(self.size, *size)
