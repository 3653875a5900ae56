"""Hidden states between stages: sends that do not block, receives posted ahead, every shape derived from the plan."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
import torch.distributed as dist

POSTED_AHEAD = 2  # receives a stage has posted beyond the round that it runs
SEND_BUFFER_BYTES = 512 << 20  # what unfinished sends may hold; the pipeline's sends are to be unlimited


class Inbound:
    """Receives the rounds' hidden states in order from the stage before."""

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
        self._posted: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._to_post: deque[torch.Tensor] = deque()

    def expect(self, tokens: Sequence[int]) -> None:
        """Announce the rounds to come, `tokens` rows each, and post the first receives."""
        if self._posted:
            raise RuntimeError("the rounds announced before have not all been received")
        self._to_post.extend(self.buffers[i % POSTED_AHEAD, :count] for i, count in enumerate(tokens))
        for _ in range(POSTED_AHEAD):
            self.post()

    def receive(self) -> torch.Tensor:
        """The next round's hidden states [T, hidden], valid until `post` is called for it."""
        work, tensor = self._posted.popleft()
        work.wait()
        return tensor

    def post(self) -> None:
        """Post the receive after those posted, into the buffer of the round that has just run."""
        if self._to_post:
            tensor = self._to_post.popleft()
            work = dist.irecv(tensor, self.source, group=self.group)
            assert work is not None
            self._posted.append((work, tensor))


class Outbound:
    """Sends tensors in order to one rank; neither a Work nor its tensor may go before the send is done."""

    def __init__(self, group: dist.ProcessGroup, target: int) -> None:
        self.group, self.target = group, target
        self._pending: deque[tuple[dist.Work, torch.Tensor]] = deque()
        self._pending_bytes = 0

    def send(self, tensor: torch.Tensor) -> None:
        """Begin to send; waits only when earlier sends hold more than SEND_BUFFER_BYTES."""
        tensor = tensor.contiguous()
        work = dist.isend(tensor, self.target, group=self.group)
        assert work is not None
        self._pending.append((work, tensor))
        self._pending_bytes += tensor.nbytes
        while len(self._pending) > 1 and self._oldest_may_go():
            self._finish_oldest()

    def drain(self) -> None:
        """Wait for all sends."""
        while self._pending:
            self._finish_oldest()

    def _oldest_may_go(self) -> bool:
        # gloo's works never say that they are completed; NCCL's do.
        return self._pending_bytes > SEND_BUFFER_BYTES or self._pending[0][0].is_completed()

    def _finish_oldest(self) -> None:
        work, tensor = self._pending.popleft()
        work.wait()
        self._pending_bytes -= tensor.nbytes


class Return:
    """The way from the last stage back to the first: acknowledged rounds and token ids, each a small int64 tensor."""

    def __init__(self, group: dist.ProcessGroup, *, first: int, last: int, device: torch.device) -> None:
        self.group, self.source, self.device = group, last, device
        self._outbound = Outbound(group, first)

    def send(self, values: torch.Tensor) -> None:
        """On the last stage: values [n] int64, sent as they are now."""
        self._outbound.send(values.clone())

    def receive(self, count: int) -> torch.Tensor:
        """On the first stage: the next values [count] int64."""
        values = torch.empty(count, device=self.device, dtype=torch.int64)
        work = dist.irecv(values, self.source, group=self.group)
        assert work is not None
        work.wait()
        return values

    def drain(self) -> None:
        """Wait for all sends."""
        self._outbound.drain()
