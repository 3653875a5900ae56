"""Memory of a host's cards that all its ranks can write to, and counters that streams can wait on.

One buffer a rank, one rendezvous over *all* ranks of the host. The rendezvous of torch's symmetric memory counts its
messages with one number a process: rendezvous over different sets of ranks leave the numbers of two processes apart,
and each then waits for a key that the other never writes. Three stages with a buffer for each boundary hung so.

A rank's buffer has lanes; a lane has slots that one sender fills, in order. Two counters belong to each pair of sender
and lane, and only ever grow:

    pushed  in the receiver's memory, written by the sender: so many messages lie, or lay, in the lane
    freed   in the sender's memory, written by the receiver: so many messages have been read

The sender of message n (from 0) waits for `freed >= n - slots + 1`, copies, writes `pushed = n + 1`. The receiver waits
for `pushed >= n + 1`, reads, writes `freed = n + 1`.

**No cycle.** A task is a round in one group of layers; a stage may hold several groups. All tasks of a pass stand in
one order that every rank knows, `tuner.plan.task_order`, and each stage runs its own tasks in it; a decode step is one
more round, and passes and steps follow one another. What a card waits for when it comes to a task is

1. its own tasks before this one, by the queue;
2. `pushed` of the message that it reads, written after the task of the group before;
3. for the first group, the round `window` before to have left the last group; in decode the step before;
4. where it lays what it sends: its own send of `slots` messages before, on the same link, to have been copied;

and the copy of message n of a link, which is queued behind the task that made it, waits for `freed`, written after the
task that reads message n - slots. Every one of these is earlier in the order than the task. 1. to 3. by what the order
is: tasks of one round by group, of one group by round, and windows. For the copies: the order is the record of a run in
which a task that sends message n of a link starts only after the reader of message n - MESSAGES has started, and
MESSAGES is at most `slots`. 4. waits for the copy of message n - slots, and so for the reader of message n - 2 slots,
which is earlier still. Messages of a link are read in the order in which they are sent, so that counters and slots in
turn tell them apart. So the earliest unfinished task of all can always go on: none waits for a later one, whatever
times are.

With one group a stage the order is (round, stage): the reader of message n - slots is round n - slots on the next
stage, which comes before round n whatever `slots` is. With several, a loop of links that are all full could wait for
itself; no order in which that happens is a record of a run that ended.

Ranks queue their work in the order too: what a card waits for never stands behind the wait, even if it ran all its
queues as one. Loading a kernel, starting a recorded graph or filling a queue may make the host wait for its own card,
and so only for earlier tasks again. Receives of NCCL, which wait on the device as well, are posted ahead only where
their senders' tasks come after no task of this rank that has yet to be queued (`Inbound.expect`). Counters only grow,
so a wait that was met stays met, whoever is first. Around a loop the first messages, which make connections, go one
link after the other.

Two neighbours hand on to one stage where rounds pass up and down: each has a lane of its own, for a lane has one
sender.

A wait on a counter is a command of the card's front end and occupies no multiprocessor, as a kernel that waits does:
docs/running.md has what that costs.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Protocol

import torch
import torch.distributed as dist

_ALIGNMENT = 256
_PUSHED, _FREED = 0, 1
_KINDS = 2
_GEQ = 0  # CU_STREAM_WAIT_VALUE_GEQ: cyclic, on 32 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """The slots of one sender in every rank's buffer: [slots, rows, width]."""

    slots: int
    rows: int
    width: int
    dtype: torch.dtype

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Of the lane as a tensor."""
        return self.slots, self.rows, self.width

    @property
    def size_bytes(self) -> int:
        """Rounded up, so that each lane begins aligned."""
        return -(-prod(self.sizes) * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


class Queue(Protocol):
    """A queue of device work, run in order."""

    def mark(self) -> object:
        """An event that another queue can wait for: all work queued so far is done."""

    def wait_for(self, moment: object) -> None:
        """Work queued from here on waits for an event of another queue."""


class Memory(Protocol):
    """Shared memory as the links use it: each call queues work and returns at once. Ranks are global."""

    def inbox(self, lane: int) -> torch.Tensor:
        """This rank's slots of a lane, [slots, rows, width]."""

    def copy(self, queue: Queue, receiver: int, lane: int, slot: int, source: torch.Tensor) -> None:
        """Copy `source` [n, width] into the receiver's slot."""

    def pushed(self, queue: Queue, receiver: int, lane: int, count: int) -> None:
        """Tell the receiver that it has had `count` messages, once what this queue copied has arrived."""

    def wait_pushed(self, queue: Queue, sender: int, lane: int, count: int) -> None:
        """Wait until the sender has pushed `count` messages."""

    def freed(self, queue: Queue, sender: int, lane: int, count: int) -> None:
        """Tell the sender that `count` of its messages have been read."""

    def wait_freed(self, queue: Queue, receiver: int, lane: int, count: int) -> None:
        """Wait until the receiver has read `count` messages."""

    def new_queue(self) -> Queue:
        """A queue beside the current one."""

    def current_queue(self) -> Queue:
        """The queue that the device's other work goes to."""


