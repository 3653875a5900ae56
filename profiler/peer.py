"""Messages between two cards that see each other's memory: a ring of buffers that the other side writes into.

NCCL moves messages with kernels, and a receive that is posted ahead spins on multiprocessors until its data is there:
products beside it took 1.4 to 1.6 times as long on two H100 (8 % more with two blocks a communicator). Here the copy
engines move the data, and what waits is one small kernel on a stream that has nothing else to do.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from profiler.device import nccl_link

SLOTS = 2


def has_peer_memory(device: torch.device) -> bool:
    """Whether all ranks are on one machine whose cards reach each other's memory, and NCCL was not told otherwise."""
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    return device.type == "cuda" and one_host and nccl_link() in ("nvlink", "p2p")


class PeerRing:
    """One direction between two ranks: the sender fills its own slot, pushes it, and the receiver acknowledges.

    Both sides allocate the ring, [SLOTS, rows, width]; making it is collective over the pair. Nothing waits on the
    host: each call queues work on the current stream.
    """

    def __init__(
        self, group: dist.ProcessGroup, *, rows: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.buffers = symmetric_memory.empty(SLOTS, rows, width, device=device, dtype=dtype)
        self._handle = symmetric_memory.rendezvous(self.buffers, group)
        self._other = 1 - self._handle.rank
        self._remote = self._handle.get_buffer(self._other, self.buffers.shape, dtype)
        dist.barrier(group)

    def slot(self, slot: int, rows: int) -> torch.Tensor:
        """This side's buffer: what will be pushed, or what was received, [rows, width]."""
        return self.buffers[slot, :rows]

    def push(self, slot: int, rows: int) -> None:
        """Copy this side's slot into the other side's and tell it."""
        self._remote[slot, :rows].copy_(self.buffers[slot, :rows])
        self._handle.put_signal(self._other, slot)

    def wait_pushed(self, slot: int) -> None:
        """Wait until the other side's push has arrived."""
        self._handle.wait_signal(self._other, slot)

    def acknowledge(self, slot: int) -> None:
        """Tell the other side that the slot has been read."""
        self._handle.put_signal(self._other, SLOTS + slot)

    def wait_acknowledged(self, slot: int) -> None:
        """Wait until the other side has read what was pushed last."""
        self._handle.wait_signal(self._other, SLOTS + slot)
