"""Links through shared memory of one host: copy engines move the data while the cards compute.

`profiler.comm.links.peer_memory` documents the order of waits and why they cannot deadlock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from profiler.comm.links.peer_memory import Lane, Memory

SLOTS = 2
HIDDEN, IDS = (0, 2), 1
"""Lanes of every rank: hidden states from its first source and from its second, where stages pass rounds up and down;
token ids and acknowledgements from the last stage."""


def link_lanes(
    *, max_tokens: int, hidden_size: int, dtype: torch.dtype, num_requests: int, num_sources: int = 1
) -> tuple[Lane, ...]:
    """The lanes of a plan's links. num_sources: of the stage that most stages hand on to."""
    hidden = Lane(slots=SLOTS, rows=max_tokens, width=hidden_size, dtype=dtype)
    ids = Lane(slots=SLOTS, rows=num_requests, width=1, dtype=torch.int64)
    return (hidden, ids, hidden)[: 1 + num_sources]


class PeerInbound:
    """Rounds arrive in this rank's slots in turn. See `profiler.comm.links.link.Inbound`."""

    def __init__(self, memory: Memory, source: int, lane: int = HIDDEN[0]) -> None:
        self.memory, self.source, self.lane = memory, source, lane
        self.slots = memory.inbox(lane)
        self._received = 0

    def expect(self, tokens: Sequence[int], after: Sequence[int] = ()) -> None:
        """See `Inbound`; nothing is posted: the sender writes when its data is there."""

    def queued(self, num_tasks: int) -> None:
        """See `Inbound`."""

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor:
        """See `Inbound`."""
        return self.slots[index % SLOTS, :num_tokens]

    def receive(self) -> None:
        """See `Inbound`."""
        self.memory.wait_pushed(self.memory.current_queue(), self.source, self.lane, self._received + 1)

    def release(self) -> None:
        """See `Inbound`."""
        self._received += 1
        self.memory.freed(self.memory.current_queue(), self.source, self.lane, self._received)


class PeerOutbound:
    """Rounds lie in slots of this side in turn until a queue of their own has copied them. See `Outbound`.

    staging: [SLOTS, max_tokens, hidden], where rounds lay what they send.
    """

    def __init__(self, memory: Memory, target: int, staging: torch.Tensor, lane: int = HIDDEN[0]) -> None:
        self.memory, self.target, self.staging, self.lane = memory, target, staging, lane
        self._queue = memory.new_queue()
        self._sent = 0
        self._first = 0  # the message with which the pass began: slots are counted from it
        self._copied: deque[object] = deque()  # moments from which on staging may be written again

    def begin(self) -> None:
        """See `Outbound`."""
        self.drain()
        self._first = self._sent

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor:
        """See `Outbound`."""
        return self.staging[index % SLOTS, :num_tokens]

    def reserve(self) -> None:
        """See `Outbound`."""
        if len(self._copied) == SLOTS:
            self.memory.current_queue().wait_for(self._copied.popleft())

    def send(self, tensor: torch.Tensor) -> None:
        """See `Outbound`; `tensor` lies in the round's buffer."""
        slot = (self._sent - self._first) % SLOTS
        self._queue.wait_for(self.memory.current_queue().mark())
        self.memory.wait_freed(self._queue, self.target, self.lane, max(self._first, self._sent - SLOTS + 1))
        self.memory.copy(self._queue, self.target, self.lane, slot, tensor)
        self._sent += 1
        self.memory.pushed(self._queue, self.target, self.lane, self._sent)
        self._copied.append(self._queue.mark())

    def drain(self) -> None:
        """See `Outbound`: until all has been read, on the current queue."""
        self.memory.wait_freed(self._queue, self.target, self.lane, self._sent)
        self.memory.current_queue().wait_for(self._queue.mark())
        self._copied.clear()


class PeerReturn:
    """The way back through the first rank's memory, all on the current queue. See `profiler.comm.links.link.Return`."""

    def __init__(self, memory: Memory, peer: int) -> None:
        self.memory, self.peer = memory, peer
        self._count = 0

    def acknowledge(self) -> None:
        """See `Return`."""
        self._count += 1
        self.memory.pushed(self.memory.current_queue(), self.peer, IDS, self._count)

    def wait_acknowledged(self) -> None:
        """See `Return`."""
        queue = self.memory.current_queue()
        self._count += 1
        self.memory.wait_pushed(queue, self.peer, IDS, self._count)
        self.memory.freed(queue, self.peer, IDS, self._count)

    def send(self, ids: torch.Tensor) -> None:
        """See `Return`."""
        queue, slot = self.memory.current_queue(), self._count % SLOTS
        self.memory.wait_freed(queue, self.peer, IDS, max(0, self._count - SLOTS + 1))
        self.memory.copy(queue, self.peer, IDS, slot, ids.unsqueeze(1))
        self._count += 1
        self.memory.pushed(queue, self.peer, IDS, self._count)

    def receive(self, ids: torch.Tensor) -> None:
        """See `Return`."""
        queue, slot = self.memory.current_queue(), self._count % SLOTS
        self._count += 1
        self.memory.wait_pushed(queue, self.peer, IDS, self._count)
        ids.copy_(self.memory.inbox(IDS)[slot, : ids.shape[0], 0])
        self.memory.freed(queue, self.peer, IDS, self._count)

    def drain(self) -> None:
        """See `Return`: nothing is kept back."""
