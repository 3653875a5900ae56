"""Hidden states between stages whose cards reach each other's memory: copied by copy engines, beside the compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch

from profiler.peer import SLOTS, PeerRing


class PeerInbound:
    """Rounds arrive in the ring's slots in turn. See `runtime.link.Inbound`."""

    def __init__(self, ring: PeerRing) -> None:
        self.ring = ring
        self._next = 0

    def expect(self, tokens: Sequence[int]) -> None:
        """See `Inbound`; nothing is posted: the sender writes when its data is there."""
        self._next = 0

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor:
        """See `Inbound`."""
        return self.ring.slot(index % SLOTS, num_tokens)

    def receive(self) -> None:
        """See `Inbound`."""
        self.ring.wait_pushed(self._next % SLOTS)

    def release(self) -> None:
        """See `Inbound`."""
        self.ring.acknowledge(self._next % SLOTS)
        self._next += 1


class PeerOutbound:
    """Rounds lie in this side's slots in turn until a stream of their own has copied them. See `Outbound`."""

    def __init__(self, ring: PeerRing, device: torch.device) -> None:
        self.ring, self.device = ring, device
        # Of high priority: its small kernels must not queue behind the blocks of a product.
        self.stream = torch.cuda.Stream(device, priority=-1)
        self._next = 0
        self._copied: deque[torch.cuda.Event] = deque()  # of the rounds whose slots are not yet free to be written
        self._unread: deque[int] = deque()  # slots pushed and not yet acknowledged

    def begin(self) -> None:
        """See `Outbound`."""
        self.drain()
        self._next = 0

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor:
        """See `Outbound`."""
        return self.ring.slot(index % SLOTS, num_tokens)

    def reserve(self) -> None:
        """See `Outbound`."""
        if len(self._copied) == SLOTS:
            torch.cuda.current_stream(self.device).wait_event(self._copied.popleft())

    def send(self, tensor: torch.Tensor) -> None:
        """See `Outbound`; `tensor` lies in the round's buffer."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            if len(self._unread) == SLOTS:
                self.ring.wait_acknowledged(self._unread.popleft())
            self.ring.push(self._next % SLOTS, tensor.shape[0])
            self._unread.append(self._next % SLOTS)
            copied = torch.cuda.Event()
            copied.record()
        self._copied.append(copied)
        self._next += 1

    def drain(self) -> None:
        """See `Outbound`: until all has been read, on the current stream."""
        with torch.cuda.stream(self.stream):
            while self._unread:
                self.ring.wait_acknowledged(self._unread.popleft())
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        self._copied.clear()