class StreamQueue:
    """A CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream

    def mark(self) -> object:
        """See `Queue`."""
        return self.stream.record_event()

    def wait_for(self, moment: object) -> None:
        """See `Queue`."""
        assert isinstance(moment, torch.cuda.Event)
        self.stream.wait_event(moment)


class PeerMemory:
    """Symmetric memory of all ranks of a host. See `Memory`; making one is collective over them.

    group: all ranks of this host, over gloo; ranks: their global numbers; channels: of signals.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        ranks: Sequence[int],
        lanes: Sequence[Lane],
        device: torch.device,
        *,
        channels: int = 0,
    ) -> None:
        import torch.distributed._symmetric_memory as symmetric_memory

        self.device, self.lanes = device, tuple(lanes)
        self._member = {rank: index for index, rank in enumerate(ranks)}
        self._me = self._member[dist.get_rank()]
        self._starts = [sum(lane.size_bytes for lane in lanes[:index]) for index in range(len(lanes))]
        size_bytes = sum(lane.size_bytes for lane in lanes)
        self._buffer = symmetric_memory.empty(size_bytes, device=device, dtype=torch.uint8)
        self._handle = symmetric_memory.rendezvous(self._buffer, group)
        num_words = (len(lanes) * _KINDS + channels) * len(ranks)
        if num_words * 4 > self._handle.signal_pad_size:
            raise RuntimeError(f"{num_words} counters do not fit into {self._handle.signal_pad_size} bytes")
        self._boxes = [[self._lane(member, lane) for lane in range(len(lanes))] for member in range(len(ranks))]
        self._counters = list(self._handle.signal_pad_ptrs)
        dist.barrier(group)

    def inbox(self, lane: int) -> torch.Tensor:
        """See `Memory`."""
        return self._boxes[self._me][lane]

    def copy(self, queue: Queue, receiver: int, lane: int, slot: int, source: torch.Tensor) -> None:
        """See `Memory`."""
        assert isinstance(queue, StreamQueue)
        with torch.cuda.stream(queue.stream):
            self._boxes[self._member[receiver]][lane][slot, : source.shape[0]].copy_(source)

    def pushed(self, queue: Queue, receiver: int, lane: int, count: int) -> None:
        """See `Memory`."""
        assert isinstance(queue, StreamQueue)
        _write(queue.stream, self._counter(receiver, lane, _PUSHED, self._me), count)

    def wait_pushed(self, queue: Queue, sender: int, lane: int, count: int) -> None:
        """See `Memory`."""
        assert isinstance(queue, StreamQueue)
        _wait(queue.stream, self._own_counter(lane, _PUSHED, sender), count)

    def freed(self, queue: Queue, sender: int, lane: int, count: int) -> None:
        """See `Memory`."""
        assert isinstance(queue, StreamQueue)
        _write(queue.stream, self._counter(sender, lane, _FREED, self._me), count)

    def wait_freed(self, queue: Queue, receiver: int, lane: int, count: int) -> None:
        """See `Memory`."""
        assert isinstance(queue, StreamQueue)
        _wait(queue.stream, self._own_counter(lane, _FREED, receiver), count)

    @property
    def first_channel(self) -> int:
        """The first signal channel whose flags lie beyond the counters."""
        return len(self.lanes) * _KINDS

    def inboxes(self, first: int, count: int) -> torch.Tensor:
        """This rank's slots of equal lanes that lie one after the other, [count, numbers], each with its padding."""
        lane = self.lanes[first]
        width = lane.size_bytes // lane.dtype.itemsize
        start = self._starts[first] // lane.dtype.itemsize
        seen: torch.Tensor = self._handle.get_buffer(self._me, (count, width), lane.dtype, start)
        return seen

    def copy_part(self, queue: Queue, receiver: int, lane: int, slot: int, source: torch.Tensor) -> None:
        """Copy `source` [1, n] to the front of the receiver's slot [1, width]."""
        assert isinstance(queue, StreamQueue)
        with torch.cuda.stream(queue.stream):
            self._boxes[self._member[receiver]][lane][slot, :, : source.shape[1]].copy_(source)

    def signal(self, queue: Queue, receiver: int, channel: int) -> None:
        """Set this rank's flag at the receiver, once what this queue copied has arrived and the flag is clear."""
        assert isinstance(queue, StreamQueue)
        with torch.cuda.stream(queue.stream):
            self._handle.put_signal(self._member[receiver], channel)

    def await_signal(self, queue: Queue, sender: int, channel: int) -> None:
        """Wait for the sender's flag and clear it."""
        assert isinstance(queue, StreamQueue)
        with torch.cuda.stream(queue.stream):
            self._handle.wait_signal(self._member[sender], channel)

    def new_queue(self) -> Queue:
        """See `Memory`."""
        # Of high priority: its small copies must not queue behind the blocks of a product.
        return StreamQueue(torch.cuda.Stream(self.device, priority=-1))

    def current_queue(self) -> Queue:
        """See `Memory`."""
        return StreamQueue(torch.cuda.current_stream(self.device))

    def _lane(self, member: int, lane: int) -> torch.Tensor:
        spec, start = self.lanes[lane], self._starts[lane]
        return self._handle.get_buffer(member, spec.sizes, spec.dtype, start // spec.dtype.itemsize)

    def _counter(self, rank: int, lane: int, kind: int, member: int) -> int:
        """Address of a counter in the memory of `rank`, about `member`."""
        word = (lane * _KINDS + kind) * len(self._member) + member
        return int(self._counters[self._member[rank]]) + 4 * word

    def _own_counter(self, lane: int, kind: int, rank: int) -> int:
        word = (lane * _KINDS + kind) * len(self._member) + self._member[rank]
        return int(self._counters[self._me]) + 4 * word


def _write(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Queue the writing of a counter, after all that the stream has written (CU_STREAM_WRITE_VALUE_DEFAULT)."""
    _check("cuStreamWriteValue32", _driver().cuStreamWriteValue32_v2(stream.cuda_stream, address, value, 0))


def _wait(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """Queue a wait until a counter is at least `value`."""
    _check("cuStreamWaitValue32", _driver().cuStreamWaitValue32_v2(stream.cuda_stream, address, value, _GEQ))


def _check(name: str, code: int) -> None:
    if code:
        raise RuntimeError(f"{name} failed with CUDA error {code}")


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWriteValue32_v2", "cuStreamWaitValue32_v2"):
        function = getattr(driver, name)
        function.argtypes = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint]
        function.restype = ctypes.c_int
    return driver
