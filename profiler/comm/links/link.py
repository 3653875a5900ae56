"""Hidden states between stages: sends that do not block, receives posted ahead, every shape derived from the plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from profiler.comm.links.buffers import POSTED_AHEAD, SEND_BUFFER_BYTES, STAGED


class Inbound(Protocol):
    """Hidden states of the rounds announced, in order, from the stage before."""

    def expect(self, tokens: Sequence[int], after: Sequence[int] = ()) -> None:
        """Announce the rounds to come, `tokens` rows each. Those announced before must all have been received.

        after: for each, how many of this rank's tasks of the pass its sender may be waiting for; none if left out.
        """

    def queued(self, num_tasks: int) -> None:
        """So many of this rank's tasks of the pass have been given to the device."""

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor:
        """Where the hidden states of the announced round `index` will lie, [T, hidden]."""

    def receive(self) -> None:
        """Wait for the next round; on CUDA the current stream waits, not the host."""

    def release(self) -> None:
        """The round received last has run: its buffer may be filled again."""


class Outbound(Protocol):
    """Hidden states of rounds, in order, to the stage after."""

    def begin(self) -> None:
        """Start a pass: rounds are counted from 0 again, after all earlier sends are done."""

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor | None:
        """The buffer that round `index` must write to, [T, hidden]; None where it may lie anywhere."""

    def reserve(self) -> None:
        """Wait until the next round may write to its buffer."""

    def send(self, tensor: torch.Tensor) -> None:
        """Begin to send the next round."""

    def drain(self) -> None:
        """Wait for all sends."""


class CollectiveInbound:
    """Receives of torch.distributed, posted ahead of their rounds. See `Inbound`."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        source: int,
        *,
        max_tokens: int,
        hidden_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.group, self.source = group, source
        # One buffer for each receive posted, used in turn.
        size = (POSTED_AHEAD, max_tokens, hidden_size)
        self.buffers = torch.zeros(size, device=device, dtype=dtype)
        self._posted: deque[dist.Work] = deque()
        self._to_post: deque[tuple[torch.Tensor, int]] = deque()
        self._free = POSTED_AHEAD  # buffers that may be filled
        self._queued = 0

    def expect(self, tokens: Sequence[int], after: Sequence[int] = ()) -> None:
        """See `Inbound`; posts the first receives.

        A receive that is posted may wait on the device, and the host for the device when it loads a kernel: so none is
        posted whose sender waits for what this rank has yet to queue.
        """
        if self._posted or self._to_post:
            raise RuntimeError("the rounds announced before have not all been received")
        buffers = [self.buffer(index, count) for index, count in enumerate(tokens)]
        self._to_post.extend(zip(buffers, after or [0] * len(buffers), strict=True))
        self._free, self._queued = POSTED_AHEAD, 0
        self._post()

    def queued(self, num_tasks: int) -> None:
        """See `Inbound`; posts receives that had to wait for that."""
        self._queued = num_tasks
        self._post()

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor:
        """See `Inbound`."""
        return self.buffers[index % POSTED_AHEAD, :num_tokens]

    def receive(self) -> None:
        """See `Inbound`."""
        self._posted.popleft().wait()

    def release(self) -> None:
        """See `Inbound`; posts the receive after those posted, into the buffer of the round that has just run."""
        self._free += 1
        self._post()

    def _post(self) -> None:
        while self._free and self._to_post and self._to_post[0][1] <= self._queued:
            work = dist.irecv(self._to_post.popleft()[0], self.source, group=self.group)
            assert work is not None
            self._posted.append(work)
            self._free -= 1


class CollectiveOutbound:
    """Sends of torch.distributed: neither a Work nor its tensor may go before the send is done. See `Outbound`.

    staging: [STAGED, max_tokens, hidden] on a card, where a recorded round writes to the same place each time.
    """

    def __init__(self, group: dist.ProcessGroup, target: int, *, staging: torch.Tensor | None = None) -> None:
        self.group, self.target, self.staging = group, target, staging
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._pending_bytes = 0

    def begin(self) -> None:
        """See `Outbound`."""
        self.drain()

    def buffer(self, index: int, num_tokens: int) -> torch.Tensor | None:
        """See `Outbound`."""
        return None if self.staging is None else self.staging[index % STAGED, :num_tokens]

    def reserve(self) -> None:
        """See `Outbound`."""
        while self.staging is not None and len(self._pending) >= STAGED:
            self._finish_oldest()

    def send(self, tensor: torch.Tensor) -> None:
        """See `Outbound`; waits only when earlier sends hold more than SEND_BUFFER_BYTES."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self.target, group=self.group)
        assert work is not None
        self._pending.append((work, tensor))
        self._pending_bytes += tensor.nbytes
        while self.staging is None and len(self._pending) > 1 and self._oldest_may_go():
            self._finish_oldest()

    def drain(self) -> None:
        """See `Outbound`."""
        while self._pending:
            self._finish_oldest()

    def _oldest_may_go(self) -> bool:
        # gloo's works never say that they are completed; NCCL's do.
        return self._pending_bytes > SEND_BUFFER_BYTES or self._pending[0][0].is_completed()

    def _finish_oldest(self) -> None:
        work, tensor = self._pending.popleft()
        work.wait()
        self._pending_bytes -= tensor.nbytes


class Return(Protocol):
    """The way from the last stage back to the first. Both call in the same order; ids are [R] int64."""

    def acknowledge(self) -> None:
        """On the last stage: one more round is done."""

    def wait_acknowledged(self) -> None:
        """On the first stage: wait for one more round to be done."""

    def send(self, ids: torch.Tensor) -> None:
        """On the last stage: send token ids, as they are now."""

    def receive(self, ids: torch.Tensor) -> None:
        """On the first stage: the next token ids, into `ids`."""

    def drain(self) -> None:
        """Wait for all sends."""


class CollectiveReturn:
    """Sends and receives of torch.distributed. See `Return`."""

    def __init__(self, group: dist.ProcessGroup, peer: int, *, device: torch.device) -> None:
        self.group, self.peer = group, peer
        self._token = torch.zeros(1, device=device, dtype=torch.int64)  # an acknowledgement has no content
        self._outbound = CollectiveOutbound(group, peer)

    def acknowledge(self) -> None:
        """See `Return`."""
        self.send(self._token)

    def wait_acknowledged(self) -> None:
        """See `Return`."""
        self.receive(self._token)

    def send(self, ids: torch.Tensor) -> None:
        """See `Return`."""
        self._outbound.send(ids.clone())

    def receive(self, ids: torch.Tensor) -> None:
        """See `Return`."""
        work = dist.irecv(ids, self.peer, group=self.group)
        assert work is not None
        work.wait()

    def drain(self) -> None:
        """See `Return`."""
        self._outbound.drain()
