"""Hidden states from stage to stage and their gradients back: a group of two ranks each way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from profiler.comm.links.mesh import Mesh


@dataclass(slots=True)
class Way:
    """Messages between two ranks in one direction; a sender keeps what it sends until it has gone."""

    peer: int
    group: dist.ProcessGroup
    sent: list[tuple[dist.Work, torch.Tensor]] = field(default_factory=list)

    def send(self, tensor: torch.Tensor) -> None:
        """Begin to send."""
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self.peer, group=self.group)
        assert work is not None
        self.sent.append((work, tensor))
        if tensor.is_cuda:  # work of a card's queue: its stream waits, and the allocator must know
            tensor.record_stream(torch.cuda.current_stream())

    def receive(self, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Wait for a tensor of this size."""
        tensor = torch.empty(size, dtype=dtype, device=device)
        work = dist.irecv(tensor, self.peer, group=self.group)
        assert work is not None
        work.wait()
        return tensor

    def flush(self) -> None:
        """Wait until all has gone."""
        for work, _ in self.sent:
            work.wait()
        self.sent.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """A rank's four ways; None at the ends of the pipeline. `ends` joins its first and last rank of one place."""

    from_before: Way | None = None
    to_next: Way | None = None
    from_next: Way | None = None
    to_before: Way | None = None
    ends: Way | None = None

    def flush(self) -> None:
        """Wait until all that was sent has gone."""
        for way in (self.to_next, self.to_before, self.ends):
            if way is not None:
                way.flush()


@contextmanager
def make_ways(mesh: Mesh, rank: int) -> Iterator[Ways]:
    """Make the groups, in the same order on every rank, and leave them at the end."""
    made: dict[str, Way] = {}

    def way(sender: int, receiver: int, outgoing: str, incoming: str) -> None:
        group = dist.new_group([sender, receiver])
        if rank == sender:
            made[outgoing] = Way(receiver, group)
        elif rank == receiver:
            made[incoming] = Way(sender, group)

    for first, second in mesh.boundaries():
        way(first, second, "to_next", "from_before")
        way(second, first, "to_before", "from_next")
    for first, last in mesh.returns():
        way(first, last, "ends", "ends")
    yield Ways(**made)
    for each in made.values():
        dist.destroy_process_group(each.group)
